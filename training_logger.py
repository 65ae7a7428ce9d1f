"""What a run says, and reading it again: console and log.txt, JSON Lines, TensorBoard, wandb; MFU.

    out_dir/log.txt                  every printed line, also those from before the files are opened
    out_dir/run_<timestamp>.jsonl    one JSON object an event: start, source, schedule, iter, eval,
                                     checkpoint, hellaswag, sample, end; null stands for a number that is NaN
                                     or infinite, which JSON does not have
    out_dir/tensorboard/             curves, samples and hyperparameters, if asked for
    out_dir/wandb/, wandb_id         likewise
    out_dir/status.json              how the run is, for other programs

A run that is resumed goes on in the files of the one it continues, without the steps that it does again.
Nothing here stops a run: a console that goes away is done without, a full disk is tried again, a wandb that
fails is switched off. Only what cannot even start is a UserError. Only the main process logs, from one
thread. Times are wall-clock between two log lines, each of which reads the loss and so waits for the device.
"""

from __future__ import annotations  # torch takes seconds to import, and who only reads logs does without

import collections
import contextlib
import errno
import glob
import importlib
import json
import math
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import time
import typing

from configurator import UserError
from data.files import first_line, made_folder, replace_file, unused_path

if typing.TYPE_CHECKING:
    import torch

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
          "schedule": ("syncs",), "hellaswag": ("step", "acc", "acc_norm"), "sample": ("step",)}
# of the events, what TensorBoard and wandb show: curve, field, factor; each curve is of one kind of event, so
# that it has a step once
CURVES = {
    "iter": (("train/iter_loss", "loss", 1), ("lr", "lr", 1), ("norm", "norm", 1),
             ("tokens_per_second", "tokens_per_second", 1), ("mfu_percent", "mfu", 100),
             ("memory_gb", "memory", 1 / 2**30)),
    "eval": (("train/loss", "train_loss", 1), ("val/loss", "val_loss", 1)),
    "hellaswag": (("hellaswag/acc", "acc", 1), ("hellaswag/acc_norm", "acc_norm", 1)),
    "end": (("best_val_loss", "best_val_loss", 1),),
}
MAY_BE_UNKNOWN = ("mfu", "memory", "best_val_loss")  # null is no point; elsewhere it is a NaN
OF_AN_EVALUATION = ("eval", "hellaswag", "sample")
BACKLOG = 20_000  # lines, or records, that wait for a disk that is full
WANDB_SECONDS = 60.0  # to reach wandb at the start, and to send what is left at the end


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device reaches at most with matrices of this dtype, None if that is not known."""
    import torch

    return None if device.type != "cuda" else named_peak_flops(torch.cuda.get_device_name(device), dtype)


def named_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The same for a device's name. Every word counts: an H100 NVL, a MIG slice or a laptop's RTX 4090 is
    another device than the one that its name begins with.
    """
    import torch

    words = re.split(r"[ -]+", name.strip().upper())
    bare = " ".join(word for word in words if not BESIDE_THE_POINT.fullmatch(word))
    half, tf32 = PEAK_TFLOPS.get(bare, (None, None))
    tflops = half if dtype in (torch.bfloat16, torch.float16) else tf32
    if tflops is None or (dtype == torch.bfloat16 and bare in NO_BF16):
        return None
    return tflops * 1e12


def environment(device: torch.device) -> dict:
    """Versions, machine and git commit, for the log and the checkpoint."""
    import torch

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


def check_installed(tensorboard: bool = False, wandb: bool = False) -> None:
    """Raise UserError if a package is missing that is wanted; for before anything takes long."""
    for wanted, package, setting in ((tensorboard, "tensorboard", "use_tensorboard"),
                                     (wandb, "wandb", "wandb_log")):
        try:
            if wanted:
                importlib.import_module(package)
        except ImportError:
            raise UserError(f"{setting}=True needs the package {package}: pip install {package}, or use "
                            f"--{setting}=False") from None


