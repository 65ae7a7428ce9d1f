"""The shape that all modes of bench.py share: contenders, turns, a table, a JSON file.

A mode builds its contenders and warms them up. They take turns for `rounds` rounds after one that does not
count. A figure is the median over the rounds, printed with the range; the JSON file has all values.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanosync.distributed import Processes, barrier
from nanosync.files import write_result
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


def take_turns(turns: dict[str, Callable | None], rounds: int, group=None, uncounted: int = 1
               ) -> dict[str, list[float]]:
    """Let contenders take turns; return what each one's turns returned, in the order of the rounds.

    turns: name -> function that measures once, None where this process waits while other processes measure;
    the names and their order are the same on all processes of the group. uncounted: rounds before those that
    count.
    """
    figures = {name: [] for name in turns}
    for round_ in range(-uncounted, rounds):
        for name, turn in turns.items():
            barrier(group)
            if turn is None:
                continue
            figure = turn()
            if round_ >= 0:
                figures[name].append(figure)
    barrier(group)
    return figures


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
