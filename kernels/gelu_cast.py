"""GELU that also casts its result to FP8, its gradient that does the same, and the MLP of these in FP8.

    h = x @ w_in.T + b_in,   y = gelu(h),   out = y @ w_out.T + b_out

GELU is GPT-2's tanh form, see gelu_mlp.py. A kernel processes a row: it computes each value once, writes it
in the usual dtype, which the gradient of a weight needs, and finds the row's largest entry. Then it reads the
row back from the cache and writes the cast. So a cast costs the bytes that it writes. torch.compile computes
the gradient of GELU three times for the same: for the largest entry, for the cast, and for the usual dtype.

Shapes: M = rows of x, C = channels, H = hidden units.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton
from kernels.fp8 import (
    E4M3,
    E5M2,
    LARGEST,
    TINY,
    Cast,
    WeightCast,
    cast,
    cast_weight,
    forward_product,
    input_gradient,
    product_and_factors,
)
from kernels.gelu_mlp import SIGMOIDS, gelu

BLOCK, WARPS = 1024, 4  # entries of a row at a time


def gelu_cast(h: torch.Tensor, factors: torch.Tensor | None = None, dtype: torch.dtype = E4M3
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = gelu(h * factors), (M, H), in h's dtype, and the values and scale of its cast by rows.

    factors: (M, 1) fp32, None for 1. dtype: of the cast's values; tests of the kernel take another.
    """
    return (_gelu_cast if _runs(h, dtype) else plain_gelu_cast)(h, factors, dtype)


def plain_gelu_cast(h, factors=None, dtype=E4M3):
    """Compute gelu_cast by PyTorch."""
    y = gelu(_multiplied(h, factors)).to(h.dtype)
    return y, *cast(y, dtype)


def _multiplied(h, factors):
    return h.float() if factors is None else h.float() * factors


