"""Measure a training step with kernels that are off by default, against the step as it is, in one process.

$ python -m benchmarks.fused_step --out=FOLDER
$ python -m benchmarks.fused_step --out=FOLDER --phases=step,profile --contenders=base,gelu --peer=NANOGPT

`compile` builds each contender alone, so that later calls find its code in the compiler's cache. `check`
compares each kernel with fp64, beside PyTorch's error in the same dtype. Contenders with a wrong
kernel are left out of what follows, and the script exits with code 1. `tune` times tiles of the contenders'
products with GELU, and keeps the fastest for what follows. `step` lets whole training steps take turns for
each batch size (forward, backward, clipping, AdamW; compiled), and compares the losses of the first steps.
`profile` adds up the time of a step at the first batch size by kind of kernel. Each phase writes its figures
to files in FOLDER as it goes. `step` and `profile` use the tiles of a tune.json in FOLDER. A contender that
fails has a row that says so, and the others continue. The last lines are a short table.

A contender is words with + between: base; gelu, gelu-derivative, gelu-derivative8, gelu-recompute; tanh (GELU
by the GPU's approximate tanh); qkv (gradients of q, k and v not joined); torch_adamw (PyTorch's clipping and
AdamW, not kernels/adamw.py); scaled (PyTorch's AdamW scales the gradients); fp8 or fp8_emulated, fp8_head,
weight_gradients (settings of train.py) and gelu_apart (without kernels/gelu_cast.py); torchao or
torchao_rowwise (that package's FP8); eager (not compiled); graphs (forward and backward pass as CUDA graphs);
nanogpt (the GPT of `peer`). nanogpt and FP8 have no Triton LayerNorm, FP8 with the word triton has it.
Without a GPU everything runs at toy size, on PyTorch's code, and no figure means anything.
"""

import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from benchmarks import fused_checks, peers, strategies
from benchmarks.harness import Attempts, in_unit, seconds_per_call, take_turns, with_range
from configurator import configure
from kernels import gelu_mlp, qkv_linear, triton, usable
from kernels.relu_squared import is_hopper
from model import GPT, GPTConfig, use_fused_gelu, use_qkv_linear, use_triton_layer_norm
from nanosync.errors import UserError
from nanosync.files import write_result
from nanosync.fp8 import follow_weights, use_fp8
from nanosync.hardware import environment
from nanosync.optim import build_adamw, clip_gradients

# -----------------------------------------------------------------------------
out = "out-fused-step"  # folder for the JSON files
phases = "check,tune,step"  # of compile, check, tune, step, profile
contenders = ("base,gelu,gelu-derivative,gelu-derivative8,gelu-derivative8+tanh,gelu-recompute,qkv,"
              "torch_adamw,scaled")
peer = ""  # folder of a nanoGPT, for the contender nanogpt
batch_sizes: list = [64, 12]  # sequences of 1024 tokens
n_layer = 12
n_head = 12
n_embd = 768
bias = False
rounds = 7
steps = 4  # a turn at batch size 64; smaller batches take as many tokens, but at most 20 steps
seconds = 540  # begin no further contender or round so long after the start, 0 for no limit
seed = 1337
# -----------------------------------------------------------------------------
config = configure(globals())
GELU = fused_checks.GELU
FP8 = {"fp8": True, "fp8_emulated": "emulated"}
WORDS = ("base", *GELU, "tanh", "qkv", "torch_adamw", "scaled", *FP8, "fp8_head", "weight_gradients",
         "gelu_apart", "torchao", "torchao_rowwise", "triton", "eager", "graphs", "nanogpt")
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_stages", "num_warps", "programs")
TILES = {  # candidates of `tune`
    "forward": [(128, 256, 64, 2, 3, 8, 1), (128, 256, 64, 4, 4, 8, 1), (128, 128, 64, 4, 3, 4, 2),
                (256, 128, 64, 2, 3, 8, 1)],
    "backward": [(256, 128, 64, 2, 3, 8, 1), (128, 256, 64, 2, 3, 8, 1), (128, 128, 64, 4, 3, 4, 2),
                 (256, 128, 64, 4, 3, 8, 1)],
}
KINDS = [  # of kernels in a profile: name, pattern; the first that matches counts
    ("products", r"nvjet|gemm|cutlass|splitK|cublas"), ("products with GELU, of q, k, v", r"^_kernel$"),
    ("attention", r"cudnn|flash|fmha|sdpa"),
    ("cross-entropy", r"_cross_entropy_kernel|log_softmax"), ("separate GELU", r"sigmoid|gelu"),
    ("LayerNorm", r"layer_norm|^_(forward|backward|column_sums)_kernel"),
    ("gradients of q, k, v joined", r"_cat_|_join_cast"), ("FP8 casts of weights", r"_cast_weights_kernel"),
    ("FP8 factors transposed", r"_transpose_kernel|_cast_transposed_kernel"),
    ("FP8 casts alone", r"_abs_amax"), ("embedding", r"embedding"),
    ("optimizer and clipping", r"multi_tensor_apply|_adamw_kernel|_squares_kernel|_norm_kernel|lpnorm"),
    ("casts", r"_to_copy|copy_kernel"),
]


