"""The fields of a run's events that readers of a log rely on, and their curves in TensorBoard and wandb.

A new field of an iteration is one entry here and one argument of `run.iteration`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogField:
    """A number of an event; null in the log stands for NaN and infinity."""

    event: str
    name: str
    unit: str = ""
    curve: str = ""  # its name in TensorBoard and wandb; a curve has one kind of event, so each step once
    factor: float = 1.0  # the curve's value divided by the event's
    required: bool = True  # every event of the kind has the field
    unknown: bool = False  # null means unknown and is not drawn; in other fields null is drawn as NaN


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
    """Return the fields that every event of a kind has, each a number or null."""
    return tuple(field.name for field in FIELDS if field.event == event and field.required)


def curves_of(event: dict) -> dict[str, float]:
    """Return the values of an event's curves by their names. A field that the event lacks is drawn as NaN."""
    values = {}
    for field in FIELDS:
        if field.event == event["event"] and field.curve:
            value = event.get(field.name)
            if value is not None:
                values[field.curve] = field.factor * value
            elif not field.unknown:
                values[field.curve] = float("nan")
    return values
