"""Draw speedrun.png from the JSON files beside this: python records/2026-11-25-speedrun-h100/plot.py"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = {"baseline": "C0", "palm": "C1", "curriculum": "C2", "depth_warm": "C3"}


def read(name: str):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return json.load(f)


def curve(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (points,) and val losses (runs, points)."""
    with open(os.path.join(HERE, f"{variant}_screening", "metrics.jsonl"), encoding="utf-8") as f:
        rows = [row for row in map(json.loads, f) if "val_loss" in row]
    runs = [[row for row in rows if row["run_id"] == i] for i in sorted({row["run_id"] for row in rows})]
    return (np.array([row["step"] for row in runs[0]]),
            np.array([[row["val_loss"] for row in run] for run in runs]))


def draw(ax, x, losses, color: str, label: str) -> None:
    """The mean over runs, and from the lowest to the highest."""
    ax.plot(x, losses.mean(0), color=color, label=label)
    ax.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)


def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained",
                                                 width_ratios=(4, 4, 3))
    runs = read("against_record.json")["runs"]
    for script, color, label in (("record", "0.3", "modded-nanogpt 2024-10-14"),
                                 ("train_gpt.py", "C0", "train_gpt.py")):
        points = [[p for p in run["val"] if p["step"]] for run in runs if run["script"] == script]
        seconds = np.array([[p["train_time_ms"] / 1e3 for p in run] for run in points]).mean(0)
        draw(left, seconds, np.array([[p["val_loss"] for p in run] for run in points]), color,
             f"{label}, {len(points)} runs")
        left.plot(seconds[-1], np.mean([run[-1]["val_loss"] for run in points]), "o", color=color)
    left.set(xlabel="training time on one H100, s", ylabel="val loss", ylim=(1.3, 3), xlim=0)
    left.set_title("500 steps of 131,072 tokens of Python source", fontsize=10)
    left.legend(frameon=False)

    for variant, color in VARIANTS.items():
        draw(middle, *curve(variant), color, f"{variant}, 2 runs")
    middle.set(xlabel="step", ylabel="val loss", ylim=(0.95, 2.1), xlim=0)
    middle.set_title("stage A: 1,000 steps", fontsize=10)
    middle.legend(frameon=False)

    by_layers = {int(n): row["median_ms"] for n, row in read("steps.json")["depth_warm_by_layers"].items()}
    layers = np.array(sorted(by_layers))
    right.plot(layers, [by_layers[n] for n in layers], "o", color="C3")
    slope, fixed = np.polyfit(layers, [by_layers[n] for n in layers], 1)
    right.plot([0, 12], [fixed, fixed + 12 * slope], color="C3", linewidth=1)
    right.annotate(f"{slope:.1f} ms a layer", (6, fixed + 6 * slope), xytext=(12, -14),
                   textcoords="offset points")
    right.annotate(f"{fixed:.0f} ms: embedding, head, optimizer", (0, fixed), xytext=(10, -8),
                   textcoords="offset points")
    right.set(xlabel="layers that take part", ylabel="ms a step", xlim=(0, 12.5), ylim=0)
    right.set_title("depth_warm, before ReLU² in the products", fontsize=10)
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(HERE, "speedrun.png"), dpi=110)


if __name__ == "__main__":
    main()
