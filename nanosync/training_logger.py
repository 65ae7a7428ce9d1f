"""The log of a run: console, log.txt, JSON Lines, TensorBoard, wandb.

    out_dir/log.txt                  every printed line, including those from before the files are open
    out_dir/run_<timestamp>.jsonl    one JSON object per event: start, source, schedule, iter, eval,
                                     checkpoint, hellaswag, sample, end; null for a number that is NaN or
                                     infinite, which JSON cannot express
    out_dir/tensorboard/             curves, samples and hyperparameters, with use_tensorboard
    out_dir/wandb/, wandb_id         files of wandb and the id of its run, with wandb_log
    out_dir/status.json              the run's state, for other programs

A resumed run appends to the files of the run that it continues, and removes the lines and events of repeated
steps. No
destination of the log stops a run, see log_sinks.py. A destination that cannot start raises UserError. Only
the main process logs, from one thread. Times are wall-clock seconds between two iterations. Reading the loss
of an iteration waits for the device.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from nanosync.errors import UserError
from nanosync.files import made_folder, replace_file, unused_path
from nanosync.log_fields import EVALUATION_EVENTS
from nanosync.log_sinks import _Console, _File, _finite, _line_of, _TensorBoard, _Wandb, check_installed
from nanosync.log_text import evaluation_line, lines_until, shown_sample
from nanosync.run_log import events_until, join_starts, log_paths, read_events


class TrainingLogger:
    """Writer of a run's log. Every method does nothing in processes that do not log."""

    def __init__(self, active: bool = True):
        """Log to the console only, until `open_files`. active: True on the process that logs."""
        self.active = active
        self._console = _Console()
        self._out_dir = self._text = self._events = self._tensorboard = self._wandb = None
        self._early = []  # lines from before log.txt is open

    def open_files(self, out_dir: str, config: dict, environment: dict, resumed_step: int | None = None,
                   evaluated: bool = True, tensorboard: bool = False, epoch: int = 0) -> None:
        """Write to files in out_dir from now on, the earlier lines first. Append to log.txt.

        Raises UserError.

        resumed_step: step of the checkpoint. The newest log in out_dir, if any, continues from that step, and
            its later events are dropped, and later lines of log.txt. None for a new run.
        evaluated: True if the evaluation of resumed_step was done before the checkpoint.
        tensorboard: also write out_dir/tensorboard.
        epoch: epoch of the checkpoint.
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
            samples = {event["step"]: event["text"] for event in events if event["event"] == "sample"}
            self._drop_lines(os.path.join(out_dir, "log.txt"), resumed_step, evaluated, epoch, samples)
            if self._wandb is not None:
                self._wandb.fill(kept, reached)
        if path is None:
            path = unused_path(os.path.join(out_dir, time.strftime("run_%Y%m%d-%H%M%S")), ".jsonl")
        else:
            try:
                replace_file(path, b"".join(map(_line_of, kept)))
            except OSError as e:  # readers find the repeated steps through the start event
                self.line(f"warning: cannot write a new {path} ({e.strerror}): appending to the old file")
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

    def _drop_lines(self, path: str, *resumed) -> None:
        """Remove the lines of log.txt that a resumed run repeats, and a last line that a kill cut off.

        resumed: arguments of lines_until.
        """
        try:
            with open(path, "rb") as f:
                *lines, _ = f.read().decode(errors="surrogateescape").split("\n")
            kept = "".join(line + "\n" for line in lines_until(lines, *resumed))
            replace_file(path, kept.encode(errors="surrogateescape"))
        except FileNotFoundError:
            return
        except OSError as e:
            self.line(f"warning: cannot write a new {path} ({e.strerror}): it has repeated steps twice")

    def _newest_log(self, out_dir: str) -> tuple[str | None, list[dict]]:
        """Return path and events of the newest log in out_dir, (None, []) if out_dir has no log."""
        logs = []
        for path in log_paths(out_dir):
            try:
                events = read_events(path)
            except UserError as e:
                self.line(f"warning: {e}: the file is ignored")
                continue
            if events:
                logs.append((events[0]["time"], path, events))
        return max(logs, key=lambda log: log[:2])[1:] if logs else (None, [])

    def start_wandb(self, project: str, name: str, config: dict, out_dir: str = ".", mode: str = "online",
                    resumed: bool = False) -> None:
        """Send events to Weights & Biases from now on; call it before `open_files`. Raises UserError.

        If wandb is not reachable, the run logs offline.

        mode: 'online', or 'offline' (into out_dir/wandb). WANDB_MODE in the environment overrides it.
        resumed: True to resume the wandb run of out_dir/wandb_id.
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
        """Show a bar that iterations move, if stdout is a terminal."""
        if self.active:
            self._console.begin(first_step, last_step)

    def line(self, text: str) -> None:
        """Write a line to the console and to log.txt."""
        if self.active:
            self._console.line(text)
            self._write_text(text)

    def _write_text(self, text: str) -> None:
        if self._text is None:
            self._early.append(text)
        else:
            self._text.write((text + "\n").encode(errors="backslashreplace"))

    def event(self, kind: str, **fields) -> None:
        """Write an event to the JSON Lines file, TensorBoard and wandb."""
        if self._events is None:
            return
        event = _finite({"event": kind, "time": time.time(), **fields})
        self._events.write(_line_of(event))
        for sink in (self._tensorboard, self._wandb):
            if sink is not None:
                sink.event(event)

    def evaluation(self, step: int, train_loss: float, val_loss: float, lr: float,
                   bits_per_byte: float | None = None) -> None:
        """Log losses, nats per token. bits_per_byte: of the val loss, None if unknown."""
        self.line(evaluation_line(step, train_loss, val_loss, bits_per_byte))
        bits = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
        self.event("eval", step=step, train_loss=train_loss, val_loss=val_loss, lr=lr, **bits)

    def iteration(self, step: int, loss: float, lr: float, norm: float, seconds: float, tokens: int,
                  mfu: float | None, epoch: int, memory: int | None = None, line: bool = True,
                  **fields: float) -> None:
        """Log an update.

        seconds, tokens: of one iteration.
        mfu: share of 1, None if unknown.
        memory: peak of the GPU's memory so far, bytes, None if unknown.
        line: True to print a line.
        fields: further fields, see log_fields.FIELDS.
        """
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
        """Log a saved checkpoint.

        val_loss: of its step, None if not measured. seconds: time for which training waited.
        """
        self.line(f"saved checkpoint {path}")
        self.event("checkpoint", step=step, path=path, val_loss=val_loss, seconds=seconds)

    def hellaswag(self, step: int, acc: float, acc_norm: float, n: int) -> None:
        self.line(f"step {step}: HellaSwag acc {acc:.4f}, acc_norm {acc_norm:.4f} on {n}")
        self.event("hellaswag", step=step, acc=acc, acc_norm=acc_norm, n=n)

    def source(self, path: str) -> None:
        """Log the text of the script that runs, in log.txt and as an event, not on the console."""
        if not self.active:
            return
        with open(path, encoding="utf-8") as f:
            text = f.read()
        self._write_text(f"source of {path}:\n{text}")
        self.event("source", path=path, text=text)

    def sample(self, step: int, text: str) -> None:
        """Log a generated text. Control characters are escaped in its line, but not in its event."""
        self.line(f"step {step}: sample\n{shown_sample(text)}")
        self.event("sample", step=step, text=text)

    def status(self, status: str, step: int, **fields) -> None:
        """Write status.json.

        status: running, finished, interrupted, stopped, non_finite or failed. fields: max_iters,
        best_val_loss and further entries.
        """
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
        """Write the end event and close all files. summary: fields of the event."""
        self.event("end", **summary)
        for sink in (self._wandb, self._tensorboard, self._events, self._text, self._console):
            if sink is not None:
                sink.close()
        self._out_dir = self._text = self._events = self._tensorboard = self._wandb = None


class Stopwatch:
    """Clock of the seconds of training, paused during evaluations and checkpoints."""

    def __init__(self):
        self._start, self._elapsed, self._running = time.perf_counter(), 0.0, True

    def pause(self) -> None:
        if self._running:
            self._elapsed += time.perf_counter() - self._start
            self._running = False

    def resume(self) -> None:
        self._start, self._running = time.perf_counter(), True

    def lap(self) -> float:
        """Return the seconds since the last lap or the start, without pauses."""
        now = time.perf_counter()
        seconds, self._elapsed = self._elapsed + now - self._start, 0.0
        self._start = now
        return seconds
