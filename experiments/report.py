"""The common parts of analyses: reading experiments, tables, and curves with a band over seeds."""

import contextlib
import io
import math
import os
from dataclasses import dataclass, field

import numpy as np

from configurator import literal_defaults
from experiments.experiment_config import printable
from experiments.experiment_logger import made_by, read_folder
from nanosync.errors import UserError, shortened
from nanosync.files import os_error_as_user_error, replace_file

LEVELS = 1e-6, 0.9999  # limits of --alpha and --power
LONGEST_CELL = 300  # characters of a table's cell
SHOWN = 0.25  # share of the steps after which the whole curve must be in the picture


@dataclass
class Experiment:
    """The runs of an experiment, in the order of their seeds."""

    folder: str
    name: str
    config: dict
    results: list[dict]  # also those of failed runs
    curves: list[np.ndarray]  # of each successful run, (n, 3): step, val loss, seconds of training
    settings: dict  # the arguments of the script, the number of GPUs, and the script's SHA-256
    defaults: dict = field(default_factory=dict)  # settings of the script's copy that are literals
    made_by: dict = field(default_factory=dict)  # see experiment_logger.made_by

    @property
    def good(self) -> list[dict]:
        """The results of the successful runs."""
        return [result for result in self.results if result["success"]]

    @property
    def losses(self) -> list[float]:
        """The final val losses of the successful runs."""
        return [result["final_val_loss"] for result in self.good]

    @property
    def times(self) -> list[float]:
        """The training times of the successful runs, seconds."""
        return [result["time_seconds"] for result in self.good]

    @property
    def failed(self) -> int:
        """The number of failed runs."""
        return len(self.results) - len(self.good)


def read_experiment(folder: str) -> Experiment:
    """Read an experiment's folder. Raises UserError, also if no run succeeded."""
    described, by_id, metrics = read_folder(folder)
    results = [by_id[i] for i in sorted(by_id)]
    config = described["config"]
    curves = [curve(metrics.get(result["run_id"], [])) for result in results if result["success"]]
    settings = config["stage_config"] | config["hyperparameters"] | {
        "n_gpus": config["n_gpus"], "script": described["script"].get("sha256", "")[:12]}
    experiment = Experiment(folder, config["experiment_name"], config, results, curves, settings,
                            defaults_of(os.path.join(folder, os.path.basename(config["script"]))),
                            made_by(described))
    if not experiment.good:
        state = f"all {len(results)} runs of it failed" if results else "no run of it has ended"
        raise UserError(f"{folder} has no validation loss: {state}")
    if not len(on_common_steps(curves)[0]):
        raise UserError(f"{folder}/metrics.jsonl has no step at which all successful runs were evaluated: "
                        f"it does not belong to results.jsonl; restore it")
    return experiment


def defaults_of(script: str) -> dict:
    """Return the defaults of a script's settings; none if the script cannot be read."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        return literal_defaults(script)
    return {}


def curve(rows: list[dict]) -> np.ndarray:
    """Return the finite val losses of one run's metrics, (n, 3): the last evaluation of each step counts."""
    points = {row["step"]: (row["step"], row["val_loss"], (row.get("train_time_ms") or 0.0) / 1e3)
              for row in rows if row.get("val_loss") is not None}
    return np.array([points[step] for step in sorted(points)], float).reshape(-1, 3)


def on_common_steps(curves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (steps, losses (runs, steps), seconds (runs, steps)) at the steps where all runs were evaluated.
    """
    steps = np.array(sorted(set.intersection(*({*points[:, 0]} for points in curves))))
    rows = [points[np.isin(points[:, 0], steps)] for points in curves]
    return steps, np.array([row[:, 1] for row in rows]), np.array([row[:, 2] for row in rows])


def time_to(points: np.ndarray, loss: float) -> float | None:
    """Return the seconds of training until a run's val loss is first at most `loss`; None if it never is.

    points: a curve, (n, 3); interpolated linearly between evaluations.
    """
    below = np.flatnonzero(points[:, 1] <= loss)
    if not len(below):
        return None
    i = below[0]
    if i == 0:
        return float(points[0, 2])
    (_, high, before), (_, low, after) = points[i - 1], points[i]
    return float(before + (after - before) * (high - loss) / (high - low))


def draw(experiments: list[Experiment], target: float | None, path: str) -> None:
    """Draw val loss against steps and against seconds of training: the mean over the runs, and a band from
    the lowest to the highest run. Raises UserError if the picture cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    heights = [draw_curve(axes, experiment, f"C{i % 10}") for i, experiment in enumerate(experiments)]
    bottom, top = min(low for low, _ in heights), max(high for _, high in heights)
    margin = 0.05 * (top - bottom) or 0.01
    if target is not None and bottom - (top - bottom) < target < top:
        bottom = min(bottom, target)
        for ax in axes:
            ax.axhline(target, color="0.35", linestyle=":", linewidth=1)
        axes[0].annotate(f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"),
                         va="bottom", color="0.35")
    axes[0].set_ylim(bottom - margin, top + margin)
    axes[0].set_ylabel("val loss (what is higher is cut off)")
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("training time (s, mean over runs)")
    axes[0].legend(frameon=False, loc="upper right", title="mean, and lowest to highest run")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(left=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write(path, picture.getvalue())


def draw_curve(axes, experiment: Experiment, color: str) -> tuple[float, float]:
    """Draw one experiment; return the lowest loss, and the highest mean that must be in the picture."""
    steps, losses, seconds = on_common_steps(experiment.curves)
    mean, n = losses.mean(0), len(losses)
    # matplotlib takes text between two $ for a formula and drops labels that begin with _
    label = f" {experiment.name}".replace("$", r"\$") + f" ({n} run{'s' if n > 1 else ''})"
    for ax, x in zip(axes, (steps, seconds.mean(0))):
        marker = "o" if len(steps) <= 30 else ""
        ax.plot(x, mean, color=color, marker=marker, markersize=3, linewidth=1.5, label=label)
        ax.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
    return losses.min(), mean[np.searchsorted(steps, SHOWN * steps[-1])]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [[shortened(printable(cell), LONGEST_CELL).replace("|", r"\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def number(value: float | None, form: str = ".4f") -> str:
    """Format a number, None as '-'."""
    return "-" if value is None else format(value, form)


def interval(value, form: str = ".4f") -> str:
    """Format an interval, None as '-'."""
    return "-" if value is None else f"{value[0]:{form}} to {value[1]:{form}}"


def p_value(p: float | None) -> str:
    """Format a p-value, None as '-'."""
    return "-" if p is None else f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}" if p >= 1e-99 else "<1e-99"


def check_levels(args) -> None:
    """Raise UserError unless --alpha and --power are probabilities that tests can have."""
    for name in ("alpha", "power"):
        if not LEVELS[0] <= getattr(args, name) <= LEVELS[1]:
            raise UserError(f"--{name}={getattr(args, name)} must be from {LEVELS[0]:g} to {LEVELS[1]:g}")


def without_nan(value):
    """Return a value for JSON with None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str, content: str | bytes) -> None:
    """Write a file completely or not at all, and make its folder. Raises UserError."""
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    with os_error_as_user_error(f"cannot write {path}"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        replace_file(path, content)
