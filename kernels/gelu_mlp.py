"""GELU and the MLP around it, with GELU fused into the matrix products on Hopper.

    h = x @ w_in.T + b_in,   y = gelu(h),   out = y @ w_out.T + b_out

GELU is GPT-2's tanh form (arXiv 1606.08415) in the equal form h * sigmoid(2u) with
u = sqrt(2/pi) (h + 0.044715 h^3). A separate GELU reads and writes one tensor of the size of y in the forward
pass. In the backward pass it reads two tensors and writes one. Here both products apply it while their sums
are in registers. The first product writes y. The product that makes the gradient of h multiplies by gelu'(h)
and adds up the gradient of b_in. PyTorch computes the other products. If no kernel can run, and in fp32 and
fp64, PyTorch computes everything.

The backward pass needs gelu'(h), which y does not determine. `keep` names what the forward pass writes:

    "preactivation"  h in x's dtype
    "derivative"     gelu'(h) in x's dtype: as many bytes, and nothing to compute in the backward pass
    "derivative8"    gelu'(h) in 8 bits, half the bytes. The values are multiples of 1/200, and 0 and 1 are
                     exact. The error of at most 0.0025 is that of bfloat16 near 1 (0.0020 below 1, 0.0039
                     above). For H that is no multiple of 16 it is the same as "derivative"
    "nothing"        nothing: the backward pass computes h again, with a product

One persistent kernel serves both passes, as in relu_squared.py.

Shapes: N = tokens, C = channels, H = hidden units.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, triton
from kernels.relu_squared import descriptor, fusible

KEEP = ("preactivation", "derivative", "derivative8", "nothing")
CODES = 200  # a derivative in 8 bits is round(CODES * derivative) + SHIFT; gelu' is in [-0.129, 1.129]
SHIFT = 27

SIGMOIDS = {"plain": 0, "exponential": 1, "tanh": 2}
SIGMOID = "exponential"  # "tanh": by the GPU's approximate tanh, half the work, with an error of up to 2^-12

# tile of the output, length of a piece of the sum, pieces in flight, warps: see relu_squared.CONFIGS;
# PARTS: 2 or 4, in which a tile ends; programs: of a multiprocessor, 1 by default. The fastest of four on
# H200, see records/fp8-training: small tiles, of which one ends while the other multiplies
CONFIGS = {  # (direction, number in KEEP)
    (direction, i): dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, PARTS=4, num_stages=3, num_warps=4, programs=2)
    for direction in ("forward", "backward") for i in range(len(KEEP))
}


def gelu(x):
    """Return GELU in GPT-2's tanh form. Compiled code uses the equal x * sigmoid(2u), as tanh is slow."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


