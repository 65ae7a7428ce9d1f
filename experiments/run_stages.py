"""Find the best of several variants in three stages, within a budget: screening, validation, proof.

    python experiments/run_stages.py --plan experiments/configs/plan.json [--dry_run] [--parallel 4]
    cd experiments
    python run_stages.py --plan configs/plan.json --until stage_a_screening --dataset=python_source_gpt2

The results so far decide what runs next; campaign.py has the rules. --key=value goes to the script in all
experiments. A run is launched only if the budget has room for the most that it may take: 1.5 times the cost
that a short probe or earlier runs lead to expect, and a minute. At that limit the run is ended, so the budget
is never exceeded. The budget is in GPU-hours; on a CPU a process counts as a GPU. price_per_gpu_hour, if
given, turns GPU-hours into money.

Writes into experiment_logs/<campaign_name>/: decisions.jsonl and report.md (all decisions with numbers),
superseded.jsonl (decisions that a raised budget changed), outcome.json, ledger.jsonl (all reservations and
costs), a folder for each experiment, and a comparison for each stage. After an interruption of any kind the
same command resumes the campaign.
"""

import os
import statistics
import subprocess
import sys

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.campaign import Budget, Costs, Plan, Results, Run, run_campaign
from experiments.campaign_folder import CampaignFolder
from experiments.campaign_plan import (
    HOUR,
    check_cap,
    check_plan,
    parts_that_stay,
    read_configs,
    read_plan,
    stages_until,
    target_of,
    tokens_of,
)
from experiments.experiment_config import (
    SHORT_STAGES,
    STAGES,
    all_settings,
    check_data,
    command,
    command_line,
    finite,
    num_iterations,
    stage_name,
    variables,
)
from experiments.report import table, write
from experiments.runner import (
    Job,
    end_on_signals,
    run_jobs,
    slots,
)
from nanosync.errors import UserError, shown
from nanosync.files import (
    check_can_write,
    json_text,
)
from nanosync.run_log import RunLog


