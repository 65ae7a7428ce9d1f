"""batch_size='auto': the largest micro-batch that fits a GPU, with the sequences of an update unchanged.

The value that 'auto' replaces, a configuration file's or the script's, times gradient_accumulation_steps is
the number of sequences of an update. The search measures the memory of forward and backward passes at the two
smallest micro-batches, and predicts the largest that fits from a line through the two largest measurements
until the prediction is measured. Only micro-batches that divide the sequences of a process are tried.
"""

import gc
from collections.abc import Callable

import torch
import torch.nn as nn

from configurator import Config, check_at_least
from nanosync.distributed import all_values
from nanosync.errors import UserError, shown
from nanosync.memory import memory_owners
from nanosync.model_kind import machine_memory
from nanosync.parallelism import Parallelism

AUTO = "auto"
BYTES_A_TOKEN = 80  # input and target, int64, of a micro-batch in use and of 4 that the loader reads ahead
FILL = 0.92  # share of the free memory for tensors; the rest is for fragments, NCCL and libraries


def check_batch_size(config: Config) -> None:
    """Raise UserError for a wrong batch_size, before any work is done."""
    if config["batch_size"] != AUTO:
        check_at_least(config, 1, "batch_size")
        return check_micro_batch(config, "batch_size", "block_size")
    before = config.replaced.get("batch_size")
    if type(before) is not int or before < 1:
        raise UserError(f"batch_size='auto' replaces batch_size={shown(before)}, and an update has the "
                        f"replaced number times gradient_accumulation_steps sequences: give 'auto' once, "
                        f"after a number of at least 1")
    for name, reason in (("eval_only", "eval_only trains none"),
                         ("cuda_graphs", "with cuda_graphs they take other memory"),
                         ("use_fsdp", "with use_fsdp processes share the model")):
        if config[name]:
            raise UserError(f"batch_size='auto' measures training steps of one process, and {reason}: give a "
                            f"number, --batch_size={before}")
    if config["tp_processes"] > 1:
        raise UserError(f"batch_size='auto' measures training steps of one process, and with "
                        f"tp_processes={config['tp_processes']} several hold a model: give a number, "
                        f"--batch_size={before}")


def check_micro_batch(config: Config, sequences: str, length: str) -> None:
    """Raise UserError if this machine's memory cannot hold the token ids of the micro-batches in the loader.

    sequences, length: names of the settings for the sequences of a micro-batch and their tokens.
    """
    memory, n_bytes = machine_memory(), BYTES_A_TOKEN * config[sequences] * config[length]
    if memory is not None and n_bytes > memory:
        raise UserError(f"{sequences}={config[sequences]} and {length}={config[length]} make micro-batches "
                        f"of {n_bytes // 2**30:,} GB, without the model, and this machine has "
                        f"{memory // 2**30:,} GB of memory: lower {sequences} or {length}")


