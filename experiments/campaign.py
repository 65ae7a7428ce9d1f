"""Decide which runs of a staged campaign are worth their cost; run_stages.py does them.

Screening runs all variants and the baseline, cheaply. Variants shown to be worse than the baseline are
dropped. The best variant advances to validation, and the second too if noise could have swapped the two. If
in validation no interval of a difference from the baseline lies below zero, the next variant of the ranking
is validated as well (a pivot). The same happens to a variant that noise may have kept from the first place.
The best variant of validation is proved at full size against the baseline and the target, together with the
second if noise could have swapped the two. If its mean there is not below the baseline's, the next variant is
proved.

All decisions are a function of the plan and the results so far: after an interruption the decisions are the
same, and only the missing runs are done. The noise of a stage is pooled over all its runs, because two runs
say little about it. The final test, in the proof, is Welch's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from scipy.special import stdtrit

from experiments.experiment_statistics import CONFIDENCE, differ, p_at_most, pooled_std, welch

YES, NO, OPEN = "yes", "no", "open"
SCREENING_CONFIDENCE = 0.99  # of its intervals: short runs mislead by more than their noise
REJECTION_CONFIDENCE = 0.8  # validation rejects if this interval lies above zero: a missed variant costs more
NO_BASELINE = "no run of the baseline succeeded to compare with"
TARGET_LEVEL = 0.01  # level of the test that the proved mean is at most the target


@dataclass(frozen=True)
class Run:
    """A run of a variant, or of the baseline, in a stage."""

    stage: str
    variant: str
    run_id: int


@dataclass(frozen=True)
class Plan:
    """The subject of a campaign. stages: names of screening, validation and proof, with the runs of each."""

    baseline: str
    variants: tuple[str, ...]
    stages: dict[str, int]
    target: float | None
    most_advanced: int = 2  # variants that enter validation together
    most_proved: int = 2  # variants that enter the proof together
    until: str | None = None  # the stage after which to stop

    @property
    def last(self) -> str:
        """The stage of the proof."""
        return list(self.stages)[-1]


@dataclass
class Results:
    """The final val losses, None for failed runs."""

    losses: dict[Run, float | None] = field(default_factory=dict)

    def good(self, stage: str, variant: str) -> list[float]:
        """Return the losses of the successful runs, by run_id."""
        found = sorted((run.run_id, loss) for run, loss in self.losses.items()
                       if (run.stage, run.variant) == (stage, variant) and loss is not None)
        return [loss for _, loss in found]

    def mean(self, stage: str, variant: str) -> float:
        """Return the mean loss, infinite without a successful run."""
        good = self.good(stage, variant)
        return math.fsum(good) / len(good) if good else math.inf

    def noise(self, stage: str, among: list[str] | None = None) -> tuple[float, int] | None:
        """Return the standard deviation within variants and its degrees of freedom; None without a spread.

        among: the variants to pool, None for all.
        """
        among = sorted({run.variant for run in self.losses if run.stage == stage}) if among is None else among
        samples = [self.good(stage, variant) for variant in among]
        return pooled_std(*samples) if any(map(differ, samples)) else None

    def difference(self, stage: str, a: str, b: str, confidence: float = CONFIDENCE,
                   among: list[str] | None = None) -> tuple[float, tuple[float, float] | None]:
        """Return b's mean minus a's, and its interval from the noise among some variants, None for all."""
        noise, n = self.noise(stage, among), [len(self.good(stage, variant)) for variant in (a, b)]
        mean = self.mean(stage, b) - self.mean(stage, a)
        if noise is None or not all(n):
            return mean, None
        half = stdtrit(noise[1], (1 + confidence) / 2) * noise[0] * math.sqrt(1 / n[0] + 1 / n[1])
        return mean, (mean - float(half), mean + float(half))


class Pending(Exception):
    """A batch of runs that the next decision needs."""

    def __init__(self, batch: list[Run]):
        self.batch = batch


class Story:
    """The decisions so far, in order: dicts with a sentence and its numbers."""

    def __init__(self, plan: Plan, results: Results, affordable: Callable[[list[Run]], bool]):
        self.plan, self.results, self.affordable, self.decisions = plan, results, affordable, []

    def note(self, stage: str, decision: str, text: str, **numbers) -> None:
        """Add a decision."""
        self.decisions.append({"stage": stage, "decision": decision, "text": text, **numbers})

    def need(self, stage: str, variants: list[str], also: list[Run] = ()) -> bool:
        """Return True if the stage's runs of these variants are done, or if at least two of each are and the
        budget does not pay for the rest; else False. Raises Pending for missing runs that the budget pays for
        together with the runs `also`.
        """
        batch = self.missing(stage, variants)
        if batch and self.affordable([*batch, *also]):
            raise Pending(batch)
        enough = all(len(self.results.good(stage, variant)) > 1 for variant in variants)
        if batch and enough:
            self.note(stage, "budget", f"the budget does not pay for the last {len(batch)} runs: going by "
                      f"those that are done", missing=len(batch))
        return not batch or enough

    def missing(self, stage: str, variants: list[str]) -> list[Run]:
        """Return the stage's runs of these variants that have no result."""
        runs = [Run(stage, variant, i) for i in range(self.plan.stages[stage]) for variant in variants]
        return [run for run in runs if run not in self.results.losses]

    def outcome(self, stage: str, best: str | None, reason: str, **numbers) -> dict:
        """Add and return the end: the best variant known, None if none is, the stage, and the reason."""
        found = {"best": best, "proved": False, "target_reached": None, **numbers}
        self.note(stage, "end", reason, **found)
        return {"stage": stage, "reason": reason, **found}

    def out_of_budget(self, stage: str, candidates: list[str], before: str | None) -> dict:
        """Add and return the end at an exhausted budget: the best variant is that of the stage before."""
        known = [self.plan.baseline, *candidates]
        best = min(known, key=lambda name: self.results.mean(before, name)) if before else None
        return self.outcome(before or stage, best, f"what is left of the budget, or what it allows one "
                            f"run, does not pay for {stage}",
                            out_of_budget=True)


