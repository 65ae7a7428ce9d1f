"""Collectives that torch.compile can trace and custom operators can call. They must not be differentiated.

PyTorch's derivative of its all-reduce is another all-reduce, which is wrong for both uses of the all-reduce
in tensor parallelism.
"""

import torch


def functional_all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Sum x over a group into a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))


def functional_all_gather(x: torch.Tensor, processes: int, group_name: str) -> torch.Tensor:
    """Gather x of every process of a group into a new tensor (processes, *x.shape)."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), processes, group_name)).view(
        processes, *x.shape)
