"""Strategies of bench.py's setting `compare`: how a step is divided over processes and what it keeps."""

import importlib.util
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

import models
from benchmarks.harness import Bench
from kernels import usable
from kernels.relu_squared import is_hopper
from model import initial_parameters, use_fused_gelu, use_qkv_linear, use_triton_layer_norm
from nanosync.distributed import Processes
from nanosync.errors import UserError
from nanosync.fp8 import check_fp8_device, follow_weights, use_fp8
from nanosync.optim import build_adamw
from nanosync.parallelism import Parallelism
from nanosync.ranks import ranks_on
from nanosync.recompute import use_activation_checkpointing


@dataclass(frozen=True)
class Strategy:
    """A strategy by its name, words with + between. The defaults are those of a strategy without the word."""

    name: str
    zero1: bool = False  # these five: see Parallelism
    fsdp: bool = False
    min_num_params: float = 1e6
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    tp: bool = False  # tp_processes processes hold a model
    recompute: str = "none"  # activation checkpointing
    triton: bool = False  # LayerNorm as a Triton kernel
    qkv: bool = False  # gradients of q, k and v not joined, see kernels.qkv_linear
    gelu: str = ""  # GELU in the products of the MLPs, and what it keeps, see kernels.gelu_mlp
    compiled: bool = True
    graphs: bool = False  # each compiled pass as a CUDA graph
    fp8: bool | str = False  # these three: settings of train.py
    fp8_head: bool = False
    fp8_weight_gradients: bool = False
    fp8_gelu: bool = True  # casts around GELU in its kernels, see kernels.gelu_cast
    torchao: str = ""  # recipe of torchao.float8 for the blocks

    def parallelism(self, processes: Processes, dtype: torch.dtype) -> Parallelism:
        return Parallelism(processes, dtype, self.zero1, self.fsdp, self.min_num_params,
                           self.reshard_after_forward, self.cpu_offload)


WORDS = {  # word -> fields of Strategy; a word of digits and M is min_num_params in millions
    "ddp": {},
    "zero1": {"zero1": True},
    "fsdp": {"fsdp": True},
    "tp": {"tp": True},
    "keep": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "block": {"recompute": "block"},
    "selective": {"recompute": "selective"},
    "triton": {"triton": True},
    "qkv": {"qkv": True},
    "gelu": {"gelu": "preactivation"},
    "gelu-derivative": {"gelu": "derivative"},
    "gelu-derivative8": {"gelu": "derivative8"},
    "gelu-recompute": {"gelu": "nothing"},
    "eager": {"compiled": False},
    "graphs": {"graphs": True},
    "fp8": {"fp8": True},
    "fp8_emulated": {"fp8": "emulated"},
    "fp8_head": {"fp8_head": True},
    "weight_gradients": {"fp8_weight_gradients": True},
    "gelu_apart": {"fp8_gelu": False},
    "torchao": {"torchao": "tensorwise"},
    "torchao_rowwise": {"torchao": "rowwise"},
}
FP8 = {"fp8", "fp8_emulated"}
TORCHAO = {"torchao", "torchao_rowwise"}


def parse(config: dict) -> list[Strategy]:
    """Make the strategies that the settings name, none without `compare`; mode memory measures ddp by
    default. Raises UserError."""
    compare = config["compare"] or "ddp" * (config["mode"] == "memory")
    strategies = [_parse_one(text, config) for text in compare.split(",")] if compare else []
    if len({s.name for s in strategies}) < len(strategies):
        raise UserError(f"compare={compare!r} names a strategy twice")
    return strategies


def _parse_one(text: str, config: dict) -> Strategy:
    """Make a Strategy, such as 'fsdp+block'. Raises UserError."""
    words = [word for word in text.split("+") if not re.fullmatch(r"\d+M", word)]
    sizes = [1e6 * int(word[:-1]) for word in text.split("+") if word not in words]
    for word in words:
        if word not in WORDS:
            raise UserError(f"compare: {text!r} has {word!r}, and known are {', '.join(WORDS)}, 100M")
    if len({"ddp", "zero1", "fsdp"} & set(words)) > 1 or {"block", "selective"} <= set(words):
        raise UserError(f"compare: {text!r} names two ways to do the same: take one of ddp, zero1 and fsdp, "
                        f"and one of block and selective")
    fused = [word for word in words if word.startswith(("gelu", "qkv")) and word != "gelu_apart"]
    if len({"qkv", *fused}) > 2 or ("tp" in words and fused):
        raise UserError(f"compare: {text!r}: take one of the words gelu, and neither gelu nor qkv with tp")
    if fused and (FP8 | TORCHAO) & set(words):
        raise UserError(f"compare: {text!r}: gelu and qkv have products in bfloat16, and FP8 replaces these: "
                        f"take one or the other")
    if len((FP8 | TORCHAO) & set(words)) > 1 or (
            {"fp8_head", "weight_gradients"} & set(words) and not FP8 & set(words)):
        raise UserError(f"compare: {text!r}: take one of {', '.join(sorted(FP8 | TORCHAO))}; fp8_head and "
                        f"weight_gradients go with one of the first two")
    if "graphs" in words and ("eager" in words or config.get("compile") is False):
        raise UserError(f"compare: {text!r}: graphs are of compiled passes: leave out eager and "
                        f"compile=False")
    if "graphs" in words and config["mode"] == "memory":
        raise UserError(f"compare: {text!r}: PyTorch does not count the memory of graphs: leave graphs out")
    if TORCHAO & set(words) and importlib.util.find_spec("torchao") is None:
        raise UserError(f"compare: {text!r} needs the package torchao: pip install torchao")
    if len(sizes) > 1:
        raise UserError(f"compare: {text!r} has several numbers: give one")
    if ({"keep", "offload"} & set(words) or sizes) and "fsdp" not in words:
        raise UserError(f"compare: keep, offload and a number are for fsdp, and {text!r} is without")
    if {"offload", "tp"} <= set(words):
        raise UserError(f"compare: {text!r}: offload and tp do not go together")
    if "tp" in words and (config["tp_processes"] == 1 or config["dropout"] > 0):
        raise UserError(f"compare: {text!r} needs --tp_processes, how many processes hold a model, and no "
                        f"dropout")
    fields = {"min_num_params": sizes[0]} if sizes else {}
    for word in words:
        fields |= WORDS[word]
    return Strategy(text, **fields)


