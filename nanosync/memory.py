"""Owners of a device's memory, for the error message when memory runs out."""

import torch
import torch.nn as nn

from nanosync import errors
from nanosync.hardware import peak_memory
from nanosync.sharding import local_part


def watch_memory(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """From now on, a message that memory ran out also names the owners of memory on this device."""
    errors.memory_owners[:] = [lambda: memory_owners(model, optimizer, device, peak_memory(device))]


def memory_owners(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device,
                  peak: int | None) -> dict[str, int]:
    """Return the bytes of each owner of a device's memory in this process, largest first.

    peak: largest number of bytes of all tensors so far, None if unknown. What the named owners do not have of
    it belongs to activations and temporary tensors, errors.ACTIVATIONS.
    """
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()
              if torch.is_tensor(value)]
    owners = {"parameters": parameters, "optimizer states": states,
              "gradients": [p.grad for p in parameters if p.grad is not None]}
    held = {name: sum(_bytes_on(tensor, device) for tensor in tensors) for name, tensors in owners.items()}
    if peak is not None:
        held[errors.ACTIVATIONS] = max(0, peak - sum(held.values()))
    return dict(sorted(held.items(), key=lambda owner: -owner[1]))


def _bytes_on(tensor: torch.Tensor, device: torch.device) -> int:
    """Return the bytes that this process's part of a tensor has on a device."""
    local = local_part(tensor)
    return local.numel() * local.element_size() if local.device.type == device.type else 0
