"""QK-norm and rotary embedding between a fused q, k, v projection and attention: one kernel each way.

    x_hat = x / sqrt(mean(x^2) + eps)               for each head of q and k (RMSNorm without a weight)
    y[i], y[i + D / 2] = x_hat[i] cos + x_hat[i + D / 2] sin, x_hat[i + D / 2] cos - x_hat[i] sin

v is copied. So the backward pass can write the gradients of q, k and v into one tensor, as the projection
needs it, in one pass. The time of both passes is the bytes that they move. A head stays in registers between
its one read and its one write, and statistics are fp32. The backward pass needs no input of the forward pass.
A rotation preserves scalar products, so with the gradient g of y

    gradient of x = rotate_back(g - y mean(g y)) / sqrt(mean(x^2) + eps)

and attention keeps y anyway. (RMSNorm: arXiv 1910.07467; rotary embedding: arXiv 2104.09864, with pairs half
a head apart.) If no kernel can run, PyTorch's code runs.

Shapes: B = sequences, T = tokens of a sequence, H = heads, D = channels of a head, N = B T H = rows of each
of q, k and v.
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton

EPS = 1e-6  # PyTorch's default for bfloat16, 0.008, is large beside the embedding of a new model
ROWS = 16  # rows of a program; gives 16 values per thread


def qk_norm_rotary(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise and rotate q and k; return q, k, v, each (B, T, H, D) in qkv's dtype.

    Differentiable once in qkv.

    qkv: (B, T, 3, H, D). cos, sin: (T, D / 2) fp32.
    """
    interpreted_trace = INTERPRETED and torch.compiler.is_compiling()  # the interpreter needs values
    if usable(qkv) and not interpreted_trace:
        return _forward(qkv, cos, sin)[:3]
    q, k, v = qkv.unbind(2)
    return _rotate(rms_norm(q), cos, sin), _rotate(rms_norm(k), cos, sin), v


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Return the RMSNorm over the last dimension, without a weight, in x's dtype even under autocast."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS).to(x.dtype)


