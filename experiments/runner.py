"""Runs of experiments: started, watched, read and recorded, several at a time on GPUs of their own.

What a run has achieved is read from its out_dir, never from its exit code or from what it prints: status.json
must say `finished`, and run_*.jsonl, in training_logger's names, must have the configuration that was asked
for and a finite validation loss at the last step. Everything else is a failed run.

Each torchrun has a supervise.py above it, which ends it with all its processes as soon as this process is
gone, however it went. The lock of an experiment's folder is held by the supervisors, too: who goes on there
waits until nothing of the earlier runner is left.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from experiments.experiment_config import NUMBER, command, finite, num_iterations, shown, variables
from experiments.experiment_logger import ExperimentLogger, gpu_info
from nanosync.errors import UserError
from nanosync.files import first_line, os_error_as_user_error, unused_path
from nanosync.run_log import read_log

SUPERVISOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervise.py")
ENDING = 5.0  # seconds that ending a run may take at most
TAIL = 20  # lines of a failed run's output that are kept
POLL = 0.25  # seconds
# where torchrun begins to tell of a worker that failed, which is not what it failed of
OF_TORCHRUN = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d.*torch/distributed/elastic/multiprocessing/")
NOTHING = {"final_val_loss": None, "final_train_loss": None, "time_seconds": 0.0, "final_step": 0,
           "success": False}  # of a run
ODD = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)  # of an event nobody foresaw


@dataclass
class Job:
    """A run that is to be done. limit: seconds after which it is ended, 0 for none."""

    log: ExperimentLogger
    run_id: int
    limit: float = 0.0
    changed: dict = field(default_factory=dict)  # settings other than the experiment's
    recorded: bool = True  # otherwise it is a probe, which is no result
    folder: str | None = None  # of its output, once that is known
    key: str = ""  # of its reservation in a campaign

    @property
    def name(self) -> str:
        seed = self.log.config["base_seed"] + self.run_id
        return f"{self.log.config['experiment_name']} run {self.run_id} (seed {seed})"

    @property
    def steps(self) -> int:
        return self.changed.get("num_iterations", num_iterations(self.log.config))


class Running:
    """A job that has been started."""

    def __init__(self, job: Job, gpus: str | None):
        self.job, self.gpus, self.started = job, gpus, time.monotonic()
        if job.recorded:
            self.folder = job.log.fresh_run_folder(job.run_id)
        else:
            self.folder = job.folder or unused_path(job.log.path("probe"))
            with os_error_as_user_error(f"cannot make {self.folder}"):
                os.makedirs(self.folder)
        job.folder, self.out_dir = self.folder, os.path.join(self.folder, "out")
        self.report = os.path.join(self.folder, "report.json")
        self.command = command(job.log.config, job.run_id, os.path.abspath(self.out_dir), **job.changed)
        added = variables(job.log.config, gpus)
        job.log.note(f"{job.name}: {shown(self.command, added)}")
        with open(os.path.join(self.folder, "stdout.log"), "wb") as output:
            self.supervisor = subprocess.Popen(
                [sys.executable, SUPERVISOR, self.report, str(job.limit), *self.command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=os.environ | added,
                start_new_session=True, pass_fds=[job.log.lock.fileno()])
        self.tail = Tail(self.out_dir)

    def end(self) -> None:
        """Have the supervisor end it."""
        with contextlib.suppress(OSError):
            self.supervisor.stdin.close()

    def result(self) -> tuple[dict, list[dict]]:
        """What `record` takes, once the supervisor has ended."""
        try:
            with open(self.report, encoding="utf-8") as f:
                report = json.load(f)
        except (OSError, ValueError):
            report = {"code": None, "seconds": time.monotonic() - self.started, "ended_by": "nobody knows"}
        return result_of(self.job, self.folder, report)


def result_of(job: Job, folder: str, report: dict) -> tuple[dict, list[dict]]:
    """What `record` takes of a run that has ended, from its folder and from what supervise.py reports."""
    try:
        return _result_of(job, folder, report)
    except Exception as e:  # one script's odd output must not end the other runs
        return NOTHING | {"run_id": job.run_id, "seed": job.log.config["base_seed"] + job.run_id,
                          "error": f"its output cannot be read: {type(e).__name__}: {first_line(e)}",
                          "wall_seconds": round(report["seconds"], 3), "gpus": job.log.config["n_gpus"],
                          "ended_by": report["ended_by"], "output_tail": []}, []


def _result_of(job: Job, folder: str, report: dict) -> tuple[dict, list[dict]]:
    config = job.log.config
    asked = config["stage_config"] | config["hyperparameters"] | {"seed": config["base_seed"] + job.run_id}
    asked |= job.changed
    result, metrics = read_run(os.path.join(folder, "out"), asked, report)
    result = {"run_id": job.run_id, "seed": asked["seed"], **result,
              "wall_seconds": round(report["seconds"], 3), "gpus": config["n_gpus"]}
    if not result["success"]:
        result["ended_by"] = report["ended_by"]
        result["output_tail"] = last_lines(os.path.join(folder, "stdout.log"))
    return result, metrics


def recover(log: ExperimentLogger, n_runs: int) -> None:
    """Record what ended by itself when the runner was no longer there to record it."""
    for run_id in log.missing(n_runs):
        folder = log.run_folder(run_id)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with open(os.path.join(folder, "report.json"), encoding="utf-8") as f:
                report = json.load(f)
            if report["ended_by"] == "itself":
                job = Job(log, run_id)
                settle(job, *result_of(job, folder, report))


class Tail:
    """The events that a run has written so far, read as they come."""

    def __init__(self, out_dir: str):
        self.out_dir, self._file, self._half = out_dir, None, b""
        self.step, self.val_loss, self.val_step, self.first = 0, None, None, None  # first: (time, step)

    def read(self) -> None:
        if self._file is None:
            with contextlib.suppress(OSError):
                names = [name for name in os.listdir(self.out_dir) if re.fullmatch(r"run_.*\.jsonl", name)]
                self._file = open(os.path.join(self.out_dir, max(names)), "rb") if names else None
        if self._file is None:
            return
        *lines, self._half = (self._half + self._file.read()).split(b"\n")
        for line in lines:
            with contextlib.suppress(*ODD):  # judged when the run has ended
                self._take(json.loads(line))

    def _take(self, event: dict) -> None:
        if event["event"] == "iter":
            self.step = int(event["step"]) + 1
            self.first = self.first or (time.monotonic(), self.step)
        elif event["event"] == "eval":
            self.val_loss, self.val_step = finite(event["val_loss"]), int(event["step"])

    def seconds_left(self, steps: int) -> float | None:
        """Evaluations included, None before there are two steps to go by."""
        if self.first is None or self.step <= self.first[1]:
            return None
        return (steps - self.step) * (time.monotonic() - self.first[0]) / (self.step - self.first[1])


def read_run(out_dir: str, asked: dict, report: dict) -> tuple[dict, list[dict]]:
    """(result, metrics) of a run that has ended; a result without success has an `error`.

    asked: the settings it was given; report: supervise.py's.
    """
    result = dict(NOTHING)
    status, metrics, config = {}, [], {}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(out_dir, "status.json")) as f:
        status = json.load(f)
    try:
        events = read_log(out_dir)
        metrics = [row for event in events if (row := metric(event))]
        config = next(event["config"] for event in events if event["event"] == "start")
        problem = ""
    except UserError as e:
        problem = first_line(e)
    except (KeyError, StopIteration) as e:
        problem = f"its events have no {e.args[0] if e.args else 'start'}"
    last_val = next((row for row in reversed(metrics) if "val_loss" in row), None)
    last_train = next((row for row in reversed(metrics) if row.get("train_loss") is not None), {})
    result["final_step"] = metrics[-1]["step"] if metrics else 0
    result["final_train_loss"] = last_train.get("train_loss")
    if last_val is not None:
        result["final_val_loss"] = last_val["val_loss"]
        result["time_seconds"] = (last_val["train_time_ms"] or 0.0) / 1e3
    if isinstance(status, dict):
        step = status.get("step")
        status["step"] = max(step if type(step) is int else 0, result["final_step"])  # written now and then
    error = problem_of(status, problem, asked, config, last_val, report)
    return result | ({"success": True} if error is None else {"error": error}), metrics


def metric(event: dict) -> dict | None:
    """A line of metrics.jsonl from an event of a run, its `step` the updates that are done; null for a number
    that is not finite. Raises UserError if the event does not have what that needs."""
    names = {"iter": ("train_loss", "loss"), "eval": ("val_loss", "val_loss")}
    if event["event"] not in names:
        return None
    name, key = names[event["event"]]
    for needed, kinds in (("step", int), *((one, NUMBER) for one in (key, "train_time_ms", "step_avg_ms"))):
        value = event.get(needed, "")
        if not isinstance(value, kinds) and (value is not None or needed == "step"):
            what = f"{needed}={value!r:.40}" if needed in event else f"no {needed}"
            raise UserError(f"an event {event['event']!r} of its log has {what}")
    done = event["step"] + (event["event"] == "iter")  # whose step is the update's index
    return {"step": done, name: finite(event[key]), "train_time_ms": finite(event["train_time_ms"]),
            "step_avg_ms": finite(event["step_avg_ms"])}


def problem_of(status: dict, unreadable: str, asked: dict, config: dict, last_val: dict | None, report: dict
               ) -> str | None:
    """Why a run does not count, None if it does."""
    ended = {"limit": f"ended at its limit, after {report['seconds']:.0f} s", "signal": "ended by SIGTERM",
             "starter": "ended because the runner was"}
    if report["ended_by"] in ended:
        return ended[report["ended_by"]]
    code = report["code"]
    if not isinstance(status, dict) or "status" not in status:
        return f"it left no status.json in its out_dir (exit code {code}): it ended before it trained, or " \
               f"its script does not report as train_gpt.py does"
    if status["status"] != "finished":
        state = "crashed" if status["status"] == "running" else status["status"]
        return f"{state} at step {status['step']} (exit code {code})"
    if unreadable or last_val is None:
        return f"no validation loss captured: {unreadable or 'its log has no eval event'}"
    loss = last_val["val_loss"]
    if finite(loss) is None:
        return f"the last validation loss is {loss}"
    if last_val["step"] != asked["num_iterations"]:
        return f"no validation loss captured at step {asked['num_iterations']}: the last is of " \
               f"{last_val['step']}"
    if last_val["train_time_ms"] is None:
        return "no training time captured: train_time_ms of its last evaluation is no number"
    other = [key for key, value in asked.items() if config.get(key) != value]
    if other:
        return f"it was asked for {other[0]}={asked[other[0]]!r} and ran with {config.get(other[0])!r}"
    return None


def last_lines(path: str) -> list[str]:
    """The end of what a run printed, without torchrun's own account of it."""
    with open(path, "rb") as f:
        f.seek(max(os.path.getsize(path) - 200_000, 0))
        lines = f.read().decode(errors="backslashreplace").splitlines()
    own = next((i for i, line in enumerate(lines) if OF_TORCHRUN.match(line)), len(lines))
    return lines[max(own - TAIL, 0):own] or lines[-TAIL:]


def visible_gpus() -> list[str]:
    """Their ids as CUDA_VISIBLE_DEVICES takes them; none on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA sees none from the first negative one on: -1 hides them all
        names = map(str.strip, named.split(","))
        return [name for name in itertools.takewhile(lambda name: not name.startswith("-"), names) if name]
    return [str(i) for i in range(gpu_info()["count"])]


def slots(config: dict, parallel: int) -> list[str | None]:
    """Which GPUs each of the runs at a time gets, None: those that it finds. Raises UserError."""
    n = config["n_gpus"]
    if parallel < 1:
        raise UserError(f"parallel={parallel} must be at least 1")
    gpus = visible_gpus()
    settings = config["stage_config"] | config["hyperparameters"]
    if not gpus or settings.get("device") == "cpu":
        return [None] * parallel
    if n * parallel > len(gpus):
        raise UserError(f"{parallel} x n_gpus={n} needs {n * parallel} GPUs and {len(gpus)} are visible: use "
                        f"fewer with --n_gpus or --parallel")
    return [",".join(gpus[i * n:(i + 1) * n]) if parallel > 1 else None for i in range(parallel)]


def lock(folder: str, patience: float = 2 * ENDING):
    """The open file by which a folder is this process's and its supervisors'. Raises UserError."""
    path, until = os.path.join(folder, "LOCK"), time.monotonic() + patience
    with os_error_as_user_error(f"cannot write {path}"):
        file = open(path, "a")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(f"{folder} is in use by another runner: wait for it, or end it") from None
            time.sleep(0.1)
        except OSError as e:
            raise UserError(f"cannot lock {folder} ({e.strerror}): name a --log_dir on a file system that "
                            f"has locks") from None


def end_on_signals() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does: in order. What is ignored stays so."""

    def on_signal(number, frame):
        signal.signal(number, signal.SIG_IGN)  # once: what follows is the end
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)


