"""Schedules of a speedrun's training steps: the length of attended pieces, the layers that take part, stages
with a batch size and windows.

A schedule is made from a script's settings. Its state is part of a checkpoint.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from configurator import Config
from nanosync.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The computation of a step."""

    crop: int  # length of the pieces inside which tokens see each other, tokens
    layers: tuple[int, ...]  # numbers of the layers that take part


class Schedule:
    """The baseline: all layers on whole sequences in every step. Other schedules derive from it."""

    def __init__(self, config: Config):
        self.config = config
        self.full = Plan(config["sequence_length"], tuple(range(config["n_layer"])))

    def plan(self, step: int) -> Plan:
        """Return the plan of a step. The script calls it once for each step, in order."""
        return self.full

    def plans(self) -> list[Plan]:
        """Return every plan whose graph is compiled as a whole."""
        return [self.full]

    def observe(self, step: int, loss: float) -> None:
        """Take note of the train loss of a step, the same on all processes."""

    def state(self) -> dict:
        """Return the state for a checkpoint, as JSON values."""
        return {}

    def load(self, state: dict) -> None:
        """Load the state that `state` returned."""


class Curriculum(Schedule):
    """Short pieces first: attention runs inside pieces of `crop` tokens, and `crop` grows.

    The tokens of a step and their order are the baseline's. If crop does not divide a sequence, the sequence
    ends with a shorter piece. The next length begins after a share of the steps, or on a plateau. A plateau
    means that the mean loss of the last plateau_steps steps is less than plateau_gain below the mean loss of
    the plateau_steps steps before them.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        T = config["sequence_length"]
        self.lengths, shares = config["curriculum_lengths"], config["curriculum_shares"]
        if self.lengths is None:
            if T < 4:
                raise UserError(f"sequence_length={T} has no quarters: give curriculum_lengths")
            self.lengths = [T // 4, T // 2, T - T // 4, T]
        if shares is None:
            shares = [0.1 * (i + 1) for i in range(len(self.lengths) - 1)]
        if not all(type(n) is int and n > 0 for n in self.lengths) or self.lengths[-1:] != [T] \
                or sorted(set(self.lengths)) != self.lengths:
            raise UserError(f"curriculum_lengths={self.lengths} must be positive and rising, and end with "
                            f"sequence_length={T}")
        if len(shares) != len(self.lengths) - 1 \
                or not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares) \
                or sorted(shares) != shares:
            raise UserError(f"curriculum_shares={shares} must be {len(self.lengths) - 1} numbers from 0 to 1 "
                            f"that do not fall, one for each length but the last")
        self.latest = [round(share * config["num_iterations"]) for share in shares]
        self.stage, self.since, self.losses = 0, 0, []  # losses of the stage that began at step `since`

    def plan(self, step: int) -> Plan:
        while self.stage < len(self.latest) and (step >= self.latest[self.stage] or self.plateau(step)):
            self.stage, self.since, self.losses = self.stage + 1, step, []
        return Plan(self.lengths[self.stage], self.full.layers)

    def plateau(self, step: int) -> bool:
        """Return True on a plateau of the losses up to step - 2.

        Later losses may be pending or already known, depending on checkpoints, so they must not matter.
        """
        n, losses = self.config["curriculum_plateau_steps"], self.losses[:max(0, step - 1 - self.since)]
        if n == 0 or len(losses) < 2 * n:
            return False
        return sum(losses[-2 * n:-n]) / n - sum(losses[-n:]) / n < self.config["curriculum_plateau_gain"]

    def plans(self) -> list[Plan]:
        return [Plan(length, self.full.layers) for length in self.lengths]

    def observe(self, step: int, loss: float) -> None:
        if step >= self.since:
            self.losses.append(loss)

    def state(self) -> dict:
        return {"stage": self.stage, "since": self.since, "losses": self.losses}

    def load(self, state: dict) -> None:
        """Load the state that `state` returned. Raises UserError if it is malformed."""
        stage, since, losses = (state.get(name) for name in ("stage", "since", "losses"))
        if type(stage) is not int or not 0 <= stage < len(self.lengths) or type(since) is not int \
                or since < 0 or type(losses) is not list or not {type(loss) for loss in losses} <= {float}:
            raise UserError("the checkpoint's state of the curriculum is malformed: start a new run")
        self.stage, self.since, self.losses = stage, since, list(losses)


class DepthWarm(Schedule):
    """A warm-up of the depth: layers join one by one, from the bottom.

    A layer that has joined takes part in a step with a probability that grows to 1 (stochastic depth, arXiv
    1603.09382). Other layers are neither computed nor sent. A new layer adds zero to the residual stream at
    first, so the function does not change when it joins.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.first, L = config["depth_warm_layers"], config["n_layer"]
        if not 1 <= self.first <= L:
            raise UserError(f"depth_warm_layers={self.first} must be between 1 and n_layer={L}")
        for name in ("depth_warm_share", "depth_warm_survival"):
            if not 0 <= config[name] <= 1:
                raise UserError(f"{name}={config[name]} must be between 0 and 1")
        self.end = round(config["depth_warm_share"] * config["num_iterations"])  # of the warm-up

    def survival(self, layer: int, step: int) -> float:
        """Return the probability with which a layer takes part in a step."""
        if layer < self.first or step >= self.end:
            return 1.0
        joins = self.end * (layer - self.first + 1) / (self.config["n_layer"] - self.first + 1)
        if step < joins:
            return 0.0
        lowest = self.config["depth_warm_survival"]
        return lowest + (1 - lowest) * (step - joins) / (self.end - joins)

    def plan(self, step: int) -> Plan:
        random = np.random.RandomState([self.config["seed"] % 2**32, step])
        drawn = random.random_sample(len(self.full.layers))  # in [0, 1)
        return Plan(self.full.crop, tuple(i for i in self.full.layers if drawn[i] < self.survival(i, step)))


@dataclass(frozen=True)
class Stage:
    """A stretch of the steps with one batch size and one pair of windows."""

    begin: int  # first step
    end: int  # first step after it
    batch_size: int  # sequences
    windows: tuple[int, int]  # short, long
    rate: float
    number: int  # of its entries in the settings' lists


def stages_of(config: Config) -> list[Stage]:
    """Make the stages that the settings name; stages without a step are left out. Raises UserError."""
    names = ("stage_shares", "batch_sizes", "short_windows", "long_windows", "stage_rates")
    lists = [config[name] for name in names]
    if len({len(values) for values in lists}) != 1 or not lists[0]:
        raise UserError(", ".join(f"{name} has {len(config[name])}" for name in names) + " entries: give "
                        "each as many entries as there are stages")
    for name in names:
        kinds = (int,) if name in ("batch_sizes", "short_windows", "long_windows") else (int, float)
        if not all(type(value) in kinds and value > 0 for value in config[name]):
            raise UserError(f"{name}={config[name]} must be positive {'whole ' * (len(kinds) == 1)}numbers")
        if max(config[name]) > (most := 2**31 - 1 if len(kinds) == 1 else 10**6):
            raise UserError(f"{name}={config[name]} must be at most {most}")
    ends = [*itertools.accumulate(config["stage_shares"])]
    if not math.isclose(ends[-1], 1, abs_tol=1e-5):
        raise UserError(f"stage_shares={config['stage_shares']} must add up to 1")
    stages, begin = [], 0
    for number, (share, batch, short, long, rate) in enumerate(zip(ends, *lists[1:])):
        end = round(share / ends[-1] * config["num_iterations"])  # the last is exact
        if end > begin:
            stages.append(Stage(begin, end, batch, (short, long), rate, number))
        begin = end
    return stages
