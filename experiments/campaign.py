"""Which runs are worth what they cost: the decisions of a staged campaign, apart from how runs are done.

Screening does all variants and the baseline, cheaply; who is shown to be worse there is out. The best goes on
to validation, and the second with it if the noise could have swapped them. If no interval of a difference
from the baseline lies below zero there, the next of the ranking is validated (a pivot), and so is one that
noise may have kept from being first. The best of validation is proved at full size against the baseline and
the target, with the second if noise could have swapped them; who does not keep there what it promised, makes
room for the next.

Everything decided is a function of the plan and of the results so far: who asks again after an interruption
gets the same decisions, and the runs that are missing. The noise of a stage is pooled over all that was run
there, because two runs alone say little about it; the last word, about the proof, is Welch's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from scipy import stats

from experiments.experiment_statistics import CONFIDENCE, differ, p_at_most, pooled_std, welch

YES, NO, OPEN = "yes", "no", "open"
OF_SCREENING = 0.99  # its intervals: short runs mislead by more than their noise
OF_NO = 0.8  # the interval that must lie above zero for a variant to end at validation: a miss costs more
NO_BASELINE = "no run of the baseline succeeded to compare with"
OF_TARGET = 0.01  # level of the test that the proved mean is at most the target


@dataclass(frozen=True)
class Run:
    """One of a stage's runs of a variant, or of the baseline."""

    stage: str
    variant: str
    run_id: int


@dataclass(frozen=True)
class Plan:
    """What is to be decided. stages: names of screening, validation and proof, with runs each."""

    baseline: str
    variants: tuple[str, ...]
    stages: dict[str, int]
    target: float | None
    most_advanced: int = 2  # to validation at once
    most_proved: int = 2
    until: str | None = None  # the stage after which to stop

    @property
    def last(self) -> str:
        """The stage of the proof."""
        return list(self.stages)[-1]


@dataclass
class Results:
    """Final val losses, None for runs that failed."""

    losses: dict[Run, float | None] = field(default_factory=dict)

    def good(self, stage: str, variant: str) -> list[float]:
        found = sorted((run.run_id, loss) for run, loss in self.losses.items()
                       if (run.stage, run.variant) == (stage, variant) and loss is not None)
        return [loss for _, loss in found]

    def mean(self, stage: str, variant: str) -> float:
        good = self.good(stage, variant)
        return math.fsum(good) / len(good) if good else math.inf

    def noise(self, stage: str, among: list[str] | None = None) -> tuple[float, int] | None:
        """Standard deviation within variants, and its degrees of freedom; None if there is no spread. among:
        the variants to pool, None for all."""
        among = sorted({run.variant for run in self.losses if run.stage == stage}) if among is None else among
        samples = [self.good(stage, variant) for variant in among]
        return pooled_std(*samples) if any(map(differ, samples)) else None

    def difference(self, stage: str, a: str, b: str, confidence: float = CONFIDENCE,
                   among: list[str] | None = None) -> tuple[float, tuple[float, float] | None]:
        """b's mean - a's, and its interval by the stage's noise among some variants, None for all."""
        noise, n = self.noise(stage, among), [len(self.good(stage, variant)) for variant in (a, b)]
        mean = self.mean(stage, b) - self.mean(stage, a)
        if noise is None or not all(n):
            return mean, None
        half = stats.t.ppf((1 + confidence) / 2, noise[1]) * noise[0] * math.sqrt(1 / n[0] + 1 / n[1])
        return mean, (mean - float(half), mean + float(half))


class Pending(Exception):
    """Nothing more can be decided before these runs are done."""

    def __init__(self, batch: list[Run]):
        self.batch = batch


