"""The shape that all modes of bench.py share: contenders, turns, a table, a JSON file.

A mode builds its contenders and warms them up. They take turns for `rounds` rounds after one that does not
count. A figure is the median over the rounds, printed with the range; the JSON file has all values.
"""

import functools
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanosync.distributed import Processes, barrier
from nanosync.errors import UserError
from nanosync.files import first_line, write_result
from nanosync.hardware import environment


@dataclass(frozen=True)
class Bench:
    """The settings, the processes and the dtype of products that a mode measures with."""

    config: dict
    processes: Processes
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @functools.cached_property
    def environment(self) -> dict:
        return environment(self.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def machine(self) -> str:
        """The words of a heading that name the device, PyTorch's version and the dtype."""
        return f"{self.environment['device']}, torch {self.environment['torch']}, {self.dtype_name}"

    @property
    def architecture(self) -> dict:
        """The fields of GPTConfig that the settings name."""
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        return {name: self.config[name] for name in names}

    def write_json(self, **figures) -> None:
        """Write settings, environment and figures to the file that the setting `json` names, if it names one,
        on the main process. Its own path and the folders above a peer's are left out."""
        path, peer = self.config["json"], self.config["peer"]
        if path and self.processes.main:
            peer = os.path.basename(os.path.normpath(peer)) if peer else ""
            settings = {**self.config, "json": "", "peer": peer}
            write_result(path, {"config": settings, "environment": self.environment, **figures})


def take_turns(turns: dict[str, Callable | None], rounds: int, group=None, uncounted: int = 1,
               attempts: "Attempts | None" = None, after_round: Callable | None = None
               ) -> dict[str, list[float]]:
    """Let contenders take turns; return what each one's turns returned, in the order of the rounds.

    turns: name -> function that measures once, None where this process waits while other processes measure;
    the names and their order are the same on all processes of the group. uncounted: rounds before those that
    count. attempts: takes a contender whose turn fails out of the turns, and ends the rounds when the time is
    over; None: an error is an error. after_round: function of the figures so far.
    """
    turns, figures = dict(turns), {name: [] for name in turns}
    for round_ in range(-uncounted, rounds):
        if attempts is not None and round_ > 0 and attempts.late():
            break
        for name, turn in list(turns.items()):
            barrier(group)
            if turn is None:
                continue
            figure = turn() if attempts is None else attempts.run(name, turn)
            if figure is None:
                del turns[name]
            elif round_ >= 0:
                figures[name].append(figure)
        if after_round is not None and round_ >= 0:
            after_round(figures)
    barrier(group)
    return figures


class Attempts:
    """Runs what may fail, and watches the time. A contender that fails, or for which no time is left, gets a
    reason in `failures`, and the others continue. That needs one process: several would wait for each
    other."""

    def __init__(self, seconds: float = 0.0):
        """seconds: time after which nothing new begins, 0 for no limit."""
        self.seconds, self.started, self.failures = seconds, time.perf_counter(), {}

    def late(self, share: float = 1.0) -> bool:
        """Return True if a share of the time is over."""
        return 0 < share * self.seconds < time.perf_counter() - self.started

    def run(self, name: str, function: Callable, share: float | None = None):
        """Return the result of a function, None if it fails.

        share: of the time after which the function is not called, None to call it in any case.
        """
        if share is not None and self.late(share):
            self.fail(name, f"left out, {self.seconds:.0f} s are nearly over")
            return None
        try:
            return function()
        except UserError:
            raise
        except Exception as e:  # of a kernel, a compiler, or memory
            traceback.print_exc()
            self.fail(name, f"{type(e).__name__}: {first_line(e)[:300]}")
            return None

    def fail(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        print(f"{name}: {reason}", flush=True)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds_per_call(function: Callable, device: torch.device, calls: int = 1) -> float:
    """Time a function, with all work that it gives to the device."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def in_unit(unit: str, per_second: float, seconds: list[float]) -> dict:
    """Make the figures of a contender's times: their median, {unit: ...}, and all, {unit_all: ...}."""
    return {unit: per_second * statistics.median(seconds), f"{unit}_all": [per_second * s for s in seconds]}


def with_range(row: dict, unit: str, width: int, digits: int, label: str = "") -> str:
    """Format the median and the range of a figure of `in_unit` for a table."""
    low, high = min(row[f"{unit}_all"]), max(row[f"{unit}_all"])
    return f"{row[unit]:{width}.{digits}f}{label} ({low:.{digits}f}-{high:.{digits}f})"
