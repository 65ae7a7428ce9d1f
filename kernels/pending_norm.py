"""LayerNorm of simulated TP ranks' streams with pending sums: R rows, each base + pending sum of a rank.

    pending[r] += out[r]                 output of the last sublayer on rank r
    normed[r]   = LayerNorm(base + pending[r])
    total       = sum of pending[r]      if the ranks synchronise next

The simulation of R ranks costs memory traffic rather than arithmetic. In plain PyTorch these lines and their
gradients read and write tensors of R times the residual stream many times. Here one kernel forward and one
backward read and write each tensor once (see records/ for the gain).

Shapes: R = ranks, N = rows, C = channels.
"""

import torch
import torch.nn.functional as F

from kernels import triton, usable


def pending_layer_norm(base, pending, out, weight, bias, last: bool):
    """Return (LayerNorm of base + pending + out (R, N, C), carried sums).

    The carried sums are pending + out, (R, N, C). If `last`, they are summed over ranks, (N, C). The
    LayerNorm is in autocast's dtype under autocast, else in base's dtype. Differentiable in all tensors.

    base: (N, C). pending: (R, N, C), None for zeros. out: (R, N, C). weight: (C,). bias: (C,) or None.
    last: True if the ranks synchronise after the sublayer that reads the LayerNorm.
    """
    if usable(base):
        normed, new, total, _, _ = _forward(base, pending, out, weight, bias, last)
        return normed, total if last else new
    new = out if pending is None else pending + out
    return F.layer_norm(base + new, weight.shape, weight, bias, 1e-5), new.sum(dim=0) if last else new


