"""Find the best of several variants in three stages, within a budget: screening, validation, proof.

    python experiments/run_stages.py --plan experiments/configs/plan.json [--dry_run] [--parallel 4]
    cd experiments
    python run_stages.py --plan configs/plan.json --until stage_a_screening --dataset=python_source

What is run next is decided by what came out so far (campaign.py says how); --key=value goes to the script in
all experiments. Before each launch the budget must have what the run may take, 1.5 times what a short probe
or earlier runs lead to expect and a minute, and at that the run is ended: the total is never exceeded. The
budget is in GPU-hours, processes being GPUs on a CPU; price_per_gpu_hour, if given, turns them into money.

Written into experiment_logs/<campaign_name>/: decisions.jsonl and report.md (all decisions with their
numbers; superseded.jsonl: those that a raised budget changed), outcome.json, ledger.jsonl (all that was
reserved and spent), a folder for each experiment, and for each stage a comparison. The same command goes on
where it was, however it ended.
"""

import json
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import Parser
from experiments.campaign import Budget, Costs, Plan, Results, Run, run_campaign
from experiments.experiment_config import (
    NUMBER,
    STAGES,
    all_settings,
    check_keys,
    check_name,
    command,
    finite,
    judged_by,
    load_config,
    num_iterations,
    read_json,
    shown,
    variables,
)
from experiments.experiment_logger import ExperimentLogger, differences, lines_of, read_lines
from experiments.report import table, write
from experiments.runner import ENDING, Job, end_on_signals, lock, recover, run_jobs, slots, visible_gpus
from nanosync.errors import UserError
from nanosync.files import check_can_write, json_text, os_error_as_user_error, replace_file, unused_path
from nanosync.run_log import read_log

PLAN = {"campaign_name": (str, True), "description": (str, False), "baseline": (str, True),
        "variants": (list, True), "target_val_loss": ((*NUMBER, type(None)), True), "stages": (list, True),
        "most_advanced": (int, True), "most_proved": (int, True), "probe_steps": (int, True),
        "budget": (dict, True)}
STAGE = {"stage": (str, True), "config": (str, True), "n_runs": (int, True), "n_gpus": (int, False)}
BUDGET = {"gpu_hours": (NUMBER, True), "gpu_hours_per_run": (NUMBER, True), "probe_gpu_hours": (NUMBER, True),
          "price_per_gpu_hour": ((*NUMBER, type(None)), False)}
HOUR = 3600.0
STARTING = 60.0  # seconds that a run may take longer than MARGIN allows, because compiling varies


def read_plan(path: str) -> dict:
    """Checked. Raises UserError."""
    plan = read_json(path)
    check_keys(plan, PLAN, path)
    check_keys(plan["budget"], BUDGET, f"budget of {path}")
    check_name(plan["campaign_name"], "campaign_name", path)
    for stage in plan["stages"]:
        check_keys(stage, STAGE, f"a stage of {path}")
        if stage["n_runs"] < 1:
            raise UserError(f"{path}: n_runs={stage['n_runs']} of {stage['stage']} must be at least 1")
    names = [stage["stage"] for stage in plan["stages"]]
    if names != list(STAGES):
        raise UserError(f"{path}: the stages must be {', '.join(STAGES)}, and are {', '.join(names)}")
    arms = [plan["baseline"], *plan["variants"]]
    if not plan["variants"] or not all(isinstance(arm, str) for arm in arms) or len(set(arms)) < len(arms):
        raise UserError(f"{path}: variants must be names, each once, without {plan['baseline']!r}")
    for key in ("most_advanced", "most_proved", "probe_steps"):
        if plan[key] < 1:
            raise UserError(f"{path}: {key}={plan[key]} must be at least 1")
    for key, value in plan["budget"].items():
        if value is not None and (finite(value) is None or value <= 0):
            raise UserError(f"{path}: budget's {key}={str(value)[:20]} must be finite and above 0")
    target = plan["target_val_loss"]
    if target is not None and (finite(target) is None or target < 0):
        raise UserError(f"{path}: target_val_loss={str(target)[:20]} must be finite and not below 0")
    return plan


def read_configs(plan: dict, path: str, overrides: list[str]) -> dict[tuple[str, str], dict]:
    """The experiment of each stage and arm; those of a stage must be comparable. Raises UserError."""
    configs = {}
    for stage in plan["stages"]:
        told_apart = {}
        for arm in (plan["baseline"], *plan["variants"]):
            file = os.path.join(os.path.dirname(path), stage["config"].replace("{variant}", arm))
            config = configs[stage["stage"], arm] = load_config(file, overrides, stage.get("n_gpus"))
            first = configs[stage["stage"], plan["baseline"]]
            if config["stage"] != stage["stage"]:
                raise UserError(f"{file} is of {config['stage']} and stands in the plan for {stage['stage']}")
            for key in ("stage_config", "n_gpus", "base_seed"):
                if config[key] != first[key]:
                    raise UserError(f"{file} has another {key} than the stage's baseline: they would not be "
                                    f"comparable")
            judged = [judged_by(settings) | {"val_loss_every": settings.get("val_loss_every")}
                      for settings in map(all_settings, (first, config))]
            for key, (ours, its) in differences(*judged).items():
                raise UserError(f"{file} has {key}={its} and the stage's baseline {ours}: they would not be "
                                f"comparable")
            other = told_apart.setdefault((config["script"], repr(sorted(all_settings(config).items()))), arm)
            if other != arm:
                raise UserError(f"{file} has the settings of {other}: there is nothing to compare "
                                f"(--key=value sets a key in all experiments)")
    return configs


def with_ends(cost: float, n_gpus: int) -> float:
    """GPU-seconds to reserve for a cost: with what starting may take longer and ending at the limit takes."""
    return cost + (STARTING + ENDING) * n_gpus


def stages_until(plan: dict, until: str | None) -> list[dict]:
    """The plan's stages, up to that one if one is named."""
    names = [stage["stage"] for stage in plan["stages"]]
    return plan["stages"][:names.index(until) + 1] if until else plan["stages"]


def target_of(plan: dict, configs: dict) -> float | None:
    """The plan's; None where the proof's configuration has none, as when --dataset names another data set."""
    proof = configs[plan["stages"][-1]["stage"], plan["baseline"]]
    return None if proof["target_val_loss"] is None else plan["target_val_loss"]


def check_cap(plan: dict, stages: list[dict], configs: dict, path: str) -> None:
    """Raise UserError if gpu_hours_per_run does not even let probes start."""
    n_gpus = max(configs[stage["stage"], plan["baseline"]]["n_gpus"] for stage in stages)
    budget = plan["budget"]
    needed = with_ends(HOUR * budget["probe_gpu_hours"], n_gpus) / HOUR
    if budget["gpu_hours_per_run"] < needed:
        raise UserError(f"{path}: gpu_hours_per_run={budget['gpu_hours_per_run']} is below the {needed:.3f} "
                        f"that a probe on {n_gpus} GPU(s) may take (probe_gpu_hours and "
                        f"{STARTING + ENDING:.0f} s of each): raise it, or lower probe_gpu_hours")


def check_unchanged(folder: str, before: dict, now: dict) -> None:
    """Raise UserError if an experiment that is gone on with was edited: its runs would not be comparable."""
    now = json.loads(json.dumps(now))  # as config.json gives it back
    for key in sorted(before.keys() | now.keys()):
        if key != "description" and before.get(key) != now.get(key):
            raise UserError(f"{folder} was begun with {key}={json.dumps(before.get(key))} and not "
                            f"{json.dumps(now.get(key))}: put that back, or use another --log_dir or "
                            f"campaign_name")


