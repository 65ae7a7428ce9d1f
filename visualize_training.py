"""Draw the logs of one run or several: losses, learning rate, norm, speed, and HellaSwag where measured.

    python visualize_training.py                                 # the run in `out`, also while it trains
    python visualize_training.py out-python-24sync out-python-6sync --out=compared.png
    python visualize_training.py out/run_20261121-120257.jsonl   # one log, without the others of its run

Writes run_<timestamp>_analysis.png beside the newest log. Prints its path and a line about each run. Faint
lines are all logged iterations, opaque lines running means. Ticks below the losses, a row a run, are
checkpoints.
"""

import contextlib
import math
import os
import statistics
import warnings
from dataclasses import dataclass

import numpy as np

from configurator import Parser
from nanosync.errors import UserError
from nanosync.files import check_can_write, made_folder, os_error_as_user_error
from nanosync.run_log import RunLog

ENDINGS = (".png", ".pdf", ".svg")
SMOOTHED = 1 / 40  # width of a running mean, as a share of the run's points
MOST_SMOOTHED = 500  # points to either side
BINS = 60
LEGEND_WIDTH = 150  # characters that fit into the picture
FEW = 40  # up to so many points, a curve has markers
SHOWN = 0.97  # least share of a run's losses in the picture; the first ones can be far above


@dataclass
class Run:
    """A run to draw: arrays with an entry a logged event, NaN for null."""

    name: str
    log: str  # path of the newest log
    begun: float  # time of its start, seconds since 1970
    iterations: dict[str, np.ndarray]  # step, loss, lr, norm, seconds, tokens_per_second, mfu
    evaluations: dict[str, np.ndarray]  # step, val_loss
    checkpoints: np.ndarray  # step
    hellaswag: dict[str, np.ndarray]  # step, acc_norm


def read_run(path: str) -> Run:
    """Read an out_dir or one log. Raises UserError."""
    log = RunLog.read(path)
    iterations = log.columns("iter", "step", "loss", "lr", "norm", "seconds", "tokens_per_second", "mfu")
    if not len(iterations["step"]):
        raise UserError(f"{path} has no iteration yet: let the run get to its first log line")
    newest = log.last("start")
    name = os.path.abspath(path)
    if not os.path.isdir(path):
        name = os.path.splitext(name)[0]
    name = os.sep.join(name.split(os.sep)[-1 if os.path.isdir(path) else -2:])
    return Run(name, newest["path"], newest["time"], iterations,
               log.columns("eval", "step", "val_loss"), log.columns("checkpoint", "step")["step"],
               log.columns("hellaswag", "step", "acc_norm"))


def summary(run: Run) -> str:
    """Describe a run in one line. Its steps are updates done, one more than the last iteration's index."""
    steps = max(run.iterations["step"][-1] + 1, *run.evaluations["step"][-1:], 0)
    losses = run.evaluations["val_loss"]
    evaluated = "no val loss yet"
    if len(losses):
        evaluated = f"last val loss {losses[-1]:.4f}, best {best(run)}"
    speeds = finite(run.iterations["tokens_per_second"])
    speed = f"median {statistics.median(speeds):,.0f} tok/s" if len(speeds) else "unknown tok/s"
    return f"{run.name}: {steps:.0f} steps, {evaluated}, {speed}"


def best(run: Run) -> str:
    """Name the best val loss of a run and its step."""
    losses = run.evaluations["val_loss"]
    if not len(finite(losses)):
        return "none"
    at = int(np.nanargmin(losses))
    return f"{losses[at]:.4f} at step {run.evaluations['step'][at]:.0f}"