class Story:
    """The decisions so far, in order, each a dict with its numbers and a sentence."""

    def __init__(self, plan: Plan, results: Results, affordable: Callable[[list[Run]], bool]):
        self.plan, self.results, self.affordable, self.decisions = plan, results, affordable, []

    def note(self, stage: str, decision: str, text: str, **numbers) -> None:
        self.decisions.append({"stage": stage, "decision": decision, "text": text, **numbers})

    def need(self, stage: str, variants: list[str], also: list[Run] = ()) -> bool:
        """Whether the stage's runs of these are done, or two of each at least and the budget does not pay for
        the rest; raises Pending for what is missing if it does, and for `also`."""
        batch = self.missing(stage, variants)
        if batch and self.affordable([*batch, *also]):
            raise Pending(batch)
        enough = all(len(self.results.good(stage, variant)) > 1 for variant in variants)
        if batch and enough:
            self.note(stage, "budget", f"the budget does not pay for the last {len(batch)} runs: going by "
                      f"those that are done", missing=len(batch))
        return not batch or enough

    def missing(self, stage: str, variants: list[str]) -> list[Run]:
        runs = [Run(stage, variant, i) for i in range(self.plan.stages[stage]) for variant in variants]
        return [run for run in runs if run not in self.results.losses]

    def outcome(self, stage: str, best: str | None, reason: str, **numbers) -> dict:
        """The end: the best known, None if nothing is, at which stage, why it ends here."""
        found = {"best": best, "proved": False, "target_reached": None, **numbers}
        self.note(stage, "end", reason, **found)
        return {"stage": stage, "reason": reason, **found}

    def out_of_budget(self, stage: str, candidates: list[str], before: str | None) -> dict:
        """The end for want of budget: what is known is what the stage before says."""
        known = [self.plan.baseline, *candidates]
        best = min(known, key=lambda name: self.results.mean(before, name)) if before else None
        return self.outcome(before or stage, best, f"what is left of the budget, or what it allows one "
                            f"run, does not pay for {stage}",
                            out_of_budget=True)


def decide(plan: Plan, results: Results, affordable: Callable[[list[Run]], bool] = lambda batch: True
           ) -> tuple[list[dict], list[Run], dict | None]:
    """(decisions so far, runs to do next, outcome); runs or outcome, never both.

    affordable(runs): whether the budget pays for all of them.
    """
    story = Story(plan, results, affordable)
    try:
        return story.decisions, [], _tell(story)
    except Pending as e:
        return story.decisions, e.batch, None


def _tell(story: Story) -> dict:
    """From screening to proof."""
    plan, (screening, validation, _) = story.plan, story.plan.stages
    if not story.need(screening, [plan.baseline, *plan.variants]):
        return story.out_of_budget(screening, [], None)
    if not story.results.good(screening, plan.baseline):
        return story.outcome(screening, plan.baseline, NO_BASELINE)
    candidates = _screen(story, screening)
    if not candidates:
        return story.outcome(screening, plan.baseline, "no variant is left")
    if plan.until == screening:
        return story.outcome(screening, min((plan.baseline, *candidates), key=lambda name:
                                            story.results.mean(screening, name)), "asked to stop here")
    passed = _validate(story, screening, validation, candidates)
    if isinstance(passed, dict):
        return passed
    if not passed:
        return story.outcome(validation, plan.baseline, "every variant is worse than the baseline")
    if plan.until == validation:
        return story.outcome(validation, passed[0], "asked to stop here")
    return _prove(story, passed)


def _screen(story: Story, stage: str) -> list[str]:
    """The variants that go on, best first: all but those that failed or are shown to be worse."""
    results, kept = story.results, []
    for variant in sorted(story.plan.variants, key=lambda name: results.mean(stage, name)):
        good = results.good(stage, variant)
        mean, interval = results.difference(stage, story.plan.baseline, variant, OF_SCREENING)
        numbers = dict(variant=variant, mean=results.mean(stage, variant) if good else None, difference=mean,
                       interval=interval, runs=len(good)) if good else dict(variant=variant, runs=0)
        if not good:
            story.note(stage, "drop", f"{variant}: no run succeeded", **numbers)
            continue
        worse = interval is not None and interval[0] > 0
        against = _against(mean, interval, OF_SCREENING)
        story.note(stage, "drop" if worse else "keep", f"{variant}: {against}{', worse' * worse}", **numbers)
        if not worse:
            kept.append(variant)
    return kept


def _against(mean: float, interval: tuple[float, float] | None, confidence: float = CONFIDENCE) -> str:
    """A difference from the baseline, for people."""
    by = "" if interval is None else f" ({confidence:.0%} CI {interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{mean:+.4f}{by} against the baseline"


def _first(story: Story, stage: str, ranked: list[str], most: int, confidence: float) -> list[str]:
    """The best of a ranking, and those behind it that the stage's noise could have swapped with it."""
    chosen = ranked[:1]
    for variant in ranked[1:most]:
        behind, interval = story.results.difference(stage, ranked[0], variant, confidence)
        if interval is None or interval[0] <= 0:
            chosen.append(variant)
        else:
            story.note(stage, "wait", f"{variant} is behind {ranked[0]} by {behind:.4f}, more than noise",
                       variant=variant, difference=behind, interval=interval)
    return chosen


