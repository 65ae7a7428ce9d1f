"""Final val loss against training time: families of runs of several lengths, and what they say of each other.

A loss in the middle of a schedule compares with nothing, because the cool-down has the last drop. So a family
is trained to its end at several lengths (N, 2N, 4N steps), and its frontier joins the mean final losses by
straight lines over the logarithm of the time. Beyond its shortest and its longest length a frontier is used
up to a factor EXTRAPOLATED only.

The noise of a family is the standard deviation of the final losses within lengths, pooled, after a correction
for their different times. An interval is Student's, from that noise; that of a time or of a ratio of times
divides it by the slope of the frontier (delta method). A family with one run a length has no interval.
"""

import csv
import io
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtr, stdtrit

from experiments.compare_experiments import judged_otherwise
from experiments.experiment_config import NUMBER, in_range, printable, read_json
from experiments.experiment_statistics import (
    CONFIDENCE,
    describe,
    differ,
    holm,
    pooled_std,
    welch_error,
)
from experiments.report import Experiment, interval, number, p_value, table, write
from nanosync.errors import UserError, shortened, shown
from nanosync.files import read_file

EXTRAPOLATED = 1.1  # factor of time beyond the shortest and the longest length
APART = 1.25  # runs without `steps` whose times differ by a larger factor are of different lengths
SAME = 1e-6  # difference of log(seconds) of two lengths that counts as none
MOST_BYTES, MOST_POINTS = 2**26, 100_000  # of a file of points
FIELDS = {"name": str, "seed": int, "seconds": NUMBER, "loss": NUMBER, "steps": int}
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
          ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*")]  # also for the colour-blind


@dataclass(frozen=True)
class Point:
    """A run to its end."""

    seed: int
    seconds: float
    loss: float
    steps: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and its degrees of freedom; None without a spread."""

    value: float
    error: float | None
    df: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval."""
        if self.error is None:
            return None
        half = float(stdtrit(self.df, (1 + CONFIDENCE) / 2)) * self.error
        return (self.value - half, self.value + half) if math.isfinite(half) else None


@dataclass
class Family:
    """Runs of several lengths, and their frontier over log(seconds)."""

    name: str
    lengths: list[list[Point]]  # the runs of each length, shortest first
    z: np.ndarray = field(init=False)  # mean log(seconds) of each length
    losses: np.ndarray = field(init=False)  # mean loss of each length

    def __post_init__(self):
        def mean_z(runs):
            return float(np.mean([math.log(run.seconds) for run in runs]))

        self.lengths = sorted(self.lengths, key=mean_z)
        self.z = np.array([mean_z(runs) for runs in self.lengths])
        self.losses = np.array([np.mean([run.loss for run in runs]) for runs in self.lengths])
        self.noise = self._noise()

    def _noise(self) -> tuple[float, int] | None:
        """Return the standard deviation within lengths and its degrees of freedom; None without a spread."""
        slopes = np.zeros(len(self.z))
        if len(self.z) > 1:
            segments = np.diff(self.losses) / np.diff(self.z)
            slopes = (np.r_[segments[:1], segments] + np.r_[segments, segments[-1:]]) / 2
        samples = [[run.loss - slope * (math.log(run.seconds) - z) for run in runs]
                   for runs, slope, z in zip(self.lengths, slopes, self.z)]
        return pooled_std(*samples) if any(map(differ, samples)) else None

    def seconds(self) -> list[float]:
        """Return the mean time of each length."""
        return [math.exp(z) for z in self.z]

    def loss_at(self, seconds: float) -> tuple[Estimate, float] | None:
        """Return the final loss of a run of this time, and the frontier's slope there; None where the
        frontier does not reach."""
        z = math.log(seconds)
        margin = math.log(EXTRAPOLATED) if len(self.z) > 1 else 0.01
        if not self.z[0] - margin <= z <= self.z[-1] + margin:
            return None
        if len(self.z) == 1:
            return self._estimate([(0, 1.0)]), 0.0
        i = int(np.clip(np.searchsorted(self.z, z) - 1, 0, len(self.z) - 2))
        weight = (z - self.z[i]) / (self.z[i + 1] - self.z[i])
        slope = (self.losses[i + 1] - self.losses[i]) / (self.z[i + 1] - self.z[i])
        return self._estimate([(i, 1 - weight), (i + 1, weight)]), float(slope)

    def _estimate(self, weights: list[tuple[int, float]]) -> Estimate:
        """Return a weighted sum of the mean losses of lengths."""
        value = float(sum(weight * self.losses[i] for i, weight in weights))
        if self.noise is None:
            return Estimate(value, None, None)
        squares = sum(weight**2 / len(self.lengths[i]) for i, weight in weights)
        return Estimate(value, self.noise[0] * math.sqrt(squares), self.noise[1])

    def log_time_to(self, loss: float) -> Estimate | None:
        """Return log(seconds) of the shortest run that ends at `loss`; None beyond the frontier."""
        margin = math.log(EXTRAPOLATED)
        for i in range(len(self.z) - 1):
            low, high = self.losses[i + 1], self.losses[i]
            if not low < high:
                continue
            z = self.z[i] + (high - loss) / (high - low) * (self.z[i + 1] - self.z[i])
            before = self.z[i] - (margin if i == 0 else 0)
            after = self.z[i + 1] + (margin if i == len(self.z) - 2 else 0)
            if before <= z <= after:
                estimate, slope = self.loss_at(math.exp(z))
                error = None if estimate.error is None else estimate.error / abs(slope)
                return Estimate(float(z), error, estimate.df)
        return None

    def why_not(self, loss: float) -> str:
        """Say where the time is that `log_time_to` does not return."""
        shortest, longest = self.seconds()[0], self.seconds()[-1]
        return f"below {shortest:.4g}" if self.losses[0] <= loss else f"not within {longest:.4g}"


