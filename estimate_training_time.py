"""Estimate time, cost and milestones of a training run: before it begins, or from its log.

$ python estimate_training_time.py config/train_gpt2.py --tokens_per_second=1_900_000 --gpus=4 \\
      --price_per_hour=3.5
$ python estimate_training_time.py             # the run in `out`
$ python estimate_training_time.py out-gpt2    # or one of its run_*.jsonl

Before a run begins, a config file and --key=value may give any setting of train.py or train_reduced_sync.py.
The tokens/s of all GPUs together are in the log lines of other runs, or measured by bench.py. Starting,
compiling and saving are not counted, evaluations only with --seconds_per_evaluation. From a log, evaluations
and saving are counted, because the log shows what they take.
"""

import heapq
import itertools
import os
import signal
import statistics
import time
from dataclasses import dataclass
from datetime import datetime

from configurator import check_at_least, configure
from nanosync.dataloader import open_dataset
from nanosync.errors import UserError
from nanosync.run_log import RunLog

# -----------------------------------------------------------------------------
tokens_per_second: float | None = None  # of all GPUs together; a log has its own
seconds_per_evaluation: float | None = None  # with what is saved then; a log has its own
tokens_per_epoch: int | None = None  # None: those of the data set, if it is on this machine
gpus = 1  # to be paid for; for a log, the number of its processes
price_per_hour: float | None = None  # of one GPU
milestones = 3  # how many checkpoints and ends of epochs to list besides the last
run_log = ""  # out_dir or run_*.jsonl of a run that has begun; '' is `out` if no other setting is given
now = ""  # count from this time, as in '2027-01-31 18:00'; '' is the present
# -----------------------------------------------------------------------------
config = configure(globals(), takes="run_log",
                   others=tuple(os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
                                for script in ("train_reduced_sync.py", "train.py")))
LOG_SETTINGS = ("run_log", "tokens_per_epoch", "gpus", "price_per_hour", "milestones", "now")  # with a log
planning = [name for name, origin in config.origin.items() if origin and name not in LOG_SETTINGS]
if not run_log and not planning:
    run_log = "out"
    if not os.path.exists(run_log):
        raise UserError("there is no run in out: give the out_dir of a run, or a config file and "
                        "--tokens_per_second=... for a run that has not begun")
RECENT = 100  # the speed is the median of so many log lines
SILENCE = 60.0  # seconds; a shorter time without an event is never suspicious

check_at_least(config, 1, "gpus")
check_at_least(config, 0, "milestones")
for name in ("tokens_per_second", "seconds_per_evaluation", "tokens_per_epoch", "price_per_hour"):
    if config[name] is not None and config[name] <= 0:
        raise UserError(f"{name}={config[name]} must be above 0")
try:
    present = datetime.fromisoformat(now).timestamp() if now else time.time()
except (ValueError, OverflowError):
    raise UserError(f"now={now!r} is no time: write it as in --now='2027-01-31 18:00'") from None


@dataclass
class Run:
    """The length of a run, the seconds of its parts, and its progress. Defaults: not begun yet."""

    max_iters: int
    eval_interval: int
    checkpoint_interval: int
    saves: str  # label of the multiples of checkpoint_interval
    saves_at_evaluations: bool
    tokens: int  # an iteration
    iteration: float = 0.0  # seconds
    evaluation: float = 0.0  # seconds, with the saving then
    pauses: float = 0.0  # seconds an iteration, of pauses without an evaluation
    done: int = 0  # iterations
    seen: int = -1  # last step in the log: its evaluation, if it has one, is over

    def seconds_to(self, step: int) -> float:
        """Return the seconds left until the iterations before `step`, and its evaluation, are done."""
        evaluations = self.evaluations(step) - self.evaluations(self.seen)
        return (step - self.done) * (self.iteration + self.pauses) + evaluations * self.evaluation

    def evaluations(self, step: int) -> int:
        """Count the evaluations up to this step, of which the first is at step 0."""
        last = step == self.max_iters and step % self.eval_interval > 0
        return step // self.eval_interval + 1 + last


def planned(settings: dict, where: str) -> Run:
    """Return the run that a training script would do with these settings. Raises UserError."""
    needed = ("max_iters", "eval_interval", "batch_size", "block_size", "gradient_accumulation_steps")
    for name in needed:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise UserError(f"{where} has {name}={settings.get(name)!r}: to train, it must be at least 1")
    if settings.get("eval_only"):
        raise UserError(f"{where} has eval_only=True: nothing is trained")
    max_iters, eval_interval, batch, block, accumulated = (settings[name] for name in needed)
    interval = settings.get("checkpoint_interval", 0)
    if type(interval) is not int or interval < 0:
        raise UserError(f"{where} has checkpoint_interval={interval!r}: it must be at least 0")
    shape = batch * block * accumulated
    if settings.get("save_checkpoint") is False:
        return Run(max_iters, eval_interval, eval_interval, "evaluation", False, shape)
    always = interval or settings.get("always_save_checkpoint", True)
    return Run(max_iters, eval_interval, interval or eval_interval,
               "checkpoint" if always else "checkpoint if it is the best",
               bool(settings.get("always_save_checkpoint", True)), shape)


