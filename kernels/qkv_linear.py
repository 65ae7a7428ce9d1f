"""The linear layer of q, k and v, whose backward pass takes their gradients where attention left them.

    q, k, v = (x @ weight.T + bias) split into three

The forward pass needs no copy: attention reads q, k and v as strided views of one tensor. Attention's
backward pass returns three tensors. PyTorch's backward pass of one linear layer needs them side by side,
and to join them reads and writes three tensors of the size of x. Here the gradient of x is one product over
the three tensors, by a kernel for Hopper. The gradient of the weight is three products, each of which
writes its rows. If the kernel cannot run, the gradients are joined.

The kernel is as in relu_squared.py. It addresses the three tensors by one descriptor (TMA), which starts at
the lowest address. Between rows and channels the descriptor has a dimension whose stride is a common
divisor of a row and of the distances between the tensors.

Shapes: N = tokens, C = channels of q, of k and of v, W = channels of x.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import triton
from kernels.relu_squared import descriptor, fusible

# tile of the output, length of a piece of the sum, pieces in flight, warps; programs: of a multiprocessor;
# the fastest of four on H200, see records/fp8-training
CONFIG = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_stages=3, num_warps=4, programs=2)


def qkv_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v, (..., C) each, views of one tensor in x's dtype.

    Differentiable once in all arguments if a kernel runs.

    x: (..., W), cast to autocast's dtype under autocast.
    weight: (3C, W), cast to x's dtype. bias: (3C,), cast to x's dtype, or None.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not (fusible(x, weight) and weight.shape[0] % 24 == 0):
        return F.linear(x, weight, bias).chunk(3, dim=-1)
    parts = QKVLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return tuple(part.view(*x.shape[:-1], -1) for part in parts)


class QKVLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias).chunk(3, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grads = grad_q, grad_k, grad_v
        return (_qkv_input_gradient(*grads, weight) if of_x else None,
                _qkv_weight_gradient(*grads, x) if of_weight else None,
                torch.cat([g.sum(0, dtype=torch.float32) for g in grads]).to(x.dtype) if of_bias else None)


# opaque operators, because a tensor descriptor needs an address, which a trace of torch.compile lacks
@torch.library.custom_op("nanosync::qkv_input_gradient", mutates_args=())
def _qkv_input_gradient(grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor,
                        weight: torch.Tensor) -> torch.Tensor:
    """Return (grad_q, grad_k, grad_v) @ weight, (N, W), for gradients (N, C) and weight (3C, W)."""
    grad_x = grad_q.new_empty(grad_q.shape[0], weight.shape[1])
    grads = [g.contiguous() for g in (grad_q, grad_k, grad_v)]
    if not _launch(grads, weight, grad_x):
        torch.mm(torch.cat(grads, dim=1), weight, out=grad_x)
    return grad_x


@torch.library.custom_op("nanosync::qkv_weight_gradient", mutates_args=())
def _qkv_weight_gradient(grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, x: torch.Tensor
                         ) -> torch.Tensor:
    """Return (grad_q, grad_k, grad_v).T @ x, (3C, W), for gradients (N, C) and x (N, W)."""
    grads = grad_q, grad_k, grad_v
    grad_weight = x.new_empty(3 * grad_q.shape[1], x.shape[1])
    for grad, rows in zip(grads, grad_weight.chunk(3)):
        torch.mm(grad.T, x, out=rows)
    return grad_weight


_qkv_input_gradient.register_fake(lambda q, k, v, weight: q.new_empty(q.shape[0], weight.shape[1]))
_qkv_weight_gradient.register_fake(lambda q, k, v, x: x.new_empty(3 * q.shape[1], x.shape[1]))


if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit(do_not_specialize=["q_place", "k_place", "v_place"])  # they differ from step to step
    def _kernel(
        grads_desc,  # (N, distance from the lowest address, C)
        weight_desc,  # (3C, W)
        out_desc,  # (N, W)
        q_place, k_place, v_place,  # distances, in units of the descriptor's stride
        N, W: tl.constexpr, C: tl.constexpr, PROGRAMS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        across: tl.constexpr = (W + BLOCK_N - 1) // BLOCK_N
        pieces: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        tiles = (N + BLOCK_M - 1) // BLOCK_M * across
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i in range(3 * pieces):  # TMA loads 0 outside a tensor, and stores nothing there
                part, k = i // pieces, i % pieces * BLOCK_K
                place = tl.where(part == 0, q_place, tl.where(part == 1, k_place, v_place))
                grad = grads_desc.load([row, place, k]).reshape(BLOCK_M, BLOCK_K)
                sums = tl.dot(grad, weight_desc.load([part * C + k, column]), sums)
            left, right = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            out_desc.store([row, column], left.to(out_desc.dtype))
            out_desc.store([row, column + BLOCK_N // 2], right.to(out_desc.dtype))


def _launch(grads: list[torch.Tensor], weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Run the kernel; return False if one descriptor cannot address the gradients."""
    (N, C), W, config = grads[0].shape, weight.shape[1], dict(CONFIG)
    lowest = min(grads, key=torch.Tensor.data_ptr)
    distances = [g.data_ptr() - lowest.data_ptr() for g in grads]
    unit = math.gcd(C * out.itemsize, *distances)  # bytes
    if N == 0 or lowest.data_ptr() % 16 or unit % 16 or max(distances) // unit >= 2**31 - 1:
        return False
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 3
    programs *= config.pop("programs", 1)
    M, columns, K = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(N, M) * triton.cdiv(W, columns)
    block = TensorDescriptor(lowest, [N, 2**31 - 1, C], [C, unit // out.itemsize, 1], [M, 1, K])
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _kernel[min(tiles, programs),](
            block, descriptor(weight, K, columns), descriptor(out, M, columns // 2),
            *(d // unit for d in distances), N, W, C, programs, **config)
    return True
