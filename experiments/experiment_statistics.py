"""The statistics of experiments: tests and intervals of a mean, and of the difference of two, from few runs.

Runs that differ only in their seed count as independent draws from a normal distribution. With 2 to 5 runs
all intervals are Student's; `python experiments/simulate.py` checks their coverage by simulation. Samples
contain no failed run. If the runs do not differ at all, intervals and p-values are None, where scipy has NaN
or infinite test statistics.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes most of a second to import

CONFIDENCE = 0.95
MOST_RUNS = 1000  # the limit of `runs_needed`
ROUNDING, LEAST_SPREAD = 1e-12, 1e-100  # of values that differ: relative, and absolute, whose square is not 0


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
    return {"mean": float(x.mean()), "std": spread(values) if len(x) > 1 else None,
            "min": float(x.min()), "max": float(x.max()), "median": float(np.median(x)),
            "ci_95": None if interval is None else list(interval)}


def differ(values, largest: float | None = None) -> bool:
    """Return True if values differ by more than rounding.

    largest: size of the numbers that they are computed from; by default of the values.
    """
    if len(values) < 2:
        return False
    largest = max(map(abs, values)) if largest is None else largest
    return float(np.ptp(values)) > max(ROUNDING * largest, LEAST_SPREAD)


def mean_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return Student's t interval of the mean; None if the values do not differ."""
    if not differ(values):
        return None
    x = np.asarray(values, float)
    half = special.stdtrit(len(x) - 1, (1 + confidence) / 2) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def p_at_most(values: list[float], target: float | None) -> float | None:
    """Return p of the one-sided t-test for a mean of at most `target`: the probability of a mean as low if
    the true mean is the target. None if the values do not differ, or without a target."""
    if target is None or not differ(values):
        return None
    return float(special.stdtr(len(values) - 1, _t_of(values, target)))


def _t_of(values: list[float], mean: float) -> float:
    """Return Student's t of a sample against a mean."""
    x = np.asarray(values, float)
    return float((x.mean() - mean) / (x.std(ddof=1) / math.sqrt(len(x))))


def _chi2_quantile(p, df: float):
    """Return the quantiles of the chi-squared distribution."""
    return 2 * special.gammaincinv(df / 2, p)


def power_at_most(mean: float, std: float, n: int, target: float, alpha: float) -> float:
    """Return the probability that n runs of this mean and std pass the test of `p_at_most` at level alpha."""
    return _beyond(special.stdtrit(n - 1, 1 - alpha), n - 1, (target - mean) / std * math.sqrt(n))


def _beyond(critical: float, df: float, shift: float) -> float:
    """Return P(T > critical) of the noncentral t distribution: a mean, over the sample's possible spreads, of
    normal probabilities. scipy's nct is NaN in the tails of few degrees of freedom."""
    spread = np.sqrt(_chi2_quantile(_QUANTILES, df) / df)
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
    """Apply Welch's t-test, for samples with different spreads. One of them may have no spread, of which
    scipy warns."""
    mean, n = float(np.mean(b) - np.mean(a)), (len(a), len(b))
    if min(n) < 2 or not (differ(a) or differ(b)):
        return Difference(mean, None, None, None, n)
    error, df = map(float, welch_error([spread(a) / math.sqrt(n[0]), spread(b) / math.sqrt(n[1])], n))
    half = float(special.stdtrit(df, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(special.stdtr(df, -abs(mean) / error))
    return Difference(mean, (mean - half, mean + half), p, df, n)


def welch_error(errors, n: tuple[int, int]):
    """Return the standard error of a difference, and its degrees of freedom after Welch and Satterthwaite.

    errors: standard errors of the two means, numbers or arrays; not both 0.
    """
    error = np.hypot(*errors)
    shares = [(one / error) ** 2 for one in errors]  # of the variance: squares of these do not underflow
    return error, 1 / sum(share**2 / (m - 1) for share, m in zip(shares, n))


def spread(values: list[float]) -> float:
    """Return the standard deviation of a sample; 0 if its values do not differ."""
    return float(np.std(values, ddof=1)) if differ(values) else 0.0


def paired(a: list[float], b: list[float]) -> Difference:
    """Apply the paired t-test to runs of the same seeds, in the same order. Raises ValueError for different
    lengths."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    differences = [y - x for x, y in zip(a, b)]
    mean, n = float(np.mean(differences)), (len(a), len(b))
    if not differ(differences, max(map(abs, (*a, *b)))):
        return Difference(mean, None, None, None, n)
    interval = mean_interval(differences)
    p = 2 * float(special.stdtr(len(a) - 1, -abs(_t_of(differences, 0.0))))
    return Difference(mean, interval, p, len(a) - 1.0, n)


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
        true = [s / math.sqrt(m) for s, m in zip(std, n)]  # standard errors of the two means
        # the same as estimated from a sample, at the quantiles of their distribution
        a, b = (e * np.sqrt(_chi2_quantile(quantiles, m - 1) / (m - 1)) for e, m in zip(true, n))
        error, df = welch_error([a[:, None], b[None, :]], n)
        self.scale = math.hypot(*true)
        self._bars = -special.stdtrit(df, alpha / 2) * error / self.scale
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
    from scipy import optimize

    if min(len(a), len(b)) < 2 or not (differ(a) or differ(b)):
        return None
    power_at = WelchPower((spread(a), spread(b)), (len(a), len(b)), alpha)
    high = power_at.scale
    while power_at(high) < power:
        high *= 2
        if not math.isfinite(high):
            return None
    return float(optimize.brentq(lambda difference: power_at(difference) - power, 0.0, high))