@torch.library.custom_op("nanosync::pending_layer_norm", mutates_args=())
def _forward(base: torch.Tensor, pending: torch.Tensor | None, out: torch.Tensor, weight: torch.Tensor,
             bias: torch.Tensor | None, last: bool
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normed, pending + out, their sum over ranks, mean and reciprocal deviation (R, N) fp32.

    pending + out is empty if `last` and pending is None. The sum is empty unless `last`.
    """
    R, N, C = out.shape
    base, out = base.contiguous(), out.contiguous()
    pending = pending if pending is None else pending.contiguous()
    normed, new, total, mean, rstd = _shapes(base, pending, out, weight, bias, last)
    _forward_kernel[(N,)](
        base, pending, out, weight, bias, normed, new, total, mean, rstd, N, C, R=R,
        PENDING=pending is not None, NEW=new.numel() > 0, LAST=last, BIAS=bias is not None,
        BLOCK=triton.next_power_of_2(C), num_warps=_warps(C))
    return normed, new, total, mean, rstd


@_forward.register_fake
def _shapes(base, pending, out, weight, bias, last):
    R, N, C = out.shape
    new = out.new_empty(0) if last and pending is None else out.new_empty(R, N, C)
    total = out.new_empty(N, C) if last else out.new_empty(0)
    mean, rstd = (out.new_empty(R, N, dtype=torch.float32) for _ in range(2))
    return out.new_empty(R, N, C), new, total, mean, rstd


@torch.library.custom_op("nanosync::pending_layer_norm_backward", mutates_args=())
def _backward(grad_normed: torch.Tensor, grad_carried: torch.Tensor, base: torch.Tensor, new: torch.Tensor,
              weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, last: bool, has_bias: bool
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of base (N, C), of out and equally pending (R, N, C), of weight and bias (C,)."""
    R, N, C = new.shape
    programs = min(N, 8 * _multiprocessors(new.device))
    grad_base, grad_new = torch.empty_like(base), torch.empty_like(new)
    partial = new.new_empty(2 if has_bias else 1, programs, C, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad_normed.contiguous(), grad_carried.contiguous(), base.contiguous(), new.contiguous(), weight,
        mean, rstd, grad_base, grad_new, partial, N, C, R=R, LAST=last, BIAS=has_bias,
        BLOCK=triton.next_power_of_2(C), num_warps=_warps(C))
    partial = partial.sum(dim=1).to(weight.dtype)
    return grad_base, grad_new, partial[0].clone(), partial[1].clone() if has_bias else partial.new_empty(0)


@_backward.register_fake
def _(grad_normed, grad_carried, base, new, weight, mean, rstd, last, has_bias):
    grad_bias = torch.empty_like(weight) if has_bias else weight.new_empty(0)
    return torch.empty_like(base), torch.empty_like(new), torch.empty_like(weight), grad_bias


def _keep(ctx, inputs, output):
    base, pending, out, weight, bias, last = inputs
    _, new, _, mean, rstd = output
    ctx.save_for_backward(base, out if last and pending is None else new, weight, mean, rstd)
    ctx.last, ctx.has_bias, ctx.has_pending = last, bias is not None, pending is not None


def _differentiate(ctx, grad_normed, grad_new, grad_total, _grad_mean, _grad_rstd):
    base, new, weight, mean, rstd = ctx.saved_tensors
    grad_base, grad_new, grad_weight, grad_bias = _backward(
        grad_normed, grad_total if ctx.last else grad_new, base, new, weight, mean, rstd, ctx.last,
        ctx.has_bias)
    return (grad_base, grad_new if ctx.has_pending else None, grad_new, grad_weight,
            grad_bias if ctx.has_bias else None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _warps(C: int) -> int:
    """Return the warps of a program: 1 if a row fits its registers, so that sums wait for no other warp."""
    return 1 if C <= 1024 else 2 if C <= 2048 else 4 if C <= 4096 else 8


def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        base_ptr,  # (N, C)
        pending_ptr, out_ptr,  # (R, N, C)
        weight_ptr, bias_ptr,  # (C,)
        normed_ptr, new_ptr,  # (R, N, C)
        total_ptr,  # (N, C)
        mean_ptr, rstd_ptr,  # (R, N) fp32
        N, C, R: tl.constexpr, PENDING: tl.constexpr, NEW: tl.constexpr, LAST: tl.constexpr,
        BIAS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Process one row of all ranks per program. Statistics and sums are in fp32."""
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        mask = c < C
        base = tl.load(base_ptr + row * C + c, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for r in tl.static_range(R):
            offsets = (r * N + row) * C + c
            d = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if PENDING:
                d += tl.load(pending_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                d = d.to(out_ptr.dtype.element_ty).to(tl.float32)  # rounded, as the backward pass reads it
            if NEW:
                tl.store(new_ptr + offsets, d.to(new_ptr.dtype.element_ty), mask=mask)
            total += d
            x = base + d
            mean = tl.sum(x, axis=0) / C
            centred = tl.where(mask, x - mean, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + 1e-5)
            y = centred * rstd * weight
            if BIAS:
                y += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(normed_ptr + offsets, y.to(normed_ptr.dtype.element_ty), mask=mask)
            tl.store(mean_ptr + r * N + row, mean)
            tl.store(rstd_ptr + r * N + row, rstd)
        if LAST:
            tl.store(total_ptr + row * C + c, total.to(total_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        grad_normed_ptr,  # (R, N, C)
        grad_carried_ptr,  # (N, C) if LAST, else (R, N, C)
        base_ptr,  # (N, C)
        new_ptr,  # (R, N, C)
        weight_ptr,  # (C,)
        mean_ptr, rstd_ptr,  # (R, N) fp32
        grad_base_ptr,  # (N, C)
        grad_new_ptr,  # (R, N, C)
        partial_ptr,  # (2 if BIAS else 1, programs, C) fp32: each program's part of the (C,) gradients
        N, C, R: tl.constexpr, LAST: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Process every `programs`-th row of all ranks per program; sums over rows stay in registers."""
        program, programs = tl.program_id(0), tl.num_programs(0)
        c = tl.arange(0, BLOCK)
        mask = c < C
        weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK,), tl.float32)
        grad_bias = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, N, programs):
            row = (start + program).to(tl.int64)
            there = mask & (row < N)
            base = tl.load(base_ptr + row * C + c, mask=there, other=0.0).to(tl.float32)
            grad_base = tl.zeros((BLOCK,), tl.float32)
            if LAST:
                grad_carried = tl.load(grad_carried_ptr + row * C + c, mask=there, other=0.0).to(tl.float32)
            for r in tl.static_range(R):
                offsets = (r * N + row) * C + c
                d = tl.load(new_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                grad = tl.load(grad_normed_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                if not LAST:
                    grad_carried = tl.load(grad_carried_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                rstd = tl.load(rstd_ptr + r * N + row, mask=row < N, other=0.0)
                mean = tl.load(mean_ptr + r * N + row, mask=row < N, other=0.0)
                x_hat = tl.where(there, (base + d - mean) * rstd, 0.0)
                grad_weight += grad * x_hat
                if BIAS:
                    grad_bias += grad
                grad *= weight
                grad_x = (grad - tl.sum(grad, axis=0) / C - x_hat * (tl.sum(grad * x_hat, axis=0) / C)) * rstd
                grad_base += grad_x
                tl.store(grad_new_ptr + offsets, (grad_x + grad_carried).to(grad_new_ptr.dtype.element_ty),
                         mask=there)
            tl.store(grad_base_ptr + row * C + c, grad_base.to(grad_base_ptr.dtype.element_ty), mask=there)
        tl.store(partial_ptr + program * C + c, grad_weight, mask=mask)
        if BIAS:
            tl.store(partial_ptr + (programs + program) * C + c, grad_bias, mask=mask)