def settle_batch_size(run, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallelism) -> None:
    """Replace batch_size='auto' by a number, and set gradient_accumulation_steps and eval_iters to match.

    A resumed run takes the numbers of its checkpoint. Without CUDA the number is that which 'auto' replaced.
    All processes must call this function. Raises UserError.
    """
    config, processes = run.config, run.processes
    if config["batch_size"] != AUTO:
        return
    before = config.replaced["batch_size"]
    sequences = before * config["gradient_accumulation_steps"]
    stored = None if run.resumed is None else stored_size(run.resumed.state["config"], sequences,
                                                          processes.dp_size)
    if stored is not None:
        size, why = stored, "as in the checkpoint"
    elif processes.device.type != "cuda":
        size, why = before, f"the memory of the device {processes.device.type} is not measured"
    else:
        size, why = _measured_size(run, model, optimizer, parallel, sequences // processes.dp_size)
    set_size(config, size, sequences, before)
    run.line(f"batch_size=auto: {size} sequences, {why}; gradient_accumulation_steps="
             f"{config['gradient_accumulation_steps']} keeps {sequences} sequences an update, eval_iters="
             f"{config['eval_iters']}")


def stored_size(config: dict, sequences: int, processes: int) -> int | None:
    """Return the batch_size of a checkpoint's settings if it makes updates of so many sequences on so many
    data-parallel processes, else None."""
    size, steps = config.get("batch_size"), config.get("gradient_accumulation_steps")
    fits = type(size) is int and type(steps) is int and size > 0 and size * steps == sequences
    return size if fits and steps % processes == 0 else None


def set_size(config: Config, size: int, sequences: int, before: int) -> None:
    """Set batch_size, with at least as many sequences in an evaluation as with the size before."""
    values = {"batch_size": size, "gradient_accumulation_steps": sequences // size,
              "eval_iters": -(-config["eval_iters"] * before // size)}
    for name, value in values.items():
        if config[name] != value:
            config[name], config.origin[name] = value, "batch_size=auto"


def _measured_size(run, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallelism,
                   sequences: int) -> tuple[int, str]:
    """Return the largest micro-batch that fits the GPU of every process, and a text about its memory.

    sequences: of an update on this process.
    """
    config, device = run.config, run.processes.device
    run.line("batch_size=auto: measuring training steps (about a minute each if they are compiled)")
    torch.cuda.empty_cache()
    room = FILL * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    held = memory_owners(model, optimizer, device, None)
    # AdamW has two values a parameter, and DDP's buckets have the gradients once more while it makes them
    later = max(0, 2 * held["parameters"] - held["optimizer states"])
    later += held["parameters"] if run.processes.dp_size > 1 else 0
    peaks = {}

    def measure(size: int) -> float:
        peak = _peak(model, parallel, (size, config["block_size"]), config["compile"])
        peaks[size] = max(all_values((peak + later) / room, run.processes.group))
        return peaks[size]

    size = largest_fit([n for n in range(1, sequences + 1) if sequences % n == 0], measure)
    if size is None:
        raise UserError(f"batch_size='auto': one sequence of {config['block_size']} tokens needs more than "
                        f"{room / 2**30:.1f} GiB, {100 * FILL:.0f}% of what is free: use "
                        f"--activation_checkpointing=block, a smaller block_size or a smaller model")
    return size, f"which take {100 * FILL * peaks[size]:.0f}% of the free memory"


def largest_fit(sizes: list[int], measure: Callable[[int], float]) -> int | None:
    """Return the largest size that fits, None if none does.

    sizes: in ascending order. measure: function size -> needed share of the memory, above 1 if the size does
    not fit (inf if memory ran out); it must not decrease.
    """
    needs = {}
    for size in sizes[:2]:
        needs[size] = measure(size)
        if needs[size] > 1:
            return max((n for n in needs if needs[n] <= 1), default=None)
    while True:
        fit = max(n for n in needs if needs[n] <= 1)
        failed = min((n for n in needs if needs[n] > 1), default=sizes[-1] + 1)
        left = [n for n in sizes if fit < n < failed]
        if not left:
            return fit
        known = sorted(n for n in needs if needs[n] <= 1)[-2:]
        slope = (needs[known[-1]] - needs[known[0]]) / (known[-1] - known[0]) if len(known) > 1 else 0.0
        predicted = {n: needs[fit] + slope * (n - fit) for n in left}
        # the next size is worth a measurement if the prediction misses by little
        hopeful = [n for n in left if predicted[n] <= 1] or [n for n in left[:1] if predicted[n] <= 1.1]
        if not hopeful:
            return fit
        needs[hopeful[-1]] = measure(hopeful[-1])


def _peak(model: nn.Module, parallel: Parallelism, shape: tuple[int, int], compiled: bool) -> float:
    """Return the peak bytes of two forward and backward passes, inf if memory runs out.

    The model's weights and the random states stay as they are. shape: (B, T) of the tokens.
    """
    device = parallel.processes.device
    call = torch.compile(model, dynamic=False) if compiled else model
    torch.cuda.reset_peak_memory_stats(device)
    peak, loss, x = float("inf"), None, None
    try:
        with torch.random.fork_rng([device.index]):
            for _ in range(2):  # the second with the gradients of the first
                x = torch.zeros(shape, dtype=torch.int64, device=device)
                with parallel.autocast():
                    loss = call(x, x.clone())[1]
                loss.backward()
        torch.cuda.synchronize(device)
        peak = float(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        pass
    model.zero_grad(set_to_none=True)
    loss = x = None
    if compiled:
        torch._dynamo.reset()  # the next shape must not make the graph dynamic
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak
