"""Start, watch and record the runs of experiments, several at a time on separate GPUs.

A run is judged by its out_dir, never by its exit code or its output: status.json must say `finished`, and
run_*.jsonl, in the names of training_logger, must have the requested configuration and a finite validation
loss at the last step. Any other run has failed.

Each run, or its torchrun, is the child of a supervise.py, which ends it and all its processes as soon as
this process ends, killed or not. The supervisors inherit the lock of an experiment's folder, so a runner that
resumes there waits until all processes of the earlier runner have ended.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

from experiments.experiment_config import (
    MAX_NUMBER,
    MAX_RUNS,
    NUMBER,
    arguments_of,
    command,
    command_line,
    finite,
    in_range,
    num_iterations,
    printable,
    steps_key,
    variables,
)
from experiments.experiment_logger import ExperimentLogger, gpu_info
from experiments.progress import ProgressBar, RunProgress
from nanosync.errors import UserError, shortened, shown
from nanosync.files import first_line, open_regular, os_error_as_user_error, read_json, unused_path
from nanosync.folder_lock import lock_folder
from nanosync.run_log import RunLog

SUPERVISOR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "supervise.py")
ENDING = 5.0  # longest time to end a run, seconds
PATIENCE = 2 * ENDING  # longest wait for the processes of an earlier runner, seconds
KEPT_LINES, KEPT_BYTES = 20, 200_000  # of a failed run's output
LONGEST_LINE = 1000  # characters of a line that is kept
POLL = 0.25  # seconds
# the first line of torchrun's report of a failed worker, which does not name the cause
TORCHRUN_REPORT = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d.*torch/distributed/elastic/multiprocessing/")
ENDINGS = "itself", "limit", "signal", "starter"  # values of ended_by in report.json
EMPTY_RESULT = {"final_val_loss": None, "final_train_loss": None, "time_seconds": 0.0, "final_step": 0,
                "success": False}


@dataclass
class Job:
    """A run to do. limit: seconds after which it is ended, 0 for no limit."""

    log: ExperimentLogger
    run_id: int
    limit: float = 0.0
    changed: dict = field(default_factory=dict)  # settings that differ from the experiment's
    recorded: bool = True  # False for a probe, which is not a result
    folder: str | None = None  # its output, once known
    key: str = ""  # its reservation in a campaign

    @property
    def name(self) -> str:
        seed = self.log.config["base_seed"] + self.run_id
        return f"{self.log.config['experiment_name']} run {self.run_id} (seed {seed})"

    @property
    def steps(self) -> int:
        return self.changed.get(steps_key(self.log.config), num_iterations(self.log.config))


class Running:
    """A job that was started."""

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
        job.log.note(f"{job.name}: {command_line(self.command, added)}")
        with os_error_as_user_error(f"cannot start {job.name}"), \
                open(os.path.join(self.folder, "stdout.log"), "wb") as output:
            self.supervisor = subprocess.Popen(
                [sys.executable, SUPERVISOR, self.report, str(job.limit), *self.command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=os.environ | added,
                start_new_session=True, pass_fds=[job.log.lock])
        self.progress = RunProgress(self.out_dir)
        self.early = None  # what its result says if it was ended early

    def end(self) -> None:
        """Make the supervisor end the run."""
        with contextlib.suppress(OSError):
            self.supervisor.stdin.close()

    def end_early(self, reason: str, at_least: float) -> None:
        """End a run whose final loss is predicted. at_least: the lower end of its prediction interval."""
        self.early = {"error": f"ended early: {reason}", "ended_by": "early", "at_least": at_least}
        self.end()

    def result(self) -> tuple[dict, list[dict]]:
        """Return what `record` takes, once the supervisor has ended."""
        report = read_report(self.folder)
        if report is None:
            report = {"code": None, "seconds": time.monotonic() - self.started, "ended_by": "unknown"}
        result, metrics = result_of(self.job, self.folder, report)
        if self.early is not None and not result["success"]:
            result |= self.early
        return result, metrics


def read_report(folder: str) -> dict | None:
    """Return the report of supervise.py in the folder of a run; None without a valid one."""
    try:
        report = read_json(os.path.join(folder, "report.json"))
    except (OSError, ValueError):
        return None
    valid = isinstance(report, dict) and in_range(report.get("seconds")) \
        and report.get("ended_by") in ENDINGS and type(report.get("code")) in (int, type(None))
    return report if valid else None


def result_of(job: Job, folder: str, report: dict) -> tuple[dict, list[dict]]:
    """Return what `record` takes of an ended run, from its folder and the report of supervise.py."""
    try:
        result, metrics = _result_of(job, folder, report)
    except Exception as e:  # the unexpected output of one script must not end the other runs
        result = EMPTY_RESULT | {"run_id": job.run_id, "seed": job.log.config["base_seed"] + job.run_id,
                                 "error": f"its output cannot be read: {type(e).__name__}: {first_line(e)}",
                                 "wall_seconds": round(report["seconds"], 3),
                                 "gpus": job.log.config["n_gpus"],
                                 "ended_by": report["ended_by"], "output_tail": []}
        metrics = []
    if "error" in result:  # results.jsonl and terminals take no control characters
        result["error"] = shortened(printable(result["error"]), LONGEST_LINE)
        result["output_tail"] = [shortened(printable(line), LONGEST_LINE) for line in result["output_tail"]]
    return result, metrics


def _result_of(job: Job, folder: str, report: dict) -> tuple[dict, list[dict]]:
    config = job.log.config
    asked = {steps_key(config): num_iterations(config)} | config["stage_config"] | arguments_of(config)
    asked |= {"seed": config["base_seed"] + job.run_id}
    asked |= job.changed
    result, metrics = judge_run(os.path.join(folder, "out"), asked, report)
    result = {"run_id": job.run_id, "seed": asked["seed"], **result,
              "wall_seconds": round(report["seconds"], 3), "gpus": config["n_gpus"]}
    if not result["success"]:
        result["ended_by"] = report["ended_by"]
        result["output_tail"] = last_lines(os.path.join(folder, "stdout.log"))
    return result, metrics


def recover(log: ExperimentLogger, n_runs: int) -> None:
    """Record the runs that ended by themselves after their runner was killed."""
    for run_id in log.missing(n_runs):
        folder = log.run_folder(run_id)
        report = read_report(folder)
        if report is not None and report["ended_by"] == "itself":
            job = Job(log, run_id)
            settle(job, *result_of(job, folder, report))


def judge_run(out_dir: str, asked: dict, report: dict) -> tuple[dict, list[dict]]:
    """Return (result, metrics) of an ended run; a result without success has an `error`.

    asked: the settings it was given; report: the report of supervise.py.
    """
    result = dict(EMPTY_RESULT)
    status, metrics, config = read_status(out_dir), [], {}
    try:
        log = RunLog.read(out_dir)
        metrics = [row for event in with_clock(log.events) if (row := metric(event))]
        config = log.starts[0]["config"] if log.starts else {}
        unreadable = "" if log.starts else "its events have no start"
    except UserError as e:
        unreadable = first_line(e)
    last_val = next((row for row in reversed(metrics) if "val_loss" in row), None)
    last_train = next((row for row in reversed(metrics) if row.get("train_loss") is not None), {})
    result["final_step"] = metrics[-1]["step"] if metrics else 0
    result["final_train_loss"] = last_train.get("train_loss")
    if last_val is not None:
        result["final_val_loss"] = last_val["val_loss"]
        result["time_seconds"] = (last_val["train_time_ms"] or 0.0) / 1e3
    if isinstance(status, dict):
        step = status.get("step")
        # status.json is written less often than the log
        status["step"] = max(step if type(step) is int else 0, result["final_step"])
    error = problem_of(status, unreadable, asked, config, last_val, report)
    return result | ({"success": True} if error is None else {"error": error}), metrics


def read_status(out_dir: str) -> dict | str:
    """Return the status.json of a run, or the reason why there is none that is valid."""
    try:
        status = read_json(os.path.join(out_dir, "status.json"))
    except FileNotFoundError:
        return "it left no status.json in its out_dir"
    except (OSError, ValueError) as e:
        return f"its status.json cannot be read: {getattr(e, 'strerror', None) or first_line(e)}"
    if not isinstance(status, dict) or not isinstance(status.get("status"), str):
        return "its status.json has no status"
    return status


def with_clock(events: list[dict]) -> list[dict]:
    """Add the training time to the events of a script that logs only the seconds of each iteration."""
    if any("train_time_ms" in event for event in events):
        return events
    found, total, n = [], 0.0, 0
    for event in events:
        if event["event"] == "iter" and in_range(event.get("seconds")):
            total, n = total + 1e3 * event["seconds"], n + 1
        found.append(event | {"train_time_ms": total, "step_avg_ms": total / n if n else None})
    return found


def metric(event: dict) -> dict | None:
    """Return the line of metrics.jsonl for an event, None for events without one.

    Its `step` is the number of updates done. A number that is not finite becomes None. Raises UserError if
    the event lacks a field.
    """
    names = {"iter": ("train_loss", "loss"), "eval": ("val_loss", "val_loss")}
    if event["event"] not in names:
        return None
    name, key = names[event["event"]]
    for needed, kinds in (("step", int), (key, NUMBER), ("train_time_ms", NUMBER), ("step_avg_ms", NUMBER)):
        value = event.get(needed, "")
        if not isinstance(value, kinds) and (value is not None or needed == "step"):
            found = f"{needed}={shown(value, 40)}" if needed in event else f"no {needed}"
            raise UserError(f"an event {event['event']!r} of its log has {found}")
    done = event["step"] + (event["event"] == "iter")  # the step of an iteration is the index of its update
    values = {name: event[key], "train_time_ms": event["train_time_ms"], "step_avg_ms": event["step_avg_ms"]}
    return {"step": done} | {name: value if in_range(value, -MAX_NUMBER if "loss" in name else 0) else None
                             for name, value in values.items()}


def problem_of(status: dict | str, unreadable: str, asked: dict, config: dict, last_val: dict | None,
               report: dict) -> str | None:
    """Say why a run does not count; None if it does."""
    ended = {"limit": f"ended at its limit, after {report['seconds']:.0f} s", "signal": "ended by SIGTERM",
             "starter": "ended because the runner was"}
    if report["ended_by"] in ended:
        return ended[report["ended_by"]]
    code = report["code"]
    if isinstance(status, str):
        return f"{status} (exit code {code}): it ended before it trained, or its script does not report as " \
               f"train_gpt.py does"
    if status["status"] != "finished":
        state = "crashed" if status["status"] == "running" else shortened(status["status"], 80)
        return f"{state} at step {status['step']} (exit code {code})"
    if unreadable or last_val is None:
        return f"no validation loss captured: {unreadable or 'its log has no eval event'}"
    loss = last_val["val_loss"]
    if finite(loss) is None:
        return f"the last validation loss is {loss}"
    steps = asked["num_iterations"] if "num_iterations" in asked else asked["max_iters"]
    if last_val["step"] != steps:
        return f"no validation loss captured at step {steps}: the last is of {last_val['step']}"
    if last_val["train_time_ms"] is None:
        return "no training time captured: train_time_ms of its last evaluation is no number"
    other = [key for key, value in asked.items() if config.get(key) != value]
    if other:
        return f"it was asked for {other[0]}={shown(asked[other[0]])} and ran with " \
               f"{shown(config.get(other[0]))}"
    return None


def last_lines(path: str) -> list[str]:
    """Return the last lines of a run's output, without torchrun's report of a failed worker; or the reason
    why they cannot be read."""
    try:
        with open_regular(path) as f:
            f.seek(max(os.fstat(f.fileno()).st_size - KEPT_BYTES, 0))
            lines = f.read(KEPT_BYTES).decode(errors="backslashreplace").splitlines()
    except OSError as e:
        return [f"({os.path.basename(path)} cannot be read: {e.strerror})"]
    end = next((i for i, line in enumerate(lines) if TORCHRUN_REPORT.match(line)), len(lines))
    return lines[max(end - KEPT_LINES, 0):end] or lines[-KEPT_LINES:]


def visible_gpus() -> list[str]:
    """Return the ids of the GPUs that CUDA sees, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA stops at the first negative id: -1 hides all GPUs
        names = map(str.strip, named.split(","))
        return [name for name in itertools.takewhile(lambda name: not name.startswith("-"), names) if name]
    return [str(i) for i in range(gpu_info()["count"])]