def begun(log: RunLog) -> Run:
    """Return the run that wrote a log, with its progress. Raises UserError."""
    if not all(isinstance(event.get("time"), (int, float)) for event in log.events):
        raise UserError(f"{log.path} is no log of a training run: it has events without a time")
    if not recent_speeds(log):
        raise UserError(f"{log.path} has no iteration yet: let the run get to its first log line")
    run = planned(log.config, log.path)
    run.iteration = run.tokens / statistics.median(recent_speeds(log))
    with_step = [event for event in log.events if "step" in event]
    run.done = max(event["step"] + (event["event"] == "iter") for event in with_step)
    run.seen = max(event["step"] for event in with_step)
    without = [stretch for stretch in stretches(log) if not stretch.evaluations]
    around = [stretch for stretch in stretches(log) if stretch.evaluations]
    if without:
        run.pauses = sum(s.paused for s in without) / sum(s.iterations for s in without)
    if around:
        run.evaluation = sum(s.paused for s in around) / sum(s.evaluations for s in around)
    return run


def recent_speeds(log: RunLog) -> list[float]:
    """Return the tokens/s of the newest log lines: since the newest start, if it has any yet."""
    speeds = []
    for events in (log.since_start, log.events):
        if not speeds:
            speeds = [event["tokens_per_second"] for event in events if event["event"] == "iter"]
            speeds = [speed for speed in speeds if speed]
    return speeds[-RECENT:]


@dataclass
class Stretch:
    """The time from one log line to the next."""

    seconds: float
    paused: float  # seconds of these not spent training
    iterations: int
    evaluations: int


def stretches(log: RunLog) -> list[Stretch]:
    """Return all stretches but those over a restart."""
    result, previous, evaluations = [], None, 0
    for event in log.events:
        if event["event"] == "start":
            previous, evaluations = None, 0
        elif event["event"] == "eval":
            evaluations += 1
        elif event["event"] == "iter" and event["seconds"]:
            if previous is not None and event["step"] > previous["step"]:
                seconds, n = event["time"] - previous["time"], event["step"] - previous["step"]
                result.append(Stretch(seconds, max(seconds - n * event["seconds"], 0.0), n, evaluations))
            previous, evaluations = event, 0
    return result


def silence(log: RunLog) -> str:
    """Describe a silence so long that the run may have died; '' for a shorter one."""
    times = [event["time"] for event in log.since_start]
    longest = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
    silent = present - times[-1]
    if silent <= max(SILENCE, 3 * longest):
        return ""
    return f"silent for {duration(silent)}, and before for {duration(longest)} at most: it may have died"


def epoch_tokens(settings: dict) -> int | None:
    """Return the tokens of an epoch. If they are unknown, print why and return None."""
    if tokens_per_epoch is not None:
        return tokens_per_epoch
    if not isinstance(settings.get("dataset"), str):
        say("epochs", "not known without --tokens_per_epoch")
        return None
    try:
        data = open_dataset(settings["dataset"], settings["block_size"])
    except UserError as e:
        say("epochs", f"not known: {e}; or give --tokens_per_epoch=...")
        return None
    return data.train.n_windows * data.train.block_size


def duration(seconds: float) -> str:
    """Format seconds as `days d hours:minutes`, below a day as hours:minutes:seconds."""
    days, rest = divmod(round(min(max(seconds, 0.0), 1e15)), 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}"
    return f"{days:,} d {text}" if days else f"{text}:{rest % 60:02}"


def date(seconds: float) -> str:
    """Format seconds since 1970 as local time with its zone."""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%a %Y-%m-%d %H:%M %Z")
    except (OverflowError, ValueError, OSError):
        return "beyond the calendar"


