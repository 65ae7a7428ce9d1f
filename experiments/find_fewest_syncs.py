"""Find the fewest syncs whose val loss is within a margin of the dense model's, within a budget.

    python experiments/find_fewest_syncs.py --plan=experiments/configs/fewest_syncs.json --within=2% \\
        --budget_gpu_hours=1.5 [--parallel=2] [--placement=both] [--latency=decode.json] [--dry_run]

After an interruption of any kind the same command resumes the search. fewest_syncs.py has the rules: pilot,
bisection, placement, families, proof on fresh seeds, shallower dense models, second budget. --key=value goes
to the script in all runs. On a CPU a process counts as a GPU.

A run is launched only if the budget has room for the most that it may take, at which it is ended. From half
of its schedule on, a run of the bisection is also ended if the 99% prediction interval of its final loss lies
above the margin (regression on the runs that have finished). It counts with the interval's lower end.

Writes into experiment_logs/<campaign_name>/: verdict.txt, frontier.json, frontier.md, frontier.png, and the
files of a campaign: decisions.jsonl, report.md, ledger.jsonl, outcome.json, a folder for each arm.
"""

import argparse
import math
import os
from collections.abc import Collection

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser, join_values, parse_argument
from experiments import search_greedy
from experiments.campaign import Budget, Run, run_campaign
from experiments.campaign_folder import CampaignFolder
from experiments.campaign_plan import HOUR, with_ends
from experiments.early_ending import FROM, pairs_at, predicted_least
from experiments.experiment_config import (
    DEFAULTS,
    all_settings,
    check_data,
    command,
    command_line,
    in_range,
    num_iterations,
    read_json,
    script_settings,
    variables,
)
from experiments.fewest_syncs import LEAST_PROOF, decide, least_difference
from experiments.report import table, write
from experiments.runner import Job, Running, end_on_signals, slots
from experiments.search_costs import SearchCosts
from experiments.search_evidence import DROPS, GREEDY, PILOT, PROOF, SEARCH, SENSITIVITY, SearchResults
from experiments.search_plan import (
    OPTIONAL,
    PLACEMENT,
    Search,
    check_plan,
    most_runs,
    parts_that_stay,
    read_latencies,
    read_search,
)
from experiments.search_report import write_frontier
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write, json_text

SHOWN_SPREADS = 0.0025, 0.005, 0.01, 0.02  # between seeds, in the table of --dry_run


class SearchCampaign(CampaignFolder):
    """The folder of a search. Does the runs that fewest_syncs.py decides on."""

    def __init__(self, folder: str, search: Search, overrides: list[str], parallel: int):
        hours = search.plan["budget"]
        super().__init__(folder, parallel, hours.get("price_per_gpu_hour"))
        self.search, self.plan, self.configs = search, search.plan, search.configs
        self.keep_plan(search.plan | {"within": search.rules.within, "overrides": overrides}, check_kept,
                       parts_that_stay)
        self.budget = Budget(HOUR * hours["gpu_hours"], HOUR * hours["gpu_hours_per_run"])
        self.results, self._seen = SearchResults(), {}
        unknown = self.budget.per_run - with_ends(0.0, search.plan["n_gpus"])
        self.costs = SearchCosts(self._steps, (1 - 1e-9) * unknown)  # rounding must not exceed the limit
        self.reopen()
        self.results.proofs = proofs_in(self._told, self.configs, search.rules.looks[-1])

    def _steps(self, stage: str) -> float:
        return float(num_iterations(self.configs[stage, self.search.rules.baseline]))

    def runs_of(self, stage: str, arm: str) -> int:
        return most_runs(self.plan["looks"])

    def job_of(self, run: Run) -> Job:
        job = super().job_of(run)
        if run.stage == SENSITIVITY:
            dense = self.log_of(SEARCH, self.search.rules.baseline)
            job.changed = {"init_from": search_greedy.checkpoint_of(dense)}
        return job

    def take(self, run: Run, result: dict) -> None:
        if run.stage == SENSITIVITY and result["success"] and self.results.greedy is None:
            self._take_order(self.logs[run.stage, run.variant].run_folder(run.run_id))
        bound = not result["success"] and in_range(result.get("at_least"))
        loss = result["at_least"] if bound else result["final_val_loss"] if result["success"] else None
        self.results.take(run, loss, bound)

    def _take_order(self, folder: str) -> None:
        """Make the arms with the greedy placement, from the result of the run in this folder."""
        counts = self.plan["counts"]
        order = search_greedy.read_order(folder, counts[0], counts[-1])
        if order is not None:
            self.results.greedy, added = search_greedy.arms_of(counts, order, self.search.points)
            for arm, points in added.items():
                self.search.add_points(arm, points)

    def places(self, stage: str) -> list[str | None]:
        arm = DROPS if stage == SENSITIVITY else self.search.rules.baseline
        return self.places_of(self.configs[stage, arm])

    def watch(self, running: Running) -> None:
        """End a run of the bisection whose final loss will be above the margin."""
        rules, job, now = self.search.rules, running.job, running.progress
        arms = {id(log): arm for (stage, arm), log in self.logs.items() if stage == SEARCH}
        arm, step = arms.get(id(job.log)), now.val_step
        if arm in (None, rules.baseline) or (SEARCH, arm) not in self.configs or arm.startswith("dense_") \
                or step is None or not FROM * job.steps <= step < job.steps or now.val_loss is None \
                or self._seen.get(id(running)) == step:
            return
        self._seen[id(running)] = step
        curves = [log.metrics[i] for (stage, _), log in self.logs.items() if stage == SEARCH
                  for i, result in log.results.items() if result["success"] and i in log.metrics]
        baseline = self.results.sample(SEARCH, rules.baseline, self.runs_of(SEARCH, rules.baseline))
        least = predicted_least(pairs_at(step, job.steps, curves), now.val_loss)
        if least is None or len(baseline.logs) < PILOT:
            return
        most = math.exp(baseline.mean + rules.margin)
        if least > most:
            running.end_early(f"at step {step} its val loss is {now.val_loss:.4f}, so its final loss is at "
                              f"least {least:.4f} (99%), above {most:.4f}", least)

    def report(self, decisions: list[dict]) -> str:
        return f"# {self.plan['campaign_name']}\n\n{self.plan['description']}\n\n" + table(
            ["stage", "decision", ""], [[one["stage"], one["decision"], one["text"]] for one in decisions]) \
            + "\n" + self.costs_table()