def _validate(story: Story, before: str, stage: str, candidates: list[str]) -> list[str] | dict:
    """Those to be proved, best first; or the outcome, if the budget ends here."""
    plan, verdicts, left = story.plan, {}, list(candidates)
    group = _first(story, before, left, plan.most_advanced, OF_SCREENING)
    story.note(before, "advance", f"to validation: {', '.join(group)}", variants=group)
    while group:
        # what is validated beyond the first must not spend what a proof would need
        proof = [Run(plan.last, name, i) for name in (plan.baseline, group[0])
                 for i in range(plan.stages[plan.last])]
        if not story.need(stage, [plan.baseline, *group], proof if verdicts else []):
            if not verdicts:
                return story.out_of_budget(stage, candidates, before)
            story.note(stage, "skip", f"{', '.join(group)}: the budget does not pay for this and a proof")
            break
        if not story.results.good(stage, plan.baseline):
            return story.outcome(stage, plan.baseline, NO_BASELINE)
        there = [plan.baseline, *verdicts, *group]  # those that come later must not change this
        verdicts |= {variant: _judge(story, stage, variant, there) for variant in group}
        left = [variant for variant in left if variant not in group]
        group = _next(story, before, stage, verdicts, left)
    passed = [variant for variant, verdict in verdicts.items() if verdict != NO]
    return sorted(passed, key=lambda name: story.results.mean(stage, name))


def _next(story: Story, before: str, stage: str, verdicts: dict[str, str], left: list[str]) -> list[str]:
    """Which of the ranking is to be validated as well: the next, unless one that is better than the baseline
    was ahead of it in screening by more than noise."""
    if not left:
        return []
    better = [variant for variant, verdict in verdicts.items() if verdict == YES]
    if not better:
        story.note(stage, "pivot", f"no interval lies below zero: to {left[0]}", variants=left[:1])
        return left[:1]
    ahead = min(better, key=lambda name: story.results.mean(before, name))
    behind, interval = story.results.difference(before, ahead, left[0], OF_SCREENING)
    if interval is not None and interval[0] > 0:
        return []
    story.note(before, "advance", f"{left[0]} was behind {ahead} by {behind:.4f}, which noise can do: to "
               f"validation, too", variants=left[:1], difference=behind, interval=interval)
    return left[:1]


def _judge(story: Story, stage: str, variant: str, among: list[str]) -> str:
    """Whether a variant is better than the baseline, by the noise among these: yes, no, or open."""
    good = story.results.good(stage, variant)
    mean, interval = story.results.difference(stage, story.plan.baseline, variant, among=among)
    if not good or not math.isfinite(mean):
        story.note(stage, NO, f"{variant}: no successful runs to compare", variant=variant, runs=len(good))
        return NO
    narrow = story.results.difference(stage, story.plan.baseline, variant, OF_NO, among)[1]
    worse = mean >= 0 if narrow is None else narrow[0] > 0
    verdict = NO if worse else YES if interval is not None and interval[1] < 0 else OPEN
    meaning = {YES: "better", NO: "worse", OPEN: "cannot be told from it"}[verdict]
    story.note(stage, verdict, f"{variant}: {_against(mean, interval)}: {meaning}", variant=variant,
               difference=mean, interval=interval, runs=len(good))
    return verdict


def _against_target(mean: float, target: float | None, p: float | None) -> str:
    """What the proof says of the target."""
    if target is None:
        return f"mean is {mean:.4f}, and there is no target"
    if p is None:
        return f"mean is {mean:.4f}, which too few runs or no spread leave untested against {target:g}"
    shown = "is" if p < OF_TARGET else "is not shown to be"
    return f"mean of {mean:.4f} {shown} at most {target:g} (one-sided t-test, p = {p:.2g})"


def _prove(story: Story, passed: list[str]) -> dict:
    """The proof of the best, and of those the noise could have swapped with it; else of the next."""
    plan, (_, validation, stage) = story.plan, story.plan.stages
    tried, left = [], list(passed)
    while left:
        group = _first(story, validation, left, plan.most_proved, CONFIDENCE)
        if not story.need(stage, [plan.baseline, *group]):
            group = group[:1]
            if not story.need(stage, [plan.baseline, *group]):
                break
        tried += group
        left = [variant for variant in left if variant not in group]
        to_beat = story.results.mean(stage, plan.baseline)
        if any(story.results.mean(stage, name) < to_beat for name in group):
            break
        story.note(stage, "pivot", f"{', '.join(group)}: not below the baseline's mean", variants=group)
    if not tried:
        return story.out_of_budget(stage, passed, validation)
    if not story.results.good(stage, plan.baseline):
        return story.outcome(stage, plan.baseline, NO_BASELINE)
    best = min((plan.baseline, *tried), key=lambda name: story.results.mean(stage, name))
    good, of_baseline = story.results.good(stage, best), story.results.good(stage, plan.baseline)
    p = p_at_most(good, plan.target)
    numbers = dict(mean=story.results.mean(stage, best), p_target=p,
                   target_reached=None if p is None else p < OF_TARGET)
    against = _against_target(numbers["mean"], plan.target, p)
    if best == plan.baseline:
        return story.outcome(stage, best, f"no variant that was proved is better than the baseline, whose "
                             f"{against}", **numbers)
    test = welch(of_baseline, good)
    proved = test.interval is not None and test.interval[1] < 0
    numbers |= dict(proved=proved, difference=test.mean, interval=test.interval, p_welch=test.p)
    shown = "better" if proved else "not shown to be better"
    return story.outcome(stage, best, f"{best}: {_against(test.mean, test.interval)}: {shown}; its {against}",
                         **numbers)