def decide(plan: Plan, results: Results, affordable: Callable[[list[Run]], bool] = lambda batch: True
           ) -> tuple[list[dict], list[Run], dict | None]:
    """Return (decisions so far, runs to do next, outcome), either runs or an outcome.

    affordable(runs): True if the budget pays for all of them.
    """
    story = Story(plan, results, affordable)
    try:
        return story.decisions, [], _tell(story)
    except Pending as e:
        return story.decisions, e.batch, None


def _tell(story: Story) -> dict:
    """Decide from screening to proof."""
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
    """Return the variants that are neither failed nor shown to be worse, best first."""
    results, kept = story.results, []
    for variant in sorted(story.plan.variants, key=lambda name: results.mean(stage, name)):
        good = results.good(stage, variant)
        mean, interval = results.difference(stage, story.plan.baseline, variant, SCREENING_CONFIDENCE)
        numbers = dict(variant=variant, mean=results.mean(stage, variant) if good else None, difference=mean,
                       interval=interval, runs=len(good)) if good else dict(variant=variant, runs=0)
        if not good:
            story.note(stage, "drop", f"{variant}: no run succeeded", **numbers)
            continue
        worse = interval is not None and interval[0] > 0
        against = _against(mean, interval, SCREENING_CONFIDENCE)
        story.note(stage, "drop" if worse else "keep", f"{variant}: {against}{', worse' * worse}", **numbers)
        if not worse:
            kept.append(variant)
    return kept


def _against(mean: float, interval: tuple[float, float] | None, confidence: float = CONFIDENCE) -> str:
    """Describe a difference from the baseline."""
    by = "" if interval is None else f" ({confidence:.0%} CI {interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{mean:+.4f}{by} against the baseline"


