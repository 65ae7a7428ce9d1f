"""Mode kernels of bench.py: the kernels of LayerNorm and of the head, beside PyTorch, its compiler and
Liger-Kernel. The head is a linear layer and cross-entropy in one.

The figures are time, LayerNorm's share of a large copy's bandwidth, the head's FLOP/s and its memory.

On a GPU one turn is a CUDA graph of several passes over sets of tensors, so the time is the GPU's, without
the launching host. The sets are so many that none is still in the L2 cache when a pass reads it again. One of
the contenders is a copy of as many bytes; at small sizes the copy does not reach the bandwidth of a large
copy, either. In Triton's interpreter all of this runs, but no figure means anything.

An operation must move so many N x C values: forward x and y; backward the gradient of y, x and its gradient.
With the residual addition s = x + out, y = LayerNorm(s), it moves x, out, s and y, and backward the gradients
of s and y, s and its gradient. Weight, bias and statistics are left out.

The head is timed forward and backward together, because ours computes its gradients in the forward pass: N
rows of x (N, C), a weight (V, C) in fp32 that is cast to the dtype of x as autocast casts it, three
products of 2 N C V FLOPs. So are the MLP and the linear layer of q, k and v, on Hopper, with weights in the
dtype of x. The capped head has a softcap on its logits and three targets a row; its products are those of
the head.
"""

import functools
import itertools
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks import fp8_products, products
from benchmarks.harness import Attempts, Bench, in_unit, take_turns, with_range
from kernels import layer_norm as ours
from kernels import usable
from kernels.cross_entropy import Softcap, linear_cross_entropy
from kernels.relu_squared import is_hopper
from nanosync.errors import UserError

OPERATIONS = {"forward": 2, "backward": 3, "add forward": 4, "add backward": 4}  # N x C values moved
COPIED_BYTES = 1 << 30  # of the copy that sets the scale, on a GPU
PIECE = 1 << 28  # bytes of one copy: in a graph, on H200, those of 512 MB and most larger ones reach 2.7 TB/s
LAUNCHES = 16  # at least so many in a row are timed together
WIDTHS = [768, 1024, 1600, 4096, 8192]  # by default
SOFTCAP = Softcap(cap=23.0, scale=7.5, shift=5.0)  # of the capped head
TARGET_WEIGHTS = [1.0, 0.5, 0.25]


def check_kernels(config: dict) -> None:
    """Raise UserError for wrong settings of mode kernels, or for a plot in another mode."""
    if config["mode"] != "kernels":
        if config["plot"]:
            raise UserError("plot draws what mode kernels measures")
        return
    widths, folder = config["widths"], config["peer"]
    if not (widths and config["rows"]) or max(widths) > ours.MAX_WIDTH:
        raise UserError(f"kernels need rows, and widths up to {ours.MAX_WIDTH}")
    if folder and not os.path.isfile(os.path.join(folder, "src", "liger_kernel", "ops", "layer_norm.py")):
        raise UserError(f"peer={folder!r} is no checkout of Liger-Kernel: it has no "
                        f"src/liger_kernel/ops/layer_norm.py")


def load_liger(folder: str) -> tuple:
    """Import LayerNorm, and the linear layer with cross-entropy, from a checkout of Liger-Kernel. Raises
    UserError."""
    sys.path.insert(0, os.path.abspath(os.path.join(folder, "src")))
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except Exception as e:  # the code is the user's
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
    """Return name -> function of x, out, weight and bias. Liger's LayerNorm always has a bias, and no
    addition."""
    functions = {"ours": _ours, "eager": _plain}
    if compiled:
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # a backward pass runs many times
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
    """Make sets of (inputs, gradients of the results), as many as fill four L2 caches."""
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
    """Return a function that runs the operation once on every set and returns all results. The forward pass
    keeps what the backward pass needs, as in training."""
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
    """The time of a pass: `seconds()`. On a GPU, as many passes as make LAUNCHES launches are captured in a
    CUDA graph, so that the time is the GPU's, not the launching host's. The current stream must not be the
    default one.

    captured: False for an operation that takes long and needs no capture, or cannot be captured.
    """

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
        torch.cuda._sleep(1_000_000)  # cycles, in which the host launches the pass
        begin.record()
        self.run() if self.graph is None else self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.passes


def _own_stream(device):
    """Return the context of a stream that can be captured."""
    return torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None)