def gelu_backward_cast(grad: torch.Tensor, h: torch.Tensor, grad_factors: torch.Tensor | None = None,
                       factors: torch.Tensor | None = None, dtype: torch.dtype = E5M2
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of h * factors, (M, H), in h's dtype, and the values and scale of its cast by rows.

    grad: gradient of y, without its factors grad_factors, (M, 1) fp32, None for 1. factors, dtype: see
    gelu_cast.
    """
    run = _gelu_backward_cast if _runs(h, dtype) else plain_gelu_backward_cast
    return run(grad, h, grad_factors, factors, dtype)


def plain_gelu_backward_cast(grad, h, grad_factors=None, factors=None, dtype=E5M2):
    """Compute gelu_backward_cast by PyTorch."""
    h32 = _multiplied(h, factors)
    s = torch.sigmoid(1.5957691216057308 * (h32 + 0.044715 * h32**3))
    slope = s + h32 * s * (1 - s) * (1.5957691216057308 + 0.2140644488178008 * h32 * h32)
    grad_h = (_multiplied(grad, grad_factors) * slope).to(h.dtype)
    return grad_h, *cast(grad_h, dtype)


def _runs(h: torch.Tensor, dtype: torch.dtype) -> bool:
    if INTERPRETED and (dtype in LARGEST or torch.compiler.is_compiling()):
        return False  # Triton's interpreter rounds 8-bit numbers wrongly, and needs values
    return usable(h) and h.is_contiguous()


if triton is not None:
    import triton.language as tl

    from kernels.gelu_mlp import _derivative, _sigmoid

    @triton.jit
    def _gelu_cast_kernel(
        h_ptr, grad_ptr,  # (M, H); grad only if BACKWARD
        h_factors_ptr, grad_factors_ptr,  # (M,) fp32, if H_FACTORS, GRAD_FACTORS
        result_ptr,  # (M, H): y, or gradient of h
        values_ptr,  # (M, H): the result's cast
        scale_ptr,  # (M,) fp32: its scales
        H: tl.constexpr, BACKWARD: tl.constexpr, H_FACTORS: tl.constexpr, GRAD_FACTORS: tl.constexpr,
        SIGMOID: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Process a row per program, in pieces of BLOCK entries."""
        row = tl.program_id(0).to(tl.int64)
        largest = tl.zeros((BLOCK,), tl.int32)  # as the bits of fp32 numbers, of which a NaN is the largest
        for start in range(0, H, BLOCK):
            c = start + tl.arange(0, BLOCK)
            h = tl.load(h_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32)
            if H_FACTORS:
                h *= tl.load(h_factors_ptr + row)
            square = h * h
            s = _sigmoid(h, square, SIGMOID)
            y = h * s
            if BACKWARD:
                grad = tl.load(grad_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32)
                if GRAD_FACTORS:
                    grad *= tl.load(grad_factors_ptr + row)
                y = grad * _derivative(square, s, y)
            y = y.to(result_ptr.dtype.element_ty)
            tl.store(result_ptr + row * H + c, y, mask=c < H)
            largest = tl.maximum(largest, tl.abs(y.to(tl.float32)).to(tl.int32, bitcast=True))
        size = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
        size = tl.maximum(size, TINY, propagate_nan=tl.PropagateNan.ALL)
        tl.store(scale_ptr + row, tl.div_rn(size, LARGEST))
        factor = tl.div_rn(LARGEST, size)
        tl.debug_barrier()  # the row must be written before it is read back
        for start in range(0, H, BLOCK):
            c = start + tl.arange(0, BLOCK)
            y = tl.load(result_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32) * factor
            tl.store(values_ptr + row * H + c, y.to(values_ptr.dtype.element_ty), mask=c < H)


@triton_op("nanosync::gelu_cast", mutates_args=())
def _gelu_cast(h: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(None, h, None, factors, dtype)


@triton_op("nanosync::gelu_backward_cast", mutates_args=())
def _gelu_backward_cast(grad: torch.Tensor, h: torch.Tensor, grad_factors: torch.Tensor | None,
                        factors: torch.Tensor | None, dtype: torch.dtype
                        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(grad.contiguous(), h, grad_factors, factors, dtype)


def _launch(grad, h, grad_factors, factors, dtype: torch.dtype
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (M, H), largest = h.shape, LARGEST.get(dtype, LARGEST[E4M3])
    result, values = torch.empty_like(h), torch.empty_like(h, dtype=dtype)
    scale = torch.empty((M, 1), dtype=torch.float32, device=h.device)
    if M:
        wrap_triton(_gelu_cast_kernel)[(M,)](
            h, h if grad is None else grad, scale if factors is None else factors,
            scale if grad_factors is None else grad_factors, result, values, scale, H=H,
            BACKWARD=grad is not None, H_FACTORS=factors is not None, GRAD_FACTORS=grad_factors is not None,
            SIGMOID=0 if INTERPRETED else SIGMOIDS["exponential"], LARGEST=largest, TINY=TINY, BLOCK=BLOCK,
            num_warps=WARPS)
    return result, values, scale


def fp8_gelu_mlp(x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor,
                 b_out: torch.Tensor | None, emulated: bool, casts_in: WeightCast | None,
                 casts_out: WeightCast | None) -> torch.Tensor:
    """Return gelu(x @ w_in.T + b_in) @ w_out.T + b_out, (..., C), in x's dtype, by products in FP8.

    Differentiable once. It computes what two `fp8.linear` with GELU between them do. Arguments as of
    fp8.linear.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _MLP.apply(x.reshape(-1, x.shape[-1]), w_in, b_in, w_out, b_out, *(casts_in or (None, None, None)),
                   *(casts_out or (None, None, None)), emulated)
    return y.view(x.shape)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, *casts_and_emulated):
        *casts, ctx.emulated = casts_and_emulated
        casts_in = cast_weight(w_in) if casts[0] is None else WeightCast(*casts[:3])
        casts_out = cast_weight(w_out) if casts[3] is None else WeightCast(*casts[3:])
        cast_x = cast(x, E4M3)
        if b_in is None:
            h, factors = product_and_factors(cast_x, casts_in, False, x.dtype, ctx.emulated)
        else:  # the product adds the bias, so it must have its factors before
            h, factors = forward_product(cast_x, casts_in, b_in, x.dtype, ctx.emulated), None
        y, *cast_y = gelu_cast(h, factors)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, h, factors, y, *casts[1:3], *casts[4:])
        return forward_product(Cast(*cast_y), casts_out, b_out, x.dtype, ctx.emulated)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, b_in, w_out, b_out, h, factors, y, *casts = ctx.saved_tensors
        of_x, of_w_in, of_b_in, of_w_out, of_b_out = ctx.needs_input_grad[:5]
        casts_in = cast_weight(w_in) if casts[0] is None else WeightCast(None, *casts[:2])
        casts_out = cast_weight(w_out) if casts[2] is None else WeightCast(None, *casts[2:])
        grad_x = grad_w_in = grad_b_in = grad_w_out = grad_b_out = None
        if of_x or of_w_in or of_b_in:
            grad_y, grad_factors = product_and_factors(cast(grad, E5M2), casts_out, True, x.dtype,
                                                       ctx.emulated)
            grad_h, *cast_h = gelu_backward_cast(grad_y, h, grad_factors, factors)
        if of_x:
            grad_x = input_gradient(Cast(*cast_h), casts_in, x.dtype, ctx.emulated)
        if of_w_in:
            grad_w_in = (grad_h.t() @ x).to(w_in.dtype)
        if of_b_in:
            grad_b_in = grad_h.sum(0, dtype=torch.float32).to(b_in.dtype)
        if of_w_out:
            grad_w_out = (grad.t() @ y).to(w_out.dtype)
        if of_b_out:
            grad_b_out = grad.sum(0, dtype=torch.float32).to(b_out.dtype)
        return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out, *[None] * 7
