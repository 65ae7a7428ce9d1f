"""Where a run's log goes: console, files, TensorBoard, Weights & Biases.

None of them stops a run: if the console breaks, training continues; a full disk is tried again; wandb is
switched off if it fails.
"""

import collections
import contextlib
import errno
import importlib
import json
import math
import os
import re
import socket
import struct
import sys
import time

from nanosync.errors import UserError
from nanosync.files import first_line, replace_file
from nanosync.log_fields import curves_of

BACKLOG = 20_000  # lines, or records, that wait for a disk that is full
WANDB_SECONDS = 60.0  # to reach wandb at the start, and to send what is left at the end


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
        values = [self._Summary.Value(tag=tag, simple_value=value) for tag, value in curves_of(event).items()]
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
        values, step = curves_of(event), event.get("step", 0)
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
