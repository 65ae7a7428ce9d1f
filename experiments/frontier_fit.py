"""The log losses of a frontier: an effect of the arm, one of the seed, and an error.

Runs with the same seed see the same data in the same order. What a seed does to all arms is no difference
between them, so the effects of arms and seeds are fitted together, by least squares (a randomised block
design with missing values). If all arms have the same seeds, the difference of two arms is that of their
means. The spread of the errors is pooled over all arms, or over those of a group of the protocol's
spread_groups and over the rest; then runs have weights by it, and a difference of arms in several groups has
Satterthwaite's degrees of freedom.
"""

import math
from collections import Counter

import numpy as np

from experiments.experiment_statistics import differ
from experiments.frontier_protocol import REST
from experiments.frontier_runs import FINISHED
from experiments.search_evidence import Ratio

SMALL = 1e-10  # what is smaller is a zero with rounding
LEAST_FREEDOM = 0.5  # degrees of freedom below which a spread is unknown
ROUNDS = 20  # of weights and spreads that follow from each other


class Fit:
    """The least squares fit of the finished runs.

    runs: see read_runs. groups: name -> arms. logs: arm -> its log losses. compared: arm -> number of its
    runs whose seed another arm has; the others say nothing about differences. spreads: group, REST for the
    arms in none -> standard deviation of the errors and its degrees of freedom; None if no runs tell, or if
    nothing is left for errors.
    """

    def __init__(self, runs: dict[tuple[str, int], dict], groups: dict[str, list[str]] | None = None):
        found = {key: math.log(run["val_loss"]) for key, run in runs.items() if run["status"] == FINISHED}
        self.logs: dict[str, list[float]] = {}
        for (arm, _), value in found.items():
            self.logs.setdefault(arm, []).append(value)
        of_seed = Counter(seed for _, seed in found)
        self.compared = {arm: sum(of_seed[seed] > 1 for name, seed in found if name == arm)
                         for arm in self.logs}
        self.arms = list(self.logs)
        columns = [(0, arm) for arm in self.arms] + [(1, seed) for seed in of_seed]
        design = np.array([[key[i] == one for i, one in columns] for key in found], float)
        self.design = design.reshape(len(found), len(columns))
        values = np.array([*found.values()])
        of_arm = {arm: name for name, arms in (groups or {}).items() for arm in arms}
        of_run = np.array([of_arm.get(arm, REST) for arm, _ in found])
        self.members = {name: of_run == name for name in (REST, *(groups or {})) if name in of_run}
        self.spreads: dict[str, tuple[float, float] | None] = {}
        for _ in range(ROUNDS if len(self.members) > 1 else 1):
            self._solve(values)

    def _solve(self, values: np.ndarray) -> None:
        """Fit, with runs weighted by the spreads of the last call, and estimate the spreads anew."""
        weights = np.ones(len(values))
        for name, told in self.spreads.items():
            if told:
                weights[self.members[name]] = 1 / told[0]
        left, scales, right = np.linalg.svd(self.design * weights[:, None], full_matrices=False)
        kept = scales > SMALL * scales.max(initial=0.0)
        self.inverse = (right[kept].T / scales[kept]) @ left[:, kept].T * weights
        self.effects = self.inverse @ values
        errors, largest = values - self.design @ self.effects, max(map(abs, values), default=0.0)
        freedom = 1 - np.einsum("ij,ji->i", self.design, self.inverse)  # of each run's error
        for name, runs_of in self.members.items():
            own, df = errors[runs_of], float(freedom[runs_of].sum())
            known = self.spreads.get(name, True)  # what was unknown once stays so
            told = known and df > LEAST_FREEDOM and differ([*own, 0.0], largest)
            self.spreads[name] = (math.sqrt(float(own @ own) / df), df) if told else None

    def contrast(self, weights: dict[str, float]) -> Ratio | None:
        """Return a sum of the arms' log losses with weights that add up to 0. Its error is NaN if a spread is
        unknown. None if an arm has no finished run, or if no chain of common seeds connects the arms."""
        if not all(arm in self.logs for arm in weights):
            return None
        wanted = np.zeros(self.design.shape[1])
        for arm, weight in weights.items():
            wanted[self.arms.index(arm)] += weight
        by_run = wanted @ self.inverse
        if not np.allclose(by_run @ self.design, wanted, atol=1e-9):
            return None
        parts = []  # of the variance, each with its degrees of freedom
        for name, runs_of in self.members.items():
            squares = float(by_run[runs_of] @ by_run[runs_of])
            if squares > SMALL:
                spread, df = self.spreads[name] or (math.nan, math.nan)
                parts.append((spread**2 * squares, df))
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / df for part, df in parts) if variance else math.nan
        return Ratio(float(wanted @ self.effects), math.sqrt(variance), freedom,
                     min(self.compared[arm] for arm, weight in weights.items() if weight))


def interval(ratio: Ratio | None) -> list[float] | None:
    """Return Student's 95% interval, None if the error is unknown."""
    return None if ratio is None or math.isnan(ratio.error) else list(ratio.interval())
