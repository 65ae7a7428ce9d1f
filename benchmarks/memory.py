"""Mode memory of bench.py: the GPU memory that each strategy needs and what it holds there, and the largest
model with which a step fits. Each strategy has the GPUs to itself.

"held" is the memory in use after an update, with its gradients. The peak has activations and buffers beyond
that.
"""

import gc
from collections.abc import Callable

import torch
import torch.nn as nn

from benchmarks.harness import Bench, take_turns
from benchmarks.strategies import Strategy
from nanosync.distributed import all_values, barrier
from nanosync.sharding import local_part


def allocated(device: torch.device, peak: bool = False) -> int:
    """Return the bytes of GPU memory in use, or the most since the last reset; 0 on other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def bytes_by_role(model: nn.Module, optimizer, device: torch.device) -> dict[str, int]:
    """Count the bytes on this device, after an update whose gradients are still there."""
    parameters = list(model.parameters())
    roles = {"parameters": parameters, "gradients": [p.grad for p in parameters],
             "optimizer": [t for state in optimizer.state.values() for t in state.values()
                           if torch.is_tensor(t)]}
    return {role: sum(t.nbytes for t in map(local_part, tensors) if t.device.type == device.type)
            for role, tensors in roles.items()}


def predicted_bytes(strategy: Strategy, n_parameters: int, dp_size: int) -> float:
    """Return the bytes of parameters and gradients in fp32 and of AdamW's two moments: 16 a parameter, less
    what is divided over the data-parallel processes (arXiv 1910.02054).

    n_parameters: of the model, or of its part on a tensor-parallel process.
    """
    if strategy.cpu_offload:
        return 0.0
    return n_parameters * (16 / dp_size if strategy.fsdp else 8 + 8 / dp_size if strategy.zero1 else 16)


def free_memory(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    barrier(bench.processes.group)


def measure(bench: Bench, strategy: Strategy, train: Callable) -> dict:
    """Measure one strategy; return its figures, with the bytes of the process that needs the most."""
    c, group = train(strategy), bench.processes.group
    times = take_turns({strategy.name: c.turn}, bench.config["rounds"], group)[strategy.name]
    n_parameters = sum(p.numel() for p in c.model.parameters())
    mine = {"bytes": c.memory | {"held": c.held_bytes, "peak": c.peak_bytes},
            "predicted": predicted_bytes(strategy, n_parameters, c.parallel.processes.dp_size)}
    worst = max(all_values(mine, group), key=lambda m: m["bytes"]["peak"])
    return c.figures(times) | worst


def largest_model(bench: Bench, strategy: Strategy, train: Callable) -> dict:
    """Find about the most layers with which a step fits into 97% of the memory that is free now.

    The peaks at two sizes predict the limit; steps at the limit confirm it. `tried` in what is returned has
    the peak for each number of layers, None where the step did not fit.
    """
    processes, n_layer = bench.processes, bench.config["n_layer"]
    free_memory(bench)
    limit = 0.97 * min(all_values(torch.cuda.mem_get_info()[0], processes.group))
    tried, parameters = {}, {}

    def fits(layers: int) -> bool:
        try:
            c = train(strategy, layers)
            peak, parameters[layers] = c.peak_bytes, c.model.n_parameters()
        except torch.OutOfMemoryError:  # on all processes alike: they hold the same
            peak = None
        peaks = all_values(peak, processes.group)
        tried[layers] = None if None in peaks else max(peaks)
        return tried[layers] is not None

    fitting = [n for n in (n_layer, n_layer + max(4, n_layer // 2)) if fits(n)]
    for _ in range(2):
        if len(fitting) < 2:
            break
        free_memory(bench)
        n1, n2 = fitting[-2:]
        n = n2 + int((limit - tried[n2]) / (tried[n2] - tried[n1]) * (n2 - n1))
        if n <= n2 or not fits(n):
            break
        fitting.append(n)
    free_memory(bench)
    best = max(fitting, default=None)
    return {"layers": best, "parameters": parameters.get(best), "peak": tried.get(best), "limit": limit,
            "tried": tried}


def print_table(rows: list[dict], device: torch.device) -> None:
    columns = ("parameters", "gradients", "optimizer", "held", "predicted", "peak", "activations")
    first = rows[0]
    print(f"{'GB a GPU':>20}" + "".join(f"{column:>12}" for column in (*columns, "held/pred.", "tokens/s"))
          + f"  of {first['name']}")
    for row in rows:
        b = row["bytes"] | {"predicted": row["predicted"]}
        b["activations"] = b["peak"] - b["held"]
        if device.type != "cuda":  # PyTorch does not count there
            b |= dict.fromkeys(("held", "peak", "activations"))
        cells = ["n/a" if b[column] is None else f"{b[column] / 2**30:.2f}" for column in columns]
        cells += [f"{b['held'] / b['predicted']:.3f}" if b["predicted"] and b["held"] else "n/a",
                  f"{row['tokens_per_second']:,.0f}"]
        ratio = row["tokens_per_second"] / first["tokens_per_second"]
        print(f"{row['name']:>20}" + "".join(f"{cell:>12}" for cell in cells) + f"  {ratio:.3f}")
        best = row.get("largest", {"layers": None})
        if best["layers"] is not None:
            print(f"{'':>20} a step fits with {best['layers']} layers, {best['parameters'] / 1e9:.2f}B "
                  f"parameters: {best['peak'] / 2**30:.1f} of {best['limit'] / 2**30:.1f} GB")


def run(bench: Bench, strategies: list[Strategy], train: Callable) -> None:
    """Measure each strategy; print the table, write the JSON file after each.

    train: (strategy, layers=0) -> a contender that trains such a model, of the setting n_layer by default.
    """
    settings, processes, rows = bench.config, bench.processes, []
    for strategy in strategies:
        rows.append({"name": strategy.name, **measure(bench, strategy, train)})
        free_memory(bench)
        if settings["largest"]:
            rows[-1]["largest"] = largest_model(bench, strategy, train)
        bench.write_json(world_size=processes.world_size, rows=rows)
    if not processes.main:
        return
    print(f"memory: {processes.world_size} x {bench.machine}, compile={settings['compile']}, "
          f"B={settings['batch_size']} a process, T={settings['block_size']}, L={settings['n_layer']} "
          f"H={settings['n_head']} C={settings['n_embd']} V={settings['vocab_size']}; "
          f"median of {settings['rounds']} rounds")
    print_table(rows, bench.device)
