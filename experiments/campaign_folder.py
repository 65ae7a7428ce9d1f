"""The folder of a campaign: its experiments, its ledger, its decisions. run_stages.py and
find_fewest_syncs.py decide what runs in it.

Before each launch the most that a run may cost is reserved in the ledger, and the run is ended at that limit,
so the budget is never exceeded. What a killed campaign had reserved is settled when it resumes.
"""

import json
import os
import time

from experiments.campaign import Budget, Costs, Results, Run
from experiments.campaign_plan import HOUR, STARTING, with_ends
from experiments.experiment_config import in_range, read_json
from experiments.experiment_logger import MAX_LINES, ExperimentLogger, lines_of, read_lines
from experiments.report import table, write
from experiments.runner import Job, lock, read_report, recover, run_jobs, slots, visible_gpus
from nanosync.errors import UserError, shortened, shown
from nanosync.files import (
    json_text,
    open_regular,
    os_error_as_user_error,
    read_file,
    replace_file,
    unused_path,
)

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


class CampaignFolder:
    """The folder of a campaign, its experiments and its ledger. A subclass sets configs, budget, costs and
    results, calls `reopen`, and has runs_of, take, places and report."""

    configs: dict[tuple[str, str], dict]  # (stage, arm) -> experiment
    budget: Budget
    costs: Costs
    results: Results

    def __init__(self, folder: str, parallel: int, price: float | None):
        """Lock the folder, and make it if it does not exist. price: of a GPU-hour. Raises UserError."""
        self.folder, self.parallel, self.price = folder, parallel, price
        self.logs: dict[tuple[str, str], ExperimentLogger] = {}
        self._told = []
        with os_error_as_user_error(f"cannot make {folder}"):
            os.makedirs(folder, exist_ok=True)
        self.lock = lock(folder)

    def runs_of(self, stage: str, arm: str) -> int:
        """Return the most runs that an arm may have in a stage."""
        raise NotImplementedError

    def take(self, run: Run, result: dict) -> None:
        """Add the result of a run to `results`."""
        raise NotImplementedError

    def places(self, stage: str) -> list[str | None]:
        """Return the GPUs of each parallel run."""
        raise NotImplementedError

    def places_of(self, config: dict) -> list[str | None]:
        """Return the GPUs of --parallel runs of an experiment, or of as many as have GPUs of their own."""
        most = len(visible_gpus()) // config["n_gpus"]
        return slots(config, max(1, min(self.parallel, most or self.parallel)))

    def report(self, decisions: list[dict]) -> str:
        """Return the decisions and costs as Markdown."""
        raise NotImplementedError

    def watch(self, running) -> None:
        """Look at a run that trains; called a few times a second."""

    def path(self, name: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.folder, name)

    def keep_plan(self, plan: dict, check_plan, parts_that_stay) -> None:
        """Write plan.json. Raise UserError if more than the budget differs from the plan that the campaign
        began with.

        check_plan(plan, path): raises UserError; parts_that_stay(plan): what a resumed campaign may not
        change.
        """
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

    def reopen(self) -> None:
        """Read the results, decisions and costs of an interrupted campaign."""
        arms = list(self.configs)
        for stage, arm in arms:  # `take` may add arms
            existing = experiments_in(os.path.join(self.folder, stage, arm))
            if existing:
                descriptor = lock(existing[0])  # before its results are read
                log = ExperimentLogger.reopen(existing[0], len(self.places(stage)))
                check_unchanged(log.folder, log.config, self.configs[stage, arm])
                self._open(stage, arm, log, descriptor)
            arms += [key for key in self.configs if key not in arms]
        self._told = read_lines(self.path("decisions.jsonl"))
        self._read_ledger()

    def _open(self, stage: str, arm: str, log: ExperimentLogger, lock_descriptor: int) -> None:
        """Take an experiment, and its results, into the campaign."""
        n_runs = self.runs_of(stage, arm)
        log.lock = lock_descriptor
        recover(log, n_runs)
        self.logs[stage, arm] = log
        for run_id, result in log.results.items():
            if run_id < n_runs:  # the user may have added runs
                self.take(Run(stage, arm, run_id), result)

    def log_of(self, stage: str, arm: str) -> ExperimentLogger:
        """Return the logger of an experiment; make its folder at first use."""
        if (stage, arm) not in self.logs:
            n_runs = self.runs_of(stage, arm)
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

    def start(self, job: Job, run: Run, cost: float) -> bool:
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

    def settle(self, job: Job, run: Run, result: dict, measured: float | None) -> None:
        """Replace the reservation of a job by its cost. measured: GPU-seconds to expect of similar runs."""
        spent = result["wall_seconds"] * job.log.config["n_gpus"]
        self.budget.settle(job.key, spent)
        self._enter(what="settle", key=job.key, stage=run.stage, variant=run.variant, spent=spent,
                    measured=measured)
        if measured is not None:
            self.costs.add(run.stage, run.variant, measured)

    def job_of(self, run: Run) -> Job:
        """Return the job of a run."""
        return Job(self.log_of(run.stage, run.variant), run.run_id)

    def do(self, batch: list[Run]) -> None:
        """Do these runs as long as the budget pays for the next."""
        runs = {}
        for run in batch:
            job = self.job_of(run)
            runs[id(job)] = job, run

        def may_start(job: Job) -> bool:
            run = runs[id(job)][1]
            return self.start(job, run, self.costs.reserved(run))

        def ended(job: Job, result: dict) -> None:
            run = runs[id(job)][1]
            self.take(run, result)
            self.settle(job, run, result, cost_shown(result))

        run_jobs([job for job, _ in runs.values()], self.places(batch[0].stage), may_start, ended, self.watch)

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
        hours = gpu_seconds / HOUR
        return f"{hours:.3f} GPU-hours" + (f" ({self.price * hours:.2f})" if self.price else "")

    def costs_table(self) -> str:
        """Return what was spent in each stage as a Markdown table."""
        spent = {}
        for entry in read_lines(self.path("ledger.jsonl")):
            if entry["what"] == "settle":
                spent.setdefault(entry["stage"], []).append(entry["spent"])
        rows = [[stage, str(len(costs)), self.money(sum(costs))] for stage, costs in spent.items()]
        rows.append(["in all", str(sum(map(len, spent.values()))), self.money(self.budget.spent)])
        rows.append(["budget", "", self.money(self.budget.total)])
        return table(["stage", "runs and probes", "spent"], rows)


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