def _first(story: Story, stage: str, ranked: list[str], most: int, confidence: float) -> list[str]:
    """Return the best of a ranking, and the variants that the stage's noise could have swapped with it."""
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
    """Return the variants to prove, best first, or the outcome if the campaign ends here."""
    plan, verdicts, left = story.plan, {}, list(candidates)
    group = _first(story, before, left, plan.most_advanced, SCREENING_CONFIDENCE)
    story.note(before, "advance", f"to validation: {', '.join(group)}", variants=group)
    while group:
        # variants after the first group must leave enough of the budget for a proof
        proof = [Run(plan.last, name, i) for name in (plan.baseline, group[0])
                 for i in range(plan.stages[plan.last])]
        if not story.need(stage, [plan.baseline, *group], proof if verdicts else []):
            if not verdicts:
                return story.out_of_budget(stage, candidates, before)
            story.note(stage, "skip", f"{', '.join(group)}: the budget does not pay for this and a proof")
            break
        if not story.results.good(stage, plan.baseline):
            return story.outcome(stage, plan.baseline, NO_BASELINE)
        among = [plan.baseline, *verdicts, *group]  # later variants must not change this verdict
        verdicts |= {variant: _judge(story, stage, variant, among) for variant in group}
        left = [variant for variant in left if variant not in group]
        group = _next(story, before, stage, verdicts, left)
    passed = [variant for variant, verdict in verdicts.items() if verdict != NO]
    return sorted(passed, key=lambda name: story.results.mean(stage, name))


def _next(story: Story, before: str, stage: str, verdicts: dict[str, str], left: list[str]) -> list[str]:
    """Return the next variant of the ranking to validate, unless a variant better than the baseline was ahead
    of it in screening by more than noise."""
    if not left:
        return []
    better = [variant for variant, verdict in verdicts.items() if verdict == YES]
    if not better:
        story.note(stage, "pivot", f"no interval lies below zero: to {left[0]}", variants=left[:1])
        return left[:1]
    ahead = min(better, key=lambda name: story.results.mean(before, name))
    behind, interval = story.results.difference(before, ahead, left[0], SCREENING_CONFIDENCE)
    if interval is not None and interval[0] > 0:
        return []
    story.note(before, "advance", f"{left[0]} was behind {ahead} by {behind:.4f}, which noise can do: to "
               f"validation, too", variants=left[:1], difference=behind, interval=interval)
    return left[:1]


def _judge(story: Story, stage: str, variant: str, among: list[str]) -> str:
    """Judge by the noise among these if a variant is better than the baseline: yes, no, or open."""
    good = story.results.good(stage, variant)
    mean, interval = story.results.difference(stage, story.plan.baseline, variant, among=among)
    if not good or not math.isfinite(mean):
        story.note(stage, NO, f"{variant}: no successful runs to compare", variant=variant, runs=len(good))
        return NO
    narrow = story.results.difference(stage, story.plan.baseline, variant, REJECTION_CONFIDENCE, among)[1]
    worse = mean >= 0 if narrow is None else narrow[0] > 0
    verdict = NO if worse else YES if interval is not None and interval[1] < 0 else OPEN
    meaning = {YES: "better", NO: "worse", OPEN: "cannot be told from it"}[verdict]
    story.note(stage, verdict, f"{variant}: {_against(mean, interval)}: {meaning}", variant=variant,
               difference=mean, interval=interval, runs=len(good))
    return verdict


def _against_target(mean: float, target: float | None, p: float | None) -> str:
    """Describe the proved mean against the target."""
    if target is None:
        return f"mean is {mean:.4f}, and there is no target"
    if p is None:
        return f"mean is {mean:.4f}, which too few runs or no spread leave untested against {target:g}"
    shown = "is" if p < TARGET_LEVEL else "is not shown to be"
    return f"mean of {mean:.4f} {shown} at most {target:g} (one-sided t-test, p = {p:.2g})"


def _prove(story: Story, passed: list[str]) -> dict:
    """Prove the best variant with those that noise could have swapped with it, else the next variant."""
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
    return _proof(story, stage, tried)


