"""Draw fast.png from runs_3.json: python records/2026-11-29-speedrun-fast-h200/plot.py"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPTS = {"train_gpt": ("train_gpt.py, 600 steps, one seed", "#E69F00", "^", ":"),
           "peer": ("record of 2025-07-18, 600 steps, three seeds", "#666666", "s", "--"),
           "ours": ("train_gpt_fast.py, 800 steps, three seeds", "#0072B2", "o", "-"),
           "ours200": ("train_gpt_fast.py, 200 steps, one seed", "#56B4E9", "v", "-")}


def main() -> None:
    with open(os.path.join(HERE, "runs_3.json"), encoding="utf-8") as f:
        runs = [run for run in json.load(f)["runs"] if "alone" in run["call"]]
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for script, (label, color, marker, line) in SCRIPTS.items():
        points = np.array([[point for point in run["step_val_ms"] if point[0] >= 100]
                           for run in runs if run["name"].split("-")[0] == script])  # (runs, points, 3)
        seconds, losses = points[..., 2].mean(0) / 1e3, points[..., 1]
        ax.fill_between(seconds, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
        ax.plot(seconds, losses.mean(0), line, color=color, marker=marker, markersize=4, label=label)
        ax.annotate(f"{seconds[-1]:.0f} s\n{losses.mean(0)[-1]:.3f}", (seconds[-1], losses.mean(0)[-1]),
                    xytext=(7, 0), fontsize=9, textcoords="offset points", va="center", color=color)
    ax.set(xlabel="training time on one H200, s", ylabel="val loss", xlim=(0, 125), ylim=(0.75, 2.8))
    ax.legend(frameon=False, fontsize=9)
    ax.grid(alpha=0.25, axis="y")
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(HERE, "fast.png"), dpi=130)


if __name__ == "__main__":
    main()
