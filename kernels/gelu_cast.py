"""GELU that also casts its result to FP8, its gradient that does the same, and the MLP of these in FP8.

    h = x @ w_in.T + b_in,   y = gelu(h),   out = y @ w_out.T + b_out

GELU is GPT-2's tanh form, see gelu_mlp.py. A kernel processes a row: it computes each value once, writes it
in the usual dtype, which the gradient of a weight needs, and finds the row's largest entry. Then it reads the
row back from the cache and writes the cast. So a cast costs the bytes that it writes. torch.compile computes
the gradient of GELU three times for the same: for the largest entry, for the cast, and for the usual dtype.
If the gradients of weights are in FP8, too, the kernels keep the row in registers and write the casts alone,
except that a gradient of b_in needs that of h.

Shapes: M = rows of x, C = channels, H = hidden units.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton
from kernels.fp8 import WeightCast, cast_weight, fits_tokens, forward_product, input_gradient, product
from kernels.fp8_cast import E4M3, E5M2, LARGEST, TINY, Cast, cast, interpreter_fails
from kernels.fp8_transpose import transposed_factors
from kernels.gelu_mlp import SIGMOIDS, gelu

BLOCK, WARPS = 1024, 4  # entries of a row at a time


def row_block(H: int) -> tuple[int, int]:
    """Return the size of a block for a whole row, and its warps: up to 32 entries a thread."""
    block = triton.next_power_of_2(H)
    return block, min(16, max(1, block // 1024))


def gelu_cast(h: torch.Tensor, dtype: torch.dtype = E4M3, store: bool = True
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = gelu(h), (M, H), in h's dtype, and the values and scale of its cast by rows.

    dtype: of the cast's values; tests of the kernel take another. store: False leaves y out, and an empty
    tensor is in its place.
    """
    return (_gelu_cast if _runs(h, dtype) else plain_gelu_cast)(h, dtype, store)


def plain_gelu_cast(h, dtype=E4M3, store=True):
    """Compute gelu_cast by PyTorch."""
    y = gelu(h.float()).to(h.dtype)
    return y if store else y.new_empty(0), *cast(y, dtype)


