"""The rows of bench.py's mode kernels about FP8: products, and casts with and without the kernel before them.

Each product of a block and of the head, and each of their gradients with another shape, has the contenders
bf16 (mm), rows (a scale a row), one scale, and both with e5m2, as gradients have. A contender with the word
fast leaves its sums in the matrix units. Casts are compiled: alone, after LayerNorm, GELU and the gradient of
GELU, and of the joined gradients of q, k and v. They have a scale a row, one scale, or one of an earlier step
("delayed"), and then find the largest entry for a later step. The difference to LayerNorm or GELU alone is
what a fused cast costs. `ours` is a kernel of kernels/gelu_cast.py, with so many entries at a time
and so many warps, or of kernels/fp8_cast.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import in_unit
from kernels import gelu_cast
from kernels.fp8 import cast_weight, product
from kernels.fp8_cast import E4M3, E5M2, LARGEST, Cast, cast, join_cast
from kernels.gelu_mlp import gelu


def measure(rows: int, C: int, V: int, dtype: torch.dtype, device: torch.device, timed: Callable,
            emulated: bool = False) -> list[dict]:
    """Return a row of figures for each operation and contender.

    timed: function of an operation and {name: function to time} that returns {name: seconds of each round};
    a contender that fails is left out.
    """
    figures, part = [], min(rows, 16384)  # the head has so many rows at a time
    for name, M, N, K in (
            ("q, k, v", rows, 3 * C, C), ("attention out", rows, C, C), ("MLP in", rows, 4 * C, C),
            ("MLP out", rows, C, 4 * C), ("head", part, V, C), ("input gradient of q, k, v", rows, C, 3 * C),
            ("input gradient of the head", part, C, V), ("weight gradient of q, k, v", 3 * C, C, rows),
            ("weight gradient of attention out", C, C, rows), ("weight gradient of MLP in", 4 * C, C, rows),
            ("weight gradient of the head", V, C, part)):
        for contender, times in timed(f"FP8 {name}",
                                      _products(M, N, K, dtype, device, emulated)).items():
            figures.append({"operation": f"FP8 {name}", "rows": M, "width": K, "columns": N,
                            "name": contender, **in_unit("us", 1e6, times),
                            "tflop_per_second": 2e-12 * M * N * K / sorted(times)[len(times) // 2]})
    for contender, times in timed("FP8 cast", _casts(rows, C, dtype, device)).items():
        width = 4 * C if "GELU" in contender else C
        figures.append({"operation": "FP8 cast", "rows": rows, "width": width, "name": contender,
                        **in_unit("us", 1e6, times), "tflop_per_second": None})
    return figures


def _products(M: int, N: int, K: int, dtype: torch.dtype, device, emulated: bool) -> dict[str, Callable]:
    x, weight = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device)
    w = weight.to(dtype)
    functions, casts = {"bf16": lambda: x @ w.T}, cast_weight(weight)
    for name, kind, one_scale in (("rows", E4M3, False), ("one scale", E4M3, True),
                                  ("rows of e5m2", E5M2, False), ("e5m2, one scale", E5M2, True)):
        a: Cast = cast(x, kind, one_scale)
        b = casts.rows(False, one_scale)
        for fast in (False, True):
            functions[name + ", fast" * fast] = lambda a=a, b=b, fast=fast: product(
                a, b, None, dtype, emulated, fast)
    return functions


def _casts(rows: int, C: int, dtype: torch.dtype, device) -> dict[str, Callable]:
    x, h = (torch.randn(rows, width, device=device, dtype=dtype) for width in (C, 4 * C))
    q, k, v = (torch.randn_like(x) for _ in range(3))
    weight = torch.randn(C, device=device, dtype=dtype)

    def layer_norm(z):
        return F.layer_norm(z, weight.shape, weight)

    scale = torch.ones((), device=device)  # of an earlier step

    def delayed(y, kind):
        values = (y.float() / scale).clamp(-LARGEST[kind], LARGEST[kind]).to(kind)
        return values, y.abs().amax(dim=-1).amax()  # a row's largest entry is found in the pass that casts

    def gelu_backward(z):
        return gelu_cast.plain_gelu_backward_cast(z, z)[0]

    def with_cast(function, how, kind):
        def both(z):
            y = function(z)
            return y, *how(y, kind)
        return both

    functions = {"LayerNorm": (layer_norm, x), "GELU": (gelu, h)}
    for name, how in (("cast", cast), ("cast, one scale", lambda y, kind: cast(y, kind, per_tensor=True)),
                      ("cast, delayed", delayed)):
        functions |= {
            name: (lambda z, how=how: how(z, E4M3), x),
            f"LayerNorm, {name}": (with_cast(layer_norm, how, E4M3), x),
            f"GELU, {name}": (with_cast(gelu, how, E4M3), h),
            f"GELU backward, {name}": (with_cast(gelu_backward, how, E5M2), h),
            f"q, k, v joined, {name}": (lambda z, how=how: how(torch.cat(z, dim=1), E5M2), (q, k, v))}
    if device.type == "cuda":
        torch.compiler.reset()
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, len(functions))  # many are of the same code
        functions = {name: (torch.compile(f, fullgraph=True, dynamic=False), z)
                     for name, (f, z) in functions.items()}
    timed = {name: lambda f=f, z=z: f(z) for name, (f, z) in functions.items()}
    timed["q, k, v joined, ours"] = lambda: join_cast((q, k, v))

    def ours(function, config):
        used = gelu_cast.BLOCK, gelu_cast.WARPS
        gelu_cast.BLOCK, gelu_cast.WARPS = config
        try:
            return function()
        finally:
            gelu_cast.BLOCK, gelu_cast.WARPS = used

    for config in ((1024, 4), (1024, 8), (512, 2), (512, 4), (2048, 8)):
        name = f"ours {config[0]}/{config[1]}"
        timed[f"GELU, {name}"] = lambda c=config: ours(lambda: gelu_cast.gelu_cast(h), c)
        timed[f"GELU backward, {name}"] = lambda c=config: ours(
            lambda: gelu_cast.gelu_backward_cast(h, h), c)
    return timed
