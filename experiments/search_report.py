"""The result of a search for the fewest syncs: verdict.txt, frontier.json, frontier.md and frontier.png."""

import io
import math
import os

import numpy as np

from experiments.report import table, write
from experiments.search_evidence import OPEN, SearchPlan, arm_name, count_of
from nanosync.files import json_text

CONTROL = "dense_"  # how the name of a dense model of fewer layers begins


def rows_of(rules: SearchPlan, outcome: dict, times: dict[str, float]) -> list[dict]:
    """Return the arms with their syncs, layers, and µs a token; None for an unknown time.

    times: µs by arm. Times that were not measured are estimated: of a count between two measured ones by a
    line through these, of a dense model of fewer layers by its share of the layers. Families have none.
    """
    rows, dense, families = [], rules.counts[0] // 2, dict(rules.families)
    measured = sorted((count_of(arm), us) for arm, us in times.items() if arm.startswith("even_"))
    for arm in outcome["arms"]:
        control = arm["arm"].startswith(CONTROL)
        layers = int(arm["arm"][len(CONTROL):].removesuffix("layers")) if control else dense
        syncs, family = 2 * layers if control else rules.syncs_of(arm["arm"]), arm["arm"] in families
        us = times.get(arm["arm"] if control or family else arm_name(syncs))
        estimated = us is None
        if control and us is None and rules.baseline in times:
            us = times[rules.baseline] * layers / dense
        elif us is None and not (control or family) and measured:
            us = float(np.interp(syncs, *zip(*measured), left=math.nan, right=math.nan))
            us = None if math.isnan(us) else us
        estimated = estimated and us is not None
        rows.append(arm | {"control": control, "family": family, "layers": layers, "syncs": syncs, "us": us,
                           "us_estimated": estimated, "answer": arm["arm"] == outcome["arm"]})
    return sorted(rows, key=lambda row: (row["control"], -row["syncs"], row["arm"]))


def plural(layers: int) -> str:
    return f"{layers} layer{'s' * (layers > 1)}"


def control_text(rules: SearchPlan, rows: list[dict]) -> str:
    """Say what the dense models of fewer layers show."""
    controls = [row for row in rows if row["control"]]
    if not controls:
        return "No dense model of fewer layers was trained, so nothing is known about depth."
    close = [row for row in controls if row["interval"][1] <= rules.margin]
    text = "No dense model of fewer layers was shown to be within the margin."
    if close:
        least = min(row["layers"] for row in close)
        text = f"A dense model of {plural(least)} is within the margin as well: the loss says little about " \
               f"capacity here."
    answer = next((row for row in rows if row["answer"]), None)
    if answer is None:
        return text
    if answer["us"] is None:
        return text + f" Without the µs of {answer['arm']} in a latency table, schedule and depth cannot " \
                      f"be compared at equal latency."
    equal = [row for row in controls if row["us"] is not None and row["us"] <= answer["us"]]
    if not equal:
        return text + f" No trained dense model of fewer layers is as fast as {answer['arm']}."
    best = min(equal, key=lambda row: row["ratio"])
    better, worse = answer["interval"][1] < best["interval"][0], answer["interval"][0] > best["interval"][1]
    verdict = "has a lower loss than" if better else "has a higher loss than" if worse else \
        "cannot be told from"
    return text + f" At equal latency, {answer['arm']} ({answer['us']:.0f} µs) {verdict} a dense model of " \
                  f"{plural(best['layers'])} ({best['us']:.0f} µs{', estimated' * best['us_estimated']})."


