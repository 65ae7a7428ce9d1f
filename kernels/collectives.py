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


def functional_all_gather(x: torch.Tensor, processes: int, group_name: str) -> torch.Tensor:
    """Gather x of every process of a group into a new tensor (processes, *x.shape)."""
    ops, flat = torch.ops._c10d_functional, x.detach().reshape(-1)
    if x.is_cuda and torch.compiler.is_compiling():  # the compiler allocates the result
        whole = ops.all_gather_into_tensor(flat, processes, group_name)
    else:
        whole = ops.all_gather_into_tensor_out(flat, processes, group_name,
                                               out=flat.new_empty(processes * len(flat)))
    return ops.wait_tensor(whole).view(processes, *x.shape)