def gelu_backward_cast(grad: torch.Tensor, h: torch.Tensor, dtype: torch.dtype = E5M2, store: bool = True
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradient of h, (M, H), in h's dtype, and the values and scale of its cast by rows.

    grad: gradient of y. dtype, store: see gelu_cast.
    """
    return (_gelu_backward_cast if _runs(h, dtype) else plain_gelu_backward_cast)(grad, h, dtype, store)


def plain_gelu_backward_cast(grad, h, dtype=E5M2, store=True):
    """Compute gelu_backward_cast by PyTorch."""
    h32 = h.float()
    s = torch.sigmoid(1.5957691216057308 * (h32 + 0.044715 * h32**3))
    slope = s + h32 * s * (1 - s) * (1.5957691216057308 + 0.2140644488178008 * h32 * h32)
    grad_h = (grad.float() * slope).to(h.dtype)
    return grad_h if store else grad_h.new_empty(0), *cast(grad_h, dtype)


def _runs(h: torch.Tensor, dtype: torch.dtype) -> bool:
    return not interpreter_fails(dtype) and usable(h) and h.is_contiguous()


if triton is not None:
    import triton.language as tl

    from kernels.fp8_cast import _bits, _store_scale
    from kernels.gelu_mlp import _derivative, _sigmoid

    @triton.jit
    def _result(h_ptr, grad_ptr, row, c, H: tl.constexpr, BACKWARD: tl.constexpr, SIGMOID: tl.constexpr):
        """Return columns c of a row of y, or of the gradient of h, in h's dtype."""
        h = tl.load(h_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32)
        square = h * h
        s = _sigmoid(h, square, SIGMOID)
        y = h * s
        if BACKWARD:
            grad = tl.load(grad_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32)
            y = grad * _derivative(square, s, y)
        return y.to(h_ptr.dtype.element_ty)

    @triton.jit
    def _gelu_cast_kernel(
        h_ptr, grad_ptr,  # (M, H); grad only if BACKWARD
        result_ptr,  # (M, H): y, or gradient of h; if STORE
        values_ptr,  # (M, H): the result's cast
        scale_ptr,  # (M,) fp32: its scales
        H: tl.constexpr, BACKWARD: tl.constexpr, STORE: tl.constexpr, SIGMOID: tl.constexpr,
        LARGEST: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Process a row per program: with STORE in pieces of BLOCK entries, else in one that stays in
        registers."""
        row = tl.program_id(0).to(tl.int64)
        if STORE:
            largest = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, H, BLOCK):
                c = start + tl.arange(0, BLOCK)
                y = _result(h_ptr, grad_ptr, row, c, H, BACKWARD, SIGMOID)
                tl.store(result_ptr + row * H + c, y, mask=c < H)
                largest = tl.maximum(largest, _bits(y))
            factor = _store_scale(scale_ptr + row, largest, LARGEST, TINY)
            tl.debug_barrier()  # the row must be written before it is read back
            for start in range(0, H, BLOCK):
                c = start + tl.arange(0, BLOCK)
                y = tl.load(result_ptr + row * H + c, mask=c < H, other=0.0).to(tl.float32) * factor
                tl.store(values_ptr + row * H + c, y.to(values_ptr.dtype.element_ty), mask=c < H)
        else:
            c = tl.arange(0, BLOCK)
            y = _result(h_ptr, grad_ptr, row, c, H, BACKWARD, SIGMOID)
            factor = _store_scale(scale_ptr + row, _bits(y), LARGEST, TINY)
            # 8, though it may be a multiple of 16, lets Triton store 8 bytes a thread without an exchange
            values_ptr = tl.multiple_of(values_ptr + row * H, 8 if H % 8 == 0 else 1)
            tl.store(values_ptr + c, (y.to(tl.float32) * factor).to(values_ptr.dtype.element_ty), mask=c < H)


@triton_op("nanosync::gelu_cast", mutates_args=())
def _gelu_cast(h: torch.Tensor, dtype: torch.dtype, store: bool
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(None, h, dtype, store)


@triton_op("nanosync::gelu_backward_cast", mutates_args=())
def _gelu_backward_cast(grad: torch.Tensor, h: torch.Tensor, dtype: torch.dtype, store: bool
                        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(grad.contiguous(), h, dtype, store)


def _launch(grad, h, dtype: torch.dtype, store: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (M, H), largest = h.shape, LARGEST.get(dtype, LARGEST[E4M3])
    result, values = torch.empty_like(h) if store else h.new_empty(0), torch.empty_like(h, dtype=dtype)
    block, warps = (BLOCK, WARPS) if store else row_block(H)
    scale = torch.empty((M, 1), dtype=torch.float32, device=h.device)
    if M:
        wrap_triton(_gelu_cast_kernel)[(M,)](
            h, h if grad is None else grad, result, values, scale, H=H, BACKWARD=grad is not None,
            STORE=store, SIGMOID=0 if INTERPRETED else SIGMOIDS["exponential"], LARGEST=largest, TINY=TINY,
            BLOCK=block, num_warps=warps)
    return result, values, scale


def fp8_gelu_mlp(x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor,
                 b_out: torch.Tensor | None, emulated: bool, casts_in: WeightCast | None,
                 casts_out: WeightCast | None, weight_gradients: bool = False) -> torch.Tensor:
    """Return gelu(x @ w_in.T + b_in) @ w_out.T + b_out, (..., C), in x's dtype, by products in FP8.

    Differentiable once. It computes what two `fp8.linear` with GELU between them do. Arguments as of
    fp8.linear.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _MLP.apply(x.reshape(-1, x.shape[-1]), w_in, b_in, w_out, b_out, *(casts_in or (None, None, None)),
                   *(casts_out or (None, None, None)), emulated, weight_gradients)
    return y.view(x.shape)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, *casts_and_flags):
        *casts, ctx.emulated, wanted = casts_and_flags
        casts_in = cast_weight(w_in) if casts[0] is None else WeightCast(*casts[:3])
        casts_out = cast_weight(w_out) if casts[3] is None else WeightCast(*casts[3:])
        cast_x, ctx.in_fp8 = cast(x, E4M3), wanted and fits_tokens(len(x))
        h = forward_product(cast_x, casts_in, b_in, x.dtype, ctx.emulated)
        y, *cast_y = gelu_cast(h, store=not ctx.in_fp8)
        kept = (cast_x.scale, *cast_y) if ctx.in_fp8 else (y,)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, h, *casts[1:3], *casts[4:], *kept)
        return forward_product(Cast(*cast_y), casts_out, b_out, x.dtype, ctx.emulated)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, b_in, w_out, b_out, h, *casts_and_kept = ctx.saved_tensors
        casts, kept = casts_and_kept[:4], casts_and_kept[4:]
        of_x, of_w_in, of_b_in, of_w_out, of_b_out = ctx.needs_input_grad[:5]
        casts_in = cast_weight(w_in) if casts[0] is None else WeightCast(None, *casts[:2])
        casts_out = cast_weight(w_out) if casts[2] is None else WeightCast(None, *casts[2:])
        grad_x = grad_w_in = grad_b_in = grad_w_out = grad_b_out = None
        cast_grad = cast(grad, E5M2)
        if of_x or of_w_in or of_b_in:
            grad_y = input_gradient(cast_grad, casts_out, x.dtype, ctx.emulated)
            grad_h, *cast_h = gelu_backward_cast(grad_y, h, store=of_b_in or (of_w_in and not ctx.in_fp8))
        if of_x:
            grad_x = input_gradient(Cast(*cast_h), casts_in, x.dtype, ctx.emulated)
        if of_w_in and ctx.in_fp8:
            wide, narrow = transposed_factors(Cast(*cast_h), x, kept[0], E4M3)
            grad_w_in = product(wide, narrow, None, x.dtype, ctx.emulated, fast=False).to(w_in.dtype)
        elif of_w_in:
            grad_w_in = (grad_h.t() @ x).to(w_in.dtype)
        if of_b_in:
            grad_b_in = grad_h.sum(0, dtype=torch.float32).to(b_in.dtype)
        if of_w_out and ctx.in_fp8:
            wide, narrow = transposed_factors(Cast(*kept[1:]), grad, cast_grad.scale, E5M2)
            grad_w_out = product(narrow, wide, None, x.dtype, ctx.emulated, fast=False).to(w_out.dtype)
        elif of_w_out:
            grad_w_out = (grad.t() @ kept[0]).to(w_out.dtype)
        if of_b_out:
            grad_b_out = grad.sum(0, dtype=torch.float32).to(b_out.dtype)
        return grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out, *[None] * 8