def rows_table(rows: list[dict]) -> str:
    """Return the arms as a Markdown table."""
    cells = []
    for row in rows:
        low, high = (f"{100 * math.expm1(end):+.2f}" for end in row["interval"])
        us = "-" if row["us"] is None else f"{row['us']:.0f}{' (estimated)' * row['us_estimated']}"
        cells.append([row["arm"], str(row["syncs"]), str(row["layers"]), str(row["runs"]),
                      f"{row['loss']:.4f}", f"{100 * math.expm1(row['ratio']):+.2f}%", f"{low} to {high}%",
                      us, row["verdict"] + ", the answer" * row["answer"]])
    return table(["arm", "syncs", "layers", "runs", "val loss", "against dense", "95% CI", "µs a token",
                  "verdict"], cells)


def write_frontier(folder: str, rules: SearchPlan, outcome: dict, times: dict[str, float]) -> str:
    """Write the files; return the verdict and what the control shows."""
    rows = rows_of(rules, outcome, times)
    control = control_text(rules, rows)
    second = "".join(f"- {row['text']}\n" for row in outcome["second_budget"])
    write(os.path.join(folder, "verdict.txt"), outcome["verdict"] + "\n")
    write(os.path.join(folder, "frontier.json"), json_text(
        {"verdict": outcome["verdict"], "within": rules.within, "fewest": outcome["fewest"],
         "proof": outcome["proof"], "count_interval": outcome["count_interval"], "control": control,
         "arms": rows, "second_budget": outcome["second_budget"]}))
    write(os.path.join(folder, "frontier.md"), f"{outcome['verdict']}\n\n{control}\n\n{rows_table(rows)}"
          + (f"\nSecond budget:\n\n{second}" if second else "") + "\n![Frontier](frontier.png)\n")
    if rows:
        draw(rules, rows, os.path.join(folder, "frontier.png"))
    return f"{outcome['verdict']}\n{control}"


def draw(rules: SearchPlan, rows: list[dict], path: str) -> None:
    """Draw the loss against dense, with intervals, over the µs of a token, else over the syncs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = any(row["us"] is not None for row in rows)
    x_of = {row["arm"]: row["us"] if timed else row["syncs"] for row in rows}
    rows = [row for row in rows if x_of[row["arm"]] is not None]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    groups = {"dense, fewer layers": [row for row in rows if row["control"]]}
    for row in sorted(rows, key=lambda row: row["family"]):
        if not row["control"]:
            label = "families" if row["family"] else f"{row['arm'].rpartition('_')[0]} placement"
            groups.setdefault(label, []).append(row)
    colors = iter(["#808080", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#cc79a7"])
    for label, group in groups.items():
        color = next(colors)
        if not group:
            continue
        group.sort(key=lambda row: x_of[row["arm"]])
        xs, ys = [x_of[row["arm"]] for row in group], [100 * math.expm1(row["ratio"]) for row in group]
        if label.startswith(("dense", "even")):
            axes.plot(xs, ys, "-", color=color, linewidth=1, alpha=0.6)
        axes.plot([], [], "o", color=color, label=label)
        for row, x, y in zip(group, xs, ys):
            low, high = (100 * math.expm1(end) for end in row["interval"])
            axes.plot([x, x], [low, high], color=color, linewidth=1.2)
            axes.scatter([x], [y], s=30 + 6 * row["syncs"], edgecolors=color, linewidths=1.5, zorder=3,
                         facecolors="white" if row["verdict"] == OPEN else color)
            name = plural(row["layers"]) if row["control"] else \
                row["arm"] if row["family"] else str(row["syncs"])
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(9, 6), fontsize=8, color=color)
    axes.axhline(100 * rules.within, color="#c00000", linestyle="--", linewidth=1)
    axes.annotate(f"margin, {100 * rules.within:g}%", (0.005, 100 * rules.within), fontsize=8,
                  xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", ha="left",
                  color="#c00000")
    if not timed:
        axes.set_xscale("log", base=2)
        ticks = sorted({row["syncs"] for row in rows if not (row["control"] or row["family"])})
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
    axes.set_xlabel("µs a token" if timed else "all-reduces of a forward pass")
    axes.set_ylabel("val loss against dense, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="open: undecided", title_fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write(path, picture.getvalue())
