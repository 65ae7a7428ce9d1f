"""Processes: who am I, on which device, in which group; printing, reducing and leaving together.

The only module that reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Everything else takes
a `Processes`, a device or a group as an argument; `group=None` means one process and no communication.
"""

import functools
import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError
from kernels import exchange, usable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = ("nccl", "gloo", "mpi", "ucc")


def env_rank() -> int:
    """This process's rank by torchrun's environment, 0 outside it; known before any group exists."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # `start` says what is wrong with another


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None  # None: alone
    # a (dp, tp) mesh: tp_processes neighbours hold the ranks of one model, each a part of it
    dp_rank: int = 0  # which of the dp_size models this process belongs to: it has that share of the data
    dp_size: int = 1
    dp_group: dist.ProcessGroup | None = None  # the processes with the same part of their model
    tp_group: dist.ProcessGroup | None = None  # the processes of one model

    @property
    def main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


def start(device: str = "auto", backend: str = "auto", timeout_seconds: float = 600.0,
          tp_processes: int = 1) -> Processes:
    """Choose the device and, under torchrun, join the process group and the two groups of the mesh.

    tp_processes: how many processes hold one model; the others hold more models, on other data.
    device: 'auto' (cuda, else mps, else cpu), or as torch.device takes it; under torchrun a process takes the
    GPU of its local rank. backend: 'auto' (nccl on CUDA, else gloo), or as init_process_group takes it.
    Raises UserError.
    """
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"backend={backend!r} is unknown: use auto, nccl or gloo")
    ranks = _torchrun_ranks()
    local_rank = None if ranks is None else ranks[2]
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world_size = 1 if ranks is None else ranks[1]
    if tp_processes < 1 or world_size % tp_processes:
        raise UserError(f"tp_processes={tp_processes} does not divide the {world_size} processes: start a "
                        f"multiple of it, torchrun --nproc_per_node={max(1, tp_processes)}")
    if ranks is None:
        return Processes(0, 1, 0, chosen, None)
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl" and chosen.type != "cuda":
        raise UserError(f"backend='nccl' needs CUDA and the device is {chosen}: use --backend=gloo")
    if not getattr(dist, f"is_{backend}_available")():
        raise UserError(f"backend={backend!r} is not built into this PyTorch: use --backend=auto")
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds),
                                device_id=chosen if backend == "nccl" else None)
    except (dist.DistError, ValueError) as e:  # of the network, or of what the environment says about it
        raise UserError(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']}: {str(e).splitlines()[0]}") from None
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent watch", daemon=True).start()
    return Processes(*ranks, chosen, dist.group.WORLD, *_mesh(ranks[0], world_size, tp_processes))


def _end_with(parent: int) -> None:
    """Ask this process to end as soon as its parent is gone: a launcher that was killed cannot ask."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if StopSignal.installed is None:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        StopSignal.installed.ask(signal.SIGTERM, again=False)


def _mesh(rank: int, world_size: int, tp_processes: int):
    """(dp_rank, dp_size, dp_group, tp_group); a group of one process is None."""
    dp_rank, dp_size = rank // tp_processes, world_size // tp_processes
    if tp_processes == 1:
        return dp_rank, dp_size, dist.group.WORLD, None
    tp_groups = [dist.new_group(range(i, i + tp_processes)) for i in range(0, world_size, tp_processes)]
    dp_groups = [dist.new_group(range(i, world_size, tp_processes)) for i in range(tp_processes)]
    return dp_rank, dp_size, dp_groups[rank % tp_processes] if dp_size > 1 else None, tp_groups[dp_rank]


def all_data_parallel(processes: Processes) -> Processes:
    """The same processes, each with a model of its own."""
    return replace(processes, dp_rank=processes.rank, dp_size=processes.world_size, dp_group=processes.group,
                   tp_group=None)


def _torchrun_ranks() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) by torchrun's environment, None outside it. Raises UserError."""
    if "RANK" not in os.environ:
        return None
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"the environment has RANK but no {name}: start with torchrun, or unset RANK")
    texts = os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise UserError("the environment's RANK={}, WORLD_SIZE={}, LOCAL_RANK={} are no ranks: start with "
                        "torchrun, or unset RANK".format(*texts))
    return tuple(map(int, texts))


def print0(text: str, processes: Processes) -> None:
    """Print on the main process only."""
    if processes.main:
        print(text, flush=True)


