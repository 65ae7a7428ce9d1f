"""Loading weights into models of any kind: from a checkpoint, GPT-2's weights, or another kind of model."""

import dataclasses
import os
from collections import deque

import torch
import torch.nn as nn

from model import (
    GPT,
    GPTConfig,
    initial_parameters,
    padded_vocab_size,
    use_triton_layer_norm,
)
from models.registry import ARCHITECTURE, INFERENCE_KINDS, KINDS, SCRIPTS_OWN, build_model
from nanosync import huggingface, model_card
from nanosync.checkpoint import Checkpoint, find, find_weights
from nanosync.comparison import UNKNOWN, differing_tokens
from nanosync.dataloader import DataSet
from nanosync.distributed import Processes
from nanosync.errors import UserError, shown
from nanosync.files import expand_path
from nanosync.fp8 import use_fp8
from nanosync.model_kind import check_size, model_config, model_description, schedule_description
from nanosync.parallelism import Parallelism
from nanosync.random_states import seed_random_states
from nanosync.ranks import ranks_on
from nanosync.recompute import use_activation_checkpointing
from nanosync.resuming import take_values
from nanosync.run import Run
from nanosync.sharding import is_fsdp, whole_tensor
from tensor_parallel_model import DistributedGPT


def as_kind(model: nn.Module, kind: str, **fields) -> nn.Module:
    """Copy the weights of a model into a model of another kind, on the CPU.

    fields: settings of the kind's variant, see ModelKind.
    """
    shared = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(GPTConfig)}
    other = build_model({"kind": kind, "config": shared | fields})
    load_parameters(other, dict(model.named_parameters()), "the model")
    return other


def with_ranks(model: nn.Module, tp_size: int | None, block_types: list | None,
               sync_strategy: str | None = None) -> nn.Module:
    """Copy the weights of a model into a model with another number of TP ranks or another schedule.

    Raises UserError.

    tp_size: number of TP ranks. None keeps the model's number; the dense model gets 2.
    block_types: kind of block for each layer. None keeps the model's schedule; the ranks of the dense model
        then synchronise everywhere.
    sync_strategy: in place of block_types, a strategy of reduced_sync_model.
    """
    config = model.config
    ranks = tp_size or getattr(config, "tp_size", 2)
    if sync_strategy is not None and block_types is not None:
        raise UserError("sync_strategy and block_types both name a schedule: give one of them")
    if sync_strategy is not None:
        return as_kind(model, "reduced_sync_gpt", tp_size=ranks, sync_strategy=sync_strategy)
    if block_types is None and hasattr(config, "sync_strategy"):
        fields = {name: getattr(config, name) for name in KINDS["reduced_sync_gpt"].variant}
        return as_kind(model, "reduced_sync_gpt", **fields | {"tp_size": ranks})
    if block_types is None:
        block_types = getattr(config, "block_types", None)
    return as_kind(model, "distributed_gpt", tp_size=ranks, block_types=block_types)


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors by name into all of the model's parameters. Raises UserError if names or shapes differ.

    where: source of the tensors, for error messages.
    """
    parameters = dict(model.named_parameters())
    if set(parameters) != set(tensors):
        unmatched = sorted(set(parameters) ^ set(tensors))
        raise UserError(f"{where} does not fit the model: {len(unmatched)} parameters are in only one of "
                        f"them, such as {unmatched[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{where} does not fit the model: {name} is {tuple(tensors[name].shape)} there "
                            f"and {tuple(parameter.shape)} here")
        parameter.copy_(tensors[name])


def fill(model: nn.Module, weights, source: str, device: torch.device,
         parallel: Parallelism | None = None) -> None:
    """Load each weight straight to `device`, one at a time, and shard the model meanwhile if `parallel` does.

    Raises UserError if names or shapes differ.

    model: a model with or without values, whole or on real TP ranks.
    weights: iterable of (name, value) of the dense model, or a dict, which is loaded in the model's order.
    source: source of the weights, for error messages.
    """
    names = fill_each(model, weights, source, device)
    if parallel is None:
        deque(names, maxlen=0)
    else:
        parallel.shard_as_filled(model, names)


@torch.no_grad()
def fill_each(model: nn.Module, weights, where: str, device: torch.device):
    """Load weights as `fill` does, and yield the name of each parameter after it is loaded."""
    places = {}  # (module, attribute) of each parameter; a tied parameter has two
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False):
            places.setdefault(id(p), []).append((module, attribute))
    parameters, given = dict(model.named_parameters()), set()
    if isinstance(weights, dict):
        order = {name: i for i, name in enumerate(parameters)}
        weights = sorted(weights.items(), key=lambda item: order.get(item[0], -1))
    problem = "{} does not fit the model: {} is {} there and {} here"
    for name, value in weights:
        if name not in parameters:
            raise UserError(problem.format(where, name, tuple(value.shape), "not"))
        try:
            part = model.own_part({name: value})[name]
        except (IndexError, RuntimeError):  # too few dimensions; the shape check below raises the error
            part = value
        p = parameters[name]
        if part.shape != p.shape:
            raise UserError(problem.format(where, name, tuple(part.shape), tuple(p.shape)))
        filled = nn.Parameter(part.to(device, p.dtype, copy=True))
        for module, attribute in places[id(p)]:
            setattr(module, attribute, filled)
        given.add(name)
        yield name
    if missing := sorted(set(parameters) - given):
        raise UserError(problem.format(where, missing[0], "not", tuple(parameters[missing[0]].shape)))


def unsharded(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Copy a model that FSDP sharded without its shards, for callers that do not use its forward pass.

    A tensor-parallel model stays divided over its TP group. A model that is not sharded is returned itself.
    All processes must call this function.

    dtype, device: of the copy.
    """
    if not is_fsdp(model):
        return model
    with torch.device("meta"):
        copy = build_model(model_description(kind, model)).to(dtype)
    ranks = getattr(model, "ranks", None)
    if ranks is not None and ranks.group is not None:
        copy.place(ranks)
    weights = ((name, model.whole({name: whole_tensor(p)})[name]) for name, p in model.named_parameters())
    fill(copy, weights, "the sharded model", device)
    return copy


