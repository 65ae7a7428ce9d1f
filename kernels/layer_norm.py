"""LayerNorm, alone or fused with the residual addition before it: one kernel forward, two kernels backward.

    s = x + out                          layer_norm(x): s = x
    y = (s - mean(s)) / sqrt(var(s) + 1e-5) * weight + bias

The time of LayerNorm is the bytes that it moves. In units of a value's size they are 2 per value forward and
3 backward. With the addition they are 4 and 4, instead of 5 and 6 for separate kernels. A row stays in
registers between its one read and its one write, and statistics are fp32. In the backward pass a fixed number
of programs iterates over the rows. Each program sums the gradients of weight and bias over its rows in
registers, and a second kernel adds up the programs' sums. No operation is atomic, so the same input gives the
same bits. (Triton's tutorial 05 and Liger-Kernel's LayerNorm, arXiv 2410.10989, also compute the gradients of
weight and bias in two steps.)

The functions are operators of torch.library, so torch.compile keeps the graph whole. As `triton_op`s they
also let it plan their memory together with the rest of the graph. PyTorch looks up the kernels when an
operator is registered, for the keys of its caches, so the kernels are defined first. Without a compiler an
autograd.Function calls the same functions, which costs the host less than the dispatch of an operator.

Shapes: N = rows (product of all dimensions but the last), C = channels, P = programs.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton

EPS = 1e-5
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}  # not DTensor and other subclasses
MAX_WIDTH = 16384  # wider rows do not fit the registers of one program


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the LayerNorm over the last dimension, in x's dtype, or in autocast's dtype under autocast.

    The result is rounded once, and the next matrix product needs autocast's dtype anyway. (PyTorch's
    layer_norm under autocast returns fp32 on CUDA and x's dtype on the CPU.) Differentiable once in all
    arguments. If no kernel can run (see `kernels.usable`), or C > MAX_WIDTH, it calls F.layer_norm.

    x: (..., C). weight: (C,). bias: (C,) or None. fp32, bf16 and fp16 in any combination.
    """
    if not _runs_on(x, weight):
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
    return _normalize(x, None, weight, bias, _result_dtype(x, x.dtype))[0]


