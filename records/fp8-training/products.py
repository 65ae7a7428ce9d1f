"""Time the products of FP8 at GPT-2 124M's shapes: formats, kinds of scales and sums, beside bf16; on a GPU.

$ python records/fp8-training/products.py FILE.json    # from the repository's root, 20 s
"""

import json
import sys

sys.path.insert(0, ".")

import torch

from kernels.fp8 import E4M3, E5M2, Cast, product
from nanosync.hardware import environment

DEVICE = torch.device("cuda")
TOKENS, CHUNK, C, V = 65536, 7040, 768, 50304  # CHUNK: rows of the head at a time
SHAPES = [("q, k, v", TOKENS, 3 * C, C), ("attention out", TOKENS, C, C), ("MLP in", TOKENS, 4 * C, C),
          ("MLP out", TOKENS, C, 4 * C), ("gradient of q, k, v's input", TOKENS, C, 3 * C),
          ("head", CHUNK, V, C), ("gradient of the head's input", CHUNK, C, V),
          ("weight gradient of q, k, v", 3 * C, C, TOKENS),
          ("weight gradient of attention out", C, C, TOKENS), ("weight gradient of MLP", 4 * C, C, TOKENS),
          ("weight gradient of the head", V, C, CHUNK)]


def milliseconds(function, calls: int = 10) -> float:
    """Return the GPU's time of a call, the best of three series."""
    for _ in range(3):
        function()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return min(times)


def measure(M: int, N: int, K: int) -> dict[str, float]:
    """Return the milliseconds of each contender for a (M, K) @ b.T with b (N, K)."""
    a, b = (torch.randn(rows, K, device=DEVICE, dtype=torch.bfloat16) for rows in (M, N))
    times = {"bf16": milliseconds(lambda: a @ b.T)}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        for scales, sizes in (("row", (M, N)), ("one", (1, 1))):
            factors = [Cast(t.to(kind), torch.ones(size, 1, device=DEVICE))
                       for t, kind, size in ((a, dtype, sizes[0]), (b, E4M3, sizes[1]))]
            for fast in (True, False):
                times[f"{name} {scales} {'fast' if fast else 'exact'}"] = milliseconds(
                    lambda f=factors, fast=fast: product(*f, None, torch.bfloat16, False, fast))
    return times


rows = []
for operation, M, N, K in SHAPES:
    for name, ms in measure(M, N, K).items():
        rows.append({"operation": operation, "M": M, "N": N, "K": K, "name": name, "ms": ms,
                     "tflop_per_second": 2e-9 * M * N * K / ms})
        print(f"{operation:34} {name:16} {ms:.3f} ms {rows[-1]['tflop_per_second']:6.0f} TFLOP/s", flush=True)
with open(sys.argv[1], "w") as f:
    json.dump({"environment": environment(DEVICE), "figures": rows}, f, indent=1)
