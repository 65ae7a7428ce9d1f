"""Kinds of model as checkpoints know them: a name, a configuration, and the settings that it decides.

A `model` entry of state.json is {"kind": name, "config": fields of the configuration}. The kinds that a
caller accepts are the argument `kinds`, name -> ModelKind: models.KINDS, or the kinds of one script.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn as nn

from nanosync.errors import UserError, shown

MAX_LAYERS = 10_000  # a layer is tens of kilobytes of Python objects, whatever its width
MAX_FIELD = 2**31  # of an integer in a configuration


@dataclass(frozen=True)
class ModelKind:
    """Construction of a kind of model, and the settings that its checkpoints decide."""

    script: str  # trains this kind
    config: type | None = None  # dataclass of the architecture; None: only the script can use the kind
    build: Callable | None = None  # configuration -> model
    settings: tuple[str, ...] = ()  # settings of the script that a checkpoint decides, besides the kind
    variant: tuple[str, ...] = ()  # the subset of `settings` that the dense GPT lacks
    settings_entry: str = "model"  # entry of state.json with their values: "model" or "config"
    state: dict = field(default_factory=dict)  # entries that the script adds to state.json -> their types
    finish: Callable = lambda model, state: None  # sets what state.json has of a model with loaded parameters


def model_config(description: dict, kinds: dict[str, ModelKind], **overrides):
    """Make the configuration of a `model` entry. Raises UserError."""
    kind = description.get("kind")
    if type(kind) is not str or kind not in kinds or kinds[kind].config is None:
        known = [name for name in kinds if kinds[name].config is not None]
        hint = f"only {kinds[kind].script} can use it" if type(kind) is str and kind in kinds else \
            f"known kinds are {', '.join(known)}"
        raise UserError(f"the checkpoint holds a model of kind {shown(kind)}: {hint}")
    config_class = kinds[kind].config
    try:
        fields = {**description["config"], **overrides}
        check_fields(config_class, fields)
        return config_class(**fields)
    except (TypeError, KeyError) as e:
        raise UserError(f"the checkpoint's model configuration does not fit {config_class.__name__}: {e}"
                        ) from None


def check_fields(config_class: type, values: dict) -> None:
    """Raise UserError for a value of another type than its field of a configuration, or of a size that no
    model has. Fields that the class lacks are not checked.

    config_class: a dataclass whose annotations are types.
    """
    for f in dataclasses.fields(config_class):
        if f.name not in values:
            continue
        value, types = values[f.name], typing.get_args(f.type) or (f.type,)
        if type(value) not in types and not (type(value) is int and float in types):
            names = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            raise UserError(f"{f.name} is {shown(value)} and must be of type {names}")
        size = len(value) if type(value) is list else value
        if type(value) in (int, float, list) and not (math.isfinite(size) and abs(size) < MAX_FIELD):
            raise UserError(f"{f.name} is {shown(value)}, which no model has")


def model_description(kind: str, model: nn.Module) -> dict:
    """Make the `model` entry of state.json."""
    return {"kind": kind, "config": dataclasses.asdict(model.config)}


def schedule_description(model: nn.Module) -> dict | None:
    """Make the `schedule` entry of state.json; None for the dense model."""
    schedule = getattr(model, "schedule", None)
    if schedule is None:
        return None
    if schedule.is_plain:
        return {"syncs": model.syncs, "sublayers": [{"sync": s.sync} for s in schedule.sublayers]}
    sublayers = [dataclasses.asdict(sublayer) for sublayer in schedule.sublayers]
    return {"syncs": model.syncs, "sublayers": sublayers, "channels": schedule.channels}


def machine_memory() -> int | None:
    """Return the bytes of this machine's memory, None if the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def check_size(config, whole: bool = True) -> None:
    """Raise UserError for a model whose parameters this machine's memory cannot hold, in fp32, or with more
    than MAX_LAYERS layers. Call it before the model is built.

    Linux grants the memory and later kills the process that uses it.

    config: a dataclass with n_layer, n_embd, vocab_size and, if positions are learned, block_size. A property
        other_values is the number of further values.
    whole: False if the process never holds more than one parameter, as for a model that is built on the meta
        device and filled on GPUs.
    """
    shape = {name: getattr(config, name) for name in ("n_layer", "n_embd", "vocab_size", "block_size")
             if name in vars(config)}
    if shape["n_layer"] > MAX_LAYERS:
        raise UserError(f"n_layer={shape['n_layer']} is above {MAX_LAYERS}: choose a smaller model")
    rows, C = shape["vocab_size"] + shape.get("block_size", 0), shape["n_embd"]
    other = getattr(config, "other_values", 0)
    n_bytes = 4 * (12 * shape["n_layer"] * C**2 + rows * C + other if whole else max(4 * C**2, rows * C))
    memory = machine_memory()
    if memory is not None and n_bytes > memory:
        shape |= {name: getattr(config, name) for name in ("sequence_length",) if other}
        named = ", ".join(f"{name}={value}" for name, value in shape.items())
        raise UserError(f"{named} make {n_bytes // 2**30:,} GB of parameters, and this machine has "
                        f"{memory // 2**30:,} GB of memory: choose a smaller model")