def amount(tokens: int) -> str:
    """Format a number of tokens."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if tokens >= size:
            return f"{tokens / size:,.2f} {name} tokens"
    return f"{tokens:,} tokens"


def say(name: str, text: str) -> None:
    """Print a line of the report."""
    print(f"{name:<12}{text}")


def say_what_is_left(run: Run, epoch: int | None, begin: float) -> None:
    """Print time, cost and milestones.

    epoch: tokens of an epoch, None if unknown; begin: the time that they count from, seconds since 1970.
    """
    seconds = max(begin + run.seconds_to(run.max_iters) - present, 0.0)
    say("time left" if run.done else "time", f"{duration(seconds)}, until {date(present + seconds)}")
    if price_per_hour is not None:
        hours = gpus * seconds / 3600
        say("cost", f"{hours * price_per_hour:,.2f} for {hours:,.1f} GPU-hours at {price_per_hour:,.2f}, on "
                    f"{gpus} GPU{'s' if gpus > 1 else ''}")
    print(f"\n{'step':>10}  {'date':<27}  {'from now':>12}  {'tokens':>22}")
    for step, names in sorted(milestones_of(run, epoch).items()):
        at = begin + run.seconds_to(step)
        print(f"{step:10,}  {date(at):<27}  {duration(at - present):>12}  {amount(step * run.tokens):>22}  "
              f"{', '.join(names)}")


def milestones_of(run: Run, epoch: int | None) -> dict[int, list[str]]:
    """Return the names of the milestones ahead by step. An epoch ends in the iteration before its step."""
    found = {}

    def add(name: str, steps: list[int]) -> None:
        for step in steps:
            found.setdefault(step, []).append(name)

    def multiples(interval: int) -> range:
        return range(max(run.seen // interval + 1, 1) * interval, run.max_iters + 1, interval)

    def first_and_last(numbers) -> list[int]:
        return sorted({*numbers[:milestones], *numbers[-1:]})

    add("evaluation", multiples(run.eval_interval)[:1])
    at_evaluations = multiples(run.eval_interval) if run.saves_at_evaluations else ()
    saves = heapq.merge(multiples(run.checkpoint_interval), at_evaluations)
    add(run.saves, first_and_last(sorted({*itertools.islice(saves, 2 * milestones), run.max_iters})))
    if epoch is not None:
        complete, total = run.done * run.tokens // epoch, run.max_iters * run.tokens // epoch
        for n in first_and_last(range(complete, total)):
            add(f"end of epoch {n}", [-(-(n + 1) * epoch // run.tokens)])
    add("end of training", [run.max_iters])
    return found


def say_what_took_how_long(run: Run, log: RunLog) -> None:
    """Print the speed of iterations, and the time of pauses and evaluations."""
    say("speed", f"{run.tokens / run.iteration:,.0f} tok/s, {1e3 * run.iteration:,.1f} ms an iteration: the "
                 f"median of the last {len(recent_speeds(log))} log lines")
    seconds, paused, evaluations = (sum(getattr(stretch, name) for stretch in stretches(log))
                                    for name in ("seconds", "paused", "evaluations"))
    if evaluations:
        text = f"{run.evaluation:,.1f} s an evaluation with what is saved then, mean of {evaluations}"
    else:
        text = "what evaluations take is not known yet, and not counted"
    say("pauses", f"{paused / seconds:.1%} of the time; {text}" if seconds > 0 else text)


if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently when `| head` closes the pipe
if run_log:
    if planning:
        raise UserError(f"--{planning[0]} is for a run that has not begun: what {run_log} does is in its log")
    log = RunLog.read(run_log)
    run, last = begun(log), log.events[-1]
    processes = log.last("start").get("environment", {}).get("world_size")
    if isinstance(processes, int) and not config.origin["gpus"]:
        gpus = processes
    ended, silent, heard = last["event"] == "end", silence(log), last["time"]
    say("run", f"{run_log}, begun {date(log.events[0]['time'])}")
    if ended:
        say("status", f"{last.get('status', 'ended')} {date(heard)}")
    else:
        say("status", silent or f"last heard of {duration(present - heard)} ago")
    say("done", f"{run.done:,} of {run.max_iters:,} iterations ({run.done / run.max_iters:.1%}), "
                f"{amount(run.done * run.tokens)}")
    say_what_took_how_long(run, log)
    if run.done < run.max_iters or not ended:
        epoch = epoch_tokens(log.config)
        if ended or silent:
            say("", "what is left, if it is resumed now:")
        say_what_is_left(run, epoch, present if ended or silent else heard)
else:
    if tokens_per_second is None:
        raise UserError("tokens_per_second is missing: give it as in --tokens_per_second=100_000 (bench.py "
                        "measures it), or give the out_dir of a run instead")
    run = planned(config, "the configuration")
    run.iteration, run.evaluation = run.tokens / tokens_per_second, seconds_per_evaluation or 0.0
    say("training", f"{run.max_iters:,} iterations of {run.tokens:,} tokens, "
                    f"{amount(run.max_iters * run.tokens)} in all")
    epoch = epoch_tokens(config)
    if epoch is not None:
        say("epochs", f"{run.max_iters * run.tokens / epoch:,.2f} of {amount(epoch)}")
    say("speed", f"{tokens_per_second:,.0f} tok/s, {1e3 * run.iteration:,.1f} ms an iteration, as given")
    count = run.evaluations(run.max_iters)
    if seconds_per_evaluation is None:
        say("evaluations", f"{count:,}, not counted without --seconds_per_evaluation")
    else:
        say("evaluations", f"{count:,} of {run.evaluation:g} s: {duration(count * run.evaluation)}")
    say("not counted", "starting, compiling, saving, interruptions")
    say_what_is_left(run, epoch, present)
