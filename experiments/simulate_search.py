"""Check by simulation how often the search for the fewest syncs is right, and that its budget holds.

    python experiments/simulate_search.py                    # two minutes
    python experiments/simulate_search.py --campaigns=200 --json=search.json
    python experiments/simulate_search.py --families         # four other strategies in each campaign

Worlds, in which 2% of the runs fail and 2% take three times as long as expected:
    monotone             losses rise as syncs fall; the boundary is anywhere
    non-monotone         each count has a ratio of its own
    all at the margin    every count is exactly at the margin, so it is within, and hardest to show
    all just above       every count is just above the margin, so every claim is false
    unequal spreads      as monotone; the spread of an arm is up to twice that of the baseline

The interval is right if it has a boundary in it: a count that is within the margin while the next smaller one
is not. A claim is false if the proved count is above the margin. Each fourth campaign is
repeated with its runner killed during one of ten runs. Each is repeated on a budget of 30 runs.
"""

import math
import sys
from dataclasses import dataclass, replace

if __name__ == "__main__":
    import root_path  # noqa: F401

import numpy as np

from configurator import Parser
from experiments.campaign import Budget, Run, run_campaign
from experiments.fewest_syncs import decide
from experiments.report import table, write
from experiments.search_costs import SearchCosts
from experiments.search_evidence import SearchPlan, SearchResults, arm_name
from nanosync.errors import UserError
from nanosync.files import check_output_file, json_text

COUNTS = 24, 12, 8, 6, 4, 3, 2, 1
PLAN = SearchPlan(COUNTS, 0.02, placements=(("ends", 4), ("ends", 3), ("ends", 2)))
FAMILIES = ("ladder", 23), ("palm", 12), ("mean-3", 4), ("mean-6", 2)
FAILS, SLOW = 0.02, 0.02  # share of runs that fail, and of runs that take three times as long
SPREADS = 0.02, 0.01, 0.005  # of the log loss between seeds
WORLDS = "monotone", "non-monotone", "all at the margin", "all just above", "unequal spreads"
AMPLE, SHORT = 400.0, 30.0  # budgets in runs
PER_RUN = 4.0  # longest run
KILLED_EACH = 4  # each 4th campaign is repeated with interruptions


@dataclass
class World:
    """The true log ratios of one campaign."""

    ratios: dict[str, float]  # arm -> log ratio
    spreads: dict[str, float]
    seed: tuple[int, ...]
    plan: SearchPlan

    @classmethod
    def draw(cls, kind: str, spread: float, seed: tuple[int, ...], plan: SearchPlan = PLAN) -> "World":
        """Draw the ratios of a world."""
        rng, few = np.random.default_rng(seed), COUNTS[1:]
        if kind in ("monotone", "unequal spreads"):
            steps = PLAN.margin * np.cumsum(rng.exponential(rng.choice([0.3, 0.6, 1.5]), len(few)))
        elif kind == "non-monotone":
            steps = PLAN.margin * rng.uniform(-0.5, 3.0, len(few))
        else:
            steps = np.full(len(few), PLAN.margin + (1e-6 if kind == "all just above" else 0.0))
        ratios = {arm_name(n): float(step) for n, step in zip(few, steps)}
        for placement, n in PLAN.placements:
            off = PLAN.margin * rng.uniform(-0.5, 0.5) if kind in WORLDS[:2] else 0.0
            ratios[arm_name(n, placement)] = ratios[arm_name(n)] + off
        rng_families = np.random.default_rng((*seed, 1))  # all else is as without families
        for arm, _ in plan.families:
            anywhere = kind not in (WORLDS[2], WORLDS[3])
            ratios[arm] = PLAN.margin * rng_families.uniform(-0.5, 3.0) if anywhere else float(steps[0])
        ratios[PLAN.baseline] = 0.0
        spreads = {arm: spread * (rng.uniform(1, 2) if kind == WORLDS[4] and arm != PLAN.baseline else 1.0)
                   for arm in ratios}
        return cls(ratios, spreads, seed, plan)

    def within(self, arm: str) -> bool:
        return self.ratios[arm] <= PLAN.margin + 1e-12

    def boundary_in(self, low: int, high: int) -> bool:
        """Return True if one of these counts is within the margin while the next smaller one is not."""
        within = [self.within(arm_name(n)) for n in COUNTS] + [False]
        return any(low <= n <= high and within[i] and not within[i + 1] for i, n in enumerate(COUNTS))

    def run(self, run: Run) -> tuple[float | None, float]:
        """Return loss and cost of a run, the same at each call; None for a failed run."""
        key = [*self.seed, *f"{run.stage}/{run.variant}/{run.run_id}".encode()]
        rng = np.random.default_rng(key)
        cost = math.exp(0.05 * rng.standard_normal()) * (3.0 if rng.random() < SLOW else 1.0)
        noise = self.spreads[run.variant] * rng.standard_normal()
        failed = rng.random() < FAILS
        return (None if failed else 2.0 * math.exp(self.ratios[run.variant] + noise)), cost


