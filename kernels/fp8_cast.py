"""Casts to FP8 with a scale for each row, or one for a tensor: see fp8.py, which multiplies them.

A tensor is divided by its scale, so that its largest entry becomes the largest number of the format.

Shapes: M = rows, K = columns.
"""

from typing import NamedTuple

import torch

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
TINY = 1e-30  # smallest largest entry: a row of zeros needs a scale, too


class Cast(NamedTuple):
    """A matrix (M, K) or a batch (R, M, K) in FP8. It stands for values * scale."""

    values: torch.Tensor  # contiguous in the last dimension
    scale: torch.Tensor  # (M, 1) or (R, M, 1), or one number in as many dimensions; fp32


def cast(x: torch.Tensor, dtype: torch.dtype, per_tensor: bool = False) -> Cast:
    """Cast (..., M, K) to a contiguous Cast. A row with an entry that is not finite becomes NaN."""
    dims = tuple(range(x.dim())) if per_tensor else -1
    largest = x.abs().amax(dim=dims, keepdim=True).float().clamp(min=TINY)
    values = (x.float() * (LARGEST[dtype] / largest)).to(dtype)
    return Cast(values.contiguous(), largest / LARGEST[dtype])


def join_cast(parts: tuple[torch.Tensor, ...], dtype: torch.dtype = E5M2) -> Cast:
    """Return the cast of parts joined in the last dimension, with a scale for each joined row.

    parts: (..., M, K) each. dtype: of the cast's values; tests of the kernel take another.
    """
    return Cast(*_join_cast(*parts, dtype)) if _joins(parts, dtype) else cast(torch.cat(parts, -1), dtype)


def _joins(parts, dtype) -> bool:
    """Return True if the kernel runs, which takes three matrices."""
    return (len(parts) == 3 and not interpreter_fails(dtype)
            and all(usable(p) and p.dim() == 2 and p.is_contiguous() for p in parts))


def interpreter_fails(dtype: torch.dtype) -> bool:
    """Return True in Triton's interpreter for FP8, which it rounds wrongly, and under a compiler, which has
    no values for it."""
    return INTERPRETED and (dtype in LARGEST or torch.compiler.is_compiling())


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _bits(y):
        """Return the size of each entry as the bits of an fp32 number, of which a NaN is the largest."""
        return tl.abs(y.to(tl.float32)).to(tl.int32, bitcast=True)

    @triton.jit
    def _store_scale(scale_ptr, largest, LARGEST: tl.constexpr, TINY: tl.constexpr):
        """Store the scale of a row, and return the factor of its cast."""
        size = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        size = tl.maximum(size, TINY, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scale_ptr, tl.div_rn(size, LARGEST))
        return tl.div_rn(LARGEST, size)

    @triton.jit
    def _join_cast_kernel(
        a_ptr, b_ptr, c_ptr,  # (M, K)
        values_ptr,  # (M, 3 K)
        scale_ptr,  # (M,) fp32
        K: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Process a row per program. It stays in registers between its one read and its one write."""
        row = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, BLOCK)
        a = tl.load(a_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.maximum(_bits(a), _bits(b)), _bits(c))
        factor = _store_scale(scale_ptr + row, largest, LARGEST, TINY)
        values_ptr += row * 3 * K + k
        tl.store(values_ptr, (a * factor).to(values_ptr.dtype.element_ty), mask=k < K)
        tl.store(values_ptr + K, (b * factor).to(values_ptr.dtype.element_ty), mask=k < K)
        tl.store(values_ptr + 2 * K, (c * factor).to(values_ptr.dtype.element_ty), mask=k < K)


@triton_op("nanosync::fp8_join_cast", mutates_args=())
def _join_cast(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, dtype: torch.dtype
               ) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), largest = a.shape, LARGEST.get(dtype, LARGEST[E5M2])
    values = a.new_empty((M, 3 * K), dtype=dtype)
    scale = torch.empty((M, 1), dtype=torch.float32, device=a.device)
    if M:
        BLOCK = triton.next_power_of_2(K)
        warps = min(16, max(1, BLOCK // 256))  # 8 entries a thread: 16 would be exchanged before the stores
        wrap_triton(_join_cast_kernel)[(M,)](a, b, c, values, scale, K=K, LARGEST=largest, TINY=TINY,
                                             BLOCK=BLOCK, num_warps=warps)
    return values, scale
