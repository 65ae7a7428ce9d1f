"""Models and tensors in parts on several processes: whole, or the part of this process."""

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Replicated(nn.Module):
    """A model that every process has whole. A model of tensor-parallel ranks overrides what follows."""

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, of this process's parameters or their optimizer state -> those of the dense
        model."""
        return tensors

    def own_part(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `whole`."""
        return tensors

    def split_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of which this process has only a part."""
        return []

    def reduce_partial_gradients(self) -> None:
        """Complete the gradients of which this process computed only a share; before each update."""

    def align_replicas(self, optimizer) -> None:
        """Make parameters that every process has whole, and their optimizer state, equal to the last bit."""


def reshard(model: torch.nn.Module) -> None:
    """Free what FSDP keeps whole from a forward pass to its backward pass, where no backward pass follows:
    until then the model's parameters are not those that the optimizer knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP sharded, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP sharded, on the device of its group; others are returned as they are. All
    processes of the group take part."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)  # with cpu_offload it is in the CPU's memory
    return DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=tensor.shape,
                              stride=tensor.stride()).full_tensor()


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy the part of a whole tensor that this process has of `like`, to the device of `like`. A scalar,
    and a tensor that is not sharded, is copied whole."""
    if not isinstance(like, DTensor) or whole.dim() == 0:
        return whole.to(like.device, copy=True)
    mesh, local = like.device_mesh, like.to_local()
    rows = -(-whole.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * rows, whole.shape[0])
    part = whole[first:first + rows].to(local.device, local.dtype, copy=True)
    assert part.shape == local.shape, f"FSDP divides {tuple(whole.shape)} in another way than into rows"
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())