def difference(a: Estimate, b: Estimate) -> tuple[Estimate, float | None]:
    """Return b - a, with the degrees of freedom of Welch and Satterthwaite, and the two-sided p that it is 0.
    """
    value = b.value - a.value
    if a.error is None or b.error is None or not 0 < a.error + b.error < math.inf:
        return Estimate(value, None, None), None
    error, df = welch_error([a.error, b.error], (a.df + 1, b.df + 1))
    return Estimate(value, float(error), float(df)), 2 * float(stdtr(df, -abs(value) / error))


# reading


def families_of(experiments: list[Experiment]) -> tuple[list[Family], list[str]]:
    """Return a family for each name of experiments, and notes about what else differs in a family."""
    named, notes = {}, []
    for experiment in experiments:
        named.setdefault(experiment.name, []).append(experiment)
    families = []
    for name, members in named.items():
        lengths = {}
        for one in members:
            steps = one.settings.get("num_iterations", one.defaults.get("num_iterations"))
            lengths.setdefault(steps, []).extend(
                Point(run["seed"], run["time_seconds"], run["final_val_loss"], steps) for run in one.good)
            others = sorted({key for key in (one.settings | members[0].settings)
                             if one.settings.get(key) != members[0].settings.get(key)}
                            - {"num_iterations", "val_loss_every"})
            if others:
                notes.append(f"{name}: its experiments also differ in {', '.join(others)}.")
        families.append(checked_family(name, lengths.values(), members[0].folder))
    for one in experiments[1:]:
        if keys := judged_otherwise(experiments[0], one):
            notes.append(f"{one.name} differs from {experiments[0].name} in {', '.join(keys)}: their losses "
                         f"are not of the same tokens, or not with the same context.")
    return families, list(dict.fromkeys(notes))


def checked_family(name: str, lengths, where: str) -> Family:
    """Make a family. Raises UserError for a seed that a length has twice, and for a time of 0."""
    lengths = list(lengths)
    for runs in lengths:
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            raise UserError(f"{where}: {shown(name)} has two runs of seed {twice} and one length: give each "
                            f"run once, and `steps` if the times of two lengths differ by less than "
                            f"{APART - 1:.0%}")
        if any(run.seconds <= 0 for run in runs):
            raise UserError(f"{where}: {shown(name)} has a run without training time: its clock leaves out "
                            f"the first steps, so train more of them")
    times = sorted(float(np.mean([math.log(run.seconds) for run in runs])) for runs in lengths)
    if any(b - a < SAME for a, b in itertools.pairwise(times)):
        raise UserError(f"{where}: {shown(name)} has two lengths with the same mean time: a frontier needs "
                        f"different times")
    return Family(name, lengths)


