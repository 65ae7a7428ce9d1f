"""Check by simulation the coverage of the statistics, and what the planner's savings cost.

    python experiments/simulate.py                      # a minute
    python experiments/simulate.py --experiments=2000 --campaigns=200 --json=simulated.json

1. Experiments of 2, 3 and 5 runs with a known true mean: how often the 95% interval contains it, and how
   often the test at p < 0.01 claims a mean below the target although it is exactly the target.
2. Campaigns of three and of eight variants with random true effects: how often the planner of run_stages.py
   finds the truly best variant or baseline, compared with running everything in full; what both cost; and how
   often the budget was exceeded. Some runs fail, and some take longer than expected and are ended.

Losses are in units of the standard deviation between full runs of different seeds, costs in full runs.
"""

import math
import sys
from dataclasses import dataclass

if __name__ == "__main__":
    import root_path  # noqa: F401

import numpy as np

from configurator import Parser
from experiments.campaign import Budget, Costs, Plan, Results, Run, run_campaign
from experiments.experiment_config import STAGES
from experiments.experiment_statistics import mean_interval, p_at_most
from experiments.report import table, write
from nanosync.errors import UserError
from nanosync.files import check_output_file, json_text

A, B, C = STAGES
TOKENS = {A: 1000 * 128, B: 3000 * 512, C: 5100 * 512}  # sequences a run
NOISE = {A: 2.0, B: 1.2, C: 1.0}  # assumed: shorter runs vary more
TRANSFER = {A: 0.25, B: 0.1, C: 0.0}  # assumed: change of an effect in the stage, as a share of the spread
FAILS, SLOW = 0.02, 0.02  # share of runs that fail, and of runs that take three times as long


def intervals_and_tests(experiments: int, rng: np.random.Generator) -> list[dict]:
    """Measure for each number of runs the coverage of the 95% interval, and the false positives of the test.
    """
    rows = []
    for n in (2, 3, 5):
        samples = 3.28 + 0.0015 * rng.standard_normal((experiments, n))
        covered = positive = 0
        for sample in samples.tolist():
            low, high = mean_interval(sample)
            covered += low <= 3.28 <= high
            positive += p_at_most(sample, 3.28) < 0.01
        rows.append({"runs": n, "experiments": experiments, "coverage": covered / experiments,
                     "false_positives": positive / experiments})
    return rows


# variants, spread of their effects, budget: sufficient in the first four, too small in the last two
KINDS = ((3, 5.0, 50.0), (3, 2.0, 50.0), (8, 5.0, 60.0), (8, 2.0, 60.0), (3, 5.0, 12.0), (8, 5.0, 20.0))


@dataclass
class World:
    """The true effects of one simulated campaign."""

    effects: dict[str, dict[str, float]]  # stage -> variant -> true loss; the baseline's is 0
    best: str  # at full size
    rng: np.random.Generator

    @classmethod
    def draw(cls, variants: list[str], spread: float, rng: np.random.Generator) -> "World":
        """Draw random effects."""
        true = {name: spread * rng.standard_normal() for name in variants} | {"baseline": 0.0}
        off = {stage: {name: TRANSFER[stage] * spread * rng.standard_normal() for name in variants}
               for stage in STAGES}
        effects = {stage: {name: effect + off[stage].get(name, 0.0) for name, effect in true.items()}
                   for stage in STAGES}
        return cls(effects, min(true, key=true.get), rng)

    def loss(self, stage: str, variant: str) -> float | None:
        """Draw the loss of a run, None for a failed run."""
        if self.rng.random() < FAILS:
            return None
        return self.effects[stage][variant] + NOISE[stage] * self.rng.standard_normal()

    def cost(self, stage: str) -> float:
        """Draw the cost of a run."""
        usual = TOKENS[stage] / TOKENS[C] * math.exp(0.05 * self.rng.standard_normal())
        return usual * (3.0 if self.rng.random() < SLOW else 1.0)


def staged(world: World, variants: list[str], budget: Budget) -> str:
    """Return the best variant by the planner of run_stages.py."""
    plan, results = Plan("baseline", tuple(variants), STAGES, target=-math.inf), Results()
    costs = Costs(TOKENS.__getitem__)

    def probe(stage: str) -> bool:
        cost = 0.02 * world.cost(stage)
        if not budget.reserve(stage, 2 * cost):
            return False
        budget.settle(stage, cost)
        costs.add(stage, "baseline", world.cost(stage))
        return True

    def do(batch: list[Run]) -> None:
        for run in batch:
            reserved = costs.reserved(run)
            if not budget.reserve(run, reserved):
                return
            cost, loss = world.cost(run.stage), world.loss(run.stage, run.variant)
            results.losses[run] = loss if cost < reserved else None  # ended at its limit
            budget.settle(run, min(cost, reserved))
            costs.add(run.stage, run.variant, min(cost, reserved))

    return run_campaign(plan, results, budget, costs, probe, do, lambda decisions: None)["best"]


