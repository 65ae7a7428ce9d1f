"""Statistics of an evaluation, and of two models on the same windows and examples.

The losses of tokens in one window depend on each other, so the unit of every standard error is a window, or
an example of HellaSwag. Two models are compared in pairs: the difference of each window is taken first. What
makes a window hard for both models cancels, so the interval is far shorter than those of the two losses.

The interval is about the text: other windows of the same source would give a mean in it. It is not about
training: another seed can give another difference. Neighbouring windows can be of one document; if a model is
better at some documents, their differences are alike, and the interval is too short. Windows spread over the
split (val_windows) are farther apart.
"""

import math

import numpy as np

from nanosync import tokenizers
from nanosync.bits_per_byte import bits_per_byte
from nanosync.errors import UserError, shown

CONFIDENCE = 0.95


def check_installed() -> None:
    """Import what `paired_difference` needs; without it, the script ends with one line that says so."""
    import scipy.special  # noqa: F401


def check_same_tokens(meta: dict | None, where: str, other: dict | None, other_where: str) -> None:
    """Raise UserError if two metas describe different tokens.

    meta, other: contents of a meta.json, None for GPT-2's tokens. where, other_where: their sources.
    """
    pairs = [(name, *((tokenizers.GPT2_META if m is None else m).get(name) for m in (meta, other)))
             for name in ("tokenizer", "vocab_size", "chars")]
    for name, value, other_value in pairs:
        if value != other_value:
            raise UserError(f"{where} has tokens with {name}={shown(value, 40)} and {other_where} with "
                            f"{shown(other_value, 40)}: their losses are of different tokens; use the same "
                            f"tokenizer")


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of independent values and its standard error, None for a single value."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def paired_difference(values: np.ndarray, others: np.ndarray) -> dict:
    """Return mean, standard error and confidence interval of values - others, a pair of each window.

    The interval is Student's, with n - 1 degrees of freedom. It is None for a single pair.
    """
    mean, error = mean_and_error(values - others)
    if error is None:
        return {"mean": mean, "stderr": None, "interval": None, "n": 1}
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return {"mean": mean, "stderr": error, "interval": [mean - half, mean + half], "n": len(values)}


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
    loss, error = mean_and_error(windows[:, 0] / windows[:, 1].mean())
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
    bits = "n/a (the tokenizer is unknown here)" if bits is None else f"{bits:.4f}"
    return (f"val loss {summary['loss']:.4f}{_error(summary['stderr'])}, bits per byte {bits}, on "
            f"{summary['windows']:,} windows of {summary['block_size']:,} tokens")


def val_difference(windows: np.ndarray, others: np.ndarray, bytes_per_token: float | None) -> dict:
    """Return the paired differences of loss and of bits per byte, None if unknown; see val_summary."""
    loss = paired_difference(*(w[:, 0] / w[:, 1].mean() for w in (windows, others)))
    if bytes_per_token is None or not windows[:, 3].any():
        return {"loss": loss, "bits_per_byte": None}
    bits = (bits_per_byte(w[:, 2] / w[:, 3].mean(), bytes_per_token) for w in (windows, others))
    return {"loss": loss, "bits_per_byte": paired_difference(*bits)}


def val_difference_line(difference: dict) -> str:
    """Return the line that evaluate.py prints of a val_difference."""
    loss, bits = difference["loss"], difference["bits_per_byte"]
    text = f"val loss, difference in {loss['n']:,} pairs of windows: {_interval(loss)}"
    return text if bits is None else f"{text}; bits per byte: {_interval(bits)}"


def hellaswag_summary(right: np.ndarray) -> dict:
    """Return accuracies with standard errors. right: (n, 2) bool, result of hellaswag_eval.judge."""
    (acc, error), (acc_norm, norm_error) = (mean_and_error(column) for column in right.T.astype(float))
    return {"acc": acc, "acc_stderr": error, "acc_norm": acc_norm, "acc_norm_stderr": norm_error,
            "n": len(right)}


def hellaswag_line(summary: dict) -> str:
    """Return the line that evaluate.py prints of a hellaswag_summary."""
    return (f"HellaSwag: acc {summary['acc']:.4f}{_error(summary['acc_stderr'])}, acc_norm "
            f"{summary['acc_norm']:.4f}{_error(summary['acc_norm_stderr'])}, on {summary['n']:,} examples")


def hellaswag_difference(right: np.ndarray, others: np.ndarray) -> dict:
    """Return mcnemar's comparison of acc and of acc_norm. right, others: see hellaswag_summary."""
    return {name: mcnemar(right[:, i], others[:, i]) for i, name in enumerate(("acc", "acc_norm"))}


def hellaswag_difference_lines(difference: dict) -> list[str]:
    """Return the lines that evaluate.py prints of a hellaswag_difference."""
    return [f"HellaSwag, difference in {of['n']:,} pairs of examples: {name} {_interval(of)}; right only "
            f"here {of['only_here']}, only there {of['only_there']}, McNemar's p {of['p']:.2g}"
            for name, of in difference.items()]


def _error(error: float | None) -> str:
    return "" if error is None else f" (standard error {error:.4f})"


def _interval(difference: dict) -> str:
    if difference["interval"] is None:
        return f"{difference['mean']:+.4f}"
    low, high = difference["interval"]
    return f"{difference['mean']:+.4f}, {CONFIDENCE:.0%} interval {low:+.4f} to {high:+.4f}"
