"""The log losses of a frontier: an effect of the arm, one of the seed, and an error.

Runs with the same seed see the same data in the same order. What a seed does to all arms is no difference
between them, so the effects of arms and seeds are fitted together, by least squares (a randomised block
design with missing values). The spread of the errors is pooled over all arms. If all arms have the same
seeds, the difference of two arms is that of their means.
"""

import math
from collections import Counter

import numpy as np

from experiments.experiment_statistics import differ
from experiments.frontier_runs import FINISHED
from experiments.search_evidence import Ratio

SMALL = 1e-10  # of the largest singular value: smaller ones are zeros with rounding


class Fit:
    """The least squares fit of the finished runs.

    runs: see read_runs. logs: arm -> its log losses. compared: arm -> number of its runs whose seed another
    arm has; the others say nothing about differences. spread: the standard deviation of the errors and its
    degrees of freedom; None if no runs tell, or if nothing is left for errors.
    """

    def __init__(self, runs: dict[tuple[str, int], dict]):
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
        left, scales, right = np.linalg.svd(self.design, full_matrices=False)
        kept = scales > SMALL * scales.max(initial=0.0)
        self.inverse = (right[kept].T / scales[kept]) @ left[:, kept].T
        values = np.array([*found.values()])
        self.effects = self.inverse @ values
        errors = values - self.design @ self.effects
        freedom = len(found) - int(kept.sum())
        self.spread = None
        if freedom and differ(errors, max(map(abs, values))):
            self.spread = math.sqrt(float(errors @ errors) / freedom), freedom

    def contrast(self, weights: dict[str, float]) -> Ratio | None:
        """Return a sum of the arms' log losses with weights that add up to 0. Its error is NaN without a
        spread. None if an arm has no finished run, or if no chain of common seeds connects the arms."""
        if not all(arm in self.logs for arm in weights):
            return None
        wanted = np.zeros(self.design.shape[1])
        for arm, weight in weights.items():
            wanted[self.arms.index(arm)] += weight
        by_run = wanted @ self.inverse
        if not np.allclose(by_run @ self.design, wanted, atol=1e-9):
            return None
        spread, freedom = self.spread or (math.nan, math.nan)
        return Ratio(float(wanted @ self.effects), spread * math.sqrt(float(by_run @ by_run)), freedom,
                     min(self.compared[arm] for arm, weight in weights.items() if weight))


def interval(ratio: Ratio | None) -> list[float] | None:
    """Return Student's 95% interval, None if the error is unknown."""
    return None if ratio is None or math.isnan(ratio.error) else list(ratio.interval())
