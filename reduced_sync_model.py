"""Sync strategies: named schedules by which tensor-parallel ranks synchronise less often.

    strategy    all-reduces of a forward pass after                                      L = 12
    standard    every attention and every MLP                                            24
    spd         every MLP (Sync-Point Drop, arXiv 2502.20727)                            12
    selective   every MLP, and the attention of the layers in attn_sync_layers           12 + their number
    grouped     the MLP of every k-th layer, k = layers_per_group                        12 / k
    custom      the sublayers in sync_points (2i: attention, 2i + 1: MLP of layer i)     their number, + 1 if
                                                                                         the last is not one
All strategies have the parameters of the dense GPT, but only `standard` computes the same function. So train
a model with the strategy with which it will run; see tensor_parallel_model.py.
"""

import math
from dataclasses import dataclass

from nanosync.distributed import env_rank
from nanosync.errors import UserError
from nanosync.ranks import Ranks
from nanosync.sync_schedule import SyncSchedule
from tensor_parallel_model import DistributedGPT, RanksConfig

STRATEGIES = {  # name -> function of the configuration that returns the sublayers to synchronise after
    "standard": lambda c: range(2 * c.n_layer),
    "spd": lambda c: range(1, 2 * c.n_layer, 2),
    "selective": lambda c: [*range(1, 2 * c.n_layer, 2), *(2 * i for i in c.attn_sync_layers or [])],
    "grouped": lambda c: range(2 * c.layers_per_group - 1, 2 * c.n_layer, 2 * c.layers_per_group),
    "custom": lambda c: c.sync_points or [],
}


@dataclass
class GPTConfig(RanksConfig):
    """RanksConfig and a sync strategy. Raises UserError if the strategy does not fit the layers."""

    sync_strategy: str = "standard"
    attn_sync_layers: list | None = None  # selective: layers that sync after attention, too; None: no layer
    layers_per_group: int = 2  # grouped
    sync_points: list | None = None  # custom: sublayers after which to synchronise; None: only at the end

    def __post_init__(self):
        super().__post_init__()
        if self.sync_strategy not in STRATEGIES:
            raise UserError(f"sync_strategy={self.sync_strategy!r} is unknown: use {', '.join(STRATEGIES)}")
        if self.sync_strategy == "grouped" and (self.layers_per_group < 1
                                                or self.n_layer % self.layers_per_group):
            raise UserError(f"layers_per_group={self.layers_per_group} does not divide "
                            f"n_layer={self.n_layer}: choose a divisor")
        for name, strategy, count in (("attn_sync_layers", "selective", self.n_layer),
                                      ("sync_points", "custom", 2 * self.n_layer)):
            numbers = getattr(self, name)
            if numbers is not None and self.sync_strategy != strategy:
                raise UserError(f"{name}={numbers} is for sync_strategy={strategy!r}, but sync_strategy is "
                                f"{self.sync_strategy!r}: leave {name} out, or change sync_strategy")
            for number in numbers or []:
                if type(number) is not int or not 0 <= number < count:
                    raise UserError(f"{name} has {number!r}: with n_layer={self.n_layer} its entries must be "
                                    f"whole numbers from 0 to {count - 1}")

    def schedule(self) -> SyncSchedule:
        return SyncSchedule.at(self.n_layer, STRATEGIES[self.sync_strategy](self))


class GPT(DistributedGPT):
    """DistributedGPT with the schedule of a strategy. It prints how often it synchronises."""

    def __init__(self, config: GPTConfig, ranks: Ranks | None = None, announce: bool = True):
        """Build the model. ranks: see DistributedGPT; announce: True to print `announcement` on rank 0."""
        super().__init__(config, ranks)
        if announce and env_rank() == 0:
            print(self.announcement(), flush=True)

    def announcement(self) -> str:
        return (f"Sync strategy: {self.config.sync_strategy}\n"
                f"Synchronization points per forward pass: {self.syncs} (baseline {2 * self.config.n_layer})")


def parse_stop_if(text: str) -> tuple[float, float]:
    """Parse a step and a loss, '5000:3.8' -> (5000, 3.8); '' means never. Raises UserError."""
    if not text:
        return math.inf, math.inf
    step, colon, loss = text.partition(":")
    try:
        if not colon or int(step) < 0 or not math.isfinite(float(loss)):
            raise ValueError
        return int(step), float(loss)
    except ValueError:
        raise UserError(f"stop_if={text!r} is not a step and a loss: write it as in --stop_if=5000:3.8"
                        ) from None
