"""How a training step is divided over processes: DDP, ZeRO-1, FSDP2, real tensor-parallel ranks.

A script makes one Parallelism. It shards the model while it is filled, wraps it for training, and says when
gradients are averaged and how their norm is clipped.
"""

import warnings
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from nanosync.distributed import Processes
from nanosync.errors import UserError
from nanosync.optim import clip_gradients


@dataclass(frozen=True)
class Parallelism:
    """Which processes train a model, and what each of them keeps."""

    processes: Processes
    dtype: torch.dtype  # of products; parameters are kept and gradients averaged in fp32
    zero1: bool = False  # shard the optimizer's state (ZeRO-1, arXiv 1910.02054)
    fsdp: bool = False  # shard parameters, gradients and the optimizer's state (FSDP2: ZeRO-3, same source)
    min_num_params: float = 1e6  # FSDP fetches consecutive layers together until they hold so many parameters
    reshard_after_forward: bool = True  # drop what was fetched and fetch it again for the backward pass
    cpu_offload: bool = False  # keep parameters, gradients and optimizer state in the CPU's memory
    accumulate_sharded: bool = False  # average gradients after every micro-step; they are never held whole

    @property
    def sharded(self) -> bool:
        """True if FSDP divides the model; one data-parallel process keeps all of it."""
        return self.fsdp and self.processes.dp_size > 1

    @property
    def optimizer_group(self):
        """The processes over which the optimizer's state is sharded, None for no sharding."""
        return self.processes.dp_group if self.zero1 else None

    def describe(self, model: nn.Module) -> list[str]:
        """Make the lines that a run prints about it."""
        alone = ": one data-parallel process keeps it all" if self.processes.dp_size == 1 else ""
        lines = ["Using ZeRO-1 optimizer state sharding" + alone] if self.zero1 else []
        if self.fsdp:
            n = len(self.units(model.transformer.h)) if self.sharded else 0
            lines.append("Wrapping model with FSDP..." + (alone or f" {n} unit{'s' * (n != 1)} of layers"))
        return lines

    def shard_as_filled(self, model: nn.Module, names) -> None:
        """Shard each unit as soon as its parameters have values, and then the rest. If the names come in the
        model's order, at most one unit is whole at a time, beside embedding and head.

        names: iterator that fills a parameter of the model and then yields its name.
        """
        if not self.sharded:
            deque(names, maxlen=0)  # fill all
            return
        blocks = model.transformer.h
        missing = {}  # names of a unit's parameters that have no value yet
        for unit in self.units(blocks):
            prefixes = tuple(f"transformer.h.{i}." for i in unit)
            missing[tuple(unit)] = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
        for name in names:
            for unit in [unit for unit, waiting in missing.items() if name in waiting]:
                missing[unit].discard(name)
                if not missing[unit]:
                    self._shard([blocks[i] for i in unit], self.reshard_after_forward)
        self._shard(model, False)  # embedding and head: last in the forward pass, first in the backward

    def units(self, blocks) -> list[list[int]]:
        """Group the numbers of consecutive blocks that are fetched together.

        Blocks at the end that hold too few parameters join the last unit. If all blocks together hold too
        few, there is no unit: the blocks stay with embedding, head and final LayerNorm, which are whole
        throughout a step.
        """
        units, unit, size = [], [], 0
        for i, block in enumerate(blocks):
            unit.append(i)
            size += sum(p.numel() for p in block.parameters())
            if size >= self.min_num_params:
                units.append(unit)
                unit, size = [], 0
        if units:
            units[-1] += unit
        return units

    def _shard(self, modules, reshard_after_forward: bool) -> None:
        """Keep this process's part of the parameters of a module, or of the modules of a unit."""
        # raised for tensor-parallel blocks, whose results are not written into
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        low = self.dtype != torch.float32
        precision = MixedPrecisionPolicy(param_dtype=self.dtype if low else None,
                                         reduce_dtype=torch.float32 if low else None,
                                         cast_forward_inputs=False)
        device = self.processes.device
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.cpu_offload else OffloadPolicy()
        fully_shard(modules, mesh=DeviceMesh.from_group(self.processes.dp_group, device.type),
                    reshard_after_forward=reshard_after_forward, mp_policy=precision,
                    offload_policy=offload)

    def prepare(self, model: nn.Module, compiled: bool) -> nn.Module:
        """Compile a filled model, if asked to, and return what is called to train it: the model in DDP, or
        the model itself if one process has all of its data or FSDP averages its gradients.

        A compiled backward pass hands over all gradients at its end. Several buckets have nothing to overlap
        with, and one large bucket costs the least (see records/).
        """
        if compiled:
            compile_blocks(model) if self.sharded else model.compile()
        if self.processes.dp_group is None or isinstance(model, FSDPModule):
            return model
        device = self.processes.device
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self.processes.dp_group, bucket_cap_mb=1000 if compiled else 25,
            gradient_as_bucket_view=True)

    def sync(self, trained: nn.Module, now: bool) -> None:
        """Let the next backward pass average gradients over the data-parallel processes, or leave that, and
        all communication, to a later one.

        Until then every process holds whole gradients in fp32, unless FSDP is to accumulate_sharded. FSDP
        still fetches parameters that it does not keep.
        """
        if isinstance(trained, DistributedDataParallel):
            trained.require_backward_grad_sync = now
        elif isinstance(trained, FSDPModule):
            trained.set_requires_gradient_sync(now or self.accumulate_sharded)
            if not self.reshard_after_forward:
                trained.set_reshard_after_backward(now)

    def clip(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Scale the gradient to a norm of at most max_norm (0: leave it) and return the norm before, a
        scalar on the device."""
        return clip_gradients(model.parameters(), max_norm, model.split_parameters(), self.processes.tp_group)


def check_parallelism(config: dict) -> None:
    """Raise UserError for settings of a training script that contradict each other."""
    for name in config:
        if name.startswith("fsdp_") and config.origin[name] and not config["use_fsdp"]:
            raise UserError(f"{name} is for --use_fsdp")
    if config["use_fsdp"] and config["use_zero1"]:
        raise UserError("use_fsdp shards the optimizer's state already, with all else: leave use_zero1 out")


def parallelism_of(config: dict, processes: Processes, dtype: torch.dtype) -> Parallelism:
    """Make the Parallelism that a training script's settings name. Raises UserError."""
    if dtype == torch.float16 and (config["use_fsdp"] or config["tp_processes"] > 1):
        raise UserError("float16 scales losses for one process at a time: with use_fsdp or tp_processes use "
                        "--dtype=bfloat16")
    if config["fsdp_cpu_offload"] and (config["tp_processes"] > 1 or processes.device.type != "cuda"
                                       or processes.dp_size == 1):
        raise UserError("fsdp_cpu_offload moves what use_fsdp shards out of a GPU's memory: it needs CUDA, "
                        "several processes, and tp_processes=1")
    return Parallelism(processes, dtype, config["use_zero1"], config["use_fsdp"],
                       config["fsdp_min_num_params"], config["fsdp_reshard_after_forward"],
                       config["fsdp_cpu_offload"], config["fsdp_accumulate_sharded"])


def compile_blocks(model: nn.Module) -> None:
    """Apply torch.compile to each block of a model, for FSDP, which communicates between blocks. Blocks of
    one kind share a compilation; the limit leaves room for one a block, in training and evaluation."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(model.transformer.h))
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward)


def settle_buckets(trained: nn.Module, shape: tuple[int, int], device: torch.device,
                   shared: torch.Generator | None) -> None:
    """Let DDP see three backward passes before the first that counts, when there are no moments yet but both
    its first buckets and its final ones.

    DDP reorders its buckets after its first pass, and the order in which an all-reduce adds up the ranks
    depends on where a gradient lies. Without this, a resumed run would add up its first step in another order
    than the run that was not interrupted. Leaves all random states, and that of the generator `shared`, as
    they are.

    shape: (B, T) of the tokens.
    """
    if not isinstance(trained, DistributedDataParallel):
        return
    state = None if shared is None else shared.get_state()
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        for _ in range(3):
            trained(zeros, zeros)[1].backward()
            trained.zero_grad(set_to_none=True)
    if shared is not None:
        shared.set_state(state)
