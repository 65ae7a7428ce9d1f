"""What a few runs say about a mean, and about the difference of two: the statistics of all experiments.

Runs that differ in their seed only are taken for independent draws of a normal distribution; with 2 to 5 of
them all intervals are Student's. `python experiments/simulate.py` checks by simulation that they hold what
they promise. A run that failed is in none of these samples.

Where runs do not differ at all there is no spread to judge by: intervals and p-values are then None, not 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

CONFIDENCE = 0.95
MOST_RUNS = 1000  # that `runs_needed` looks at


def _quadrature(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles and their weights, whose sum is 1: a mean over a distribution."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


_QUANTILES, _WEIGHTS = _quadrature(200)


def describe(values: list[float]) -> dict:
    """mean, std (of a sample), min, max, median, ci_95 of the mean; None where too few values say nothing."""
    if not len(values):
        return dict.fromkeys(("mean", "std", "min", "max", "median", "ci_95"))
    x = np.asarray(values, float)
    interval = mean_interval(values)
    return {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if len(x) > 1 else None,
            "min": float(x.min()), "max": float(x.max()), "median": float(np.median(x)),
            "ci_95": None if interval is None else list(interval)}


def differ(values) -> bool:
    """Whether there is a spread; rounding of equal values is none."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * max(map(abs, values))


def mean_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the mean; None if the values do not differ."""
    if not differ(values):
        return None
    x = np.asarray(values, float)
    half = stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def p_at_most(values: list[float], target: float | None) -> float | None:
    """p of the one-sided t-test for a mean of at most `target`: how likely so low a mean is if the true one
    is the target; None if the values do not differ, or there is no target."""
    if target is None or not differ(values):
        return None
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def power_at_most(mean: float, std: float, n: int, target: float, alpha: float) -> float:
    """With what probability n such runs pass that test at level alpha."""
    return _beyond(stats.t.ppf(1 - alpha, n - 1), n - 1, (target - mean) / std * math.sqrt(n))


def _beyond(critical: float, df: float, shift: float) -> float:
    """P(T > critical) of the noncentral t distribution: the mean, over the spread that a sample may have, of
    what the normal distribution gives. scipy's own nct is NaN in the tails of few degrees of freedom."""
    spread = np.sqrt(stats.chi2.ppf(_QUANTILES, df) / df)
    return float(_WEIGHTS @ special.ndtr(shift - critical * spread))


def runs_needed(mean: float, std: float | None, target: float | None, alpha: float = 0.01, power: float = 0.8
                ) -> int | None:
    """The fewest runs that pass that test with this power, if mean and std are the true ones; None if the
    mean is not below the target, if there is none, no spread to reckon with, or if MOST_RUNS do not do."""
    if not std or target is None or mean >= target:
        return None
    return next((n for n in range(2, MOST_RUNS + 1)
                 if power_at_most(mean, std, n, target, alpha) >= power), None)


@dataclass(frozen=True)
class Difference:
    """Of two means, b - a: negative if b's loss is lower. None: no spread to judge by."""

    mean: float
    interval: tuple[float, float] | None  # of 95%
    p: float | None  # two-sided
    df: float | None
    n: tuple[int, int]


def welch(a: list[float], b: list[float]) -> Difference:
    """Welch's t-test, for samples whose spreads need not be the same."""
    mean, n = float(np.mean(b) - np.mean(a)), (len(a), len(b))
    if min(n) < 2 or not (differ(a) or differ(b)):
        return Difference(mean, None, None, None, n)
    test = stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(mean, (float(low), float(high)), float(test.pvalue), float(test.df), n)


def paired(a: list[float], b: list[float]) -> Difference:
    """The t-test of the differences between runs of the same seed, in the same order."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    differences = [y - x for x, y in zip(a, b)]
    mean, n = float(np.mean(differences)), (len(a), len(b))
    interval = mean_interval(differences)
    if interval is None:
        return Difference(mean, None, None, None, n)
    return Difference(mean, interval, float(stats.ttest_1samp(differences, 0.0).pvalue), len(a) - 1.0, n)


def holm(p_values: list[float | None]) -> list[float | None]:
    """p-values adjusted for there being several (Holm 1979); None stays and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, highest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def pooled_std(*samples: list[float]) -> tuple[float, int] | None:
    """The common standard deviation of samples with different means, and its degrees of freedom; None if no
    sample has two values."""
    df = sum(len(x) - 1 for x in samples if len(x))
    if df < 1:
        return None
    squares = sum(float(((np.asarray(x, float) - np.mean(x)) ** 2).sum()) for x in samples if len(x))
    return math.sqrt(squares / df), df


def hedges_g(a: list[float], b: list[float]) -> float | None:
    """The difference b - a in units of the pooled standard deviation, without Cohen's d's bias in small
    samples (Hedges 1981, the exact factor); None if there is no spread."""
    if min(len(a), len(b)) < 2 or not (differ(a) or differ(b)):
        return None
    std, df = pooled_std(a, b)
    correction = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    return float((np.mean(b) - np.mean(a)) / std * correction)


class WelchPower:
    """With what probability the two-sided test at level alpha finds a true difference, of true spreads `std`.

    The test takes its degrees of freedom from the two sample variances, which of two or three runs may be
    anything: this is the mean over both, not what the degrees of freedom of the true ones would give.
    """

    def __init__(self, std: tuple[float, float], n: tuple[int, int], alpha: float):
        quantiles, weights = _quadrature(64)
        true = [s**2 / m for s, m in zip(std, n)]  # variances of the two means, and as the samples have them
        a, b = (v * stats.chi2.ppf(quantiles, m - 1) / (m - 1) for v, m in zip(true, n))
        a, b = a[:, None], b[None, :]
        df = (a + b) ** 2 / (a**2 / (n[0] - 1) + b**2 / (n[1] - 1))
        self.scale = math.sqrt(sum(true))
        self._bars = stats.t.ppf(1 - alpha / 2, df) * np.sqrt(a + b) / self.scale
        self._weights = np.outer(weights, weights)

    def __call__(self, difference: float) -> float:
        shift = difference / self.scale
        found = special.ndtr(shift - self._bars) + special.ndtr(-shift - self._bars)
        return float((self._weights * found).sum())


def minimum_detectable(a: list[float], b: list[float], alpha: float = 0.05, power: float = 0.8
                       ) -> float | None:
    """The smallest true difference that so many runs of such spreads would find with this power; None if
    there is no spread."""
    if min(len(a), len(b)) < 2 or not (differ(a) or differ(b)):
        return None
    spreads = float(np.std(a, ddof=1)), float(np.std(b, ddof=1))
    power_at = WelchPower(spreads, (len(a), len(b)), alpha)
    high = power_at.scale
    while power_at(high) < power:
        high *= 2
    return float(optimize.brentq(lambda difference: power_at(difference) - power, 0.0, high))
