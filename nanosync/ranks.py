"""Tensor-parallel ranks: the ranks of a process, the operators f and g, and the ranks' parts of a matrix.

In this module "rank" means TP rank.

Shapes: m = number of local ranks whose streams differ; 1 while nothing is pending, because the local ranks
then agree and act as one. R = tp_size, P = processes of a group, B = batch, T = tokens, C = n_embd, K = this
process's part of C (attention) or 4C (MLP).
"""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn as nn

from kernels.collectives import functional_all_reduce
from nanosync.errors import UserError
from nanosync.fp8 import batched_product, product_without_bias


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel ranks of this process, and the process group that holds all ranks.

    local=R, group=None simulates all ranks in one process. local=1 is Megatron-style tensor parallelism.
    local=2 on 4 processes runs 8 ranks on 4 GPUs. Process p holds ranks p * local to (p + 1) * local - 1.
    """

    local: int = 1  # number of ranks on this process
    group: dist.ProcessGroup | None = None
    trace: list | None = field(default=None, compare=False)  # g_op appends the shapes that it reduces
    dry: bool = False  # leave out all-reduces, to measure the time of everything else; sums are then wrong
    processes: int = field(init=False)  # size of the group
    index: int = field(init=False)  # of this process in the group
    group_name: str = field(init=False)  # name of the group in compiled code

    def __post_init__(self):
        alone = self.group is None
        object.__setattr__(self, "processes", 1 if alone else dist.get_world_size(self.group))
        object.__setattr__(self, "index", 0 if alone else dist.get_rank(self.group))
        object.__setattr__(self, "group_name", "" if alone else self.group.group_name)

    def __deepcopy__(self, memo):
        return self  # a copy of a model uses the same process group

    @property
    def size(self) -> int:
        return self.local * self.processes

    @property
    def as_one(self) -> "Ranks":
        """This process's ranks as one rank of their joint width, for use while they agree."""
        return replace(self, local=1)


def ranks_on(group, tp_size: int) -> Ranks:
    """Divide tp_size ranks among the processes of a group. Raises UserError."""
    processes = dist.get_world_size(group)
    if tp_size % processes:
        raise UserError(f"tp_processes={processes} does not divide tp_size={tp_size}, and all processes must "
                        f"hold equally many ranks: choose tp_processes as a divisor of tp_size")
    return Ranks(tp_size // processes, group)


class _Share(torch.autograd.Function):
    """f over a group: identity forward, all-reduce backward (Megatron-LM, arXiv 1909.08053, figure 3)."""

    @staticmethod
    def forward(ctx, x, group_name):
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return functional_all_reduce(grad, ctx.group_name), None


class _Reduce(torch.autograd.Function):
    """g over a group: all-reduce forward, identity backward; the adjoint of f (same source)."""

    @staticmethod
    def forward(ctx, x, group_name):
        return functional_all_reduce(x, group_name)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def f_op(base: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Apply f: give each local rank the base, (...) -> (local, ...), without a copy.

    The backward pass sums over the local ranks and all-reduces over the group.
    """
    if ranks.group is not None and not ranks.dry:
        base = _Share.apply(base, ranks.group_name)
    return base.expand(ranks.local, *base.shape)


def g_op(partial: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Apply g: sum over all ranks, (local, ...) -> (...), with one all-reduce. It is the adjoint of f_op."""
    # dtype: under autocast CUDA's sum returns fp32, and the residual stream would be fp32 from here on
    total = partial.squeeze(0) if partial.shape[0] == 1 else partial.sum(dim=0, dtype=partial.dtype)
    if ranks.trace is not None:
        ranks.trace.append(tuple(total.shape))
    return total if ranks.group is None or ranks.dry else _Reduce.apply(total, ranks.group_name)


def column_parallel(x, linear: nn.Linear, parts: int = 1):
    """Multiply by each rank's rows of a matrix: x (m, B, T, C) -> (m, B, T, N / m).

    N is the number of rows on this process.

    parts: number of stacked matrices that are each divided among the ranks, 3 for q, k and v.
    """
    def split(w):  # (N, C) -> (m, N / m, C)
        return w.view(parts, m, -1, C).transpose(0, 1).reshape(m, -1, C)

    m, B, T, C = x.shape
    if m == 1:
        return linear(x)
    y = batched_product(x.reshape(m, B * T, C), linear, split)
    if linear.bias is not None:
        y = y + linear.bias.view(parts, m, -1).transpose(0, 1).reshape(m, 1, -1).to(y.dtype)
    return y.view(m, B, T, -1)


def row_parallel(y, linear: nn.Linear, local: int, together: bool):
    """Multiply by each rank's columns of a matrix: y (m, B, T, K / m) -> partial sums (local, B, T, C).

    linear: layer with the weight (C, K); its bias is left out.
    together: True to return the sum of the partial sums, (1, B, T, C), which is a single product.
    """
    def split(w):  # (C, K) -> (local, C, K / local)
        return w.view(w.shape[0], local, -1).transpose(0, 1)

    m, B, T, _ = y.shape
    if together or local == 1:
        return product_without_bias(y.permute(1, 2, 0, 3).reshape(1, B, T, -1), linear)
    if m == 1:  # y has the inputs of all local ranks, concatenated
        y = y.view(B * T, local, -1).transpose(0, 1)
    return batched_product(y.reshape(local, B * T, -1) if m > 1 else y, linear, split).view(local, B, T, -1)


def split_dimension(name: str) -> int | None:
    """Return the dimension over which ranks divide a parameter or its optimizer state, None if it is whole.

    c_attn is divided within each of q, k and v.
    """
    if "c_attn." in name or "c_fc." in name:
        return 0
    return 1 if "c_proj.weight" in name else None


def part_of(name: str, tensor: torch.Tensor, index: int, processes: int) -> torch.Tensor:
    """Return the part of a whole parameter that process `index` of a group holds."""
    dim = split_dimension(name)
    if dim is None or tensor.dim() == 0:
        return tensor
    if "c_attn." in name:
        return torch.cat([part.chunk(processes)[index] for part in tensor.chunk(3)])
    return tensor.chunk(processes, dim)[index]


def join_parts(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the parts of all processes to the whole parameter, the inverse of `part_of`."""
    if "c_attn." in name:
        return torch.cat([torch.cat(qkv) for qkv in zip(*(part.chunk(3) for part in parts))])
    return torch.cat(parts, split_dimension(name))
