"""Triton kernels, each beside the PyTorch code it replaces.

A kernel runs where `usable(tensor)` says so; everywhere else (CPU, MPS, no Triton) the same function takes
the PyTorch path of its module. `TRITON_INTERPRET=1`, set before Triton is first imported, runs the kernels in
Triton's interpreter on CPU tensors: that is how they are tested on machines without a GPU.
"""

import os

import torch

try:
    import triton
except ImportError:  # macOS, Windows, CPU-only installs
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def usable(x: torch.Tensor) -> bool:
    """True where a Triton kernel can run on `x`: a CUDA tensor, or any tensor under Triton's interpreter."""
    return triton is not None and x.dtype != torch.float64 and (x.is_cuda or (INTERPRETED and not x.is_meta))
