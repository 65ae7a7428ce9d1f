"""Sync schedules: after which sublayers the tensor-parallel ranks of a model add up their pending sums."""

from dataclasses import dataclass

from nanosync.errors import UserError


@dataclass(frozen=True)
class Sublayer:
    """The communication after an attention or an MLP."""

    sync: bool  # True: all ranks add up their pending sums


@dataclass(frozen=True)
class SyncSchedule:
    """One entry per sublayer: attention of layer 0, MLP of layer 0, attention of layer 1, ..."""

    sublayers: tuple[Sublayer, ...]

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