def load_model(checkpoint: Checkpoint, **overrides) -> nn.Module:
    """Load the model of a checkpoint, on the CPU.

    overrides: fields of the configuration that change no shape.
    """
    description = checkpoint.state["model"]
    model = build_model(description, INFERENCE_KINDS, **overrides)
    load_parameters(model, checkpoint.tensors("model"), checkpoint.path)
    INFERENCE_KINDS[description["kind"]].finish(model, checkpoint.state)
    return model


def load(out_dir: str, which: str | int = "latest", **overrides) -> nn.Module:
    """Load the model of a checkpoint in out_dir, on the CPU. Raises UserError.

    which: 'latest', 'best' or a step. overrides: see load_model.
    """
    return load_model(find(expand_path(out_dir), which, kinds=INFERENCE_KINDS), **overrides)


def load_weights(name: str, kind: str = "gpt", variant: dict | None = None, warn=print, group=None,
                 data: DataSet | None = None, **overrides) -> nn.Module:
    """Load weights into a new model of any kind, on the CPU. Raises UserError.

    Print a line if the weights were trained with another schedule, or on other tokens than those of `data`.

    name: path of an out_dir, of a checkpoint, or of a Hugging Face folder, or a name on Hugging Face's hub.
    kind, variant: kind of model to build, and settings of its variant.
    warn: function that prints a line. group: see checkpoint.find. overrides: see load_model.
    """
    variant = variant or {}
    found = find_weights(name, warn=warn, group=group, kinds=KINDS)
    if data is not None:
        _note_other_tokens(name, found, data, warn)
    if found is None:
        model = GPT.from_pretrained(name, **overrides)
        return model if kind == "gpt" else as_kind(model, kind, **variant)
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    shared = {field: value for field, value in found.state["model"]["config"].items() if field in fields}
    model = build_model({"kind": kind, "config": shared | variant}, **overrides)
    load_parameters(model, found.tensors("model"), found.path)
    note_other_schedule(found, model, warn)
    return model


