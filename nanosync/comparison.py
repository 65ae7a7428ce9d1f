"""Statistics of an evaluation, and of two models on the same windows and examples.

Two models are compared in pairs: the difference of each window is taken first. What makes a window hard for
both models cancels, so the interval is far shorter than those of the two losses.

The losses of tokens in one window depend on each other, and so do neighbouring windows, which can be of one
document. The unit of a standard error is therefore a run of neighbouring windows: the windows are cut into
GROUPS groups. If a group is longer than a document, the sums of groups are nearly independent (the method of
batch means). With at most GROUPS windows the unit is a window. The unit of HellaSwag is an example.

The interval is about the text: other text of the same source would give a mean in it. It is not about
training: another seed can give another difference.
"""

import math

import numpy as np

from nanosync import tokenizers
from nanosync.bits_per_byte import bits_per_byte
from nanosync.errors import UserError, shown

CONFIDENCE = 0.95
UNKNOWN = "unknown"  # tokenizer of converted weights that came without one
GROUPS = 30  # units of an error of losses; the interval of 30 is 4% longer than that of infinitely many


def check_installed() -> None:
    """Import what `paired_difference` needs; without it, the script ends with one line that says so."""
    import scipy.special  # noqa: F401


def check_same_tokens(meta: dict | None, where: str, other: dict | None, other_where: str) -> None:
    """Raise UserError if two metas describe different tokens.

    meta, other: contents of a meta.json, None for GPT-2's tokens. where, other_where: their sources.
    """
    if (difference := differing_tokens(meta, other)) is None:
        return
    name, value, other_value = difference
    if name == "tokenizer" and UNKNOWN in (value, other_value):
        raise UserError(f"the tokenizer of {where if value == UNKNOWN else other_where} is unknown: if "
                        f"it is that of the data set, convert the model with python convert.py INPUT "
                        f"OUT_DIR --dataset=FOLDER, and give OUT_DIR")
    raise UserError(f"{where} has tokens with {name}={shown(value, 40)} and {other_where} with "
                    f"{shown(other_value, 40)}: their losses are of different tokens; use the same "
                    f"tokenizer")


