"""Destinations of a run's log: console, files, TensorBoard, Weights & Biases.

None of them stops a run. If stdout breaks, training continues. If a disk is full, lines wait and are written
later. If wandb fails, it is switched off.
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
from nanosync.files import first_line, open_regular, replace_file
from nanosync.log_fields import curves_of
from nanosync.wandb_files import next_step

BACKLOG = 20_000  # pending lines or records of a file on a full disk
WANDB_SECONDS = 60.0  # limit for reaching wandb at the start, and for sending the rest at the end


def check_installed(tensorboard: bool = False, wandb: bool = False) -> None:
    """Raise UserError if a wanted package is not installed. Scripts call it before any slow work."""
    for wanted, package, setting in ((tensorboard, "tensorboard", "use_tensorboard"),
                                     (wandb, "wandb", "wandb_log")):
        try:
            if wanted:
                importlib.import_module(package)
        except ImportError:
            raise UserError(f"{setting}=True needs the package {package}: pip install {package}, or use "
                            f"--{setting}=False") from None


def _size(terminal) -> dict:
    """Return tqdm's arguments for the size of its bar: the terminal's, or 120 columns if it is unknown."""
    try:
        known = all(os.get_terminal_size(terminal.fileno()))
    except OSError:
        known = False
    return dict(dynamic_ncols=True) if known else dict(ncols=120, nrows=24)


class _Console:
    """Standard output: lines and, on a terminal, a bar. If stdout breaks, training continues."""

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
        """Move the bar to `done` iterations, followed by a text."""
        with self._surviving():
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        if self._gone:
            return
        if not text.isascii():  # escape characters that the console's encoding lacks
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
        """Give up the console if the body fails, but not if a disk is full, which may pass."""
        try:
            yield
        except (OSError, ValueError) as e:  # ValueError: closed
            if getattr(e, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN):
                self._give_up()

    def _give_up(self) -> None:
        """Discard everything that the process prints from now on, and what is flushed at exit."""
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
            self._give_up()  # the flush at exit must not fail
        self._bar = None


class _File:
    """A file that grows by whole lines or records.

    On a full disk the data waits and is written with the next data. A file that is deleted meanwhile is
    written anew, with all its content. Only opening the file raises OSError.
    """

    def __init__(self, path: str, warn):
        self.path, self._warn, self._say = path, warn, warn
        self._waiting = collections.deque(maxlen=BACKLOG)
        self._file = open(path, "ab+", buffering=0)
        self._end = self._size()
        # the last line is cut off if an earlier run was killed
        if self._end and os.pread(self._file.fileno(), 1, self._end - 1) != b"\n":
            self.write(b"\n")

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _is_gone(self) -> bool:
        """Return True if the path does not lead to the open file any more."""
        here = os.fstat(self._file.fileno())
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return True
        except OSError:  # an error of the file system, which may pass
            return False
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def _write_anew(self) -> None:
        """Copy the content of the open file, which has no name any more, to a new file. Raises OSError."""
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        new = open(self.path, "ab+", buffering=0)
        try:
            if os.fstat(new.fileno()).st_size == 0:  # else another program has put its own file there
                self._file.seek(0)
                while piece := self._file.read(2**20):
                    if new.write(piece) < len(piece):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            new.truncate(0)
            new.close()
            raise
        self._file.close()
        self._file = new
        self._say(f"warning: {self.path} was deleted or replaced: it is written anew")

    def write(self, data: bytes) -> None:
        again = bool(self._waiting)
        self._waiting.append(data)
        try:
            if again:
                self._file.truncate(self._end)  # remove a line that was written in part
            if self._is_gone():
                self._write_anew()
            self._end = self._size()
            data = memoryview(b"".join(self._waiting))
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as e:
            if self._warn is not None:
                self._warn(f"warning: cannot write {self.path}: {e.strerror}; training continues, and the "
                           f"next line tries again")
            self._warn = None  # once
        else:
            self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self.write(b"")
        with contextlib.suppress(OSError):  # a full network file system may fail only on close
            self._file.close()


class _TensorBoard:
    """Curves, samples and hyperparameters in out_dir/tensorboard, in a new file for each start.

    One record has all curves of an event. torch's SummaryWriter makes one record per curve, at 13 times the
    cost, and writes them in a thread that a full disk ends in the middle of a record.
    """

    def __init__(self, out_dir: str, warn, config: dict, kept: list[dict], resumed_step: int | None):
        """Open a new file. Raises OSError.

        warn: function that prints a line. config: settings. kept: earlier events of a resumed run.
        resumed_step: step of the checkpoint, None for a new run.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        self._Event, self._Summary, self._crc = Event, Summary, masked_crc32c
        self._config = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                        for name, value in config.items() if value is not None}
        folder = os.path.join(out_dir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        # TensorBoard reads files in the order of their names, so a clock that was set back must not matter
        earlier = re.findall(r"events\.out\.tfevents\.(\d{10})\.", "\n".join(sorted(os.listdir(folder))))
        stamp = max(int(time.time()), *(int(stamp) + 1 for stamp in earlier), 0)
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = _File(os.path.join(folder, name), warn)
        self._record(file_version="brain.Event:2")
        # START hides this step and later steps of earlier files, provided that the first file has a START
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
        """Write the records of the HParams page. ended_at: last step of the run, None at its start.

        The page's metrics are the last values of the curves named here.
        """
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
            self._record(event["time"], step=step, summary=text("sample", "    " + lines))  # Markdown's code
        if kind == "end" and event.get("status", "finished") in ("finished", "stopped"):
            self._hyperparameters(step)  # not after other ends, as the run may be resumed

    def close(self) -> None:
        self._file.close()


class _Wandb:
    """A run of Weights & Biases. wandb rejects a step that it has already, so these steps are not sent."""

    def __init__(self, warn, project: str, name: str, config: dict, out_dir: str, mode: str, resumed: bool):
        """Start the run, or resume the run of out_dir/wandb_id if `resumed`. Raises UserError.

        warn: function that prints a line. mode: 'online' or 'offline'.
        """
        import wandb

        id_path = os.path.join(out_dir, "wandb_id")
        self._warn, run_id = warn, _read_id(id_path) if resumed else None
        in_files = None if run_id is None else next_step(out_dir, run_id)

        def init(mode: str):
            settings = wandb.Settings(init_timeout=WANDB_SECONDS)
            if hasattr(settings, "finish_timeout"):  # newer versions of wandb only
                settings.finish_timeout = WANDB_SECONDS
            resume = {} if run_id is None or mode == "offline" else {"resume": "allow"}  # needs the network
            return wandb.init(project=project, name=name, config=dict(config), dir=out_dir, mode=mode,
                              id=run_id, settings=settings, allow_val_change=resumed, **resume)

        try:
            try:
                self._run = init(mode)
            except Exception as e:  # any type, from wandb or its HTTP library
                if mode == "offline" or _user_can_fix(e):
                    raise
                warn(f"warning: wandb is not reachable ({first_line(e)}): logging offline, into "
                     f"{out_dir}/wandb")
                wandb.teardown()  # frees the id
                mode, self._run = "offline", init("offline")
        except Exception as e:
            raise UserError(f"wandb cannot start ({first_line(e)}): run wandb login, or use "
                            f"--wandb_mode=offline or --wandb_log=False") from None
        self._continues, self._next = run_id is not None, 0  # _next: first step to send, None if unknown
        if self._continues:
            self._next = in_files if mode == "offline" else self._run.step
        try:
            replace_file(id_path, f"{self._run.id}\n".encode())
        except OSError as e:
            warn(f"warning: cannot write {id_path} ({e.strerror}): a resumed run will be a new wandb run")

    def fill(self, kept: list[dict], reached: int) -> None:
        """Send the steps of the log that the resumed wandb run lacks, e.g. because the run was killed.

        kept: events before the checkpoint. reached: last step in the log; wandb has it if nothing is known.
        """
        if not self._continues:
            return
        self._next = reached + 1 if self._next is None else self._next
        for event in kept:
            if event["event"] != "end":
                self.event(event)

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
        """Call function(). Switch wandb off if it fails, because logging must not stop a run."""
        try:
            if self._run is not None:
                function()
        except Exception as e:
            self._warn(f"warning: wandb fails ({first_line(e)}): training continues without wandb")
            self._run = None

    def close(self) -> None:
        self._try(lambda: self._run.finish())


def _user_can_fix(error: Exception) -> bool:
    """Return True if the user can fix an error of wandb.init, False for an error of the network.

    Types are compared by name, because wandb moves these classes between modules.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"UsageError", "AuthenticationError", "ValueError", "TypeError"})


def _read_id(path: str) -> str | None:
    """Read the id of a wandb run from a file, None if it has no valid id."""
    try:
        with open_regular(path, "r", encoding="utf-8") as f:
            found = re.fullmatch(r"[\w-]{1,64}", f.read(100).strip())
    except (OSError, ValueError):
        return None
    return found and found[0]


def _finite(value):
    """Convert a value to Python's own types, with None for numbers that are NaN or infinite."""
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _line_of(value: dict) -> bytes:
    """Make a line of JSON Lines."""
    return (json.dumps(value, allow_nan=False, default=str) + "\n").encode()
