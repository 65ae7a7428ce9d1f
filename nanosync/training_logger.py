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

from __future__ import annotations  # torch takes seconds to import; reading logs does not need it

import contextlib
import os
import socket
import time

from nanosync.errors import UserError
from nanosync.files import made_folder, replace_file, unused_path
from nanosync.log_fields import EVALUATION_EVENTS
from nanosync.log_sinks import _Console, _File, _finite, _line_of, _TensorBoard, _Wandb, check_installed
from nanosync.run_log import events_until, join_starts, log_paths, read_events


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
            reached = max((event["step"] if event["event"] in ("iter", *EVALUATION_EVENTS)
                           else event.get("reached", -1) for event in events), default=-1)
            start |= {"resumed_step": resumed_step, "evaluated": evaluated, "reached": reached}
            kept = events_until(join_starts(events), resumed_step, evaluated)
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
        for path in log_paths(out_dir):
            try:
                events = read_events(path)
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
                  mfu: float | None, epoch: int, memory: int | None = None, line: bool = True,
                  **fields: float) -> None:
        """Log an update. seconds, tokens: of one iteration; mfu: a share of 1, None if unknown; memory:
        the peak bytes of the GPU so far, None if unknown; line: print a line as well; fields: see
        log_fields.FIELDS."""
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
                   tokens_per_second=tokens / seconds, mfu=mfu, epoch=epoch, memory=memory, **fields)

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


class Stopwatch:
    """Seconds of training, which `pause` interrupts around evaluations and checkpoints."""

    def __init__(self):
        self._start, self._elapsed, self._running = time.perf_counter(), 0.0, True

    def pause(self) -> None:
        if self._running:
            self._elapsed += time.perf_counter() - self._start
            self._running = False

    def go_on(self) -> None:
        self._start, self._running = time.perf_counter(), True

    def lap(self) -> float:
        """Seconds since the last lap or the beginning, pauses left out."""
        now = time.perf_counter()
        seconds, self._elapsed = self._elapsed + now - self._start, 0.0
        self._start = now
        return seconds
