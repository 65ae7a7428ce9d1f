"""The table of model kinds, and building a model of any kind."""

import importlib
from collections.abc import Mapping

import torch
import torch.nn as nn

import model
import reduced_sync_model
import tensor_parallel_model
from nanosync.model_kind import ModelKind, check_size, model_config

ARCHITECTURE = ("block_size", "n_layer", "n_head", "n_embd", "bias")
SPEEDRUN, FAST = "speedrun_gpt", "fast_gpt"  # their models are in train_gpt.py and train_gpt_fast.py


def _kind(script: str, config: type, build, *variant: str) -> ModelKind:
    return ModelKind(script, config, build, (*ARCHITECTURE, *variant), variant)


KINDS = {
    "gpt": _kind("train.py", model.GPTConfig, model.GPT),
    "distributed_gpt": _kind("train.py", tensor_parallel_model.DistributedGPTConfig,
                             tensor_parallel_model.DistributedGPT, "tp_size", "block_types"),
    "reduced_sync_gpt": _kind("train_reduced_sync.py", reduced_sync_model.GPTConfig,
                              lambda config: reduced_sync_model.GPT(config, announce=False),
                              "tp_size", "sync_strategy", "attn_sync_layers", "layers_per_group",
                              "sync_points"),
    SPEEDRUN: ModelKind("train_gpt.py"),
    FAST: ModelKind("train_gpt_fast.py"),
}


SCRIPTS_OWN = {SPEEDRUN: "SPEEDRUN", FAST: "FAST"}  # kind -> name of its ModelKind in its script


class KindsForInference(Mapping):
    """KINDS with the kinds of the speedrun scripts, whose models are in the scripts.

    A script is imported when its kind is read, that is, for a checkpoint of that kind only. It is this
    repository's script, never the copy in a run's log.
    """

    def __getitem__(self, name: str) -> ModelKind:
        kind = KINDS[name]
        if name not in SCRIPTS_OWN:
            return kind
        return getattr(importlib.import_module(kind.script.removesuffix(".py")), SCRIPTS_OWN[name])

    def __iter__(self):
        return iter(KINDS)

    def __len__(self):
        return len(KINDS)


INFERENCE_KINDS = KindsForInference()


def build_model(description: dict, kinds: Mapping[str, ModelKind] = KINDS, **overrides) -> nn.Module:
    """Build and initialise a model with the architecture of a `model` entry of state.json. Raises UserError.

    If PyTorch's default device is 'meta', the model has no values.

    overrides: fields of the configuration.
    """
    config = model_config(description, kinds, **overrides)
    check_size(config, whole=torch.get_default_device().type != "meta")
    return kinds[description["kind"]].build(config)
