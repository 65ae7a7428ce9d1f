"""LayerNorm, alone or with the residual addition before it, in one kernel forward and two backward.

    s = x + out                          layer_norm(x): s = x
    y = (s - mean(s)) / sqrt(var(s) + 1e-5) * weight + bias

LayerNorm costs the bytes that it moves: 2 a value forward and 3 backward, in units of a value's size, and 4
each with the addition, which apart would be 5 and 6. So a row lies in registers between its one read and its
one write, and statistics are fp32. In the backward pass a fixed number of programs walk over the rows, each
adding its rows' part of the gradients of weight and bias up in registers; a second kernel adds the programs'
sums. Nothing is atomic: the same input gives the same bits. (Two steps backward are also how Triton's
tutorial 05 and Liger-Kernel's LayerNorm, arXiv 2410.10989, get the gradients of weight and bias.)

Operators of torch.library: torch.compile keeps the graph whole and, as these are `triton_op`s, plans the
memory of what they allocate with the rest of it. PyTorch looks for the kernels when an operator is
registered, to tell its caches of compiled code apart: so they stand before it. Without a compiler the same
functions are called through an autograd.Function, which costs the host less than an operator's dispatch.

Shapes: N rows (the product of all dimensions but the last), C channels, P programs.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels import INTERPRETED, triton, usable

triton_op = torch.library.custom_op if triton is None else torch.library.triton_op  # which would warn, unused
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton
EPS = 1e-5
PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}  # not DTensor and the like
MAX_WIDTH = 16384  # wider rows do not fit the registers of one program


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """LayerNorm over the last dimension: x (..., C), weight and bias (C,), bias may be None.

    Takes fp32, bf16 and fp16 in any combination; returns x's dtype, but autocast's under autocast, rounded
    once: the matrix product that follows takes that dtype anyway, and x stays what it is. (PyTorch's
    layer_norm under autocast gives fp32 on CUDA and x's dtype on the CPU.) Differentiable once in all three.
    Where no kernel can run (see `kernels.usable`; rows of more than MAX_WIDTH) it is F.layer_norm.
    """
    if not _runs_on(x, weight):
        return F.layer_norm(x, weight.shape, weight, bias, EPS)
    return _normalize(x, None, weight, bias, _result_dtype(x, x.dtype))[0]


def add_layer_norm(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, y): the sum s = x + out, which goes on as the residual stream, and its LayerNorm.

    x, out: (..., C) of one shape. s is in the dtype that `x + out` has, y as in `layer_norm`, of s as it is
    rounded. Differentiable once in x, out, weight and bias, through either result.
    """
    if not _runs_on(x, weight):
        s = x + out
        return s, F.layer_norm(s, weight.shape, weight, bias, EPS)
    dtype = _result_dtype(x, torch.promote_types(x.dtype, out.dtype))
    y, s, _ = _normalize(x, out, weight, bias, dtype)
    return s, y


def _runs_on(x, weight) -> bool:
    if INTERPRETED and torch.compiler.is_compiling():  # the interpreter needs values, which a trace has not
        return False
    return usable(x) and weight.dtype != torch.float64 and weight.shape[0] <= MAX_WIDTH


def _result_dtype(x, dtype: torch.dtype) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _normalize(x, out, weight, bias, dtype):
    """What the operator gives, by the shortest way: through it only if somebody looks on (a compiler, a
    dispatch mode such as that of selective activation checkpointing, a tensor subclass)."""
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
        """One program: ROWS rows. No loop, so that nothing comes before their loads."""
        r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        row = tl.program_id(0).to(tl.int64) * ROWS
        column, inside = c < C, row + r < N
        mask, first, offsets = column & inside, row * C, r * C + c
        x = tl.load(x_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(out_ptr + first + offsets, mask=mask, other=0.0).to(tl.float32)
            s = x.to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + offsets, s, mask=mask)
            x = s.to(tl.float32)  # as others will read it
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
        grad_s_ptr,  # (N, C), only if ADD: what reaches s by other ways
        s_ptr,  # (N, C)
        weight_ptr,  # (C,)
        stats_ptr,  # (2, N) fp32
        grad_x_ptr,  # (N, C)
        partial_ptr,  # (2 if BIAS else 1, P, C) fp32: this program's part of weight's and bias's gradients
        N, C: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, PAIRED: tl.constexpr, ROWS: tl.constexpr,
        BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ):
        """One program: ROWS rows at a time, from its own on every so many; the next ones are fetched into
        shared memory meanwhile, and their sums stay in registers."""
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
            x_hat = (s - mean) * rstd  # rubbish outside the row, where grad is zero
            grad_weight += tl.sum(grad * x_hat, axis=0, keep_dims=True)
            if BIAS:
                grad_bias += tl.sum(grad, axis=0, keep_dims=True)
            grad *= weight
            if PAIRED:  # warps that share a row meet once for both sums
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
        grad_weight_ptr, grad_bias_ptr,  # (C,): the sums of the first and, on a grid of two rows, the second
        P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):
        """One program: BLOCK_C columns, always in the same order."""
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