def read_points(path: str) -> list[Family]:
    """Read families from a file of runs: a JSON list of objects, or CSV with a header (a path that ends with
    .csv), with name, seed, seconds, loss and, if known, steps. Raises UserError."""
    rows = read_csv(path) if path.endswith(".csv") else read_json(path)
    if not isinstance(rows, list) or not rows or len(rows) > MOST_POINTS:
        raise UserError(f"{path} must be a list of 1 to {MOST_POINTS:,} runs: "
                        f"[{{\"name\": \"peer\", \"seed\": 1, \"seconds\": 118.0, \"loss\": 0.897}}, ...]")
    named = {}
    for i, row in enumerate(rows, 1):
        check_row(row, f"{path}, run {i}")
        point = Point(row["seed"], float(row["seconds"]), float(row["loss"]), row.get("steps"))
        named.setdefault(row["name"], []).append(point)
    return [checked_family(name, by_length(points), path) for name, points in named.items()]


def read_csv(path: str) -> list[dict]:
    """Read the rows of a CSV file with a header; numbers become numbers. Raises UserError."""
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is not CSV: {e}") from None
    for i, row in enumerate(rows, 1):
        for key, kind in FIELDS.items():
            if kind is str or row.get(key) is None:
                continue
            try:
                row[key] = int(row[key]) if kind is int else float(row[key])
            except ValueError:
                raise UserError(f"{path}, run {i}: {key}={shown(row[key])} must be a number") from None
    return rows


def check_row(row, where: str) -> None:
    """Raise UserError unless a row has the fields of a run. Other fields are ignored."""
    for key, kinds in FIELDS.items():
        value = row.get(key) if isinstance(row, dict) else None
        if value is None and key == "steps":
            continue
        if value is None:
            raise UserError(f"{where} has no {key}: it needs name, seed, seconds and loss")
        right = isinstance(value, kinds) and (kinds is str or in_range(value))
        if not right or (key == "seconds" and value <= 0) or (kinds is str and not value.strip()):
            what = "a text" if kinds is str else "an integer" if kinds is int else "a number"
            least = " above 0" if key == "seconds" else "" if kinds is str else " not below 0"
            raise UserError(f"{where}: {key}={shown(value)} must be {what}{least}")
        if kinds is str and not (value.isprintable() and len(value) <= 100):
            raise UserError(f"{where}: name={shown(value)} must be printable and at most 100 characters long")


def by_length(points: list[Point]) -> list[list[Point]]:
    """Group runs by their steps, and runs without steps by gaps between their times."""
    groups, last = {}, None
    for point in sorted(points, key=lambda point: point.seconds):
        if point.steps is not None:
            groups.setdefault(point.steps, []).append(point)
        else:
            if last is None or point.seconds > APART * last[-1].seconds:
                last = groups[f"at {point.seconds}"] = []
            last.append(point)
    return list(groups.values())


# the report


def figures(families: list[Family], reference: Family | None, targets: list[float], at: list[float]) -> dict:
    """Return all figures: of lengths, losses at times, and times to losses.

    targets: losses; without any, the reference's mean final losses, whose noise counts as well.
    """
    lengths = [{"name": family.name, "steps": runs[0].steps, "runs": len(runs),
                "seconds": describe([run.seconds for run in runs]),
                "val_loss": describe([run.loss for run in runs])}
               for family in families for runs in family.lengths]
    losses = [loss_figures(family, reference, seconds) for seconds in at for family in families]
    tested = [one for one in losses if one["p"] is not None]
    for one, p in zip(tested, holm([one["p"] for one in tested])):
        one["p_holm"] = p
    goals = [(loss, None) for loss in targets]
    if not goals and reference is not None:
        goals = [(float(loss), i) for i, loss in enumerate(reference.losses)]
    times = [time_figures(family, reference, loss, i) for loss, i in goals for family in families]
    return {"reference": reference and reference.name, "lengths": lengths, "loss_at": losses,
            "time_to": times}


def loss_figures(family: Family, reference: Family | None, seconds: float) -> dict:
    """Return the loss at a time, and its difference from the reference's there."""
    found, other = (None if one is None else one.loss_at(seconds) for one in (family, reference))
    of = {"name": family.name, "seconds": seconds, "val_loss": None, "interval": None, "difference": None,
          "difference_interval": None, "p": None, "p_holm": None}
    if found is not None:
        of |= {"val_loss": found[0].value, "interval": found[0].interval}
    if found is not None and other is not None and family is not reference:
        apart, p = difference(other[0], found[0])
        of |= {"difference": apart.value, "difference_interval": apart.interval, "p": p}
    return of


