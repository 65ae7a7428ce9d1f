"""Text generation with a model of tensor-parallel ranks: one token per step on every rank."""

from functools import partial

import torch
import torch.nn.functional as F

from kernels import decode
from kernels.collectives import functional_all_gather
from kernels.exchange import ALL_REDUCES, GroupSum
from nanosync.distributed import all_values, from_main
from nanosync.errors import UserError
from nanosync.generation import Decoder
from nanosync.ranks import part_of
from nanosync.sync_schedule import width


def check_all_reduce(kind: str) -> None:
    """Raise UserError for an unknown tp_allreduce."""
    if kind not in ALL_REDUCES:
        raise UserError(f"tp_allreduce={kind!r} is unknown: use {' or '.join(ALL_REDUCES)}")


class RankDecoder(Decoder):
    """Decoder for a schedule with pending sums, or for real ranks.

    Every TP rank caches the keys and values of its own heads. The residual stream is in fp32. `base` is the
    same on all TP ranks. `seen[r]` is the stream of local TP rank r while sums are pending. `pending[r]` is
    the pending sum of local TP rank r, and `pending[0]` the buffer that the all-reduce reads. A process with
    several TP ranks keeps copies of their weights, made when the decoder is built.
    """

    def __init__(self, model, batch_size: int, tp_allreduce: str = "nccl", **options):
        """Allocate cache and buffers. Raises UserError.

        tp_allreduce: kind of sum over processes in a step, see GroupSum. options: of Decoder.
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
        self.seen = make_residual(local, B, C)
        kind = "none" if ranks.dry else self.tp_allreduce
        self.group_sum = GroupSum(kind, make_residual(B, C), ranks.group, all_values)
        self.sums = {C: self.group_sum}  # number of channels -> sum over processes
        if (W := width(model.schedule.channels, C)) < C:
            self.sums[W] = GroupSum(kind, make_residual(B, W), ranks.group, all_values)
        self.pending = [self.group_sum.buffer, *make_residual(local - 1, B, C)]
        self.layers = [[rank_weights(block, r, local) for r in range(local)] for block in model.transformer.h]
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
        transformer, sublayers = self.model.transformer, self.model.sublayers
        decode.embed(self.token, self.position, transformer.wte.weight, transformer.wpe.weight, self.base)
        if self.model.schedule.is_plain:
            self._plain_sublayers(sublayers)
        else:
            self._delayed_sublayers(sublayers)
        decode.linear(self.base, self.head, None, self.part, norm=transformer.ln_f)
        self.position += 1
        self._draw()

    def _plain_sublayers(self, sublayers):
        pending = False
        for i, (weights, cache) in enumerate(zip(self.layers, self.cache)):
            attend = partial(self._attend, cache=cache)
            pending = self._sublayer(attend, "attn", weights, pending, sublayers[2 * i].sync)
            pending = self._sublayer(self._mlp, "mlp", weights, pending, sublayers[2 * i + 1].sync)
        if pending:
            self._synchronise()

    def _delayed_sublayers(self, steps):
        """Run the sublayers of a schedule that is not plain, see DelayedResidual. A packet is (local, B, C),
        zero in the channels that are not synchronised."""
        pending, flight, (B, C) = None, [], self.base.shape
        out, W = self.base.new_empty(len(self.pending), B, C), width(steps[0].channels, C)
        for j, step in enumerate(steps):
            for i in step.lands:
                self._land(flight[i][..., :W])
            flight = [packet for i, packet in enumerate(flight) if i not in step.lands]
            unsent = [sums for sums in (*flight, pending) if sums is not None]
            seen = self.base + step.sees * sum(unsent) if unsent and step.sees != 0 else None
            name = ("attn", "mlp")[j % 2]
            for r, w in enumerate(self.layers[j // 2]):
                x = self.base if seen is None else seen[r]
                y = self._attend(x, w, r, self.cache[j // 2]) if name == "attn" else self._mlp(x, w, r)
                decode.linear(y, w[name][0], None, out[r])
            if (bias := self.layers[j // 2][0][name][1]) is not None:
                self.base.add_(bias)
            pending = out.clone() if pending is None else pending + out
            if step.sync:
                flight.append(F.pad(pending[..., :W], (0, C - W)))
                pending = None if W == C else F.pad(pending[..., W:], (W, 0))
        unsent = [sums for sums in (*flight, pending) if sums is not None]
        if unsent:
            self._land(sum(unsent))

    def _land(self, packet):
        """Add a packet of all ranks to the first channels of `base`. packet: (local, B, channels)."""
        group_sum = self.sums[packet.shape[-1]]
        torch.sum(packet, dim=0, out=group_sum.buffer)
        if packet.shape[-1] == self.base.shape[-1]:
            return group_sum.add_to(self.base)
        total = torch.zeros_like(group_sum.buffer)
        group_sum.add_to(total)
        self.base[:, :packet.shape[-1]] += total

    def _sublayer(self, compute, name, weights, pending: bool, sync: bool) -> bool:
        """Run an attention or MLP on every local TP rank; return True if sums are pending after it.

        compute: function (x, weights, local rank) -> input of the row-parallel matrix.
        name: key of the row-parallel matrix in the weights.
        pending, sync: True if sums are pending before it; True if the ranks synchronise after it.
        """
        for r, w in enumerate(weights):
            x = self.seen[r] if pending else self.base
            y = compute(x, w, r)
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

    def _attend(self, x, w, r, cache):
        decode.linear(x, *w["c_attn"], self.qkv, norm=w["ln_1"])
        return self.attention(self.qkv, cache[r], self.position, self.y)

    def _mlp(self, x, w, r):
        return decode.linear(x, *w["c_fc"], self.h, norm=w["ln_2"], gelu=True)

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
