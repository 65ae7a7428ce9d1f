"""Draw speed.png from the JSON files beside this script: python plot.py"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OURS, THEIRS = "#1b6ca8", "#b0b7bf"


def figures(name):
    return json.loads((HERE / f"{name}.json").read_text())["contenders"]


def bars(axes, groups, unit, title):
    """groups: {label: [(who, value), ...]}, the last of each ours."""
    x, ticks = 0, []
    top = max(value for entries in groups.values() for _, value in entries)
    for label, entries in groups.items():
        axes.text(x + (len(entries) - 1) / 2, -0.18 * top, label, ha="center", va="top", fontsize=10)
        for who, value in entries:
            axes.bar(x, value, color=OURS if who == "nanoSync" else THEIRS, width=0.9)
            axes.text(x, value + 0.015 * top, f"{value:.3g}", ha="center", fontsize=9)
            ticks.append((x, who.replace(" ", "\n")))
            x += 1
        x += 0.7
    axes.set_xticks([t for t, _ in ticks], [who for _, who in ticks], fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


train = {}
for B in (12, 64):
    f = figures(f"train_b{B}")
    train[f"B={B}"] = [("nanoGPT", f["peer"]["tokens_per_second"] / 1e3),
                       ("nanoSync", f["ours"]["tokens_per_second"] / 1e3)]
generate = {}
for B in (1, 32):
    hf, nanogpt = figures(f"generate_b{B}_hf"), figures(f"generate_b{B}_nanogpt")
    generate[f"B={B}"] = [("HF dynamic", hf["hf-dynamic"]["ms"]), ("nanoGPT", nanogpt["peer"]["ms"]),
                          ("HF static", hf["hf-static"]["ms"]), ("nanoSync", hf["ours"]["ms"])]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.6))
bars(left, train, "thousand tokens a second", "Training step (higher is better)")
bars(right, generate, "ms a step", "Generation (lower is better)")
figure.suptitle("GPT-2 124M, T=1024, bf16, one H200", fontsize=12)
figure.tight_layout()
figure.savefig(HERE / "speed.png", dpi=150)