def model_for_training(run: Run, kind: str, parallel: Parallelism, evaluations: list) -> nn.Module:
    """Build the model that a training script's settings name, with weights, on its device. Raises UserError.

    The weights are those of the resumed checkpoint, new ones, or those of `init_from`. The model is built on
    the meta device; then each weight is loaded straight to its device. The data's tokens are checked as soon
    as the size of the vocabulary is known.

    kind: kind of model. evaluations: evaluations of the run, which check that they fit the model.
    """
    config, processes = run.config, run.processes
    if config["document_mask"] and config["dropout"] > 0:
        raise UserError(f"document_mask has no dropout of attention, and dropout is {config['dropout']}: use "
                        f"--dropout=0, or leave document_mask out")
    end_of_text = run.data.document_token() if config["document_mask"] else None
    seed_random_states(config["seed"])
    model, weights, source = _model_and_weights(run, kind)
    model.end_of_text = end_of_text
    for evaluation in evaluations:
        evaluation.check(model)
    if config["tp_processes"] > 1:
        model.place(ranks_on(processes.tp_group, config["tp_size"]))
    use_activation_checkpointing(model, config["activation_checkpointing"])
    use_fp8(model, config)
    if config["use_triton"]:
        use_triton_layer_norm(model)
    fill(model, weights, source, processes.device, parallel)
    return model


def _model_and_weights(run: Run, kind: str) -> tuple[nn.Module, object, str]:
    """Return the model, its weights as `fill` takes them, and their source."""
    config, data = run.config, run.data
    variant = {name: config[name] for name in KINDS[kind].variant}
    if run.resumed is not None:
        data.check_tokens(run.resumed.state["model"]["config"]["vocab_size"])
        model = _without_values(run, run.resumed.state["model"], dropout=config["dropout"])
        weights, source = run.resumed.tensors("model"), run.resumed.path
    elif config["init_from"] == "scratch":
        used_vocab_size, vocab_size = padded_vocab_size(data.meta)
        data.check_tokens(vocab_size)
        shape = {name: config[name] for name in (*ARCHITECTURE, "dropout")}
        shape |= {"vocab_size": vocab_size, "used_vocab_size": used_vocab_size}
        model = _without_values(run, {"kind": kind, "config": shape | variant})
        weights, source = initial_parameters(model), "scratch"
    else:
        model = load_weights(config["init_from"], kind, variant, warn=run.line, group=run.processes.group,
                             data=data, dropout=config["dropout"])
        data.check_tokens(model.config.vocab_size)
        if config["block_size"] != model.config.block_size:
            model.crop_block_size(config["block_size"])
        take_values(config, vars(model.config), config["init_from"], ARCHITECTURE)
        weights, source = list(model.named_parameters()), config["init_from"]
    return model, weights, source


def _note_other_tokens(name: str, found: Checkpoint | None, data: DataSet, warn) -> None:
    """Print a warning if weights belong to other tokens than those of a data set. See load_weights."""
    meta = None if found is None else found.state["meta"]
    if found is None and os.path.isdir(name):
        if (record := model_card.read_record(name)) is None:
            return  # the tokenizer of another program's folder is not looked at
        meta = record["meta"]
    if (difference := differing_tokens(meta, data.meta)) is None or UNKNOWN in difference:
        return
    field, value, other_value = difference
    warn(f"warning: {name} was trained on tokens with {field}={shown(value, 40)}, and {data.folder} has "
         f"{shown(other_value, 40)}: its embeddings are those of other tokens")