# What a config has for rows of BLOCK values, as measured on H200 (records/2026-11-21-kernels-h200).
FORWARD_TILES = {  # (BLOCK, with the addition): (ROWS, warps)
    (1024, False): (2, 2), (2048, False): (1, 2), (4096, False): (2, 8), (8192, False): (1, 8),
    (1024, True): (2, 1), (2048, True): (2, 8), (4096, True): (1, 16), (8192, True): (1, 32)}
UNDER_WAY = 75 << 10  # bytes that a multiprocessor should be fetching for the backward pass


@functools.cache
def _config(C: int, size: int = 2, add: bool = False) -> dict:
    """What to tune, by width, the bytes of a value, and whether there is the addition. Of the launches:

    ROWS, num_warps     of one program: forward by FORWARD_TILES, other widths 16 values a thread; backward
                        4096 values at a time, 32 a thread of short rows
    STAGES              how deep the pipeline is through which the backward pass fetches its next rows: two
                        ahead, as far as shared memory reaches (GPUs since Ampere have 99 KB for a program)
    BLOCK_P, BLOCK_C    of the sums over programs: how many are looked at together

    and `programs` of the backward pass for each multiprocessor: as many as keep it fetching, and not more,
    as each leaves 2 C sums to be added.
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
    """What `_forward` returns, from the kernel as it is or wrapped for a compiler."""
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
    bias_ptr = weight if bias is None else bias.contiguous()  # any, where there is none to read
    config = _config(C, x.element_size(), out is not None)["forward"]
    kernel[(-(-N // config["ROWS"]),)](
        x, x if out is None else out, weight, bias_ptr, s, y, stats, N, C=C, ADD=out is not None,
        BIAS=bias is not None, EPS=EPS, **config)
    return y, s, stats


def _run_backward(kernel, sums_kernel, grad_y, grad_s, s, weight, stats, has_bias):
    """What `_backward` returns."""
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
    """y in `dtype`; x + out, empty without out; mean and reciprocal deviation of each row, (2, N) fp32."""
    return _run_forward(wrap_triton(_forward_kernel), x, out, weight, bias, dtype)


@triton_op("nanosync::layer_norm_backward", mutates_args=())
def _backward(grad_y: torch.Tensor, grad_s: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor,
              stats: torch.Tensor, has_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of s (..., C), of weight and of bias (C,), the last one empty without a bias."""
    return _run_backward(wrap_triton(_backward_kernel), wrap_triton(_column_sums_kernel), grad_y, grad_s, s,
                         weight, stats, has_bias)


def _keep(ctx, inputs, output):
    x, out, weight, bias, _ = inputs
    _, s, stats = output
    ctx.save_for_backward(x.contiguous() if out is None else s, weight, stats)
    ctx.has_out, ctx.has_bias = out is not None, bias is not None
    ctx.set_materialize_grads(False)  # a result that nobody used costs no tensor of zeros
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
    """The operators' work without their dispatch. (With a `setup_context` forward would cost the host twice
    as much: PyTorch then binds the arguments to the signature, call by call.)"""

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