class TrainingLogger:
    """Prints and writes what a run says; every method does nothing in processes that do not log."""

    def __init__(self, active: bool = True):
        """Only the console, until `open_files`."""
        self.active = active
        self._console = _Console()
        self._out_dir = self._text = self._events = self._tensorboard = self._wandb = None
        self._early = []  # lines from before there is a log.txt

    def open_files(self, out_dir: str, config: dict, environment: dict, resumed_step: int | None = None,
                   evaluated: bool = True, tensorboard: bool = False) -> None:
        """Write to out_dir as well from now on, with the lines so far first; log.txt is appended to.

        resumed_step: go on with the newest log in out_dir, if there is one, from that step; evaluated:
        whether the step's evaluation was done then. Events of what is done again are dropped. Raises
        UserError.
        """
        if not self.active:
            return
        if tensorboard:
            check_installed(tensorboard=True)
        start, path, kept = {"resumed": resumed_step is not None}, None, []
        if resumed_step is not None:
            path, events = self._newest_log(out_dir)
            reached = max((event["step"] if event["event"] in ("iter", *OF_AN_EVALUATION)
                           else event.get("reached", -1) for event in events), default=-1)
            start |= {"resumed_step": resumed_step, "evaluated": evaluated, "reached": reached}
            kept = _until(_joined(events), resumed_step, evaluated)
            if self._wandb is not None:
                self._wandb.skip_to(reached + 1)
        if path is None:
            path = unused_path(os.path.join(out_dir, time.strftime("run_%Y%m%d-%H%M%S")), ".jsonl")
        else:
            try:
                replace_file(path, b"".join(map(_line_of, kept)))
            except OSError as e:  # those who read it see by the start event which steps are done again
                self.line(f"warning: cannot write {path} anew ({e.strerror}): appending to it")
        try:
            os.makedirs(out_dir, exist_ok=True)
            self._text = _File(os.path.join(out_dir, "log.txt"), self._console.line)
            self._events = _File(path, self._console.line)
            if tensorboard:
                self._tensorboard = _TensorBoard(out_dir, self._console.line, config, kept, resumed_step)
        except OSError as e:
            raise UserError(f"cannot write {e.filename or out_dir}: {e.strerror}") from None
        self._out_dir = out_dir
        if resumed_step is None and self._wandb is None:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(out_dir, "wandb_id"))  # of an earlier run
        self._text.write("".join(line + "\n" for line in self._early).encode(errors="backslashreplace"))
        self.event("start", config=config, environment=environment, **start)

    def _newest_log(self, out_dir: str) -> tuple[str | None, list[dict]]:
        """Its path and events; None if there is none."""
        logs = []
        for path in _logs_in(out_dir):
            try:
                events = _read_events(path)
            except UserError as e:
                self.line(f"warning: {e}: leaving it as it is")
                continue
            if events:
                logs.append((events[0]["time"], path, events))
        return max(logs, key=lambda log: log[:2])[1:] if logs else (None, [])

    def start_wandb(self, project: str, name: str, config: dict, out_dir: str = ".", mode: str = "online",
                    resumed: bool = False) -> None:
        """Send events to Weights & Biases as well; to be called before `open_files`. Raises UserError.

        mode: 'online', or 'offline' (into out_dir/wandb); the environment's WANDB_MODE goes first. resumed:
        go on with the run of out_dir/wandb_id. Not reachable, it logs offline.
        """
        if not self.active:
            return
        check_installed(wandb=True)
        if mode not in ("online", "offline"):
            raise UserError(f"wandb_mode={mode!r} is unknown: use online or offline")
        mode = os.environ.get("WANDB_MODE") or mode
        if mode == "disabled":
            return
        with made_folder(out_dir):
            self._wandb = _Wandb(self.line, project, name, config, out_dir, mode, resumed)

    def begin(self, first_step: int, last_step: int) -> None:
        """The iterations begin: from now on they move a bar if the console is a terminal."""
        if self.active:
            self._console.begin(first_step, last_step)

    def line(self, text: str) -> None:
        """A line for people: console and log.txt."""
        if self.active:
            self._console.line(text)
            self._write_text(text)

    def _write_text(self, text: str) -> None:
        if self._text is None:
            self._early.append(text)
        else:
            self._text.write((text + "\n").encode(errors="backslashreplace"))

    def event(self, kind: str, **fields) -> None:
        """For programs: the JSON Lines file, TensorBoard, wandb."""
        if self._events is None:
            return
        event = _finite({"event": kind, "time": time.time(), **fields})
        self._events.write(_line_of(event))
        for sink in (self._tensorboard, self._wandb):
            if sink is not None:
                sink.event(event)

    def evaluation(self, step: int, train_loss: float, val_loss: float, lr: float) -> None:
        self.line(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        self.event("eval", step=step, train_loss=train_loss, val_loss=val_loss, lr=lr)

    def iteration(self, step: int, loss: float, lr: float, norm: float, seconds: float, tokens: int,
                  mfu: float | None, epoch: int, memory: int | None = None, line: bool = True) -> None:
        """seconds, tokens: of one iteration; mfu: a share of 1, None if unknown; memory: the most bytes of
        the GPU's so far, None if unknown; line: for people, too."""
        if not self.active:
            return
        shown = "n/a" if mfu is None else f"{100 * mfu:.2f}%"
        rest = f"tok/s {tokens / seconds:.0f}, mfu {shown}, epoch {epoch}"
        text = (f"iter {step}: loss {loss:.4f}, lr {lr:.1e}, norm {norm:.2f}, time {seconds * 1e3:.2f}ms, "
                f"{rest}")
        if self._console.has_bar:
            self._console.move(step + 1, f"loss {loss:.4f}, {rest}")
            if line:
                self._write_text(text)
        elif line:
            self.line(text)
        self.event("iter", step=step, loss=loss, lr=lr, norm=norm, seconds=seconds,
                   tokens_per_second=tokens / seconds, mfu=mfu, epoch=epoch, memory=memory)

    def checkpoint(self, step: int, path: str, val_loss: float | None, seconds: float) -> None:
        """val_loss: None if it was not measured; seconds: that training waited."""
        self.line(f"saved checkpoint {path}")
        self.event("checkpoint", step=step, path=path, val_loss=val_loss, seconds=seconds)

    def hellaswag(self, step: int, acc: float, acc_norm: float, n: int) -> None:
        self.line(f"step {step}: HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f} on {n}")
        self.event("hellaswag", step=step, acc=acc, acc_norm=acc_norm, n=n)

    def source(self, path: str) -> None:
        """The text of the script that runs, for log.txt and for programs; people have the file."""
        if not self.active:
            return
        with open(path, encoding="utf-8") as f:
            text = f.read()
        self._write_text(f"source of {path}:\n{text}")
        self.event("source", path=path, text=text)

    def sample(self, step: int, text: str) -> None:
        """What the model writes. People get it without what would steer a terminal."""
        shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
                        for c in text)
        self.line(f"step {step}: sample\n{shown}")
        self.event("sample", step=step, text=text)

    def status(self, status: str, step: int, **fields) -> None:
        """Write status.json. status: running, finished, interrupted, stopped, non_finite or failed; fields:
        max_iters, best_val_loss."""
        if self._out_dir is None:
            return
        path = os.path.join(self._out_dir, "status.json")
        value = {"status": status, "step": step, "max_iters": None, "best_val_loss": None, **fields,
                 "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        try:
            replace_file(path, _line_of(_finite(value)))
        except OSError as e:
            self.line(f"warning: cannot write {path}: {e.strerror}")

    def close(self, **summary) -> None:
        """End the logs, with a last event."""
        self.event("end", **summary)
        for sink in (self._wandb, self._tensorboard, self._events, self._text, self._console):
            if sink is not None:
                sink.close()
        self._out_dir = self._text = self._events = self._tensorboard = self._wandb = None


def _size(terminal) -> dict:
    """How large tqdm's bar may be: as the terminal is at each moment, or, if it does not tell, 120 wide."""
    try:
        known = all(os.get_terminal_size(terminal.fileno()))
    except OSError:
        known = False
    return dict(dynamic_ncols=True) if known else dict(ncols=120, nrows=24)


class _Console:
    """Standard output: lines and, on a terminal, a bar. When it goes away the run goes on without."""

    def __init__(self):
        self._bar, self._gone = None, False

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def begin(self, first: int, last: int) -> None:
        with contextlib.suppress(ImportError), self._surviving():
            if sys.stdout is not None and sys.stdout.isatty():
                from tqdm import tqdm

                self._bar = tqdm(initial=first, total=last, file=sys.stdout, miniters=1, **_size(sys.stdout))

    def move(self, done: int, text: str) -> None:
        """To `done` iterations, with a text behind."""
        with self._surviving():
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        if self._gone:
            return
        if not text.isascii():  # the console may know fewer characters
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            text = text.encode(encoding, "backslashreplace").decode(encoding)
        with self._surviving():
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    @contextlib.contextmanager
    def _surviving(self):
        """Give the console up at an error, but wait for one whose disk is full."""
        try:
            yield
        except (OSError, ValueError) as e:  # ValueError: closed
            if getattr(e, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN):
                self._give_up()

    def _give_up(self) -> None:
        """What others print, and what is flushed at exit, goes nowhere from now on."""
        self._gone = True
        if self._bar is not None:
            self._bar.disable, self._bar = True, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    def close(self) -> None:
        try:
            if self._bar is not None:
                self._bar.close()
            print(end="", flush=True)
        except (OSError, ValueError):
            self._give_up()  # it must not fail at exit either
        self._bar = None


class _File:
    """A file that grows by whole lines or records. What a full disk does not take waits and is tried again
    with what comes next; only opening raises OSError."""

    def __init__(self, path: str, warn):
        self.path, self._warn = path, warn
        self._waiting = collections.deque(maxlen=BACKLOG)
        self._file = open(path, "ab+", buffering=0)
        self._end = self._size()
        if self._end and os.pread(self._file.fileno(), 1, self._end - 1) != b"\n":  # a run was killed there
            self.write(b"\n")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> None:
        again = bool(self._waiting)
        self._waiting.append(data)
        try:
            if again:
                self._file.truncate(self._end)  # half a line may be there
            else:
                self._end = self._size()
            data = memoryview(b"".join(self._waiting))
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as e:
            if self._warn is not None:
                self._warn(f"warning: cannot write {self.path}: {e.strerror}; going on, and trying again")
            self._warn = None  # once
        else:
            self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self.write(b"")
        with contextlib.suppress(OSError):  # network file systems say only now that they are full
            self._file.close()


class _TensorBoard:
    """Curves, samples and hyperparameters in out_dir/tensorboard, a file for each start.

    One record has all curves of an event. torch's SummaryWriter makes one for each, at 13 times the cost, and
    hands them to a thread that dies of a full disk in the middle of a record.
    """

    def __init__(self, out_dir: str, warn, config: dict, kept: list[dict], resumed_step: int | None):
        """kept: the events so far of a run that is resumed."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        self._Event, self._Summary, self._crc = Event, Summary, masked_crc32c
        self._config = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                        for name, value in config.items() if value is not None}
        folder = os.path.join(out_dir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        # files are read in the order of their names, which a clock that was set back must not change
        earlier = re.findall(r"events\.out\.tfevents\.(\d{10})\.", "\n".join(sorted(os.listdir(folder))))
        stamp = max(int(time.time()), *(int(stamp) + 1 for stamp in earlier), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = _File(os.path.join(folder, name), warn)
        self._record(file_version="brain.Event:2")
        # hides what earlier files have of this step and later ones, provided that the first has a START, too
        since = resumed_step if earlier and resumed_step is not None else 0
        self._record(step=since, session_log=SessionLog(status=SessionLog.START))
        if since == 0:
            self._hyperparameters()
        for event in kept:
            if event.get("step", -1) >= since:
                self.event(event)

    def _record(self, wall_time: float | None = None, **fields) -> None:
        event = self._Event(wall_time=time.time() if wall_time is None else wall_time, **fields)
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        crc = (struct.pack("<I", self._crc(part)) for part in (length, data))
        self._file.write(length + next(crc) + data + next(crc))

    def _hyperparameters(self, ended_at: int | None = None) -> None:
        """For the HParams page, whose metrics are the last values of these curves."""
        from torch.utils.tensorboard.summary import hparams

        metrics = dict.fromkeys(("train/loss", "val/loss", "best_val_loss"))
        experiment, begin, end = hparams(self._config, metrics)
        for summary in (experiment, begin) if ended_at is None else (end,):
            self._record(step=ended_at, summary=summary)

    def event(self, event: dict) -> None:
        step, kind = event.get("step", 0), event["event"]
        values = [self._Summary.Value(tag=tag, simple_value=value) for tag, value in _curves(event).items()]
        if values:
            self._record(event["time"], step=step, summary=self._Summary(value=values))
        if kind == "sample":
            from torch.utils.tensorboard.summary import text

            lines = event["text"].encode(errors="backslashreplace").decode().replace("\n", "\n    ")
            self._record(event["time"], step=step, summary=text("sample", "    " + lines))  # Markdown: as is
        if kind == "end" and event.get("status", "finished") in ("finished", "stopped"):
            self._hyperparameters(step)  # another may go on yet

    def close(self) -> None:
        self._file.close()


class _Wandb:
    """A run of Weights & Biases. It takes no step again, so those that it has are not sent."""

    def __init__(self, warn, project: str, name: str, config: dict, out_dir: str, mode: str, resumed: bool):
        """Raises UserError."""
        import wandb

        id_path = os.path.join(out_dir, "wandb_id")
        self._warn, run_id = warn, _read_id(id_path) if resumed else None

        def init(mode: str):
            settings = wandb.Settings(init_timeout=WANDB_SECONDS)
            if hasattr(settings, "finish_timeout"):  # of newer versions
                settings.finish_timeout = WANDB_SECONDS
            resume = {} if run_id is None or mode == "offline" else {"resume": "allow"}  # offline cannot tell
            return wandb.init(project=project, name=name, config=dict(config), dir=out_dir, mode=mode,
                              id=run_id, settings=settings, allow_val_change=resumed, **resume)

        try:
            try:
                self._run = init(mode)
            except Exception as e:  # of wandb or of its HTTP library
                if mode == "offline" or _is_the_users(e):
                    raise
                warn(f"warning: wandb is not reachable ({first_line(e)}): logging offline, into "
                     f"{out_dir}/wandb")
                wandb.teardown()  # or the id is still in use
                self._run = init("offline")
        except Exception as e:
            raise UserError(f"wandb does not start ({first_line(e)}): run wandb login, or use "
                            f"--wandb_mode=offline or --wandb_log=False") from None
        self._next = self._run.step if run_id is not None else 0
        self._continues = run_id is not None
        try:
            replace_file(id_path, f"{self._run.id}\n".encode())
        except OSError as e:
            warn(f"warning: cannot write {id_path} ({e.strerror}): if resumed, this will be a new run there")

    def skip_to(self, step: int) -> None:
        """The log has steps before this one, and so has the run that is continued."""
        if self._continues:
            self._next = max(self._next, step)

    def event(self, event: dict) -> None:
        values, step = _curves(event), event.get("step", 0)
        if event["event"] == "sample":
            values["sample"] = event["text"]
        if event["event"] == "end":
            fields = {name: value for name, value in event.items() if name not in ("event", "time")}
            self._try(lambda: self._run.summary.update(fields))
        elif values and step >= self._next:
            self._try(lambda: self._run.log({"iter": step, **values}, step=step))

    def _try(self, function) -> None:
        """Switch off at an error; nothing that a run is watched with may stop it."""
        try:
            if self._run is not None:
                function()
        except Exception as e:
            self._warn(f"warning: wandb fails ({first_line(e)}): going on without")
            self._run = None

    def close(self) -> None:
        self._try(lambda: self._run.finish())


def _is_the_users(error: Exception) -> bool:
    """Whether the user can mend what wandb.init raised; otherwise it is the network's. By name, since where
    wandb has these classes changes."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"UsageError", "AuthenticationError", "ValueError", "TypeError"})


def _read_id(path: str) -> str | None:
    """The wandb run that an earlier process wrote down."""
    try:
        with open(path, encoding="utf-8") as f:
            found = re.fullmatch(r"[\w-]{1,64}", f.read(100).strip())
    except (OSError, ValueError):
        return None
    return found and found[0]


def _curves(event: dict) -> dict[str, float]:
    """What of an event is drawn, by the curve's name."""
    values = {}
    for tag, field, factor in CURVES.get(event["event"], ()):
        value = event.get(field)
        if value is not None:
            values[tag] = factor * value
        elif field not in MAY_BE_UNKNOWN:
            values[tag] = math.nan
    return values


def _finite(value):
    """A value in Python's own types, without the numbers that JSON does not have."""
    if hasattr(value, "item"):  # of numpy or torch
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _line_of(value: dict) -> bytes:
    return (json.dumps(value, allow_nan=False, default=str) + "\n").encode()


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

    A start that resumes replaces what was said before of the steps that are done again; one that does not
    starts over. Each start event has the `path` of its log. Lines that are not written to their end (the last
    may just be) are left out, so there may be no event at all. Raises UserError.
    """
    if os.path.isdir(path):
        paths = _logs_in(path)
        if not paths:
            raise UserError(f"{path} has no run_*.jsonl: it is no out_dir of a training run")
    else:
        paths = [path]
    logs = []
    for path in paths:
        events = _read_events(path)
        logs += [events] if events else []
        for event in events:
            if event["event"] == "start":
                event["path"] = path
    # by what they say: the times of files that were copied are all new
    logs.sort(key=lambda events: events[0]["time"])
    return _joined([event for events in logs for event in events])


def _logs_in(folder: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(folder), "run_*.jsonl"))


def _joined(events: list[dict]) -> list[dict]:
    """The events of one run from those of all its starts, the first of which is a start."""
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    joined = []
    for begin, end in zip(starts, [*starts[1:], None]):
        start, part = events[begin], events[begin:end]
        if not start["resumed"]:
            joined = []
        elif "resumed_step" in start:
            joined = _until(joined, start["resumed_step"], start["evaluated"])
        else:
            joined = _before(joined, part)
        again = {event["step"] for event in part if event["event"] == "checkpoint"}
        joined = [event for event in joined if event["event"] != "checkpoint" or event["step"] not in again]
        joined += part
    return joined


def _until(events: list[dict], step: int, evaluated: bool) -> list[dict]:
    """What still holds for a run that goes on at `step`, the evaluation of which it has done or has not. It
    did not end where it seemed to."""
    at = ("checkpoint", *OF_AN_EVALUATION) if evaluated else ("checkpoint",)
    return [event for event in events if event["event"] != "end"
            and (event.get("step", -1) < step or (event["step"] == step and event["event"] in at))]


def _before(earlier: list[dict], events: list[dict]) -> list[dict]:
    """The same where a start does not name its step, in logs of earlier versions: by what it goes on with."""
    said = {(event["event"], event["step"]) for event in events if event["event"] in ("iter", "eval")}
    first = min((step for _, step in said), default=math.inf)
    # a step's evaluation and checkpoint come before its update, which is where a run goes on
    kept = ("eval", "checkpoint") if ("eval", first) not in said else ()
    return [event for event in earlier if event.get("step", -1) < first
            or (event["step"] == first and event["event"] in kept)]


def _read_events(path: str) -> list[dict]:
    """The events of one log, checked. Raises UserError."""
    events = []
    try:
        with open(path, "rb") as f:
            for line in f:
                try:
                    if line.endswith(b"\n"):
                        events.append(json.loads(line))
                except (ValueError, RecursionError):
                    if not events:
                        raise UserError(f"{path} is no log of a training run") from None
                    # else a run was killed, or its disk full, in the middle of it
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not all(_is_event(event) for event in events) or (events and events[0]["event"] != "start"):
        raise UserError(f"{path} is no log of a training run")
    return events


def _is_event(event) -> bool:
    """Whether it has what a TrainingLogger writes. Other programs, too, write lines with an "event"."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] == "start":
        return isinstance(event.get("time"), (int, float)) and isinstance(event.get("config"), dict) \
            and isinstance(event.get("resumed"), bool) \
            and isinstance(event.get("resumed_step", 0), int) and isinstance(event.get("reached", 0), int) \
            and ("resumed_step" not in event or isinstance(event.get("evaluated"), bool))
    if not isinstance(event.get("step", 0), int) or not isinstance(event.get("text", ""), str):
        return False
    return all(isinstance(event.get(name, ""), (int, float, type(None)))
               for name in FIELDS.get(event["event"], ()))