def search(world: World, total: float, interruptions: np.random.Generator | None = None
           ) -> tuple[dict, Budget, int]:
    """Do a campaign; return its outcome, its budget and the number of runs.

    interruptions: None, or the random numbers that decide where the runner is killed, without a result of the
    run that it was doing.
    """
    results, budget, costs = SearchResults(), Budget(total, PER_RUN), SearchCosts(lambda stage: 1.0, PER_RUN)
    n = 0

    class Killed(Exception):
        pass

    def do(batch: list[Run]) -> None:
        nonlocal n
        for run in batch:
            reserved = costs.reserved(run)
            if not budget.reserve(run, reserved):
                return
            n += 1
            loss, cost = world.run(run)
            budget.settle(run, min(cost, reserved))
            if interruptions is not None and interruptions.random() < 0.1:
                raise Killed
            results.take(run, loss if cost < reserved else None)
            costs.add(run.stage, run.variant, min(cost, reserved))

    while True:
        try:
            outcome = run_campaign(world.plan, results, budget, costs, None, do, lambda decisions: None,
                                   decide)
            return outcome, budget, n
        except Killed:
            taken, results = results, SearchResults()
            results.proofs = taken.proofs
            for run in sorted(taken.losses, key=lambda run: (run.run_id, run.variant)):  # as read from disk
                results.take(run, taken.losses[run])


def campaigns(n: int, kind: str, spread: float, seed: int, plan: SearchPlan = PLAN) -> dict:
    """Do n campaigns in worlds of a kind; return their figures."""
    found = dict.fromkeys(("covered", "claims", "false", "exact", "near", "exceeded", "other"), 0)
    runs, most, widths = [], 0.0, []
    for i in range(n):
        world = World.draw(kind, spread, (seed, WORLDS.index(kind), int(1e4 * spread), i), plan)
        outcome, budget, done = search(world, AMPLE)
        low, high = outcome["count_interval"]
        found["covered"] += world.boundary_in(low, high)
        if outcome["proved"]:
            found["claims"] += 1
            found["false"] += not world.within(outcome["arm"])
        true = min(plan.syncs_of(arm) for arm in (*map(arm_name, COUNTS), *dict(plan.families))
                   if world.within(arm))
        fewest = outcome["fewest"] or COUNTS[0]
        steps = abs(sum(n > fewest for n in COUNTS) - sum(n > true for n in COUNTS))
        found["exact"] += steps == 0
        found["near"] += steps <= 1
        widths.append(COUNTS.index(low) - COUNTS.index(high) + 1)
        runs.append(done)
        if i % KILLED_EACH == 0:
            again = search(world, AMPLE, np.random.default_rng((seed, i, 1)))[0]
            found["other"] += again != outcome
        short = search(world, SHORT)[1]
        found["exceeded"] += max(budget.spent - budget.total, short.spent - short.total) > 0
        most = max(most, short.spent)
    return {"world": kind, "spread": spread, "campaigns": n, "runs": float(np.mean(runs)),
            "interval_counts": float(np.mean(widths)), "most_spent": most,
            **{key: value / n if key not in ("exceeded", "other") else value for key, value in found.items()}}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--campaigns", type=int, default=1000, help="in each world, over all spreads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", action="store_true", help="four other strategies in each campaign")
    parser.add_argument("--json", metavar="FILE", help="file for all figures")
    args = parser.parse_args()
    if args.campaigns < 10:
        raise UserError("--campaigns must be at least 10")
    if args.json:
        check_output_file(args.json, "--json")
    plan = replace(PLAN, families=FAMILIES) if args.families else PLAN
    rows = []
    for kind in WORLDS:
        for spread in SPREADS:
            rows.append(campaigns(math.ceil(args.campaigns / len(SPREADS)), kind, spread, args.seed,
                                  plan))
            print(f"{len(rows)} of {len(WORLDS) * len(SPREADS)} kinds", file=sys.stderr, flush=True)
    print(table(
        ["world", "spread", "campaigns", "interval right", "false claims", "claims", "exact", "within a step",
         "counts in the interval", "runs", "budget exceeded", "other after a kill"],
        [[row["world"], f"{row['spread']:g}", f"{row['campaigns']:,}", f"{row['covered']:.1%}",
          f"{row['false']:.1%}", f"{row['claims']:.1%}", f"{row['exact']:.1%}", f"{row['near']:.1%}",
          f"{row['interval_counts']:.1f}", f"{row['runs']:.1f}", str(row["exceeded"]), str(row["other"])]
         for row in rows]))
    if args.json:
        write(args.json, json_text({"worlds": rows}))


if __name__ == "__main__":
    main()
