"""Draw decode.png from decode4_oneshot.json. python records/2026-11-21-sync-schedules-h200/plot.py"""

import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(HERE, "decode4_oneshot.json")) as f:
    rows = json.load(f)["rows"]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained", sharey=False)
for ax, C in zip(axes, (768, 2048)):
    for B, colour in ((1, "#1b6ca8"), (16, "#c0504d")):
        mine = [r for r in rows if (r["n_embd"], r["batch_size"]) == (C, B)]
        syncs = [(int(r["name"].split()[0]), r["us"]) for r in mine if "syncs" in r["name"]]
        alone = next(r["us"] for r in mine if r["name"] == "TP=1")
        ax.plot(*zip(*syncs), "o-", color=colour, label=f"4 GPUs, batch {B}")
        ax.axhline(alone, color=colour, linestyle="--", linewidth=1)
        ax.text(24, alone, f"one GPU, batch {B}", ha="right", va="bottom", fontsize=8, color=colour)
        for n, us in syncs:
            ax.annotate(f"{us:.0f}", (n, us), textcoords="offset points", xytext=(0, 6), ha="center",
                        fontsize=8)
    ax.set_title(f"width {C}", fontsize=11)
    ax.set_xlabel("all-reduces of a forward pass")
    ax.set_xticks([0, 1, 3, 6, 12, 24])
    ax.set_ylim(250 if C == 768 else 350)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("µs a token")
axes[0].legend(frameon=False, loc="upper left", fontsize=9)
figure.suptitle("Decoding, 12 layers, bf16, H200, one-shot all-reduce", fontsize=12)
figure.savefig(os.path.join(HERE, "decode.png"), dpi=110)
