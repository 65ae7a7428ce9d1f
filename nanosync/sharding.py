"""Models and tensors that are divided over processes: gathering whole tensors, and a process's part.

What FSDP made is recognised by its methods: to import FSDP2 and DTensor takes more than a second, and most
processes never use them.
"""

import torch
import torch.nn as nn


class Replicated(nn.Module):
    """A model that every process has whole. A model of tensor-parallel ranks overrides these methods."""

    head_in_fp8 = False  # True, or 'emulated': the head's products run in FP8, see nanosync.fp8
    head_casts = None  # casts of the head's weight as it is now; None: cast in each pass

    @property
    def head_fp8(self):
        """How the head's products run now: in FP8 only where gradients are recorded."""
        return self.head_in_fp8 if torch.is_grad_enabled() else False

    def n_parameters(self) -> int:
        """Return the number of parameters of the whole model."""
        return sum(p.numel() for p in self.parameters())

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gather the dense model's tensors from this process's parts; all processes of the model call it.

        tensors: parameters or their optimizer state, by name.
        """
        return tensors

    def own_part(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this process's parts of the dense model's tensors, the inverse of `whole`."""
        return tensors

    def split_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which this process has only a part."""
        return []

    def reduce_partial_gradients(self) -> None:
        """Sum gradients of which each process computed only a share; called before each update."""

    def align_replicas(self, optimizer) -> None:
        """Make undivided parameters and their optimizer state equal to the last bit on all processes."""


def is_fsdp(module: nn.Module) -> bool:
    """Return True for a module that FSDP shards."""
    return hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor, as FSDP makes of a parameter."""
    return hasattr(tensor, "placements")


def reshard(model: torch.nn.Module) -> None:
    """Reshard the parameters that FSDP keeps whole for a backward pass, when no backward pass follows.

    Until then the model's parameters are not the objects that the optimizer has.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP sharded, or the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP sharded, on the device of its group; return any other tensor as it is.

    All processes of the group must call this function.
    """
    if not is_sharded(tensor):
        return tensor
    # not by full_tensor, which corrupts the heap on gloo, see kernels/collectives.py
    from nanosync.distributed import begin_all_gather, finish_tensor

    mesh, local = tensor.device_mesh, tensor.detach().to_local()
    part = torch.zeros(-(-tensor.shape[0] // mesh.size()), *tensor.shape[1:], dtype=tensor.dtype,
                       device=mesh.device_type)  # with cpu_offload `local` is in the CPU's memory
    part[:len(local)] = local
    return finish_tensor(begin_all_gather(part, mesh.get_group()))[:tensor.shape[0]]


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy this process's part of a whole tensor to the device of `like`.

    like: tensor with the wanted sharding. If it is not sharded, or `whole` is a scalar, the copy is whole.
    """
    if not is_sharded(like) or whole.dim() == 0:
        return whole.to(like.device, copy=True)
    from torch.distributed.tensor import DTensor

    mesh, local = like.device_mesh, like.to_local()
    rows = -(-whole.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, whole.shape[0])
    part = whole[first:first + rows].to(local.device, local.dtype, copy=True)
    assert part.shape == local.shape, f"FSDP must divide {tuple(whole.shape)} into rows"
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())