def copy_bandwidth(device, rounds: int) -> float:
    """Measure a large copy: the median of bytes a second, read and written."""
    source = torch.empty(COPIED_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    pair = (source.random_(), torch.empty_like(source))
    with _own_stream(device):
        timer = _Timer(lambda: _copy(*pair), 1, device)
        _wake(device, {"copy": timer.seconds}, Attempts())
        return 2 * source.nbytes / statistics.median([timer.seconds() for _ in range(rounds)])


def _copy(source, target) -> None:
    piece = PIECE // source.itemsize
    for a, b in zip(source.split(piece), target.split(piece)):
        b.copy_(a)


def _wake(device, turns: dict, attempts: Attempts) -> None:
    """Give each contender a turn; on a GPU several, until its clocks, which fall when nothing runs, have
    risen again. One that fails is taken out of turns."""
    started = time.perf_counter()
    while True:
        for label, turn in list(turns.items()):
            if attempts.run(label, turn) is None:
                del turns[label]
        if device.type != "cuda" or time.perf_counter() > started + 0.25:
            return


def _copies(sets: list[tuple], values: int):
    """Return a pass of copies that move as many bytes as the operation."""
    x = sets[0][0][0]
    pairs = [(torch.randn(values * x.numel() // 2, dtype=x.dtype, device=x.device),
              x.new_empty(values * x.numel() // 2)) for _ in sets]
    return lambda: [_copy(*pair) for pair in pairs]


def measure(add: bool, rows: int, C: int, dtype: torch.dtype, bias: bool, liger, rounds: int, device,
            bandwidth: float, attempts: Attempts) -> list[dict]:
    """Measure LayerNorm forward, then backward: a row of figures for each contender and for a copy of as many
    bytes.

    add: with the residual addition before it. liger: what load_liger returned, or None. bandwidth: of a large
    copy, bytes a second.
    """
    functions, figures = contenders(add, liger, device.type == "cuda"), []
    with _own_stream(device):
        sets = _sets(rows, C, dtype, add, bias, device)
        for backward in (False, True):
            operation = "add " * add + ("backward" if backward else "forward")
            moved = OPERATIONS[operation] * rows * C * dtype.itemsize
            passes = {name: lambda f=f, b=backward: _pass(f, sets, b) for name, f in functions.items()}
            passes["copy"] = lambda n=OPERATIONS[operation]: _copies(sets, n)
            timers = {name: lambda make=make: _Timer(make(), len(sets), device)
                      for name, make in passes.items()}
            for name, times in _rounds(f"{operation} {rows} x {C}", timers, rounds, len(sets), device,
                                       attempts).items():
                per_second = moved / statistics.median(times)
                figures.append({"operation": operation, "rows": rows, "width": C, "name": name,
                                **in_unit("us", 1e6, times), "gb_per_second": per_second / 1e9,
                                "of_copy": per_second / bandwidth})
    return figures


def _rounds(operation: str, makers: dict, rounds: int, sets: int, device, attempts: Attempts
            ) -> dict[str, list[float]]:
    """Let contenders take turns; return the seconds of one operation of each, in each round.

    makers: name -> function that returns a _Timer. A contender that fails is left out.
    """
    labels = {f"{operation}, {name}": name for name in makers}
    timers = {label: attempts.run(label, makers[name], share=0.75) for label, name in labels.items()}
    turns = {label: lambda timer=timer: timer.seconds() / sets
             for label, timer in timers.items() if timer is not None}
    _wake(device, turns, attempts)
    found = take_turns(turns, rounds, uncounted=0, attempts=attempts)
    return {labels[label]: times for label, times in found.items()
            if times and label not in attempts.failures}


def _plain_head(x, weight, targets):
    """Compute the loss as autocast does: logits in x's dtype, the loss in fp32."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, ignore_index=-1)


def _plain_capped_head(x, weight, targets):
    """Compute the loss of the capped head with all logits in fp32."""
    logits = F.linear(x, weight.to(x.dtype)).float()
    logs = (SOFTCAP.cap * ((logits + SOFTCAP.shift) / SOFTCAP.scale).sigmoid()).log_softmax(dim=1)
    N, valid, total = len(targets), targets != -1, 0.0
    for j, w in enumerate(TARGET_WEIGHTS):
        later = targets[j:].where(valid[:N - j], -1)
        total = total + w * F.nll_loss(logs[:N - j], later, ignore_index=-1, reduction="sum")
    return total / valid.sum()


@functools.cache  # a copy to the GPU would make the host wait in every call
def _target_weights(device) -> torch.Tensor:
    return torch.tensor(TARGET_WEIGHTS, device=device)


def _capped_head(x, weight, targets):
    return linear_cross_entropy(x, weight, targets, softcap=SOFTCAP, target_weights=_target_weights(x.device))


def head_contenders(liger, compiled: bool, capped: bool = False) -> dict:
    """Return name -> function of x, weight and targets. Liger sums the weight's gradient over its chunks in
    x's dtype, its default; the others sum it in fp32 or in one product. Liger has no capped head."""
    plain = _plain_capped_head if capped else _plain_head
    functions = {"ours": _capped_head if capped else linear_cross_entropy, "eager": plain}
    if compiled:
        torch.compiler.reset()
        functions["inductor"] = torch.compile(plain, fullgraph=True, dynamic=False)
    if liger is not None and not capped:
        functions["Liger"] = lambda x, weight, targets: liger[1].apply(
            x, weight.to(x.dtype), targets, None, None, -1)[0]
    return functions


def measure_head(rows: int, C: int, V: int, dtype: torch.dtype, liger, rounds: int, device,
                 attempts: Attempts, capped: bool = False) -> list[dict]:
    """Measure loss and both gradients of the head: a row of figures for each contender. peak_bytes is the
    memory that a call needs beside its arguments, gradients included; None where PyTorch does not count."""
    x = torch.randn(rows, C, dtype=dtype, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(V, (rows,), device=device)
    operation, peaks, cuda = "capped " * capped + "head", {}, device.type == "cuda"

    def timer(name, function):
        def run():
            torch.autograd.grad(function(x, weight, targets), (x, weight))

        found = _Timer(run, 1, device, captured=False)
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            run()
        peaks[name] = torch.cuda.max_memory_allocated() - before if cuda else None
        return found

    makers = {name: functools.partial(timer, name, f)
              for name, f in head_contenders(liger, cuda, capped).items()}
    with _own_stream(device):
        times = _rounds(f"{operation} {rows} x {C}", makers, rounds, 1, device, attempts)
    return [{"operation": operation, "rows": rows, "width": C, "vocabulary": V,
             "name": name, **in_unit("us", 1e6, t),
             "tflop_per_second": 6e-12 * rows * C * V / statistics.median(t), "peak_bytes": peaks[name]}
            for name, t in times.items()]


def _timed(operation: str, functions: dict, rounds: int, device, attempts: Attempts
           ) -> dict[str, list[float]]:
    """Return the seconds of each function in each round. One that fails is left out."""
    makers = {name: lambda f=f: _Timer(f, 1, device, captured=False) for name, f in functions.items()}
    with _own_stream(device):
        return _rounds(operation, makers, rounds, 1, device, attempts)


def plot(figures: list[dict], path: str, title: str) -> None:
    """Draw the share of the copy's bandwidth over the width, a panel an operation, at the highest number of
    rows."""
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


def run(bench: Bench) -> None:
    """Print a line for each operation, size and contender; draw the plot, write the JSON file. Raises
    UserError."""
    settings, device, folder = bench.config, bench.device, bench.config["peer"]
    liger = load_liger(folder) if folder else None
    if not usable(torch.empty(0, device=device, dtype=bench.dtype)):
        raise UserError("kernels run on a CUDA GPU that Triton supports; TRITON_INTERPRET=1 only tries them, "
                        "slowly, on a CPU")
    if folder and device.type != "cuda":
        raise UserError("Liger's kernels need a GPU: they do not run in Triton's interpreter. Leave peer out")
    rounds, bandwidth = settings["rounds"], copy_bandwidth(device, settings["rounds"])
    print(f"LayerNorm: {bench.machine}, bias={settings['bias']}; a copy moves {bandwidth / 1e9:.0f} GB/s; "
          f"us, median of {rounds} rounds (range), share of the copy")
    figures, attempts, after = [], Attempts(settings["seconds"]), None

    def note(rows: list[dict], rest) -> None:
        """Print rows, each with the end rest(row), and write all so far."""
        for f in rows:
            print(f"{f['operation']:>17} {f['rows']:6} x {f['width']:5} {f['name']:>31}  "
                  f"{with_range(f, 'us', 9, 1)}  {rest(f)}", flush=True)
        figures.extend(rows)
        bench.write_json(copy_gb_per_second=bandwidth / 1e9, copy_gb_per_second_after=after, rows=figures,
                         failures=attempts.failures)

    for add, N, C in itertools.product((False, True), settings["rows"], settings["widths"]):
        note(measure(add, N, C, bench.dtype, settings["bias"], liger, rounds, device, bandwidth, attempts),
             lambda f: f"{f['gb_per_second']:6.0f} GB/s  {100 * f['of_copy']:5.1f}%")
    after = copy_bandwidth(device, rounds) / 1e9
    print(f"after that a copy moves {after:.0f} GB/s")
    if settings["plot"] and figures:
        plot(figures, settings["plot"], f"LayerNorm, {bench.environment['device']}, {bench.dtype_name}")
    C, V = settings["n_embd"], settings["vocab_size"]
    print(f"head, loss and gradients, V={V}: us, median (range), TFLOP/s, memory it adds")
    for N, capped in itertools.product(settings["rows"], (False, True)):
        note(measure_head(N, C, V, bench.dtype, liger, rounds, device, attempts, capped),
             lambda f: f"{_tflops(f)}  "
                       + ("n/a" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**30:.2f} GB"))
    timed = functools.partial(_timed, rounds=rounds, device=device, attempts=attempts)
    if is_hopper(device):
        print("MLP, and linear layer of q, k and v, result and gradients: us, median (range), TFLOP/s")
        for N in settings["rows"]:
            note(products.measure(N, C, bench.dtype, settings["bias"], device, timed), _tflops)
        note(fp8_products.measure(max(settings["rows"]), C, V, bench.dtype, device, timed), _tflops)
    else:
        print(f"MLP, and linear layer of q, k and v: their kernels need a Hopper GPU, and this is {device}")
    if not figures:
        raise UserError(f"no contender runs: {attempts.failures}")
    for label, reason in attempts.failures.items():
        print(f"{label}: {reason}")


def _tflops(f: dict) -> str:
    return f"{f['tflop_per_second']:6.0f} TFLOP/s" if f["tflop_per_second"] else ""