def _proof(story: Story, stage: str, tried: list[str]) -> dict:
    """Return the outcome of a proof of some variants."""
    plan = story.plan
    best = min((plan.baseline, *tried), key=lambda name: story.results.mean(stage, name))
    good, of_baseline = story.results.good(stage, best), story.results.good(stage, plan.baseline)
    p = p_at_most(good, plan.target)
    numbers = dict(mean=story.results.mean(stage, best), p_target=p,
                   target_reached=None if p is None else p < TARGET_LEVEL)
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
    """GPU-seconds spent, and reserved for running jobs.

    No run starts without a reservation, and a run is ended at its reservation: the total is never exceeded.
    """

    def __init__(self, total: float, per_run: float = math.inf):
        self.total, self.per_run, self.spent, self.reserved = total, per_run, 0.0, {}

    @property
    def left(self) -> float:
        return self.total - self.spent - math.fsum(self.reserved.values())

    def reserve(self, key, cost: float) -> bool:
        """Reserve the most that a run may take; return False if the budget has less."""
        if cost > min(self.left, self.per_run):
            return False
        self.reserved[key] = cost
        return True

    def settle(self, key, cost: float) -> None:
        """Replace the reservation of an ended run by its cost."""
        self.reserved.pop(key, None)
        self.spent += cost


class Costs:
    """The measured costs of runs, and from them the expected costs of others: GPU-seconds."""

    MARGIN = 1.5  # a run may take this multiple of its expected cost

    def __init__(self, tokens: Callable[[str], float]):
        """tokens(stage): the tokens that a run of the stage trains on, for stages without a measured run."""
        self.measured, self.probed, self.tokens = {}, {}, tokens

    def add(self, stage: str, variant: str, cost: float) -> None:
        """Add the cost of a run that succeeded or reached its limit; the first of a stage is its probe's."""
        self.probed.setdefault(stage, cost)
        self.measured.setdefault((stage, variant), []).append(cost)

    def knows(self, stage: str) -> bool:
        """Return True if a run of the stage was measured."""
        return any(name == stage for name, _ in self.measured)

    def expected(self, run: Run) -> float | None:
        """Return the highest cost so far of the variant's runs in this stage, at least that of the probe.

        Without a run of the variant, return the highest cost in the stage; without a run of the stage, that
        of other stages in proportion to their tokens; None without any run.
        """
        own = self.measured.get((run.stage, run.variant))
        if own:
            return max(*own, self.probed[run.stage])
        stage = [max(costs) for (name, _), costs in self.measured.items() if name == run.stage]
        if stage:
            return max(stage)
        return max((max(costs) / self.tokens(name) * self.tokens(run.stage)
                    for (name, _), costs in self.measured.items()), default=None)

    def reserved(self, run: Run) -> float | None:
        """Return the most that a run may take; None without any measured run."""
        expected = self.expected(run)
        return None if expected is None else self.MARGIN * expected

    def affordable(self, batch: list[Run], budget: Budget) -> bool:
        """Return True if the budget has room for the expected cost of all runs and for the reservation of
        each, or if nothing was measured yet."""
        expected = [self.expected(run) for run in batch]
        if None in expected:
            return True
        most = max(expected)
        return math.fsum(expected) + (self.MARGIN - 1) * most <= budget.left \
            and self.MARGIN * most <= budget.per_run


def run_campaign(plan: Plan, results: Results, budget: Budget, costs: Costs, probe, do, tell,
                 decide=decide) -> dict:
    """Alternate between deciding and running until there is an outcome, and return it.

    probe(stage): measure the cost of a run and add it to `costs`; returns False if the budget does not pay
    for that; None if runs of unknown cost may start. do(batch): do these runs in order while the budget can
    reserve for the next; adds losses to results, and costs to budget and costs. tell(decisions): takes all
    decisions so far, after each change.
    decide(plan, results, affordable): the rules.
    """
    without = set()  # stages whose probe or next run the budget does not pay for

    def affordable(batch: list[Run]) -> bool:
        return not without & {run.stage for run in batch} and costs.affordable(batch, budget)

    while True:
        decisions, batch, outcome = decide(plan, results, affordable)
        tell(decisions)
        if outcome is not None:
            return outcome
        stage, done = batch[0].stage, len(results.losses)
        if probe is not None and not costs.knows(stage):
            if not probe(stage):
                without.add(stage)
            continue
        do(batch)
        if len(results.losses) == done:  # the budget is below the reservation of the first run
            without.add(stage)
