"""The operations of a decoding step, each in one kernel.

A step that generates one token reads every weight once and computes little. So on a GPU its time is the
number of its kernels (2 to 4 microseconds each even inside a CUDA graph) and, for larger models, the bytes of
the weights. With these operations a layer has five kernels instead of about thirteen.

    linear      LayerNorm, matrix product, bias, GELU, residual addition; all but the product optional
    Attention   writes k and v of the new token into the cache, then attends over the cache
    embed       sum of token and position embeddings
    draw        draws a token from candidates

All shapes are static, and kernels read the position from device memory. So one captured CUDA graph serves
every position.

Shapes: B = sequences, K and N = inputs and outputs of a linear layer, H = heads, D = channels of a head,
S = positions of the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import triton, usable
from kernels.exchange import SplitSums

OWN = 2  # own tensors that a kernel adds to its stream
SUM_ARGUMENTS = ("sees", "own_first", "own2_first", "residual_first", "take_index", "take_width", "put_index",
                 "put_width", "exchanges", "slot")  # of kernels; compiled once for all
MAX_ROWS = 64  # cuBLAS is faster for more rows, because the kernel's tile holds all rows of the batch


@dataclass(frozen=True)
class Part:
    """A tensor (..., C) whose channels below `first` count as 0."""

    values: torch.Tensor
    first: int = 0

    def whole(self) -> torch.Tensor:
        """Return the tensor with these zeros."""
        return self.values if self.first == 0 else F.pad(self.values[..., self.first:], (self.first, 0))

    def of(self, rank: int) -> "Part":
        """Return the part of a rank, for values (ranks, ..., C)."""
        return Part(self.values[rank], self.first)


@dataclass(frozen=True)
class Stream:
    """The stream that a rank reads: x + sum `take` + sees * (sum of `own`)."""

    own: tuple = ()  # up to OWN Parts (B, K): what the rank has not added up with the others
    sees: float = 1.0
    sums: SplitSums | None = None  # in kernels, to take a sum from
    take: int | None = None  # number of the sum, which may be of the first channels only; None for no sum
    landed: torch.Tensor | None = None  # (B, K), overwritten with x + sum; another tensor than x

    def add(self, x):
        """Return the stream, without a sum, by PyTorch."""
        assert self.take is None, "only a kernel takes a sum"
        return x + self.sees * sum(part.whole() for part in self.own) if self.own else x


def linear(x, weight, bias, out, norm=None, gelu: bool = False, residual=None, also=None,
           also_add: bool = False, also_bias: bool = True, stream=None, put=None):
    """Compute out = act(LayerNorm(x) @ weight.T + bias) + residual.

    The product is in weight's dtype with fp32 sums. LayerNorm and residual are in x's and out's dtype, or
    fp32.

    x: (B, K). weight: (N, K). bias: (N,) or None.
    out: (B, N), overwritten.
    norm: LayerNorm module of width K, None for no LayerNorm.
    gelu: True for GELU as act, False for the identity.
    residual: (B, N) or a Part of that shape; may be `out`; None for no addition.
    also: (B, N), overwritten with the product, None for no second output.
    also_add: True to add the product to `also` instead.
    also_bias: True if that product includes the bias.
    stream: Stream to normalise in place of x; needs norm.
    put: (SplitSums in kernels, number of the sum) to put `out` as, or its first channels; None for no put.
    """
    residual = Part(residual) if isinstance(residual, torch.Tensor) else residual
    if runs_kernel(weight, x.shape[0]):
        return _launch(x, weight, bias, out, norm, gelu, residual, also, also_add, also_bias, stream, put)
    assert put is None, "only a kernel puts a sum"
    x = x if stream is None else stream.add(x)
    if norm is not None:
        beta = None if norm.bias is None else norm.bias.to(x.dtype)
        x = F.layer_norm(x, norm.weight.shape, norm.weight.to(x.dtype), beta, 1e-5)
    x = x.to(weight.dtype)
    y = F.linear(x, weight, bias)
    if also is not None:
        plain = y if also_bias or bias is None else F.linear(x, weight)
        also.copy_(also + plain if also_add else plain)
    if gelu:
        y = F.gelu(y, approximate="tanh")
    return out.copy_(y if residual is None else residual.whole() + y)


def runs_kernel(weight, rows: int) -> bool:
    """Return True if `linear` of so many rows is a kernel."""
    return usable(weight) and rows <= MAX_ROWS


def embed(token, position, wte, wpe, out, step=None):
    """Write wte[token] + wpe[position] into out (B, C).

    token: (B,) int64. position: (1,) int64. wte: (V, C). wpe: (T, C). step: (1,) int32 to add 1 to, or None.
    """
    if not usable(wte):
        if step is not None:
            step += 1
        return out.copy_(F.embedding(token, wte) + F.embedding(position, wpe))
    B, C = out.shape
    _embed_kernel[(B, triton.cdiv(C, 256))](token, position, wte, wpe, out, step, C, COUNT=step is not None,
                                            BLOCK=256, num_warps=2)
    return out


def draw(logits, index, noise, temperature: float, out):
    """Write the index with the largest logits / temperature - log(noise) into out (B,).

    With exponential noise it is a draw from softmax(logits / temperature).

    logits, index, noise: (B, K), at most a few thousand candidates K.
    """
    if not usable(logits):
        tiny = torch.finfo(torch.float32).tiny
        choice = (logits / temperature - noise.clamp_min(tiny).log()).argmax(dim=-1, keepdim=True)
        return out.copy_(index.gather(-1, choice).squeeze(-1))
    B, K = logits.shape
    _draw_kernel[(B,)](logits, index, noise, out, K, 1 / temperature, BLOCK=triton.next_power_of_2(K),
                       num_warps=4)
    return out


class Attention:
    """Attention of one new token per sequence over a cache, with the scratch memory of the kernel."""

    BLOCK_S = 64  # positions that a program processes at a time
    PROGRAMS = 512  # a few programs for each multiprocessor of a large GPU

    def __init__(self, cache):
        """Allocate scratch memory. cache: (L, 2, B, H, S, D) for keys and values of any number of layers."""
        _, _, B, H, S, D = cache.shape
        spans = max(1, min(self.PROGRAMS // (B * H), -(-S // (2 * self.BLOCK_S))))
        self.span = -(-S // (spans * self.BLOCK_S)) * self.BLOCK_S  # positions of a program
        self.splits = -(-S // self.span)
        self.partial = cache.new_empty(B * H, self.splits, D + 2, dtype=torch.float32)
        self.done = cache.new_zeros(B * H, dtype=torch.int32)

    def __call__(self, qkv, cache, position, out):
        """Write k and v of the new token into the cache, and its attention into out (B, C).

        qkv: (B, 3C), query, key and value of the new token.
        cache: (2, B, H, S, D), keys and values; positions below `position` are filled already.
        position: (1,) int64 on the device, position of the new token.
        """
        _, B, H, S, D = cache.shape
        if usable(qkv):
            _attention_kernel[(B * H, self.splits)](
                qkv, cache, position, self.partial, self.done, out, H, S, D**-0.5,
                SPAN=self.span, D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_S=self.BLOCK_S, num_warps=4)
            return out
        q, k, v = qkv.view(B, 3, H, 1, D).unbind(1)  # (B, H, 1, D)
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        seen = torch.arange(S, device=qkv.device) <= position  # (S,)
        y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=seen[None, :])
        return out.copy_(y.reshape(B, H * D))


if triton is not None:
    import triton.language as tl

    from kernels.exchange import put_values, taken_values

    @triton.jit
    def _gelu(x):
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)  # 0.5 x (1 + tanh(inner))

    @triton.jit
    def _embed_kernel(token_ptr, position_ptr, wte_ptr, wpe_ptr, out_ptr, step_ptr, C, COUNT: tl.constexpr,
                      BLOCK: tl.constexpr):
        if COUNT:
            if tl.program_id(0) + tl.program_id(1) == 0:  # no program of this kernel reads it
                tl.store(step_ptr, tl.load(step_ptr) + 1)
        row, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = c < C
        token, position = tl.load(token_ptr + row), tl.load(position_ptr)
        x = tl.load(wte_ptr + token * C + c, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(wpe_ptr + position * C + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * C + c, x.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _draw_kernel(logits_ptr, index_ptr, noise_ptr, out_ptr, K, inverse_temperature, BLOCK: tl.constexpr):
        row, k = tl.program_id(0), tl.arange(0, BLOCK)
        mask = k < K
        logits = tl.load(logits_ptr + row * K + k, mask=mask, other=float("-inf")).to(tl.float32)
        noise = tl.maximum(tl.load(noise_ptr + row * K + k, mask=mask, other=1.0), 1.1754943508222875e-38)
        choice = tl.argmax(logits * inverse_temperature - tl.log(noise), axis=0)
        tl.store(out_ptr + row, tl.load(index_ptr + row * K + choice))

    @triton.jit
    def _finish(y, row, N, mask, n, n_mask, bias_ptr, out_ptr, residual_ptr, residual_first, also_ptr,
                addresses_ptr, step_ptr, put_index, put_width, exchanges, slot,
                BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, ALSO: tl.constexpr,
                ALSO_ADD: tl.constexpr, ALSO_BIAS: tl.constexpr, PUT: tl.constexpr, CUT: tl.constexpr,
                RANK: tl.constexpr, RANKS: tl.constexpr, SETS: tl.constexpr):
        """Apply everything that follows the product y to the outputs n of a row or rows, see `linear`."""
        also, offsets = y, row * N + n
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if ALSO:
            if ALSO_BIAS:
                also = y
            if ALSO_ADD:
                also += tl.load(also_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(also_ptr + offsets, also.to(also_ptr.dtype.element_ty), mask=mask)
        if GELU:
            y = _gelu(y)
        if RESIDUAL:
            r_mask = mask & (n >= residual_first) if CUT else mask
            y += tl.load(residual_ptr + offsets, mask=r_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
        if PUT:
            p_offsets, p_mask = offsets, mask
            if CUT:
                p_offsets, p_mask = row * put_width + n, mask & (n < put_width)
            put_values(y, p_offsets, p_mask, addresses_ptr, step_ptr, put_index, exchanges, slot, RANK, RANKS,
                       SETS)

    @triton.jit
    def _stream(x_ptr, row, k, k_mask, K, own_ptr, own_first, own2_ptr, own2_first, sees, landed_ptr, lands,
                addresses_ptr, step_ptr, take_index, take_width, exchanges, slot, OWN: tl.constexpr,
                TAKE: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
                SETS: tl.constexpr):
        """Return a row of the Stream, (BLOCK_K,) fp32. lands: True for the program that writes `landed`."""
        x = tl.load(x_ptr + row * K + k, mask=k_mask, other=0.0).to(tl.float32)
        if TAKE:
            t_offsets, t_mask = row * K + k, k_mask
            if CUT:
                t_offsets, t_mask = row * take_width + k, k < take_width
            x += taken_values(t_offsets, t_mask, addresses_ptr, step_ptr, take_index, exchanges, slot, RANK,
                              RANKS, SETS)
            tl.store(landed_ptr + row * K + k, x, mask=k_mask & lands)
        if OWN > 0:
            mask = k_mask & (k >= own_first) if CUT else k_mask
            own = tl.load(own_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
            if OWN > 1:
                mask = k_mask & (k >= own2_first) if CUT else k_mask
                own += tl.load(own2_ptr + row * K + k, mask=mask, other=0.0).to(tl.float32)
            x += sees * own
        return x

    @triton.jit(do_not_specialize=SUM_ARGUMENTS)
    def _vector_kernel(
        x_ptr,  # (B, K)
        weight_ptr,  # (N, K)
        bias_ptr, gamma_ptr, beta_ptr,  # (N,), (K,), (K,)
        out_ptr, residual_ptr, also_ptr,  # (B, N) each
        own_ptr, own2_ptr, landed_ptr, addresses_ptr, step_ptr,  # see Stream and SplitSums
        N, K, sees, own_first, own2_first, residual_first, take_index, take_width, put_index, put_width,
        exchanges, slot,
        NORM: tl.constexpr, BETA: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
        RESIDUAL: tl.constexpr, ALSO: tl.constexpr, ALSO_ADD: tl.constexpr, ALSO_BIAS: tl.constexpr,
        OWN: tl.constexpr, TAKE: tl.constexpr, PUT: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr,
        RANKS: tl.constexpr, SETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Compute BLOCK_N outputs of one row per program, with all of K in registers for concurrent loads."""
        row = tl.program_id(1)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        n_mask, k_mask = n < N, k < K
        w_mask = n_mask[:, None] & k_mask[None, :]
        w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=w_mask, other=0.0)
        x = _stream(x_ptr, row, k, k_mask, K, own_ptr, own_first, own2_ptr, own2_first, sees, landed_ptr,
                    tl.program_id(0) == 0, addresses_ptr, step_ptr, take_index, take_width, exchanges, slot,
                    OWN, TAKE, CUT, RANK, RANKS, SETS)
        if NORM:
            gamma = tl.load(gamma_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
            centred = tl.where(k_mask, x - tl.sum(x, axis=0) / K, 0.0)
            x = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / K + 1e-5) * gamma
            if BETA:
                x += tl.load(beta_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x.to(w.dtype).to(tl.float32)[None, :], axis=1)
        _finish(y, row, N, n_mask, n, n_mask, bias_ptr, out_ptr, residual_ptr, residual_first, also_ptr,
                addresses_ptr, step_ptr, put_index, put_width, exchanges, slot,
                BIAS, GELU, RESIDUAL, ALSO, ALSO_ADD, ALSO_BIAS, PUT, CUT, RANK, RANKS, SETS)

    @triton.jit(do_not_specialize=SUM_ARGUMENTS)
    def _norm_kernel(
        x_ptr,  # (B, K)
        gamma_ptr, beta_ptr,  # (K,)
        out_ptr,  # (B, K)
        own_ptr, own2_ptr, landed_ptr, addresses_ptr, step_ptr,  # see Stream and SplitSums
        K, sees, own_first, own2_first, take_index, take_width, exchanges, slot,
        BETA: tl.constexpr, OWN: tl.constexpr, TAKE: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr,
        RANKS: tl.constexpr, SETS: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Normalise one row per program: x or a Stream (B, K) -> out (B, K) in out's dtype."""
        row = tl.program_id(0)
        k = tl.arange(0, BLOCK_K)
        mask = k < K
        x = _stream(x_ptr, row, k, mask, K, own_ptr, own_first, own2_ptr, own2_first, sees, landed_ptr, True,
                    addresses_ptr, step_ptr, take_index, take_width, exchanges, slot, OWN, TAKE, CUT, RANK,
                    RANKS, SETS)
        gamma = tl.load(gamma_ptr + k, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - tl.sum(x, axis=0) / K, 0.0)
        y = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / K + 1e-5) * gamma
        if BETA:
            y += tl.load(beta_ptr + k, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * K + k, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=SUM_ARGUMENTS)
    def _matrix_kernel(
        x_ptr,  # (B, K), weight's dtype
        weight_ptr,  # (N, K)
        bias_ptr,  # (N,)
        out_ptr, residual_ptr, also_ptr,  # (B, N) each
        addresses_ptr, step_ptr,  # see SplitSums
        B, N, residual_first, put_index, put_width, exchanges, slot, K: tl.constexpr,
        BIAS: tl.constexpr, GELU: tl.constexpr,
        RESIDUAL: tl.constexpr, ALSO: tl.constexpr, ALSO_ADD: tl.constexpr, ALSO_BIAS: tl.constexpr,
        PUT: tl.constexpr, CUT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SETS: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        """Compute BLOCK_N outputs of all rows per program, with the matrix units."""
        b = tl.arange(0, BLOCK_B)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_mask, n_mask = b < B, n < N
        total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_mask = k < K
            w_mask = n_mask[:, None] & k_mask[None, :]
            w = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=w_mask, other=0.0)
            x_mask = b_mask[:, None] & k_mask[None, :]
            x = tl.load(x_ptr + b[:, None] * K + k[None, :], mask=x_mask, other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        _finish(total, b[:, None], N, b_mask[:, None] & n_mask[None, :], n[None, :], n_mask[None, :],
                bias_ptr, out_ptr, residual_ptr, residual_first, also_ptr,
                addresses_ptr, step_ptr, put_index, put_width, exchanges, slot,
                BIAS, GELU, RESIDUAL, ALSO, ALSO_ADD, ALSO_BIAS, PUT, CUT, RANK, RANKS, SETS)

    @triton.jit
    def _attention_kernel(
        qkv_ptr,  # (B, 3, H, D)
        cache_ptr,  # (2, B, H, S, D)
        position_ptr,  # (1,)
        partial_ptr,  # (B * H, splits, D + 2) fp32: weighted values, sum of weights, maximum of each span
        done_ptr,  # (B * H,) int32, zero before and after the call
        out_ptr,  # (B, H, D)
        H, S, scale, SPAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    ):
        """Attend with one head over one span of positions per program.

        The last program of a head to finish adds up all spans, always in the same order.
        """
        head, split = tl.program_id(0), tl.program_id(1)  # head of all B * H
        heads, splits = tl.num_programs(0), tl.num_programs(1)
        position = tl.load(position_ptr).to(tl.int32)
        if split * SPAN <= position:
            d = tl.arange(0, BLOCK_D)
            d_mask = d < D
            qkv_ptr += (head // H * 3 * H + head % H) * D
            q = tl.load(qkv_ptr + d, mask=d_mask, other=0.0).to(tl.float32) * scale
            k_ptr = cache_ptr + head.to(tl.int64) * S * D
            v_ptr = k_ptr + heads.to(tl.int64) * S * D
            lane_max, lane_sum, lane_y = _softmax_of_lanes(
                q, k_ptr, v_ptr, d, d_mask, split * SPAN, min((split + 1) * SPAN, position), position,
                D, BLOCK_D, BLOCK_S)

            # the new token is in the last span that has positions
            k_new = tl.load(qkv_ptr + H * D + d, mask=d_mask, other=0.0)
            v_new = tl.load(qkv_ptr + 2 * H * D + d, mask=d_mask, other=0.0)
            newest = position < (split + 1) * SPAN
            tl.store(k_ptr + position * D + d, k_new, mask=d_mask & newest)
            tl.store(v_ptr + position * D + d, v_new, mask=d_mask & newest)
            score_new = tl.where(newest, tl.sum(q * k_new.to(tl.float32), axis=0), float("-inf"))
            top = tl.maximum(tl.max(lane_max, axis=0), score_new)
            shrink = tl.exp(lane_max - top)
            p_new = tl.exp(score_new - top)
            weight = tl.sum(lane_sum * shrink, axis=0) + p_new
            y = tl.sum(lane_y * shrink[:, None], axis=0) + p_new * v_new.to(tl.float32)

            spans = position // SPAN + 1
            if spans == 1:
                tl.store(out_ptr + head * D + d, (y / weight).to(out_ptr.dtype.element_ty), mask=d_mask)
            else:
                partial_ptr += head * splits * (D + 2)
                tl.store(partial_ptr + split * (D + 2) + d, y, mask=d_mask)
                tl.store(partial_ptr + split * (D + 2) + D, weight)
                tl.store(partial_ptr + split * (D + 2) + D + 1, top)
                tl.debug_barrier()  # the span's results must be written before it is counted
                if tl.atomic_add(done_ptr + head, 1, sem="acq_rel") == spans - 1:
                    y, weight = _joined(partial_ptr, spans, d, d_mask, D, BLOCK_D)
                    tl.store(out_ptr + head * D + d, (y / weight).to(out_ptr.dtype.element_ty), mask=d_mask)
                    tl.store(done_ptr + head, 0)

    @triton.jit
    def _softmax_of_lanes(q, k_ptr, v_ptr, d, d_mask, begin, end, position, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
        """Return maximum and sum of weights (BLOCK_S,), and weighted values (BLOCK_S, BLOCK_D), of a span.

        The span has the positions begin to end - 1. Each lane runs its own softmax over its positions, so the
        loop needs no exchange between warps. The caller joins the lanes.
        """
        lane_max = tl.full((BLOCK_S,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN
        lane_sum = tl.zeros((BLOCK_S,), tl.float32)
        lane_y = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = (s < position)[:, None] & d_mask[None, :]
            k = tl.load(k_ptr + s[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + s[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            score = tl.where(s < position, tl.sum(q[None, :] * k, axis=1), float("-inf"))
            new_max = tl.maximum(lane_max, score)
            shrink = tl.exp(lane_max - new_max)
            p = tl.exp(score - new_max)
            lane_sum = lane_sum * shrink + p
            lane_y = lane_y * shrink[:, None] + p[:, None] * v
            lane_max = new_max
        return lane_max, lane_sum, lane_y

    @triton.jit
    def _joined(partial_ptr, spans, d, d_mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """Return weighted values (BLOCK_D,) and sum of weights of all spans of a head, in their order."""
        top = tl.load(partial_ptr + D + 1, volatile=True)
        for i in range(1, spans):
            top = tl.maximum(top, tl.load(partial_ptr + i * (D + 2) + D + 1, volatile=True))
        y = tl.zeros((BLOCK_D,), tl.float32)
        weight = 0.0
        for i in range(spans):
            span_ptr = partial_ptr + i * (D + 2)
            shrink = tl.exp(tl.load(span_ptr + D + 1, volatile=True) - top)
            weight += shrink * tl.load(span_ptr + D, volatile=True)
            y += shrink * tl.load(span_ptr + d, mask=d_mask, other=0.0, volatile=True)
        return y, weight


VECTOR_ROWS = 2  # up to so many rows one program per row beats the matrix units, which need 16 rows


def _launch(x, weight, bias, out, norm, gelu, residual, also, also_add, also_bias, stream=None, put=None):
    B, K = x.shape
    assert stream is None or (norm is not None and len(stream.own) <= OWN)
    stream = Stream() if stream is None else stream
    N = weight.shape[0]
    gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
    sums, put_index = (None, 0) if put is None else put
    take = stream.take is not None
    sums = stream.sums if take else sums
    exchange = dict(RANK=0, RANKS=1, SETS=1) if sums is None else sums.constants()
    addresses, step, exchanges, slot = (None, None, 0, 0) if sums is None else (
        sums.addresses, sums.step, len(sums.widths), sums.n)
    (own, own_first), (own2, own2_first) = [
        (part.values, part.first) for part in (*stream.own, Part(None), Part(None))[:OWN]]
    residual, residual_first = (None, 0) if residual is None else (residual.values, residual.first)
    take_width = sums.widths[stream.take] if take else 0
    put_width = 0 if put is None else sums.widths[put_index]
    cut = max(own_first, own2_first, residual_first) > 0 or (take and take_width < K) or \
        (put is not None and put_width < N)  # otherwise the kernels have simpler masks
    exchange |= dict(CUT=cut)
    reads = dict(OWN=len(stream.own), TAKE=take, **exchange)
    flags = dict(BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None, ALSO=also is not None,
                 ALSO_ADD=also_add, ALSO_BIAS=also_bias, PUT=put is not None)
    block_k = triton.next_power_of_2(K)
    if B <= VECTOR_ROWS:
        block_n = max(1, min(16, 16384 // block_k))
        _vector_kernel[(triton.cdiv(N, block_n), B)](
            x, weight, bias, gamma, beta, out, residual, also, own, own2, stream.landed, addresses, step,
            N, K, stream.sees, own_first, own2_first, residual_first, stream.take or 0, take_width, put_index,
            put_width, exchanges, slot, NORM=norm is not None, BETA=beta is not None, **flags, **reads,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)
        return out
    if norm is not None:
        normed = torch.empty(B, K, dtype=weight.dtype, device=x.device)
        _norm_kernel[(B,)](
            x, gamma, beta, normed, own, own2, stream.landed, addresses, step, K, stream.sees, own_first,
            own2_first, stream.take or 0, take_width, exchanges, slot, BETA=beta is not None, **reads,
            BLOCK_K=block_k, num_warps=4)
        x = normed
    tile = _matrix_tile(B, N)
    _matrix_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
        x, weight, bias, out, residual, also, addresses, step, B, N, residual_first, put_index, put_width,
        exchanges, slot, K, **flags, **exchange, BLOCK_B=max(16, triton.next_power_of_2(B)), **tile)
    return out


def _matrix_tile(B: int, N: int) -> dict:
    """Choose the tile: narrow to spread a layer over all multiprocessors, wide for the head's many rows."""
    block_n = 16 if N <= 8192 else 64
    if B <= 32:
        return dict(BLOCK_N=block_n, BLOCK_K=256, num_warps=2 if N <= 8192 else 4, num_stages=3)
    return dict(BLOCK_N=block_n, BLOCK_K=128, num_warps=4, num_stages=4)
