"""LayerNorm's kernels beside PyTorch, its compiler and Liger-Kernel: time, and share of what a copy reaches.

On a GPU one turn is a pass over so many sets of tensors that none is still in the L2 cache when it comes up
again. The GPU is kept busy until all launches of the pass are queued, so what is timed is the GPU's time and
not that of launching; contenders take turns. (In Triton's interpreter it all runs, and no figure means
anything.)

What an operation must move, in N x C values: forward x and y; backward the gradient of y, x and its gradient;
with the residual addition s = x + out, y = LayerNorm(s): x, out, s, y, and backward the gradients of s and y,
s and its gradient. Weight, bias and statistics are left out.
"""

import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from configurator import UserError
from kernels import layer_norm as ours

OPERATIONS = {"forward": 2, "backward": 3, "add forward": 4, "add backward": 4}  # N x C values moved
COPIED_BYTES = 1 << 30  # of the copy that sets the scale, on a GPU


def load_liger(folder: str):
    """LigerLayerNormFunction of a checkout of Liger-Kernel. Raises UserError."""
    if not os.path.isfile(os.path.join(folder, "src", "liger_kernel", "ops", "layer_norm.py")):
        raise UserError(f"peer={folder!r} is no checkout of Liger-Kernel: it has no "
                        f"src/liger_kernel/ops/layer_norm.py")
    sys.path.insert(0, os.path.abspath(os.path.join(folder, "src")))
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except Exception as e:  # it is the user's code
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"peer {folder} cannot be imported: {reason}") from None
    return LigerLayerNormFunction


def _plain(x, out, weight, bias):
    if out is None:
        return F.layer_norm(x, weight.shape, weight, bias)
    s = x + out
    return s, F.layer_norm(s, weight.shape, weight, bias)


def _ours(x, out, weight, bias):
    if out is None:
        return ours.layer_norm(x, weight, bias)
    return ours.add_layer_norm(x, out, weight, bias)


def contenders(add: bool, liger, compiled: bool) -> dict:
    """By name, functions of x, out, weight and bias. Liger has no LayerNorm with an addition."""
    functions = {"ours": _ours, "eager": _plain}
    if compiled:
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # a backward pass is run again and again
        functions["inductor"] = torch.compile(_plain, fullgraph=True, dynamic=False)
    if liger is not None and not add:
        def with_bias(x, out, weight, bias):
            return liger.apply(x, weight, torch.zeros_like(weight) if bias is None else bias, ours.EPS)
        functions["Liger"] = with_bias
    return functions


def _sets(rows: int, C: int, dtype: torch.dtype, add: bool, bias: bool, device) -> list[tuple]:
    """(inputs, gradients of the results), as many times as fill four L2 caches."""
    n = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        n = min(64, max(3, -(-4 * cache // (2 * rows * C * dtype.itemsize))))

    def one():
        x, out, *grads = (torch.randn(rows, C, device=device, dtype=dtype) for _ in range(4 if add else 3))
        weight, b = (torch.randn(C, device=device, dtype=dtype) for _ in range(2))
        inputs = [x, out if add else None, weight, b if bias else None]
        return [t if t is None else t.requires_grad_() for t in inputs], grads[-2:] if add else grads[:1]
    return [one() for _ in range(n)]


def _passes(function, sets: list[tuple], backward: bool):
    """A function that runs the operation once on every set."""
    if not backward:
        @torch.no_grad()
        def run():
            for inputs, _ in sets:
                function(*inputs)
        return run
    graphs = []
    for inputs, grads in sets:
        results = function(*inputs)
        graphs.append((results if isinstance(results, tuple) else (results,),
                       [t for t in inputs if t is not None], grads))

    def run():
        for results, inputs, grads in graphs:
            torch.autograd.grad(results, inputs, grads, retain_graph=True)
    return run


def _seconds(run, device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    to_launch = time.perf_counter() - started
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(4e9 * min(to_launch, 0.2)))  # cycles: twice the time that launching takes
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device, rounds: int) -> float:
    """Bytes a second, read and written, of a large copy: the median."""
    source = torch.empty(COPIED_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device) for _ in range(rounds + 1)][1:]
    return 2 * source.nbytes / statistics.median(times)


def measure(operation: str, rows: int, C: int, dtype: torch.dtype, bias: bool, liger, rounds: int, device,
            bandwidth: float) -> list[dict]:
    """A row of figures for each contender."""
    add, backward = operation.startswith("add"), operation.endswith("backward")
    sets = _sets(rows, C, dtype, add, bias, device)
    functions = contenders(add, liger, device.type == "cuda")
    runs = {name: _passes(function, sets, backward) for name, function in functions.items()}
    for run in runs.values():  # compiles
        run()
    times = {name: [] for name in runs}
    for round_ in range(-1, rounds):  # the first does not count
        for name, run in runs.items():
            seconds = _seconds(run, device) / len(sets)
            if round_ >= 0:
                times[name].append(seconds)
    moved = OPERATIONS[operation] * rows * C * dtype.itemsize
    return [{"operation": operation, "rows": rows, "width": C, "name": name,
             "us": 1e6 * statistics.median(t), "us_all": [1e6 * s for s in t],
             "gb_per_second": moved / statistics.median(t) / 1e9,
             "of_copy": moved / statistics.median(t) / bandwidth} for name, t in times.items()]


def plot(figures: list[dict], path: str, title: str) -> None:
    """Share of the copy's bandwidth over the width, a panel an operation, at the most rows there are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = max(f["rows"] for f in figures)
    figure, axes = plt.subplots(1, len(OPERATIONS), figsize=(3.4 * len(OPERATIONS), 3.6), sharey=True)
    for axis, operation in zip(axes, OPERATIONS):
        shown = [f for f in figures if f["operation"] == operation and f["rows"] == rows]
        for i, name in enumerate(dict.fromkeys(f["name"] for f in figures)):
            line = sorted((f["width"], 100 * f["of_copy"]) for f in shown if f["name"] == name)
            if line:
                axis.plot(*zip(*line), "o-", color=f"C{i}", label=name, linewidth=2 if name == "ours" else 1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({f["width"] for f in shown}), labels=sorted({f["width"] for f in shown}),
                        minor=False, rotation=60)
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
        axis.set_title(operation, fontsize=10)
        axis.set_xlabel("width")
    axes[0].set_ylabel("% of a copy's bandwidth")
    axes[0].legend(loc="lower left", frameon=False, fontsize=8)
    figure.suptitle(f"{title}, {rows} rows", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
