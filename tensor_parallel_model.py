"""GPT-2 whose tensor-parallel ranks synchronise by a schedule: one set of weights, simulated or real ranks.

In this module "rank" means TP rank. R = tp_size ranks split every attention over its heads and every MLP over
its units (Megatron-LM, arXiv 1909.08053). A rank's contribution to the residual stream is a partial sum. An
all-reduce adds the partial sums of all ranks. The model has 2L sublayers j (even: attention, odd: MLP). After
each sublayer the ranks may synchronise or not. The state is a base `s`, the same on every rank, and the
pending sum of each rank r, `d[r]`:

    x_j[r] = f(s) + d[r]                 residual stream on rank r
    o_j[r] = Sub_j[r](LN_j(x_j[r]))      partial output of rank r, without the bias
    s     += b_j                         bias of the row-parallel matrix, once
    d[r]  += o_j[r]
    if sync_j:  s += g(d);  d = 0        one all-reduce
    after the last sublayer: the same sync, if sums are pending

A `SyncSchedule` lists the sublayers that synchronise. If all do, the model is the dense GPT. Schedules whose
sums land later, or in some channels only, are in nanosync/delayed_residual.py. Any other schedule than the
dense one computes another function, so train a model with the schedule with which it will run. tp_size is
part of the architecture. The number of processes that hold the ranks is not, see `Ranks`. Parameters have the
dense model's names and shapes, or are this process's part of them. So any checkpoint fits any variant.

Shapes: m = number of local ranks whose streams differ; 1 while nothing is pending, because the local ranks
then agree and act as one. R = tp_size, P = processes of a group, B = batch, T = tokens, C = n_embd,
H = n_head, D = C / H, K = this process's part of C (attention) or 4C (MLP).
"""

import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels.collectives import functional_all_gather
from kernels.cross_entropy import vocab_parallel_cross_entropy
from kernels.pending_norm import pending_layer_norm
from model import GPT, Block, GPTConfig, attend, gelu
from nanosync.delayed_residual import DelayedResidual
from nanosync.errors import UserError
from nanosync.generation import Decoder
from nanosync.rank_decoder import RankDecoder
from nanosync.ranks import (
    Ranks,
    column_parallel,
    f_op,
    g_op,
    join_parts,
    part_of,
    row_parallel,
    split_dimension,
)
from nanosync.sharding import local_part
from nanosync.sync_schedule import Step, Sublayer, SyncSchedule

BLOCK_TYPES = ("tp", "spd", "parallel")
COUNTED = {}  # class, schedule, TP ranks of a model -> its all-reduces, see _count_syncs


class Residual:
    """The residual stream between two sublayers: base, biases and pending sums."""

    def __init__(self, ranks: Ranks, dropout, state: tuple):
        """Restore a stream. dropout: function (*tensors) -> tensors, with one mask for all tensors and ranks;
        state: `state` of the stream, or (base,), base (B, T, C)."""
        self.ranks, self.dropout = ranks, dropout
        if len(state) == 1:
            self._restart(*state)
        else:
            self.base, self.shared, self.biases, self.pending, self.latest, self.total = state

    @property
    def state(self) -> tuple:
        """The stream as a tuple of tensors and None, which the hooks of FSDP and checkpoint need."""
        return self.base, self.shared, self.biases, self.pending, self.latest, self.total

    def _restart(self, base):
        self.base = base  # (B, T, C)
        self.shared = f_op(base, self.ranks.as_one)  # (1, B, T, C); one f for all sublayers until a sync
        self.biases = None  # (C,), or (B, T, C) with dropout: sum of the biases since the last sync
        self.pending = None  # (local, B, T, C): pending sums without `latest`
        self.latest = None  # (local, B, T, C): output of the last sublayer, which is pending, too
        self.total = None  # (1, B, T, C): pending sums over local ranks, if a sync is next

    def normed(self, norm: nn.Module, sublayer: Sublayer):
        """Return the LayerNorm of the ranks' streams, which the sublayer reads, (m, B, T, C)."""
        x = self.shared if self.biases is None else self.shared + self.biases
        if self.latest is None:
            return norm(x)
        shape = self.latest.shape
        pending = None if self.pending is None else self.pending.flatten(1, 2)
        y, carried = pending_layer_norm(x.flatten(0, 2), pending, self.latest.flatten(1, 2), norm.weight,
                                        norm.bias, last=sublayer.sync)
        self.latest = None
        if sublayer.sync:
            self.total = carried.view(1, *shape[1:])
        else:
            self.pending = carried.view(shape)
        return y.view(shape)

    def add(self, y, projection: nn.Linear, sublayer: Sublayer):
        """Add the row-parallel projection of y (m, B, T, K / m), and synchronise if the sublayer does."""
        sync = sublayer.sync
        if sync and self.latest is None and self.total is None and self.ranks.group is None:
            out, bias = projection(y), None  # the same bits as the dense model
        else:
            out = row_parallel(y, projection, self.ranks.local, together=sync)
            bias = None if projection.bias is None else projection.bias.to(out.dtype)
        out, bias = self.dropout(out, bias)
        if sync:
            self._synchronise(out if self.total is None else out + self.total, bias)
            return
        self.latest = out
        if bias is not None:  # a copy, because FSDP frees a parameter at the end of its block
            self.biases = bias.clone() if self.biases is None else self.biases + bias

    def close(self):
        """Synchronise if sums are pending; return the base, (B, T, C)."""
        if self.latest is not None:
            self._synchronise(self.latest if self.pending is None else self.latest + self.pending, None)
        return self.base

    def _synchronise(self, partial, bias):
        base = self.base + g_op(partial, self.ranks)
        if bias is not None:
            base = base + bias
        if self.biases is not None:
            # Through f the biases get a partial gradient on each process. Their gradient through the base is
            # the same on all processes and must count once, so it is zero on all processes but the first.
            biases = self.biases
            base = base + (biases if self.ranks.index == 0 else biases.detach() + 0 * biases)
        self._restart(base)