def write(name: str, figures) -> None:
    path = os.path.join(out, f"{name}.json")
    write_result(path, {"environment": machine, "settings": dict(config), "figures": figures})


# ---- tune


def milliseconds(function, launches: int = 20) -> float:
    """Return the GPU's time of a call, the best of three series."""
    if device.type != "cuda":
        return 1e3 * seconds_per_call(function, device)
    function()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(launches):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / launches)
    return min(times)


def tune() -> None:
    """Time the tiles of both products for what the contenders keep, and keep the fastest."""
    N, C, H = SIZES[-1] if device.type != "cuda" else (max(batch_sizes) * 1024, 768, 3072)
    x, w_in, w_out, grad = (torch.randn(*shape, device=device, dtype=dtype) for shape in (
        (N, C), (H, C), (C, H), (N, C)))
    w_in, w_out = w_in / C**0.5, w_out / H**0.5
    figures = {"sizes": [N, C, H], "cuBLAS forward": milliseconds(lambda: x @ w_in.T),
               "cuBLAS backward": milliseconds(lambda: grad @ w_out), "tiles": [], "fastest": {}}
    print(f"tune: products alone {figures['cuBLAS forward']:.3f} and {figures['cuBLAS backward']:.3f} ms")
    words = {word for name in contenders.split(",") for word in name.split("+")}
    for direction in TILES:
        for keep in [gelu_mlp.KEEP.index(kept) for word, kept in GELU.items() if word in words]:
            if direction == "backward" and gelu_mlp.KEEP[keep] == "nothing":
                keep = 0  # it recomputes the preactivation
            if attempts.late(0.9):
                print("  no time for further tiles")
                break
            tune_one(direction, keep, (x, w_in, w_out, grad), figures)
            write("tune", figures)
    if "qkv" in words:
        tune_qkv(N, C, figures)
    write("tune", figures)


def tune_qkv(N: int, C: int, figures: dict) -> None:
    """Time the backward pass of q, k and v with joined gradients, and with the kernel's tiles."""
    x, *grads = (torch.randn(N, C, device=device, dtype=dtype) for _ in range(4))
    weight = torch.randn(3 * C, C, device=device, dtype=dtype) / C**0.5
    joined = torch.cat(grads, dim=1)
    times = figures["q, k, v"] = {
        "join": milliseconds(lambda: torch.cat(grads, dim=1)),
        "x joined": milliseconds(lambda: joined @ weight),
        "weight joined": milliseconds(lambda: joined.T @ x),
        "weight apart": milliseconds(lambda: qkv_linear._qkv_weight_gradient(*grads, x))}
    best = None
    for M, W, K, _, stages, warps, programs in TILES["forward"]:
        tile = dict(BLOCK_M=M, BLOCK_N=W, BLOCK_K=K, num_stages=stages, num_warps=warps, programs=programs)
        qkv_linear.CONFIG.update(tile)
        try:
            ms = times[f"x apart {tuple(tile.values())}"] = milliseconds(
                lambda: qkv_linear._qkv_input_gradient(*grads, weight))
        except Exception as e:  # does not fit
            print(f"  {tile}: {type(e).__name__}: {str(e)[:100]}")
            continue
        best = min(best or (ms, tile), (ms, tile), key=lambda pair: pair[0])
    if best is not None:
        qkv_linear.CONFIG.update(best[1])
        figures["fastest"]["qkv"] = best[1]
    print("  q, k, v backward, ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()),
          flush=True)