def finite(values: np.ndarray) -> np.ndarray:
    """Return the values that are numbers."""
    return values[np.isfinite(values)]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a centred running mean of the finite values; a value that is not finite stays a gap."""
    window = np.ones(2 * min(int(len(values) * SMOOTHED / 2), MOST_SMOOTHED) + 1)  # odd: it has a centre
    valid = np.isfinite(values)
    total = np.convolve(np.where(valid, values, 0.0), window, "same")
    count = np.convolve(valid.astype(float), window, "same")
    return np.where(valid, total / np.maximum(count, 1.0), math.nan)


def draw(runs: list[Run]):
    """Draw all runs into one matplotlib figure, a colour each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    below = "A" if any(len(run.hellaswag["step"]) for run in runs) else ""
    below += "SM" if any(len(finite(run.iterations["mfu"])) for run in runs) else "S"
    below = "".join(letter * (12 // (len(below) + 1)) for letter in below + "H")
    layout = ["LLLLLLLLRRRR", "LLLLLLLLNNNN", below]
    figure, axes = plt.subplot_mosaic([list(row) for row in layout], figsize=(13, 9), layout="constrained")
    colors = plt.get_cmap("tab10" if len(runs) <= 10 else "tab20").colors
    colors = [colors[i % len(colors)] for i in range(len(runs))]
    draw_losses(axes["L"], runs, colors)
    draw_curves(axes["R"], runs, colors, "lr", "learning rate", faint=False)
    draw_curves(axes["N"], runs, colors, "norm", "gradient norm, before clipping")
    if any((run.iterations["norm"] > 0).any() for run in runs):  # norms spike
        use_log_scale(axes["N"].yaxis)
    draw_curves(axes["S"], runs, colors, "tokens_per_second", "throughput (tok/s)")
    axes["S"].yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes["S"].set_ylim(bottom=0)
    if "M" in axes:
        draw_curves(axes["M"], runs, colors, "mfu", "MFU (%)", scale=100)
        axes["M"].set_ylim(bottom=0)
    if "A" in axes:
        draw_hellaswag(axes["A"], runs, colors)
    draw_step_times(axes["H"], runs, colors)
    for name, panel in axes.items():
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if name != "H":
            label_iterations(panel.xaxis, most=8 if name == "L" else 5)
    draw_legend(figure, runs, colors)
    return figure


def use_log_scale(axis) -> None:
    """Make a y axis logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib import ticker

    axis.axes.set_yscale("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def label_iterations(axis, most: int) -> None:
    """Label an x axis with at most so many whole iterations."""
    from matplotlib import ticker

    axis.set_label_text("iteration")
    axis.set_major_locator(ticker.MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def draw_legend(figure, runs: list[Run], colors: list) -> None:
    """Name the run of each colour above the picture, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=3) for color in colors]
    labels = [label(run) for run in runs]
    fit = max(LEGEND_WIDTH // (max(map(len, labels)) + 8), 1)
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=min(fit, len(runs)))


def label(run: Run) -> str:
    """Return a run's entry in the legend: matplotlib takes text between two $ for a formula and drops labels
    that begin with _."""
    name = run.name.replace("$", r"\$")
    text = f"{name} (best val loss {best(run)})" if len(run.evaluations["step"]) else name
    return f" {text}"


def draw_losses(axes, runs: list[Run], colors: list) -> None:
    """Draw the train loss of iterations, the val loss of evaluations, and a tick at each checkpoint."""
    from matplotlib.lines import Line2D

    draw_curves(axes, runs, colors, "loss", "loss")
    for run, color in zip(runs, colors):
        size = 4 if len(run.evaluations["step"]) <= FEW else 0
        axes.plot(run.evaluations["step"], run.evaluations["val_loss"], "o--", color=color, markersize=size,
                  linewidth=1, zorder=3)
    least = min(np.nanmin(line.get_ydata(), initial=math.inf) for line in axes.lines)
    top = highest_loss(runs, least)
    if top < axes.get_ylim()[1]:
        axes.set_ylim(least - 0.05 * (top - least), top)
        axes.set_ylabel("loss (what is higher is cut off)")
    gray = {"color": "0.35"}
    meanings = {"train, each logged iteration": Line2D([], [], alpha=0.3, **gray),
                "train, running mean": Line2D([], [], **gray),
                "val": Line2D([], [], linestyle="--", marker="o", markersize=4, linewidth=1, **gray)}
    if any(len(run.checkpoints) for run in runs):
        meanings["checkpoint"] = Line2D([], [], linestyle="", marker="|", markersize=6, **gray)
        bottom, top = axes.get_ylim()
        row = 0.02 * (top - bottom)
        for i, (run, color) in enumerate(zip(runs, colors)):
            height = np.full(len(run.checkpoints), bottom - (i + 0.5) * row)
            axes.plot(run.checkpoints, height, "|", color=color, markersize=5)
        axes.set_ylim(bottom - (len(runs) + 0.5) * row, top)
    axes.legend(meanings.values(), meanings, frameon=False, loc="upper right")