def pick_device(device: str, local_rank: int | None = None) -> torch.device:
    """The device a name stands for, known to be there. With a local rank, 'cuda' is that rank's GPU."""
    if device == "auto":
        mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps_or_cpu
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown: use auto, cpu, cuda, cuda:0, mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r} is not supported: use auto, cpu, cuda, cuda:0, mps")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device!r}, but this machine has no MPS device: use --device=cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"device={device!r}, but PyTorch sees no CUDA GPU here: use --device=cpu")
        if local_rank is not None:
            if local_rank >= count:
                raise UserError(f"local rank {local_rank} needs its own GPU and {count} are visible: start "
                                f"at most {count} processes on this machine (--nproc_per_node={count})")
            return torch.device("cuda", local_rank)
        if chosen.index is not None and chosen.index >= count:
            raise UserError(f"device={device!r}, but the GPUs here are cuda:0 to cuda:{count - 1}")
        return torch.device("cuda", chosen.index or 0)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a name; 'auto': bfloat16 on CUDA (float16 on older GPUs), else float32."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_compile(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot work here."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile=True needs Triton on a GPU and it is not installed: use --compile=False")
    if not any(map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++", "gcc", "cc"])):
        raise UserError("compile=True needs a C++ compiler and there is none: install g++, or use "
                        "--compile=False")


def make_deterministic() -> None:
    """The same bits in every run on the same machine; before anything is computed on a GPU. Costs speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of a GPU that tensors took so far, None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def data_parallel(model: torch.nn.Module, processes: Processes, compiled: bool) -> torch.nn.Module:
    """The model with its gradients averaged over dp_group; the model itself if there is none, or if it is
    sharded and so does that anyway.

    A compiled backward pass hands over all gradients at its end, so there is nothing for several buckets to
    overlap with, and one large bucket costs the least (see records/).
    """
    if processes.dp_group is None or isinstance(model, FSDPModule):
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, process_group=processes.dp_group,
        bucket_cap_mb=1000 if compiled else 25, gradient_as_bucket_view=True)


def settle_buckets(trained: torch.nn.Module, shape: tuple[int, int], device: torch.device,
                   shared: torch.Generator | None) -> None:
    """Let DDP see three backward passes, of tokens (B, T), before the first that counts: before there are
    moments, where it still has both its first buckets and its final ones.

    After its first pass it orders gradients anew, and in which order an all-reduce adds up the ranks depends
    on where a gradient lies. So a run that was resumed would add up its first step in another order than the
    run that was not interrupted. Leaves all random states, that of the generator `shared` too, as they are.
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


def average_gradients(trained: torch.nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients over the data-parallel processes, or leaves that,
    and all communication, to a later one. Until then every process has whole gradients, in fp32, unless
    FSDP is to accumulate_sharded. FSDP still fetches parameters that it does not keep."""
    if isinstance(trained, DistributedDataParallel):
        trained.require_backward_grad_sync = now
    elif isinstance(trained, FSDPModule):
        trained.set_requires_gradient_sync(now or trained.sharding.accumulate_sharded)
        if not trained.sharding.reshard_after_forward:
            trained.set_reshard_after_backward(now)


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 divides a model over data-parallel processes (ZeRO-3, arXiv 1910.02054)."""

    processes: Processes
    dtype: torch.dtype  # that parameters are computed with; they are kept and gradients averaged in fp32
    min_num_params: float = 1e6  # blocks are fetched together until they hold so many
    reshard_after_forward: bool = True  # drop what was fetched, and fetch it again for the backward pass
    cpu_offload: bool = False  # keep parameters, gradients and optimizer state in the CPU's memory
    accumulate_sharded: bool = False  # average gradients after every micro-step, and never hold them whole

    def units(self, blocks) -> list[list[int]]:
        """The numbers of consecutive blocks that are fetched together; those at the end that hold too few
        join the last unit. If all together hold too few there is none: the blocks stay with embedding, head
        and final LayerNorm, which are whole throughout a step."""
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

    def shard(self, modules, reshard_after_forward: bool) -> None:
        """Keep this process's part of the parameters of a module or of modules that make a unit."""
        # of tensor-parallel blocks, whose results nobody writes into
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

    def shard_as_filled(self, model: torch.nn.Module, names) -> None:
        """Shard each unit as soon as its parameters have values, and then the rest: if they come in the
        model's order, never more than one is whole beside embedding and head.

        names: an iterator that fills a parameter of the model and then gives its name.
        """
        blocks = model.transformer.h
        missing = {}  # names of a unit's parameters that have no value yet
        for unit in self.units(blocks):
            prefixes = tuple(f"transformer.h.{i}." for i in unit)
            missing[tuple(unit)] = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
        for name in names:
            for unit in [unit for unit, waited_for in missing.items() if name in waited_for]:
                missing[unit].discard(name)
                if not missing[unit]:
                    self.shard([blocks[i] for i in unit], self.reshard_after_forward)
        self.shard(model, False)  # the last that is needed and the first again
        model.sharding = self


def reshard(model: torch.nn.Module) -> None:
    """Let go of what FSDP keeps whole from a forward pass to its backward pass, where none follows: until
    then a model's parameters are not those that the optimizer knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that FSDP sharded; of others, all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP sharded, with all processes' parts, on the device of its group; others as they are.
    All processes of the group take part."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)  # with cpu_offload it is not there
    return DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=tensor.shape,
                              stride=tensor.stride()).full_tensor()


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of the part of a whole tensor that this process has of `like`, sharded if that is, on its
    device. A scalar has no parts."""
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole.to(like.device, copy=True)
    mesh, local = like.device_mesh, like.to_local()
    rows = -(-whole.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, whole.shape[0])
    part = whole[first:first + rows].to(local.device, local.dtype, copy=True)
    assert part.shape == local.shape, f"FSDP divides {tuple(whole.shape)} in another way than into rows"
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())


def functional_all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum over a group in a new tensor, in a form that torch.compile knows. Not for autograd: PyTorch's
    derivative of it is another all-reduce, which is right for neither of its uses in tensor parallelism."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))


def functional_all_gather(x: torch.Tensor, processes: int, group_name: str) -> torch.Tensor:
    """x of every process of a group, (processes, *x.shape), likewise."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), processes, group_name)).view(
        processes, *x.shape)


def begin_all_gather(x: torch.Tensor, group) -> torch.Tensor:
    """x of every process, one after the other, (processes * x.shape[0], ...): valid after finish_tensor, what
    is computed until then goes on at the same time. Sends (processes - 1) times the bytes of x."""
    return torch.ops._c10d_functional.all_gather_into_tensor(x, group.size(), group.group_name)


def begin_reduce_scatter(x: torch.Tensor, group) -> torch.Tensor:
    """This process's part of the sum over the group, (x.shape[0] / processes, ...), likewise. Sends
    (processes - 1) times the bytes of that part."""
    return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)


def finish_tensor(x: torch.Tensor) -> torch.Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def all_reduce_sum(tensor: torch.Tensor, group) -> torch.Tensor:
    """Sum in place over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


ALL_REDUCES = ("nccl", "oneshot")


def check_all_reduce(kind: str) -> None:
    """Raise UserError for a tp_allreduce that GroupSum does not know."""
    if kind not in ALL_REDUCES:
        raise UserError(f"tp_allreduce={kind!r} is unknown: use {' or '.join(ALL_REDUCES)}")


@functools.cache
def _without_symmetric_memory(group, device: torch.device) -> bool:
    """Whether the group must do without; if so, its first process says why, once."""
    problem = "it needs CUDA" if device.type != "cuda" else None if usable(torch.empty(0, device=device)) \
        else "it needs Triton"
    if problem is None:
        try:
            _symmetric((1,), torch.int64, device, group)
        except (ImportError, AttributeError, RuntimeError) as e:
            problem = str(e).splitlines()[0]
    problem = next(filter(None, all_values(problem, group)), None)  # all processes or none
    if problem is not None and dist.get_rank(group) == 0:
        print(f"tp_allreduce='oneshot' does not work here ({problem}): using the group's own all-reduce",
              flush=True)
    return problem is not None


def _symmetric(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group):
    """Zeros in memory that all GPUs of the group can reach, and that memory's handle."""
    import torch.distributed._symmetric_memory as symmetric_memory

    shared = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(shared, group.group_name)
    return shared.zero_(), handle


class GroupSum:
    """Adds a small tensor up over a group, again and again, also inside a CUDA graph: how a decoding step
    synchronises.

    buffer: fp32, where each process puts its summand. kind: 'nccl' (the group's own all-reduce), 'oneshot'
    (every GPU writes into all others' memory, see kernels/exchange.py; more than MAX_VALUES are left to
    'nccl'), or 'none', which adds only this process's own, to see what the others cost.
    """

    def __init__(self, kind: str, buffer: torch.Tensor, group):
        if kind != "none":
            check_all_reduce(kind)
        self.kind, self.buffer, self.group = "none" if group is None else kind, buffer, group
        if self.kind == "oneshot" and (
                buffer.numel() > exchange.MAX_VALUES or buffer.dtype != torch.float32
                or _without_symmetric_memory(group, buffer.device)):
            self.kind = "nccl"
        if self.kind == "oneshot":
            shape = 2, dist.get_world_size(group), buffer.numel()
            slots, handle = _symmetric(shape, torch.int64, buffer.device, group)
            torch.cuda.synchronize(buffer.device)
            barrier(group)  # nobody writes into memory that is still to be zeroed
            self._exchange = exchange.Exchange(slots, handle.buffer_ptrs, dist.get_rank(group),
                                               buffer.numel())

    def add_to(self, base: torch.Tensor) -> None:
        """base += the sum of all processes' buffers. The buffer's content is lost."""
        if self.kind == "oneshot":
            return self._exchange.add_to(base, self.buffer)
        if self.kind == "nccl":
            dist.all_reduce(self.buffer, group=self.group)
        base.add_(self.buffer)

    def gather(self) -> torch.Tensor:
        """The buffers (..., K) of all P processes side by side, (..., P * K); 'none' has its own P times."""
        processes = 1 if self.group is None else dist.get_world_size(self.group)
        if self.kind == "oneshot":
            out = self.buffer.new_empty(*self.buffer.shape[:-1], processes, self.buffer.shape[-1])
            self._exchange.gather(out, self.buffer)
        elif self.kind == "nccl":
            parts = functional_all_gather(self.buffer, processes, self.group.group_name)
            out = parts.movedim(0, -2)
        else:
            out = self.buffer.unsqueeze(-2).expand(*self.buffer.shape[:-1], processes, -1)
        return out.flatten(-2)


def from_main(value, group):
    """The value that the group's first process has of any picklable object, on every process."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def on_main(function, group):
    """What function() returns on rank 0, on every rank; a UserError that it raises there, likewise.

    For what only one process may do or should decide; the others wait.
    """
    if group is None:
        return function()
    result, problem = None, None
    if dist.get_rank(group) == 0:
        try:
            result = function()
        except UserError as e:
            problem = e
    result, problem = from_main((result, problem), group)
    if problem is not None:
        raise problem
    return result


def gather_to_main(value, group) -> list | None:
    """Every rank's value in a list on rank 0, None elsewhere."""
    if group is None:
        return [value]
    box = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, box, dst=0, group=group)
    return box


