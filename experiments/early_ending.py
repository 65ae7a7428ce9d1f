"""Predict the final loss of a run from the runs that have finished, to end a run that cannot be good enough.
"""

import math

from scipy.special import stdtrit

CONFIDENCE = 0.99  # of the prediction interval
FEWEST = 6  # finished runs of a regression
FROM = 0.5  # share of its own schedule from which a run may be ended


def predicted_least(pairs: list[tuple[float, float]], loss: float) -> float | None:
    """Return the lower end of the prediction interval of a run's final loss; None if unknown.

    Linear regression of the log of the final loss on the log of the loss at the same step.

    pairs: (loss at this step, final loss) of finished runs; loss: of the run at this step.
    """
    pairs = [(math.log(x), math.log(y)) for x, y in pairs if min(x, y) > 0]
    n = len(pairs)
    if n < FEWEST or not 0 < loss < math.inf:
        return None
    x_mean, y_mean = (math.fsum(column) / n for column in zip(*pairs))
    squares = math.fsum((x - x_mean) ** 2 for x, _ in pairs)
    if squares <= 1e-20:
        return None
    rate = math.fsum((x - x_mean) * (y - y_mean) for x, y in pairs) / squares
    rest = math.fsum((y - y_mean - rate * (x - x_mean)) ** 2 for x, y in pairs)
    off = math.log(loss) - x_mean
    error = math.sqrt(rest / (n - 2) * (1 + 1 / n + off * off / squares))
    return math.exp(y_mean + rate * off - float(stdtrit(n - 2, (1 + CONFIDENCE) / 2)) * error)


def pairs_at(step: int, final_step: int, curves: list[list[dict]]) -> list[tuple[float, float]]:
    """Return (val loss at a step, final val loss) of the curves that have both. curves: rows of
    metrics.jsonl of finished runs."""
    found = []
    for rows in curves:
        losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
        if step in losses and final_step in losses:
            found.append((losses[step], losses[final_step]))
    return found
