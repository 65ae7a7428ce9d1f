"""GPT-2 whose tensor-parallel ranks synchronise by a schedule: one set of weights, simulated or real ranks.

R = tp_size ranks split every attention over its heads and every MLP over its units (Megatron-LM, arXiv
1909.08053). What a rank adds to the residual stream is a partial sum; an all-reduce turns the partial sums of
all ranks into the same whole one. There are 2L sublayers j (even: attention, odd: MLP), and after each the
ranks may synchronise or not. The state is a base `s`, the same on every rank, and what rank r has not yet
shared, `d[r]`:

    x_j[r] = f(s) + d[r]                 what rank r sees
    o_j[r] = Sub_j[r](LN_j(x_j[r]))      its partial output, without the bias
    s     += b_j                         the bias of the row-parallel matrix, once
    d[r]  += o_j[r]
    if sync_j:  s += g(d);  d = 0        one all-reduce
    after the last sublayer: the same, if anything is pending

Which sublayers synchronise is data, a `SyncSchedule`; all of them give the dense GPT. Dropping some computes
another function: a model is trained with the schedule that it is to run with.

tp_size belongs to the architecture, not the number of processes that hold the ranks: see `Ranks`. Parameters
have the dense model's names and shapes, or this process's part of them, so any checkpoint fits any variant.

Shapes: m ranks that differ; 1 while nothing is pending, as this process's ranks then agree and act as one.
R = tp_size, P processes of a group, B batch, T tokens, C = n_embd, H = n_head, D = C / H, K = this process's
part of C (attention) or 4C (MLP).
"""

import contextlib
import warnings
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, noop_context_fn

from configurator import UserError
from distributed import GroupSum, from_main, functional_all_gather, functional_all_reduce, local_part
from kernels import decode
from kernels.cross_entropy import vocab_parallel_cross_entropy
from kernels.pending_norm import pending_layer_norm
from model import GPT, Block, Decoder, GPTConfig, gelu, sample_tokens, selective_contexts

BLOCK_TYPES = ("tp", "spd", "parallel")


@dataclass(frozen=True)
class Sublayer:
    """What happens after an attention or an MLP."""

    sync: bool  # all ranks add up what they have pending