def all_values(value, group) -> list:
    """Every process's value of any picklable object, in a list, on all of them."""
    if group is None:
        return [value]
    box = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, value, group=group)
    return box


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP as a request to end in order, at the next step; a second one ends the
    process at once. What is ignored, as by nohup, stays so.

    A thread receives them: the main one may be waiting for processes that no longer answer.
    """

    installed = None
    TOGETHER = 2.0  # seconds; who ends a machine sends SIGTERM to us and to torchrun, which passes it on

    def __init__(self, group):
        self.received, self._since, self._group = 0, 0.0, group
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._read, args=(reads,), name="signals", daemon=True).start()
        StopSignal.installed = self

    def _read(self, reads: int) -> None:
        while number := os.read(reads, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self.ask(number[0])

    def ask(self, number: int, again: bool = True) -> None:
        """Note a request; again: whether it counts as a second one if there is a first."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif again and not (number == signal.SIGTERM and time.monotonic() - self._since < self.TOGETHER):
            os._exit(128 + number)

    def received_anywhere(self) -> bool:
        """Whether any process was asked to end; all of them take part."""
        return any(all_values(self.received, self._group))


def agree(loss_sum: torch.Tensor, norm: torch.Tensor, stop: bool, processes: Processes
          ) -> tuple[float, float, bool]:
    """What all processes have to know of a step, in one reduction, which waits for the device: the sum of
    loss_sum over the data-parallel ranks; norm, the same on all of them, but NaN or infinite if it is so
    anywhere; whether stop is true anywhere.
    """
    exact = torch.float32 if loss_sum.device.type == "mps" else torch.float64  # MPS has no fp64
    asked = torch.full_like(loss_sum, float(stop), dtype=exact)
    report = all_reduce_sum(torch.stack((loss_sum.to(exact), norm.to(exact), asked)), processes.group)
    loss, norms, stops = report.tolist()
    of_a_model = processes.world_size // processes.dp_size  # processes that each have its whole loss
    return loss / of_a_model, norms / processes.world_size, stops > 0


def barrier(group) -> None:
    if group is not None:
        dist.barrier(group=group)


def finish(processes: Processes) -> None:
    """End a distributed process cleanly: together, flushed, and without the interpreter's teardown.

    Some finished gloo jobs abort in teardown, so the process leaves by os._exit; NCCL's own teardown waits
    for ever where a CUDA graph that communicates is still there. A single process just returns.
    """
    if processes.group is None:
        return
    barrier(processes.group)
    if dist.get_backend() != "nccl":
        dist.destroy_process_group()
    elif processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
