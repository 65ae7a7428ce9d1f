"""The factors of a weight's gradient in FP8: two matrices over tokens, transposed and with one scale each.

    dw = dy.T @ x = sum over tokens m of dy[m]^T x[m]

FP8's matrix units take factors with contiguous tokens, and a product has no scale for each term of its sums.
The wider of the two matrices, `wide`, has a cast with a scale for each token from another product. Its bytes
are transposed as they are. Each row of the other one, `narrow`, is multiplied by the scale of the row of
`wide`, and cast with one scale. The largest entry is known from the scales of both, so a pass over the tokens
makes that scale, and it depends on no earlier step.

Shapes: M = tokens, N = columns of wide, K = columns of narrow.
"""

import torch

from kernels import triton, triton_op, usable, wrap_triton
from kernels.fp8_cast import Cast, interpreter_fails

TILE, CAST_TILE = (256, 128, 8), (64, 128, 4)  # rows, columns and warps of a program, for each kernel
SMALLEST = 1e-36  # scale of zeros


def transposed_factors(wide: Cast, narrow: torch.Tensor, narrow_scale: torch.Tensor, dtype: torch.dtype
                       ) -> tuple[Cast, Cast]:
    """Return the casts of wide.T, (N, M), and of narrow.T, (K, M), whose product is the sum over tokens.

    wide: (M, N), with a scale for each row. narrow: (M, K). narrow_scale: (M, 1) fp32, of a cast of narrow's
    rows to dtype. The scale of the first result is 1.
    """
    scale = (wide.scale * narrow_scale).amax().clamp(min=SMALLEST).reshape(1, 1)
    values = cast_transposed(narrow, wide.scale, scale, dtype)
    return Cast(transposed(wide.values), torch.ones_like(scale)), Cast(values, scale)


def transposed(values: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of values.T, for values of one byte each."""
    fits = len(values) % 16 == 0 and len(values) <= 65535 * TILE[0]  # stores of 16 bytes, CUDA's grid
    return _transposed(values) if fits and _runs(values, torch.uint8) else values.t().contiguous()


def cast_transposed(x: torch.Tensor, factors: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
                    ) -> torch.Tensor:
    """Return (x * (factors * (1 / scale))).T, (K, M), in dtype.

    x: (M, K). factors: (M, 1) fp32. scale: one number in fp32.
    """
    if _runs(x, dtype):
        return _cast_transposed(x, factors, scale, dtype)
    return (x.float() * (factors * (1 / scale))).to(dtype).t().contiguous()


def _runs(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return not interpreter_fails(dtype) and usable(x) and x.is_contiguous()


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _transpose_kernel(
        x_ptr,  # (M, K), of one byte each, M a multiple of 16
        result_ptr,  # (K, M)
        M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Process a tile per program. Programs that follow each other on axis 0 read the same rows. Threads
        exchange words, each of four rows: to exchange bytes takes four times as many accesses to shared
        memory."""
        i = tl.program_id(1) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        words = tl.multiple_of(M // 4, 4)  # so that a thread stores 16 bytes
        inside = (i[:, None] < words) & (k[None, :] < K)
        x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        x_ptr += 4 * i[:, None].to(tl.int64) * K + k[None, :]
        word = tl.load(x_ptr, mask=inside, other=0).to(tl.uint32)
        word |= tl.load(x_ptr + K, mask=inside, other=0).to(tl.uint32) << 8
        word |= tl.load(x_ptr + 2 * K, mask=inside, other=0).to(tl.uint32) << 16
        word |= tl.load(x_ptr + 3 * K, mask=inside, other=0).to(tl.uint32) << 24
        result_ptr = result_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        result_ptr += k[:, None].to(tl.int64) * words + i[None, :]
        tl.store(result_ptr, tl.trans(word).to(tl.int32, bitcast=True), mask=tl.trans(inside))

    @triton.jit
    def _cast_transposed_kernel(
        x_ptr,  # (M, K)
        factors_ptr, scale_ptr,  # (M,), (1,) fp32
        result_ptr,  # (K, M)
        M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Process a tile per program."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (m[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + m[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        factors = tl.load(factors_ptr + m, mask=m < M, other=0.0) * tl.div_rn(1.0, tl.load(scale_ptr))
        x = (x * factors[:, None]).to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + k[:, None].to(tl.int64) * M + m[None, :], tl.trans(x), mask=tl.trans(inside))


def _grid(x: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], columns)


@triton_op("nanosync::fp8_transpose_values", mutates_args=())
def _transposed(values: torch.Tensor) -> torch.Tensor:
    result, (rows, columns, warps) = values.new_empty(values.shape[::-1]), TILE
    if values.numel():
        wrap_triton(_transpose_kernel)[_grid(values, rows, columns)[::-1]](
            values, result, *values.shape, BLOCK_M=rows, BLOCK_K=columns, num_warps=warps)
    return result


@triton_op("nanosync::fp8_cast_transposed", mutates_args=())
def _cast_transposed(x: torch.Tensor, factors: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
                     ) -> torch.Tensor:
    result, (rows, columns, warps) = x.new_empty(x.shape[::-1], dtype=dtype), CAST_TILE
    if x.numel():
        wrap_triton(_cast_transposed_kernel)[_grid(x, rows, columns)](
            x, factors, scale, result, *x.shape, BLOCK_M=rows, BLOCK_K=columns, num_warps=warps)
    return result
