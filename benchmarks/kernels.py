"""LayerNorm's kernels and the head's, linear layer and cross-entropy in one, beside PyTorch, its compiler and
Liger-Kernel: time, and LayerNorm's share of what a copy reaches, the head's FLOP/s and memory.

On a GPU one turn is a pass over so many sets of tensors that none is still in the L2 cache when it comes up
again, several times in a row, from a CUDA graph: what is timed is the GPU, not the host that launches.
Contenders take turns; one of them is a copy of as many bytes, which at small sizes does not reach what a
large one does, either. (In Triton's interpreter it all runs, and no figure means anything.)

What an operation must move, in N x C values: forward x and y; backward the gradient of y, x and its gradient;
with the residual addition s = x + out, y = LayerNorm(s): x, out, s, y, and backward the gradients of s and y,
s and its gradient. Weight, bias and statistics are left out.

The head is timed forward and backward together, as ours makes its gradients on the way forward: N rows of x
(N, C), a weight (V, C) in fp32 that is cast to the dtype of x as autocast casts it, three products of 2 N C V
FLOPs.
"""

import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from kernels import layer_norm as ours
from kernels.cross_entropy import linear_cross_entropy
from nanosync.errors import UserError

OPERATIONS = {"forward": 2, "backward": 3, "add forward": 4, "add backward": 4}  # N x C values moved
COPIED_BYTES = 1 << 30  # of the copy that sets the scale, on a GPU
PIECE = 1 << 28  # bytes of one copy: in a graph, on H200, 512 MB and most larger ones go at 2.7 TB/s
LAUNCHES = 16  # at least so many in a row are timed together


def load_liger(folder: str) -> tuple:
    """LayerNorm, and linear layer with cross-entropy, of a checkout of Liger-Kernel. Raises UserError."""
    if not os.path.isfile(os.path.join(folder, "src", "liger_kernel", "ops", "layer_norm.py")):
        raise UserError(f"peer={folder!r} is no checkout of Liger-Kernel: it has no "
                        f"src/liger_kernel/ops/layer_norm.py")
    sys.path.insert(0, os.path.abspath(os.path.join(folder, "src")))
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except Exception as e:  # it is the user's code
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"peer {folder} cannot be imported: {reason}") from None
    return LigerLayerNormFunction, LigerFusedLinearCrossEntropyFunction


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
    """By name, functions of x, out, weight and bias. Liger's LayerNorm always has a bias, and no addition."""
    functions = {"ours": _ours, "eager": _plain}
    if compiled:
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # a backward pass is run again and again
        functions["inductor"] = torch.compile(_plain, fullgraph=True, dynamic=False)
    if liger is not None and not add:
        zeros = {}  # made once

        def with_bias(x, out, weight, bias):
            if bias is None and weight not in zeros:
                zeros[weight] = torch.zeros_like(weight)
            return liger[0].apply(x, weight, zeros[weight] if bias is None else bias, ours.EPS)
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


def _pass(function, sets: list[tuple], backward: bool):
    """A function that runs the operation once on every set and returns all results. Forward as in training:
    what the backward pass needs is kept."""
    if not backward:
        return lambda: [function(*inputs) for inputs, _ in sets]
    graphs = []
    for inputs, grads in sets:
        results = function(*inputs)
        graphs.append((results if isinstance(results, tuple) else (results,),
                       [t for t in inputs if t is not None], grads))
    return lambda: [torch.autograd.grad(results, inputs, grads, retain_graph=True)
                    for results, inputs, grads in graphs]


class _Timer:
    """`seconds()` a pass. On a GPU the current stream must not be the default one: passes, as many as make
    LAUNCHES launches, are captured there in a CUDA graph, so that the time is the GPU's, not the launching
    host's. captured: False for what takes long and need not or cannot be captured."""

    def __init__(self, run, sets: int, device, captured: bool = True):
        self.run, self.device, self.passes, self.graph = run, device, 1, None
        run()  # compiles
        if device.type != "cuda" or not captured:
            return
        self.passes = -(-LAUNCHES // sets)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(self.passes):
                results = run()
                del results  # within a pass no two sets write to the same memory

    def seconds(self) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            self.run()
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000)  # cycles, in which the host queues what follows
        begin.record()
        self.run() if self.graph is None else self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.passes


def _own_stream(device):
    """The context of a stream that can be captured."""
    return torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None)


