"""The fields of a run's events, for readers of logs and for the curves of TensorBoard and wandb.

A new field of an iteration is one entry here and one argument of `run.iteration`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogField:
    """A number in an event. A log has null for a number that is NaN or infinite."""

    event: str  # kind of event
    name: str
    unit: str = ""
    curve: str = ""  # in TensorBoard and wandb; a curve has one kind of event, so it has each step once
    factor: float = 1.0  # value of the curve / value in the event
    required: bool = True  # every event of the kind has the field
    unknown: bool = False  # True: null means unknown and is not drawn; False: null is drawn as NaN


FIELDS = (
    LogField("iter", "step"),
    LogField("iter", "loss", "nats/token", "train/iter_loss"),
    LogField("iter", "lr", "", "lr"),
    LogField("iter", "norm", "", "norm"),
    LogField("iter", "seconds", "s"),
    LogField("iter", "tokens_per_second", "1/s", "tokens_per_second"),
    LogField("iter", "mfu", "share of 1", "mfu_percent", 100, unknown=True),
    LogField("iter", "memory", "bytes", "memory_gb", 1 / 2**30, required=False, unknown=True),
    LogField("eval", "step"),
    LogField("eval", "train_loss", "nats/token", "train/loss"),
    LogField("eval", "val_loss", "nats/token", "val/loss"),
    LogField("eval", "bits_per_byte", "bits/byte", "val/bits_per_byte", required=False, unknown=True),
    LogField("eval", "lr"),
    LogField("checkpoint", "step"),
    LogField("checkpoint", "val_loss", "nats/token"),
    LogField("schedule", "syncs"),
    LogField("hellaswag", "step"),
    LogField("hellaswag", "acc", "share of 1", "hellaswag/acc"),
    LogField("hellaswag", "acc_norm", "share of 1", "hellaswag/acc_norm"),
    LogField("sample", "step"),
    LogField("end", "best_val_loss", "nats/token", "best_val_loss", required=False, unknown=True),
)
EVALUATION_EVENTS = ("eval", "hellaswag", "sample")  # parts of a step's evaluation, before its update


def required_fields(event: str) -> tuple[str, ...]:
    """Return the names of the fields that every event of a kind has, with a number or null."""
    return tuple(field.name for field in FIELDS if field.event == event and field.required)


def curves_of(event: dict) -> dict[str, float]:
    """Return the points of an event, curve -> value. The value is NaN if the event lacks a field."""
    values = {}
    for field in FIELDS:
        if field.event == event["event"] and field.curve:
            value = event.get(field.name)
            if value is not None:
                values[field.curve] = field.factor * value
            elif not field.unknown:
                values[field.curve] = float("nan")
    return values
