"""ReLU^2 and the MLP around it, with ReLU^2 fused into the matrix products on Hopper.

    y = relu(x @ w_in.T)^2,   out = y @ w_out.T

ReLU^2 (arXiv 2109.08668) needs only its output for the backward pass, and the next product keeps this output
anyway. The derivative 2 relu(x) is twice the root of the output. The time of a separate ReLU^2 is the bytes
that it moves: forward it reads and writes one tensor of the size of y, backward it reads two and writes one.
Here both products apply it while their sums are in registers. So y and the gradient of x @ w_in.T are written
once, and no other tensor of this size exists. PyTorch computes the other products of the backward pass. If no
kernel can run, and in fp32 and fp64, PyTorch computes everything. (In fp16 the root of the output is 0 for x
below 1.7e-4; bfloat16 has fp32's range.)

One persistent kernel serves both passes. It has as many programs as the GPU has multiprocessors. Each program
iterates over tiles of the output, and loads the operands of the next tile (TMA) while it finishes a tile.

Shapes: N = tokens, C = channels, H = hidden units.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import INTERPRETED, triton

# tile of the output, length of a piece of the sum, pieces in flight, warps: the fastest of those measured on
# H100 at N = 65536, C = 768, H = 3072; see records/2026-11-25-speedrun-h100
CONFIGS = {
    "forward": dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_stages=4, num_warps=8),
    "backward": dict(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, num_stages=3, num_warps=8),
}


class ReluSquared(torch.autograd.Function):
    """Separate ReLU^2: x of any shape -> relu(x)^2 in x's dtype."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        y = y * y  # in x's dtype; square() would return fp32 under CUDA's autocast
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable  # the root has no derivative at 0
    def backward(ctx, grad):
        return grad * (2 * ctx.saved_tensors[0].sqrt())


relu_squared = ReluSquared.apply


def relu_squared_mlp(x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor) -> torch.Tensor:
    """Return relu(x @ w_in.T)^2 @ w_out.T, (..., C), in x's dtype.

    Differentiable once in all arguments. Raises ValueError for other shapes.

    x: (..., C), cast to autocast's dtype under autocast.
    w_in, w_out: (H, C) and (C, H), cast to x's dtype.
    """
    if x.shape[-1:] != w_in.shape[1:] or w_out.shape != w_in.shape[::-1]:
        raise ValueError(f"x {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)} must "
                         f"have the shapes (..., C), (H, C) and (C, H)")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
    if fusible(x, w_in):
        return ReluSquaredMLP.apply(x.reshape(-1, x.shape[-1]), w_in, w_out).view(x.shape)
    return F.linear(relu_squared(F.linear(x, w_in)), w_out)


def is_hopper(device: torch.device) -> bool:
    """Return True for an H100 or H200 with Triton."""
    cuda = triton is not None and device.type == "cuda"
    return cuda and torch.cuda.get_device_properties(device).major == 9


def fusible(x: torch.Tensor, w_in: torch.Tensor) -> bool:
    """Return True if the kernel can run: on Hopper or interpreted, in 16 bits, with rows for TMA."""
    if triton is None or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if any(n == 0 or n % 8 for n in w_in.shape):
        return False
    if x.is_cuda:
        return is_hopper(x.device)
    # the interpreter needs values, and treats bfloat16 as integers in a product
    return INTERPRETED and x.dtype == torch.float16 and not torch.compiler.is_compiling()


class ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out):
        y = _linear_relu_squared(x, w_in)
        ctx.save_for_backward(x, w_in, w_out, y)
        return y @ w_out.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w_in, w_out, y = ctx.saved_tensors
        of_x, of_w_in, of_w_out = ctx.needs_input_grad
        grad_h = _linear_relu_squared_backward(grad, w_out, y) if of_x or of_w_in else None
        return (grad_h @ w_in if of_x else None, grad_h.T @ x if of_w_in else None,
                grad.T @ y if of_w_out else None)


