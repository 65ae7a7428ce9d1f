"""Processes and collectives: which rank this process has, in which groups; sums, gathers, leaving together.

The only module that reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. All other modules
take a `Processes`, a device or a group as an argument; `group=None` means one process and no communication.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from nanosync.errors import UserError
from nanosync.hardware import pick_device
from nanosync.signals import StopSignal

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