def copy_bandwidth(device, rounds: int) -> float:
    """Bytes a second, read and written, of a large copy: the median."""
    source = torch.empty(COPIED_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    pair = (source.random_(), torch.empty_like(source))
    with _own_stream(device):
        timer = _Timer(lambda: _copy(*pair), 1, device)
        _wake(device, [timer])
        return 2 * source.nbytes / statistics.median([timer.seconds() for _ in range(rounds)])


def _copy(source, target) -> None:
    piece = PIECE // source.itemsize
    for a, b in zip(source.split(piece), target.split(piece)):
        b.copy_(a)


def _wake(device, timers) -> None:
    """One turn each, on a GPU until its clocks, which fall when nothing runs, have risen again."""
    started = time.perf_counter()
    while True:
        for timer in timers:
            timer.seconds()
        if device.type != "cuda" or time.perf_counter() > started + 0.25:
            return


def _copies(sets: list[tuple], values: int):
    """A pass of copies that move as many bytes as the operation."""
    x = sets[0][0][0]
    pairs = [(torch.randn(values * x.numel() // 2, dtype=x.dtype, device=x.device),
              x.new_empty(values * x.numel() // 2)) for _ in sets]
    return lambda: [_copy(*pair) for pair in pairs]


def measure(add: bool, rows: int, C: int, dtype: torch.dtype, bias: bool, liger, rounds: int, device,
            bandwidth: float) -> list[dict]:
    """Forward, then backward: a row of figures for each contender and for a copy of as many bytes."""
    functions, figures = contenders(add, liger, device.type == "cuda"), []
    with _own_stream(device):
        sets = _sets(rows, C, dtype, add, bias, device)
        for backward in (False, True):
            operation = "add " * add + ("backward" if backward else "forward")
            moved = OPERATIONS[operation] * rows * C * dtype.itemsize
            for name, times in _take_turns(functions, sets, operation, rounds, device).items():
                seconds = statistics.median(times)
                figures.append({"operation": operation, "rows": rows, "width": C, "name": name,
                                "us": 1e6 * seconds, "us_all": [1e6 * s for s in times],
                                "gb_per_second": moved / seconds / 1e9,
                                "of_copy": moved / seconds / bandwidth})
    return figures


def _take_turns(functions: dict, sets: list[tuple], operation: str, rounds: int, device) -> dict:
    """By contender, seconds of one operation in each round."""
    passes = {name: _pass(f, sets, operation.endswith("backward")) for name, f in functions.items()}
    passes["copy"] = _copies(sets, OPERATIONS[operation])
    return _rounds({name: _Timer(run, len(sets), device) for name, run in passes.items()}, rounds, len(sets))


def _rounds(timers: dict, rounds: int, sets: int) -> dict:
    """By contender, seconds of one operation in each round, in which all take their turn."""
    _wake(next(iter(timers.values())).device, timers.values())
    times = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.seconds() / sets)
    return times


def _plain_head(x, weight, targets):
    """As autocast runs it: logits in x's dtype, the loss in fp32."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, ignore_index=-1)


def head_contenders(liger, compiled: bool) -> dict:
    """By name, functions of x, weight and targets. Liger sums the weight's gradient over its chunks in x's
    dtype, as it does by default, the others in fp32 or in one product."""
    functions = {"ours": linear_cross_entropy, "eager": _plain_head}
    if compiled:
        torch.compiler.reset()
        functions["inductor"] = torch.compile(_plain_head, fullgraph=True, dynamic=False)
    if liger is not None:
        functions["Liger"] = lambda x, weight, targets: liger[1].apply(
            x, weight.to(x.dtype), targets, None, None, -1)[0]
    return functions


def measure_head(rows: int, C: int, V: int, dtype: torch.dtype, liger, rounds: int, device) -> list[dict]:
    """Loss and both gradients: a row of figures for each contender. peak_bytes: what a call needs beside its
    arguments, gradients included; None where nobody counts."""
    x = torch.randn(rows, C, dtype=dtype, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(V, (rows,), device=device)
    timers, peaks, cuda = {}, {}, device.type == "cuda"
    with _own_stream(device):
        for name, function in head_contenders(liger, cuda).items():
            def run(function=function):
                torch.autograd.grad(function(x, weight, targets), (x, weight))

            timers[name] = _Timer(run, 1, device, captured=False)
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                run()
            peaks[name] = torch.cuda.max_memory_allocated() - before if cuda else None
        times = _rounds(timers, rounds, 1)
    return [{"operation": "head", "rows": rows, "width": C, "vocabulary": V, "name": name,
             "us": 1e6 * statistics.median(t), "us_all": [1e6 * s for s in t],
             "tflop_per_second": 6e-12 * rows * C * V / statistics.median(t), "peak_bytes": peaks[name]}
            for name, t in times.items()]


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
                style = dict(color="0.6", linestyle=":") if name == "copy" else dict(color=f"C{i}")
                axis.plot(*zip(*line), marker="o", markersize=4, label=name,
                          linewidth=2 if name == "ours" else 1, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({f["width"] for f in shown}), labels=sorted({f["width"] for f in shown}),
                        minor=False, rotation=60)
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
        axis.set_title(operation, fontsize=10)
        axis.set_xlabel("width")
    axes[0].set_ylabel("% of a large copy's bandwidth")
    axes[2].legend(*axes[0].get_legend_handles_labels(), loc="lower right", frameon=False, fontsize=8)
    figure.suptitle(f"{title}, {rows} rows", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