def gelu_mlp(x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, w_out: torch.Tensor,
             b_out: torch.Tensor | None, keep: str = "preactivation") -> torch.Tensor:
    """Return gelu(x @ w_in.T + b_in) @ w_out.T + b_out, (..., C), in x's dtype.

    Differentiable once in all arguments if a kernel runs. Raises ValueError for an unknown `keep`.

    x: (..., C), cast to autocast's dtype under autocast.
    w_in, w_out: (H, C) and (C, H), cast to x's dtype.
    b_in, b_out: (H,) and (C,), or None, cast to x's dtype. Their gradients are summed in fp32.
    keep: what the forward pass writes for the backward pass, one of KEEP.
    """
    if keep not in KEEP:
        raise ValueError(f"keep={keep!r} is unknown. Use one of {', '.join(KEEP)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    w_in, b_in, w_out, b_out = (None if z is None else z.to(x.dtype) for z in (w_in, b_in, w_out, b_out))
    if keep == "derivative8" and w_in.shape[0] % 16:  # rows of 8 bits that TMA cannot address
        keep = "derivative"
    if fusible(x, w_in):
        rows = x.reshape(-1, x.shape[-1])
        return GeluMLP.apply(rows, w_in, b_in, w_out, b_out, KEEP.index(keep)).view(x.shape)
    return F.linear(gelu(F.linear(x, w_in, b_in)), w_out, b_out)


class GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, keep):
        y, kept = _linear_gelu(x, w_in, b_in, keep)
        ctx.save_for_backward(x, w_in, b_in, w_out, y, kept)
        ctx.keep, ctx.has_b_out = keep, b_out is not None
        return F.linear(y, w_out, b_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, b_in, w_out, y, kept = ctx.saved_tensors
        of_x, of_w_in, of_b_in, of_w_out, of_b_out, _ = ctx.needs_input_grad
        keep, grad_h, grad_b_in = ctx.keep, None, None
        if of_x or of_w_in or of_b_in:
            if KEEP[keep] == "nothing":
                keep, kept = 0, F.linear(x, w_in, b_in)
            grad_h, sums = _linear_gelu_backward(grad, w_out, kept, keep, b_in is not None)
            grad_b_in = sums.sum(0).to(x.dtype) if of_b_in else None
        return (grad_h @ w_in if of_x else None, grad_h.T @ x if of_w_in else None, grad_b_in,
                grad.T @ y if of_w_out else None,
                grad.sum(0, dtype=torch.float32).to(grad.dtype) if of_b_out else None, None)


# opaque operators, because a tensor descriptor needs an address, which a trace of torch.compile lacks
@torch.library.custom_op("nanosync::linear_gelu", mutates_args=())
def _linear_gelu(x: torch.Tensor, w_in: torch.Tensor, b_in: torch.Tensor | None, keep: int
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = gelu(x @ w_in.T + b_in), (N, H), and what KEEP[keep] names, (N, H), empty for "nothing"."""
    y, kept = _empty_results(x, w_in, keep)
    _launch("forward", x, w_in, b_in, kept, y, keep)
    return y, kept


@torch.library.custom_op("nanosync::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(grad: torch.Tensor, w_out: torch.Tensor, kept: torch.Tensor, keep: int,
                          has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of h, (N, H): (grad @ w_out) gelu'(h), and its sums over rows.

    The sums are (P, H) in fp32, of the rows of one tile each; P = 0 without a bias.

    grad: gradient of out, (N, C). w_out: (C, H). kept: (N, H), see _linear_gelu.
    """
    grad_h, sums = _empty_gradients(grad, w_out, keep, has_bias)
    _launch("backward", grad, w_out, sums if has_bias else None, kept, grad_h, keep)
    return grad_h, sums


def _empty_results(x: torch.Tensor, w_in: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty(x.shape[0], w_in.shape[0])
    dtype = torch.uint8 if KEEP[keep] == "derivative8" else x.dtype
    return y, x.new_empty((0,) if KEEP[keep] == "nothing" else y.shape, dtype=dtype)


def _empty_gradients(grad: torch.Tensor, w_out: torch.Tensor, keep: int, has_bias: bool
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    N, H = grad.shape[0], w_out.shape[1]
    tiles = -(-N // CONFIGS["backward", keep]["BLOCK_M"])
    return grad.new_empty(N, H), grad.new_empty(tiles if has_bias else 0, H, dtype=torch.float32)


_linear_gelu.register_fake(lambda x, w_in, b_in, keep: _empty_results(x, w_in, keep))
_linear_gelu_backward.register_fake(lambda grad, w_out, kept, keep, has_bias: _empty_gradients(
    grad, w_out, keep, has_bias))


if triton is not None:
    import triton.language as tl

    from kernels.relu_squared import tile_product

    @triton.jit
    def _kernel(
        a_desc,  # (N, C): x; if BACKWARD, gradient of out
        b_desc,  # (H, C): w_in; if BACKWARD, (C, H): w_out
        bias_ptr,  # (H,): b_in; if BACKWARD, (P, H) fp32 for the sums of a tile's rows; only if BIAS
        kept_desc,  # (N, H); written unless BACKWARD
        out_desc,  # (N, H): y; if BACKWARD, gradient of h
        N, H: tl.constexpr, C: tl.constexpr, PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr,
        KEEP: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr, CODES: tl.constexpr,
        SHIFT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    ):
        across: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
        tiles = (N + BLOCK_M - 1) // BLOCK_M * across
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
            sums = tile_product(a_desc, b_desc, row, column, C, BACKWARD, BLOCK_M, BLOCK_N, BLOCK_K)
            # a part of a tile at a time, as shared memory also has the operands in flight
            left, right = _halves(sums)
            for half in tl.static_range(2):
                part = left if half == 0 else right
                if PARTS == 4:
                    first, second = _halves(part)
                    for quarter in tl.static_range(2):
                        _end(first if quarter == 0 else second, bias_ptr, kept_desc, out_desc, row,
                             column + (2 * half + quarter) * (BLOCK_N // 4), H, BACKWARD, KEEP, BIAS, SIGMOID,
                             CODES, SHIFT)
                else:
                    _end(part, bias_ptr, kept_desc, out_desc, row, column + half * (BLOCK_N // 2), H,
                         BACKWARD, KEEP, BIAS, SIGMOID, CODES, SHIFT)

    @triton.jit
    def _halves(z):
        return z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()

    @triton.jit
    def _end(sums, bias_ptr, kept_desc, out_desc, row, column, H: tl.constexpr, BACKWARD: tl.constexpr,
             KEEP: tl.constexpr, BIAS: tl.constexpr, SIGMOID: tl.constexpr, CODES: tl.constexpr,
             SHIFT: tl.constexpr):
        c = column + tl.arange(0, sums.shape[1])
        if BACKWARD:
            kept = kept_desc.load([row, column])
            if KEEP == 0:
                kept = kept.to(tl.float32)
                square = kept * kept
                s = _sigmoid(kept, square, SIGMOID)
                sums *= _derivative(square, s, kept * s)
            elif KEEP == 1:
                sums *= kept.to(tl.float32)
            else:  # code + 2^23, of which the code is the last 8 bits
                code = (kept.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
                sums *= (code - (8388608 + SHIFT)) * (1 / CODES)
            out_desc.store([row, column], sums.to(out_desc.dtype))
            if BIAS:  # rows beyond N are 0
                tile = row // sums.shape[0]
                tl.store(bias_ptr + tile * H + c, tl.sum(sums, axis=0), mask=c < H)
        else:
            h = sums
            if BIAS:
                h += tl.load(bias_ptr + c, mask=c < H, other=0.0).to(tl.float32)[None, :]
            square = h * h
            s = _sigmoid(h, square, SIGMOID)
            y = h * s
            if KEEP == 0:
                kept_desc.store([row, column], h.to(kept_desc.dtype))
            elif KEEP == 1:
                kept_desc.store([row, column], _derivative(square, s, y).to(kept_desc.dtype))
            elif KEEP == 2:  # the sum is rounded to a multiple of 1
                code = _derivative(square, s, y) * CODES + (8388608 + SHIFT)
                kept_desc.store([row, column], code.to(tl.uint32, bitcast=True).to(tl.uint8))
            out_desc.store([row, column], y.to(out_desc.dtype))

    @triton.jit
    def _sigmoid(h, square, SIGMOID: tl.constexpr):
        """Return sigmoid(2u), u = sqrt(2/pi) (h + 0.044715 h^3)."""
        if SIGMOID == 2:  # (1 + tanh(u)) / 2
            u = h * (0.7978845608028654 + 0.0356774081363001 * square)
            return 0.5 + 0.5 * tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], tl.float32,
                                                         is_pure=True, pack=1)
        u = h * (-2.302208198144325 - 0.1029432395800235 * square)  # exp(-2u) = 2^u
        if SIGMOID == 1:  # errors of 2^-22; Triton's exp2 and / care for numbers below 2^-126 as well
            return tl.inline_asm_elementwise(
                "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; "
                "rcp.approx.ftz.f32 $0, e; }",
                "=f,f", [u], tl.float32, is_pure=True, pack=1)
        return 1 / (1 + tl.exp2(u))

    @triton.jit
    def _derivative(square, s, y):
        """Return gelu'(h) = s + h s (1 - s) 2u'."""
        return s + (y - y * s) * (1.5957691216057308 + 0.2140644488178008 * square)


def _launch(direction: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor,
            out: torch.Tensor, keep: int) -> None:
    """Run the kernel. bias: b_in; backward: the tensor for its gradient's sums, or None."""
    (N, C), H, backward = a.shape, out.shape[1], direction == "backward"
    if N == 0:
        return
    config = dict(CONFIGS[direction, keep])
    M, W, K, columns = *(config[f"BLOCK_{name}"] for name in "MNK"), config["BLOCK_N"] // config["PARTS"]
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
    programs *= config.pop("programs", 1)
    tiles = triton.cdiv(N, M) * triton.cdiv(H, W)
    kept = out if KEEP[keep] == "nothing" else kept  # any tensor, which is not used
    with torch.cuda.device_of(a):  # Triton launches on the current device
        _kernel[min(tiles, programs),](
            descriptor(a, M, K), descriptor(b, K, W) if backward else descriptor(b, W, K),
            a if bias is None else bias.contiguous(), descriptor(kept, M, columns),
            descriptor(out, M, columns), N, H, C, programs, backward, keep, bias is not None,
            0 if INTERPRETED else SIGMOIDS[SIGMOID], CODES, SHIFT, **config)
