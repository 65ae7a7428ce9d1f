"""Fused linear layer and cross-entropy, without the logits of the whole batch.

    loss = mean over valid rows of  -log softmax(x @ weight.T)[target]

With GPT-2's vocabulary the logits are the largest tensor of a training step: 64 x 1024 tokens x 50304 entries
are 13 GB in fp32. Here the logits exist for one chunk of rows at a time, in the dtype of `x`, and their
gradient overwrites them in place. So the forward pass also computes the gradients, and the backward pass only
scales them. Nothing of a chunk is kept or computed twice. The weight's gradient is summed over chunks in
fp32. (Source of the idea: Liger-Kernel's FusedLinearCrossEntropy, arXiv 2410.10989.)

The gradients are those of the *sum* of the losses, so that the logits' gradients are in [-1, 1]. They are
scaled by `grad_output / n_valid` afterwards. In fp16 a factor of 1/65536 on the logits' gradients would flush
them to zero.

With fp8 the logits and the gradient of x are products in FP8, see kernels/fp8.py. The kernel writes the
gradient of the logits in FP8 beside the usual dtype, which the gradient of the weight needs. The largest
entry of a row is the target's, p - 1. The scale of the row makes it a number of the format, without rounding.
Both products need exact sums (see `product`), and leave the scales of rows to the loss and to a short pass
over the gradient of x. A chunk has fewer rows, for the same memory.

The logits can be capped, and a row can have several targets, each with a weight. Both are in a second
operator: its loss of a row is sum_j w_j * (log-sum-exp - logit of target j), of capped logits.

Shapes: N = rows, V = vocabulary, C = channels, K = targets of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import INTERPRETED, triton, usable
from kernels.collectives import functional_all_gather
from kernels.fp8 import MULTIPLE, WeightCast, cast_weight, product
from kernels.fp8_cast import E4M3, E5M2, LARGEST, Cast, cast

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25, "mps": 1 << 28}  # logits in memory at a time; see records/
MAX_TARGETS = 8  # of a row
LOW = 2.0**15  # the target's entry of a row of the logits' gradient in e5m2, whose largest number is 57344
SMALLEST = 2.0**-12  # the least 1 - p that a row's scale has: below it the rounding of log-sum-exp matters


class Softcap(NamedTuple):
    """Cap of logits: z becomes cap * sigmoid((z + shift) / scale). cap and scale must be positive."""

    cap: float
    scale: float
    shift: float = 0.0


def tanh_softcap(cap: float) -> Softcap:
    """Return the Softcap with the softmax of cap * tanh(z / cap), which is smaller by the constant cap."""
    return Softcap(2 * cap, cap / 2)


def cap_logits(logits: torch.Tensor, softcap: Softcap) -> torch.Tensor:
    """Return the capped logits, as linear_cross_entropy computes them from fp32 logits."""
    cap, scale, shift = softcap
    return cap * ((logits + shift) / scale).sigmoid()


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = -1,
                         softcap: Softcap | None = None, target_weights: torch.Tensor | None = None,
                         fp8: bool | str = False, fp8_casts: WeightCast | None = None) -> torch.Tensor:
    """Return the mean cross-entropy of the logits `x @ weight.T` over rows with a target != ignore_index.

    With target_weights, row i also predicts the targets of the rows after it. Its loss is
    sum_j target_weights[j] * -log softmax[targets[i + j]]. A term whose target is ignore_index or beyond the
    end of the sequence is left out. A row whose own target (j = 0) is ignore_index contributes nothing.

    The result is a scalar in fp32 (fp64 for fp64 input). It is NaN if no row is valid, as in
    `F.cross_entropy`. Differentiable once in x and weight.

    x: (N, C) floating point, cast to autocast's dtype under autocast.
    weight: (V, C), cast to x's dtype for the products.
    targets: (N,) int64 in [0, V), or ignore_index; or (B, T) for B sequences, with B * T = N.
    softcap: (cap, scale, shift), see Softcap; None leaves the logits as they are.
    target_weights: (K,) floating point, on x's device, K <= MAX_TARGETS; constants for autograd. None is [1].
    fp8: compute logits and gradient of x in FP8, without softcap and target_weights; 'emulated': by products
    in fp32, on any device.
    fp8_casts: of the weight, for fp8; None makes them here.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    need_grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if softcap is None and target_weights is None:
        casts = _casts(x, weight, fp8, fp8_casts)
        loss_sum, _, _ = _loss_and_grads(x, weight, targets.flatten(), ignore_index, *casts, need_grads)
    else:
        assert not fp8, "FP8 with softcap or target_weights"
        index, weights = _target_table(targets, target_weights, ignore_index)
        loss_sum, _, _ = _weighted_loss_and_grads(x, weight, index, weights, softcap, need_grads)
    return loss_sum / (targets != ignore_index).sum()


