"""Text generation with a model of tensor-parallel ranks: one token per step on every rank."""

from functools import partial

import torch
import torch.nn.functional as F

from kernels import decode
from kernels.collectives import functional_all_gather
from kernels.exchange import GroupSum
from nanosync.delayed_decoding import DelayedSublayers
from nanosync.distributed import all_values, from_main
from nanosync.errors import UserError
from nanosync.generation import Decoder
from nanosync.ranks import part_of

SUM_OF = {  # tp_allreduce -> kind of GroupSum and SplitSums
    "nccl": "nccl",  # the group's all-reduce
    "oneshot": "oneshot",  # an exchange in one kernel; sums that land later: as 'fused'
    "fused": "oneshot",  # an exchange in two halves, which are parts of the kernels before and after it
}


def check_all_reduce(kind: str) -> None:
    """Raise UserError for an unknown tp_allreduce."""
    if kind not in SUM_OF:
        raise UserError(f"tp_allreduce={kind!r} is unknown: use {', '.join(SUM_OF)}")


class RankDecoder(Decoder):
    """Decoder for a schedule with pending sums, or for real ranks.

    Every TP rank caches the keys and values of its own heads. The residual stream is in fp32. `base` is the
    same on all TP ranks. A process with several TP ranks keeps copies of their weights, made when the decoder
    is built.

    DelayedSublayers runs the sublayers with tp_allreduce='fused', and those of schedules that are not plain.
    Else `seen[r]` is the stream of local TP rank r while sums are pending. `pending[r]` is the pending sum of
    local TP rank r, and `pending[0]` the buffer that the all-reduce reads.
    """

    def __init__(self, model, batch_size: int, tp_allreduce: str = "nccl", **options):
        """Allocate cache and buffers. Raises UserError.

        tp_allreduce: kind of sum over processes in a step, see SUM_OF. options: of Decoder.
        """
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
        self.layers = [[rank_weights(block, r, local) for r in range(local)] for block in model.transformer.h]
        kind = "none" if ranks.dry else SUM_OF[self.tp_allreduce]
        self.delayed = None
        if self.tp_allreduce == "fused" or not model.schedule.is_plain:
            self.delayed = DelayedSublayers(self, model.schedule, kind, all_values)
            self.sum_kind = self.delayed.sums.kind
            if self.tp_allreduce == "fused" and self.delayed.puts:
                self.sum_kind = "fused"
        else:
            self.seen = make_residual(local, B, C)
            self.group_sum = GroupSum(kind, make_residual(B, C), ranks.group, all_values)
            self.pending = [self.group_sum.buffer, *make_residual(local - 1, B, C)]
            self.sum_kind = self.group_sum.kind
        first, last = model.vocab_range()
        rows = -(-config.vocab_size // ranks.processes)
        head = model.lm_head.weight[first:last]
        self.head = head if len(head) == rows else F.pad(head, (0, 0, 0, rows - len(head)))
        self.logits = make_residual(B, rows * ranks.processes)  # gathered only without `candidates`
        self.part = self.logits if ranks.group is None else make_residual(B, rows)
        self.first_row, self.used_rows = first, min(last, self.used_vocab_size) - first
        top_k, self.candidates = self.sampling.top_k, None
        fewest = self.used_vocab_size - (ranks.processes - 1) * rows  # used rows of the last process
        if ranks.group is not None and top_k is not None and top_k <= fewest:
            # logits and ids of this process's top_k tokens
            self.candidates = GroupSum(kind, make_residual(2, B, top_k), ranks.group, all_values)
            self.own_ids = make(B, top_k, dtype=torch.int64)

    def run(self, idx, max_new_tokens: int):
        group = self.model.ranks.group
        if group is not None:  # equal random states, so that all processes draw the same tokens
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
        transformer = self.model.transformer
        decode.embed(self.token, self.position, transformer.wte.weight, transformer.wpe.weight, self.base,
                     None if self.delayed is None else self.delayed.sums.step)
        base = self.base
        if self.delayed is None:
            self._plain_sublayers(self.model.sublayers)
        else:
            base = self.delayed.run(self)
        decode.linear(base, self.head, None, self.part, norm=transformer.ln_f)
        self.position += 1
        self._draw()

    def _plain_sublayers(self, sublayers):
        pending = False
        for i, (weights, cache) in enumerate(zip(self.layers, self.cache)):
            pending = self._sublayer("attn", weights, pending, sublayers[2 * i].sync, cache)
            pending = self._sublayer("mlp", weights, pending, sublayers[2 * i + 1].sync)
        if pending:
            self._synchronise()

    def _sublayer(self, name, weights, pending: bool, sync: bool, cache=None) -> bool:
        """Run an attention or MLP on every local TP rank; return True if sums are pending after it.

        name: key of the row-parallel matrix in the weights.
        pending, sync: True if sums are pending before it; True if the ranks synchronise after it.
        cache: of an attention.
        """
        for r, w in enumerate(weights):
            x = self.seen[r] if pending else self.base
            y = self.mlp(x, w) if cache is None else self.attend(x, w, cache[r])
            matrix, bias = w[name]
            counts_bias = self.model.ranks.index == 0 and r == 0  # once in the sum over all ranks
            if not sync:
                decode.linear(y, matrix, bias, self.seen[r], residual=x, also=self.pending[r],
                              also_add=pending, also_bias=counts_bias)
            else:  # sum over local ranks in the buffer of the all-reduce
                total = self.pending[0]
                decode.linear(y, matrix, bias if counts_bias else None, total,
                              residual=total if pending or r > 0 else None)
        if sync:
            self._synchronise(also=self.pending[1:] if pending else ())
        return not sync

    def attend(self, x, w, cache, stream=None):
        """Attend with a TP rank's weights and cache; return the input of its row-parallel matrix."""
        decode.linear(x, *w["c_attn"], self.qkv, norm=w["ln_1"], stream=stream)
        return self.attention(self.qkv, cache, self.position, self.y)

    def mlp(self, x, w, stream=None):
        """Return the input of the row-parallel matrix of an MLP with a TP rank's weights."""
        return decode.linear(x, *w["c_fc"], self.h, norm=w["ln_2"], gelu=True, stream=stream)

    def _synchronise(self, also=None):
        """Add the pending sums of all ranks to `base`. also: pending sums to add to pending[0] first."""
        for pending in self.pending[1:] if also is None else also:
            self.pending[0].add_(pending)
        self.group_sum.add_to(self.base)

    def _draw(self):
        """Draw the same token on every process.

        With top_k each process sends only its own top_k logits, which include the top_k of all processes.
        """
        ranks = self.model.ranks
        if self.candidates is None:
            if ranks.group is not None:
                parts = functional_all_gather(self.part, ranks.processes, ranks.group_name)
                self.logits.copy_(parts.transpose(0, 1).flatten(1))  # (P, B, rows) -> (B, V)
            return super()._draw()
        mine = self.candidates.buffer
        torch.topk(self.part[:, :self.used_rows], self.sampling.top_k, sorted=False,
                   out=(mine[0], self.own_ids))
        torch.add(self.own_ids, self.first_row, out=mine[1])
        values, ids = self.candidates.gather()  # (B, P * top_k) each
        choice = self.sampling.draw(values)
        self.token.copy_(ids.gather(1, choice[:, None])[:, 0])


def rank_weights(block, r: int, local: int) -> dict:
    """Return the matrices, biases and LayerNorms of local TP rank r in a block, copies only if local > 1."""
    part = part_of if local > 1 else lambda name, tensor, r, local: tensor
    parts = {}
    for name, linear in (("c_attn", block.attn.c_attn), ("attn", block.attn.c_proj),
                         ("c_fc", block.mlp.c_fc), ("mlp", block.mlp.c_proj)):
        key = name if name.startswith("c_") else "c_proj"
        weight = part(f"{key}.weight", linear.weight, r, local).contiguous()
        bias = None if linear.bias is None else part(f"{key}.bias", linear.bias, r, local).contiguous()
        parts[name] = weight, bias
    return parts | {"ln_1": block.ln_1, "ln_2": block.ln_2}