class Budget:
    """GPU-seconds: those spent, and those reserved for what runs. Nothing is started that is not reserved
    for, and a run is ended at its reservation, so the total is never exceeded."""

    def __init__(self, total: float, per_run: float = math.inf):
        self.total, self.per_run, self.spent, self.reserved = total, per_run, 0.0, {}

    @property
    def left(self) -> float:
        return self.total - self.spent - math.fsum(self.reserved.values())

    def reserve(self, key, cost: float) -> bool:
        """Set aside what a run may take at most; False if that is not there."""
        if cost > min(self.left, self.per_run):
            return False
        self.reserved[key] = cost
        return True

    def settle(self, key, cost: float) -> None:
        """It has ended, and took so much."""
        self.reserved.pop(key, None)
        self.spent += cost


class Costs:
    """What runs have cost so far, and with that what others will: GPU-seconds."""

    MARGIN = 1.5  # what a run may take, as a multiple of what it is expected to

    def __init__(self, tokens: Callable[[str], float]):
        """tokens(stage): what a run of the stage trains on, for stages of which nothing is measured yet."""
        self.measured, self.probed, self.tokens = {}, {}, tokens

    def add(self, stage: str, variant: str, cost: float) -> None:
        """Of a run that succeeded or came to its limit; first of all of the stage's probe."""
        self.probed.setdefault(stage, cost)
        self.measured.setdefault((stage, variant), []).append(cost)

    def knows(self, stage: str) -> bool:
        return any(name == stage for name, _ in self.measured)

    def expected(self, run: Run) -> float | None:
        """The most that such a run has taken: of its own kind, but no less than the stage's probe said; else
        of its stage, or of another stage per token; None if nothing has run."""
        own = self.measured.get((run.stage, run.variant))
        if own:
            return max(*own, self.probed[run.stage])
        stage = [max(costs) for (name, _), costs in self.measured.items() if name == run.stage]
        if stage:
            return max(stage)
        return max((max(costs) / self.tokens(name) * self.tokens(run.stage)
                    for (name, _), costs in self.measured.items()), default=None)

    def reserved(self, run: Run) -> float | None:
        """What it may take; None if nothing has run."""
        expected = self.expected(run)
        return None if expected is None else self.MARGIN * expected

    def affordable(self, batch: list[Run], budget: Budget) -> bool:
        """Whether all of these are to be expected to fit into the budget, and each may be reserved for; True
        before anything was measured."""
        expected = [self.expected(run) for run in batch]
        if None in expected:
            return True
        most = max(expected)
        return math.fsum(expected) + (self.MARGIN - 1) * most <= budget.left \
            and self.MARGIN * most <= budget.per_run


def run_campaign(plan: Plan, results: Results, budget: Budget, costs: Costs, probe, do, tell) -> dict:
    """Decide and run in turns up to the outcome, which is returned.

    probe(stage): measure what a run of it costs and tell `costs`; False if the budget does not pay for that.
    do(batch): do these runs in order as long as the budget can reserve for the next; put losses into results
    and costs into budget and costs. tell(decisions): all of them, each time there are more.
    """
    without = set()  # stages that the budget does not even pay a probe for

    def affordable(batch: list[Run]) -> bool:
        return not without & {run.stage for run in batch} and costs.affordable(batch, budget)

    while True:
        decisions, batch, outcome = decide(plan, results, affordable)
        tell(decisions)
        if outcome is not None:
            return outcome
        stage, done = batch[0].stage, len(results.losses)
        if not costs.knows(stage):
            if not probe(stage):
                without.add(stage)
            continue
        do(batch)
        if len(results.losses) == done:  # what they may take is more than there is
            without.add(stage)
