"""The progress of runs that train, by their logs."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import TYPE_CHECKING

from experiments.experiment_config import finite
from nanosync.run_log import LogTail

if TYPE_CHECKING:
    from experiments.runner import Job, Running

MALFORMED_EVENT_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError)


class RunProgress:
    """Step and val loss of a run that trains, by the events in its log so far."""

    def __init__(self, out_dir: str):
        self._tail = LogTail(out_dir)
        self.step, self.val_loss, self.val_step, self.first = 0, None, None, None  # first: (time, step)

    def update(self) -> None:
        """Read the new events. A malformed one is skipped here, and judged when the run has ended."""
        for event in self._tail.read():
            with contextlib.suppress(*MALFORMED_EVENT_ERRORS):
                self._take(event)

    def _take(self, event: dict) -> None:
        if event["event"] == "iter":
            self.step = int(event["step"]) + 1
            self.first = self.first or (time.monotonic(), self.step)
        elif event["event"] == "eval":
            self.val_loss, self.val_step = finite(event["val_loss"]), int(event["step"])

    def seconds_left(self, steps: int) -> float | None:
        """Estimate the seconds left, evaluations included; None before the second step."""
        if self.first is None or self.step <= self.first[1]:
            return None
        return (steps - self.step) * (time.monotonic() - self.first[0]) / (self.step - self.first[1])


class ProgressBar:
    """The progress of all runs: a bar on a terminal; in a file a line at evaluations, at most one in `EVERY`.
    """

    EVERY = 10.0  # seconds

    def __init__(self, steps: int):
        self.bar, self.total, self.walls, self._printed = None, steps, [], {}
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, file=sys.stdout)

    def say(self, text: str) -> None:
        """Print a line above the bar; for ExperimentLogger's `say`."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def show(self, done: int, running: list[Running], waiting: list[Job], parallel: int) -> None:
        """Show the steps of all runs. done: the steps of the runs that have ended."""
        left = self._left(running, waiting, parallel)
        for run in running:
            run.progress.update()
            now, key = run.progress, id(run)
            last, step = self._printed.get(key, (-self.EVERY, None))
            if now.val_step is not None and now.val_step != step and time.monotonic() > last + self.EVERY:
                self._printed[key] = time.monotonic(), now.val_step
                loss = "none" if now.val_loss is None else f"{now.val_loss:.4f}"
                text = f"{run.job.name}: step {now.val_step}/{run.job.steps}, val loss {loss}{left}"
                run.job.log.note(text)
                if self.bar is None:
                    self.say(text)
        if self.bar is not None:
            self.bar.n = done + sum(run.progress.step for run in running)
            losses = (f"run {run.job.run_id} {run.progress.val_loss:.4f}" for run in running
                      if run.progress.val_loss is not None)
            self.bar.set_postfix_str(", ".join(losses) + left)

    def _left(self, running: list[Running], waiting: list[Job], parallel: int) -> str:
        """Return ', h:mm:ss left', or '' while that is unknown."""
        lefts = [run.progress.seconds_left(run.job.steps) for run in running]
        known = [left for left in lefts if left is not None]
        if not known:
            return ""
        if waiting and not self.walls:  # no run has ended: assume that waiting runs take as long as these
            per_run = max(time.monotonic() - run.started + left for run, left in zip(running, lefts)
                          if left is not None)
        else:
            per_run = sum(self.walls) / max(len(self.walls), 1)
        seconds = round(max(known) + per_run * math.ceil(len(waiting) / parallel))
        return f", {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
