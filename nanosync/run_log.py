"""Read the logs of runs: run_<timestamp>.jsonl, one JSON object an event.

Nothing but numpy is imported: torch takes seconds to import, and a log does not need it.
"""

import contextlib
import glob
import json
import math
import os
from dataclasses import dataclass

import numpy as np

from nanosync.errors import UserError
from nanosync.files import check_json, open_regular
from nanosync.log_fields import EVALUATION_EVENTS, FIELDS, required_fields

MAX_LOG, MAX_LINE = 2**34, 2**24  # bytes
MOST = {"time": 1e11, "seconds": 1e11, "tokens_per_second": 1e18, "step": 2**53}  # of values from 0
MOST_OTHER = 1e100  # of the size of other numbers of FIELDS; fp32 ends at 3e38
NUMBERS = {*MOST, "reached", "resumed_step", *(field.name for field in FIELDS)}
TYPES = {"step": int, "resumed_step": int, "reached": int, "syncs": int, "text": str, "status": str,
         "config": dict, "environment": dict, "resumed": bool, "evaluated": bool}  # of entries, if present


@dataclass(frozen=True)
class RunLog:
    """The log of one run, all its restarts joined.

    path: the out_dir, or the one log, that was read; events: as `read_log` returns them.
    """

    path: str
    events: list[dict]

    @classmethod
    def read(cls, path: str) -> "RunLog":
        """Read an out_dir or one log. Raises UserError."""
        return cls(path, read_log(path))

    def of(self, kind: str) -> list[dict]:
        """Return all events of a kind."""
        return [event for event in self.events if event["event"] == kind]

    def last(self, kind: str) -> dict:
        """Return the last event of a kind, {} if the log has none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    def columns(self, kind: str, *names: str) -> dict[str, np.ndarray]:
        """Return fields of all events of a kind, an array of floats each; null is NaN."""
        return {name: np.array([event.get(name) for event in self.of(kind)], float) for name in names}

    @property
    def starts(self) -> list[dict]:
        """The start events: the first start, and each resume after it."""
        return self.of("start")

    @property
    def config(self) -> dict:
        """The settings of the newest start."""
        return self.starts[-1]["config"]

    @property
    def since_start(self) -> list[dict]:
        """The events from the newest start on."""
        index = max((i for i, event in enumerate(self.events) if event["event"] == "start"), default=0)
        return self.events[index:]


class LogTail:
    """The newest log of an out_dir, read while the run writes it."""

    def __init__(self, out_dir: str):
        """Open nothing yet: out_dir need not exist."""
        self.out_dir, self._file, self._partial = out_dir, None, b""

    def read(self) -> list:
        """Return the values of all lines completed since the last call, unchecked; skip lines that are not
        JSON."""
        if self._file is None:
            with contextlib.suppress(OSError):
                paths = log_paths(self.out_dir)
                self._file = open_regular(max(paths)) if paths else None
        if self._file is None:
            return []
        *lines, self._partial = (self._partial + self._file.read(4 * MAX_LINE)).split(b"\n")
        if len(self._partial) >= MAX_LINE:  # no line of ours
            self._partial = b""
        values = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
        return values


def read_log(path: str) -> list[dict]:
    """Return the events of one log, or of all logs in an out_dir joined into one run, oldest first.

    A resumed start replaces the earlier events of the steps that it repeats. Any other start discards all
    earlier events. Each start event gets the `path` of its log. Incomplete lines, such as the one that a run
    is writing, are left out, so the list may be empty. Raises UserError.
    """
    if os.path.isdir(path):
        paths = log_paths(path)
        if not paths:
            raise UserError(f"{path} has no run_*.jsonl: it is no out_dir of a training run")
    elif os.path.exists(path):
        paths = [path]
    else:
        raise UserError(f"there is no run in {path}: give the out_dir of a run or one of its run_*.jsonl")
    logs = []
    for path in paths:
        events = read_events(path)
        logs += [events] if events else []
        for event in events:
            if event["event"] == "start":
                event["path"] = path
    # sorted by the time in the log: a copied file has a new modification time
    logs.sort(key=lambda events: events[0]["time"])
    return join_starts([event for events in logs for event in events])


def log_paths(out_dir: str) -> list[str]:
    """Return the paths of all logs in an out_dir, unsorted."""
    return glob.glob(os.path.join(glob.escape(out_dir), "run_*.jsonl"))


def join_starts(events: list[dict]) -> list[dict]:
    """Join the events of all starts, of which the first event is one, into those of one run."""
    starts = [i for i, event in enumerate(events) if event["event"] == "start"]
    joined = []
    for begin, end in zip(starts, [*starts[1:], None]):
        start, part = events[begin], events[begin:end]
        if not start["resumed"]:
            joined = []
        elif "resumed_step" in start:
            joined = events_until(joined, start["resumed_step"], start["evaluated"])
        else:
            joined = _events_before(joined, part)
        again = {event["step"] for event in part if event["event"] == "checkpoint"}
        joined = [event for event in joined if event["event"] != "checkpoint" or event["step"] not in again]
        joined += part
    return joined


def events_until(events: list[dict], step: int, evaluated: bool) -> list[dict]:
    """Return the events that stay valid when a run resumes at `step`. The `end` event does not.

    evaluated: the step's evaluation was done before, and is not repeated.
    """
    at = ("checkpoint", *EVALUATION_EVENTS) if evaluated else ("checkpoint",)
    return [event for event in events if event["event"] != "end"
            and (event.get("step", -1) < step or (event["step"] == step and event["event"] in at))]


def _events_before(earlier: list[dict], events: list[dict]) -> list[dict]:
    """Return the events that stay valid before a resumed start without `resumed_step`, as earlier versions
    wrote it: the step is inferred from the events after the start."""
    later = {(event["event"], event["step"]) for event in events if event["event"] in ("iter", "eval")}
    first = min((step for _, step in later), default=math.inf)
    # a run resumes at an update, and the step's evaluation and checkpoint come before its update
    kept = ("eval", "checkpoint") if ("eval", first) not in later else ()
    return [event for event in earlier if event.get("step", -1) < first
            or (event["step"] == first and event["event"] in kept)]


def read_events(path: str) -> list[dict]:
    """Read and check the events of one log. Raises UserError."""
    events = []
    try:
        with open_regular(path) as f:
            if os.fstat(f.fileno()).st_size > MAX_LOG:
                raise UserError(f"{path} has more than {MAX_LOG:,} bytes: it is no log of a training run")
            for line in iter(lambda: f.readline(MAX_LINE), b""):
                if len(line) == MAX_LINE:
                    raise UserError(f"{path} is no log of a training run: a line has {MAX_LINE:,} bytes")
                try:
                    if line.endswith(b"\n"):
                        events.append(json.loads(line))
                except (ValueError, RecursionError):
                    if not events:
                        raise UserError(f"{path} is no log of a training run") from None
                    # any later line: a kill or a full disk cut it
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not all(_is_event(event) for event in events) or (events and events[0]["event"] != "start"):
        raise UserError(f"{path} is no log of a training run")
    return events


def _is_event(event) -> bool:
    """Return True for what a TrainingLogger writes: other programs, too, write lines with an "event"."""
    if not isinstance(event, dict) or type(event.get("event")) is not str:
        return False
    for name, value in event.items():
        kind = type(value)
        if name in TYPES and kind is not TYPES[name]:
            return False
        if name in NUMBERS and kind in (int, float) and not (0 <= value <= MOST[name] if name in MOST
                                         else -MOST_OTHER < value < MOST_OTHER):
            return False
    if event["event"] == "start":
        try:
            check_json([event["config"], event.get("environment")], "text")
        except (KeyError, ValueError):
            return False
        return type(event.get("time")) in (int, float) and "resumed" in event \
            and ("resumed_step" not in event or "evaluated" in event)
    if not str(event.get("status", "")).isprintable():
        return False
    return all(type(event.get(name, "")) in (int, float, type(None))
               for name in required_fields(event["event"]))
