"""Attention in which each token sees an interval of tokens that ends with itself.

    out[t] = sum over j in [first[t], t] of softmax_j(scale q[t] . k[j]) v[j]

One tensor, `first`, describes causal attention (0), sliding windows (t - window + 1), packed documents (the
first token of t's document) and their combinations (the maximum). It never falls along a sequence. So the
tokens that see key j are an interval, too: j to last[j]. The kernels skip all blocks outside the intervals,
and apply the mask to blocks at their ends only. A change of the window changes values of `first`, not the
compiled graph.

The forward pass is FlashAttention-2's (arXiv 2307.08691). The backward pass computes the gradients of k and v
in one kernel and that of q in another. No kernel uses atomic additions, so results have the same bits in
every run. If no kernel can run, and in fp32 and fp64 on a GPU, PyTorch's code runs.

Shapes: B = sequences, T = tokens of a sequence, H = heads, D = channels of a head.
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, triton, triton_op, usable, wrap_triton

LOG2E = 1.4426950408889634
ROWS = 1024  # queries whose mask PyTorch's code holds at a time
# queries and keys of a block: the fastest of those measured on H200 with D = 128, see records/
CONFIGS = {
    "forward": dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=3),
    "backward_kv": dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
    "backward_q": dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
}


def first_visible(idx: torch.Tensor, end_of_text: int | None, window: int | None = None) -> torch.Tensor:
    """Return the first token that each token sees, (B, T) int32.

    Documents begin with an end-of-text token, as in GPT-2's data.

    idx: token ids, (B, T).
    end_of_text: id of the token that begins a document, None for one document a sequence.
    window: number of tokens that a token sees, with itself; None for no limit.
    """
    t = torch.arange(idx.size(1), device=idx.device, dtype=torch.int32).expand_as(idx)
    first = torch.zeros_like(t)
    if end_of_text is not None:
        first = torch.where(idx == end_of_text, t, 0).cummax(dim=1).values
    return first if window is None else torch.maximum(first, t - (window - 1))


def interval_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor,
                       scale: float | None = None) -> torch.Tensor:
    """Attend from each token t to the tokens first[t] to t; return (B, T, H, D) in q's dtype.

    Differentiable once in q, k and v.

    q, k, v: (B, T, H, D).
    first: (B, T) int32, 0 <= first[t] <= t, not falling along T.
    scale: factor of the scores, None for D**-0.5.
    """
    scale = q.size(-1)**-0.5 if scale is None else scale
    if runs_kernel(q):
        t = torch.arange(q.size(1), device=q.device, dtype=torch.int32).expand_as(first).contiguous()
        last = torch.searchsorted(first, t, right=True, out_int32=True) - 1  # last token that sees a key
        return _forward(q, k, v, first, last, scale)[0]
    return _in_pytorch(q, k, v, first, scale)


def runs_kernel(q: torch.Tensor) -> bool:
    """Return True if the kernels can run on q: in 16 bits on a GPU, in fp16 and fp32 interpreted."""
    if not usable(q) or q.size(-1) > 256:
        return False
    if INTERPRETED:  # the interpreter needs values, and treats bfloat16 as integers in a product
        return q.dtype != torch.bfloat16 and not torch.compiler.is_compiling()
    return q.dtype in (torch.bfloat16, torch.float16)


def _in_pytorch(q, k, v, first, scale: float):
    T = q.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    t, parts = torch.arange(T, device=q.device), []
    for start in range(0, T, ROWS):
        end = min(start + ROWS, T)
        keys, rows = t[:end], t[start:end, None]
        seen = (keys <= rows) & (keys >= first[:, start:end, None])  # (B, rows, keys)
        parts.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end],
                                                    seen[:, None], scale=scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _rows(ptr, rows, T, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """Load rows (n, BLOCK_D) of a head; rows from T on, and channels from D on, are 0."""
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = (rows < T)[:, None] & (d < D) if D != BLOCK_D else (rows < T)[:, None]
        return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)

    @triton.jit
    def _store_rows(ptr, x, rows, T, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = (rows < T)[:, None] & (d < D) if D != BLOCK_D else (rows < T)[:, None]
        tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d, x.to(ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _forward_steps(acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, scale2, begin, end, T, stride,
                       D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
        """Add the keys begin to end - 1 to the running softmax of a block of queries."""
        for n in range(begin, end, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            k = _rows(k_ptr, keys, T, stride, D, BLOCK_D)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale2
            if MASK:
                seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= first[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            p = tl.exp2(scores - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(p, axis=1)
            v = _rows(v_ptr, keys, T, stride, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            row_max = new_max
        return acc, row_max, row_sum

    @triton.jit
    def _attention_forward_kernel(
        q_ptr, k_ptr, v_ptr,  # (B, T, H, D)
        first_ptr,  # (B, T)
        out_ptr,  # (B, T, H, D)
        lse_ptr,  # (B, H, T) fp32: log2 of the sum of e^score
        scale2: tl.constexpr, T, H,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        """Process BLOCK_M queries of a head per program."""
        start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
        b, stride = (head // H).to(tl.int64), H * D
        offset = b * T * stride + head % H * D
        rows = start + tl.arange(0, BLOCK_M)
        first = tl.load(first_ptr + b * T + rows, mask=rows < T, other=T)
        begin = tl.load(first_ptr + b * T + start)
        begin, middle = begin // BLOCK_N * BLOCK_N, start // BLOCK_N * BLOCK_N
        end = tl.minimum(start + BLOCK_M, T)
        # keys that all queries see, in whole blocks: from `full` to `middle`
        full = tl.load(first_ptr + b * T + end - 1)
        full = tl.minimum((full + BLOCK_N - 1) // BLOCK_N * BLOCK_N, middle)
        q = _rows(q_ptr + offset, rows, T, stride, D, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        row_max = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        k_ptr, v_ptr = k_ptr + offset, v_ptr + offset
        acc, row_max, row_sum = _forward_steps(acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, scale2,
                                               begin, full, T, stride, D, BLOCK_D, BLOCK_N, True)
        acc, row_max, row_sum = _forward_steps(acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, scale2,
                                               full, middle, T, stride, D, BLOCK_D, BLOCK_N, False)
        acc, row_max, row_sum = _forward_steps(acc, row_max, row_sum, q, k_ptr, v_ptr, rows, first, scale2,
                                               middle, end, T, stride, D, BLOCK_D, BLOCK_N, True)
        _store_rows(out_ptr + offset, acc / row_sum[:, None], rows, T, stride, D, BLOCK_D)
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, row_max + tl.log2(row_sum), mask=rows < T)

    @triton.jit
    def _delta_kernel(
        out_ptr, grad_ptr,  # (B, T, H, D)
        delta_ptr,  # (B, H, T) fp32: scalar product of each row of out and its gradient
        T, H, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ):
        head = tl.program_id(1)
        rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = (head // H).to(tl.int64) * T * H * D + head % H * D
        out = _rows(out_ptr + offset, rows, T, H * D, D, BLOCK_D).to(tl.float32)
        grad = _rows(grad_ptr + offset, rows, T, H * D, D, BLOCK_D).to(tl.float32)
        tl.store(delta_ptr + head.to(tl.int64) * T + rows, tl.sum(out * grad, axis=1), mask=rows < T)

    @triton.jit
    def _backward_kv_steps(grad_k, grad_v, k, v, q_ptr, grad_ptr, first_ptr, lse_ptr, delta_ptr, keys, scale2,
                           begin, end, T, stride, D: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_M: tl.constexpr, MASK: tl.constexpr):
        """Add what the queries begin to end - 1 contribute to the gradients of a block of keys."""
        for m in range(begin, end, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            q = _rows(q_ptr, rows, T, stride, D, BLOCK_D)
            lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))  # inf: rows from T on weigh 0
            p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale2 - lse[None, :])  # (keys, queries)
            if MASK:
                first = tl.load(first_ptr + rows, mask=rows < T, other=T)
                seen = (keys[:, None] <= rows[None, :]) & (keys[:, None] >= first[None, :])
                p = tl.where(seen, p, 0.0)
            grad = _rows(grad_ptr, rows, T, stride, D, BLOCK_D)
            grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
            delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
            grad_p = tl.dot(v, grad.T, input_precision="ieee")
            grad_s = (p * (grad_p - delta[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_s, q, grad_k, input_precision="ieee")
        return grad_k, grad_v

    @triton.jit
    def _backward_kv_kernel(
        q_ptr, k_ptr, v_ptr, grad_ptr,  # (B, T, H, D)
        first_ptr, last_ptr,  # (B, T)
        lse_ptr, delta_ptr,  # (B, H, T)
        grad_k_ptr, grad_v_ptr,  # (B, T, H, D)
        scale: tl.constexpr, T, H,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        """Process BLOCK_N keys of a head per program."""
        start, head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
        b, stride = (head // H).to(tl.int64), H * D
        offset = b * T * stride + head % H * D
        keys = start + tl.arange(0, BLOCK_N)
        end_keys = tl.minimum(start + BLOCK_N, T)
        k = _rows(k_ptr + offset, keys, T, stride, D, BLOCK_D)
        v = _rows(v_ptr + offset, keys, T, stride, D, BLOCK_D)
        first_ptr, last_ptr = first_ptr + b * T, last_ptr + b * T
        lse_ptr, delta_ptr = lse_ptr + head.to(tl.int64) * T, delta_ptr + head.to(tl.int64) * T
        begin, end = start // BLOCK_M * BLOCK_M, tl.load(last_ptr + end_keys - 1) + 1
        # queries that see all keys of the block, in whole blocks: from `full` to `middle`
        full = tl.minimum((end_keys - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M, end)
        middle = tl.maximum((tl.load(last_ptr + start) + 1) // BLOCK_M * BLOCK_M, full)
        grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        q_ptr, grad_ptr = q_ptr + offset, grad_ptr + offset
        scale2: tl.constexpr = scale * 1.4426950408889634
        grad_k, grad_v = _backward_kv_steps(grad_k, grad_v, k, v, q_ptr, grad_ptr, first_ptr, lse_ptr,
                                            delta_ptr, keys, scale2, begin, full, T, stride, D, BLOCK_D,
                                            BLOCK_M, True)
        grad_k, grad_v = _backward_kv_steps(grad_k, grad_v, k, v, q_ptr, grad_ptr, first_ptr, lse_ptr,
                                            delta_ptr, keys, scale2, full, middle, T, stride, D, BLOCK_D,
                                            BLOCK_M, False)
        grad_k, grad_v = _backward_kv_steps(grad_k, grad_v, k, v, q_ptr, grad_ptr, first_ptr, lse_ptr,
                                            delta_ptr, keys, scale2, middle, end, T, stride, D, BLOCK_D,
                                            BLOCK_M, True)
        _store_rows(grad_k_ptr + offset, grad_k * scale, keys, T, stride, D, BLOCK_D)
        _store_rows(grad_v_ptr + offset, grad_v, keys, T, stride, D, BLOCK_D)

    @triton.jit
    def _backward_q_steps(grad_q, q, grad, k_ptr, v_ptr, lse, delta, rows, first, scale2, begin, end, T,
                          stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                          MASK: tl.constexpr):
        """Add what the keys begin to end - 1 contribute to the gradient of a block of queries."""
        for n in range(begin, end, BLOCK_N):
            keys = n + tl.arange(0, BLOCK_N)
            k = _rows(k_ptr, keys, T, stride, D, BLOCK_D)
            p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale2 - lse[:, None])
            if MASK:
                seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= first[:, None])
                p = tl.where(seen, p, 0.0)
            v = _rows(v_ptr, keys, T, stride, D, BLOCK_D)
            grad_p = tl.dot(grad, v.T, input_precision="ieee")
            grad_s = (p * (grad_p - delta[:, None])).to(k.dtype)
            grad_q = tl.dot(grad_s, k, grad_q, input_precision="ieee")
        return grad_q

    @triton.jit
    def _backward_q_kernel(
        q_ptr, k_ptr, v_ptr, grad_ptr,  # (B, T, H, D)
        first_ptr,  # (B, T)
        lse_ptr, delta_ptr,  # (B, H, T)
        grad_q_ptr,  # (B, T, H, D)
        scale: tl.constexpr, T, H,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):
        """Process BLOCK_M queries of a head per program, with the blocks of the forward kernel."""
        start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
        b, stride = (head // H).to(tl.int64), H * D
        offset = b * T * stride + head % H * D
        rows = start + tl.arange(0, BLOCK_M)
        first = tl.load(first_ptr + b * T + rows, mask=rows < T, other=T)
        begin = tl.load(first_ptr + b * T + start)
        begin, middle = begin // BLOCK_N * BLOCK_N, start // BLOCK_N * BLOCK_N
        end = tl.minimum(start + BLOCK_M, T)
        full = tl.load(first_ptr + b * T + end - 1)
        full = tl.minimum((full + BLOCK_N - 1) // BLOCK_N * BLOCK_N, middle)
        q = _rows(q_ptr + offset, rows, T, stride, D, BLOCK_D)
        grad = _rows(grad_ptr + offset, rows, T, stride, D, BLOCK_D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
        grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        k_ptr, v_ptr = k_ptr + offset, v_ptr + offset
        scale2: tl.constexpr = scale * 1.4426950408889634
        grad_q = _backward_q_steps(grad_q, q, grad, k_ptr, v_ptr, lse, delta, rows, first, scale2, begin,
                                   full, T, stride, D, BLOCK_D, BLOCK_N, True)
        grad_q = _backward_q_steps(grad_q, q, grad, k_ptr, v_ptr, lse, delta, rows, first, scale2, full,
                                   middle, T, stride, D, BLOCK_D, BLOCK_N, False)
        grad_q = _backward_q_steps(grad_q, q, grad, k_ptr, v_ptr, lse, delta, rows, first, scale2, middle,
                                   end, T, stride, D, BLOCK_D, BLOCK_N, True)
        _store_rows(grad_q_ptr + offset, grad_q * scale, rows, T, stride, D, BLOCK_D)


def _sizes(q: torch.Tensor) -> dict:
    _, T, H, D = q.shape
    return dict(T=T, H=H, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)))


@triton_op("nanosync::interval_attention", mutates_args=())
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor,
             scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result, and log2 of the sums of e^score, (B, H, T) fp32. last: for the backward pass."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, T, H, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    config = CONFIGS["forward"]
    wrap_triton(_attention_forward_kernel)[(triton.cdiv(T, config["BLOCK_M"]), B * H)](
        q, k, v, first.contiguous(), out, lse, scale * LOG2E, **_sizes(q), **config)
    return out, lse


@triton_op("nanosync::interval_attention_backward", mutates_args=())
def _backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: torch.Tensor,
              last: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    grad, q, k, v, first, last = (x.contiguous() for x in (grad, q, k, v, first, last))
    B, T, H, _ = q.shape
    sizes, delta = _sizes(q), torch.empty_like(lse)
    grad_q, grad_k, grad_v = (torch.empty_like(q) for _ in range(3))
    wrap_triton(_delta_kernel)[(triton.cdiv(T, 64), B * H)](out, grad, delta, BLOCK_M=64, num_warps=4,
                                                                **sizes)
    config = CONFIGS["backward_kv"]
    wrap_triton(_backward_kv_kernel)[(triton.cdiv(T, config["BLOCK_N"]), B * H)](
        q, k, v, grad, first, last, lse, delta, grad_k, grad_v, scale, **sizes, **config)
    config = CONFIGS["backward_q"]
    wrap_triton(_backward_q_kernel)[(triton.cdiv(T, config["BLOCK_M"]), B * H)](
        q, k, v, grad, first, lse, delta, grad_q, scale, **sizes, **config)
    return grad_q, grad_k, grad_v


def _keep(ctx, inputs, output):
    q, k, v, first, last, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, first, last, out, lse)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, grad, _grad_lse):
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