def _rotate(x, cos, sin):
    """Rotate x (B, T, H, D) by cos and sin (T, D / 2)."""
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _load(ptr, offsets, HALF: tl.constexpr, mask):
        """Load both halves of heads, (ROWS, BLOCK) each."""
        a = tl.load(ptr + offsets, mask=mask, other=0.0)
        return a, tl.load(ptr + offsets + HALF, mask=mask, other=0.0)

    @triton.jit
    def _store(ptr, offsets, a, b, HALF: tl.constexpr, mask):
        tl.store(ptr + offsets, a.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + offsets + HALF, b.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _forward_kernel(
        qkv_ptr,  # (B, T, 3, H, D)
        cos_ptr, sin_ptr,  # (T, HALF) fp32
        q_ptr, k_ptr, v_ptr,  # (B, T, H, D)
        scale_ptr,  # (2, N) fp32: 1 / sqrt(mean(x^2) + eps) of q and k
        N, T, H, HALF: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):
        """Process ROWS heads of q, k or v per program."""
        which = tl.program_id(1)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token = row // H
        i = tl.arange(0, BLOCK)[None, :]
        mask = (row < N)[:, None] & (i < HALF)
        source = (token.to(tl.int64) * 3 * H + which * H + row % H)[:, None] * (2 * HALF) + i
        target = row.to(tl.int64)[:, None] * (2 * HALF) + i
        a, b = _load(qkv_ptr, source, HALF, mask)
        if which == 2:
            _store(v_ptr, target, a, b, HALF, mask)
        else:
            x, y = a.to(tl.float32), b.to(tl.float32)
            scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + EPS)
            tl.store(scale_ptr + which * N + row, scale, mask=row < N)
            x, y = x * scale[:, None], y * scale[:, None]
            angle = (token % T)[:, None] * HALF + i
            cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
            if which == 0:
                _store(q_ptr, target, x * cos + y * sin, y * cos - x * sin, HALF, mask)
            else:
                _store(k_ptr, target, x * cos + y * sin, y * cos - x * sin, HALF, mask)

    @triton.jit
    def _backward_kernel(
        grad_q_ptr, grad_k_ptr, grad_v_ptr,  # (B, T, H, D)
        q_ptr, k_ptr,  # (B, T, H, D), results of the forward pass
        cos_ptr, sin_ptr,  # (T, HALF) fp32
        scale_ptr,  # (2, N) fp32
        grad_ptr,  # (B, T, 3, H, D)
        N, T, H, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):
        """Process ROWS heads of q, k or v per program."""
        which = tl.program_id(1)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token = row // H
        i = tl.arange(0, BLOCK)[None, :]
        mask = (row < N)[:, None] & (i < HALF)
        target = (token.to(tl.int64) * 3 * H + which * H + row % H)[:, None] * (2 * HALF) + i
        source = row.to(tl.int64)[:, None] * (2 * HALF) + i
        if which == 2:
            grad_a, grad_b = _load(grad_v_ptr, source, HALF, mask)
            _store(grad_ptr, target, grad_a, grad_b, HALF, mask)
        else:
            if which == 0:
                g, h = _load(grad_q_ptr, source, HALF, mask)
                y, z = _load(q_ptr, source, HALF, mask)
            else:
                g, h = _load(grad_k_ptr, source, HALF, mask)
                y, z = _load(k_ptr, source, HALF, mask)
            a, b, y, z = g.to(tl.float32), h.to(tl.float32), y.to(tl.float32), z.to(tl.float32)
            along = ((tl.sum(a * y, axis=1) + tl.sum(b * z, axis=1)) / (2 * HALF))[:, None]
            scale = tl.load(scale_ptr + which * N + row, mask=row < N, other=0.0)[:, None]
            a, b = (a - y * along) * scale, (b - z * along) * scale
            angle = (token % T)[:, None] * HALF + i
            cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
            _store(grad_ptr, target, a * cos - b * sin, a * sin + b * cos, HALF, mask)


def _launch(B: int, T: int, H: int, D: int) -> tuple[tuple, dict]:
    """Return grid and constants of both kernels."""
    N, half = B * T * H, D // 2
    return (triton.cdiv(N, ROWS), 3), dict(N=N, T=T, H=H, HALF=half, BLOCK=triton.next_power_of_2(half),
                                           ROWS=ROWS, num_warps=4)


@triton_op("nanosync::qk_norm_rotary", mutates_args=())
def _forward(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v, and the scale factors of q and k, (2, B, T, H) fp32."""
    B, T, _, H, D = qkv.shape
    q, k, v = (qkv.new_empty(B, T, H, D) for _ in range(3))
    scale = qkv.new_empty(2, B, T, H, dtype=torch.float32)
    grid, constants = _launch(B, T, H, D)
    wrap_triton(_forward_kernel)[grid](qkv.contiguous(), cos.contiguous(), sin.contiguous(), q, k, v, scale,
                                       EPS=EPS, **constants)
    return q, k, v, scale


@triton_op("nanosync::qk_norm_rotary_backward", mutates_args=())
def _backward(grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, q: torch.Tensor,
              k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the gradient of qkv, (B, T, 3, H, D)."""
    B, T, H, D = q.shape
    grad = q.new_empty(B, T, 3, H, D)
    grid, constants = _launch(B, T, H, D)
    wrap_triton(_backward_kernel)[grid](grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), q, k,
                                        cos.contiguous(), sin.contiguous(), scale, grad, **constants)
    return grad


def _keep(ctx, inputs, output):
    _, cos, sin = inputs
    q, k, _, scale = output
    ctx.save_for_backward(q, k, cos, sin, scale)
    ctx.mark_non_differentiable(scale)


def _differentiate(ctx, grad_q, grad_k, grad_v, _grad_scale):
    return _backward(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