def time_figures(family: Family, reference: Family | None, loss: float, length: int | None) -> dict:
    """Return the time to a loss, and its ratio to the reference's time.

    length: number of the reference's length whose mean loss it is; None for a loss without noise.
    """
    own = family is reference and length is not None
    found = Estimate(float(family.z[length]), None, None) if own else family.log_time_to(loss)
    of = {"name": family.name, "val_loss": loss, "seconds": None, "interval": None, "ratio": None,
          "ratio_interval": None, "instead": None if found else family.why_not(loss)}
    if found is None:
        return of
    of |= {"seconds": math.exp(found.value), "interval": _exp(found.interval)}
    if reference is None or family is reference:
        return of
    if length is None:
        base = reference.log_time_to(loss)
    else:  # the noise of the reference's loss, as a time on this frontier
        of_loss, slope = reference._estimate([(length, 1.0)]), family.loss_at(math.exp(found.value))[1]
        error = None if of_loss.error is None else of_loss.error / abs(slope)
        base = Estimate(float(reference.z[length]), error, of_loss.df)
    if base is not None:
        ratio = difference(base, found)[0]
        of |= {"ratio": math.exp(ratio.value), "ratio_interval": _exp(ratio.interval)}
    return of


def _exp(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the interval of a number from that of its logarithm, with bounds that fp64 has."""
    return None if bounds is None else tuple(float(np.exp(np.clip(x, -700, 700))) for x in bounds)


def report(found: dict, notes: list[str], picture: str) -> str:
    """Return the report as Markdown."""
    lengths, losses, times = [], [], []
    for one in found["lengths"]:
        seconds, loss = one["seconds"], one["val_loss"]
        lengths.append([one["name"], str(one["steps"] or "-"), str(one["runs"]),
                        number(seconds["mean"], ".1f"), number(seconds["std"], ".2f"), number(loss["mean"]),
                        number(loss["std"])])
    for one in found["loss_at"]:
        losses.append([f"{one['seconds']:.4g}", one["name"], number(one["val_loss"]),
                       interval(one["interval"]),
                       number(one["difference"], "+.4f"), interval(one["difference_interval"], "+.4f"),
                       p_value(one["p"]), p_value(one["p_holm"])])
    for one in found["time_to"]:
        times.append([number(one["val_loss"]), one["name"], one["instead"] or number(one["seconds"], ".1f"),
                      interval(one["interval"], ".1f"), number(one["ratio"], ".3f"),
                      interval(one["ratio_interval"], ".3f")])
    reference = found["reference"]
    against = f" Differences and ratios are against {printable(reference)}." if reference else ""
    parts = [
        "# Final val loss against training time\n", f"![Final val loss against training time]({picture})\n",
        table(["", "steps", "runs", "training time, s", "std", "final val loss", "std"], lengths),
        f"Between its lengths, a family is interpolated over the logarithm of the time.{against}\n",
        table(["training time, s", "", "final val loss", "95% CI", "difference", "95% CI", "p", "p, Holm"],
              losses)]
    if times:
        parts.append(table(["final val loss", "", "training time, s", "95% CI", "ratio", "95% CI"], times))
    return "\n".join([*parts, "".join(f"- {note}\n" for note in notes)])


def draw(families: list[Family], targets: list[float], path: str) -> None:
    """Draw the frontiers: a dot a run, a line through the means. Raises UserError if the picture cannot be
    written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, family in enumerate(families):
        color, marker = STYLES[i % len(STYLES)]
        seeds = sorted({len(runs) for runs in family.lengths})
        runs = "-".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
        label = f" {shortened(family.name, 50)} ({runs})".replace("$", r"\$")
        axes.plot(family.seconds(), family.losses, color=color, marker=marker, markersize=6, linewidth=1.8,
                  markeredgecolor="white", markeredgewidth=0.8, label=label, zorder=3)
        for points in family.lengths:
            axes.plot([run.seconds for run in points], [run.loss for run in points], "o", color=color,
                      markersize=5, alpha=0.4, markeredgewidth=0, zorder=2)
    for loss in targets:
        axes.axhline(loss, color="0.35", linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(f"{loss:g}", (1.0, loss), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                      textcoords="offset points", ha="right", va="bottom", color="0.35", fontsize=9)
    axes.set_xscale("log")
    low, high = min(f.seconds()[0] for f in families), max(f.seconds()[-1] for f in families)
    digits = (1, 1.5, 2, 3, 4, 6, 8) if high < 30 * low else (1, 3)
    ticks = [digit * 10.0**exponent for exponent in range(-4, 9) for digit in digits]
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("training time (s, logarithmic scale)")
    axes.set_ylabel("final val loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper left", ncols=2, fontsize=9.5)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130, facecolor="white")
    plt.close(figure)
    write(path, picture.getvalue())