def in_full(world: World, variants: list[str]) -> tuple[str, float]:
    """Run everything in full; return the variant of the lowest mean, and the cost."""
    stage, means, cost = C, {}, 0.0
    for name in ("baseline", *variants):
        losses = [world.loss(stage, name) for _ in range(STAGES[stage])]
        cost += sum(world.cost(stage) for _ in losses)
        good = [loss for loss in losses if loss is not None]
        means[name] = np.mean(good) if good else math.inf
    return min(means, key=means.get), cost


def campaigns(n: int, n_variants: int, spread: float, total: float, seed: int) -> dict:
    """Do n random campaigns by the planner and in full; return the figures of both."""
    variants = [f"variant {i}" for i in range(n_variants)]
    found = {"staged": 0, "full": 0}
    spent, full_cost, exceeded, lost, lost_full = [], [], 0, [], []
    for i in range(n):
        world, budget = World.draw(variants, spread, np.random.default_rng((seed, i))), Budget(total)
        best = staged(world, variants, budget)
        world.rng = np.random.default_rng((seed, i, 1))  # the same for any planner
        best_full, cost = in_full(world, variants)
        true = world.effects[C]
        found["staged"] += best == world.best
        found["full"] += best_full == world.best
        lost.append(true[best or "baseline"] - true[world.best])  # without a result the baseline is kept
        lost_full.append(true[best_full] - true[world.best])
        spent.append(budget.spent)
        full_cost.append(cost)
        exceeded += budget.spent > budget.total
    error = math.sqrt(sum(k / n * (1 - k / n) / n for k in found.values()))
    return {"variants": n_variants, "spread": spread, "budget": total, "campaigns": n,
            "found_staged": found["staged"] / n, "found_full": found["full"] / n, "standard_error": error,
            "lost_staged": float(np.mean(lost)), "lost_full": float(np.mean(lost_full)),
            "cost_staged": float(np.mean(spent)), "cost_full": float(np.mean(full_cost)),
            "most_spent": max(spent), "exceeded": exceeded}


def campaigns_table(kinds: list[dict]) -> str:
    """Return the table of all kinds of campaigns."""
    return table(
        ["variants", "spread of effects", "best found: staged", "in full", "difference ± SE",
         "loss above the best: staged", "in full", "cost: staged", "in full", "saved", "budget", "most spent",
         "exceeded"],
        [[str(k["variants"]), f"{k['spread']:g}", f"{k['found_staged']:.1%}", f"{k['found_full']:.1%}",
          f"{k['found_staged'] - k['found_full']:+.1%} ± {k['standard_error']:.1%}",
          f"{k['lost_staged']:.2f}", f"{k['lost_full']:.2f}", f"{k['cost_staged']:.1f}",
          f"{k['cost_full']:.1f}", f"{1 - k['cost_staged'] / k['cost_full']:.0%}", f"{k['budget']:g}",
          f"{k['most_spent']:.2f}", f"{k['exceeded']} of {k['campaigns']:,}"] for k in kinds])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--experiments", type=int, default=10_000)
    parser.add_argument("--campaigns", type=int, default=1000, help="campaigns of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="file for all figures")
    args = parser.parse_args()
    if min(args.experiments, args.campaigns) < 10:
        raise UserError("--experiments and --campaigns must be at least 10")
    if args.json:
        check_output_file(args.json, "--json")
    rows = intervals_and_tests(args.experiments, np.random.default_rng(args.seed))
    print(table(["runs", "experiments", "intervals with the true mean", "false positives at p < 0.01"],
                [[str(row["runs"]), f"{row['experiments']:,}", f"{row['coverage']:.2%}",
                  f"{row['false_positives']:.2%}"] for row in rows]))
    kinds = []
    for kind in KINDS:
        kinds.append(campaigns(args.campaigns, *kind, args.seed))
        print(f"campaigns: {len(kinds)} of {len(KINDS)} kinds", file=sys.stderr, flush=True)
    print(campaigns_table(kinds))
    if args.json:
        write(args.json, json_text({"statistics": rows, "campaigns": kinds}))


if __name__ == "__main__":
    main()