class Progress:
    """Says how far runs are: on a terminal a bar, in a file a line at evaluations, at most one in `EVERY`."""

    EVERY = 10.0  # seconds

    def __init__(self, steps: int):
        self.bar, self.total, self.walls, self._said = None, steps, [], {}
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, file=sys.stdout)

    def say(self, text: str) -> None:
        """For ExperimentLogger's `say`."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def show(self, done: int, running: list[Running], waiting: list[Job], parallel: int) -> None:
        left = self._left(running, waiting, parallel)
        for run in running:
            run.tail.read()
            tail, key = run.tail, id(run)
            last, step = self._said.get(key, (-self.EVERY, None))
            if tail.val_step is not None and tail.val_step != step and time.monotonic() > last + self.EVERY:
                self._said[key] = time.monotonic(), tail.val_step
                loss = "none" if tail.val_loss is None else f"{tail.val_loss:.4f}"
                text = f"{run.job.name}: step {tail.val_step}/{run.job.steps}, val loss {loss}{left}"
                run.job.log.note(text)
                if self.bar is None:
                    self.say(text)
        if self.bar is not None:
            self.bar.n = done + sum(run.tail.step for run in running)
            losses = (f"run {run.job.run_id} {run.tail.val_loss:.4f}" for run in running
                      if run.tail.val_loss is not None)
            self.bar.set_postfix_str(", ".join(losses) + left)

    def _left(self, running: list[Running], waiting: list[Job], parallel: int) -> str:
        """', h:mm:ss left', as far as can be said."""
        lefts = [run.tail.seconds_left(run.job.steps) for run in running]
        known = [left for left in lefts if left is not None]
        if not known:
            return ""
        if waiting and not self.walls:  # no run has ended: those that wait take as long as the first
            per_run = max(time.monotonic() - run.started + left for run, left in zip(running, lefts)
                          if left is not None)
        else:
            per_run = sum(self.walls) / max(len(self.walls), 1)
        seconds = round(max(known) + per_run * math.ceil(len(waiting) / parallel))
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run_jobs(jobs: list[Job], places: list[str | None], may_start=None, ended=None) -> None:
    """Do all jobs, as many at a time as there are places, and record them.

    may_start(job): asked right before each launch, False leaves it out; ended(job, result): told after each.
    Ctrl-C and what `end_on_signals` makes of other signals end what runs and are raised again.
    """
    waiting, running, free, done = list(jobs), [], list(places), 0
    progress = Progress(sum(job.steps for job in jobs))
    for log in {id(job.log): job.log for job in jobs}.values():
        log.say = progress.say
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                if may_start is None or may_start(job):
                    running.append(Running(job, free.pop(0)))
            progress.show(done, running, waiting, len(places))
            time.sleep(POLL)
            for run in [run for run in running if run.supervisor.poll() is not None]:
                running.remove(run)
                free.append(run.gpus)
                run.end()
                result, metrics = run.result()
                done += run.job.steps
                progress.walls.append(result["wall_seconds"])
                settle(run.job, result, metrics)
                if ended is not None:
                    ended(run.job, result)
    finally:  # nothing runs on where this is left
        for run in running:
            run.end()
        for run in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.supervisor.wait(ENDING)
        progress.close()


def settle(job: Job, result: dict, metrics: list[dict]) -> None:
    """Record a run that has ended, and say so."""
    if result["success"]:
        text = f"val loss {result['final_val_loss']:.4f} at step {result['final_step']}, " \
               f"{result['time_seconds']:.1f} s of training, {result['wall_seconds']:.1f} s in all"
    else:
        text = f"FAILED, not counted: {result['error']}; the last lines of its output:\n" + "\n".join(
            "    " + line for line in result["output_tail"])
    if job.recorded:
        job.log.record(result, metrics)
    job.log.line(f"{job.name}: {text}")
