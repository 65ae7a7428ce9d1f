"""Do the missing runs of a protocol, seed by seed, in the minutes that there are.

A run starts only if it fits by the shorter of two estimates. The first is the longest run of its arm so far,
on the same GPU and with as many runs at a time. Without a run of the arm it is the longest of all arms,
without any run the protocol's seconds_per_run. The second adds up the work that is left of all runs that
train on the GPU with the most of it, and of the new one. A run that takes longer is ended when the minutes
end. Nothing starts after a run that does not fit, so the runs stay balanced.

Of the runs that share a GPU at most half are before their first step (STARTING_SHARE). Otherwise all would
compile at the same time, while the GPU waits, and then train at the same time. All runs share a folder of
compiled code.
"""

import json
import math
import os
import time

import numpy as np

from experiments.experiment_config import arguments_of, in_range
from experiments.experiment_logger import ExperimentLogger
from experiments.frontier_protocol import Protocol
from experiments.frontier_runs import FINISHED, NON_FINITE, append_runs
from experiments.runner import ENDING, Job, Running, gpu_info, read_status, run_jobs, visible_gpus
from nanosync.errors import UserError
from nanosync.run_log import RunLog

MARGIN = 1.1  # a run may take this multiple of its estimate
SPIKE = 5  # see spikes_of
STARTING_SHARE = 2  # of so many runs on a GPU one may be before its first step
CPU = "cpu"


class ArmLog(ExperimentLogger):
    """The folder of an arm's runs. Their results go into runs.jsonl."""

    def __init__(self, folder: str, config: dict, lock: int, record):
        """record(job's run_id, result): takes a result."""
        self.folder, self.config, self.lock, self.say = folder, config, lock, print
        self._record = record

    def record(self, result: dict, metrics: list[dict]) -> None:
        self._record(result)


class Session:
    """A call of `next`."""

    def __init__(self, protocol: Protocol, runs: dict, runs_path: str, folder: str, data: str, seconds: float,
                 estimate: float | None = None, commit: str | None = None, first: int | None = None):
        """runs: as read_runs returns them; folder: for the output of runs; data: digest of the data here;
        seconds: until which the call ends; estimate: in place of seconds_per_run; commit: of the code, if git
        does not know it; first: number of the protocol's runs to do, None for all."""
        self.protocol, self.runs, self.runs_path, self.folder = protocol, runs, runs_path, folder
        self.data, self.commit, self.asked = data, commit, protocol.runs[:first]
        self.estimate = estimate or protocol.values["seconds_per_run"]
        self.until = time.monotonic() + seconds - ENDING
        self.card = next((gpu["name"] for gpu in gpu_info()["gpus"]), CPU)
        self.first_unfit, self.done, self.failed = None, 0, []
        self.seen: list[Running] = []  # runs of this call

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The runs to do without a line, in the protocol's order."""
        return [key for key in self.asked if key not in self.runs]

    def expected(self, arm: str, parallel: int) -> float:
        """Return the seconds that a run of an arm should take. parallel: runs at a time on its GPU."""
        walls = {}
        for run in self.runs.values():
            if (run["card"], run["parallel"]) == (self.card, parallel):
                walls.setdefault(run["arm"], []).append(run["seconds"]["wall"])
        if not walls:
            return self.estimate
        return max(walls.get(arm) or [wall for of_arm in walls.values() for wall in of_arm])

    def may_start(self, job: Job, parallel: int) -> bool:
        """Return True if a run fits into the time that is left, which then is its limit."""
        arm, left = job.log.config["experiment_name"], self.until - time.monotonic()
        needed = MARGIN * min(self.expected(arm, parallel), self.until_all_end())
        if self.first_unfit is None and needed > left:
            self.first_unfit = f"{arm} with seed {job.run_id} needs {needed:.0f} s, and " \
                               f"{max(left, 0):.0f} s are left"
        job.limit = max(left, 1.0)
        return self.first_unfit is None and not self.hopeless

    def watch(self, run: Running) -> None:
        """Remember a run of this call."""
        if run not in self.seen:
            self.seen.append(run)

    def until_all_end(self) -> float:
        """Return the seconds in which all runs and a further one should end; infinite until each GPU has done
        a run's worth of work here.

        A GPU does so much work a second, shared in whatever way. The new run is counted on the GPU with the
        most work. It ends when that is done, but not before it would end alone.
        """
        trained = [run for run in self.seen if run.progress.first is not None]
        shares = [min(run.progress.step / run.job.steps, 1.0) for run in trained]
        n_gpus = len({run.gpus for run in self.seen})
        if not trained or sum(shares) < n_gpus:
            return math.inf
        per_run = n_gpus * (time.monotonic() - min(run.progress.first[0] for run in trained)) / sum(shares)
        start = max(run.progress.first[0] - run.started for run in trained)
        left = dict.fromkeys([run.gpus for run in self.seen], 0.0)  # GPU -> runs
        for run in self.seen:
            if run.supervisor.poll() is None:
                left[run.gpus] += 1 - min(run.progress.step / run.job.steps, 1.0)
        return max(start + per_run, per_run * (max(left.values()) + 1))

    @property
    def hopeless(self) -> bool:
        """True if runs failed before their first step and no run has trained: the others would fail as well.

        Runs of earlier calls on the same GPU count. A broken arm must not end those that work, so more runs
        must have failed than can still reach their first step.
        """
        trained = self.done or any(run.progress.first is not None for run in self.seen) \
            or any(run["card"] == self.card for run in self.runs.values())
        starting = sum(run.supervisor.poll() is None for run in self.seen)
        return not trained and len(self.failed) > 1 + starting and all(step == 0 for _, step in self.failed)

    def go(self, lock: int, places: list[str | None], per_place: int) -> None:
        """Do the missing runs that fit. places: GPUs of the runs at a time; per_place: runs on one GPU."""
        logs = {arm: ArmLog(os.path.join(self.folder, arm), config, lock,
                            lambda result, arm=arm: self._take(arm, result, per_place))
                for arm, config in self.protocol.configs.items()}
        jobs = [Job(logs[arm], seed) for arm, seed in self.missing]
        run_jobs(jobs, places, lambda job: self.may_start(job, per_place), watch=self.watch,
                 most_starting=most_starting(places, per_place))

    def _take(self, arm: str, result: dict, parallel: int) -> None:
        """Append a run to runs.jsonl if it is one."""
        folder = os.path.join(self.folder, arm, "runs", f"run_{result['run_id']}_seed_{result['seed']}")
        run = self.run_of(arm, result, os.path.join(folder, "out"), parallel)
        if run is None:
            self.failed.append((f"{arm} with seed {result['seed']}", result["final_step"]))
            return
        append_runs(self.runs_path, [run])
        self.runs[arm, result["seed"]] = run
        self.card, self.done = run["card"], self.done + 1  # nvidia-smi may name it otherwise

    def run_of(self, arm: str, result: dict, out_dir: str, parallel: int) -> dict | None:
        """Return the line of an ended run; None if it failed."""
        status = read_status(out_dir)
        diverged = isinstance(status, dict) and status["status"] == NON_FINITE
        if not result["success"] and not diverged:
            return None
        try:
            log = RunLog.read(out_dir)
        except UserError:
            return None
        environment = log.starts[0]["environment"]
        curve = [[event["step"], event["val_loss"], event["train_loss"]] for event in log.of("eval")]
        return {"protocol": self.protocol.digest, "data": self.data, "arm": arm, "seed": result["seed"],
                "status": NON_FINITE if diverged else FINISHED,
                "val_loss": None if diverged else result["final_val_loss"], "curve": curve,
                "syncs": log.last("schedule").get("syncs"),
                "seconds": seconds_of(log, result["wall_seconds"]), "parallel": parallel,
                "spikes": spikes_of(log),
                "card": environment.get("device") or self.card,
                "torch": environment.get("torch"), "commit": environment.get("git_commit") or self.commit,
                "time": round(time.time())}

    def described(self, parallel: int) -> str:
        """Return the missing runs with their expected seconds."""
        lines = [f"{arm} with seed {seed}: {self.expected(arm, parallel):.0f} s"
                 for arm, seed in self.missing]
        total = sum(self.expected(arm, parallel) for arm, _ in self.missing)
        first = json.dumps(arguments_of(next(iter(self.protocol.configs.values()))))
        return "\n".join([f"settings of {self.protocol.baseline}: {first}", *lines,
                          f"{len(lines)} runs are missing: {total / 60:.0f} minutes, one after the other"])


