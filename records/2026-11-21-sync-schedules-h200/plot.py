"""Draw syncs.png and decode.png from the JSON files beside."""

import json
import os
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
BLUE, RED, GREY = "#1b6ca8", "#c0504d", "#666666"
COUNTS = [24, 12, 6, 4, 3, 2, 1]


def load(name):
    with open(os.path.join(HERE, name)) as f:
        return json.load(f)


def curve(rows, C, B):
    """[(syncs, us)], and us of one GPU."""
    mine = [r for r in rows if (r["n_embd"], r["batch_size"]) == (C, B)]
    return ([(int(r["name"].split()[0]), r["us"]) for r in mine if "syncs" in r["name"]],
            next(r["us"] for r in mine if r["name"] == "TP=1"))


def plain(ax, x):
    ax.set_xlabel("all-reduces of a forward pass")
    ax.set_xticks(x, [str(n) for n in x])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)


def draw_latency(ax, C, B, labels=True):
    for kind, name, colour in (("nccl", "4 GPUs, NCCL", RED), ("oneshot", "4 GPUs, one-shot", BLUE)):
        points, alone = curve(load(f"decode4_{kind}.json")["rows"], C, B)
        ax.plot(*zip(*points), "o-", color=colour, markersize=4, label=name)
        for n, us in points if labels else ():
            if n in (0, 3, 6, 12, 24):
                ax.annotate(f"{us:.0f}", (n, us), textcoords="offset points", fontsize=8, ha="center",
                            xytext=(0, 6 if kind == "nccl" else -13), color=colour)
    ax.set_xlim(-1, 24.6)
    ax.axhline(alone, color=GREY, linestyle="--", linewidth=1)
    ax.text(24.8, alone, "one GPU", ha="left", va="center", fontsize=8, color=GREY)
    plain(ax, [0, 1, 3, 6, 12, 24])


study = load("study.json")
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained")
for R, colour in ((2, BLUE), (4, RED)):
    losses = {n: [run[-1][2] for name, run in study.items() if name.startswith(f"py_r{R}_n{n}_s")]
              for n in COUNTS}
    losses = {n: values for n, values in losses.items() if values}
    for n, values in losses.items():
        left.plot([n] * len(values), values, "o", color=colour, markersize=3.5, alpha=0.6)
    left.plot(list(losses), list(map(statistics.mean, losses.values())), color=colour, linewidth=1.5,
              label=f"{R} ranks")
left.set_xscale("log", base=2)
plain(left, COUNTS)
left.set_ylabel("val loss")
left.set_title("41M parameters, 33M tokens of Python source", fontsize=11)
left.legend(frameon=False, fontsize=9)
draw_latency(right, 768, 1)
right.set_ylim(0)
right.set_ylabel("µs a token")
right.set_title("decoding GPT-2's 12 layers, width 768, batch 1", fontsize=11)
right.legend(frameon=False, loc="lower center", fontsize=9)
figure.savefig(os.path.join(HERE, "syncs.png"), dpi=110)

figure, axes = plt.subplots(2, 2, figsize=(11, 6.6), layout="constrained")
for row, B in zip(axes, (1, 16)):
    for ax, C in zip(row, (768, 2048)):
        draw_latency(ax, C, B)
        ax.set_title(f"width {C}, batch {B}", fontsize=11)
        ax.set_ylim(0)
        ax.set_ylabel("µs a token")
axes[0, 0].legend(frameon=False, loc="lower center", fontsize=9)
figure.suptitle("Decoding, 12 layers, bf16, 4 H200", fontsize=12)
figure.savefig(os.path.join(HERE, "decode.png"), dpi=110)
