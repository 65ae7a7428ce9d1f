"""Draw speedrun.png from the JSON files beside this script: python records/2026-11-25-speedrun-h100/plot.py

Blue is train_gpt.py in both panels, grey the record's script.
"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
VARIANTS = ("baseline", "palm", "curriculum", "depth_warm")
SCRIPTS = {"record": ("modded-nanogpt, 2024-10-14", "#666666", "s", "--"),
           "train_gpt.py": ("train_gpt.py", "#0072B2", "o", "-")}


def read(name: str):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return [json.loads(line) for line in f] if name.endswith(".jsonl") else json.load(f)


def draw_against_record(ax) -> None:
    """Draw val loss against training time: a point an evaluation, the mean of the runs and their range."""
    runs = read("against_record.json")["runs"]
    for script, (label, color, marker, line) in SCRIPTS.items():
        points = [[point for point in run["val"] if point["step"]] for run in runs if run["script"] == script]
        seconds = np.array([[point["train_time_ms"] / 1e3 for point in run] for run in points]).mean(0)
        losses = np.array([[point["val_loss"] for point in run] for run in points])
        ax.fill_between(seconds, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
        ax.plot(seconds, losses.mean(0), line, color=color, marker=marker, markersize=4, label=label)
        end = losses.mean(0)[-1]
        ax.annotate(f"{seconds[-1]:.0f} s\n{end:.3f}", (seconds[-1], end), xytext=(0, -7), fontsize=9,
                    textcoords="offset points", ha="center", va="top", color=color)
    ax.set(xlabel="training time on one H100, s", ylabel="val loss", xlim=(0, 160), ylim=(1, 3))
    ax.set_title("500 steps of 131,072 tokens, three seeds each", fontsize=11)
    ax.legend(frameon=False, fontsize=9)
    ax.set_yticks([1, 1.5, 2, 2.5, 3])
    ax.grid(alpha=0.25, axis="y")


def draw_stage_a(ax) -> None:
    """Draw the final val loss of each variant: a point a seed, a bar at their mean."""
    color = SCRIPTS["train_gpt.py"][1]
    against = {row["name"]: row["welch"] for row in read("comparison.json")["comparisons"]}
    losses = {name: [run["final_val_loss"] for run in read(f"{name}_screening/results.jsonl")]
              for name in VARIANTS}
    ax.axvline(np.mean(losses["baseline"]), color=color, linewidth=1, linestyle=":")
    for y, (name, values) in enumerate(losses.items()):
        ax.plot(values, [y] * len(values), "o", color=color, markersize=6, alpha=0.6)
        ax.plot([np.mean(values)] * 2, [y - 0.22, y + 0.22], color=color, linewidth=2.5)
        text = f"{np.mean(values):.4f}"
        if welch := against.get(f"{name}_screening"):
            low, high = welch["interval"]
            text += f"\n{welch['mean']:+.3f}  ({low:+.3f} to {high:+.3f})"
        ax.annotate(text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
                    textcoords="offset points", va="center", fontsize=9)
    ax.annotate("mean\ndifference (95% CI)", (1.0, -0.85), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", fontsize=9, color="#444444")
    ax.set_yticks(range(len(losses)), losses)
    ax.set_ylim(len(losses) - 0.5, -1.15)
    ax.set_xlabel("val loss after 1,000 steps")
    ax.set_title("Stage A: four variants, two seeds each", fontsize=11)
    ax.grid(alpha=0.25, axis="x")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.1, 1))
    draw_against_record(left)
    draw_stage_a(right)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(HERE, "speedrun.png"), dpi=130)


if __name__ == "__main__":
    main()
