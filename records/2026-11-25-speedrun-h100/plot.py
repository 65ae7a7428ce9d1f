"""Draw speedrun.png from the JSON files beside this: python records/2026-11-25-speedrun-h100/plot.py"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = {"baseline": "C0", "palm": "C1", "depth_warm": "C2"}


def read(name: str):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return json.load(f)


def curve(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds (points,), the mean over the runs, and val losses (runs, points)."""
    with open(os.path.join(HERE, f"{variant}_screening", "metrics.jsonl"), encoding="utf-8") as f:
        rows = [row for row in map(json.loads, f) if "val_loss" in row]
    runs = [[row for row in rows if row["run_id"] == i] for i in sorted({row["run_id"] for row in rows})]
    seconds = np.array([[row["train_time_ms"] / 1e3 for row in run] for run in runs])
    return seconds.mean(0), np.array([[row["val_loss"] for row in run] for run in runs])


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=(3, 2))
    for variant, color in VARIANTS.items():
        seconds, losses = curve(variant)
        left.plot(seconds, losses.mean(0), color=color, label=f"{variant}, 2 runs")
        left.fill_between(seconds, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
    for i, run in enumerate(read("record.json")["runs"]):
        points, label = run["val"][1:], "modded-nanogpt 2024-10-14, to step 250"
        left.plot([p["train_time_ms"] / 1e3 for p in points], [p["val_loss"] for p in points], color="0.3",
                  linestyle="--", linewidth=1, label="" if i else label)
    left.set(xlabel="training time on one H100, s", ylabel="val loss", ylim=(0.95, 2.5), xlim=0)
    left.set_title("1,000 steps of 131,072 tokens of Python source", fontsize=10)
    left.legend(frameon=False)

    by_layers = {int(n): row["median_ms"] for n, row in read("steps.json")["depth_warm_by_layers"].items()}
    layers = np.array(sorted(by_layers))
    right.plot(layers, [by_layers[n] for n in layers], "o", color="C2")
    slope, fixed = np.polyfit(layers, [by_layers[n] for n in layers], 1)
    right.plot([0, 12], [fixed, fixed + 12 * slope], color="C2", linewidth=1)
    right.annotate(f"{slope:.1f} ms a layer", (6, fixed + 6 * slope), xytext=(12, -14),
                   textcoords="offset points")
    right.annotate(f"{fixed:.0f} ms: embedding, head, optimizer", (0, fixed), xytext=(10, -8),
                   textcoords="offset points")
    right.set(xlabel="layers that take part", ylabel="ms a step", xlim=(0, 12.5), ylim=0)
    right.set_title("depth_warm: what does not take part takes no time", fontsize=10)
    for ax in (left, right):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(HERE, "speedrun.png"), dpi=110)


if __name__ == "__main__":
    main()
