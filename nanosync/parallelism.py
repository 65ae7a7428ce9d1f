"""Division of a training step over processes: DDP, ZeRO-1, FSDP2, real tensor-parallel ranks.

A script makes one Parallelism. It shards the model while the weights are loaded, wraps the model for
training, and decides when gradients are averaged and how they are clipped.
"""

import warnings
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from kernels.adamw import ClippingAdamW
from nanosync.distributed import Processes
from nanosync.errors import UserError
from nanosync.optim import clip_gradients
from nanosync.sharding import is_fsdp


@dataclass(frozen=True)
class Parallelism:
    """The processes that train a model, and the part of its state that each process keeps."""

    processes: Processes
    dtype: torch.dtype  # of products; parameters are kept and gradients averaged in fp32
    zero1: bool = False  # shard the optimizer's state (ZeRO-1, arXiv 1910.02054)
    fsdp: bool = False  # shard parameters, gradients and the optimizer's state (FSDP2: ZeRO-3, same source)
    min_num_params: float = 1e6  # FSDP gathers consecutive layers as one unit of at least so many parameters
    reshard_after_forward: bool = True  # free gathered parameters; gather them again for the backward pass
    cpu_offload: bool = False  # keep parameters, gradients and optimizer state in the CPU's memory
    accumulate_sharded: bool = False  # average gradients after every micro-step, so that none stay whole

    @property
    def sharded(self) -> bool:
        """True if FSDP divides the model. With a single data-parallel process FSDP divides nothing."""
        return self.fsdp and self.processes.dp_size > 1

    def autocast(self):
        """Return the context of forward passes, in which products have the compute dtype."""
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def optimizer_group(self):
        """Group over which the optimizer's state is sharded, None for no sharding."""
        return self.processes.dp_group if self.zero1 else None

    def describe(self, model: nn.Module) -> list[str]:
        """Return the lines that a run prints about its parallelism."""
        alone = ": one data-parallel process keeps it all" if self.processes.dp_size == 1 else ""
        lines = ["Using ZeRO-1 optimizer state sharding" + alone] if self.zero1 else []
        if self.fsdp:
            n = len(self.units(model.transformer.h)) if self.sharded else 0
            units = f" {n} unit{'s' * (n != 1)} of layers"
            if n == 0:
                units += f": the whole model is one unit, as all layers together have fewer than " \
                         f"fsdp_min_num_params={self.min_num_params:g} parameters"
            lines.append("Wrapping model with FSDP..." + (alone or units))
        return lines

    def shard_as_filled(self, model: nn.Module, names) -> None:
        """Shard each unit as soon as its parameters have values, and then the rest of the model.

        If the names come in the model's order, at most one unit, the embedding and the head are whole at a
        time.

        names: iterator that loads a parameter of the model and then yields its name.
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
        """Group the numbers of consecutive blocks into units that FSDP gathers together.

        Blocks at the end with too few parameters for a unit join the last unit. If all blocks together have
        too few, no unit is made. The blocks are then whole throughout a step, as embedding, head and final
        LayerNorm are.
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
        """Shard the parameters of a module, or of the modules of a unit."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        # the warning concerns in-place writes to results, which tensor-parallel blocks do not make
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

    def prepare(self, model: nn.Module, compiled: bool, cuda_graphs: bool = False) -> nn.Module:
        """Compile a loaded model if `compiled`, and return the module that the training loop calls.

        cuda_graphs: record forward and backward pass of a compiled model as CUDA graphs, in one process.

        The result is the model in DDP. It is the model itself if a single data-parallel process trains it, or
        if FSDP averages its gradients.

        A compiled backward pass yields all gradients at its end. Then buckets cannot overlap with it, and one
        large bucket costs the least (see records/).
        """
        if compiled:
            mode = "reduce-overhead" if cuda_graphs else None
            compile_blocks(model) if self.sharded else model.compile(mode=mode)
        if self.processes.dp_group is None or is_fsdp(model):
            return model
        device = self.processes.device
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None,
            process_group=self.processes.dp_group, bucket_cap_mb=1000 if compiled else 25,
            gradient_as_bucket_view=True)

    def sync(self, trained: nn.Module, now: bool) -> None:
        """Decide if the next backward pass averages gradients over the data-parallel processes.

        now: False leaves the average to a later backward pass. Until then every process keeps whole gradients
            in fp32, unless accumulate_sharded is set. FSDP still gathers parameters.
        """
        if isinstance(trained, DistributedDataParallel):
            trained.require_backward_grad_sync = now
        elif is_fsdp(trained):
            trained.set_requires_gradient_sync(now or self.accumulate_sharded)
            if not self.reshard_after_forward:
                trained.set_reshard_after_backward(now)

    def clip(self, model: nn.Module, max_norm: float, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Limit the gradient's norm to max_norm, 0 for no limit, at once or in the optimizer's next step.

        Return the norm before, a scalar on the device.
        """
        if self.processes.tp_group is None and isinstance(optimizer, ClippingAdamW) and optimizer.fits():
            return optimizer.clip(max_norm)
        return clip_gradients(model.parameters(), max_norm, model.split_parameters(), self.processes.tp_group)


def check_parallelism(config: dict) -> None:
    """Raise UserError for settings of a training script that contradict each other."""
    for name in config:
        if name.startswith("fsdp_") and config.origin[name] and not config["use_fsdp"]:
            raise UserError(f"{name} is for --use_fsdp: add --use_fsdp, or leave {name} out")
    if config["use_fsdp"] and config["use_zero1"]:
        raise UserError("use_fsdp already shards the optimizer's state: leave use_zero1 out")


def parallelism_of(config: dict, processes: Processes, dtype: torch.dtype) -> Parallelism:
    """Make the Parallelism that a training script's settings name. Raises UserError."""
    if dtype == torch.float16 and (config["use_fsdp"] or config["tp_processes"] > 1):
        raise UserError("float16 scales losses for one process at a time: with use_fsdp or tp_processes use "
                        "--dtype=bfloat16")
    if config["fsdp_cpu_offload"] and (config["tp_processes"] > 1 or processes.device.type != "cuda"
                                       or processes.dp_size == 1):
        raise UserError("fsdp_cpu_offload moves sharded state from a GPU's to the CPU's memory: it needs "
                        "CUDA, several processes, and tp_processes=1; otherwise leave it out")
    return Parallelism(processes, dtype, config["use_zero1"], config["use_fsdp"],
                       config["fsdp_min_num_params"], config["fsdp_reshard_after_forward"],
                       config["fsdp_cpu_offload"], config["fsdp_accumulate_sharded"])


def compile_blocks(model: nn.Module) -> None:
    """Apply torch.compile to each block of a model, because FSDP communicates between blocks.

    Blocks of one kind share a compilation.
    """
    config = torch._dynamo.config
    # room for a compilation per block, with and without gradients, in training and in evaluation
    config.recompile_limit = max(config.recompile_limit, 4 * len(model.transformer.h))
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward)


def settle_buckets(trained: nn.Module, shape: tuple[int, int], device: torch.device,
                   shared: torch.Generator | None) -> None:
    """Run three backward passes before training, so that DDP's buckets have their final order.

    DDP reorders its buckets after its first pass. The place of a gradient in a bucket decides the order in
    which an all-reduce adds up the processes' gradients. Without the extra passes a resumed run would add up
    its first step in another order than the run that was not interrupted. The passes also run before the
    optimizer has moments, when memory has room for DDP's first and final buckets. Random states do not
    change.

    shape: (B, T) of the tokens.
    shared: generator that the processes of one model share, None without.
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
