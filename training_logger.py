"""What a run says: console and log.txt, JSON Lines, wandb; throughput, memory and MFU. And reading it again.

    out_dir/log.txt                  every printed line, also those from before the files are opened
    out_dir/run_<timestamp>.jsonl    one JSON object an event: start, schedule, iter, eval, checkpoint, end;
                                     null stands for a number that is NaN or infinite, which JSON does not
                                     have; a run that was resumed has a file for each time

Only the main process logs. Times are wall-clock between two log lines, each of which reads the loss and so
waits for the device.
"""

import glob
import json
import math
import os
import platform
import re
import subprocess
import time

import torch

from configurator import UserError
from data.files import unused_path

PEAK_TFLOPS = {  # dense, by what named_peak_flops leaves of a name: (bf16 and fp16, tf32); the data sheets
    "H200": (989.5, 494.7), "H100": (989.5, 494.7), "H100 PCIE": (756.0, 378.0), "GH200": (989.5, 494.7),
    "B200": (2250.0, 1125.0), "A100": (312.0, 156.0), "A100 PCIE": (312.0, 156.0), "A800": (312.0, 156.0),
    "A800 PCIE": (312.0, 156.0), "A10G": (70.0, 35.0), "L40S": (362.0, 183.0), "L4": (121.0, 60.0),
    "RTX 4090": (165.2, 82.6), "RTX 3090": (71.0, 35.6), "V100": (125.0, None), "V100 PCIE": (112.0, None),
    "T4": (65.0, None),
}
NO_BF16 = ("V100", "V100 PCIE", "T4")
# words of a name that change no peak: maker and family, memory, and the module of the fastest version
BESIDE_THE_POINT = re.compile(r"NVIDIA|GEFORCE|TESLA|\d+GB?|HBM3E?|SXM\d")

