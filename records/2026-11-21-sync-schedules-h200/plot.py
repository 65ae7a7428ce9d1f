"""Draw syncs.png and decode.png from the JSON files beside this script.

    python records/2026-11-21-sync-schedules-h200/plot.py

In both pictures a colour stands for a number of tensor-parallel ranks: one (the dense GPT, one GPU), two or
four. The line style stands for the implementation of the all-reduce, NCCL or one-shot.
"""

import json
import os
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
COLORS = {1: "#555555", 2: "#D55E00", 4: "#0072B2"}  # by ranks; colour-blind safe (Okabe and Ito)
MARKERS = {1: "D", 2: "s", 4: "o"}
NAMES = {"nccl": "4 GPUs, NCCL", "oneshot": "4 GPUs, one-shot exchange"}
LINE_STYLES = {"nccl": {"linestyle": (0, (4, 1.5)), "markerfacecolor": "white"},
               "oneshot": {"linestyle": "-"}}
COUNTS = [1, 2, 3, 4, 6, 12, 24]
DENSE = 24  # all-reduces with which the ranks compute the dense GPT's function
BAND = 2.0  # percent


def load(name: str) -> dict:
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return json.load(f)


def final_losses(study: dict, ranks: int) -> dict[int, list[float]]:
    """Return the last val losses of all seeds by the number of all-reduces.

    24 all-reduces were run with 2 ranks only; with 4 ranks the model computes the same function.
    """
    losses = {}
    for n in COUNTS:
        prefix = f"py_r{2 if n == DENSE else ranks}_n{n}_s"
        losses[n] = [evaluations[-1][2] for name, evaluations in study.items()
                     if name.startswith(prefix)]
    return losses


def latencies(kind: str, C: int, B: int) -> tuple[dict[int, float], float]:
    """Return the µs a token by the number of all-reduces, and those of one GPU, at width C and batch B."""
    rows = [row for row in load(f"decode4_{kind}.json")["rows"]
            if (row["n_embd"], row["batch_size"]) == (C, B)]
    by_count = {int(row["name"].split()[0]): row["us"] for row in rows if "syncs" in row["name"]}
    return by_count, next(row["us"] for row in rows if row["name"] == "TP=1")


def draw_losses(ax) -> None:
    """Draw the difference from the mean with 24 all-reduces: a point a seed, a line through the means."""
    study = load("study.json")
    dense = final_losses(study, 2)[DENSE]
    zero = mean(dense)
    ax.axhspan(-BAND, BAND, color=COLORS[1], alpha=0.12, linewidth=0)
    ax.axhline(0, color=COLORS[1], linewidth=1)
    ax.annotate(f"±{BAND:.0f}% (±{BAND / 100 * zero:.3f})", (0, -BAND), xycoords=("axes fraction", "data"),
                xytext=(5, 4), textcoords="offset points", va="bottom", fontsize=9, color=COLORS[1])
    for ranks in (2, 4):
        losses = final_losses(study, ranks)
        change = {n: [100 * (loss / zero - 1) for loss in losses[n]] for n in COUNTS}
        style = {"color": COLORS[ranks], "marker": MARKERS[ranks]}
        ax.plot(COUNTS, [mean(change[n]) for n in COUNTS], markersize=6, **style,
                label=f"{ranks} ranks, mean of seeds")
        aside = 2 ** (0.09 if ranks == 4 else -0.09)  # seeds of 2 and of 4 ranks would hide each other
        for n in COUNTS[:-1]:
            ax.plot([n * aside] * len(change[n]), change[n], linestyle="", markersize=3.5, alpha=0.6, **style)
    ax.plot([DENSE] * len(dense), [100 * (loss / zero - 1) for loss in dense], linestyle="", markersize=3.5,
            color=COLORS[1], marker=MARKERS[1])
    ax.plot(DENSE, 0, linestyle="", color=COLORS[1], marker=MARKERS[1], markersize=7,
            label=f"24: the dense GPT, mean {zero:.3f}")
    ax.plot([], [], linestyle="", color=COLORS[1], marker="o", markersize=3.5, label="small: one seed")
    ax.set_ylabel("val loss, difference from 24 all-reduces")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}%" if value else "0")
    ax.legend(frameon=False, fontsize=9, loc="upper right")


def draw_latency(ax, C: int, B: int, counts: list[int], labelled: list[int]) -> None:
    """Draw the time of a token of 4 GPUs, with NCCL and with one-shot sums, and that of one GPU."""
    times = {kind: latencies(kind, C, B) for kind in NAMES}
    alone = times["oneshot"][1]  # of the run with NCCL: the same within 0.5%
    top = 1.13 * max(alone, *times["nccl"][0].values())
    for kind, (by_count, _) in times.items():
        ax.plot(counts, [by_count[n] for n in counts], color=COLORS[4], marker=MARKERS[4], markersize=5,
                label=NAMES[kind], **LINE_STYLES[kind])
        for n in labelled:
            us = by_count[n]
            above = kind == "nccl" or us > alone
            # a label that would lie on the line of one GPU is moved above this line
            edge = alone if above and us < alone < us + 0.08 * top else us
            if n or kind == "oneshot":  # without all-reduces both run the same program
                ax.annotate(f"{us:.0f}", (n, edge), xytext=(0, 5 if above else -6),
                            textcoords="offset points", ha="center", va="bottom" if above else "top",
                            fontsize=9, color=COLORS[4])
    ax.axhline(alone, color=COLORS[1], linewidth=1, zorder=1)
    ax.annotate(f"one GPU\n{alone:.0f}", (1, alone), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=9, color=COLORS[1])
    ax.set_ylim(0, top)
    ax.set_ylabel("µs a token")


def draw_syncs() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_losses(left)
    left.set_title("Loss: 41M parameters, 33M tokens of Python source", fontsize=11)
    draw_latency(right, 768, 1, [1, 3, 6, 12, 24], [1, 3, 6, 12, 24])
    right.set_title("Time: GPT-2's 12 layers, width 768, batch 1, 4 H200", fontsize=11)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xlim(0.82, 29)
        ax.set_xticks(COUNTS, COUNTS)
        ax.minorticks_off()
    finish(figure, (left, right), "syncs.png")


def draw_decode() -> None:
    counts = [0, 1, 3, 6, 12, 24]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    for row, B in zip(axes, (1, 16)):
        for ax, C in zip(row, (768, 2048)):
            draw_latency(ax, C, B, counts, [0, 3, 6, 12, 24])
            ax.set_xticks(counts)
            ax.set_title(f"width {C}, batch {B}", fontsize=11)
    axes[0, 0].legend(frameon=False, fontsize=9, loc="lower right")
    finish(figure, axes.flat, "decode.png")


def finish(figure, axes, name: str) -> None:
    for ax in axes:
        ax.set_xlabel("all-reduces in a forward pass")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(HERE, name), dpi=130)


if __name__ == "__main__":
    draw_syncs()
    draw_decode()
