"""Find the best of several variants in three stages, within a budget: screening, validation, proof.

    python experiments/run_stages.py --plan experiments/configs/plan.json [--dry_run] [--parallel 4]
    cd experiments
    python run_stages.py --plan configs/plan.json --until stage_a_screening --dataset=python_source

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

import json
import os
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.campaign import Budget, Costs, Plan, Results, Run, run_campaign
from experiments.campaign_plan import (
    HOUR,
    STARTING,
    check_cap,
    check_plan,
    parts_that_stay,
    read_configs,
    read_plan,
    stages_until,
    target_of,
    tokens_of,
    with_ends,
)
from experiments.experiment_config import (
    SHORT_STAGES,
    STAGES,
    all_settings,
    check_data,
    command,
    command_line,
    finite,
    in_range,
    num_iterations,
    read_json,
    stage_name,
    variables,
)
from experiments.experiment_logger import MAX_LINES, ExperimentLogger, lines_of, read_lines
from experiments.report import table, write
from experiments.runner import (
    Job,
    end_on_signals,
    lock,
    read_report,
    recover,
    run_jobs,
    slots,
    visible_gpus,
)
from nanosync.errors import UserError, shortened, shown
from nanosync.files import (
    check_can_write,
    json_text,
    open_regular,
    os_error_as_user_error,
    read_file,
    replace_file,
    unused_path,
)
from nanosync.run_log import RunLog

LABELS = ("experiment_name", "description", "modification_type", "modification_details")  # for readers


def check_unchanged(folder: str, before: dict, now: dict) -> None:
    """Raise UserError if a resumed experiment was edited: its runs would not be comparable."""
    now = json.loads(json.dumps(now))  # as it would be read from config.json
    for key in sorted(before.keys() | now.keys()):
        if key not in LABELS and before.get(key) != now.get(key):
            raise UserError(f"{folder} was begun with {key}={_json(before.get(key))} and not "
                            f"{_json(now.get(key))}: put that back, or use another --log_dir or "
                            f"campaign_name")


def _json(value) -> str:
    """Return a value as JSON, shortened for an error message."""
    return shortened(json.dumps(value), 300)


class Campaign:
    """The folder of a campaign, its experiments and its ledger. Does the runs that campaign.py decides on."""

    def __init__(self, folder: str, plan: dict, overrides: list[str], configs: dict, parallel: int):
        self.folder, self.plan, self.configs, self.parallel = folder, plan, configs, parallel
        with os_error_as_user_error(f"cannot make {folder}"):
            os.makedirs(folder, exist_ok=True)
        self.lock = lock(folder)
        self._check_plan(plan | {"overrides": overrides})
        hours = plan["budget"]
        self.budget = Budget(HOUR * hours["gpu_hours"], HOUR * hours["gpu_hours_per_run"])
        self.costs, self.results, self.logs = Costs(self._tokens), Results(), {}
        for stage, arm in configs:
            existing = experiments_in(os.path.join(folder, stage, arm))
            if existing:
                descriptor = lock(existing[0])  # before its results are read
                log = ExperimentLogger.reopen(existing[0], len(self.places(stage)))
                check_unchanged(log.folder, log.config, configs[stage, arm])
                self._open(stage, arm, log, descriptor)
        self._told = read_lines(self.path("decisions.jsonl"))
        self._read_ledger()

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.folder, name)

    def _check_plan(self, plan: dict) -> None:
        """Raise UserError if more than the budget differs from the plan that the campaign began with."""
        path = self.path("plan.json")
        if os.path.exists(path):
            before = read_json(path)
            overrides = before.pop("overrides", []) if isinstance(before, dict) else []
            check_plan(before, path)
            before, now = parts_that_stay(before | {"overrides": overrides}), parts_that_stay(plan)
            for key in sorted(now.keys() | before.keys()):
                if now.get(key) != before.get(key):
                    raise UserError(f"{self.folder} was begun with {key}={_json(before.get(key))} and not "
                                    f"{_json(now.get(key))}: only the budget may change; use another "
                                    f"--log_dir or campaign_name")
        write(path, json_text(plan))

    def _tokens(self, stage: str) -> float:
        """Return the tokens that a run of the stage trains on, see tokens_of."""
        return tokens_of(self.configs[stage, self.plan["baseline"]])

    def _open(self, stage: str, arm: str, log: ExperimentLogger, lock_descriptor: int) -> None:
        """Take an experiment, and its results, into the campaign."""
        n_runs = next(s["n_runs"] for s in self.plan["stages"] if s["stage"] == stage)
        log.lock = lock_descriptor
        recover(log, n_runs)
        self.logs[stage, arm] = log
        for run_id, result in log.results.items():
            if run_id < n_runs:  # the user may have added runs
                self._take(Run(stage, arm, run_id), result)

    def _take(self, run: Run, result: dict) -> None:
        self.results.losses[run] = result["final_val_loss"] if result["success"] else None

    def log_of(self, stage: str, arm: str) -> ExperimentLogger:
        """Return the logger of an experiment; make its folder at first use."""
        if (stage, arm) not in self.logs:
            n_runs = next(s["n_runs"] for s in self.plan["stages"] if s["stage"] == stage)
            log = ExperimentLogger.create(self.configs[stage, arm], os.path.join(self.folder, stage, arm),
                                          n_runs, len(self.places(stage)))
            self._open(stage, arm, log, lock(log.folder))
        return self.logs[stage, arm]

    def _enter(self, **entry) -> None:
        """Append a line to the ledger, and flush it to the disk before anything else happens."""
        path = self.path("ledger.jsonl")
        with os_error_as_user_error(f"cannot write {path}"), \
                open_regular(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"time": time.time(), **entry}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def _read_ledger(self) -> None:
        """Add up what was spent so far. A reservation that was never settled costs what the run's supervisor
        reported, without a report all that was reserved."""
        unsettled, path = {}, self.path("ledger.jsonl")
        cut_torn_line(path)
        for entry in read_lines(path):
            check_entry(entry, path)
            if entry["what"] == "reserve":
                unsettled[entry["key"]] = entry
            else:
                unsettled.pop(entry["key"], None)
                self.budget.spent += entry["spent"]
                if entry["measured"] is not None:
                    self.costs.add(entry["stage"], entry["variant"], entry["measured"])
        for key, entry in unsettled.items():
            report = read_report(self.path(entry["folder"]))
            spent = entry["reserved"]
            if report is not None:
                spent = min(report["seconds"] * entry["n_gpus"], spent)
            self.budget.spent += spent
            self._enter(what="settle", key=key, stage=entry["stage"], variant=entry["variant"], spent=spent,
                        measured=None)

    def _start(self, job: Job, run: Run, cost: float) -> bool:
        """Reserve GPU-seconds for a job: its cost, a slow start, and the ending at its limit. Return False if
        the budget has less."""
        n_gpus = job.log.config["n_gpus"]
        job.key = f"{run.stage}/{run.variant}/{run.run_id}/{time.time():.3f}"
        job.limit = cost / n_gpus + STARTING
        reserved = with_ends(cost, n_gpus)
        if not self.budget.reserve(job.key, reserved):
            return False
        job.folder = job.log.run_folder(run.run_id) if job.recorded else unused_path(job.log.path("probe"))
        self._enter(what="reserve", key=job.key, stage=run.stage, variant=run.variant, reserved=reserved,
                    n_gpus=n_gpus, folder=os.path.relpath(job.folder, self.folder))
        return True

    def _settle(self, job: Job, run: Run, result: dict, measured: float | None) -> None:
        spent = result["wall_seconds"] * job.log.config["n_gpus"]
        self.budget.settle(job.key, spent)
        self._enter(what="settle", key=job.key, stage=run.stage, variant=run.variant, spent=spent,
                    measured=measured)
        if measured is not None:
            self.costs.add(run.stage, run.variant, measured)

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
        if not self._start(job, run, HOUR * self.plan["budget"]["probe_gpu_hours"]):
            return False
        found = []
        log.line(f"{stage}: a probe of {steps} steps")
        run_jobs([job], self.places(stage)[:1], ended=lambda job, result: found.append(result))
        result = found[0]
        if not result["success"]:
            self._settle(job, run, result, None)
            raise UserError(f"the probe of {stage} failed, so its runs would: {result['error']} (see "
                            f"{job.folder}/stdout.log)")
        try:
            expected = result["wall_seconds"] + extrapolated(
                RunLog.read(os.path.join(job.folder, "out")).events, steps, num_iterations(log.config),
                settings.get("val_loss_every", 0))
        except UserError:
            self._settle(job, run, result, None)
            raise
        self._settle(job, run, result, expected * log.config["n_gpus"])
        log.line(f"{stage}: a run of {log.config['experiment_name']} should take {expected:.0f} s on "
                 f"{log.config['n_gpus']} GPU(s)")
        return True

    def do(self, batch: list[Run]) -> None:
        """Do these runs as long as the budget pays for the next."""
        runs = {}
        for run in batch:
            job = Job(self.log_of(run.stage, run.variant), run.run_id)
            runs[id(job)] = job, run

        def may_start(job: Job) -> bool:
            run = runs[id(job)][1]
            return self._start(job, run, self.costs.reserved(run))

        def ended(job: Job, result: dict) -> None:
            run = runs[id(job)][1]
            self._take(run, result)
            self._settle(job, run, result, cost_shown(result))

        run_jobs([job for job, _ in runs.values()], self.places(batch[0].stage), may_start, ended)

    def places(self, stage: str) -> list[str | None]:
        """Return the GPUs of each parallel run: --parallel runs, or as many as have GPUs of their own."""
        config = self.configs[stage, self.plan["baseline"]]
        most = len(visible_gpus()) // config["n_gpus"]
        return slots(config, max(1, min(self.parallel, most or self.parallel)))

    def tell(self, decisions: list[dict]) -> None:
        """Print and write new decisions. Earlier decisions that are no longer valid, as when the budget was
        raised, move to superseded.jsonl."""
        now = json.loads(json.dumps(decisions))  # as they would be read from decisions.jsonl
        same = next((i for i, pair in enumerate(zip(self._told, now)) if pair[0] != pair[1]),
                    min(len(self._told), len(now)))
        if len(now) == same < len(self._told):
            return  # the earlier decisions are being repeated, so far without a change
        if self._told[same:]:
            path = self.path("superseded.jsonl")
            with os_error_as_user_error(f"cannot write {path}"), \
                    open_regular(path, "a", encoding="utf-8") as f:
                f.write(lines_of({"until": time.time(), **one} for one in self._told[same:]))
        for one in now[same:]:
            print(f"{one['stage']}: {one['decision']}: {one['text']}", flush=True)
        self._told = now
        replace_file(self.path("decisions.jsonl"), lines_of(decisions).encode())
        write(self.path("report.md"), self.report(decisions))

    def money(self, gpu_seconds: float) -> str:
        """Format GPU-seconds as GPU-hours, with their price if the plan has one."""
        price = self.plan["budget"].get("price_per_gpu_hour")
        hours = gpu_seconds / HOUR
        return f"{hours:.3f} GPU-hours" + (f" ({price * hours:.2f})" if price else "")

    def report(self, decisions: list[dict]) -> str:
        """Return the decisions and costs as Markdown."""
        spent = {}
        for entry in read_lines(self.path("ledger.jsonl")):
            if entry["what"] == "settle":
                spent.setdefault(entry["stage"], []).append(entry["spent"])
        rows = [[stage, str(len(costs)), self.money(sum(costs))] for stage, costs in spent.items()]
        rows.append(["in all", str(sum(map(len, spent.values()))), self.money(self.budget.spent)])
        rows.append(["budget", "", self.money(self.budget.total)])
        return f"# {self.plan['campaign_name']}\n\n{self.plan.get('description', '')}\n\n" + table(
            ["stage", "decision", ""], [[one["stage"], one["decision"], one["text"]] for one in decisions]) \
            + "\n" + table(["stage", "runs and probes", "spent"], rows)

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


def experiments_in(parent: str) -> list[str]:
    """Return the folders in `parent` that are experiments."""
    names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    folders = [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return [folder for folder in folders if os.path.isfile(os.path.join(folder, "config.json"))]


def cut_torn_line(path: str) -> None:
    """Remove an incomplete last line from a file that is appended to. Raises UserError."""
    if os.path.exists(path):
        with os_error_as_user_error(f"cannot write {path}"), open_regular(path, "r+b") as f:
            f.truncate(read_file(path, MAX_LINES).rfind(b"\n") + 1)


def check_entry(entry: dict, path: str) -> None:
    """Raise UserError for an entry of the ledger that lacks a field, or has one of another type or range."""
    of = {"reserve": ("reserved", "n_gpus"), "settle": ("spent", "measured")}.get(str(entry.get("what")))
    names = ("key", "stage", "variant", *(("folder",) if entry.get("what") == "reserve" else ()))
    if of is None or not all(isinstance(entry.get(name), str) for name in names) or not all(
            name in entry and (in_range(entry[name]) or (name == "measured" and entry[name] is None))
            for name in of):
        raise UserError(f"{path} has an entry that is no reservation and no cost: {shown(entry)}")


def cost_shown(result: dict) -> float | None:
    """Return the GPU-seconds to expect of similar runs; None if this run failed by itself, perhaps early."""
    whole = result["success"] or result.get("ended_by") == "limit"
    return result["wall_seconds"] * result["gpus"] if whole else None


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
