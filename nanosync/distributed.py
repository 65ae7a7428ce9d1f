"""Processes and collectives: the ranks and groups of this process, sums, gathers, a common exit.

No other module reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Other modules take a
`Processes`, a device or a group as an argument. `group=None` means one process and no communication.
"""

import hashlib
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanosync.errors import UserError, exit_now
from nanosync.hardware import pick_device
from nanosync.signals import StopSignal

BACKENDS = ("nccl", "gloo", "mpi", "ucc")


def env_rank() -> int:
    """Return this process's global rank from torchrun's environment, 0 without torchrun.

    It is known before a process group exists.
    """
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # `start` raises the error for a malformed RANK


@dataclass(frozen=True)
class Job:
    """The torchrun command that started this process; torchrun may start its processes several times."""

    name: str  # rendezvous id, "none" if it has no id of its own
    launcher: str  # process that started this process: host, process id, start time
    restarts: int  # number of restarts that torchrun counts on this machine

    @classmethod
    def of_process(cls) -> "Job | None":
        """Return the job of this process, None without torchrun."""
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        if not restarts.isdecimal():
            return None
        parent = os.getppid()
        try:
            with open(f"/proc/{parent}/stat") as f:  # a process id alone may be used again
                started = f.read().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            started = "?"
        return cls(os.environ.get("TORCHELASTIC_RUN_ID") or "none",
                   f"{socket.gethostname()} {parent} {started}", int(restarts))

    def fields(self) -> dict:
        """Return the entries of status.json."""
        return {"job": [self.name, self.launcher]}


@dataclass(frozen=True)
class Processes:
    """The processes of a run, from the view of one process: ranks, sizes, groups and the device."""

    rank: int  # global
    world_size: int
    local_rank: int  # on this machine
    device: torch.device
    group: dist.ProcessGroup | None  # all processes; None for a single process
    # a (dp, tp) mesh: each model is on tp_processes neighbouring processes
    dp_rank: int = 0  # number of this process's model, and of its share of the data
    dp_size: int = 1  # number of models
    dp_group: dist.ProcessGroup | None = None  # processes that hold the same part of their models
    tp_group: dist.ProcessGroup | None = None  # processes of one model

    @property
    def main(self) -> bool:
        """True for the process that prints and writes files, global rank 0."""
        return self.rank == 0


