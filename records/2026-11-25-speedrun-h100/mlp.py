"""kernels/relu_squared.py's products beside cuBLAS and inductor, by tiles, and two ways that did not pay.

    python records/2026-11-25-speedrun-h100/mlp.py    # from the repository's root, on a Hopper GPU; a minute

The c_fc of 64 sequences: N = 65536 tokens, C = 768 channels, H = 3072 hidden units, bfloat16. Put in order
since it was run; the rows of mlp.json with "flatten": false are of a loop over tiles that is not made one
with the loop over sums.
"""

import itertools
import os
import statistics
import sys
import time

sys.path.insert(0, os.getcwd())

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import relu_squared

N, C, H = 65536, 768, 3072
TILES = [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4)]  # rows, columns, warps
SUMS = [(64, 2), (64, 3), (64, 4), (64, 5), (128, 2), (32, 4), (32, 5)]  # length of a piece, pieces in flight


@triton.jit
def prefetching(a_desc, b_desc, y_desc, y_ptr, out_desc, N, H: tl.constexpr, C: tl.constexpr,
                PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Backward that asks for y's lines, of 64 values each, to be brought into L2 while it sums."""
    across: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tiles = (N + BLOCK_M - 1) // BLOCK_M * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        lines = y_ptr + rows[:, None] * H + (column + tl.arange(0, BLOCK_N // 64) * 64)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32,
                                  is_pure=False, pack=1)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, C, BLOCK_K):
            sums = tl.dot(a_desc.load([row, k]), b_desc.load([k, column]), sums)
        left, right = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        relu_squared._end(left, y_desc, out_desc, row, column, True)
        relu_squared._end(right, y_desc, out_desc, row, column + BLOCK_N // 2, True)


@triton.jit
def loading_early(a_desc, b_desc, y_ptr, out_desc, N, H: tl.constexpr, C: tl.constexpr,
                  PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr):
    """Backward that loads y into registers before it sums: more than there are, so some go to memory."""
    across: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tiles = (N + BLOCK_M - 1) // BLOCK_M * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        y = tl.load(y_ptr + rows[:, None] * H + (column + tl.arange(0, BLOCK_N))[None, :])
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, C, BLOCK_K):
            sums = tl.dot(a_desc.load([row, k]), b_desc.load([k, column]), sums)
        sums *= 2 * tl.sqrt(y.to(tl.float32))
        left, right = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        out_desc.store([row, column], left.to(out_desc.dtype))
        out_desc.store([row, column + BLOCK_N // 2], right.to(out_desc.dtype))


def milliseconds(f) -> float:
    """Median of means over 20 calls, for 0.15 s."""
    f()
    torch.cuda.synchronize()
    begin, end, times, started = torch.cuda.Event(True), torch.cuda.Event(True), [], time.time()
    while time.time() < started + 0.15:
        begin.record()
        for _ in range(20):
            f()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 20)
    return statistics.median(times)


def main() -> None:
    x, grad = (torch.randn(N, C, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w_in = torch.randn(H, C, device="cuda", dtype=torch.bfloat16) * C**-0.5
    w_out = torch.randn(C, H, device="cuda", dtype=torch.bfloat16) * H**-0.5
    ends = torch.compile(relu_squared.relu_squared), torch.compile(lambda grad, y: grad * (2 * y.sqrt()))
    h, grad_y = x @ w_in.T, grad @ w_out
    y = ends[0](h)
    expected = {False: y, True: ends[1](grad_y, y)}
    print(f"forward: product {milliseconds(lambda: x @ w_in.T):.3f} ms, ReLU^2 "
          f"{milliseconds(lambda: ends[0](h)):.3f}, both {milliseconds(lambda: ends[0](x @ w_in.T)):.3f}")
    print(f"backward: product {milliseconds(lambda: grad @ w_out):.3f} ms, derivative "
          f"{milliseconds(lambda: ends[1](grad_y, y)):.3f}, both "
          f"{milliseconds(lambda: ends[1](grad @ w_out, y)):.3f}", flush=True)

    def contender(backward: bool, kind: str, tile: tuple, pieces: tuple, per_multiprocessor: int):
        (M, W, warps), (K, stages) = tile, pieces
        programs = per_multiprocessor * torch.cuda.get_device_properties(0).multi_processor_count
        out, options = torch.empty_like(y), dict(num_warps=warps, num_stages=stages)
        sizes = dict(BLOCK_M=M, BLOCK_N=W, BLOCK_K=K)
        descriptor = TensorDescriptor.from_tensor
        a = descriptor(grad if backward else x, [M, K])
        b = descriptor(w_out, [K, W]) if backward else descriptor(w_in, [W, K])
        y_desc, out_desc = descriptor(y, [M, W // 2]), descriptor(out, [M, W // 2])
        if kind == "as it is":
            arguments = a, b, y_desc, out_desc, N, H, C, programs, backward
            return out, lambda: relu_squared._kernel[programs,](*arguments, **sizes, **options)
        if kind == "prefetch":
            arguments = a, b, y_desc, y, out_desc, N, H, C, programs
            return out, lambda: prefetching[programs,](*arguments, **sizes, **options)
        arguments = a, b, y, out_desc, N, H, C, programs
        return out, lambda: loading_early[programs,](*arguments, **sizes, **options)

    kinds = ("as it is", 1), ("as it is", 2), ("prefetch", 1), ("early", 1)
    for backward in (False, True):
        found = []
        for (kind, per), tile, pieces in itertools.product(kinds[:4 if backward else 2], TILES, SUMS):
            if per == 2 and tile[2] == 8:
                continue  # no registers for two
            out, launch = contender(backward, kind, tile, pieces, per)
            try:
                launch()
            except triton.runtime.errors.OutOfResources:
                continue
            miss = ((out - expected[backward]).abs().max() / expected[backward].abs().max()).item()
            found.append((milliseconds(launch), kind, per, tile, pieces, miss))
        print("backward" if backward else "forward")
        for time_ms, kind, per, tile, pieces, miss in sorted(found):
            print(f"  {time_ms:.4f} ms, {2e-9 * N * C * H / time_ms:.0f} TFLOP/s: {kind}, {per} a processor, "
                  f"tile and warps {tile}, sum {pieces}; largest difference {miss:.1e}", flush=True)


if __name__ == "__main__":
    main()