# of the events, what those who read them need: numbers or null, but for the start
FIELDS = {"iter": ("step", "loss", "lr", "norm", "seconds", "tokens_per_second", "mfu"),
          "eval": ("step", "train_loss", "val_loss", "lr"), "checkpoint": ("step", "val_loss"),
          "schedule": ("syncs",)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device reaches at most with matrices of this dtype, None if that is not known."""
    return None if device.type != "cuda" else named_peak_flops(torch.cuda.get_device_name(device), dtype)


def named_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The same for a device's name. Every word counts: an H100 NVL, a MIG slice or a laptop's RTX 4090 is
    another device than the one that its name begins with.
    """
    words = re.split(r"[ -]+", name.strip().upper())
    bare = " ".join(word for word in words if not BESIDE_THE_POINT.fullmatch(word))
    half, tf32 = PEAK_TFLOPS.get(bare, (None, None))
    tflops = half if dtype in (torch.bfloat16, torch.float16) else tf32
    if tflops is None or (dtype == torch.bfloat16 and bare in NO_BF16):
        return None
    return tflops * 1e12


def environment(device: torch.device) -> dict:
    """Versions, machine and git commit, for the log and the checkpoint."""
    root = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root,
                                timeout=10, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "python": platform.python_version(), "torch": torch.__version__, "git_commit": commit,
        "machine": platform.machine(), "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


class TrainingLogger:
    """Prints and writes what a run says; every method does nothing in processes that do not log."""

    def __init__(self, active: bool = True):
        """Only the console, until `open_files`."""
        self.active = active
        self._text = self._events = self._wandb = None
        self._early = []  # lines from before there is a log.txt

    def open_files(self, out_dir: str, config: dict, environment: dict, resumed: bool = False) -> None:
        """Write to out_dir as well from now on, with the lines so far first; log.txt is appended to."""
        if not self.active:
            return
        os.makedirs(out_dir, exist_ok=True)
        events = unused_path(os.path.join(out_dir, time.strftime("run_%Y%m%d-%H%M%S")), ".jsonl")
        self._text = open(os.path.join(out_dir, "log.txt"), "a", encoding="utf-8", buffering=1)
        self._events = open(events, "w", encoding="utf-8", buffering=1)
        self._text.writelines(line + "\n" for line in self._early)
        self.event("start", config=config, environment=environment, resumed=resumed)

    def start_wandb(self, project: str, name: str, config: dict) -> None:
        """Send evaluations and iterations to Weights & Biases as well. Raises UserError."""
        if not self.active:
            return
        try:
            import wandb

            self._wandb = wandb.init(project=project, name=name, config=config)
        except ImportError:
            raise UserError("wandb_log=True needs the package wandb: pip install wandb, or use "
                            "--wandb_log=False") from None
        except Exception as e:  # of wandb or of its HTTP library
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise UserError(f"wandb does not start ({reason}): run wandb login, or use "
                            f"--wandb_log=False") from None

    def line(self, text: str) -> None:
        """A line for people: console and log.txt."""
        if not self.active:
            return
        print(text, flush=True)
        if self._text is None:
            self._early.append(text)
        else:
            self._text.write(text + "\n")

    def event(self, kind: str, **fields) -> None:
        """A line for programs: the JSON Lines file."""
        if self._events is not None:
            fields = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in fields.items()}
            event = {"event": kind, "time": time.time(), **fields}
            self._events.write(json.dumps(event, allow_nan=False) + "\n")

    def evaluation(self, step: int, train_loss: float, val_loss: float, lr: float) -> None:
        self.line(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.event("eval", step=step, train_loss=train_loss, val_loss=val_loss, lr=lr)
        if self._wandb is not None:
            self._wandb.log({"iter": step, "train/loss": train_loss, "val/loss": val_loss, "lr": lr},
                            step=step)

    def iteration(self, step: int, loss: float, lr: float, norm: float, seconds: float, tokens: int,
                  mfu: float | None, epoch: int) -> None:
        """seconds, tokens: of one iteration; mfu: a share of 1, None if unknown."""
        shown = "n/a" if mfu is None else f"{100 * mfu:.2f}%"
        self.line(f"iter {step}: loss {loss:.4f}, lr {lr:.1e}, norm {norm:.2f}, time {seconds * 1e3:.2f}ms, "
                  f"tok/s {tokens / seconds:.0f}, mfu {shown}, epoch {epoch}")
        self.event("iter", step=step, loss=loss, lr=lr, norm=norm, seconds=seconds,
                   tokens_per_second=tokens / seconds, mfu=mfu, epoch=epoch)
        if self._wandb is not None:
            self._wandb.log({"iter": step, "train/iter_loss": loss, "lr": lr, "norm": norm,
                             "tok/s": tokens / seconds, "mfu": 100 * (mfu or 0.0)}, step=step)

    def close(self, **summary) -> None:
        """End the logs, with a last event."""
        self.event("end", **summary)
        if self._wandb is not None:
            self._wandb.finish()
        for file in (self._text, self._events):
            if file is not None:
                file.close()
        self._text = self._events = self._wandb = None


class Stopwatch:
    """Seconds of training, which `pause` interrupts around evaluations and checkpoints."""

    def __init__(self):
        self._start, self._elapsed = time.perf_counter(), 0.0

    def pause(self) -> None:
        self._elapsed += time.perf_counter() - self._start

    def go_on(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or the beginning, pauses left out."""
        now = time.perf_counter()
        seconds, self._elapsed = self._elapsed + now - self._start, 0.0
        self._start = now
        return seconds


def read_log(path: str) -> list[dict]:
    """The events of one log, or of all logs in an out_dir as those of one run, oldest first.

    A log that resumes replaces what those before it say of the steps it does again; one that does not starts
    over. Each start event has the `path` of its log. A last line that is not written to its end yet is left
    out, so there may be no event at all. Raises UserError.
    """
    if os.path.isdir(path):
        logs = glob.glob(os.path.join(glob.escape(path), "run_*.jsonl"))
        if not logs:
            raise UserError(f"{path} has no run_*.jsonl: it is no out_dir of a training run")
    else:
        logs = [path]
    joined = []
    # by what they say: the times of files that were copied are all new
    logs = (events for events in map(_read_events, logs) if events)
    for events in sorted(logs, key=lambda events: events[0]["time"]):
        joined = _before(joined, events) + events if events[0]["resumed"] else events
    return joined


def _before(earlier: list[dict], events: list[dict]) -> list[dict]:
    """What of the earlier events still holds for a run that was resumed and then said `events`."""
    said = {(event["event"], event["step"]) for event in events if event["event"] in ("iter", "eval")}
    first = min((step for _, step in said), default=math.inf)
    # a step's evaluation and checkpoint come before its update, which is where a run goes on
    kept = ("eval", "checkpoint") if ("eval", first) not in said else ()
    return [event for event in earlier if event.get("step", -1) < first
            or (event["step"] == first and event["event"] in kept)]


def _read_events(path: str) -> list[dict]:
    """The events of one log, checked."""
    events = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.endswith("\n"):
                    events.append(json.loads(line))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is no log of a training run: {e}") from None
    if not all(_is_event(event) for event in events) or (events and events[0]["event"] != "start"):
        raise UserError(f"{path} is no log of a training run")
    if events:
        events[0]["path"] = path
    return events


def _is_event(event) -> bool:
    """Whether it has what a TrainingLogger writes. Other programs, too, write lines with an "event"."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] == "start":
        return isinstance(event.get("time"), (int, float)) and isinstance(event.get("config"), dict) \
            and isinstance(event.get("resumed"), bool)
    if not isinstance(event.get("step", 0), int):
        return False
    return all(isinstance(event.get(name, ""), (int, float, type(None)))
               for name in FIELDS.get(event["event"], ()))
