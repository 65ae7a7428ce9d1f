"""Sync strategies: named schedules by which tensor-parallel ranks synchronise less often.

    strategy    all-reduces of a forward pass after                                      L = 12
    standard    every attention and every MLP                                            24
    spd         every MLP (Sync-Point Drop, arXiv 2502.20727)                            12
    selective   every MLP, and the attention of the layers in attn_sync_layers           12 + their number
    grouped     the MLP of every k-th layer, k = layers_per_group                        12 / k
    custom      the sublayers in sync_points (2i: attention, 2i + 1: MLP of layer i)     their number, + 1 if
                                                                                         the last is not one
    palm        every MLP, which does not see its layer's attention (PaLM, GPT-J)        12
    ladder      every sublayer; the sum lands one sublayer later, and ranks do not see   23
                what is in flight (arXiv 2501.06589)
    kraken      every MLP; the sum lands after the next attention (arXiv 2408.07802)     12
    dtp:d       every sublayer; the sum lands d sublayers later, but at once after the   24 - d
                first d sublayers
    mean:k      the MLP of every k-th layer; ranks see their pending sums times R        12 / k
    caat:p      every sublayer, in a share p of the channels; ranks see the others       24, each of p C
                times sqrt(R) until the end (arXiv 2506.19645)                           channels; the last: C

Sums that land after the last sublayer share one all-reduce. R = tp_size, C = n_embd. All strategies have the
parameters of the dense GPT, but only `standard` computes the same function. So train a model with the
strategy with which it will run; see tensor_parallel_model.py and nanosync/sync_schedule.py.
"""

import math
from dataclasses import dataclass

from nanosync.distributed import env_rank
from nanosync.errors import UserError
from nanosync.ranks import Ranks
from nanosync.sync_schedule import Sublayer, SyncSchedule, width
from tensor_parallel_model import DistributedGPT, RanksConfig

STRATEGIES = {  # name -> function of the configuration that returns the sublayers to synchronise after
    "standard": lambda c: range(2 * c.n_layer),
    "spd": lambda c: range(1, 2 * c.n_layer, 2),
    "selective": lambda c: [*range(1, 2 * c.n_layer, 2), *(2 * i for i in c.attn_sync_layers or [])],
    "grouped": lambda c: range(2 * c.layers_per_group - 1, 2 * c.n_layer, 2 * c.layers_per_group),
    "custom": lambda c: c.sync_points or [],
}
PRESETS = {  # name -> function of the configuration that returns a whole schedule
    "palm": lambda c: SyncSchedule((Sublayer(False), Sublayer(True, sees=0.0)) * c.n_layer),
    "ladder": lambda c: SyncSchedule((Sublayer(True, delay=1, sees=0.0),) * (2 * c.n_layer)),
    "kraken": lambda c: SyncSchedule((Sublayer(False), Sublayer(True, delay=1)) * c.n_layer),
}
NUMBERED = {  # name -> (type of the number after the colon, what it must be, function of both)
    "dtp": (int, lambda c, d: 1 <= d < 2 * c.n_layer, "a delay from 1 to {last} sublayers", lambda c, d:
            SyncSchedule((Sublayer(True),) * d + (Sublayer(True, delay=d),) * (2 * c.n_layer - d))),
    "mean": (int, lambda c, k: k >= 1 and c.n_layer % k == 0, "a divisor of n_layer={layers}", lambda c, k:
             SyncSchedule(tuple(Sublayer(j % (2 * k) == 2 * k - 1, sees=float(c.tp_size))
                                for j in range(2 * c.n_layer)))),
    "caat": (float, lambda c, p: p == 1 or 0 < round(p * c.n_embd) < c.n_embd,
             "a share of the channels, above 0 and at most 1, which is some of n_embd={channels}",
             lambda c, p: SyncSchedule((Sublayer(True, sees=c.tp_size**0.5),) * (2 * c.n_layer), channels=p)),
}
NAMES = ", ".join((*STRATEGIES, *PRESETS, "dtp:2", "mean:3", "caat:0.5"))


def named_schedule(config: RanksConfig, strategy: str) -> SyncSchedule:
    """Make the schedule of a strategy by its name, for the configuration's sizes. Raises UserError."""
    number = number_of(config, strategy)
    if strategy in STRATEGIES:
        return SyncSchedule.at(config.n_layer, STRATEGIES[strategy](config))
    if strategy in PRESETS:
        return PRESETS[strategy](config)
    return NUMBERED[strategy.partition(":")[0]][-1](config, number)


def check_strategy(strategy: str) -> None:
    """Raise UserError for the name of a strategy that does not exist."""
    if strategy not in (*STRATEGIES, *PRESETS) and strategy.partition(":")[0] not in NUMBERED:
        raise UserError(f"sync_strategy={strategy!r} is unknown: use {NAMES}")


def number_of(config: RanksConfig, strategy: str) -> int | float | None:
    """Return the number in a strategy's name, None for a name without one. Raises UserError for a strategy
    that does not exist, or whose number does not fit the configuration's sizes."""
    check_strategy(strategy)
    if strategy in (*STRATEGIES, *PRESETS):
        return None
    name, _, text = strategy.partition(":")
    kind, fits, meaning, _ = NUMBERED[name]
    try:
        number = kind(text) if text.isascii() else None
    except ValueError:
        number = None
    if number is None or not math.isfinite(number) or not fits(config, number):
        meaning = meaning.format(last=2 * config.n_layer - 1, layers=config.n_layer,
                                 channels=config.n_embd)
        raise UserError(f"sync_strategy={strategy!r} needs {meaning} after a colon, as in {NAMES}")
    return number


@dataclass
class GPTConfig(RanksConfig):
    """RanksConfig and a sync strategy. Raises UserError if the strategy does not fit the layers."""

    sync_strategy: str = "standard"
    attn_sync_layers: list | None = None  # selective: layers that sync after attention, too; None: no layer
    layers_per_group: int = 2  # grouped
    sync_points: list | None = None  # custom: sublayers after which to synchronise; None: only at the end

    def __post_init__(self):
        super().__post_init__()
        number_of(self, self.sync_strategy)
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
        return named_schedule(self, self.sync_strategy)


class GPT(DistributedGPT):
    """DistributedGPT with the schedule of a strategy. It prints how often it synchronises."""

    def __init__(self, config: GPTConfig, ranks: Ranks | None = None, announce: bool = True):
        """Build the model. ranks: see DistributedGPT; announce: True to print `announcement` on rank 0."""
        super().__init__(config, ranks)
        if announce and env_rank() == 0:
            print(self.announcement(), flush=True)

    def announcement(self) -> str:
        L, C = self.config.n_layer, self.config.n_embd
        W = width(self.schedule.channels, C)
        return (f"Sync strategy: {self.config.sync_strategy}\n"
                f"Synchronization points per forward pass: {self.syncs} (baseline {2 * L})"
                + (f"\nSynchronised channels: {W} of {C}, at the end all" if W < C else ""))


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