class Campaign(CampaignFolder):
    """A staged campaign. Does the runs that campaign.py decides on."""

    def __init__(self, folder: str, plan: dict, overrides: list[str], configs: dict, parallel: int):
        super().__init__(folder, parallel, plan["budget"].get("price_per_gpu_hour"))
        self.plan, self.configs = plan, configs
        self.keep_plan(plan | {"overrides": overrides}, check_plan, parts_that_stay)
        hours = plan["budget"]
        self.budget = Budget(HOUR * hours["gpu_hours"], HOUR * hours["gpu_hours_per_run"])
        self.costs, self.results, self.logs = Costs(self._tokens), Results(), {}
        self.reopen()

    def runs_of(self, stage: str, arm: str) -> int:
        return next(s["n_runs"] for s in self.plan["stages"] if s["stage"] == stage)

    def take(self, run: Run, result: dict) -> None:
        self.results.losses[run] = result["final_val_loss"] if result["success"] else None

    def _tokens(self, stage: str) -> float:
        """Return the tokens that a run of the stage trains on, see tokens_of."""
        return tokens_of(self.configs[stage, self.plan["baseline"]])

    def probe(self, stage: str) -> bool:
        """Train a few steps of the baseline to learn the cost of a run. Return False if the budget does not
        pay for that. Raises UserError if the probe fails."""
        run = Run(stage, self.plan["baseline"], 0)
        log = self.log_of(stage, run.variant)
        settings = all_settings(log.config)
        steps = min(self.plan["probe_steps"], num_iterations(log.config))
        shorter = {"num_iterations": steps, "val_loss_every": steps, "warmdown_iters": 0, "warmup_iters": 0,
                   "log_interval": 1}  # each step is logged with its time
        changed = {key: value for key, value in shorter.items() if key in settings}
        job = Job(log, 0, changed=changed, recorded=False)
        if not self.start(job, run, HOUR * self.plan["budget"]["probe_gpu_hours"]):
            return False
        found = []
        log.line(f"{stage}: a probe of {steps} steps")
        run_jobs([job], self.places(stage)[:1], ended=lambda job, result: found.append(result))
        result = found[0]
        if not result["success"]:
            self.settle(job, run, result, None)
            raise UserError(f"the probe of {stage} failed, so its runs would: {result['error']} (see "
                            f"{job.folder}/stdout.log)")
        try:
            expected = result["wall_seconds"] + extrapolated(
                RunLog.read(os.path.join(job.folder, "out")).events, steps, num_iterations(log.config),
                settings.get("val_loss_every", 0))
        except UserError:
            self.settle(job, run, result, None)
            raise
        self.settle(job, run, result, expected * log.config["n_gpus"])
        log.line(f"{stage}: a run of {log.config['experiment_name']} should take {expected:.0f} s on "
                 f"{log.config['n_gpus']} GPU(s)")
        return True

    def places(self, stage: str) -> list[str | None]:
        return self.places_of(self.configs[stage, self.plan["baseline"]])

    def report(self, decisions: list[dict]) -> str:
        """Return the decisions and costs as Markdown."""
        return f"# {self.plan['campaign_name']}\n\n{self.plan.get('description', '')}\n\n" + table(
            ["stage", "decision", ""], [[one["stage"], one["decision"], one["text"]] for one in decisions]) \
            + "\n" + self.costs_table()

    def compare(self) -> None:
        """Write a comparison beside the report for each stage with results of the baseline and a variant."""
        here = os.path.dirname(os.path.abspath(__file__))
        for stage in STAGES:
            arms = [arm for arm in (self.plan["baseline"], *self.plan["variants"])
                    if self.results.good(stage, arm)]
            if len(arms) > 1 and arms[0] == self.plan["baseline"]:
                folders = [self.logs[stage, arm].folder for arm in arms]
                script = os.path.join(here, "compare_experiments.py")
                stem = f"{self.path(stage)}_comparison"
                done = subprocess.run([sys.executable, script, *folders, f"--out={stem}"],
                                      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                print(f"warning: no {stem}.md: {done.stderr.strip()}" if done.returncode else
                      f"written: {stem}.md", flush=True)


def extrapolated(events: list[dict], steps: int, all_steps: int, val_loss_every: int) -> float:
    """Estimate the seconds of a run beyond those of its probe, from the median step and the last evaluation.

    events: the probe's log; steps: of the probe. Raises UserError if the log lacks these times.
    """
    times = [event["seconds"] for event in events if event["event"] == "iter" and event["seconds"]]
    last = max((i for i, event in enumerate(events) if event["event"] == "eval"), default=0)
    stamps = [event.get("time") for event in events[last - 1:last + 1]] if last else []
    if not times or len([stamp for stamp in stamps if finite(stamp) is not None]) < 2:
        raise UserError("a probe's log has no times of its steps and its last evaluation, so the cost of "
                        "runs is unknown: let the script write them as train_gpt.py does, or raise "
                        "probe_steps")
    step = statistics.median(times[len(times) // 2:])
    evaluation = max(stamps[1] - stamps[0], 0.0)
    evaluations = (all_steps // val_loss_every if val_loss_every else 1) - 1
    return (all_steps - steps) * step + max(evaluations, 0) * evaluation


def dry_run(plan: dict, stages: list[dict], configs: dict) -> None:
    """Print the commands of all runs of the first stage, and of those that later stages may do."""
    for stage in stages:
        whose = "each" if stage is plan["stages"][0] else "the baseline and of those that get there"
        print(f"# {stage['stage']}: {stage['n_runs']} runs of {whose}")
        for arm in (plan["baseline"], *plan["variants"]):
            for run_id in range(stage["n_runs"]):
                config = configs[stage["stage"], arm]
                out_dir = os.path.join("...", f"run_{run_id}_seed_{config['base_seed'] + run_id}", "out")
                print(command_line(command(config, run_id, out_dir), variables(config)))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--plan", metavar="FILE", required=True)
    parser.add_argument("--log_dir", default="experiment_logs", help="parent of the campaign's folder")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, if there are GPUs for them")
    parser.add_argument("--until", metavar="STAGE", help=f"the stage to stop after: {', '.join(STAGES)}")
    parser.add_argument("--dry_run", action="store_true", help="check, print the commands, and run nothing")
    args, overrides = parser.parse_known_args()
    args.until = args.until and stage_name(args.until)
    if args.until not in (None, *STAGES):
        raise UserError(f"--until={shown(args.until)} is no stage: use {', '.join([*STAGES, *SHORT_STAGES])}")
    plan = read_plan(args.plan)
    configs = read_configs(plan, args.plan, overrides)
    stages, target = stages_until(plan, args.until), target_of(plan, configs)
    check_cap(plan, stages, configs, args.plan)
    for stage in stages:
        slots(configs[stage["stage"], plan["baseline"]], 1)
    if args.parallel < 1:
        raise UserError(f"--parallel={args.parallel} must be at least 1")
    if args.dry_run:
        return dry_run(plan, stages, configs)
    for stage in stages:
        for arm in (plan["baseline"], *plan["variants"]):
            check_data(configs[stage["stage"], arm])
    check_can_write(args.log_dir, "--log_dir")
    end_on_signals()
    folder = os.path.join(args.log_dir, plan["campaign_name"])
    campaign = Campaign(folder, plan, sorted(overrides), configs, args.parallel)
    if target is None:
        print("no target: none is given for this data set", flush=True)
    try:
        outcome = run_campaign(
            Plan(plan["baseline"], tuple(plan["variants"]), {s["stage"]: s["n_runs"] for s in plan["stages"]},
                 target, plan["most_advanced"], plan["most_proved"], args.until),
            campaign.results, campaign.budget, campaign.costs, campaign.probe, campaign.do, campaign.tell)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes the campaign", flush=True)
        raise
    write(campaign.path("outcome.json"), json_text(outcome | {"gpu_seconds_spent": campaign.budget.spent,
                                                              "gpu_seconds_budget": campaign.budget.total}))
    campaign.compare()
    best = f"best: {outcome['best']}, by {outcome['stage']}" if outcome["best"] else "nothing is known yet"
    spent, total = map(campaign.money, (campaign.budget.spent, campaign.budget.total))
    print(f"{best}; {spent} of {total} spent; {campaign.path('report.md')}")


if __name__ == "__main__":
    main()
