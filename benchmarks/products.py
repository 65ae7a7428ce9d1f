"""The rows of bench.py's mode kernels about the MLP, by what GELU keeps, and the linear layer of q, k and v:
the result and all gradients."""

import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import in_unit
from kernels import gelu_mlp, qkv_linear


def _plain_mlp(x, w_in, b_in, w_out, b_out):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)


def _plain_qkv(x, weight, bias):
    return F.linear(x, weight, bias).chunk(3, dim=-1)


def _both_passes(function, inputs, grads):
    """Return a function that computes the result and all gradients."""
    wanted = [z for z in inputs if z is not None]
    return lambda: torch.autograd.grad(function(*inputs), wanted, grads)


def measure(rows: int, C: int, dtype: torch.dtype, bias: bool, device: torch.device, timed: Callable
            ) -> list[dict]:
    """Return a row of figures for each operation and contender. timed: as for benchmarks/fp8_products.py."""
    def drawn(*shape):
        return (torch.randn(*shape, device=device) / C**0.5).to(dtype).requires_grad_()

    x, grad = (torch.randn(rows, C, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    mlp = [x, drawn(4 * C, C), drawn(4 * C) if bias else None, drawn(C, 4 * C), drawn(C) if bias else None]
    operations = {"MLP": (_plain_mlp, {f"keep {keep}": functools.partial(gelu_mlp.gelu_mlp, keep=keep)
                                       for keep in gelu_mlp.KEEP}, mlp, [grad], 48),
                  "q, k, v": (_plain_qkv, {"ours": qkv_linear.qkv_linear},
                              [x, drawn(3 * C, C), drawn(3 * C) if bias else None], [grad] * 3, 18)}
    figures = []
    for operation, (plain, functions, inputs, grads, flops) in operations.items():
        functions = functions | {"eager": plain}
        if device.type == "cuda":
            torch.compiler.reset()
            functions["inductor"] = torch.compile(plain, fullgraph=True, dynamic=False)
        passes = {name: _both_passes(f, inputs, grads) for name, f in functions.items()}
        times = timed(f"{operation} {rows} x {C}", passes)
        figures += [{"operation": operation, "rows": rows, "width": C, "name": name, **in_unit("us", 1e6, t),
                     "tflop_per_second": flops * 1e-12 * rows * C * C / statistics.median(t)}
                    for name, t in times.items()]
    return figures
