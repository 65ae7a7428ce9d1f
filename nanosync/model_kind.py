"""Kinds of model as checkpoints know them: a name, a configuration, and the settings that it decides.

A `model` entry of state.json is {"kind": name, "config": fields of the configuration}. The kinds that a
caller accepts are the argument `kinds`, name -> ModelKind: models.KINDS, or the kinds of one script.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn

from nanosync.errors import UserError


@dataclass(frozen=True)
class ModelKind:
    """Construction of a kind of model, and the settings that its checkpoints decide."""

    script: str  # trains this kind
    config: type | None = None  # dataclass of the architecture; None: only the script can use the kind
    build: Callable | None = None  # configuration -> model
    settings: tuple[str, ...] = ()  # settings of the script that a checkpoint decides, besides the kind
    variant: tuple[str, ...] = ()  # the subset of `settings` that the dense GPT lacks
    settings_entry: str = "model"  # entry of state.json with their values: "model" or "config"


def model_config(description: dict, kinds: dict[str, ModelKind], **overrides):
    """Make the configuration of a `model` entry. Raises UserError."""
    kind = description.get("kind")
    if kind not in kinds or kinds[kind].config is None:
        known = [name for name in kinds if kinds[name].config is not None]
        hint = f"only {kinds[kind].script} can use it" if kind in kinds else \
            f"known kinds are {', '.join(known)}"
        raise UserError(f"the checkpoint holds a model of kind {kind!r}: {hint}")
    config_class = kinds[kind].config
    try:
        return config_class(**{**description["config"], **overrides})
    except (TypeError, KeyError) as e:
        raise UserError(f"the checkpoint's model configuration does not fit {config_class.__name__}: {e}"
                        ) from None


def model_description(kind: str, model: nn.Module) -> dict:
    """Make the `model` entry of state.json."""
    return {"kind": kind, "config": dataclasses.asdict(model.config)}


def schedule_description(model: nn.Module) -> dict | None:
    """Make the `schedule` entry of state.json; None for the dense model."""
    schedule = getattr(model, "schedule", None)
    return None if schedule is None else {"syncs": model.syncs, **dataclasses.asdict(schedule)}


def check_size(config) -> None:
    """Raise UserError for a model whose parameters this machine's memory cannot hold, in fp32.

    Linux grants the memory and later kills the process that uses it. config: a configuration with n_layer,
    n_embd, vocab_size and, if positions are learned, block_size.
    """
    shape = {name: getattr(config, name) for name in ("n_layer", "n_embd", "vocab_size", "block_size")
             if hasattr(config, name)}
    rows = shape["vocab_size"] + shape.get("block_size", 0)
    n_bytes = 4 * (12 * shape["n_layer"] * shape["n_embd"]**2 + rows * shape["n_embd"])
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # the system does not report its memory
        return
    if n_bytes > memory:
        named = ", ".join(f"{name}={value}" for name, value in shape.items())
        raise UserError(f"{named} make {n_bytes // 2**30:,} GB of parameters, and this machine has "
                        f"{memory // 2**30:,} GB of memory: choose a smaller model")
