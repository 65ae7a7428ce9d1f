"""The picture of a frontier: the loss of each arm over the time of a token, a panel for each exchange.

It is made for a width of 900 pixels. Each number of TP ranks that the tables have is a row of panels.
"""

import io
import math
import re

from experiments.report import write

PRELIMINARY = 3  # finished runs from which on an arm is not preliminary
EXCHANGES = {"oneshot": "one-shot exchange", "nccl": "NCCL", "fused": "fused exchange"}  # in tables -> titles
COLORS = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#56B4E9", "#8c564b", "#7F3C8D"]
GREY = "#707070"  # of dense models
MARKERS = {2: "o", 4: "s", 8: "^"}  # by TP ranks, where a panel has several
ESTIMATED = "X"  # marker of an estimated time
TICKS = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64]  # %, beyond LINEAR the axis is logarithmic
LINEAR = 2.0  # %
SIZE, DPI = 7.5, 200  # points of a label; pixels of an inch
PLACES = [(x, y) for y in (0, 9, -9, 18, -18, 27, -27) for x in (1, -1)]  # of a label: dy in points, side
FAR = 9  # points from which a line leads from a label to its point


def percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


def family(row: dict) -> str:
    """Return the mechanism of an arm, by its name: drop_6_r2 -> drop."""
    return row["arm"].split("_")[0]


def name_of(row: dict) -> str:
    """Return the label of an arm, without its ranks and without "drop": drop_6_r2 -> 6, dense_8_x -> 8 layers
    x."""
    name = re.sub(r"_r\d+$", "", row["arm"])
    if row["dense"]:
        return " ".join([f"{row['layers']} layers", *name.split("_")[2:]])
    return name.removeprefix("drop_").replace("_", " ")