def seconds_of(log: RunLog, wall: float) -> dict:
    """Return where the seconds of a run went."""
    steps, stamps = log.of("iter"), [event["time"] for event in log.events if "time" in event]
    training = sum(event["seconds"] for event in steps[1:] if event.get("seconds"))
    after_first = max(stamps[-1] - steps[0]["time"], 0.0) if steps and stamps else 0.0
    evaluation = max(after_first - training, 0.0)
    return {"wall": round(wall, 3), "start": round(max(wall - training - evaluation, 0.0), 3),
            "training": round(training, 3), "evaluation": round(evaluation, 3)}


def spikes_of(log: RunLog) -> float | None:
    """Return the share of the updates after the warm-up whose gradient norm is above SPIKE times its lower
    quartile, which spikes hardly move. None if the run logs no norms or ends within the warm-up."""
    first = log.config.get("warmup_iters") or 0
    if not in_range(first):
        return None
    norms = np.array([event["norm"] for event in log.of("iter")
                      if event["step"] >= first and event.get("norm") is not None])
    return round(float(np.mean(norms > SPIKE * np.quantile(norms, 0.25))), 6) if norms.size else None


def most_starting(places: list[str | None], per_place: int) -> int:
    """Return how many of the runs on one GPU may be before their first step. Without a GPU, which would wait
    for them, all may."""
    return per_place if places[0] is None else -(-per_place // STARTING_SHARE)


def places_for(parallel: int | None, on_cpu: bool) -> tuple[list[str | None], int]:
    """Return the GPU of each run at a time, and the runs on one GPU. parallel: runs at a time, None for one a
    GPU."""
    gpus = [] if on_cpu else visible_gpus()
    parallel = parallel or max(len(gpus), 1)
    if not gpus:
        return [None] * parallel, parallel
    return [gpus[i % len(gpus)] for i in range(parallel)], -(-parallel // len(gpus))