def slots(config: dict, parallel: int) -> list[str | None]:
    """Return the GPUs for each of the parallel runs; None for all that the run finds. Raises UserError."""
    n = config["n_gpus"]
    if not 1 <= parallel <= MAX_RUNS:
        raise UserError(f"parallel={parallel} must be from 1 to {MAX_RUNS}")
    gpus = visible_gpus()
    settings = config["stage_config"] | config["hyperparameters"]
    if not gpus or settings.get("device") == "cpu":
        return [None] * parallel
    if n * parallel > len(gpus):
        raise UserError(f"{parallel} x n_gpus={n} needs {n * parallel} GPUs and {len(gpus)} are visible: use "
                        f"fewer with --n_gpus or --parallel")
    return [",".join(gpus[i * n:(i + 1) * n]) if parallel > 1 else None for i in range(parallel)]


def lock(folder: str) -> int:
    """Lock an experiment's folder for this process and its supervisors; wait for those of an earlier runner.

    Returns the file descriptor that the supervisors inherit. Raises UserError.
    """
    return lock_folder(folder, "log_dir", patience=PATIENCE)


def end_on_signals() -> None:
    """Make SIGTERM and SIGHUP end this process in order, as Ctrl-C does. An ignored signal stays ignored."""

    def on_signal(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the ending
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)