def draw(rows: list[dict], measured: list[tuple[str, int]], setting: str, path: str) -> None:
    """Draw the arms. Raises UserError.

    rows: see frontier_draw.rows_of. measured: pairs of exchange and TP ranks that the latency tables have;
    without any there is one panel, over the syncs. setting: model and device of the times.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    exchanges = [name for name in EXCHANGES if any(exchange == name for exchange, _ in measured)] or [None]
    ranks = sorted({n for _, n in measured}) or [None]
    figure, axes = plt.subplots(len(ranks), len(exchanges), squeeze=False, sharey=True, sharex="col",
                                figsize=(9, 0.9 + 4.4 * len(ranks)), dpi=DPI, layout="constrained")
    families = dict.fromkeys(family(row) for row in rows if not row["dense"])
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(families)}
    values = []
    for i, n in enumerate(ranks):
        for j, exchange in enumerate(exchanges):
            points = points_of(rows, exchange, n)
            draw_points(axes[i, j], rows, points, colors, exchange is None)
            values += [y for point in points for y in point["ends"]]
            axes[i, j].set_visible(exchange is None or (exchange, n) in measured)
            axes[i, j].set_title("" if exchange is None else f"{EXCHANGES[exchange]}, {n} GPUs", fontsize=9)
        first = next(ax for ax in axes[i] if ax.get_visible())
        first.set_ylabel("val loss against dense, %", fontsize=9)
        first.tick_params(labelleft=True)
    scale(axes[0, 0], values)
    for column in axes.T:
        last = [ax for ax in column if ax.get_visible()][-1]
        last.set_xlabel(f"µs a token ({setting})" if measured else "all-reduces of a forward pass",
                        fontsize=9)
        last.tick_params(labelbottom=True)
    figure.legend(handles=legend(plt, rows, colors, not measured), frameon=False, fontsize=8,
                  loc="outside lower center", ncols=5)
    figure.draw_without_rendering()  # which decides the places of the axes, and so the room for labels
    figure.set_layout_engine("none")
    for i, n in enumerate(ranks):
        for j, exchange in enumerate(exchanges):
            label(axes[i, j], points_of(rows, exchange, n), one_gpu_points(rows) if exchange else [], colors)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    plt.close(figure)
    write(path, picture.getvalue())


def points_of(rows: list[dict], exchange: str | None, ranks: int | None) -> list[dict]:
    """Return the arms of a panel: row, x, estimated, y in %, ends of the interval in %."""
    points = []
    for row in rows:
        of_panel = [t for t in row["times"] if (t["exchange"], t["processes"]) == (exchange, ranks)]
        places = [(t["us"], t["estimated"]) for t in of_panel]
        if exchange is None:
            places = [(row["syncs"], False)]
        if row["ratio"] is not None and places and places[0][0] is not None:
            x, estimated = places[0]
            points.append({"row": row, "x": x, "y": percent(row["ratio"]), "estimated": estimated,
                           "ends": [percent(end) for end in row["interval"] or [row["ratio"]] * 2]})
    return points


def draw_points(ax, rows: list[dict], points: list[dict], colors: dict[str, str], by_ranks: bool) -> None:
    """Draw points with their intervals, and lines through the dense models, also those on one GPU, and the
    evenly dropped syncs. by_ranks: True to show the TP ranks by markers."""
    for point in points:
        row, color = point["row"], color_of(point["row"], colors)
        marker = MARKERS.get(row["ranks"], "D") if by_ranks else ESTIMATED if point["estimated"] else "o"
        ax.plot([point["x"]] * 2, point["ends"], color=color, linewidth=1, alpha=0.6, zorder=2)
        ax.scatter([point["x"]], [point["y"]], s=12 + 2.2 * (row["syncs"] or 0), zorder=3, linewidths=1.2,
                   marker=marker, edgecolors=color,
                   facecolors="white" if row["preliminary"] else color)
    lines = {}
    for point in points:
        row = point["row"]
        if row["dense"] and name_of(row).endswith("layers"):
            lines.setdefault(GREY, []).append((point["x"], point["y"]))
        elif re.fullmatch(r"\d+", name_of(row)):
            lines.setdefault((colors[family(row)], row["ranks"]), []).append((point["x"], point["y"]))
    for key, line in lines.items():
        ax.plot(*zip(*sorted(line)), color=key if key == GREY else key[0], linewidth=1, alpha=0.7, zorder=1)
    alone = [] if by_ranks else one_gpu_points(rows)
    if alone:
        ax.plot(*zip(*alone), ":", marker=".", markersize=4, color=GREY, linewidth=1, zorder=1)
    ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.margins(x=0.09)


def one_gpu_points(rows: list[dict]) -> list[tuple[float, float]]:
    """Return x and y in % of the dense models on one GPU."""
    return sorted((row["one_gpu"], percent(row["ratio"])) for row in rows if row["one_gpu"] is not None
                  and row["ratio"] is not None and name_of(row).endswith("layers"))


def color_of(row: dict, colors: dict[str, str]) -> str:
    return GREY if row["dense"] else colors[family(row)]


def scale(ax, values: list[float]) -> None:
    """Make the shared axis of the losses logarithmic beyond LINEAR if they go far beyond."""
    if not values or max(map(abs, values)) < 2 * LINEAR:
        return
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
    low, high = min(values), max(values)
    low, high = low - 0.2 * max(abs(low), 1), high + 0.2 * max(abs(high), 1)
    ticks = [t for t in (*(-t for t in TICKS), 0.0, *TICKS) if low <= t <= high]
    ax.set_ylim(low, high)
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()


def label(ax, points: list[dict], others: list[tuple[float, float]], colors: dict[str, str]) -> None:
    """Write the name of each arm where it covers the least of the points and of other names, where few other
    points are beside it, and where its line crosses no other's. others: x, y of points without a name."""
    from matplotlib.patheffects import withStroke

    to_points = 72 / ax.figure.dpi
    at = [ax.transData.transform((point["x"], point["y"])) * to_points for point in points]
    left, right = (end * to_points for end in (ax.bbox.x0, ax.bbox.x1))
    taken = [(x - 4, y - 4, x + 4, y + 4)
             for x, y in [*at, *(ax.transData.transform(other) * to_points for other in others)]]
    lines = []  # (point, middle of its name) of names that are far from their point
    for point, (x, y) in sorted(zip(points, at), key=lambda pair: pair[1][1]):
        text = name_of(point["row"])
        width = 0.56 * SIZE * len(text)
        boxes = []
        for side, dy in PLACES:
            start = x + 6 if side > 0 else x - 6 - width
            box = (start, y + dy - SIZE / 2, start + width, y + dy + SIZE / 2)
            outside = max(left - box[0], 0) + max(box[2] - right - 12, 0)
            beside = sum(start - 8 < a < start + width + 8 and abs(b - y - dy) < 1.6 * SIZE
                         for a, b in at if (a, b) != (x, y))
            covered = sum(overlap(box, other) for other in taken)
            line = (x, y), (start + width / 2, y + dy)
            crossed = sum(cross(*line, *other) for other in lines) if abs(dy) > FAR else 0
            boxes.append((covered + 20 * outside + 15 * beside + 60 * crossed + 0.2 * abs(dy), box, side, dy))
        _, box, side, dy = min(boxes)
        taken.append(box)
        if far := abs(dy) > FAR:
            lines.append(((x, y), ((box[0] + box[2]) / 2, y + dy)))
        ax.annotate(text, (point["x"], point["y"]), textcoords="offset points", xytext=(6 * side, dy),
                    fontsize=SIZE, va="center", ha="left" if side > 0 else "right", zorder=4,
                    color=color_of(point["row"], colors),
                    path_effects=[withStroke(linewidth=1.5, foreground="white")], arrowprops={
                        "arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3,
                        "color": color_of(point["row"], colors)} if far else None)