def residual_of(sublayers) -> type:
    """Return the class of the residual stream that runs these sublayers."""
    return DelayedResidual if isinstance(sublayers[0], Step) else Residual


def split_attention(attn, x, cache=None, first=None):
    """Attend with the heads of each rank: x (m, B, T, C) -> (m, B, T, K / m).

    cache: tensor (local, 2, B, H / R, block_size, D) into which each rank's k and v are written. Without the
    first dimension it is the cache of one rank of the joint width. None in training.
    first: first token that each token sees, (B, T) int32; None for all tokens before it.
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
    first = None if first is None else first.repeat(m, 1)
    y = attend(q, k, v, first, attn.dropout if attn.training else 0.0)
    return y.transpose(1, 2).reshape(m, B, T, -1)


class RankBlock(Block):
    """A block with the dense block's parameters, of which each rank applies its part to its own stream."""

    def compute(self, state, sublayers, ranks: Ranks, dropout, cache=None, first=None):
        """Map the state of a residual stream before the layer to the state after it. sublayers: the layer's
        two entries of a plain schedule, or of the steps of any other; dropout: see Residual; cache, first:
        see split_attention."""
        residual, (attention, mlp) = residual_of(sublayers)(ranks, dropout, state), sublayers
        x = residual.normed(self.ln_1, attention)
        y = split_attention(self.attn, x, cache, first)
        residual.add(y, self.attn.c_proj, attention)
        x = residual.normed(self.ln_2, mlp)
        y = gelu(column_parallel(x, self.mlp.c_fc))
        residual.add(y, self.mlp.c_proj, mlp)
        return residual.state


@dataclass
class RanksConfig(GPTConfig):
    """GPTConfig and the number of ranks. Derived classes implement `schedule`."""

    tp_size: int = 2  # ranks of the architecture

    def __post_init__(self):
        super().__post_init__()
        if self.tp_size < 1 or self.n_head % self.tp_size:
            raise UserError(f"tp_size={self.tp_size} must divide n_head={self.n_head}: choose one of "
                            f"{[r for r in range(1, min(self.n_head, 512) + 1) if self.n_head % r == 0]}")

    def schedule(self) -> SyncSchedule:
        """Make the sync schedule of the configuration."""
        raise NotImplementedError