def tune_one(direction: str, keep: int, tensors: tuple, figures: dict) -> None:
    """Find the fastest tile, and time it with the approximate tanh as well."""
    x, w_in, w_out, grad = tensors
    _, kept = gelu_mlp._empty_results(x, w_in, keep)
    kept.zero_()
    times = {}

    def measure(tile: tuple, sigmoid: str) -> None:
        config = dict(zip(TILE, tile))
        gelu_mlp.CONFIGS[direction, keep], gelu_mlp.SIGMOID = config, sigmoid
        try:
            times[tile, sigmoid] = ms = milliseconds(
                (lambda: gelu_mlp._linear_gelu(x, w_in, None, keep)) if direction == "forward" else
                (lambda: gelu_mlp._linear_gelu_backward(grad, w_out, kept, keep, bias)))
        except Exception as e:  # does not fit
            print(f"  {direction} {tile}: {type(e).__name__}: {str(e)[:100]}")
            return
        row = {"direction": direction, "keep": gelu_mlp.KEEP[keep], "sigmoid": sigmoid, **config, "ms": ms}
        figures["tiles"].append(row)
        print(f"  {direction:8} {gelu_mlp.KEEP[keep]:13} {tile!s:32} {sigmoid} {ms:.3f} ms", flush=True)

    for tile in TILES[direction]:
        measure(tile, "exponential")
    if times:
        (best, _), _ = min(times.items(), key=lambda item: item[1])
        if direction == "forward" or keep == 0:
            measure(best, "tanh")
        measure(best, "exponential")  # leaves it as the tile in use
        figures["fastest"][f"{direction} {keep}"] = gelu_mlp.CONFIGS[direction, keep]


def read_tiles() -> None:
    """Use the tiles of an earlier call."""
    path = os.path.join(out, "tune.json")
    if os.path.exists(path):
        with open(path) as f:
            for name, tile in json.load(f)["figures"]["fastest"].items():
                if name == "qkv":
                    qkv_linear.CONFIG.update(tile)
                else:
                    gelu_mlp.CONFIGS[name.split()[0], int(name.split()[1])] = tile


# ---- step