class Campaign:
    """The folder of a campaign, its experiments and its ledger; does what campaign.py decides."""

    def __init__(self, folder: str, plan: dict, overrides: list[str], configs: dict, parallel: int):
        self.folder, self.plan, self.configs, self.parallel = folder, plan, configs, parallel
        with os_error_as_user_error(f"cannot make {folder}"):
            os.makedirs(folder, exist_ok=True)
        self.lock = lock(folder)
        self._check_plan(plan | {"overrides": overrides})
        hours = plan["budget"]
        self.budget = Budget(HOUR * hours["gpu_hours"], HOUR * hours["gpu_hours_per_run"])
        self.costs, self.results, self.logs = Costs(self._sequences), Results(), {}
        for stage, arm in configs:
            there = experiments_in(os.path.join(folder, stage, arm))
            if there:
                held = lock(there[0])  # before its results are read
                log = ExperimentLogger.reopen(there[0], len(self.places(stage)))
                check_unchanged(log.folder, log.config, configs[stage, arm])
                self._open(stage, arm, log, held)
        self._told = read_lines(self.path("decisions.jsonl"))
        self._read_ledger()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _check_plan(self, plan: dict) -> None:
        """Only the budget may be another than the last time. Raises UserError."""
        path = self.path("plan.json")
        if os.path.exists(path):
            before = read_json(path)
            for key in sorted(plan.keys() | before.keys()):
                if key not in ("budget", "description") and plan.get(key) != before.get(key):
                    raise UserError(f"{self.folder} was begun with {key}={json.dumps(before.get(key))} and "
                                    f"not {json.dumps(plan.get(key))}: only the budget may change; use "
                                    f"another --log_dir or campaign_name")
        write(path, json_text(plan))

    def _sequences(self, stage: str) -> float:
        """That a run trains on, but for a constant."""
        config = self.configs[stage, self.plan["baseline"]]
        return num_iterations(config) * float(all_settings(config).get("batch_size", 1))

    def _open(self, stage: str, arm: str, log: ExperimentLogger, held) -> None:
        n_runs = next(s["n_runs"] for s in self.plan["stages"] if s["stage"] == stage)
        log.lock = held
        recover(log, n_runs)
        self.logs[stage, arm] = log
        for run_id, result in log.results.items():
            if run_id < n_runs:  # others are not the campaign's
                self._take(Run(stage, arm, run_id), result)

    def _take(self, run: Run, result: dict) -> None:
        self.results.losses[run] = result["final_val_loss"] if result["success"] else None

    def log_of(self, stage: str, arm: str) -> ExperimentLogger:
        if (stage, arm) not in self.logs:
            n_runs = next(s["n_runs"] for s in self.plan["stages"] if s["stage"] == stage)
            log = ExperimentLogger.create(self.configs[stage, arm], os.path.join(self.folder, stage, arm),
                                          n_runs, len(self.places(stage)))
            self._open(stage, arm, log, lock(log.folder))
        return self.logs[stage, arm]

    def _enter(self, **entry) -> None:
        """A line of the ledger, on the disk before anything else happens."""
        path = self.path("ledger.jsonl")
        with os_error_as_user_error(f"cannot write {path}"), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"time": time.time(), **entry}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def _read_ledger(self) -> None:
        """What was spent so far. Who reserved and did not come to say what it took is charged what its
        supervisor has written down, or else all that was reserved."""
        open_, path = {}, self.path("ledger.jsonl")
        cut_torn_line(path)
        for entry in read_lines(path):
            if entry["what"] == "reserve":
                open_[entry["key"]] = entry
            else:
                open_.pop(entry["key"], None)
                self.budget.spent += entry["spent"]
                if entry["measured"] is not None:
                    self.costs.add(entry["stage"], entry["variant"], entry["measured"])
        for key, entry in open_.items():
            try:
                seconds = read_json(self.path(os.path.join(entry["folder"], "report.json")))["seconds"]
                spent = min(seconds * entry["n_gpus"], entry["reserved"])
            except (UserError, KeyError, TypeError):
                spent = entry["reserved"]
            self.budget.spent += spent
            self._enter(what="settle", key=key, stage=entry["stage"], variant=entry["variant"], spent=spent,
                        measured=None)

    def _start(self, job: Job, run: Run, cost: float) -> bool:
        """Reserve for a job, with what starting it may take longer and ending it at its limit takes; False if
        the budget has not that much."""
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
        """A few steps of the baseline, to know what a run costs. Raises UserError if they fail."""
        run = Run(stage, self.plan["baseline"], 0)
        log = self.log_of(stage, run.variant)
        settings = all_settings(log.config)
        steps = min(self.plan["probe_steps"], num_iterations(log.config))
        shorter = {"num_iterations": steps, "val_loss_every": steps, "warmdown_iters": 0, "warmup_iters": 0,
                   "log_interval": 1}  # of which the time of a step is known
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
                read_log(os.path.join(job.folder, "out")), steps, num_iterations(log.config),
                settings.get("val_loss_every", 0))
        except UserError:
            self._settle(job, run, result, None)
            raise
        self._settle(job, run, result, expected * log.config["n_gpus"])
        log.line(f"{stage}: a run of {log.config['experiment_name']} should take {expected:.0f} s on "
                 f"{log.config['n_gpus']} GPU(s)")
        return True

    def do(self, batch: list[Run]) -> None:
        """Run these as far as the budget pays for them."""
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
        """As many runs at a time as were asked for and have GPUs of their own."""
        config = self.configs[stage, self.plan["baseline"]]
        most = len(visible_gpus()) // config["n_gpus"]
        return slots(config, max(1, min(self.parallel, most or self.parallel)))

    def tell(self, decisions: list[dict]) -> None:
        """Say and write what was decided. What was decided before and is not any more, as when the budget was
        raised, is kept in superseded.jsonl."""
        now = json.loads(json.dumps(decisions))  # as decisions.jsonl gives it back
        same = next((i for i, pair in enumerate(zip(self._told, now)) if pair[0] != pair[1]),
                    min(len(self._told), len(now)))
        if len(now) == same < len(self._told):
            return  # on the way to where it was, or to other decisions
        if self._told[same:]:
            path = self.path("superseded.jsonl")
            with os_error_as_user_error(f"cannot write {path}"), open(path, "a", encoding="utf-8") as f:
                f.write(lines_of({"until": time.time(), **one} for one in self._told[same:]))
        for one in now[same:]:
            print(f"{one['stage']}: {one['decision']}: {one['text']}", flush=True)
        self._told = now
        replace_file(self.path("decisions.jsonl"), lines_of(decisions).encode())
        write(self.path("report.md"), self.report(decisions))

    def money(self, gpu_seconds: float) -> str:
        price = self.plan["budget"].get("price_per_gpu_hour")
        hours = gpu_seconds / HOUR
        return f"{hours:.3f} GPU-hours" + (f" ({price * hours:.2f})" if price else "")

    def report(self, decisions: list[dict]) -> str:
        """As Markdown."""
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
        """A comparison of each stage that has one, beside the report."""
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
    """The folders of experiments there; others may lie beside them."""
    names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    folders = [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return [folder for folder in folders if os.path.isfile(os.path.join(folder, "config.json"))]


def cut_torn_line(path: str) -> None:
    """Take from a file that one appends to what was not written to its end. Raises UserError."""
    if os.path.exists(path):
        with os_error_as_user_error(f"cannot write {path}"), open(path, "r+b") as f:
            f.truncate(f.read().rfind(b"\n") + 1)


def cost_shown(result: dict) -> float | None:
    """GPU-seconds that a run says of others like it; None if it failed by itself, however early that was."""
    whole = result["success"] or result.get("ended_by") == "limit"
    return result["wall_seconds"] * result["gpus"] if whole else None


def extrapolated(events: list[dict], steps: int, all_steps: int, val_loss_every: int) -> float:
    """Seconds that a run takes beyond its probe: by the median step, and by the last evaluation. Raises
    UserError if the probe does not say how long those took."""
    times = [event["seconds"] for event in events if event["event"] == "iter" and event["seconds"]]
    last = max((i for i, event in enumerate(events) if event["event"] == "eval"), default=0)
    stamps = [event.get("time") for event in events[last - 1:last + 1]] if last else []
    if not times or len([stamp for stamp in stamps if finite(stamp) is not None]) < 2:
        raise UserError("a probe's log has no times of its steps and its last evaluation, so what runs cost "
                        "is not known: let the script write them as train_gpt.py does, or raise probe_steps")
    step = statistics.median(times[len(times) // 2:])
    evaluation = max(stamps[1] - stamps[0], 0.0)
    evaluations = (all_steps // val_loss_every if val_loss_every else 1) - 1
    return (all_steps - steps) * step + max(evaluations, 0) * evaluation


def dry_run(plan: dict, stages: list[dict], configs: dict) -> None:
    """What would be run: all of the first stage, and of the others what may be."""
    for stage in stages:
        whose = "each" if stage is plan["stages"][0] else "the baseline and of those that get there"
        print(f"# {stage['stage']}: {stage['n_runs']} runs of {whose}")
        for arm in (plan["baseline"], *plan["variants"]):
            for run_id in range(stage["n_runs"]):
                config = configs[stage["stage"], arm]
                out_dir = os.path.join("...", f"run_{run_id}_seed_{config['base_seed'] + run_id}", "out")
                print(shown(command(config, run_id, out_dir), variables(config)))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--plan", metavar="FILE", required=True)
    parser.add_argument("--log_dir", default="experiment_logs", help="where its folder is, or is made")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, as far as there are GPUs")
    parser.add_argument("--until", choices=list(STAGES), help="the stage to stop after")
    parser.add_argument("--dry_run", action="store_true", help="check, print the commands, and run nothing")
    args, overrides = parser.parse_known_args()
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
        print("interrupted: the same command goes on", flush=True)
        raise
    write(campaign.path("outcome.json"), json_text(outcome | {"gpu_seconds_spent": campaign.budget.spent,
                                                              "gpu_seconds_budget": campaign.budget.total}))
    campaign.compare()
    best = f"best: {outcome['best']}, by {outcome['stage']}" if outcome["best"] else "nothing is known yet"
    spent, total = map(campaign.money, (campaign.budget.spent, campaign.budget.total))
    print(f"{best}; {spent} of {total} spent; {campaign.path('report.md')}")


if __name__ == "__main__":
    main()