def cross(a: tuple, b: tuple, c: tuple, d: tuple) -> bool:
    """Return True if the line from a to b crosses that from c to d."""
    def left_of(p: tuple, q: tuple, r: tuple) -> bool:
        return (q[0] - p[0]) * (r[1] - p[1]) > (q[1] - p[1]) * (r[0] - p[0])

    return left_of(a, b, c) != left_of(a, b, d) and left_of(c, d, a) != left_of(c, d, b)


def overlap(a: tuple, b: tuple) -> float:
    """Return the common area of two boxes (left, bottom, right, top)."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def legend(plt, rows: list[dict], colors: dict[str, str], by_ranks: bool) -> list:
    """Return the handles of the legend. by_ranks: True if a panel has several numbers of TP ranks."""
    def handle(text: str, color: str, **changed):
        return plt.Line2D([], [], **{"marker": "o", "markersize": 5, "linestyle": "", "color": color,
                                     "label": text} | changed)

    handles = [handle("dense, all syncs", GREY, linestyle="-", linewidth=1)]
    handles += [handle("drop: number of syncs" if name == "drop" else name, color)
                for name, color in colors.items()]
    ranks = sorted({row["ranks"] for row in rows if not row["any_ranks"] and row["ranks"]})
    if by_ranks and len(ranks) > 1:
        handles += [handle(f"{n} TP ranks", "0.3", marker=MARKERS.get(n, "D")) for n in ranks]
    if not by_ranks and any(row["one_gpu"] is not None for row in rows):
        handles.append(handle("dense, on one GPU", GREY, marker=".", linestyle=":", linewidth=1))
    if not by_ranks and any(t["estimated"] for row in rows for t in row["times"]):
        handles.append(handle("estimated time", "0.3", marker=ESTIMATED))
    if any(row["preliminary"] for row in rows):
        handles.append(handle(f"preliminary: fewer than {PRELIMINARY} runs", "0.3", markerfacecolor="white"))
    return handles