def differing_tokens(meta: dict | None, other: dict | None) -> tuple | None:
    """Return the first field in which two metas describe different tokens, and its two values; else None."""
    metas = [tokenizers.GPT2_META if m is None else m for m in (meta, other)]
    symbols = [name for name in ("chars", "tokenizer_json") if all(m.get(name) is not None for m in metas)]
    for name in ("tokenizer", "vocab_size", *symbols):
        value, other_value = (m.get(name) for m in metas)
        if value != other_value:
            return name, value, other_value
    return None


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of independent values and its standard error, None for a single value."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def grouped(sums: np.ndarray) -> np.ndarray:
    """Add up neighbouring rows to at most GROUPS rows, whose numbers of rows differ by at most 1."""
    n = min(len(sums), GROUPS)
    return np.add.reduceat(sums, np.arange(n) * len(sums) // n, axis=0)


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """Return sum(sums) / sum(counts) and its standard error, None for a single unit.

    The error is that of a ratio estimator: of sums - ratio * counts (Cochran, Sampling Techniques, chapter
    6). For equal counts it is the error of the mean.

    sums, counts: of independent units, e.g. the sum of losses and the number of tokens.
    """
    ratio = float(sums.sum() / counts.sum())
    _, error = mean_and_error(sums - ratio * counts)
    return ratio, None if error is None else error / float(counts.mean())


def difference_with_interval(mean: float, error: float | None, units: int, n: int) -> dict:
    """Return a difference with Student's interval of units - 1 degrees of freedom, None for a single unit.

    n: number of pairs.
    """
    if error is None:
        return {"mean": mean, "stderr": None, "interval": None, "n": n}
    from scipy.special import stdtrit

    half = float(stdtrit(units - 1, (1 + CONFIDENCE) / 2)) * error
    return {"mean": mean, "stderr": error, "interval": [mean - half, mean + half], "n": n}


def paired_difference(values: np.ndarray, others: np.ndarray) -> dict:
    """Return mean, standard error and confidence interval of values - others, a pair of each example."""
    return difference_with_interval(*mean_and_error(values - others), len(values), len(values))


def paired_ratio(sums: np.ndarray, others: np.ndarray, counts: np.ndarray) -> dict:
    """Return mean, standard error and confidence interval of (sums - others) / counts over windows.

    sums, others, counts: of each window, in the order of the text: the losses of both models, their number.
    """
    units = grouped(np.stack((sums - others, counts), axis=1))
    return difference_with_interval(*ratio_and_error(*units.T), len(units), len(sums))


def mcnemar(right: np.ndarray, others: np.ndarray) -> dict:
    """Compare which examples two models answer right: McNemar's exact test.

    Under the hypothesis that both are equally good, an example that only one of them answers right is as
    likely to be one's as the other's. `p` is the two-sided probability of a split at least as uneven
    (McNemar, Psychometrika 12, 1947; exact as a binomial test).

    right, others: (n,) bool of the same examples.
    """
    here, there = int((right & ~others).sum()), int((others & ~right).sum())
    n, tail, term = here + there, 0, 1
    for k in range(min(here, there) + 1):
        tail += term  # binomial(n, 0) + ... + binomial(n, k)
        term = term * (n - k) // (k + 1)
    return {**paired_difference(right.astype(float), others.astype(float)), "only_here": here,
            "only_there": there, "p": min(1.0, 2 * tail / 2**n)}


def val_summary(windows: np.ndarray, bytes_per_token: float | None, block_size: int, where: str) -> dict:
    """Return the val loss, its standard error, and bits per byte, of the sums of windows.

    Raises UserError if the loss is not finite.

    windows: result of token_losses.window_losses. where: weights, for the error message.
    """
    loss, error = ratio_and_error(*grouped(windows[:, :2]).T)
    if not math.isfinite(loss):
        raise UserError(f"the val loss of {where} is {loss}: evaluate with --dtype=float32, or another "
                        f"checkpoint")
    text_loss = windows[:, 2].sum() / windows[:, 3].sum() if windows[:, 3].any() else math.nan
    known = bytes_per_token is not None and math.isfinite(text_loss)
    return {"loss": loss, "stderr": error,
            "bits_per_byte": bits_per_byte(text_loss, bytes_per_token) if known else None,
            "bytes_per_token": bytes_per_token, "windows": len(windows), "block_size": block_size}


def val_line(summary: dict) -> str:
    """Return the line that evaluate.py prints of a val_summary."""
    bits = summary["bits_per_byte"]
    bits = "n/a" if bits is None else f"{bits:.4f}"
    return (f"val loss {summary['loss']:.4f}{_error(summary['stderr'])}, bits per byte {bits}, on "
            f"{_number(summary['windows'], 'window')} of {_number(summary['block_size'], 'token')}")


def val_difference(windows: np.ndarray, others: np.ndarray, bytes_per_token: float | None) -> dict:
    """Return the paired differences of loss and of bits per byte, None if unknown; see val_summary."""
    loss = paired_ratio(windows[:, 0], others[:, 0], windows[:, 1])
    if bytes_per_token is None or not windows[:, 3].any():
        return {"loss": loss, "bits_per_byte": None}
    bits = (bits_per_byte(w[:, 2], bytes_per_token) for w in (windows, others))
    return {"loss": loss, "bits_per_byte": paired_ratio(*bits, windows[:, 3])}


def val_difference_line(difference: dict) -> str:
    """Return the line that evaluate.py prints of a val_difference."""
    loss, bits = difference["loss"], difference["bits_per_byte"]
    text = f"val loss, difference in {_number(loss['n'], 'pair')} of windows: {_interval(loss)}"
    return text if bits is None else f"{text}; bits per byte: {_interval(bits)}"


def hellaswag_summary(right: np.ndarray) -> dict:
    """Return accuracies with standard errors. right: (n, 2) bool, result of hellaswag_eval.judge."""
    (acc, error), (acc_norm, norm_error) = (mean_and_error(column) for column in right.T.astype(float))
    return {"acc": acc, "acc_stderr": error, "acc_norm": acc_norm, "acc_norm_stderr": norm_error,
            "n": len(right)}


def hellaswag_line(summary: dict) -> str:
    """Return the line that evaluate.py prints of a hellaswag_summary."""
    return (f"HellaSwag: acc {summary['acc']:.4f}{_error(summary['acc_stderr'])}, acc_norm "
            f"{summary['acc_norm']:.4f}{_error(summary['acc_norm_stderr'])}, on "
            f"{_number(summary['n'], 'example')}")


def hellaswag_difference(right: np.ndarray, others: np.ndarray) -> dict:
    """Return mcnemar's comparison of acc and of acc_norm. right, others: see hellaswag_summary."""
    return {name: mcnemar(right[:, i], others[:, i]) for i, name in enumerate(("acc", "acc_norm"))}


def hellaswag_difference_lines(difference: dict) -> list[str]:
    """Return the lines that evaluate.py prints of a hellaswag_difference."""
    return [f"HellaSwag, difference in {_number(of['n'], 'pair')} of examples: {name} {_interval(of)}; "
            f"right only here {of['only_here']}, only there {of['only_there']}, McNemar's p {of['p']:.2g}"
            for name, of in difference.items()]


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _error(error: float | None) -> str:
    return "" if error is None else f" (standard error {error:.4f})"


def _interval(difference: dict) -> str:
    if difference["interval"] is None:
        return f"{difference['mean']:+.4f}"
    low, high = difference["interval"]
    return f"{difference['mean']:+.4f}, {CONFIDENCE:.0%} interval {low:+.4f} to {high:+.4f}"