class Contender:
    """A model that trains by the kernels that its name lists."""

    def __init__(self, name: str, batch_size: int):
        self.name, self.words = name, name.split("+")
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        torch.manual_seed(seed)
        self.model = GPT(GPTConfig(**ARCHITECTURE))
        if "nanogpt" in self.words:
            settings = SimpleNamespace(architecture=ARCHITECTURE | {"dropout": 0.0}, config={"peer": peer})
            self.model = peers.build_model(peers.load_module(peer, "train"), self.model, settings)
        self.model.to(device)
        if "nanogpt" in self.words:
            self.optimizer = self.model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
        else:
            fp8 = [FP8[word] for word in self.words if word in FP8]
            use_fp8(self.model, {"fp8": fp8[0] if fp8 else False, "fp8_head": "fp8_head" in self.words,
                                 "fp8_weight_gradients": "weight_gradients" in self.words})
            for block in self.model.transformer.h:
                block.mlp.fp8_gelu = "gelu_apart" not in self.words
            torchao = [strategies.WORDS[w]["torchao"] for w in self.words if w in strategies.TORCHAO]
            if torchao:
                strategies.use_torchao(self.model, torchao[0])
            if "triton" in self.words or not (fp8 or torchao):
                use_triton_layer_norm(self.model)
            for word in self.words:
                use_fused_gelu(self.model, GELU[word]) if word in GELU else None
            if "qkv" in self.words:
                use_qkv_linear(self.model)
            self.optimizer = build_adamw(self.model, 6e-4, (0.9, 0.95), 0.1)
            follow_weights(self.model, self.optimizer)
        compiled = "eager" not in self.words and device.type == "cuda"
        # dynamic=False: a second batch size would be compiled for any size
        mode = "reduce-overhead" if "graphs" in self.words else None
        self.trained = torch.compile(self.model, dynamic=False, mode=mode) if compiled else self.model
        generator = torch.Generator().manual_seed(seed)
        V = min(50257, ARCHITECTURE["vocab_size"])
        tokens = torch.randint(V, (2, batch_size, T), generator=generator)
        self.x, self.y = tokens.to(device)
        self.losses = [float(self.step()) for _ in range(3)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            self.peak_gb = None if "graphs" in self.words else peak  # PyTorch does not count that of graphs

    def step(self):
        gelu_mlp.SIGMOID = "tanh" if "tanh" in self.words else "exponential"
        if "graphs" in self.words:
            torch.compiler.cudagraph_mark_step_begin()  # results of the last step are no longer needed
        with autocast:
            _, loss = self.trained(self.x, self.y)
        loss.backward()
        if "nanogpt" in self.words:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        elif "scaled" in self.words:  # AdamW divides by grad_scale, and writes the quotient
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(
                [p.grad for p in self.model.parameters()])))
            self.optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)
        elif "torch_adamw" not in self.words and self.optimizer.fits():
            self.optimizer.clip(1.0)
        else:
            clip_gradients(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()


def build(batch_size: int, figures: dict, title: str, share: float, note: Callable) -> dict[str, Contender]:
    """Build the contenders; one that fails is left out, with the reason in figures.

    share: of the time after which no further one is built. note: function that writes the figures.
    """
    made = {}
    for name in contenders.split(","):
        words, label = set(name.split("+")), f"{title} {name}"
        bad = wrong & (words if words & {"nanogpt", "torch_adamw", "scaled"} else words | {"adamw"})
        if bad:
            attempts.fail(label, f"the check found a wrong kernel: {', '.join(sorted(bad))}")
        begun = time.perf_counter()
        contender = None if bad else attempts.run(label, lambda n=name: Contender(n, batch_size), share)
        if contender is None:
            figures[name] = {"failed": attempts.failures[label]}
        else:
            made[name] = contender
            print(f"{label}: losses {contender.losses}, built in {time.perf_counter() - begun:.0f} s",
                  flush=True)
            figures[name] = {"losses": contender.losses, "peak_gb": getattr(contender, "peak_gb", None)}
        note()
    return made


def compile_alone() -> None:
    """Build each contender and drop it, which leaves its compiled code on disk."""
    for B in batch_sizes:
        for name in contenders.split(","):
            begun = time.perf_counter()
            built = attempts.run(f"compile {name}", lambda n=name, b=B: Contender(n, b) is not None, 0.9)
            if built:
                print(f"compile B={B} {name}: {time.perf_counter() - begun:.0f} s", flush=True)
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


all_figures: dict = {}


def step() -> None:
    """Let training steps take turns at each batch size."""
    for number, B in enumerate(batch_sizes):
        title, figures = f"B={B}", {}
        all_figures[title] = figures
        part = (number + 1) / len(batch_sizes)  # of the time, at whose end this batch size is done

        def note(times=None, title=title, figures=figures):
            for name, row in figures.items() if times else ():
                label = f"{title} {name}"
                if times.get(label):
                    row |= in_unit("ms", 1e3, times[label])
                if label in attempts.failures:
                    row["failed"] = attempts.failures[label]
            write(f"step {title}{' with biases' * bias}", figures)

        made = build(B, figures, title, part - 0.3 / len(batch_sizes), note)
        turn = min(20, steps * max(batch_sizes) // B)
        turns = {f"{title} {name}": lambda c=c, n=turn: seconds_per_call(c.step, device, n)
                 for name, c in made.items()}
        take_turns(turns, rounds, uncounted=0, attempts=attempts, after_round=note)
        if number == 0 and "profile" in wanted:
            profile(made)
        del made, turns
        torch.cuda.empty_cache()


def table() -> None:
    """Print a line a contender and batch size."""
    for title, rows in all_figures.items():
        timed = {name: row for name, row in rows.items() if "ms" in row}
        for name, row in rows.items():
            if "failed" in row:
                print(f"{title:5} {name:>32} {row['failed']}")
        base = next(iter(timed.values()), None)
        for name, row in timed.items():
            pairs = zip(base["ms_all"], row["ms_all"])
            ratio = statistics.median(a / b for a, b in pairs)
            away = max(abs(a - b) for a, b in zip(base["losses"], row["losses"]))
            peak = "" if row["peak_gb"] is None else f"  peak {row['peak_gb']:.1f} GB"
            rival = f"  {timed['nanogpt']['ms'] / row['ms']:.3f}x nanogpt" if "nanogpt" in timed else ""
            print(f"{title:5} {name:>32} {with_range(row, 'ms', 9, 2)} ms  {ratio:.3f}x base{rival}{peak}  "
                  f"losses differ by {away:.1e}")


# ---- profile


def profile(made: dict[str, Contender]) -> None:
    """Add up the time of the kernels of a step by kind, for each contender."""
    figures = {}
    for name, contender in made.items():
        contender.step()
        activity = torch.profiler.ProfilerActivity
        kind = activity.CUDA if device.type == "cuda" else activity.CPU
        with torch.profiler.profile(activities=[kind]) as p:
            for _ in range(3):
                contender.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        events = [(e.key, time / 3e3, e.count / 3) for e in p.key_averages()
                  if (time := e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total)]
        kinds = dict.fromkeys([k for k, _ in KINDS], 0.0) | {"other": 0.0}
        for key, ms, _ in events:
            kinds[next((k for k, pattern in KINDS if re.search(pattern, key)), "other")] += ms
        figures[name] = {"ms by kind": kinds, "kernels": sorted(events, key=lambda e: -e[1])[:60]}
        write("profile", figures)
        print(f"profile {name}, ms a step, {sum(kinds.values()):.1f} in all: "
              + ", ".join(f"{k} {ms:.2f}" for k, ms in kinds.items()), flush=True)


def check_settings() -> None:
    for text in contenders.split(","):
        words = text.split("+")
        for word in words:
            if word not in WORDS:
                raise UserError(f"contenders has {word!r}: known are {', '.join(WORDS)}")
        recipes = {*FP8, *strategies.TORCHAO} & set(words)
        if len(recipes) > 1:
            raise UserError(f"contenders has {text!r}: take one of {', '.join(sorted(recipes))}")
        if {"fp8_head", "weight_gradients"} & set(words) and not {*FP8} & set(words):
            raise UserError(f"contenders has {text!r}: fp8_head and weight_gradients go with "
                            f"{', '.join(FP8)}")
        if {"eager", "graphs"} <= set(words):
            raise UserError(f"contenders has {text!r}: graphs are compiled, leave eager out")
        if recipes and {"qkv", *GELU} & set(words):
            raise UserError(f"contenders has {text!r}: FP8 goes with none of qkv, {', '.join(GELU)}")
    for phase in phases.split(","):
        if phase not in ("compile", "check", "tune", "step", "profile"):
            raise UserError(f"phases has {phase!r}: known are compile, check, tune, step, profile")
    if "nanogpt" in contenders and not os.path.isfile(os.path.join(peer, "model.py")):
        raise UserError("the contender nanogpt needs --peer, a folder with nanoGPT's model.py")


if __name__ == "__main__":
    check_settings()
    os.makedirs(out, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a compilation a contender
    autocast = torch.autocast(device.type, dtype)
    machine = environment(device)
    real = device.type == "cuda"
    T = 1024 if real else 16
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50304)
    ARCHITECTURE = dict(sizes if real else dict(n_layer=2, n_head=2, n_embd=32, vocab_size=128),
                        block_size=T, bias=bias)
    SIZES = [(4096, 768, 3072), (1000, 768, 3072), (129, 64, 528)] if real else [(40, 16, 32)]
    runs = {True: "run", False: "do not run here"}
    print(f"{machine['device']}, torch {machine['torch']}, Triton {triton and triton.__version__}; kernels "
          f"{runs[usable(torch.empty(0, device=device))]}, kernels for Hopper {runs[is_hopper(device)]}",
          flush=True)
    wanted, attempts, wrong = phases.split(","), Attempts(seconds), set()
    if "check" in wanted:
        wrong = fused_checks.check(device, dtype, SIZES, lambda f: write("check", f))
    tune() if "tune" in wanted and is_hopper(device) else read_tiles()
    if "compile" in wanted:
        compile_alone()
    if "step" in wanted:
        step()
    elif "profile" in wanted:
        profile(build(batch_sizes[0], {}, "profile", 0.9, lambda: None))
    table()
    if wrong:
        print(f"the check found wrong kernels: {', '.join(sorted(wrong))}")
        sys.exit(1)