def highest_loss(runs: list[Run], least: float) -> float:
    """Return the loss up to which to draw: below where a run diverges, and below its first few losses if
    these would take half of the height.
    """
    losses = [values for run in runs if len(values := finite(run.iterations["loss"]))]
    if not losses:
        return math.inf
    firsts = [finite(run.evaluations["val_loss"])[:1] for run in runs] + [values[:1] for values in losses]
    # an untrained model starts at log(vocabulary): a loss far above that has diverged
    top = min(1.5 * max(np.concatenate(firsts)), max(values.max() for values in losses))
    most = max(np.quantile(values, SHOWN) for values in losses)
    most += 0.1 * (most - least)
    return most if most - least < (top - least) / 2 else 1.5 * max(np.concatenate(firsts))


def draw_curves(axes, runs: list[Run], colors: list, name: str, title: str, scale: float = 1.0,
                faint: bool = True) -> None:
    """Draw a value of iterations over their steps: each value faintly, and the running mean."""
    for run, color in zip(runs, colors):
        steps, values = run.iterations["step"], scale * run.iterations[name]
        if faint:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            values = smoothed(values)
        axes.plot(steps, values, "-" if len(steps) > FEW else ".-", color=color, linewidth=1.5)
    axes.set_ylabel(title)


def draw_hellaswag(axes, runs: list[Run], colors: list) -> None:
    """Draw the accuracy by length-normalised likelihood; chance is one of four endings."""
    axes.axhline(25, color="0.35", linestyle=":", linewidth=1)
    axes.annotate("chance", (1, 25), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                  color="0.35")
    for run, color in zip(runs, colors):
        marker = "o-" if len(run.hellaswag["step"]) <= FEW else "-"
        axes.plot(run.hellaswag["step"], 100 * run.hellaswag["acc_norm"], marker, color=color, markersize=4,
                  linewidth=1.5)
    axes.set_ylabel("HellaSwag acc_norm (%)")


def draw_step_times(axes, runs: list[Run], colors: list) -> None:
    """Draw a histogram of milliseconds an iteration; a log line has the mean since the previous line."""
    times = [1e3 * finite(run.iterations["seconds"]) for run in runs]
    axes.set_xlabel("time of an iteration (ms)")
    axes.set_ylabel("share of log lines (%)")
    if not sum(map(len, times)):
        return
    # the first iteration compiles and can take a thousand times as long: longer times go to the last bin
    longest = max(min(2 * np.median(values), np.quantile(values, 0.99)) for values in times if len(values))
    if longest < max(values.max() for values in times if len(values)):
        axes.set_xlabel("time of an iteration (ms;\nlonger ones in the last bin)")
    times = [np.minimum(values, longest) for values in times]
    edges = np.histogram_bin_edges(np.concatenate(times), BINS)
    for values, color in zip(times, colors):
        weights = np.full(len(values), 100 / max(len(values), 1))
        axes.hist(values, edges, weights=weights, color=color, alpha=0.35)
        axes.hist(values, edges, weights=weights, color=color, histtype="step")


def save(figure, path: str) -> None:
    """Write the picture completely or not at all. Raises UserError."""
    folder = os.path.dirname(path) or "."
    with made_folder(folder), os_error_as_user_error(f"cannot write {path}"):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # in the name of a run
        try:
            figure.savefig(path + ".tmp", format=os.path.splitext(path)[1][1:].lower(), dpi=120)
            os.replace(path + ".tmp", path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            raise


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="OUT_DIR or FILE", default=["out"])
    parser.add_argument("--out", metavar="FILE", help=f"the picture: {', '.join(ENDINGS)}")
    args = parser.parse_args()
    out = args.out
    if out is not None and (os.path.isdir(out) or os.path.splitext(out)[1].lower() not in ENDINGS):
        raise UserError(f"--out={out} names no picture: give a file that ends in {', '.join(ENDINGS)}")
    runs = [read_run(path) for path in dict.fromkeys(args.paths)]
    for run, path in zip(runs, dict.fromkeys(args.paths)):
        if [other.name for other in runs].count(run.name) > 1:  # a/out and b/out
            run.name = path
    if out is None:
        newest = max(runs, key=lambda run: run.begun)
        out = os.path.splitext(newest.log)[0] + "_analysis.png"
    check_can_write(os.path.dirname(out) or ".", "--out")
    save(draw(runs), out)
    print(f"written: {out}")
    print("\n".join(map(summary, runs)))


if __name__ == "__main__":
    main()