def add_layer_norm(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (s, y): the sum s = x + out, the new residual stream, and its LayerNorm y.

    s has the dtype of `x + out`, and y the dtype of layer_norm(s). y is computed from the rounded s.
    Differentiable once in x, out, weight and bias, through both results.

    x, out: (..., C), one shape. weight, bias: see layer_norm.
    """
    if not _runs_on(x, weight):
        s = x + out
        return s, F.layer_norm(s, weight.shape, weight, bias, EPS)
    dtype = _result_dtype(x, torch.promote_types(x.dtype, out.dtype))
    y, s, _ = _normalize(x, out, weight, bias, dtype)
    return s, y


def _runs_on(x, weight) -> bool:
    if INTERPRETED and torch.compiler.is_compiling():  # the interpreter needs values, which a trace lacks
        return False
    return usable(x) and weight.dtype != torch.float64 and weight.shape[0] <= MAX_WIDTH


def _result_dtype(x, dtype: torch.dtype) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _normalize(x, out, weight, bias, dtype):
    """Return the result of `_forward`, without the dispatch of the operator if possible.

    A compiler, a dispatch mode (as in selective activation checkpointing) and a tensor subclass need it.
    """
    if (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
            or not {type(x), type(out), type(weight), type(bias)} <= PLAIN):
        return _forward(x, out, weight, bias, dtype)
    return _Eager.apply(x, out, weight, bias, dtype)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _add_pairs(a, b, c, d):
        return a + c, b + d

    @triton.jit
    def _forward_kernel(
        x_ptr, out_ptr,  # (N, C); out only if ADD
        weight_ptr, bias_ptr,  # (C,); bias only if BIAS
        s_ptr,  # (N, C), only if ADD
        y_ptr,  # (N, C)
        stats_ptr,  # (2, N) fp32: mean, reciprocal deviation
        N, C: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Process ROWS rows per program, without a loop, so that the loads come first."""
        r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        row = tl.program_id(0).to(tl.int64) * ROWS
        column, inside = c < C, row + r < N
        mask, first, offsets = column & inside, row * C, r * C + c
        x = tl.load(x_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(out_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
            s = x.to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + offsets, s, mask=mask)
            x = s.to(tl.float32)  # the rounded value, as the backward pass reads it
        mean = tl.sum(x, axis=1, keep_dims=True) / C
        x = tl.where(column, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + EPS)
        y = x * rstd * tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + c, mask=column, other=0.0).to(tl.float32)
        tl.store(y_ptr + first + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(stats_ptr + row + r, mean, mask=inside)
        tl.store(stats_ptr + N + row + r, rstd, mask=inside)

    @triton.jit
    def _backward_kernel(
        grad_y_ptr,  # (N, C)
        grad_s_ptr,  # (N, C), only if ADD: gradient of s from the residual stream
        s_ptr,  # (N, C)
        weight_ptr,  # (C,)
        stats_ptr,  # (2, N) fp32
        grad_x_ptr,  # (N, C)
        partial_ptr,  # (2 if BIAS else 1, P, C) fp32: each program's part of weight's and bias's gradients
        N, C: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):
        """Process every P-th group of ROWS rows per program.

        The next groups are fetched into shared memory meanwhile. Sums over rows stay in registers.
        """
        program, programs = tl.program_id(0), tl.num_programs(0)
        r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        column, offsets = c < C, r * C + c
        weight = tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((1, BLOCK), tl.float32)
        grad_bias = tl.zeros((1, BLOCK), tl.float32)
        for row in tl.range(program * ROWS, N, programs * ROWS, num_stages=STAGES):
            inside, first = row + r < N, tl.cast(row, tl.int64) * C
            mask = column & inside
            grad = tl.load(grad_y_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(s_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
            if ADD:
                grad_s = tl.load(grad_s_ptr + first + offsets, mask=mask, other=0.0)
            mean = tl.load(stats_ptr + row + r, mask=inside, other=0.0)
            rstd = tl.load(stats_ptr + N + row + r, mask=inside, other=0.0)
            x_hat = (s - mean) * rstd  # invalid outside the row, where grad is zero
            grad_weight += tl.sum(grad * x_hat, axis=0, keep_dims=True)
            if BIAS:
                grad_bias += tl.sum(grad, axis=0, keep_dims=True)
            grad *= weight
            if PAIRED:  # warps that share a row synchronise once for both sums
                along_one, along_x = tl.reduce((grad, grad * x_hat), 1, _add_pairs, keep_dims=True)
            else:
                along_one, along_x = tl.sum(grad, 1, keep_dims=True), tl.sum(grad * x_hat, 1, keep_dims=True)
            grad = (grad - along_one / C - x_hat * (along_x / C)) * rstd
            if ADD:
                grad += grad_s.to(tl.float32)
            tl.store(grad_x_ptr + first + offsets, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(partial_ptr + program * C + c, grad_weight, mask=column)
        if BIAS:
            tl.store(partial_ptr + (programs + program) * C + c, grad_bias, mask=column)

    @triton.jit
    def _column_sums_kernel(
        partial_ptr,  # (2 or 1, P, C) fp32
        grad_weight_ptr, grad_bias_ptr,  # (C,): sums of the first and, on a grid of two rows, the second part
        P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):
        """Sum BLOCK_C columns per program, always in the same order."""
        c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        inside = c < C
        partial_ptr += tl.program_id(1) * P * C
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, P, BLOCK_P):
            p = (start + tl.arange(0, BLOCK_P))[:, None]
            total += tl.load(partial_ptr + p * C + c, mask=inside & (p < P), other=0.0)
        total = tl.sum(total, axis=0, keep_dims=True)
        if tl.program_id(1) == 0:
            tl.store(grad_weight_ptr + c, total.to(grad_weight_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(grad_bias_ptr + c, total.to(grad_bias_ptr.dtype.element_ty), mask=inside)


# fastest on H200 for rows of BLOCK values (records/2026-11-21-kernels-h200)
FORWARD_TILES = {  # (BLOCK, with the addition): (ROWS, warps)
    (1024, False): (2, 2), (2048, False): (1, 2), (4096, False): (2, 8), (8192, False): (1, 8),
    (1024, True): (2, 1), (2048, True): (2, 8), (4096, True): (1, 16), (8192, True): (1, 32)}
UNDER_WAY = 75 << 10  # bytes that a multiprocessor should have in flight in the backward pass


@functools.cache
def _config(C: int, size: int = 2, add: bool = False) -> dict:
    """Return the launch parameters for rows of C values of `size` bytes, with or without the addition.

    ROWS, num_warps     of one program. Forward: by FORWARD_TILES, for other widths 16 values per thread.
                        Backward: 4096 values at a time, 32 per thread for short rows.
    STAGES              depth of the pipeline that fetches the next rows in the backward pass. Two groups
                        ahead, if shared memory suffices (GPUs since Ampere have 99 KB per program).
    BLOCK_P, BLOCK_C    tile of the sums over programs.
    programs            of the backward pass, per multiprocessor. Just enough to keep it fetching, because
                        each program leaves 2 C sums to add up.
    """
    block = triton.next_power_of_2(C)
    tile = max(block, 1024)
    rows, warps = FORWARD_TILES.get((block, add), (tile // block, tile // 512))
    tile = max(block, 4096)
    fetched = tile * size * (3 if add else 2)  # a stage
    stages = min(3, 1 + (96 << 10 if size == 2 else 64 << 10) // fetched)
    under_way = max(1, stages - 1) * fetched * C // block
    return dict(forward=dict(num_warps=warps, ROWS=rows, BLOCK=block),
                backward=dict(num_warps=4 if block <= 2048 else block // 512, STAGES=stages,
                              ROWS=tile // block, BLOCK=block),
                programs=max(1, min(8, round(UNDER_WAY / under_way))),
                sums=dict(num_warps=8, BLOCK_P=256 if block <= 1024 else 128,
                          BLOCK_C=8 if block <= 1024 else 16))


@functools.cache
def _multiprocessors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _run_forward(kernel, x, out, weight, bias, dtype):
    """Return the results of `_forward`. kernel: plain, or wrapped for a compiler."""
    C = int(weight.shape[0])
    N = x.numel() // C
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(2, N, dtype=torch.float32)
    if out is None:
        s = x.new_empty(0)
    else:
        out = out.contiguous()
        s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, out.dtype))
    if N == 0:
        return y, s, stats
    bias_ptr = weight if bias is None else bias.contiguous()  # without a bias any pointer, which is not read
    config = _config(C, x.element_size(), out is not None)["forward"]
    kernel[(-(-N // config["ROWS"]),)](
        x, x if out is None else out, weight, bias_ptr, s, y, stats, N, C=C, ADD=out is not None,
        BIAS=bias is not None, EPS=EPS, **config)
    return y, s, stats


def _run_backward(kernel, sums_kernel, grad_y, grad_s, s, weight, stats, has_bias):
    """Return the results of `_backward`. kernel, sums_kernel: plain, or wrapped for a compiler."""
    C = int(weight.shape[0])
    N = s.numel() // C
    grad_x, grad_weight = torch.empty_like(s), weight.new_empty(C)
    grad_bias = weight.new_empty(C if has_bias else 0)
    if N == 0:
        return grad_x, grad_weight.zero_(), grad_bias.zero_()
    config = _config(C, s.element_size(), grad_s is not None)
    programs = config["programs"] * _multiprocessors(s.device)
    partial = s.new_empty(2 if has_bias else 1, programs, C, dtype=torch.float32)
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    kernel[(programs,)](
        grad_y, grad_y if grad_s is None else grad_s.contiguous(), s, weight, stats, grad_x, partial, N, C=C,
        ADD=grad_s is not None, BIAS=has_bias, PAIRED=not INTERPRETED, **config["backward"])
    sums_kernel[(-(-C // config["sums"]["BLOCK_C"]), 2 if has_bias else 1)](
        partial, grad_weight, grad_bias, programs, C=C, **config["sums"])
    return grad_x, grad_weight, grad_bias


@triton_op("nanosync::layer_norm", mutates_args=())
def _forward(x: torch.Tensor, out: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
             dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y in `dtype`, x + out (empty without out), and (2, N) fp32 mean and reciprocal deviation."""
    return _run_forward(wrap_triton(_forward_kernel), x, out, weight, bias, dtype)


@triton_op("nanosync::layer_norm_backward", mutates_args=())
def _backward(grad_y: torch.Tensor, grad_s: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor,
              stats: torch.Tensor, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of s (..., C), weight (C,) and bias (C,), the last empty without a bias."""
    return _run_backward(wrap_triton(_backward_kernel), wrap_triton(_column_sums_kernel), grad_y, grad_s, s,
                         weight, stats, has_bias)


def _keep(ctx, inputs, output):
    x, out, weight, bias, _ = inputs
    _, s, stats = output
    ctx.save_for_backward(x.contiguous() if out is None else s, weight, stats)
    ctx.has_out, ctx.has_bias = out is not None, bias is not None
    ctx.set_materialize_grads(False)  # no tensor of zeros for an unused result
    ctx.mark_non_differentiable(stats)


def _differentiate(ctx, grad_y, grad_s, _grad_stats, backward=_backward):
    s, weight, stats = ctx.saved_tensors
    grad_weight = grad_bias = None
    if grad_y is not None:
        grad_s, grad_weight, grad_bias = backward(grad_y, grad_s if ctx.has_out else None, s, weight, stats,
                                                  ctx.has_bias)
    return (grad_s, grad_s if ctx.has_out else None, grad_weight, grad_bias if ctx.has_bias else None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """LayerNorm without the dispatch of the operators.

    It has no `setup_context`, because PyTorch would then bind the arguments to the signature in each call,
    which doubles the host's time.
    """

    @staticmethod
    def forward(ctx, *inputs):
        results = _run_forward(_forward_kernel, *inputs)
        _keep(ctx, inputs, results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_s, grad_stats):
        return _differentiate(ctx, grad_y, grad_s, grad_stats, _run_kernels_backward)


def _run_kernels_backward(*inputs):
    return _run_backward(_backward_kernel, _column_sums_kernel, *inputs)