@dataclass
class DistributedGPTConfig(RanksConfig):
    """RanksConfig and a kind of block for each layer."""

    block_types: list | None = None  # 'tp', 'spd' or 'parallel' per layer; None: all 'tp', as the dense GPT

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
    """A GPT with the dense GPT's parameters and a sync schedule, on simulated or real ranks."""

    block_class = RankBlock

    def __init__(self, config: RanksConfig, ranks: Ranks | None = None):
        """Build and initialise the model. ranks: None simulates all ranks on this process. Raises UserError.

        On real ranks every process draws all weights, as the dense model does, and keeps its own part. So the
        caller must seed all processes alike.
        """
        if ranks is not None and ranks.size != config.tp_size:
            raise UserError(f"{ranks.processes} processes with {ranks.local} ranks each do not make "
                            f"tp_size={config.tp_size}: change one of the numbers")
        super().__init__(config)
        self.ranks = Ranks(config.tp_size)
        self._set_schedule(config.schedule())
        self.syncs = self._count_syncs()  # all-reduces of a forward pass through the layers
        self._n_parameters = super().n_parameters()
        self.shared_generator = None  # generator of the dropout masks that real ranks share
        if ranks is not None and ranks.group is not None:
            self.place(ranks)

    def _count_syncs(self) -> int:
        """Count the all-reduces of a forward pass by running one token through the layers, once for each
        schedule: on the meta device a layer takes 20 ms."""
        ranks, training, trace = self.ranks, self.training, []
        key = type(self), self.schedule, ranks.size
        if key not in COUNTED:
            self.ranks = replace(ranks, trace=trace)
            with torch.no_grad():
                self.eval().hidden(self.lm_head.weight.new_zeros(1, 1, dtype=torch.int64))
            self.ranks = ranks
            self.train(training)
            COUNTED[key] = len(trace)
        return COUNTED[key]

    def _set_schedule(self, schedule: SyncSchedule) -> None:
        self.schedule = schedule
        self.sublayers = schedule.sublayers if schedule.is_plain else schedule.steps()

    def reschedule(self, schedule: SyncSchedule) -> None:
        """Replace the schedule; the same weights then compute another function."""
        assert len(schedule.sublayers) == len(self.schedule.sublayers), "a schedule for another n_layer"
        self._set_schedule(schedule)
        self.syncs = self._count_syncs() if self.ranks.group is None else None

    @torch.no_grad()
    def place(self, ranks: Ranks) -> None:
        """Move a model from simulated to real ranks: keep this process's part of each weight."""
        assert self.ranks.group is None, "the model is on real ranks already"
        for name, parameter in list(self.named_parameters()):
            if split_dimension(name) is not None:
                owner, _, attribute = name.rpartition(".")
                part = part_of(name, parameter, ranks.index, ranks.processes)
                setattr(self.get_submodule(owner), attribute, nn.Parameter(part.clone()))
        self.ranks = ranks

    def hidden(self, idx, cache=None):
        """Map token ids (B, T) to the hidden states after ln_f (B, T, C). cache: one of split_attention for
        each layer, or None."""
        base = self._residual_dropout(self.embed(idx)[None])[0].squeeze(0)
        dropout, sublayers = self._residual_dropout, self.sublayers
        first, stream = self.first_visible(idx, cache), residual_of(sublayers)
        state = stream(self.ranks, dropout, (base,)).state
        for i, block in enumerate(self.transformer.h):
            state = block(state, sublayers[2 * i:2 * i + 2], self.ranks, dropout,
                          None if cache is None else cache[i], first)
        return self.transformer.ln_f(stream(self.ranks, dropout, state).close())

    def forward(self, idx, targets=None, all_logits: bool = False):
        """Map token ids (B, T) to (logits, loss), see GPT.forward. On real ranks each process computes the
        logits of its part of the vocabulary. Without targets the logits of all processes are gathered."""
        if self.ranks.group is None:
            return super().forward(idx, targets, all_logits)
        one = self.ranks.as_one
        x = f_op(self.hidden(idx), one).squeeze(0)
        first, last = self.vocab_range()
        weight = f_op(self.lm_head.weight, one).squeeze(0)[first:last]
        if targets is not None:
            return None, vocab_parallel_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), first,
                                                      self.ranks.group, fp8=self.head_fp8)
        return self.gather_logits(F.linear(x if all_logits else x[:, -1:], weight)), None

    def vocab_range(self) -> tuple[int, int]:
        """Return the range (first, last exclusive) of the vocabulary whose logits this process computes."""
        V, P = self.config.vocab_size, self.ranks.processes
        rows = -(-V // P)
        return min(self.ranks.index * rows, V), min((self.ranks.index + 1) * rows, V)

    def gather_logits(self, part):
        """Gather this process's logits (..., part of V) to all logits (..., V), without gradient."""
        if self.ranks.group is None:
            return part
        V, P = self.config.vocab_size, self.ranks.processes
        padded = F.pad(part.detach(), (0, -(-V // P) - part.shape[-1]))
        parts = functional_all_gather(padded, P, self.ranks.group_name)  # (P, ..., rows)
        return torch.cat(parts.unbind(), dim=-1)[..., :V]

    def _residual_dropout(self, *tensors):
        """Apply dropout with one mask for all tensors of a call and for all ranks; None stays None.

        A simulated schedule that synchronises everywhere draws the same masks as the dense model. Real ranks
        draw these masks from a shared generator, and attention's masks from a generator of each process,
        because their heads differ. So they have the dense model's distribution, but other masks.
        """
        p = self.config.dropout
        if p == 0 or not self.training:
            return tensors
        first = next(t for t in tensors if t is not None)
        if self.ranks.group is None and tensors[0].shape[0] == 1 and all(t is None for t in tensors[1:]):
            return F.dropout(first, p), *tensors[1:]  # the dense model's draw
        keep = torch.ones(first.shape[-3:], dtype=first.dtype, device=first.device)  # (B, T, C)
        if self.ranks.group is None:
            keep = F.dropout(keep, p)
        else:
            assert self.shared_generator is not None, "dropout on real ranks needs share_dropout() first"
            keep = keep.bernoulli_(1 - p, generator=self.shared_generator).div_(1 - p)
        return tuple(None if t is None else t * keep for t in tensors)

    def share_dropout(self, seed: int, dp_rank: int, device) -> torch.Generator:
        """Make the generator of the dropout masks that the processes of model number dp_rank share.

        Its seed differs from the seeds of the processes, seed + global rank.
        """
        self.shared_generator = torch.Generator(device).manual_seed((seed + 2**40 + dp_rank) % 2**63)
        for block in self.transformer.h:
            block.generator = self.shared_generator
        return self.shared_generator

    def n_parameters(self) -> int:
        return self._n_parameters  # over all processes of the model

    def split_parameters(self) -> list[nn.Parameter]:
        if self.ranks.group is None:
            return []
        return [p for name, p in self.named_parameters() if split_dimension(name) is not None]

    def partial_gradients(self) -> list[nn.Parameter]:
        """Return the undivided parameters of whose gradient each process has only its own ranks' share: the
        LayerNorms behind f, and the biases that ranks use before the next sync."""
        names = [f"transformer.h.{i}.ln_{n}." for i in range(self.config.n_layer) for n in (1, 2)]
        names += [f"transformer.h.{j // 2}.{('attn', 'mlp')[j % 2]}.c_proj.bias"
                  for j in self.schedule.read_before_landing()]
        return [p for name, p in self.named_parameters() if name.startswith(tuple(names))]

    @torch.no_grad()
    def reduce_partial_gradients(self) -> None:
        """Sum the gradients of `partial_gradients` over the group, in one all-reduce."""
        if self.ranks.group is None:
            return
        grads = [local_part(p.grad) for p in self.partial_gradients() if p.grad is not None]
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=self.ranks.group)
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad
                                     in zip(bucket.split([grad.numel() for grad in grads]), grads)])

    @torch.no_grad()
    def align_replicas(self, optimizer) -> None:
        """Broadcast undivided parameters and their optimizer state from the group's first process. GPUs add
        up the gradient of the embedding in no fixed order, so replicas drift apart by rounding."""
        if self.ranks.group is None:
            return
        divided = {id(p) for p in self.split_parameters()}
        for p in self.parameters():
            if id(p) not in divided:
                for tensor in (p, *(t for t in optimizer.state.get(p, {}).values() if t.dim() > 0)):
                    dist.broadcast(local_part(tensor), group_src=0, group=self.ranks.group)

    def save_pretrained(self, folder: str) -> None:
        """Write these weights as a dense GPT-2, see GPT.save_pretrained. Warn if this model's schedule
        computes another function of the weights. Raises UserError on real ranks."""
        if self.ranks.group is not None:
            raise UserError("the model is divided over several processes: save a checkpoint, and load it in "
                            "one process")
        if not self.schedule.is_dense and (self.config.tp_size > 1 or not self.schedule.is_plain):
            warnings.warn(f"{folder} gets a dense GPT-2, which computes another function than these weights "
                          f"do here with {self.syncs} syncs; convert.py keeps the schedule", stacklevel=2)
        super().save_pretrained(folder)

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gather the dense model's tensors from all processes' parts; all processes of the group call it."""
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
        """Make the Decoder of this model. tp_allreduce: see RankDecoder; options: see Decoder."""
        if self.ranks.group is None and self.schedule.is_dense:
            return Decoder(self, batch_size, **options)  # the model computes the dense GPT's function
        return RankDecoder(self, batch_size, tp_allreduce, **options)