def check_compare(config: dict) -> None:
    """Raise UserError for wrong settings of strategies."""
    mode = config["mode"]
    others = config["model_type"] != "gpt" or config["syncs"]
    if config["compare"] and (mode not in ("train", "memory") or others):
        raise UserError("compare is for mode train or memory, and for nothing else at a time: leave "
                        "model_type and syncs out")
    if mode == "memory" and (config["peer"] or config["loss_steps"]):
        raise UserError("mode memory measures strategies only: leave peer and loss_steps out")
    if config["largest"] and mode != "memory":
        raise UserError("largest is for --mode=memory")
    parse(config)


def check_processes(strategies: list[Strategy], processes: Processes, dtype: torch.dtype) -> None:
    """Raise UserError for a strategy that these processes and their device cannot run."""
    device, size = processes.device, processes.world_size
    for s in strategies:
        if size == 1 and (s.zero1 or s.fsdp or s.tp):
            raise UserError(f"compare: {s.name} divides a model over processes: start bench.py with torchrun")
        if s.tp and (s.zero1 or s.fsdp) and processes.dp_size == 1:
            raise UserError(f"compare: {s.name}: tp_processes={size} are all processes: nothing is left "
                            f"to divide: start more")
        if s.cpu_offload and device.type != "cuda":
            raise UserError(f"compare: {s.name}: offload moves memory off a GPU, and the device is {device}")
        if s.graphs and (device.type != "cuda" or size > 1):
            raise UserError(f"compare: {s.name}: graphs are for one process on a CUDA GPU, and here are "
                            f"{size} on {device.type}")
        if s.triton and not usable(torch.empty(0, device=device)):
            raise UserError(f"compare: {s.name}: no Triton kernel runs on {device} here")
        if (s.gelu or s.qkv) and not is_hopper(device):
            raise UserError(f"compare: {s.name}: gelu and qkv are kernels for a Hopper GPU (H100, H200), and "
                            f"the device is {device}")
        check_fp8_device({"fp8": s.fp8 or bool(s.torchao)}, device, dtype)


def build_model(strategy: Strategy, parallel: Parallelism, bench: Bench, n_layer: int) -> nn.Module:
    """Build a model by a strategy, with random weights drawn on the device."""
    settings, device = bench.config, bench.device
    torch.manual_seed(settings["seed"])
    architecture, kind = bench.architecture | {"n_layer": n_layer}, "gpt"
    if strategy.tp:
        tp_processes, kind = settings["tp_processes"], "distributed_gpt"
        architecture |= {"tp_size": tp_processes, "block_types": settings["block_types"]}
    with torch.device("meta"):
        model = models.build_model({"kind": kind, "config": architecture})
    weights = initial_parameters(model, device)
    if strategy.tp:
        model.place(ranks_on(parallel.processes.tp_group, tp_processes))
    use_activation_checkpointing(model, strategy.recompute)
    use_fp8(model, {name: getattr(strategy, name) for name in ("fp8", "fp8_head", "fp8_weight_gradients")})
    for block in model.transformer.h:
        block.mlp.fp8_gelu = strategy.fp8_gelu
    if strategy.torchao:
        use_torchao(model, strategy.torchao)
    if strategy.triton:
        use_triton_layer_norm(model)
    use_fused_gelu(model, strategy.gelu)
    if strategy.qkv:
        use_qkv_linear(model)
    models.fill(model, weights, "bench.py", device, parallel)
    return model


def use_torchao(model: nn.Module, recipe: str) -> None:
    """Run the products of a model's blocks in FP8 by torchao, weight gradients as well."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(model.transformer.h, config=Float8LinearConfig.from_recipe_name(recipe))


def build_optimizer(model: nn.Module, parallel: Parallelism, learning_rate: float) -> torch.optim.Optimizer:
    """Build a contender's AdamW, which also keeps the casts of weights in FP8 up to date."""
    optimizer = build_adamw(model, learning_rate, (0.9, 0.95), 0.1, parallel.optimizer_group)
    follow_weights(model, optimizer)
    return optimizer
