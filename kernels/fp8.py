"""Linear layers whose forward product and input gradient run in FP8, and the weight's gradient if wanted.

    y  = x @ w.T + bias          x and w in e4m3, 3 bits of mantissa, up to 448
    dx = dy @ w                  dy in e5m2, 2 bits of mantissa, up to 57344
    dw = dy.T @ x                in the dtype of x, or dy in e5m2 and x in e4m3: see fp8_transpose.py

A tensor is divided by a scale before the cast, so that its largest entry becomes the largest number of the
format. Each row of an activation or gradient has a scale of its own, a weight has one. A scale of rows is
found in the pass that casts, by any kernel that has a whole row at hand. torch.compile makes LayerNorm and
others each one kernel with its cast. The gradient of LayerNorm is one kernel with its cast, or with the sums
for its weight, but not with both. A kernel of fp8_cast.py joins and casts the gradients of q, k and v, which
the compiler reads several times. Scales depend on the tensor alone, not on earlier steps, so they are no
state of a run. (Formats: arXiv 2209.05433.)

Relative to the largest entry of a row, entries below 2^-14 (e4m3) and 2^-29 (e5m2) lose bits of the mantissa.
All others are rounded to a relative error of at most 2^-4 (e4m3) and 2^-3 (e5m2).

FP8's matrix units take both factors with contiguous rows of the dimension that is summed. So a weight has two
copies, w for y and w.T for dx. `WeightCasts` makes them for a list of weights at once, after each update. Its
time is the bytes of the weights twice: two kernels, whatever the number of weights.

Shapes: M = rows of x, K = inputs, N = outputs of a layer. R = simulated ranks, which multiply in a batch.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, triton, usable
from kernels.fp8_cast import E4M3, E5M2, LARGEST, TINY, Cast, cast, join_cast
from kernels.fp8_transpose import transposed_factors

MULTIPLE = 16  # the sizes of a weight must be multiples of it


class WeightCast(NamedTuple):
    """A weight (N, K), or a batch (R, N, K), in e4m3, in both layouts, with one scale."""

    values: torch.Tensor  # (..., N, K), contiguous in the last dimension
    transposed: torch.Tensor  # (..., K, N), contiguous in the last dimension
    scale: torch.Tensor  # (max(N, K), 1) fp32, all equal, or more of them

    def rows(self, transposed: bool, one_scale: bool = False) -> Cast:
        """Return the weight, or its transpose, as a factor of a product, with a scale a row or one scale."""
        values = self.transposed if transposed else self.values
        return Cast(values, self.scale[:1 if one_scale else values.shape[-2]])


def cast_weight(weight: torch.Tensor) -> WeightCast:
    """Cast a weight (N, K), or a batch (R, N, K), with one scale."""
    values, scale = cast(weight, E4M3, per_tensor=True)
    scale = scale.reshape(1, 1).expand(max(weight.shape[-2:]), 1).contiguous()
    return WeightCast(values, _transposed_weight(values), scale)


# An opaque operator: where one kernel writes a cast in two layouts, ptxas 12.8 can take a wrong register.
@torch.library.custom_op("nanosync::fp8_transposed", mutates_args=())
def _transposed_weight(values: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of values.mT."""
    return values.mT.clone(memory_format=torch.contiguous_format)


@_transposed_weight.register_fake
def _(values):
    return values.new_empty(values.mT.shape)