def check_kept(plan: dict, path: str) -> None:
    """Raise UserError for a plan.json that cannot be the one of a search."""
    plan = {key: value for key, value in plan.items() if key not in ("within", "overrides")}
    check_plan(plan, path)


def proofs_in(decisions: list[dict], arms: Collection[tuple[str, str]], most: int) -> dict[str, int]:
    """Return the runs of each proof that has begun, by arm.

    decisions: rows of decisions.jsonl; arms: (stage, arm) of all experiments; most: most runs of a proof.
    """
    found = {}
    for one in decisions:
        arm, runs = one.get("arm"), one.get("runs")
        if one.get("stage") == PROOF and isinstance(arm, str) and (PROOF, arm) in arms and type(runs) is int:
            found.setdefault(arm, min(max(runs, LEAST_PROOF), most))
    return found


def fraction(text: str) -> float:
    """Parse a margin: '2%' -> 0.02. Raises UserError."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not 0 < value <= 0.5:
        raise UserError(f"--within={shown(text)} is no margin: write percent, as in --within=2%")
    return value


def settings_of(overrides: list[str], plan: dict, path: str) -> dict:
    """Return the settings of --key=value arguments. Raises UserError."""
    config = DEFAULTS | {"script": plan.get("script", OPTIONAL["script"])}
    settings, found = script_settings(config, path) if overrides else {}, {}
    for argument in join_values(overrides, settings):
        if not argument.startswith("--"):
            raise UserError(f"cannot read argument {argument!r}: --key=value goes to the script")
        key, value = parse_argument(argument, settings)
        found[key] = value
    return found


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the arguments for the script. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("--plan", metavar="FILE", required=True)
    parser.add_argument("--within", metavar="PERCENT", required=True, help="margin above the dense model's "
                        "val loss, as in 2%%")
    parser.add_argument("--budget_gpu_hours", type=float, help="default: the plan's")
    parser.add_argument("--placement", choices=list(PLACEMENT), help="positions of the syncs beside the "
                        "boundary, in place of the plan's: by rules, greedy by sensitivity, or both")
    parser.add_argument("--latency", metavar="FILE",
                        help="JSON of bench.py --mode=decode (default: the plan's)")
    parser.add_argument("--log_dir", default="experiment_logs", help="parent of the search's folder")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, if there are GPUs for them")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, its costs and what it can "
                        "decide, and run nothing")
    return parser.parse_known_args()


def main() -> None:
    args, overrides = read_arguments()
    within = fraction(args.within)
    plan = read_json(args.plan)
    check_plan(plan, args.plan)
    search = read_search(args.plan, within, settings_of(overrides, plan, args.plan), args.placement)
    if args.budget_gpu_hours is not None:
        search.plan["budget"] = search.plan["budget"] | {"gpu_hours": args.budget_gpu_hours}
        check_kept(search.plan, "--budget_gpu_hours")
    baseline = search.configs[SEARCH, search.rules.baseline]
    latency = args.latency or search.plan["latency"]
    width = all_settings(baseline).get("n_embd")
    times = read_latencies(latency, width, search.families) if latency else {}
    if args.parallel < 1:
        raise UserError(f"--parallel={args.parallel} must be at least 1")
    slots(baseline, 1)
    if args.dry_run:
        return print(described(search, args.plan), end="")
    check_data(baseline)
    check_can_write(args.log_dir, "--log_dir")
    end_on_signals()
    campaign = SearchCampaign(os.path.join(args.log_dir, search.plan["campaign_name"]), search,
                              sorted(overrides), args.parallel)
    try:
        outcome = run_campaign(search.rules, campaign.results, campaign.budget, campaign.costs, None,
                               campaign.do, campaign.tell, decide)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes the search", flush=True)
        raise
    write(campaign.path("outcome.json"), json_text(outcome | {"gpu_seconds_spent": campaign.budget.spent,
                                                              "gpu_seconds_budget": campaign.budget.total}))
    print(write_frontier(campaign.folder, search.rules, outcome, times))
    spent, total = map(campaign.money, (campaign.budget.spent, campaign.budget.total))
    print(f"{spent} of {total} spent; {campaign.path('frontier.md')}, {campaign.path('report.md')}")


def described(search: Search, path: str) -> str:
    """Return the plan, its costs and what it can decide, as Markdown."""
    rules, plan = search.rules, search.plan
    config = search.configs[SEARCH, rules.baseline]
    arms = [[arm, str(len(points)), ", ".join(map(str, points))] for arm, points in search.points.items()]
    arms += [[f"{GREEDY}_{n}", str(n), "by sensitivity"] for name, n in rules.placements if name == GREEDY]
    arms += [[arm, str(syncs), f"--sync_strategy={search.families[arm]}"] for arm, syncs in rules.families]
    arms += [[f"dense_{k}layers", str(2 * k), "all"] for k in rules.control_layers]
    hours, cap = plan["budget"]["gpu_hours"], plan["budget"]["gpu_hours_per_run"]
    proof, most = 2 * rules.looks[-1], len(rules.families) * rules.looks[-1]
    text = f"# {plan['campaign_name']}: {path}\n\n" \
           f"{num_iterations(config)} updates a run; pilot: {PILOT} runs of {rules.baseline} and " \
           f"{rules.looks[0]} of the fewest; looks after {', '.join(map(str, rules.looks))} runs; proof: " \
           f"up to {proof} runs.\n\n" \
           f"Budget: {hours:g} GPU-hours; a run may take {cap:g}, and the pilot measures what it takes. " \
           f"At {cap:g} the budget pays for {hours / cap:.0f} runs, the pilot takes " \
           f"{cap * (PILOT + rules.looks[0]):g}.\n\n"
    text += f"Families: up to {most} runs, which take up to {cap * most:g}.\n\n" if most else ""
    if (SENSITIVITY, DROPS) in search.configs:
        n = search_greedy.evaluations(rules.counts[0], rules.counts[-1])
        text += f"Greedy placement: {n} evaluations of a dense model of the pilot, together on about the " \
                f"tokens of a run.\n\n"
    text += table(["arm", "syncs", "after the sublayers"], arms) + "\n"
    text += table(["spread between seeds", f"{rules.looks[-1]} runs decide arms farther from the margin than",
                   f"an arm as good as the dense model is within {rules.within:.1%} after"],
                  [[f"{s:.2%}", f"{least_difference(rules, s, rules.looks[-1]):.2%}",
                    next((f"{m} runs" for m in rules.looks if least_difference(rules, s, m) <= rules.margin),
                         "no number of runs")] for s in SHOWN_SPREADS])
    text += "\nThe first runs:\n\n"
    for i in range(PILOT):
        out_dir = os.path.join("...", f"run_{i}_seed_{config['base_seed'] + i}", "out")
        text += f"    {command_line(command(config, i, out_dir), variables(config))}\n"
    return text


if __name__ == "__main__":
    main()