@dataclass(frozen=True)
class SyncSchedule:
    """One entry a sublayer: attention of layer 0, MLP of layer 0, attention of layer 1, ..."""

    sublayers: tuple[Sublayer, ...]

    @classmethod
    def at(cls, n_layer: int, points) -> "SyncSchedule":
        """Synchronise after the sublayers in `points`, numbers from 0 to 2 n_layer - 1."""
        return cls(tuple(Sublayer(j in set(points)) for j in range(2 * n_layer)))

    @classmethod
    def evenly(cls, n_layer: int, syncs: int) -> "SyncSchedule":
        """So many syncs, equally far apart, the last at the end. Raises UserError if that cannot be."""
        if syncs < 1 or 2 * n_layer % syncs:
            raise UserError(f"{syncs} syncs do not divide the {2 * n_layer} sublayers of n_layer={n_layer}")
        return cls.at(n_layer, range(2 * n_layer // syncs - 1, 2 * n_layer, 2 * n_layer // syncs))

    @classmethod
    def from_block_types(cls, block_types: list[str]) -> "SyncSchedule":
        """'tp' synchronises after attention and MLP, 'spd' after the MLP, a run of 'parallel' at its end."""
        points = []
        for i, kind in enumerate(block_types):
            run_goes_on = kind == "parallel" and block_types[i + 1:i + 2] == ["parallel"]
            points += [2 * i] * (kind == "tp") + [2 * i + 1] * (not run_goes_on)
        return cls.at(len(block_types), points)

    @property
    def points(self) -> list[int]:
        """The sublayers after which ranks synchronise."""
        return [j for j, sublayer in enumerate(self.sublayers) if sublayer.sync]

    @property
    def unsynchronised(self) -> list[int]:
        """The others."""
        return [j for j, sublayer in enumerate(self.sublayers) if not sublayer.sync]


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


class Residual:
    """The residual stream on its way through the layers: base, pending sums, and what the ranks see."""

    def __init__(self, ranks: Ranks, dropout, state: tuple):
        """dropout: a function of tensors that get the same mask on all ranks; state: of a Residual that this
        one goes on from, or only a base (B, T, C)."""
        self.ranks, self.dropout = ranks, dropout
        if len(state) == 1:
            self._restart(*state)
        else:
            self.base, self.shared, self.biases, self.pending, self.latest, self.total = state

    @property
    def state(self) -> tuple:
        """Tensors and None: what a block takes and gives must be plain for FSDP's and checkpoint's hooks."""
        return self.base, self.shared, self.biases, self.pending, self.latest, self.total

    def _restart(self, base):
        self.base = base  # (B, T, C)
        self.shared = f_op(base, self.ranks.as_one)  # (1, B, T, C); one f for all sublayers until a sync
        self.biases = None  # (C,), or (B, T, C) with dropout: those added since the last sync
        self.pending = None  # (local, B, T, C), but for
        self.latest = None  # (local, B, T, C): what the last sublayer gave
        self.total = None  # (1, B, T, C): the sum over local ranks, once a sync is next

    def normed(self, norm: nn.Module, sync: bool):
        """LayerNorm of what the ranks see, (m, B, T, C), for a sublayer with or without a sync after it."""
        x = self.shared if self.biases is None else self.shared + self.biases
        if self.latest is None:
            return norm(x)
        shape = self.latest.shape
        pending = None if self.pending is None else self.pending.flatten(1, 2)
        y, carried = pending_layer_norm(x.flatten(0, 2), pending, self.latest.flatten(1, 2), norm.weight,
                                        norm.bias, last=sync)
        self.latest = None
        if sync:
            self.total = carried.view(1, *shape[1:])
        else:
            self.pending = carried.view(shape)
        return y.view(shape)

    def add(self, y, projection: nn.Linear, sync: bool):
        """Take in a sublayer's y (m, B, T, K / m) through its row-parallel projection."""
        if sync and self.latest is None and self.total is None and self.ranks.group is None:
            out, bias = projection(y), None  # to the bit what the dense model does
        else:
            out = row_parallel(y, projection.weight, self.ranks.local, together=sync)
            bias = None if projection.bias is None else projection.bias.to(out.dtype)
        out, bias = self.dropout(out, bias)
        if sync:
            self._synchronise(out if self.total is None else out + self.total, bias)
            return
        self.latest = out
        if bias is not None:  # a copy: FSDP takes a parameter back at the end of its block
            self.biases = bias.clone() if self.biases is None else self.biases + bias

    def close(self):
        """The base (B, T, C) with everything that was pending."""
        if self.latest is not None:
            self._synchronise(self.latest if self.pending is None else self.latest + self.pending, None)
        return self.base

    def _synchronise(self, partial, bias):
        base = self.base + g_op(partial, self.ranks)
        if bias is not None:
            base = base + bias
        if self.biases is not None:
            # The ranks saw these biases behind f, which leaves a partial gradient on each process; the
            # gradient of the base itself, the same on all, is to be counted once: elsewhere it is zero.
            biases = self.biases
            base = base + (biases if self.ranks.index == 0 else biases.detach() + 0 * biases)
        self._restart(base)


def split_attention(attn, x, cache=None):
    """The heads of each rank on what it sees: (m, B, T, C) -> (m, B, T, K / m).

    cache: (local, 2, B, H / R, block_size, D), if given, receives each rank's k and v; without the first
    dimension, one rank that is as wide as all.
    """
    m, B, T, C = x.shape
    D = C // attn.n_head
    q, k, v = (part.reshape(m * B, T, -1, D).transpose(1, 2)  # (m * B, heads, T, D)
               for part in column_parallel(x, attn.c_attn, parts=3).chunk(3, dim=-1))
    if cache is not None:
        cache = cache if cache.dim() == 6 else cache[None]
        local, heads = cache.shape[0], cache.shape[3]
        for i, new in enumerate((k, v)):
            new = new.reshape(m, B, local // m, heads, T, D).transpose(1, 2).reshape(local, B, heads, T, D)
            cache[:, i, :, :, :T] = new
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.dropout if attn.training else 0.0,
                                       is_causal=True)
    return y.transpose(1, 2).reshape(m, B, T, -1)


class RankBlock(Block):
    """A dense block's parameters, each rank's part of them on what it sees."""

    generator = None  # of the dropout masks that real ranks have in common

    def compute(self, state, sublayers, ranks: Ranks, dropout, cache=None):
        """A Residual's state before the layer -> that after it. sublayers: its two of the schedule."""
        residual, (after_attention, after_mlp) = Residual(ranks, dropout, state), sublayers
        x = residual.normed(self.ln_1, after_attention.sync)
        y = split_attention(self.attn, x, cache)
        residual.add(y, self.attn.c_proj, after_attention.sync)
        x = residual.normed(self.ln_2, after_mlp.sync)
        y = gelu(column_parallel(x, self.mlp.c_fc))
        residual.add(y, self.mlp.c_proj, after_mlp.sync)
        return residual.state

    def forward(self, *args):
        if self.generator is None or self.recompute == "none" or not torch.is_grad_enabled():
            return super().forward(*args)

        def contexts():  # PyTorch lets only its own generators draw again what they drew
            first, again = selective_contexts() if self.recompute == "selective" else noop_context_fn()
            rewind = _Rewind(self.generator)
            return _both(first, rewind.noted()), _both(again, rewind.back())

        return checkpoint(self.compute, *args, use_reentrant=False, context_fn=contexts)


class _Rewind:
    """Lets a generator draw again what it drew."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    @contextlib.contextmanager
    def noted(self):
        self.state = self.generator.get_state()
        yield

    @contextlib.contextmanager
    def back(self):
        now = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            yield
        finally:
            self.generator.set_state(now)


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


@dataclass
class RanksConfig(GPTConfig):
    """GPTConfig and the number of ranks; those derived from it have a `schedule()`."""

    tp_size: int = 2  # R, ranks of the architecture

    def __post_init__(self):
        super().__post_init__()
        if self.tp_size < 1 or self.n_head % self.tp_size:
            raise UserError(f"tp_size={self.tp_size} must divide n_head={self.n_head}: choose one of "
                            f"{[r for r in range(1, self.n_head + 1) if self.n_head % r == 0]}")

    def schedule(self) -> SyncSchedule:
        raise NotImplementedError


@dataclass
class DistributedGPTConfig(RanksConfig):
    """What kind of block each layer is: 'tp', 'spd' or 'parallel'; None: all 'tp', the dense function."""

    block_types: list | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.block_types is not None:
            self.block_types = list(self.block_types)
            if len(self.block_types) != self.n_layer:
                raise UserError(f"block_types has {len(self.block_types)} entries and n_layer is "
                                f"{self.n_layer}: give one for each layer")
            for i, kind in enumerate(self.block_types):
                if kind not in BLOCK_TYPES:
                    raise UserError(f"block_types[{i}]={kind!r} is unknown: use {', '.join(BLOCK_TYPES)}")

    def schedule(self) -> SyncSchedule:
        return SyncSchedule.from_block_types(self.block_types or ["tp"] * self.n_layer)


class DistributedGPT(GPT):
    """The dense GPT's parameters under a sync schedule, on simulated or real ranks."""

    block_class = RankBlock

    def __init__(self, config: RanksConfig, ranks: Ranks | None = None):
        """ranks: None simulates all of them here. With a group the model keeps its own part of the weights,
        which are drawn as the dense model draws them, so all processes must be seeded alike. Raises
        UserError.
        """
        if ranks is not None and ranks.size != config.tp_size:
            raise UserError(f"{ranks.processes} processes of {ranks.local} ranks do not make "
                            f"tp_size={config.tp_size}")
        super().__init__(config)
        self.ranks = Ranks(config.tp_size)
        self.schedule = config.schedule()
        self.syncs = self._count_syncs()  # all-reduces of a forward pass through the layers
        self._n_parameters = super().n_parameters()
        self.shared_generator = None  # draws the dropout masks that are the same on all real ranks
        if ranks is not None and ranks.group is not None:
            self.place(ranks)

    def _count_syncs(self) -> int:
        """Counted, not calculated: one token goes through the layers."""
        ranks, training, trace = self.ranks, self.training, []
        self.ranks = replace(ranks, trace=trace)
        with torch.no_grad():
            self.eval().hidden(self.lm_head.weight.new_zeros(1, 1, dtype=torch.int64))
        self.ranks = ranks
        self.train(training)
        return len(trace)

    def reschedule(self, schedule: SyncSchedule) -> None:
        """The same weights by another schedule: which computes another function."""
        assert len(schedule.sublayers) == len(self.schedule.sublayers), "a schedule for another n_layer"
        self.schedule = schedule
        self.syncs = self._count_syncs() if self.ranks.group is None else None

    @torch.no_grad()
    def place(self, ranks: Ranks) -> None:
        """Move from simulated to real ranks: keep this process's part of each weight."""
        assert self.ranks.group is None, "the model is on real ranks already"
        for name, parameter in list(self.named_parameters()):
            if split_dimension(name) is not None:
                owner, _, attribute = name.rpartition(".")
                part = part_of(name, parameter, ranks.index, ranks.processes)
                setattr(self.get_submodule(owner), attribute, nn.Parameter(part.clone()))
        self.ranks = ranks

    def hidden(self, idx, cache=None):
        """Token ids (B, T) -> the hidden states after ln_f (B, T, C). cache: a (local, 2, B, H / R,
        block_size, D) for each layer."""
        base = self._residual_dropout(self.embed(idx)[None])[0].squeeze(0)
        dropout, sublayers = self._residual_dropout, self.schedule.sublayers
        state = Residual(self.ranks, dropout, (base,)).state
        for i, block in enumerate(self.transformer.h):
            state = block(state, sublayers[2 * i:2 * i + 2], self.ranks, dropout,
                          None if cache is None else cache[i])
        return self.transformer.ln_f(Residual(self.ranks, dropout, state).close())

    def forward(self, idx, targets=None, all_logits: bool = False):
        """As GPT.forward. On real ranks each process computes the logits of its part of the vocabulary; they
        are gathered only if they are what was asked for."""
        if self.ranks.group is None:
            return super().forward(idx, targets, all_logits)
        one = self.ranks.as_one
        x = f_op(self.hidden(idx), one).squeeze(0)
        first, last = self.vocab_range()
        weight = f_op(self.lm_head.weight, one).squeeze(0)[first:last]
        if targets is not None:
            return None, vocab_parallel_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), first,
                                                      self.ranks.group)
        return self.gather_logits(F.linear(x if all_logits else x[:, -1:], weight)), None

    def vocab_range(self) -> tuple[int, int]:
        """First and last (exclusive) row of the vocabulary that this process computes logits of."""
        V, P = self.config.vocab_size, self.ranks.processes
        rows = -(-V // P)
        return min(self.ranks.index * rows, V), min((self.ranks.index + 1) * rows, V)

    def gather_logits(self, part):
        """This process's (..., part of V) -> all logits (..., V), the same on every process; no gradient."""
        if self.ranks.group is None:
            return part
        V, P = self.config.vocab_size, self.ranks.processes
        padded = F.pad(part.detach(), (0, -(-V // P) - part.shape[-1]))
        parts = functional_all_gather(padded, P, self.ranks.group_name)  # (P, ..., rows)
        return torch.cat(parts.unbind(), dim=-1)[..., :V]

    def _residual_dropout(self, *tensors):
        """Dropout with one mask for all tensors of a call, and for all ranks; None stays None.

        A simulated schedule that synchronises everywhere draws what the dense model draws. Real ranks draw
        these masks from a generator that they share, and those of attention each from its own, as their heads
        differ: the dense model's distribution, other draws.
        """
        p = self.config.dropout
        if p == 0 or not self.training:
            return tensors
        first = next(t for t in tensors if t is not None)
        if self.ranks.group is None and tensors[0].shape[0] == 1 and all(t is None for t in tensors[1:]):
            return F.dropout(first, p), *tensors[1:]  # as the dense model draws it
        keep = torch.ones(first.shape[-3:], dtype=first.dtype, device=first.device)  # (B, T, C)
        if self.ranks.group is None:
            keep = F.dropout(keep, p)
        else:
            assert self.shared_generator is not None, "dropout on real ranks needs share_dropout() first"
            keep = keep.bernoulli_(1 - p, generator=self.shared_generator).div_(1 - p)
        return tuple(None if t is None else t * keep for t in tensors)

    def share_dropout(self, seed: int, dp_rank: int, device) -> torch.Generator:
        """Make the generator of the masks that all real ranks of this model, the dp_rank-th, have in common.

        Its stream is none of those that processes are seeded with, seed + rank.
        """
        self.shared_generator = torch.Generator(device).manual_seed((seed + 2**40 + dp_rank) % 2**63)
        for block in self.transformer.h:
            block.generator = self.shared_generator
        return self.shared_generator

    def n_parameters(self) -> int:
        return self._n_parameters  # of all processes of the model

    def split_parameters(self) -> list[nn.Parameter]:
        if self.ranks.group is None:
            return []
        return [p for name, p in self.named_parameters() if split_dimension(name) is not None]

    def partial_gradients(self) -> list[nn.Parameter]:
        """Those that every process has whole, but of whose gradient it has only its own ranks' share:
        the LayerNorms behind f and the biases that ranks see before they synchronise."""
        names = [f"transformer.h.{i}.ln_{n}." for i in range(self.config.n_layer) for n in (1, 2)]
        names += [f"transformer.h.{j // 2}.{('attn', 'mlp')[j % 2]}.c_proj.bias"
                  for j in self.schedule.unsynchronised]
        return [p for name, p in self.named_parameters() if name.startswith(tuple(names))]

    @torch.no_grad()
    def reduce_partial_gradients(self) -> None:
        """Sum them over the group, in one all-reduce."""
        if self.ranks.group is None:
            return
        grads = [local_part(p.grad) for p in self.partial_gradients() if p.grad is not None]
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=self.ranks.group)
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad
                                     in zip(bucket.split([grad.numel() for grad in grads]), grads)])

    @torch.no_grad()
    def align_replicas(self, optimizer) -> None:
        """GPUs add up the gradient of the embedding in no fixed order, so replicas drift apart by rounding;
        the first process's count."""
        if self.ranks.group is None:
            return
        divided = {id(p) for p in self.split_parameters()}
        for p in self.parameters():
            if id(p) not in divided:
                for tensor in (p, *(t for t in optimizer.state.get(p, {}).values() if t.dim() > 0)):
                    dist.broadcast(local_part(tensor), group_src=0, group=self.ranks.group)

    def save_pretrained(self, folder: str) -> None:
        """As GPT.save_pretrained; what is written is the dense GPT with these weights, and says so if this
        model's schedule makes another function of them. Raises UserError on real ranks."""
        if self.ranks.group is not None:
            raise UserError("the model lies in parts on several processes: save its checkpoint, and load "
                            "that in one")
        if self.schedule.unsynchronised and self.config.tp_size > 1:
            warnings.warn(f"{folder} gets a dense GPT-2; with the schedule that these weights have here "
                          f"({self.syncs} syncs) they are another function", stacklevel=2)
        super().save_pretrained(folder)

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the dense model has under these names. All processes of the group take part."""
        if self.ranks.group is None:
            return tensors
        result = {}
        for name, tensor in tensors.items():
            if split_dimension(name) is None or tensor.dim() == 0:
                result[name] = tensor
                continue
            parts = functional_all_gather(tensor, self.ranks.processes, self.ranks.group_name)
            result[name] = join_parts(name, list(parts))
        return result

    def own_part(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.ranks.group is None:
            return tensors
        return {name: part_of(name, tensor, self.ranks.index, self.ranks.processes)
                for name, tensor in tensors.items()}

    def decoder(self, batch_size: int, tp_allreduce: str = "nccl", **options) -> Decoder:
        """What generates from this model; see Decoder and RankDecoder."""
        if self.ranks.group is None and not self.schedule.unsynchronised:
            return Decoder(self, batch_size, **options)  # computes what the dense GPT does
        return RankDecoder(self, batch_size, tp_allreduce, **options)


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


class RankDecoder(Decoder):
    """Decoder for a schedule that leaves sums pending, or for real ranks: see Decoder for what it does.

    Every rank caches the keys and values of its own heads on what it saw. The residual stream is in fp32:
    `base`, the same on all ranks; `seen[r]`, what local rank r sees while something is pending; `pending[r]`,
    of which the first is the buffer that the all-reduce reads. A process that holds several ranks keeps
    copies of their weights as they are when the decoder is made.
    """

    def __init__(self, model: DistributedGPT, batch_size: int, tp_allreduce: str = "nccl", **options):
        """tp_allreduce: how one-token steps sum over processes, see GroupSum."""
        self.tp_allreduce = tp_allreduce
        super().__init__(model, batch_size, **options)

    def allocate(self, B, make):
        model, config, ranks = self.model, self.model.config, self.model.ranks
        C, local, R = config.n_embd, ranks.local, config.tp_size
        heads, D = config.n_head // R, C // config.n_head
        self.cache = make(config.n_layer, local, 2, B, heads, self.block_size, D)
        self.attention = decode.Attention(self.cache[:, 0])
        self.qkv, self.y, self.h = make(B, 3 * C // R), make(B, C // R), make(B, 4 * C // R)
        make_residual = partial(make, dtype=self.residual_dtype)
        self.base = make_residual(B, C)
        self.seen = make_residual(local, B, C)
        kind = "none" if ranks.dry else self.tp_allreduce
        self.group_sum = GroupSum(kind, make_residual(B, C), ranks.group)
        self.pending = [self.group_sum.buffer, *make_residual(local - 1, B, C)]
        self.layers = [[rank_weights(block, r, local) for r in range(local)] for block in model.transformer.h]
        first, last = model.vocab_range()
        rows = -(-config.vocab_size // ranks.processes)
        head = model.lm_head.weight[first:last]
        self.head = head if len(head) == rows else F.pad(head, (0, 0, 0, rows - len(head)))
        self.logits = make_residual(B, rows * ranks.processes)  # whole only if all are needed
        self.part = self.logits if ranks.group is None else make_residual(B, rows)
        self.first_row, self.used_rows = first, min(last, self.used_vocab_size) - first
        top_k, self.candidates = self.sampling["top_k"], None
        fewest = self.used_vocab_size - (ranks.processes - 1) * rows  # used rows of the last process
        if ranks.group is not None and top_k is not None and top_k <= fewest:
            # logits and ids of this process's most likely tokens
            self.candidates = GroupSum(kind, make_residual(2, B, top_k), ranks.group)
            self.own_ids = make(B, top_k, dtype=torch.int64)

    def run(self, idx, max_new_tokens: int):
        group = self.model.ranks.group
        if group is not None:  # all processes draw the same tokens from the same logits
            device = None if self.device.type == "cpu" else self.device
            states = from_main((torch.get_rng_state(), device and torch.cuda.get_rng_state(device)), group)
            torch.set_rng_state(states[0])
            if device is not None:
                torch.cuda.set_rng_state(states[1], device)
        return super().run(idx, max_new_tokens)

    def prefill(self, idx):
        x = self.model.hidden(idx, self.cache)
        self.part.copy_(F.linear(x[:, -1], self.head))
        self.position.fill_(idx.shape[1])
        self._draw()

    def step(self):
        transformer, sublayers = self.model.transformer, self.model.schedule.sublayers
        decode.embed(self.token, self.position, transformer.wte.weight, transformer.wpe.weight, self.base)
        pending = False
        for i, (weights, cache) in enumerate(zip(self.layers, self.cache)):
            attend = partial(self._attend, cache=cache)
            pending = self._sublayer(attend, "attn", weights, pending, sublayers[2 * i].sync)
            pending = self._sublayer(self._mlp, "mlp", weights, pending, sublayers[2 * i + 1].sync)
        if pending:
            self._synchronise()
        decode.linear(self.base, self.head, None, self.part, norm=transformer.ln_f)
        self.position += 1
        self._draw()

    def _sublayer(self, compute, name, weights, pending: bool, sync: bool) -> bool:
        """An attention or MLP on every local rank; whether something is pending after it."""
        for r, w in enumerate(weights):
            x = self.seen[r] if pending else self.base
            y = compute(x, w, r)
            matrix, bias = w[name]
            counts_bias = self.model.ranks.index == 0 and r == 0  # in the sum over all ranks it is there once
            if not sync:
                decode.linear(y, matrix, bias, self.seen[r], residual=x, also=self.pending[r],
                              also_add=pending, also_bias=counts_bias)
            else:  # all local ranks into the buffer of the all-reduce
                total = self.pending[0]
                decode.linear(y, matrix, bias if counts_bias else None, total,
                              residual=total if pending or r > 0 else None)
        if sync:
            self._synchronise(also=self.pending[1:] if pending else ())
        return not sync

    def _attend(self, x, w, r, cache):
        decode.linear(x, *w["c_attn"], self.qkv, norm=w["ln_1"])
        return self.attention(self.qkv, cache[r], self.position, self.y)

    def _mlp(self, x, w, r):
        return decode.linear(x, *w["c_fc"], self.h, norm=w["ln_2"], gelu=True)

    def _synchronise(self, also=None):
        """base += the sum of what all ranks have pending."""
        for pending in self.pending[1:] if also is None else also:
            self.pending[0].add_(pending)
        self.group_sum.add_to(self.base)

    def _draw(self):
        """The same token on every process: from all logits, or, with top_k, from the most likely ones of
        each process, among which are the most likely of all."""
        ranks = self.model.ranks
        if self.candidates is None:
            if ranks.group is not None:
                parts = functional_all_gather(self.part, ranks.processes, ranks.group_name)
                self.logits.copy_(parts.transpose(0, 1).flatten(1))  # (P, B, rows) -> (B, V)
            return super()._draw()
        mine = self.candidates.buffer
        torch.topk(self.part[:, :self.used_rows], self.sampling["top_k"], sorted=False,
                   out=(mine[0], self.own_ids))
        torch.add(self.own_ids, self.first_row, out=mine[1])
        values, ids = self.candidates.gather()  # (B, P * top_k) each
        choice = sample_tokens(values, **self.sampling)
        self.token.copy_(ids.gather(1, choice[:, None])[:, 0])


def rank_weights(block, r: int, local: int) -> dict:
    """The matrices and biases of one of this process's ranks, of a layer: themselves if there is one only."""
    part = part_of if local > 1 else lambda name, tensor, r, local: tensor
    parts = {}
    for name, linear in (("c_attn", block.attn.c_attn), ("attn", block.attn.c_proj),
                         ("c_fc", block.mlp.c_fc), ("mlp", block.mlp.c_proj)):
        key = name if name.startswith("c_") else "c_proj"
        weight = part(f"{key}.weight", linear.weight, r, local).contiguous()
        bias = None if linear.bias is None else part(f"{key}.bias", linear.bias, r, local).contiguous()
        parts[name] = weight, bias
    return parts | {"ln_1": block.ln_1, "ln_2": block.ln_2}
