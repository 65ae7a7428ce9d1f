"""Triton kernels, each beside the PyTorch code that it replaces.

A kernel runs if `usable(tensor)` is True. Otherwise (CPU, MPS, no Triton) the same function runs the PyTorch
code of its module. `TRITON_INTERPRET=1`, set before the first import of Triton, runs the kernels in Triton's
interpreter on CPU tensors, for tests on machines without a GPU.
"""

import os

import torch

try:
    import triton
except ImportError:  # macOS, Windows, CPU-only installs
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# torch.compile sees the kernels of a triton_op. To define one imports PyTorch's compiler, which takes 2 s, so
# without a GPU, where the kernels never run, the operator is an ordinary one.
triton_op = torch.library.triton_op if triton is not None and (INTERPRETED or torch.cuda.is_available()) \
    else torch.library.custom_op
wrap_triton = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton


def usable(x: torch.Tensor) -> bool:
    """Return True if a Triton kernel can run on `x`.

    `x` must be a CUDA tensor, or any tensor with values under Triton's interpreter. fp64 is not supported.
    """
    return triton is not None and x.dtype != torch.float64 and (x.is_cuda or (INTERPRETED and not x.is_meta))
