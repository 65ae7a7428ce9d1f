"""Sync schedules: after which sublayers the tensor-parallel ranks of a model add up their pending sums, when
the sums arrive, and what ranks see of what they have not added up.

A sublayer that synchronises sends a packet: what is pending on each rank, in the first `channels` channels.
The packets of all ranks are added up and land in the base `delay` sublayers later. A rank's unsent sums are
what is pending and what is in flight.
"""

import math
from dataclasses import dataclass

from nanosync.errors import UserError, shown


@dataclass(frozen=True)
class Sublayer:
    """The communication after an attention or an MLP."""

    sync: bool  # True: what is pending is sent after it
    delay: int = 0  # sublayers that run between sending and landing
    sees: float = 1.0  # weight of the rank's own unsent sums in what THIS sublayer reads; 0: only the base

    def __post_init__(self):
        if type(self.sync) is not bool:
            raise UserError(f"sync={shown(self.sync)} must be True or False")
        if type(self.delay) is not int or self.delay < 0:
            raise UserError(f"delay={shown(self.delay)} must be a whole number of sublayers, 0 or more")
        if type(self.sees) not in (int, float) or not math.isfinite(self.sees):
            raise UserError(f"sees={shown(self.sees)} must be a finite number")


@dataclass(frozen=True)
class Step:
    """The packets of a sublayer. SyncSchedule.steps makes them."""

    lands: tuple[int, ...]  # packets in flight that land before it, by their places in the order of sending
    sees: float  # weight of the unsent sums that it reads
    sync: bool  # True: a packet is sent after it
    apart: bool  # False: no sublayer reads its output before it lands, so local ranks' outputs may be summed
    channels: float  # of the schedule


@dataclass(frozen=True)
class SyncSchedule:
    """One entry per sublayer: attention of layer 0, MLP of layer 0, attention of layer 1, ..."""

    sublayers: tuple[Sublayer, ...]
    channels: float = 1.0  # share of the channels that are synchronised; the others are only at the end

    def __post_init__(self):
        if type(self.channels) not in (int, float) or not 0 < self.channels <= 1:
            raise UserError(f"channels={shown(self.channels)} must be above 0 and at most 1")

    @classmethod
    def at(cls, n_layer: int, points) -> "SyncSchedule":
        """Make the schedule that synchronises after the sublayers in `points`, from 0 to 2 n_layer - 1."""
        points = set(points)
        return cls(tuple(Sublayer(j in points) for j in range(2 * n_layer)))

    @classmethod
    def evenly(cls, n_layer: int, syncs: int) -> "SyncSchedule":
        """Make the schedule of equally spaced syncs. Raises UserError if their number does not fit."""
        if syncs < 1 or 2 * n_layer % syncs:
            raise UserError(f"{syncs} syncs do not divide the {2 * n_layer} sublayers of n_layer={n_layer}")
        return cls.at(n_layer, range(2 * n_layer // syncs - 1, 2 * n_layer, 2 * n_layer // syncs))

    @classmethod
    def from_block_types(cls, block_types: list[str]) -> "SyncSchedule":
        """Make the schedule of a kind of block per layer: 'tp' synchronises after attention and MLP, 'spd'
        after the MLP, a run of 'parallel' blocks at its end."""
        points = []
        for i, kind in enumerate(block_types):
            run_continues = kind == "parallel" and block_types[i + 1:i + 2] == ["parallel"]
            points += [2 * i] * (kind == "tp") + [2 * i + 1] * (not run_continues)
        return cls.at(len(block_types), points)

    @property
    def points(self) -> list[int]:
        """Numbers of the sublayers after which ranks synchronise."""
        return [j for j, sublayer in enumerate(self.sublayers) if sublayer.sync]

    @property
    def unsynchronised(self) -> list[int]:
        """Numbers of the sublayers after which ranks do not synchronise."""
        return [j for j, sublayer in enumerate(self.sublayers) if not sublayer.sync]

    @property
    def is_plain(self) -> bool:
        """True if sums land at once, in all channels, and every sublayer sees its rank's unsent sums."""
        pending, plain = False, self.channels == 1
        for sublayer in self.sublayers:
            plain = plain and sublayer.delay == 0 and (sublayer.sees == 1 or not pending)
            pending = not sublayer.sync
        return plain

    @property
    def is_dense(self) -> bool:
        """True if the schedule computes the dense model's function at any number of ranks."""
        return self.is_plain and not self.unsynchronised

    def steps(self) -> tuple[Step, ...]:
        """Return what each sublayer does with packets, for schedules that are not plain."""
        flight, pending, kept = [], [], []  # packets (first sublayer that sees the sum, outputs); outputs
        lands, packets, read = [], [], set()
        for j, sublayer in enumerate(self.sublayers):
            due = tuple(i for i, (at, _) in enumerate(flight) if at <= j)
            lands.append(due)
            flight = [packet for i, packet in enumerate(flight) if i not in due]
            if sublayer.sees != 0:
                read |= {*pending, *kept, *(output for _, outputs in flight for output in outputs)}
            pending = [*pending, j]
            kept = [*kept, j] if self.channels < 1 else []
            if sublayer.sync:
                flight.append((j + 1 + sublayer.delay, pending))
                packets.append(pending)
                pending = []
        apart = {j for sums in (*packets, pending, kept) if read & set(sums) for j in sums}
        return tuple(Step(due, sublayer.sees, sublayer.sync, j in apart, self.channels)
                     for j, (due, sublayer) in enumerate(zip(lands, self.sublayers)))

    def read_before_landing(self) -> list[int]:
        """Return the numbers of the sublayers whose bias ranks read as a part of their own stream, so that
        its gradient is partial on real ranks."""
        if self.is_plain:
            return self.unsynchronised
        if self.channels < 1:
            return list(range(len(self.sublayers)))
        return [j for j, step in enumerate(self.steps()[1:]) if not step.lands]


def width(channels: float, C: int) -> int:
    """Return the number of channels that are synchronised, 1 to C."""
    return min(C, max(1, round(channels * C)))