# opaque operators, because a tensor descriptor needs an address, which a trace of torch.compile lacks
@torch.library.custom_op("nanosync::linear_relu_squared", mutates_args=())
def _linear_relu_squared(x: torch.Tensor, w_in: torch.Tensor) -> torch.Tensor:
    """Return relu(x @ w_in.T)^2, (N, H), for x (N, C) and w_in (H, C)."""
    y = x.new_empty(x.shape[0], w_in.shape[0])
    _launch(x, w_in, y, y, backward=False)
    return y


@torch.library.custom_op("nanosync::linear_relu_squared_backward", mutates_args=())
def _linear_relu_squared_backward(grad: torch.Tensor, w_out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x @ w_in.T, (N, H): (grad @ w_out) 2 sqrt(y).

    grad: gradient of out, (N, C). w_out: (C, H). y: (N, H).
    """
    grad_h = y.new_empty(y.shape)
    _launch(grad, w_out, y, grad_h, backward=True)
    return grad_h


@_linear_relu_squared.register_fake
def _(x, w_in):
    return x.new_empty(x.shape[0], w_in.shape[0])


@_linear_relu_squared_backward.register_fake
def _(grad, w_out, y):
    return y.new_empty(y.shape)


if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def tile_product(a_desc, b_desc, row, column, C: tl.constexpr, PLAIN: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        """Compute a tile in fp32: of a @ b.T, for a (N, C) and b (H, C), or with PLAIN of a @ b, b (C, H)."""
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, C, BLOCK_K):  # TMA loads 0 outside a tensor, and stores nothing there
            a = a_desc.load([row, k])
            if PLAIN:
                sums = tl.dot(a, b_desc.load([k, column]), sums)
            else:
                sums = tl.dot(a, b_desc.load([column, k]).T, sums)
        return sums

    @triton.jit
    def _kernel(
        a_desc,  # (N, C): x; if BACKWARD, gradient of out
        b_desc,  # (H, C): w_in; if BACKWARD, (C, H): w_out
        y_desc,  # (N, H), read only if BACKWARD
        out_desc,  # (N, H)
        N, H: tl.constexpr, C: tl.constexpr, PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        across: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
        tiles = (N + BLOCK_M - 1) // BLOCK_M * across
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            row, column = tile // across * BLOCK_M, tile % across * BLOCK_N
            sums = tile_product(a_desc, b_desc, row, column, C, BACKWARD, BLOCK_M, BLOCK_N, BLOCK_K)
            # half a tile at a time, as shared memory also has the operands in flight
            left, right = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            _end(left, y_desc, out_desc, row, column, BACKWARD)
            _end(right, y_desc, out_desc, row, column + BLOCK_N // 2, BACKWARD)

    @triton.jit
    def _end(sums, y_desc, out_desc, row, column, BACKWARD: tl.constexpr):
        if BACKWARD:
            sums *= 2 * tl.sqrt(y_desc.load([row, column]).to(tl.float32))
        else:
            sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as in PyTorch
            sums *= sums
        out_desc.store([row, column], sums.to(out_desc.dtype))


def _launch(a: torch.Tensor, b: torch.Tensor, y: torch.Tensor, out: torch.Tensor, backward: bool) -> None:
    (N, C), H, config = a.shape, out.shape[1], CONFIGS["backward" if backward else "forward"]
    if N == 0:
        return
    M, W, K = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(N, M) * triton.cdiv(H, W)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 3
    with torch.cuda.device_of(a):  # Triton launches on the current device
        _kernel[min(tiles, programs),](
            descriptor(a, M, K), descriptor(b, K, W) if backward else descriptor(b, W, K),
            descriptor(y, M, W // 2), descriptor(out, M, W // 2), N, H, C, programs, backward, **config)


def descriptor(z: torch.Tensor, rows: int, columns: int):
    """Make a descriptor of blocks of a matrix, or of its copy if its address is no multiple of 16 bytes."""
    z = z.contiguous()
    if z.data_ptr() % 16:
        z = z.clone()
    return TensorDescriptor(z, z.shape, [z.shape[1], 1], [rows, columns])  # a single row may have any stride
