"""Tensor-parallel ranks: which of them a process holds, f and g between them, and their parts of a matrix.

Shapes: m ranks that differ; 1 while nothing is pending, as this process's ranks then agree and act as one.
R = tp_size, P processes of a group, B batch, T tokens, C = n_embd, K = this process's part of C (attention)
or 4C (MLP).
"""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels.collectives import functional_all_reduce
from nanosync.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The tensor-parallel ranks that this process holds, and with whom it shares the others.

    local=R, group=None simulates all ranks in one process; local=1 is tensor parallelism as usual; local=2
    on 4 processes runs 8 ranks on 4 GPUs. Process p holds ranks p * local to (p + 1) * local - 1.
    """

    local: int = 1
    group: dist.ProcessGroup | None = None
    trace: list | None = field(default=None, compare=False)  # g_op appends the shape of what it reduces
    dry: bool = False  # leave out all-reduces: wrong sums, but the time of everything else
    processes: int = field(init=False)
    index: int = field(init=False)  # of this process in the group
    group_name: str = field(init=False)  # by which compiled code knows the group

    def __post_init__(self):
        alone = self.group is None
        object.__setattr__(self, "processes", 1 if alone else dist.get_world_size(self.group))
        object.__setattr__(self, "index", 0 if alone else dist.get_rank(self.group))
        object.__setattr__(self, "group_name", "" if alone else self.group.group_name)

    def __deepcopy__(self, memo):
        return self  # a copy of a model is on the same ranks

    @property
    def size(self) -> int:
        return self.local * self.processes

    @property
    def as_one(self) -> "Ranks":
        """This process's ranks while they agree: one rank, as wide as all."""
        return replace(self, local=1)


def ranks_on(group, tp_size: int) -> Ranks:
    """tp_size ranks, divided among the processes of a group. Raises UserError."""
    processes = dist.get_world_size(group)
    if tp_size % processes:
        raise UserError(f"tp_processes={processes} does not divide tp_size={tp_size}: each process holds as "
                        f"many ranks as the others")
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
    """What is the same on all ranks, for each: (...) -> (local, ...) without a copy.

    Backward sums over this process's ranks and all-reduces over the group.
    """
    if ranks.group is not None and not ranks.dry:
        base = _Share.apply(base, ranks.group_name)
    return base.expand(ranks.local, *base.shape)


def g_op(partial: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over all ranks: (local, ...) -> (...), one all-reduce over the group. The adjoint of f_op."""
    # dtype: under autocast CUDA's sum would give fp32, and so would the residual stream be from there on
    total = partial.squeeze(0) if partial.shape[0] == 1 else partial.sum(dim=0, dtype=partial.dtype)
    if ranks.trace is not None:
        ranks.trace.append(tuple(total.shape))
    return total if ranks.group is None or ranks.dry else _Reduce.apply(total, ranks.group_name)


def column_parallel(x, linear: nn.Linear, parts: int = 1):
    """Each rank's rows of a matrix: x (m, B, T, C) -> (m, B, T, N / m), N the rows that this process has.

    parts: matrices that are stacked in it and each divided among the ranks, 3 for q, k and v.
    """
    m, B, T, C = x.shape
    if m == 1:
        return F.linear(x, linear.weight, linear.bias)
    weight = linear.weight.view(parts, m, -1, C).transpose(0, 1).reshape(m, -1, C)  # (m, N / m, C)
    y = torch.bmm(x.reshape(m, B * T, C), weight.transpose(1, 2))
    if linear.bias is not None:
        y = y + linear.bias.view(parts, m, -1).transpose(0, 1).reshape(m, 1, -1).to(y.dtype)
    return y.view(m, B, T, -1)


def row_parallel(y, weight, local: int, together: bool):
    """Each rank's columns of a matrix (C, K): y (m, B, T, K / m) -> partial sums (local, B, T, C).

    together: they are to be added up at once, so give their sum, (1, B, T, C), which is a single product.
    """
    m, B, T, _ = y.shape
    if together or local == 1:
        return F.linear(y.permute(1, 2, 0, 3).reshape(1, B, T, -1), weight)
    if m == 1:  # one tensor of all ranks' inputs, side by side
        y = y.view(B * T, local, -1).transpose(0, 1)
    w = weight.view(weight.shape[0], local, -1).permute(1, 2, 0)  # (local, K / local, C)
    return torch.bmm(y.reshape(local, B * T, -1) if m > 1 else y, w).view(local, B, T, -1)


def split_dimension(name: str) -> int | None:
    """The dimension over which ranks divide a parameter (or its optimizer state), None if all have it whole.

    That of c_attn is divided within each of q, k and v.
    """
    if "c_attn." in name or "c_fc." in name:
        return 0
    return 1 if "c_proj.weight" in name else None


def part_of(name: str, tensor: torch.Tensor, index: int, processes: int) -> torch.Tensor:
    """The part of a whole parameter that process `index` holds."""
    dim = split_dimension(name)
    if dim is None or tensor.dim() == 0:
        return tensor
    if "c_attn." in name:
        return torch.cat([part.chunk(processes)[index] for part in tensor.chunk(3)])
    return tensor.chunk(processes, dim)[index]


def join_parts(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `part_of`."""
    if "c_attn." in name:
        return torch.cat([torch.cat(qkv) for qkv in zip(*(part.chunk(3) for part in parts))])
    return torch.cat(parts, split_dimension(name))
