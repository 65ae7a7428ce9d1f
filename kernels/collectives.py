"""Collectives in the form that torch.compile and custom operators know. Neither is for autograd."""

import torch


def functional_all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum over a group in a new tensor, in a form that torch.compile knows. Not for autograd: PyTorch's
    derivative of it is another all-reduce, which is right for neither of its uses in tensor parallelism."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))


def functional_all_gather(x: torch.Tensor, processes: int, group_name: str) -> torch.Tensor:
    """x of every process of a group, (processes, *x.shape), likewise."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), processes, group_name)).view(
        processes, *x.shape)
