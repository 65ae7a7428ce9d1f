"""Time tiles of the kernels that transpose the factors of weights' gradients, and warps of GELU's.

$ python records/fp8-training/time_transposes.py OUT.json    # from the repository's root, on Hopper

65,536 tokens at GPT-2's width. ms_layer: of the matrices of a layer, two of 3,072 columns and one of 2,304
for the kernel of bytes, three of 768 for the kernel that casts. Each result is compared with PyTorch's. A
time is the best of three series of 16 launches. Without a GPU all runs at toy size, with PyTorch's code.
"""

import os
import sys

sys.path.insert(0, os.getcwd())

import torch

from benchmarks.kernels import _own_stream, _Timer
from kernels import fp8_transpose, gelu_cast
from nanosync.errors import UserError, install_error_hook
from nanosync.files import write_result
from nanosync.hardware import environment

TILES = [(128, 128, 8), (128, 128, 4), (256, 64, 4), (128, 64, 4), (256, 64, 8), (128, 64, 2), (64, 64, 2),
         (256, 128, 8), (512, 64, 8), (64, 128, 4)]
CAST_TILES = [(128, 128, 8), (128, 64, 4), (256, 64, 8), (64, 64, 2), (64, 128, 4), (128, 64, 2),
              (128, 32, 2), (256, 32, 4), (64, 64, 4), (128, 64, 8)]


def milliseconds(function) -> float:
    with _own_stream(device):
        timer = _Timer(function, 1, device)
        return 1e3 * min(timer.seconds() for _ in range(3))


def time_tiles(kernel: str, tiles: list, function, inputs: list, moved: int, expected: list) -> list[dict]:
    """Return a row for each tile. kernel: name of the constant of fp8_transpose that has the tile."""
    rows, used = [], getattr(fp8_transpose, kernel)
    for tile in tiles:
        setattr(fp8_transpose, kernel, tile)
        right = all(torch.equal(function(x).view(torch.uint8), y) for x, y in zip(inputs, expected))
        ms = sum(milliseconds(lambda x=x: function(x)) for x in inputs)
        rows.append({"kernel": kernel, "tile": tile, "ms_layer": ms, "tb_s": moved / ms / 1e9, "ok": right})
        print(rows[-1], flush=True)
    setattr(fp8_transpose, kernel, used)
    return rows


install_error_hook()
if len(sys.argv) != 2 or not os.path.isdir(os.path.dirname(os.path.abspath(sys.argv[1]))):
    raise UserError("time_transposes.py takes the file for its figures: name one in a folder that is there")
on_gpu = torch.cuda.is_available()
device = torch.device("cuda" if on_gpu else "cpu")
M, C = (65536, 768) if on_gpu else (64, 16)
wide = [torch.randint(256, (M, K), dtype=torch.uint8, device=device) for K in (4 * C, 4 * C, 3 * C)]
rows = time_tiles("TILE", TILES, fp8_transpose.transposed, wide, 2 * sum(x.numel() for x in wide),
                  [x.t().contiguous() for x in wide])
narrow = [torch.randn(M, C, device=device).bfloat16() for _ in range(3)]
factors, scale = torch.rand(M, 1, device=device), torch.full((1, 1), 0.01, device=device)
rows += time_tiles(
    "CAST_TILE", CAST_TILES, lambda x: fp8_transpose.cast_transposed(x, factors, scale, torch.float8_e5m2),
    narrow, 3 * sum(x.numel() for x in narrow),
    [(x.float() * (factors * (1 / scale))).to(torch.float8_e5m2).view(torch.uint8).t().contiguous()
     for x in narrow])
h, grad = (torch.randn(M, 4 * C, device=device).bfloat16() for _ in range(2))
row_block, gelu = gelu_cast.row_block, {}
for warps in (4, 8, 16):
    gelu_cast.row_block = lambda H, warps=warps: (row_block(H)[0], warps)
    gelu[warps] = [milliseconds(lambda: gelu_cast.gelu_cast(h, store=False)),
                   milliseconds(lambda: gelu_cast.gelu_backward_cast(grad, h, store=False))]
    print(f"GELU, gradient, {warps} warps: {gelu[warps]} ms", flush=True)
copy = torch.empty_like(wide[0])
copied = 2 * copy.numel() / milliseconds(lambda: copy.copy_(wide[0])) / 1e9
write_result(sys.argv[1], {"environment": environment(device), "rows": rows, "gelu": gelu,
                           "copy_tb_s": copied})