def product(a: Cast, b: Cast, bias: torch.Tensor | None, dtype: torch.dtype, emulated: bool, fast: bool,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b.T + bias, (M, N), in `dtype`.

    a: (M, K); b: (N, K); bias: (N,) or None. Both have a scale a row, or both have one scale.
    emulated: compute the product of the cast numbers in fp32, on any device; slow.
    fast: leave the sums in Hopper's matrix units, where they have about 14 bits. If False, they go to fp32
    after a few terms, which takes up to 26% longer. Fast sums lose terms that are far smaller than one other
    term, always to the same side: in the head's gradient of x all tokens but the target.
    out: tensor for the result.
    """
    bias = None if bias is None else bias.to(dtype)
    if emulated:
        with torch.autocast(a.values.device.type, enabled=False):
            y = (a.values.float() @ b.values.float().t()) * a.scale * b.scale.t()
        y = (y if bias is None else y + bias.float()).to(dtype)
        return y if out is None else out.copy_(y)
    options = dict(scale_a=a.scale, scale_b=b.scale.t(), out_dtype=dtype, bias=bias, use_fast_accum=fast)
    if out is None:
        return torch._scaled_mm(a.values, b.values.t(), **options)
    return torch._scaled_mm(a.values, b.values.t(), **options, out=out)


def forward_product(x: Cast, weight: WeightCast, bias: torch.Tensor | None, dtype: torch.dtype,
                    emulated: bool) -> torch.Tensor:
    """Return x @ weight.T + bias; x is a matrix, or a batch without bias."""
    if x.values.dim() == 3:
        return _batched_product(*x, *weight.rows(False), dtype, emulated)
    return product(x, weight.rows(False), bias, dtype, emulated, fast=True)


def input_gradient(grad: Cast, weight: WeightCast, dtype: torch.dtype, emulated: bool) -> torch.Tensor:
    """Return grad @ weight; grad is a matrix or a batch."""
    if grad.values.dim() == 3:
        return _batched_product(*grad, *weight.rows(True), dtype, emulated)
    return product(grad, weight.rows(True), None, dtype, emulated, fast=True)


# An opaque operator: a compiler would copy the products to join them.
@torch.library.custom_op("nanosync::fp8_batched_product", mutates_args=())
def _batched_product(a_values: torch.Tensor, a_scale: torch.Tensor, b_values: torch.Tensor,
                     b_scale: torch.Tensor, dtype: torch.dtype, emulated: bool) -> torch.Tensor:
    """Return a[r] @ b[r].T, (R, M, N), for a (R, M, K) and b (R, N, K). b_scale: of a b[r], (N, 1)."""
    y = _empty_products(a_values, a_scale, b_values, b_scale, dtype, emulated)
    for r, (out, scale) in enumerate(zip(y, a_scale)):
        if scale.data_ptr() % 16:  # cuBLAS refuses the address
            scale = scale.clone()
        product(Cast(a_values[r], scale), Cast(b_values[r], b_scale), None, dtype, emulated, fast=True,
                out=out)
    return y


def _empty_products(a_values, a_scale, b_values, b_scale, dtype, emulated):
    return a_values.new_empty(*a_values.shape[:2], b_values.shape[1], dtype=dtype)


_batched_product.register_fake(_empty_products)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, emulated: bool = False,
           casts: WeightCast | None = None, weight_gradient: bool = False) -> torch.Tensor:
    """Return x @ weight.T + bias, (..., N), in x's dtype, computed in FP8. Differentiable once.

    x: (..., K), cast to autocast's dtype under autocast. Without `emulated` it must then be bfloat16.
    weight: (N, K), N and K multiples of MULTIPLE. bias: (N,) or None. emulated: see `product`.
    casts: of the weight; None makes them here, and again in the backward pass.
    weight_gradient: compute it in FP8 as well, see kernels.fp8_transpose.
    """
    return split_linear(x, weight, bias, 1, emulated, casts, weight_gradient)[0]


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int,
                 emulated: bool = False, casts: WeightCast | None = None, weight_gradient: bool = False
                 ) -> tuple[torch.Tensor, ...]:
    """Return the columns of `linear` in equal parts, (..., N / parts) each, views of one tensor.

    The backward pass joins the gradients of the parts in FP8 alone. The gradient of the weight is a product
    for each part, with weight_gradient one for all.
    """
    assert weight.shape[0] % parts == 0, f"{weight.shape[0]} columns in {parts} equal parts"
    x = _in_autocast_dtype(x)
    split = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, *(casts or (None, None, None)), emulated,
                          parts, weight_gradient)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in split)


def batched_linear(x: torch.Tensor, weight: torch.Tensor, emulated: bool = False,
                   casts: WeightCast | None = None) -> torch.Tensor:
    """Return x[r] @ weight[r].T for each r, (R, M, N): `linear` for a batch (R, M, K) and (R, N, K)."""
    return _Linear.apply(_in_autocast_dtype(x), weight, None, *(casts or (None, None, None)), emulated, 1,
                         False)[0]


def _in_autocast_dtype(x):
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class _Linear(torch.autograd.Function):
    """`split_linear` for a matrix x, or `batched_linear` with one part. Of x and its cast it keeps what the
    weight's gradient needs."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, transposed, scale, emulated, parts, weight_gradient):
        casts = cast_weight(weight) if values is None else WeightCast(values, transposed, scale)
        cast_x, ctx.emulated, ctx.in_fp8 = cast(x, E4M3), emulated, weight_gradient and fits_tokens(len(x))
        ctx.dtype, ctx.wide_x = x.dtype, ctx.in_fp8 and weight.shape[1] > weight.shape[0]
        ctx.save_for_backward(None if ctx.wide_x else x, weight, bias, transposed, scale,
                              cast_x.scale if ctx.in_fp8 else None, cast_x.values if ctx.wide_x else None)
        y = forward_product(cast_x, casts, bias, x.dtype, emulated)
        return (y,) if parts == 1 else y.chunk(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, bias, transposed, scale, x_scale, x_values = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        cast_grad = join_cast(grads) if of_x or (of_weight and ctx.in_fp8) else None
        if of_x:
            casts = cast_weight(weight) if scale is None else WeightCast(None, transposed, scale)
            grad_x = input_gradient(cast_grad, casts, ctx.dtype, ctx.emulated)
        if of_weight and ctx.in_fp8:
            if ctx.wide_x:
                b, a = transposed_factors(Cast(x_values, x_scale), _join(grads, -1), cast_grad.scale, E5M2)
            else:
                a, b = transposed_factors(cast_grad, x, x_scale, E4M3)
            grad_weight = product(a, b, None, ctx.dtype, ctx.emulated, fast=False).to(weight.dtype)
        elif of_weight:
            grad_weight = _join([grad.mT @ x for grad in grads], -2).to(weight.dtype)
        if of_bias:
            grad_bias = _join([grad.sum(0, dtype=torch.float32) for grad in grads], 0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, *[None] * 6


def fits_tokens(tokens: int) -> bool:
    """Return True if a product in FP8 can sum over so many tokens."""
    return tokens > 0 and tokens % MULTIPLE == 0


def _join(parts, dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class WeightCasts:
    """The casts of a list of weights, which `update` makes anew. Their memory stays the same."""

    TILE = 64  # rows and columns of a weight that a program casts
    dtype = E4M3  # of the casts; tests of the kernel's addresses take another, see update

    def __init__(self, weights: list[torch.Tensor]):
        """Allocate memory for the casts. weights: fp32 matrices with contiguous rows, on one device."""
        self.weights = weights
        sizes = [(w.numel(), *w.shape) for w in weights]
        device, lengths = weights[0].device, [-(-max(w.shape) // 32) * 32 for w in weights]
        self._values = torch.empty(sum(n for n, _, _ in sizes), dtype=self.dtype, device=device)
        self._transposed = torch.empty_like(self._values)
        self._scales = torch.empty(sum(lengths), device=device)  # each weight's at a multiple of 128 bytes
        self._largest = torch.empty(len(weights), dtype=torch.int32, device=device)
        self.casts, first, first_scale, self._places = [], 0, 0, []
        for (n, N, K), length in zip(sizes, lengths):
            self._places.append((first, first_scale, N, K))
            values, transposed = (t[first:first + n] for t in (self._values, self._transposed))
            scale = self._scales[first_scale:first_scale + max(N, K), None]
            self.casts.append(WeightCast(values.view(N, K), transposed.view(K, N), scale))
            first, first_scale = first + n, first_scale + length
        self._addresses, self._tables = None, None
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Cast the weights as they are now."""
        rounds = not (INTERPRETED and self.dtype == E4M3)  # Triton's interpreter rounds 127.9 to 64
        if not (usable(self.weights[0]) and rounds):
            for weight, casts in zip(self.weights, self.casts):
                for place, new in zip(casts, cast_weight(weight)):
                    place.copy_(new)
            return
        addresses = [w.data_ptr() for w in self.weights]
        if addresses != self._addresses:
            self._addresses, self._tables = addresses, self._make_tables(addresses)
        matrices, tiles = self._tables
        self._largest.zero_()
        with torch.cuda.device_of(matrices):  # Triton launches on the current device
            for write in (False, True):
                _cast_weights_kernel[(len(tiles),)](
                    matrices, tiles, self._largest, self._values, self._transposed, self._scales, WRITE=write,
                    LARGEST=LARGEST[E4M3], TINY=TINY, TILE=self.TILE, num_warps=4)

    def _make_tables(self, addresses: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the kernel's tables of weights and of tiles."""
        device, tiles = self.weights[0].device, []
        for i, (w, (_, _, N, K)) in enumerate(zip(self.weights, self._places)):
            assert w.dtype == torch.float32 and w.is_contiguous(), f"a weight is {w.dtype}, {w.stride()}"
            assert N % MULTIPLE == K % MULTIPLE == w.data_ptr() % 16 == 0, "the kernel moves 16 bytes"
            rows, columns = torch.arange(0, N, self.TILE), torch.arange(0, K, self.TILE)
            tiles.append(torch.cartesian_prod(torch.tensor([i]), rows, columns))
        matrices = torch.tensor([(address, *place) for address, place in zip(addresses, self._places)])
        return matrices.to(device), torch.cat(tiles).to(device, torch.int32)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _cast_weights_kernel(
        matrices_ptr,  # (weights, 5) int64: address, first entry of its casts, of its scales, N, K
        tiles_ptr,  # (programs, 3) int32: weight, first row, first column
        largest_ptr,  # (weights,): largest entry, zero at first, as the bits of an fp32 number
        values_ptr, transposed_ptr,  # casts of all weights, e4m3
        scales_ptr,  # fp32
        WRITE: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, TILE: tl.constexpr,
    ):
        """Process one tile per program: find the largest entry of its weight or, with WRITE, cast."""
        tile = tiles_ptr + tl.program_id(0) * 3
        weight = tl.load(tile)
        matrix = matrices_ptr + weight * 5
        weight_ptr = tl.multiple_of(tl.load(matrix).to(tl.pointer_type(tl.float32)), 16)
        N, K = tl.multiple_of(tl.load(matrix + 3), 16), tl.multiple_of(tl.load(matrix + 4), 16)
        n = (tl.multiple_of(tl.load(tile + 1), 16) + tl.arange(0, TILE)).to(tl.int64)
        k = (tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, TILE)).to(tl.int64)
        inside = (n[:, None] < N) & (k[None, :] < K)
        w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=inside, other=0.0)
        if WRITE:
            largest = tl.load(largest_ptr + weight).to(tl.float32, bitcast=True)
            largest = tl.maximum(largest, TINY, propagate_nan=tl.PropagateNan.ALL)
            factor = tl.div_rn(LARGEST, largest)
            # The transpose is loaded again: ptxas 12.8 takes a wrong register where one pair of casts is
            # stored in words here and in bytes there.
            w_t = tl.load(weight_ptr + n[None, :] * K + k[:, None], mask=tl.trans(inside), other=0.0)
            values = (w * factor).to(values_ptr.dtype.element_ty)
            transposed = (w_t * factor).to(values_ptr.dtype.element_ty)
            first = tl.multiple_of(tl.load(matrix + 1), 16)
            tl.store(values_ptr + first + n[:, None] * K + k[None, :], values, mask=inside)
            tl.store(transposed_ptr + first + k[:, None] * N + n[None, :], transposed, mask=tl.trans(inside))
            scales_ptr += tl.load(matrix + 2)  # programs store the same number
            scale = tl.zeros((TILE,), tl.float32) + tl.div_rn(largest, LARGEST)
            tl.store(scales_ptr + n, scale, mask=n < N)
            tl.store(scales_ptr + k, scale, mask=k < K)
        else:  # numbers that are not negative have the order of their bits; a NaN is the largest
            bits = tl.abs(w).to(tl.int32, bitcast=True)
            tl.atomic_max(largest_ptr + weight, tl.max(tl.max(bits, axis=1), axis=0))
