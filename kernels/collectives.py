"""Collectives that torch.compile can trace and custom operators can call. They must not be differentiated.

PyTorch's derivative of its all-reduce is another all-reduce, which is wrong for both uses of the all-reduce
in tensor parallelism.

On gloo, PyTorch 2.13's all_gather_into_tensor corrupts the heap: gloo's two threads write the name of the
collective that each has completed into one std::string, without a lock. A name of more than 15 characters is
in a block of the heap, which both threads then free. ALLGATHER_COALESCED has 19. The variant with `out` is
ALLGATHER, and all other collectives used here have short names too. NCCL has no such string.
"""

import torch


def functional_all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Sum x over a group into a new tensor."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))


def begin_gather(x: torch.Tensor, processes: int, group_name: str, out: torch.Tensor | None = None
                 ) -> torch.Tensor:
    """Start to gather x of every process of a group, in dimension 0. The result is valid after wait_tensor.

    out: tensor for the result, None for a new one. Not differentiable.
    """
    ops, x = torch.ops._c10d_functional, x.detach()
    if out is None:
        if x.is_cuda and torch.compiler.is_compiling():  # the compiler allocates the result
            return ops.all_gather_into_tensor(x, processes, group_name)
        out = x.new_empty(processes * len(x), *x.shape[1:])
    return ops.all_gather_into_tensor_out(x, processes, group_name, out=out)


def functional_all_gather(x: torch.Tensor, processes: int, group_name: str) -> torch.Tensor:
    """Gather x of every process of a group into a new tensor (processes, *x.shape)."""
    whole = begin_gather(x.reshape(-1), processes, group_name)
    return torch.ops._c10d_functional.wait_tensor(whole).view(processes, *x.shape)
