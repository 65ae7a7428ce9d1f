"""The fields of a run's events: what readers of a log rely on, and what TensorBoard and wandb show.

A new field of an iteration is one entry here and one argument of `run.iteration`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogField:
    """A number of an event; null in the log stands for one that is NaN or infinite."""

    event: str
    name: str
    unit: str = ""
    curve: str = ""  # in TensorBoard and wandb; each curve has one kind of event, so that it has a step once
    factor: float = 1.0  # from the event's value to the curve's
    required: bool = True  # every event of the kind has it
    unknown: bool = False  # null means unknown, and is no point of the curve; elsewhere it is drawn as NaN


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
EVALUATION_EVENTS = ("eval", "hellaswag", "sample")  # belong to a step's evaluation, before its update


def required_fields(event: str) -> tuple[str, ...]:
    """Return the names that every event of a kind has, with a number or null."""
    return tuple(field.name for field in FIELDS if field.event == event and field.required)


def curves_of(event: dict) -> dict[str, float]:
    """Return what of an event is drawn, by the curve's name. A field that the event lacks is drawn as NaN."""
    values = {}
    for field in FIELDS:
        if field.event == event["event"] and field.curve:
            value = event.get(field.name)
            if value is not None:
                values[field.curve] = field.factor * value
            elif not field.unknown:
                values[field.curve] = float("nan")
    return values