def run_jobs(jobs: list[Job], places: list[str | None], may_start=None, ended=None, watch=None,
             most_starting: int | None = None) -> None:
    """Do all jobs, as many at a time as there are places, and record them.

    may_start(job): called right before each launch, False skips the job; ended(job, result): called after
    each job; watch(run): called a few times a second for each run; most_starting: runs on the same GPU that
    may be before their first step, None for no limit. On KeyboardInterrupt, which `end_on_signals` raises
    too, end all runs and raise it again.
    """
    waiting, running, free, done = list(jobs), [], list(places), 0
    bar = ProgressBar(sum(job.steps for job in jobs))
    for log in {id(job.log): job.log for job in jobs}.values():
        log.say = bar.say
    try:
        while waiting or running:
            while waiting and (ready := ready_places(free, running, most_starting)):
                job = waiting.pop(0)
                if may_start is None or may_start(job):
                    place = ready[0]  # `ready` may be `free` itself
                    free.remove(place)
                    running.append(Running(job, place))
            bar.show(done, running, waiting, len(places))
            for run in running if watch is not None else []:
                watch(run)
            time.sleep(POLL)
            for run in [run for run in running if run.supervisor.poll() is not None]:
                running.remove(run)
                free.append(run.gpus)
                run.end()
                result, metrics = run.result()
                done += run.job.steps
                bar.walls.append(result["wall_seconds"])
                settle(run.job, result, metrics)
                if ended is not None:
                    ended(run.job, result)
    finally:  # no run outlives this function
        for run in running:
            run.end()
        for run in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.supervisor.wait(ENDING)
        bar.close()


def ready_places(free: list[str | None], running: list[Running], most_starting: int | None
                 ) -> list[str | None]:
    """Return the free places on whose GPU fewer than most_starting runs are before their first step."""
    if most_starting is None:
        return free
    starting = [run.gpus for run in running if run.progress.first is None]
    return [place for place in free if starting.count(place) < most_starting]


def settle(job: Job, result: dict, metrics: list[dict]) -> None:
    """Record an ended run, and print its result."""
    if result["success"]:
        text = f"val loss {result['final_val_loss']:.4f} at step {result['final_step']}, " \
               f"{result['time_seconds']:.1f} s of training, {result['wall_seconds']:.1f} s in all"
    else:
        text = f"FAILED, not counted: {result['error']}; the last lines of its output:\n" + "\n".join(
            "    " + line for line in result["output_tail"])
    if job.recorded:
        job.log.record(result, metrics)
    job.log.line(f"{job.name}: {text}")
