"""The statistics of experiments: tests and intervals of a mean, and of the difference of two, from few runs.

Runs that differ only in their seed count as independent draws from a normal distribution. With 2 to 5 runs
all intervals are Student's; `python experiments/simulate.py` checks their coverage by simulation. Samples
contain no failed run. If the runs do not differ at all, intervals and p-values are None, not 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

CONFIDENCE = 0.95
MOST_RUNS = 1000  # the limit of `runs_needed`


def _quadrature(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return quantiles and their weights, whose sum is 1, for a mean over a distribution."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


_QUANTILES, _WEIGHTS = _quadrature(200)


def describe(values: list[float]) -> dict:
    """Return mean, std (of a sample), min, max, median, ci_95 of the mean; None for too few values."""
    if not len(values):
        return dict.fromkeys(("mean", "std", "min", "max", "median", "ci_95"))
    x = np.asarray(values, float)
    interval = mean_interval(values)
    return {"mean": float(x.mean()), "std": float(x.std(ddof=1)) if len(x) > 1 else None,
            "min": float(x.min()), "max": float(x.max()), "median": float(np.median(x)),
            "ci_95": None if interval is None else list(interval)}


def differ(values) -> bool:
    """Return True if values differ by more than rounding."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * max(map(abs, values))


def mean_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return Student's t interval of the mean; None if the values do not differ."""
    if not differ(values):
        return None
    x = np.asarray(values, float)
    half = stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def p_at_most(values: list[float], target: float | None) -> float | None:
    """Return p of the one-sided t-test for a mean of at most `target`: the probability of a mean as low if
    the true mean is the target. None if the values do not differ, or without a target."""
    if target is None or not differ(values):
        return None
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def power_at_most(mean: float, std: float, n: int, target: float, alpha: float) -> float:
    """Return the probability that n runs of this mean and std pass the test of `p_at_most` at level alpha."""
    return _beyond(stats.t.ppf(1 - alpha, n - 1), n - 1, (target - mean) / std * math.sqrt(n))


def _beyond(critical: float, df: float, shift: float) -> float:
    """Return P(T > critical) of the noncentral t distribution: a mean, over the sample's possible spreads, of
    normal probabilities. scipy's nct is NaN in the tails of few degrees of freedom."""
    spread = np.sqrt(stats.chi2.ppf(_QUANTILES, df) / df)
    return float(_WEIGHTS @ special.ndtr(shift - critical * spread))


def runs_needed(mean: float, std: float | None, target: float | None, alpha: float = 0.01, power: float = 0.8
                ) -> int | None:
    """Return the fewest runs that pass the test of `p_at_most` with this power, if mean and std are true.

    None without target or spread, for a mean that is not below the target, or if MOST_RUNS are too few.
    """
    if not std or target is None or mean >= target:
        return None
    return next((n for n in range(2, MOST_RUNS + 1)
                 if power_at_most(mean, std, n, target, alpha) >= power), None)


@dataclass(frozen=True)
class Difference:
    """The difference of two means, b - a: negative if b's loss is lower. None if the runs do not differ."""

    mean: float
    interval: tuple[float, float] | None  # 95%
    p: float | None  # two-sided
    df: float | None
    n: tuple[int, int]


def welch(a: list[float], b: list[float]) -> Difference:
    """Apply Welch's t-test, for samples with different spreads."""
    mean, n = float(np.mean(b) - np.mean(a)), (len(a), len(b))
    if min(n) < 2 or not (differ(a) or differ(b)):
        return Difference(mean, None, None, None, n)
    test = stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(mean, (float(low), float(high)), float(test.pvalue), float(test.df), n)


def paired(a: list[float], b: list[float]) -> Difference:
    """Apply the paired t-test to runs of the same seeds, in the same order. Raises ValueError for different
    lengths."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    differences = [y - x for x, y in zip(a, b)]
    mean, n = float(np.mean(differences)), (len(a), len(b))
    interval = mean_interval(differences)
    if interval is None:
        return Difference(mean, None, None, None, n)
    return Difference(mean, interval, float(stats.ttest_1samp(differences, 0.0).pvalue), len(a) - 1.0, n)


def holm(p_values: list[float | None]) -> list[float | None]:
    """Adjust p-values for several tests (Holm 1979). None stays None and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted, highest = [None] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def pooled_std(*samples: list[float]) -> tuple[float, int] | None:
    """Return the common standard deviation of samples with different means and its degrees of freedom; None
    if no sample has two values."""
    df = sum(len(x) - 1 for x in samples if len(x))
    if df < 1:
        return None
    squares = sum(float(((np.asarray(x, float) - np.mean(x)) ** 2).sum()) for x in samples if len(x))
    return math.sqrt(squares / df), df


def hedges_g(a: list[float], b: list[float]) -> float | None:
    """Return the difference b - a in units of the pooled standard deviation, corrected for the bias of
    Cohen's d in small samples by the exact factor (Hedges 1981); None if the values do not differ."""
    if min(len(a), len(b)) < 2 or not (differ(a) or differ(b)):
        return None
    std, df = pooled_std(a, b)
    correction = math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    return float((np.mean(b) - np.mean(a)) / std * correction)


class WelchPower:
    """The probability that Welch's two-sided test at level alpha finds a true difference, for true spreads
    `std`.

    The test takes its degrees of freedom from the two sample variances, which vary widely for two or three
    runs. So the power is a mean over both variances, not the power at the true degrees of freedom.
    """

    def __init__(self, std: tuple[float, float], n: tuple[int, int], alpha: float):
        quantiles, weights = _quadrature(64)
        true = [s**2 / m for s, m in zip(std, n)]  # variances of the two means
        # the same as estimated from a sample, at the quantiles of their distribution
        a, b = (v * stats.chi2.ppf(quantiles, m - 1) / (m - 1) for v, m in zip(true, n))
        a, b = a[:, None], b[None, :]
        df = (a + b) ** 2 / (a**2 / (n[0] - 1) + b**2 / (n[1] - 1))
        self.scale = math.sqrt(sum(true))
        self._bars = stats.t.ppf(1 - alpha / 2, df) * np.sqrt(a + b) / self.scale
        self._weights = np.outer(weights, weights)

    def __call__(self, difference: float) -> float:
        """Return the power for a true difference."""
        shift = difference / self.scale
        found = special.ndtr(shift - self._bars) + special.ndtr(-shift - self._bars)
        return float((self._weights * found).sum())


def minimum_detectable(a: list[float], b: list[float], alpha: float = 0.05, power: float = 0.8
                       ) -> float | None:
    """Return the smallest true difference that samples of these sizes and spreads find with this power; None
    if the values do not differ."""
    if min(len(a), len(b)) < 2 or not (differ(a) or differ(b)):
        return None
    spreads = float(np.std(a, ddof=1)), float(np.std(b, ddof=1))
    power_at = WelchPower(spreads, (len(a), len(b)), alpha)
    high = power_at.scale
    while power_at(high) < power:
        high *= 2
    return float(optimize.brentq(lambda difference: power_at(difference) - power, 0.0, high))