def _without_values(run: Run, description: dict, **overrides) -> nn.Module:
    """Build the model of a `model` entry on the meta device, if the run's device can hold it."""
    check_size(model_config(description, KINDS, **overrides), whole=run.processes.device.type == "cpu")
    with torch.device("meta"):
        return build_model(description, **overrides)


def run_evaluations(due: list, model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Run periodic evaluations on the unsharded model. All processes call this function, under autocast.

    due: evaluations to run. kind, dtype, device: see unsharded.
    """
    whole = unsharded(model, kind, dtype, device)
    for evaluation in due:
        evaluation.run(whole)


def find_for_inference(config: dict, group=None) -> Checkpoint | None:
    """Find the checkpoint that the settings init_from, out_dir and checkpoint_step name. Raises UserError.

    Return None if init_from names weights for GPT.from_pretrained.
    """
    kinds = INFERENCE_KINDS
    if config["init_from"] == "resume":
        found = find(config["out_dir"], config["checkpoint_step"], group=group, kinds=kinds)
    else:
        found = find_weights(config["init_from"], config["checkpoint_step"], group=group, kinds=kinds)
    if found is None:  # an error comes before a script reads or downloads anything else
        huggingface.check_name(config["init_from"])
    elif (kind := found.state["model"]["kind"]) in SCRIPTS_OWN:
        for name, plain in (("tp_size", None), ("block_types", None), ("sync_strategy", None),
                            ("tp_processes", 1)):
            if config.get(name, plain) != plain:
                raise UserError(f"{name}={config[name]} is for models of train.py and train_reduced_sync.py, "
                                f"and {found.path} is from {KINDS[kind].script}: leave {name} out")
    return found


def load_for_inference(config: dict, found: Checkpoint | None, processes: Processes, say) -> nn.Module:
    """Load the model that the settings name, on the CPU. Raises UserError.

    tp_size, block_types, sync_strategy and tp_processes in the settings decide its TP ranks.

    found: result of find_for_inference. say: function that prints a line.
    """
    if found is not None and found.state["model"]["kind"] in SCRIPTS_OWN:
        return load_model(found)
    model = GPT.from_pretrained(config["init_from"]) if found is None else load_model(found, dropout=0.0)
    ranks = [config[name] for name in ("tp_size", "block_types", "sync_strategy")]
    if ranks != [None] * 3:
        model = with_ranks(model, *ranks)
        if found is not None:
            note_other_schedule(found, model, say)
    tp_processes = config["tp_processes"]
    if tp_processes > 1:
        if not isinstance(model, DistributedGPT):
            raise UserError(f"tp_processes={tp_processes} needs a model with TP ranks, and this model is the "
                            f"dense GPT: add --tp_size={tp_processes}")
        model.place(ranks_on(processes.tp_group, model.config.tp_size))
    return model


def is_dense(schedule: dict | None, tp_size: int) -> bool:
    """Return True if a model computes the dense GPT's function: with all syncs, or with one rank.

    schedule: `schedule` entry of state.json. tp_size: number of TP ranks.
    """
    if schedule is None or (tp_size == 1 and "channels" not in schedule):
        return True
    return "channels" not in schedule and all(s["sync"] for s in schedule["sublayers"])


def note_other_schedule(source: Checkpoint, model: nn.Module, say) -> None:
    """Print a line if a model's schedule differs from the schedule that a checkpoint was trained with.

    Schedules that synchronise everywhere are the same function. say: function that prints a line.
    """

    def words(schedule: dict | None, tp_size: int) -> str:
        return "the dense function" if is_dense(schedule, tp_size) else \
            f"{schedule['syncs']} syncs on {tp_size} ranks"

    def function(schedule: dict | None, tp_size: int) -> tuple:
        return () if is_dense(schedule, tp_size) else (tp_size, str(schedule))

    then = source.state.get("schedule"), source.state["model"]["config"].get("tp_size", 1)
    now = schedule_description(model), getattr(model.config, "tp_size", 1)
    if function(*then) != function(*now):
        say(f"{source.path} was trained as {words(*then)} and is run as {words(*now)}")