def start(device: str = "auto", backend: str = "auto", timeout_seconds: float = 600.0,
          tp_processes: int = 1, settings: dict | None = None) -> Processes:
    """Choose the device and, under torchrun, join the process group and the two groups of the mesh.

    Raises UserError.

    device: 'auto' (cuda, else mps, else cpu), or a name for torch.device. Under torchrun a process takes the
        GPU of its local rank.
    backend: 'auto' (nccl on CUDA, else gloo), or a name for init_process_group.
    timeout_seconds: longest time that a collective waits for other processes, s.
    tp_processes: number of processes that hold one model. There are world_size / tp_processes models.
    settings: settings of the script, which must be the same on all processes.
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
        raise UserError(f"tp_processes={tp_processes} does not divide the number of processes, {world_size}: "
                        f"start a multiple of it, torchrun --nproc_per_node={max(1, tp_processes)}")
    if ranks is None:
        return Processes(0, 1, 0, chosen, None)
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl" and chosen.type != "cuda":
        raise UserError(f"backend='nccl' needs CUDA and the device is {chosen}: use --backend=gloo")
    if not getattr(dist, f"is_{backend}_available")():
        raise UserError(f"backend={backend!r} is not built into this PyTorch: use --backend=auto")
    # before the processes meet: a launcher that is gone by then would leave them waiting for each other
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent watch", daemon=True).start()
    try:
        limit = timedelta(seconds=timeout_seconds)
        store, *_ = next(rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        store = fresh_store(store, ranks[0], world_size, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=ranks[0], world_size=world_size, timeout=limit,
                                device_id=chosen if backend == "nccl" else None)
    except (dist.DistError, ValueError) as e:  # a network error, or a malformed address in the environment
        raise UserError(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']}: {str(e).splitlines()[0]}") from None
    if settings is not None:
        check_same_settings(settings, dist.group.WORLD)  # before groups that other settings would not make
    return Processes(*ranks, chosen, dist.group.WORLD, *_mesh(ranks[0], world_size, tp_processes))


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return the store of a process group with a prefix that no earlier start of the job has used.

    torchrun keeps its store when it restarts processes, and a process that reads an address of an earlier
    start connects to nothing. Restart counts differ between machines. So rank 0 draws the prefix, and answers
    the newest greeting of each process until the process has taken the prefix. Raises UserError.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + timeout
    if rank > 0:
        store.set(f"greeting/{rank}", token)
        prefix = store.get(f"prefix/{token}").decode()
        store.set(f"taken/{prefix}/{rank}", "")
        return dist.PrefixStore(prefix, store)
    answered, missing = {}, set(range(1, world_size))
    while missing := {other for other in missing if not store.check([f"taken/{token}/{other}"])}:
        for other in missing:
            if store.check([f"greeting/{other}"]):
                greeting = store.get(f"greeting/{other}").decode()
                if answered.get(other) != greeting:
                    store.set(f"prefix/{greeting}", token)
                    answered[other] = greeting
        if time.monotonic() > end:
            raise UserError(f"rank {min(missing)} of {world_size} has not started after {timeout:g} s: start "
                            f"all machines, or give them more time with --timeout=...")
        time.sleep(0.005)
    return dist.PrefixStore(token, store)


def check_same_settings(settings: dict, group) -> None:
    """Raise UserError on all processes if the settings differ between processes, as after a typing error on
    one of two machines. The index of a device may differ.
    """
    own = {name: value.partition(":")[0] if name == "device" else value for name, value in settings.items()}
    digest = hashlib.sha256(repr(list(own.items())).encode(errors="backslashreplace")).hexdigest()
    if len(set(all_values(digest, group))) == 1:
        return
    first, *others = all_values(own, group)
    for rank, other in enumerate(others, 1):
        for name in [*first, *(name for name in other if name not in first)]:
            # repr, as True == 1
            values = [repr(of[name]) if name in of else "not a setting" for of in (first, other)]
            if values[0] != values[1]:
                raise UserError(f"{name} is {values[0]} on rank 0 and {values[1]} on rank {rank}: use the "
                                f"same command on all machines")


def _end_with(parent: int) -> None:
    """Ask this process to stop when its parent process is gone, as a killed launcher sends no signal."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if StopSignal.installed is None:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        StopSignal.installed.ask(signal.SIGTERM, again=False)


def _mesh(rank: int, world_size: int, tp_processes: int):
    """Make the groups; return (dp_rank, dp_size, dp_group, tp_group). A group of one process is None."""
    dp_rank, dp_size = rank // tp_processes, world_size // tp_processes
    if tp_processes == 1:
        return dp_rank, dp_size, dist.group.WORLD if world_size > 1 else None, None
    tp_groups = [dist.new_group(range(i, i + tp_processes)) for i in range(0, world_size, tp_processes)]
    dp_groups = [dist.new_group(range(i, world_size, tp_processes)) for i in range(tp_processes)]
    return dp_rank, dp_size, dp_groups[rank % tp_processes] if dp_size > 1 else None, tp_groups[dp_rank]


def all_data_parallel(processes: Processes) -> Processes:
    """Return the same processes as dp_size = world_size models of one process each."""
    return replace(processes, dp_rank=processes.rank, dp_size=processes.world_size, dp_group=processes.group,
                   tp_group=None)


def _torchrun_ranks() -> tuple[int, int, int] | None:
    """Return (global rank, world size, local rank), None without torchrun. Raises UserError."""
    if "RANK" not in os.environ:
        for name in ("WORLD_SIZE", "SLURM_NTASKS"):
            n = os.environ.get(name, "")
            if n.isdecimal() and int(n) > 1:
                launcher = "torchrun --nproc_per_node=GPUS" if name == "WORLD_SIZE" else \
                    "srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS"
                raise UserError(f"the environment has {name}={n} but no RANK, so {n} processes would be {n} "
                                f"runs: start with {launcher}, or unset {name} for a single process")
        return None
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"the environment has RANK but no {name}: start with torchrun, or unset RANK")
    texts = os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", "0")
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise UserError("the environment's RANK={}, WORLD_SIZE={}, LOCAL_RANK={} are not valid: start with "
                        "torchrun, or unset RANK".format(*texts))
    return tuple(map(int, texts))