def _target_table(targets, target_weights, ignore_index):
    """Return targets and weights of all rows, (N, K) each. A term that is left out has weight 0."""
    if target_weights is None:
        target_weights = torch.ones(1, device=targets.device)
    K = len(target_weights)
    if not 1 <= K <= MAX_TARGETS:
        raise ValueError(f"target_weights has {K} entries. Use 1 to {MAX_TARGETS}")
    rows = torch.nn.functional.pad(targets, (0, K - 1), value=ignore_index).unfold(-1, K, 1).reshape(-1, K)
    valid = (rows != ignore_index) & (rows[:, :1] != ignore_index)
    return rows.where(valid, 0), target_weights.detach().where(valid, 0)


def _casts(x, weight, fp8: bool | str, casts: WeightCast | None = None) -> tuple:
    """Return the arguments `casts` and `emulated` of an operator. A compiler fuses the casts made here.

    casts: of the weight, None to make them.
    """
    if not fp8:
        return [], False
    assert weight.shape[0] % MULTIPLE == 0, f"FP8 for {weight.shape[0]} tokens, not a multiple of {MULTIPLE}"
    casts = cast_weight(weight.detach()) if casts is None else casts
    return [*cast(x.detach(), E4M3), *casts], fp8 == "emulated"


class _Products:
    """The head's products for a part of the rows."""

    chunk_bytes = 0  # of an entry of the logits, beside its own

    def __init__(self, x, weight):
        self.x, self.w = x, weight.to(x.dtype)

    def logits(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits (rows, V), and their factors (rows, 1), None for 1."""
        return self.x[part] @ self.w.T, None

    def low_grad(self, logits) -> Cast | None:
        """Allocate a cast for the gradient of the logits, None if the products need none."""
        return None

    def grad_x_(self, out, grad_logits, low_grad) -> None:
        """Write the gradient of x, (rows, C), to `out`."""
        torch.mm(grad_logits, self.w, out=out)


class _ProductsInFP8(_Products):
    chunk_bytes = 1

    def __init__(self, x, casts: list[torch.Tensor], emulated: bool):
        self.dtype, self.x, self.weight = x.dtype, Cast(*casts[:2]), WeightCast(*casts[2:])
        self.emulated = emulated

    def logits(self, part):
        return self._product(self.x.values[part], False), self.x.scale[part]

    def _product(self, values, transposed: bool, out=None):
        """Return values @ weight.T, or values @ weight if `transposed`, without the scales of rows, for which
        cuBLAS has slower kernels."""
        one = torch.ones((1, 1), device=values.device)
        weight = self.weight.rows(transposed, one_scale=True)
        return product(Cast(values, one), weight, None, self.dtype, self.emulated, fast=False, out=out)

    def low_grad(self, logits):
        scale = logits.new_empty(len(logits), 1, dtype=torch.float32)
        return Cast(torch.empty_like(logits, dtype=E5M2), scale)

    def grad_x_(self, out, grad_logits, low_grad):
        self._product(low_grad.values, True, out)
        out.mul_(low_grad.scale)


def _products(x, weight, casts: list[torch.Tensor], emulated: bool) -> _Products:
    return _ProductsInFP8(x, casts, emulated) if casts else _Products(x, weight)


@torch.library.custom_op("nanosync::linear_cross_entropy", mutates_args=())
def _loss_and_grads(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int,
                    casts: list[torch.Tensor], emulated: bool, need_grads: bool
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss and its gradients: of x (N, C) in x's dtype, of weight (V, C) in weight's dtype.

    The operator is opaque to torch.compile, so that the loop over chunks stays a loop.

    casts: of x and weight for products in FP8, see _casts; [] for products in x's dtype.
    """
    return _sum_over_chunks(x, weight, need_grads, _products(x, weight, casts, emulated),
                            lambda logits, factors, part, low_grad: _loss_and_grad_logits_(
                                logits, targets[part], ignore_index, need_grads, low_grad, factors))


def _sum_over_chunks(x: torch.Tensor, weight: torch.Tensor, need_grads: bool, products: _Products,
                     loss_and_grad_logits_: Callable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the summed loss and its gradients.

    loss_and_grad_logits_: function of a chunk's logits, their factors, the slice of rows, and
    products.low_grad or None.
    """
    N, V = x.shape[0], weight.shape[0]
    losses = x.new_empty(N, dtype=_loss_dtype(x))
    grad_x = torch.empty_like(x) if need_grads else x.new_empty(0)
    grad_w = weight.new_zeros(weight.shape) if need_grads else weight.new_empty(0)
    rows = _chunk_rows(x, V, products)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits, factors = products.logits(part)
        low_grad = products.low_grad(logits) if need_grads else None
        losses[part], grad_logits = loss_and_grad_logits_(logits, factors, part, low_grad)
        if need_grads:
            products.grad_x_(grad_x[part], grad_logits, low_grad)
            _add_matmul_(grad_w, grad_logits.T, x[part])
    return losses.sum(), grad_x, grad_w


def _empty_results(x, weight, *constants):
    need_grads = constants[-1]
    grad_x = torch.empty_like(x) if need_grads else x.new_empty(0)
    grad_w = torch.empty_like(weight) if need_grads else weight.new_empty(0)
    return x.new_empty((), dtype=_loss_dtype(x)), grad_x, grad_w


def _keep_grads(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    # of all but x and weight; a list of tensors has a list of gradients
    ctx.none = [[None] * len(i) if isinstance(i, list) and not any(type(e) is float for e in i) else None
                for i in inputs[2:]]


def _scale_grads(ctx, grad_loss, _grad_grad_x, _grad_grad_w):
    grad_x, grad_w = ctx.saved_tensors
    return (grad_x * grad_loss).to(grad_x.dtype), grad_w * grad_loss, *ctx.none


_loss_and_grads.register_fake(_empty_results)
_loss_and_grads.register_autograd(_scale_grads, setup_context=_keep_grads)


@torch.library.custom_op("nanosync::weighted_linear_cross_entropy", mutates_args=())
def _weighted_loss_and_grads(x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor,
                             weights: torch.Tensor, softcap: list[float] | None, need_grads: bool
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what _loss_and_grads returns, for K targets a row: index (N, K) in [0, V), weights (N, K)."""
    softcap = None if softcap is None else Softcap(*softcap)
    if softcap is not None and min(softcap.cap, softcap.scale) <= 0:
        raise ValueError(f"{softcap} is not a cap. Use a positive cap and a positive scale")
    return _sum_over_chunks(x, weight, need_grads, _Products(x, weight),
                            lambda logits, _factors, part, _low: _weighted_loss_and_grad_logits_(
                                logits, index[part], weights[part], softcap, need_grads))


_weighted_loss_and_grads.register_fake(_empty_results)
_weighted_loss_and_grads.register_autograd(_scale_grads, setup_context=_keep_grads)


def _loss_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_rows(x: torch.Tensor, V: int, products: _Products) -> int:
    """Return the number of rows whose logits fit CHUNK_BYTES, a multiple of 128 for the matrix units."""
    rows = CHUNK_BYTES.get(x.device.type, 1 << 28) // (V * (x.element_size() + products.chunk_bytes))
    return max(128, rows // 128 * 128)


def _add_matmul_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to total. On CUDA a product of low-precision factors goes straight into an fp32 total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _in_low_precision_(low_grad: Cast | None, grad_logits) -> None:
    """Write the gradient of logits to low_grad, if that is a Cast, which has its scale."""
    if low_grad is not None:
        largest = LARGEST[E5M2]
        low_grad.values.copy_((grad_logits.float() / low_grad.scale).clamp(-largest, largest))


def _set_scale_(low_grad: Cast | None, size) -> None:
    """Set the scale of rows for 1 - p of their targets, (rows,)."""
    if low_grad is not None:
        low_grad.scale.copy_(size.float().clamp(min=SMALLEST)[:, None] / LOW)


def _kernel_writes(low_grad) -> bool:
    return low_grad is not None and not INTERPRETED  # the interpreter rounds 8-bit numbers wrongly


def _loss_and_grad_logits_(logits, targets, ignore_index, need_grads, low_grad=None, factors=None):
    """Return losses (rows,) and the gradient of their sum with respect to logits * factors, which overwrites
    `logits`.

    low_grad: Cast (rows, V) in e5m2, overwritten with that of the gradient; or None.
    factors: of the logits, (rows, 1) fp32, None for 1.
    """
    if usable(logits):
        return _triton_loss_and_grad_(logits, targets, ignore_index, need_grads, low_grad, factors)
    valid = targets != ignore_index
    index = targets.where(valid, 0)[:, None]
    full = _multiplied(logits, factors)
    lse = full.logsumexp(dim=1, keepdim=True)
    losses = (lse - full.gather(1, index))[:, 0].where(valid, 0)
    if not need_grads:
        return losses, logits
    probs = (full - lse).exp_()
    probs.scatter_add_(1, index, probs.new_full((), -1.0).expand_as(index))
    grad = probs * valid[:, None]
    _set_scale_(low_grad, -grad.gather(1, index)[:, 0])
    _in_low_precision_(low_grad, grad)
    return losses, logits.copy_(grad)


def _multiplied(logits, factors):
    """Return logits * factors in the loss's dtype."""
    full = logits.to(_loss_dtype(logits))
    return full if factors is None else full * factors


def _weighted_loss_and_grad_logits_(logits, index, weights, softcap, need_grads):
    """Return losses (rows,) and the gradient of their sum with respect to the logits before the cap, which
    overwrites `logits`. index, weights: (rows, K)."""
    if usable(logits):
        return _triton_weighted_loss_and_grad_(logits, index, weights, softcap, need_grads)
    z = logits.to(_loss_dtype(logits))
    z = z if softcap is None else cap_logits(z, softcap)
    lse = z.logsumexp(dim=1, keepdim=True)
    w = weights.to(z.dtype)
    losses = (w * (lse - z.gather(1, index))).where(w != 0, 0).sum(dim=1)
    if not need_grads:
        return losses, logits
    grad = (z - lse).exp_() * w.sum(dim=1, keepdim=True)
    grad.scatter_add_(1, index, -w)
    if softcap is not None:
        grad *= z * (1 - z / softcap.cap) / softcap.scale  # the derivative of a sigmoid s is s * (1 - s)
    return losses, logits.copy_(grad)


def vocab_parallel_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first: int,
                                 group, ignore_index: int = -1, fp8: bool | str = False) -> torch.Tensor:
    """Return linear_cross_entropy with the rows of the weight divided over the processes of a group.

    The mean loss is the same on all processes. The gradient of x is this process's share, which the caller
    must sum over the group. The gradient of weight is complete. For each row of a chunk every process sends
    two numbers, log-sum-exp and target logit.

    x: (N, C), the same on all processes.
    weight: (V_p, C), rows `first` to `first + V_p - 1` of the vocabulary.
    targets: (N,) int64 in the whole vocabulary, or ignore_index.
    fp8: see linear_cross_entropy.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    need_grads = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss_sum, _, _ = _vocab_parallel(x, weight, targets, first, group.size(), group.group_name, ignore_index,
                                     *_casts(x, weight, fp8), need_grads)
    return loss_sum / (targets != ignore_index).sum()


@torch.library.custom_op("nanosync::vocab_parallel_cross_entropy", mutates_args=())
def _vocab_parallel(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first: int, processes: int,
                    group_name: str, ignore_index: int, casts: list[torch.Tensor], emulated: bool,
                    need_grads: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, V = x.shape[0], weight.shape[0]
    products = _products(x, weight, casts, emulated)
    losses = x.new_empty(N, dtype=_loss_dtype(x))
    grad_x = torch.empty_like(x) if need_grads else x.new_empty(0)
    grad_w = weight.new_zeros(weight.shape) if need_grads else weight.new_empty(0)
    mine = (targets >= first) & (targets < first + V)
    index = (targets - first).where(mine, -1)
    rows = _chunk_rows(x, max(V, 1), products)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits, factors = products.logits(part)
        stats = torch.stack(_lse_and_target_logit(logits, index[part], factors), dim=1)  # (rows, 2)
        stats = functional_all_gather(stats, processes, group_name)  # (processes, rows, 2)
        lse = stats[:, :, 0].logsumexp(dim=0)
        valid = targets[part] != ignore_index
        target = stats[:, :, 1].sum(dim=0)
        losses[part] = (lse - target).where(valid, 0)
        if need_grads:
            low_grad = products.low_grad(logits)
            _set_scale_(low_grad, 1 - (target - lse).exp())
            lse = lse.where(valid, float("inf"))
            grad_logits = _grad_logits_(logits, lse, index[part], low_grad, factors)
            products.grad_x_(grad_x[part], grad_logits, low_grad)
            _add_matmul_(grad_w, grad_logits.T, x[part])
    return losses.sum(), grad_x, grad_w


_vocab_parallel.register_fake(_empty_results)
_vocab_parallel.register_autograd(_scale_grads, setup_context=_keep_grads)


def _lse_and_target_logit(logits, index, factors=None):
    """Return the log-sum-exp of these columns, (rows,), and the logit of column `index`, 0 for index -1, both
    of logits * factors."""
    if usable(logits):
        lse, target = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
        _lse_kernel[(logits.shape[0],)](
            logits, lse if factors is None else factors, index, lse, target, logits.shape[1],
            logits.stride(0), FACTORS=factors is not None, LANES=4096, UNROLL=8, num_warps=16)
        return lse, target
    full = _multiplied(logits, factors)
    target = full.gather(1, index.clamp(min=0)[:, None])[:, 0] if full.shape[1] else full.new_zeros(len(full))
    return full.logsumexp(dim=1), target.where(index >= 0, 0)


def _grad_logits_(logits, lse, index, low_grad=None, factors=None):
    """Overwrite logits with softmax - onehot. lse: log-sum-exp over all columns; index: -1 for no onehot;
    low_grad, factors: see _loss_and_grad_logits_, but low_grad has its scale."""
    if usable(logits):
        low = _kernel_writes(low_grad)
        _grad_kernel[(logits.shape[0],)](
            logits, lse if factors is None else factors, index, lse, *(low_grad if low else (logits, lse)),
            logits.shape[1], logits.stride(0), FACTORS=factors is not None, WRITE_LOW=low, LANES=4096,
            UNROLL=8, num_warps=16)
        if not low:
            _in_low_precision_(low_grad, logits)
        return logits
    probs = (_multiplied(logits, factors) - lse[:, None]).exp_()
    there = (index >= 0) & lse.isfinite()
    if probs.shape[1]:
        probs.scatter_add_(1, index.clamp(min=0)[:, None], -there.to(probs.dtype)[:, None])
    _in_low_precision_(low_grad, probs)
    return logits.copy_(probs)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _log2_logits(z, softcap, log2e=1.4426950408889634):
        """Return the logits after the cap, divided by ln 2, and the cap's derivative.

        softcap: None or (cap / ln 2, 1 / (scale ln 2), shift / (scale ln 2), cap / scale).
        log2e: 1 / ln 2, without a cap times a factor of the logits.
        The sigmoid of u ln 2 is s = 1 / (1 + t) with t = 2^-u. 1 - s = t s avoids cancellation.
        """
        if softcap is None:
            return z * log2e, 1.0
        else:  # Triton would compile what follows the if
            cap2, rate, offset, steepness = softcap
            u = tl.maximum(z * rate + offset, -100.0, propagate_nan=tl.PropagateNan.ALL)  # keeps t finite
            t = tl.exp2(-u)
            s = 1.0 / (1.0 + t)
            return cap2 * s, steepness * s * (t * s)

    @triton.jit
    def _log2_sum_exp2(logits_ptr, V, LANES: tl.constexpr, UNROLL: tl.constexpr, softcap=None,
                       log2e=1.4426950408889634):
        """Compute log2 of the sum of e^logit over a row. softcap, log2e: see _log2_logits.

        Each of LANES lanes keeps its own maximum and sum over UNROLL entries at a time. So the loop needs one
        exponential per entry (two with a cap), and no exchange between threads.
        """
        offsets = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        lane_max = tl.full((LANES,), -1e30, tl.float32)  # finite: -inf - -inf would be NaN
        lane_sum = tl.zeros((LANES,), tl.float32)
        for start in range(0, V, LANES * UNROLL):
            mask = start + offsets < V
            z = tl.load(logits_ptr + start + offsets, mask=mask, other=float("-inf"))
            z, _ = _log2_logits(z.to(tl.float32), softcap, log2e)
            if softcap is not None:
                z = tl.where(mask, z, float("-inf"))
            new_max = tl.maximum(lane_max, tl.max(z, axis=0))
            lane_sum = lane_sum * tl.exp2(lane_max - new_max) + tl.sum(tl.exp2(z - new_max[None, :]), axis=0)
            lane_max = new_max
        row_max = tl.max(lane_max, axis=0)
        return row_max + tl.log2(tl.sum(lane_sum * tl.exp2(lane_max - row_max), axis=0))

    @triton.jit
    def _store_softmax(logits_ptr, lse2, V, LANES: tl.constexpr, UNROLL: tl.constexpr, factor=1.0,
                       softcap=None, low_ptr=None, low_factor=1.0, log2e=1.4426950408889634):
        """Overwrite a row with factor * 2^(logit / ln 2 - lse2) * cap's derivative; 0 if lse2 is infinite.

        Unless low_ptr is None, also write low_factor times that there. softcap, log2e: see _log2_logits.
        """
        offsets = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        for start in range(0, V, LANES * UNROLL):
            mask = start + offsets < V
            z = tl.load(logits_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
            z, slope = _log2_logits(z, softcap, log2e)
            p = factor * tl.exp2(z - lse2) * slope
            tl.store(logits_ptr + start + offsets, p.to(logits_ptr.dtype.element_ty), mask=mask)
            if low_ptr is not None:
                tl.store(low_ptr + start + offsets, (p * low_factor).to(low_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _log2e(factor_ptr, FACTOR: tl.constexpr):
        """Return 1 / ln 2, with FACTOR times that number."""
        if FACTOR:
            return tl.load(factor_ptr) * 1.4426950408889634
        else:
            return 1.4426950408889634

    @triton.jit
    def _lse_kernel(
        logits_ptr,  # (rows, V)
        factors_ptr,  # (rows,) fp32: factors of the logits, if FACTORS
        index_ptr,  # (rows,), -1 for no column
        lse_ptr, target_ptr,  # (rows,) fp32
        V, row_stride, FACTORS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * row_stride
        log2e = _log2e(factors_ptr + row, FACTORS)
        index = tl.load(index_ptr + row)
        target = tl.load(logits_ptr + index, mask=index >= 0, other=0.0).to(tl.float32)
        tl.store(target_ptr + row, target * log2e / 1.4426950408889634 if FACTORS else target)
        lse2 = _log2_sum_exp2(logits_ptr, V, LANES, UNROLL, None, log2e)
        tl.store(lse_ptr + row, lse2 / 1.4426950408889634)

    @triton.jit
    def _grad_kernel(
        logits_ptr,  # (rows, V), overwritten
        factors_ptr,  # (rows,) fp32: factors of the logits, if FACTORS
        index_ptr,  # (rows,), -1 for no column
        lse_ptr,  # (rows,) fp32, infinite for ignored rows
        low_ptr,  # (rows, V), overwritten with the gradient over low_scale, if WRITE_LOW
        low_scale_ptr,  # (rows,) fp32
        V, row_stride, FACTORS: tl.constexpr, WRITE_LOW: tl.constexpr, LANES: tl.constexpr,
        UNROLL: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * row_stride
        log2e = _log2e(factors_ptr + row, FACTORS)
        index = tl.load(index_ptr + row)
        lse2 = tl.load(lse_ptr + row) * 1.4426950408889634
        counts = (index >= 0) & (lse2 != float("inf"))
        target = tl.load(logits_ptr + index, mask=counts, other=0.0).to(tl.float32)
        p = tl.exp2(target * log2e - lse2) - 1.0
        if WRITE_LOW:
            low_ptr = tl.multiple_of(low_ptr + row * V, 8)  # see _cross_entropy_kernel
            low_factor = tl.div_rn(1.0, tl.load(low_scale_ptr + row))
            _store_softmax(logits_ptr, lse2, V, LANES, UNROLL // 2, 1.0, None, low_ptr, low_factor, log2e)
        else:
            _store_softmax(logits_ptr, lse2, V, LANES, UNROLL, log2e=log2e)
        tl.debug_barrier()  # the row must be written before the target's entry is overwritten
        tl.store(logits_ptr + index, p.to(logits_ptr.dtype.element_ty), mask=counts)
        if WRITE_LOW:
            tl.store(low_ptr + index, (p * low_factor).to(low_ptr.dtype.element_ty), mask=counts)

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr,  # (rows, V), overwritten by the gradient if WRITE_GRAD
        factors_ptr,  # (rows,) fp32: factors of the logits, if FACTORS
        targets_ptr,  # (rows,)
        losses_ptr,  # (rows,) fp32
        low_ptr, low_scale_ptr,  # (rows, V), (rows,) fp32: overwritten with the gradient's cast, if WRITE_LOW
        V, row_stride, ignore_index, FACTORS: tl.constexpr,
        WRITE_GRAD: tl.constexpr, WRITE_LOW: tl.constexpr, LOW: tl.constexpr, SMALLEST: tl.constexpr,
        LANES: tl.constexpr, UNROLL: tl.constexpr,
    ):
        """Process one row per program: a running softmax in fp32, then softmax minus one-hot from L2.

        Exponentials have base 2, as in the hardware.
        """
        LOG2E: tl.constexpr = 1.4426950408889634
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * row_stride
        log2e = _log2e(factors_ptr + row, FACTORS)
        target = tl.load(targets_ptr + row)
        valid = target != ignore_index
        target_ptr = logits_ptr + tl.where(valid, target, 0)
        target_logit = tl.load(target_ptr).to(tl.float32)
        lse2 = _log2_sum_exp2(logits_ptr, V, LANES, UNROLL, None, log2e)
        loss = (lse2 - target_logit * log2e) / LOG2E if FACTORS else lse2 / LOG2E - target_logit
        tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))
        if WRITE_GRAD:
            lse2 = tl.where(valid, lse2, float("inf"))  # makes every softmax of an ignored row zero
            p = tl.exp2(target_logit * log2e - lse2) - 1.0
            if WRITE_LOW:
                # Half of UNROLL leaves 64 registers. 8, though it is a multiple of 16, lets Triton store 8
                # bytes a thread. For 16 it would exchange all numbers between threads, 6 times as slow.
                low_ptr = tl.multiple_of(low_ptr + row * V, 8)
                size = tl.maximum(-p, SMALLEST)
                tl.store(low_scale_ptr + row, size / LOW)
                low_factor = tl.div_rn(LOW, size)
                _store_softmax(logits_ptr, lse2, V, LANES, UNROLL // 2, 1.0, None, low_ptr, low_factor, log2e)
            else:
                _store_softmax(logits_ptr, lse2, V, LANES, UNROLL, log2e=log2e)
            tl.debug_barrier()  # the row must be written before the target's entry is overwritten
            tl.store(target_ptr, p.to(logits_ptr.dtype.element_ty), mask=valid)
            if WRITE_LOW:
                tl.store(low_ptr + target, (p * low_factor).to(low_ptr.dtype.element_ty), mask=valid)

    @triton.jit
    def _weighted_cross_entropy_kernel(
        logits_ptr,  # (rows, V), overwritten by the gradient if WRITE_GRAD
        index_ptr, weights_ptr,  # (rows, K)
        losses_ptr,  # (rows,) fp32
        V, row_stride, cap, scale, shift,
        K: tl.constexpr, BLOCK_K: tl.constexpr, SOFTCAP: tl.constexpr,
        WRITE_GRAD: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    ):
        """Process one row per program, as _cross_entropy_kernel does, with K targets and a cap."""
        LOG2E: tl.constexpr = 1.4426950408889634
        softcap = (cap * LOG2E, LOG2E / scale, shift * LOG2E / scale, cap / scale) if SOFTCAP else None
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * row_stride
        j = tl.arange(0, BLOCK_K)
        index = tl.load(index_ptr + row * K + j, mask=j < K, other=0)
        w = tl.load(weights_ptr + row * K + j, mask=j < K, other=0.0).to(tl.float32)
        z, slope = _log2_logits(tl.load(logits_ptr + index).to(tl.float32), softcap)  # (BLOCK_K,)
        lse2 = _log2_sum_exp2(logits_ptr, V, LANES, UNROLL, softcap)
        tl.store(losses_ptr + row, tl.sum(tl.where(w != 0, w * (lse2 - z) / LOG2E, 0.0), axis=0))
        if WRITE_GRAD:
            w_sum = tl.sum(w, axis=0)
            _store_softmax(logits_ptr, lse2, V, LANES, UNROLL, w_sum, softcap)
            tl.debug_barrier()  # the row must be written before the targets' entries are overwritten
            # equal targets store equal values, so the order of their stores does not matter
            w_equal = tl.sum(tl.where(index[:, None] == index[None, :], w[None, :], 0.0), axis=1)
            grad = (w_sum * tl.exp2(z - lse2) - w_equal) * slope
            tl.store(logits_ptr + index, grad.to(logits_ptr.dtype.element_ty), mask=w != 0)


def _triton_loss_and_grad_(logits, targets, ignore_index, need_grads, low_grad=None, factors=None):
    rows, V = logits.shape
    losses, low = logits.new_empty(rows, dtype=torch.float32), _kernel_writes(low_grad)
    _cross_entropy_kernel[(rows,)](
        logits, losses if factors is None else factors, targets, losses,
        *(low_grad if low else (logits, losses)), V, logits.stride(0), ignore_index,
        FACTORS=factors is not None, WRITE_GRAD=need_grads, WRITE_LOW=low, LOW=LOW, SMALLEST=SMALLEST,
        LANES=4096, UNROLL=8, num_warps=16)
    if low_grad is not None and not low:
        _set_scale_(low_grad, logits.float().abs().amax(1))
        _in_low_precision_(low_grad, logits)
    return losses, logits


def _triton_weighted_loss_and_grad_(logits, index, weights, softcap, need_grads):
    (rows, V), K = logits.shape, index.shape[1]
    losses = logits.new_empty(rows, dtype=torch.float32)
    _weighted_cross_entropy_kernel[(rows,)](
        logits, index.contiguous(), weights.contiguous(), losses, V, logits.stride(0),
        *(softcap or (1.0, 1.0, 0.0)), K=K, BLOCK_K=triton.next_power_of_2(K), SOFTCAP=softcap is not None,
        WRITE_GRAD=need_grads, LANES=4096, num_warps=16, UNROLL=4 if softcap is None else 2)  # 64 registers
    return losses, logits
