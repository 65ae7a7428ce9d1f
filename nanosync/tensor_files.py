"""Tensors in safetensors files: reading and writing them, and the check of their dtypes and values.

A tensor of another dtype or shape than the optimizer's kernels expect makes them write beyond its memory, and
a value that is not finite spreads through the model. So every tensor is checked before it is used. The check
of names and shapes is where the model is known.
"""

import math
import os
import stat

import torch

from nanosync.errors import UserError, shown
from nanosync.files import open_regular

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# the optimizer takes the root of squares, and powers of steps
NOT_NEGATIVE = (".exp_avg_sq", ".step", ".last_step")


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Load tensors by name on the CPU; a tensor is read from disk when it is used. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        open_regular(path).close()
        return load_file(path)
    # KeyError and AttributeError: a dtype that this PyTorch lacks
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None


def write_tensors(tensors: dict[str, torch.Tensor], path: str, metadata: dict | None = None) -> None:
    """Write tensors on the CPU by name. Raises OSError or SafetensorError.

    The file gets the mode that the umask gives a new file: safetensors lets only the owner read it.
    """
    from safetensors.torch import save_file

    with open(path, "wb") as f:
        mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, mode)


@torch.no_grad()
def check_values(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError unless all tensors are floating-point and finite, and NOT_NEGATIVE ones not negative.

    Costs one pass over the memory of the tensors. where: source of the tensors, for error messages.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise UserError(f"{where} cannot be used: {shown(name)} has the dtype "
                            f"{str(tensor.dtype).removeprefix('torch.')}, and weights and moments are floats")
        if tensor.numel() == 0:
            continue
        low, high = (value.item() for value in tensor.aminmax())  # NaN if any value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{where} cannot be used: {shown(name)} has values that are not finite")
        if low < 0 and name.endswith(NOT_NEGATIVE):
            raise UserError(f"{where} cannot be used: {shown(name)} has the negative value {low}")