def print0(text: str, processes: Processes) -> None:
    """Print on the main process only."""
    if processes.main:
        print(text, flush=True)


def begin_all_gather(x: torch.Tensor, group, out: torch.Tensor | None = None) -> torch.Tensor:
    """Start to concatenate x over the processes of the group; return the result, valid after finish_tensor.

    Computation continues meanwhile. Sends (processes - 1) times the bytes of x. The result has the shape
    (processes * x.shape[0], ...).

    out: tensor for the result, None for a new one. x may be its place in `out`.
    """
    # here, because kernels import Triton, which processes without a model do not need
    from kernels.collectives import begin_gather

    return begin_gather(x, group.size(), group.group_name, out)


def begin_reduce_scatter(x: torch.Tensor, group) -> torch.Tensor:
    """Start to sum x over the group; return this process's part of the sum, valid after finish_tensor.

    Sends (processes - 1) times the bytes of the result. The result has the shape
    (x.shape[0] / processes, ...).
    """
    return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", group.size(), group.group_name)


def finish_tensor(x: torch.Tensor) -> torch.Tensor:
    """Wait for the collective that fills x; return x."""
    return torch.ops._c10d_functional.wait_tensor(x)


def all_reduce_sum(tensor: torch.Tensor, group) -> torch.Tensor:
    """Sum a tensor over the group in place; return it."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def from_main(value, group):
    """Return the value of the group's first process on every process. value: any picklable object."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def on_main(function, group):
    """Call function() on the group's first process; return its result on all processes of the group.

    The other processes wait. A UserError of function() is raised on all processes.
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
    """Return a list of all processes' values on the group's first process, None on the other processes."""
    if group is None:
        return [value]
    box = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, box, dst=0, group=group)
    return box


def all_values(value, group) -> list:
    """Return a list of all processes' values, on every process. value: any picklable object."""
    if group is None:
        return [value]
    box = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, value, group=group)
    return box


def agree(loss_sum: torch.Tensor, norm: torch.Tensor, stop: bool, processes: Processes
          ) -> tuple[float, float, bool]:
    """All-reduce loss, norm and stop flag together; return (sum of loss_sum, norm, stop).

    Waits for the device.

    loss_sum: scalar of a process, summed over the models.
    norm: scalar, the same on all processes. The result is not finite if it is not finite on any process.
    stop: the result is True if it is True on any process.
    """
    exact = torch.float32 if loss_sum.device.type == "mps" else torch.float64  # MPS has no fp64
    asked = torch.full_like(loss_sum, float(stop), dtype=exact)
    report = all_reduce_sum(torch.stack((loss_sum.to(exact), norm.to(exact), asked)), processes.group)
    loss, norms, stops = report.tolist()
    processes_per_model = processes.world_size // processes.dp_size  # each has the whole loss of its model
    return loss / processes_per_model, norms / processes.world_size, stops > 0


def any_process(flag: bool, device: torch.device, group) -> bool:
    """Return True if the flag is True on any process of the group. Waits for the device if there is a
    group."""
    if group is None:
        return flag
    return all_reduce_sum(torch.full((), float(flag), device=device), group).item() > 0


def barrier(group) -> None:
    if group is not None:
        dist.barrier(group=group)


def finish(processes: Processes) -> None:
    """Wait for all processes, flush the output, and exit without the interpreter's teardown.

    Some finished gloo jobs abort in teardown, so the process exits with os._exit. NCCL's own teardown blocks
    for ever if a CUDA graph with a collective still exists. A single process returns from this function.
    """
    if processes.group is None:
        return
    barrier(processes.group)
    if dist.get_backend() != "nccl":
        dist.destroy_process_group()
    elif processes.device.type == "cuda":
        torch.cuda.synchronize(processes.device)
    exit_now()
