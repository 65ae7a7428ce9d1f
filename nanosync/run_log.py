"""Read the logs of runs: run_<timestamp>.jsonl, one JSON object an event.

Torch is not imported: it takes seconds, and reading logs does not need it.
"""

import glob
import json
import math
import os

from nanosync.errors import UserError
from nanosync.log_fields import EVALUATION_EVENTS, required_fields


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
    at = ("checkpoint", *EVALUATION_EVENTS) if evaluated else ("checkpoint",)
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
               for name in required_fields(event["event"]))
