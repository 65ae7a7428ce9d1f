"""What a search for the fewest syncs knows: its plan, the results, and the decisions so far.

Losses are compared as log ratios against the baseline, with a spread between seeds that is pooled over all
arms. Each decision uses only runs that were requested up to it, so a resumed search repeats all decisions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from scipy.special import stdtr, stdtrit

from experiments.campaign import Pending, Results, Run
from experiments.experiment_statistics import CONFIDENCE, ROUNDING

SEARCH, PROOF, SECOND = "search", "proof", "second_budget"
SENSITIVITY, DROPS = "sensitivity", "drop_syncs"  # stage and arm of the run that finds the greedy placement
GREEDY = "greedy"  # placement whose sync points are the result of that run
WITHIN, ABOVE, OPEN = "within", "above", "undecided"
LOOKS = (2, 3, 4, 6, 8)  # runs of an arm at which it is judged
PILOT = 4  # runs of the baseline in the pilot, the fewest that it ever has
SPARE = 2  # runs of an arm in place of failed ones
SPENDING = 1.5  # exponent of the spent level


@dataclass(frozen=True)
class SearchPlan:
    """The subject of a search."""

    counts: tuple[int, ...]  # syncs, descending; the first is the dense model, with all of them
    within: float  # margin: 0.02 for 2% above the baseline's loss
    alpha: float = 0.05
    looks: tuple[int, ...] = LOOKS
    placements: tuple[tuple[str, int], ...] = ()  # (placement, count) of arms that are not evenly spaced
    control_layers: tuple[int, ...] = ()
    control_runs: int = 3
    second_multiple: float = 0.0  # tokens of the second budget as a multiple of the first, 0 for none
    second_runs: int = 2
    families: tuple[tuple[str, int], ...] = ()  # (arm, all-reduces of a forward pass) of other strategies

    @property
    def baseline(self) -> str:
        return arm_name(self.counts[0])

    def syncs_of(self, arm: str) -> int:
        """Return the all-reduces of a forward pass of an arm that is no control."""
        return dict(self.families).get(arm) or count_of(arm)

    @property
    def margin(self) -> float:
        """The margin of the log ratio."""
        return math.log1p(self.within)

    @property
    def level(self) -> float:
        """The error probability of all looks at an arm, for either verdict."""
        return self.alpha / max(1, math.ceil(math.log2(len(self.counts))))

    def level_at(self, look: int) -> float:
        """Return the level of the test at the look with this number."""
        shares = [0.0, *((m / self.looks[-1]) ** SPENDING for m in self.looks)]
        return self.level * (shares[look + 1] - shares[look])


def arm_name(count: int, placement: str = "even") -> str:
    """Return the name of an arm, which is also the name of its folder."""
    return f"{placement}_{count}"


def count_of(arm: str) -> int:
    """Return the syncs of an arm that is neither a control nor a family."""
    return int(arm.rpartition("_")[2])


def control_name(layers: int) -> str:
    """Return the name of a dense model of fewer layers."""
    return f"dense_{layers}layers"


class Sample:
    """The log losses of the first good runs of an arm. Those of runs that were ended early enter the mean
    only."""

    def __init__(self, logs: list[float], exact: list[float]):
        self.logs, self.exact = logs, exact
        self.mean = math.fsum(logs) / len(logs) if logs else math.nan
        middle = math.fsum(exact) / max(len(exact), 1)
        self.squares = math.fsum((x - middle) ** 2 for x in exact)
        self.df = max(len(exact) - 1, 0)
        self.varies = max(exact, default=0.0) - min(exact, default=0.0) > ROUNDING


class SearchResults(Results):
    """Final val losses, None for failed runs. `bounds` has the runs that were ended early: their value is the
    lower end of the prediction interval of their final loss, which enters means and no spread.

    greedy: the arm with the greedy placement of each count, None before it is known. proofs: the runs of each
    proof that has begun, by arm, in the order of the attempts."""

    def __init__(self):
        super().__init__()
        self.bounds: set[Run] = set()
        self.greedy: dict[int, str] | None = None
        self.proofs: dict[str, int] = {}
        self._by_arm: dict[tuple[str, str], dict[int, float | None]] = {}
        self._samples: dict[tuple[str, str, int], Sample] = {}

    def take(self, run: Run, loss: float | None, bound: bool = False) -> None:
        """Add a result. A loss that is not above 0 has no logarithm, and counts as failed."""
        loss = loss if loss is not None and 0 < loss < math.inf else None
        self.losses[run] = loss
        arm = self._by_arm.get((run.stage, run.variant), {}) | {run.run_id: loss}
        self._by_arm[run.stage, run.variant] = dict(sorted(arm.items()))
        if bound:
            self.bounds.add(run)
        self._samples.clear()

    def sample(self, stage: str, arm: str, n: int) -> Sample:
        """Return the first n good runs of an arm."""
        if (stage, arm, n) not in self._samples:
            good = [(i, math.log(loss)) for i, loss in self.done(stage, arm).items() if loss is not None][:n]
            exact = [log for i, log in good if Run(stage, arm, i) not in self.bounds]
            self._samples[stage, arm, n] = Sample([log for _, log in good], exact)
        return self._samples[stage, arm, n]

    def done(self, stage: str, arm: str) -> dict[int, float | None]:
        """Return the losses of the runs of an arm that have ended, by run_id."""
        return self._by_arm.get((stage, arm), {})


@dataclass
class Ratio:
    """A log ratio of losses against the baseline: its mean, its standard error, degrees of freedom."""

    mean: float
    error: float
    df: float
    runs: int

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        half = float(stdtrit(self.df, (1 + confidence) / 2)) * self.error
        return self.mean - half, self.mean + half

    def p_below(self, margin: float) -> float:
        """Return p of the one-sided test that the ratio is below the margin."""
        return float(stdtr(self.df, (self.mean - margin) / self.error))

    def text(self) -> str:
        low, high = map(percent, self.interval())
        return f"{percent(self.mean)}, 95% CI {low} to {high}"


def percent(log_ratio: float) -> str:
    """Format a log ratio as a difference in percent."""
    return f"{100 * math.expm1(log_ratio):+.2f}%"


@dataclass
class Story:
    """The decisions so far, and the runs that they are based on."""

    plan: SearchPlan
    results: SearchResults
    affordable: Callable[[list[Run]], bool]
    decisions: list[dict] = field(default_factory=list)
    asked: dict[tuple[str, str], int] = field(default_factory=dict)  # (stage, arm) -> good runs, at most
    verdicts: dict[str, str] = field(default_factory=dict)  # arm -> WITHIN, ABOVE, OPEN
    looked: dict[str, int] = field(default_factory=dict)  # arm -> looks so far
    poor: bool = False  # the budget did not pay for a look

    def note(self, stage: str, decision: str, text: str, **numbers) -> None:
        """Add a decision."""
        self.decisions.append({"stage": stage, "decision": decision, "text": text, **numbers})

    def need(self, stage: str, arms: dict[str, int], reserve: list[Run] = ()) -> bool:
        """Return True if each arm has so many good runs, or no spare seeds left. Return False if the budget
        does not pay for them and for the runs in `reserve`. Raises Pending for missing runs.
        """
        batch = self._missing_of(stage, arms)
        if not self.pays(stage, arms, reserve):
            return False
        if batch:
            raise Pending(batch)
        for arm, n in arms.items():
            self.asked[stage, arm] = max(n, self.asked.get((stage, arm), 0))
        return True

    def pays(self, stage: str, arms: dict[str, int], reserve: list[Run] = ()) -> bool:
        """Return True if the budget pays for the missing runs of `need`."""
        batch = self._missing_of(stage, arms)
        return not batch or self.affordable([*batch, *reserve])

    def closed(self, stage: str, arms: dict[str, int]) -> bool:
        """Return True if runs are missing and a proof has begun: after it a larger budget must not change
        which arm is proved."""
        return bool(self.results.proofs) and bool(self._missing_of(stage, arms))

    def _missing_of(self, stage: str, arms: dict[str, int]) -> list[Run]:
        batch = [run for arm, n in arms.items() for run in self._missing(stage, arm, n)]
        return sorted(batch, key=lambda run: run.run_id)

    def _missing(self, stage: str, arm: str, n: int) -> list[Run]:
        done = self.results.done(stage, arm)
        wanted = n - sum(loss is not None for loss in done.values())
        free = [i for i in range(n + SPARE) if i not in done]
        return [Run(stage, arm, i) for i in free[:max(wanted, 0)]]

    def sample(self, arm: str, stages: tuple[str, ...] = (SEARCH,), most: int | None = None) -> Sample:
        """Return the runs of an arm that were requested so far, at most the first `most` of each stage."""
        parts = []
        for stage in stages:
            n = self.asked.get((stage, arm), 0)
            parts.append(self.results.sample(stage, arm, n if most is None else min(n, most)))
        if len(parts) == 1:
            return parts[0]
        return Sample([x for part in parts for x in part.logs], [x for part in parts for x in part.exact])

    def spread(self, stages: tuple[str, ...] = (SEARCH,)) -> tuple[float, int] | None:
        """Return the standard deviation within arms, and its degrees of freedom; None without a spread."""
        parts = [self.results.sample(stage, arm, n) for (stage, arm), n in self.asked.items()
                 if stage in stages]
        df = sum(part.df for part in parts)
        if not any(part.varies for part in parts):
            return None
        return math.sqrt(math.fsum(part.squares for part in parts) / df), df

    def ratio(self, arm: str, stages: tuple[str, ...] = (SEARCH,), most: int | None = None) -> Ratio | None:
        """Return the log ratio of an arm, with the pooled spread; None without runs to compare."""
        ours, base = self.sample(arm, stages, most), self.sample(self.plan.baseline, stages)
        pooled = self.spread(stages)
        if pooled is None or not ours.logs or not base.logs:
            return None
        error = pooled[0] * math.sqrt(1 / len(ours.logs) + 1 / len(base.logs))
        return Ratio(ours.mean - base.mean, error, pooled[1], len(ours.logs))
