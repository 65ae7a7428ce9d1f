"""Time the products of the head in bf16 and FP8, and the kernel of the loss, for one micro-batch of a GPU.

    python records/speedrun-frontier/time_head.py    # in the root, on Hopper

Earlier the head with logits and gradient of its input in FP8 took 27 ms more than in bf16, a micro-batch.
"""

import json
import os
import statistics
import sys

import torch

sys.path.insert(0, os.getcwd())

from kernels.cross_entropy import Softcap, linear_cross_entropy
from kernels.fp8 import E4M3, E5M2, WeightCasts, cast

ROWS, V, C, CHUNK = 32768, 50304, 768, 7040
ROUNDS, REPEATS = 5, 3


def milliseconds(function) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPEATS):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS


def main() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(CHUNK, C, device="cuda").bfloat16(), torch.randn(V, C, device="cuda")
    w_low, grad = w.bfloat16(), (torch.randn(CHUNK, V, device="cuda") / V).bfloat16()
    casts, x8 = WeightCasts([w]), cast(x, E4M3, per_tensor=True)
    of_weight, one = casts.casts[0], torch.ones(1, 1, device="cuda")
    grads = {dtype: (grad.float() * 2.0**15).to(dtype) for dtype in (E4M3, E5M2)}
    grad_t, x_t = grads[E5M2].t().contiguous(), x8.values.t().contiguous()
    total, weights = torch.zeros(V, C, device="cuda"), torch.ones(3, device="cuda")

    def scaled(a, b, fast=True):
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    def loss(weights, softcap):
        rows = torch.randn(ROWS, C, device="cuda").bfloat16().requires_grad_()
        targets = torch.randint(0, V, (1, ROWS), device="cuda")
        return lambda: linear_cross_entropy(rows, w_low.requires_grad_(), targets, target_weights=weights,
                                            softcap=softcap)

    cases = {
        "logits, bf16": lambda: x @ w_low.T,
        "logits, e4m3": lambda: scaled(x8.values, of_weight.values.t()),
        "gradient of x, bf16": lambda: grad @ w_low,
        **{f"gradient of x, {name}{'' if fast else ', exact sums'}":
           lambda g=grads[dtype], fast=fast: scaled(g, of_weight.transposed.t(), fast)
           for name, dtype in (("e5m2", E5M2), ("e4m3", E4M3)) for fast in (True, False)},
        "gradient of w, bf16": lambda: torch.addmm(total, grad.T, x, out_dtype=torch.float32, out=total),
        "transposed copy of the gradient, e5m2": lambda: grads[E5M2].t().contiguous(),
        "gradient of w, e5m2": lambda: scaled(grad_t, x_t.t()),
        "cast of the weight": casts.update,
        "cast of x": lambda: cast(x, E4M3, per_tensor=True),
        "gradient to e5m2, PyTorch": lambda: (grad.float() * 2.0**15).to(E5M2),
        f"{ROWS} rows: head and loss": loss(None, None),
        f"{ROWS} rows: the same, softcap, 3 targets": loss(weights, Softcap(23.0, 7.5, 5.0))}
    for name, function in cases.items():
        try:
            milliseconds(function)  # compiles
            times = [milliseconds(function) for _ in range(ROUNDS)]
            print(json.dumps({"what": name, "ms": round(statistics.median(times), 4),
                              "all": [round(t, 4) for t in times]}), flush=True)
        except RuntimeError as error:  # products that cuBLAS does not have
            print(json.dumps({"what": name, "error": str(error).splitlines()[0]}), flush=True)


if __name__ == "__main__":
    main()
