"""The residual stream of schedules whose sums land later, in some channels, or unseen by the ranks.

    before sublayer j, every packet that is due lands:  s[:W] += g(packet);  u[r] -= packet
    x_j[r] = s + sees_j * u[r]           stream on rank r; u[r]: the rank's pending sum and packets in flight
    o_j[r] = Sub_j[r](LN_j(x_j[r]));     s += b_j;   pending[r] += o_j[r]
    if sync_j:  packet = pending[:W];    pending[:W] = 0
    after the last sublayer: everything pending or in flight, one g

W is the number of channels that are synchronised. Each landing begins a new version of the base, which ranks
read behind one f. The other channels have a single f, at the embedding. Schedules without any of this have a
faster stream, tensor_parallel_model.Residual.

Shapes: as in nanosync.ranks. A sum that no sublayer reads is kept as the sum over local ranks, m = 1.
"""

import torch
import torch.nn as nn

from nanosync.ranks import Ranks, f_op, g_op, row_parallel
from nanosync.sync_schedule import Step, width


class DelayedResidual:
    """The residual stream between two sublayers: base, biases, pending sums and packets in flight."""

    def __init__(self, ranks: Ranks, dropout, state: tuple):
        """Restore a stream. dropout: function (*tensors) -> tensors, with one mask for all tensors and ranks;
        state: `state` of the stream, or (base,), base (B, T, C)."""
        self.ranks, self.dropout = ranks, dropout
        if len(state) == 1:
            base, = state
            state = base, f_op(base, ranks.as_one), None, None, None, None
        self.base, self.shared, self.biases, self.unread, self.pending, self.kept, *self.flight = state

    @property
    def state(self) -> tuple:
        """The stream as a tuple of tensors and None, which the hooks of FSDP and checkpoint need."""
        return self.base, self.shared, self.biases, self.unread, self.pending, self.kept, *self.flight

    # base     (B, T, C)
    # shared   (1, B, T, C): the base as ranks read it, behind f
    # biases   (C,), or (B, T, C) with dropout: sum of the biases that ranks read and that are not in the base
    # unread   the last bias, before a sublayer reads it; None in a stream with fewer than all channels
    # pending  (m, B, T, W): outputs since the last packet
    # kept     (m, B, T, C - W): outputs in the channels that are not synchronised; None if W = C
    # flight   packets, (m, B, T, W) each, in the order of sending

    def normed(self, norm: nn.Module, step: Step):
        """Let packets land; return the LayerNorm of the ranks' streams, (m, B, T, C)."""
        landing = [self.flight[i] for i in step.lands]
        self.flight = [packet for i, packet in enumerate(self.flight) if i not in step.lands]
        if landing:
            self._land(landing)
        elif self.unread is not None:
            self.biases = self.unread if self.biases is None else self.biases + self.unread
        self.unread = None
        x = self.shared if self.biases is None else self.shared + self.biases
        if step.sees != 0:
            unsent = self._unsent()
            x = x if unsent is None else x + step.sees * unsent
        return norm(x)

    def add(self, y, projection: nn.Linear, step: Step):
        """Add the row-parallel projection of y (m, B, T, K / m), and send a packet if the step does."""
        out = row_parallel(y, projection, self.ranks.local, together=not step.apart)
        # a copy, because FSDP frees a parameter at the end of its block
        bias = None if projection.bias is None else projection.bias.to(out.dtype, copy=True)
        out, bias = self.dropout(out, bias)
        W = width(step.channels, out.shape[-1])
        if step.channels < 1:  # also if W is C: then all biases have partial gradients, as the schedule says
            self.kept = plus(self.kept, out[..., W:])
            self.biases = plus(self.biases, bias)
        else:
            self.unread = bias
        self.pending = plus(self.pending, out[..., :W])
        if step.sync:
            self.flight.append(self.pending)
            self.pending = None

    def close(self):
        """Add up what is pending or in flight; return the base, (B, T, C)."""
        base, total = self.base, self._unsent(together=True)
        if total is not None:
            base = base + g_op(total, self.ranks)
        return plus(plus(base, self._biases_once()), self.unread)

    def _unsent(self, together: bool = False):
        """Return pending sums and packets in flight, (m, B, T, C), summed over local ranks if `together`."""
        total, kept = None, self.kept
        for sums in (*self.flight, self.pending):
            if sums is not None:
                total = plus(total, sums.sum(0, keepdim=True, dtype=sums.dtype) if together else sums)
        if kept is None:
            return total
        kept = kept.sum(0, keepdim=True, dtype=kept.dtype) if together else kept
        if total is None:
            total = kept.new_zeros(*kept.shape[:-1], self.base.shape[-1] - kept.shape[-1])
        return torch.cat((total, kept), dim=-1)

    def _land(self, packets: list):
        """Add packets to the base, and begin its next version with the biases since the last."""
        W, biases = packets[0].shape[-1], self._biases_once()
        landed = sum(g_op(packet, self.ranks) for packet in packets)
        if W == self.base.shape[-1]:
            self.base = plus(plus(self.base + landed, biases), self.unread)
            self.shared, self.biases = f_op(self.base, self.ranks.as_one), None
            return
        head = plus(self.base[..., :W] + landed, None if biases is None else biases[..., :W])
        self.base = torch.cat((head, self.base[..., W:]), dim=-1)
        self.shared = torch.cat((f_op(head, self.ranks.as_one), self.shared[..., W:]), dim=-1)
        if biases is not None:
            rest = self.biases[..., W:]
            self.biases = torch.cat((rest.new_zeros(*rest.shape[:-1], W), rest), dim=-1)

    def _biases_once(self):
        """Return the biases with a gradient on the first process only: through f they have a partial gradient
        on each process, and the gradient through the base is the same on all."""
        once = self.biases is None or self.ranks.index == 0
        return self.biases if once else self.biases.detach() + 0 * self.biases


def plus(total, x):
    """Return total + x, where None is zero."""
    return x if total is None else total if x is None else total + x
