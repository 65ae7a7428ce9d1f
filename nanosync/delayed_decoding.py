"""The sublayers of a decoding step whose sums travel while later sublayers run.

A sum has two halves (kernels/exchange.py): put, at the end of the row-parallel matrix after which it is sent,
and take, at the beginning of the sublayer before which it lands. Both are parts of kernels that run anyway.
So a sum that lands at least one sublayer later costs no time of its own if it arrives meanwhile.

In this module "rank" means TP rank. Shapes: B = sequences, C = n_embd.
"""

import functools
from dataclasses import dataclass

import torch

from kernels import decode
from kernels.decode import Part
from kernels.exchange import SplitSums
from nanosync.sync_schedule import Step, width

FUSED_WIDTH = 1024  # up to so many channels each program of the next matrix takes the sum itself


@dataclass(frozen=True)
class Sums:
    """The sums of a step, numbered in the order in which they are put. The last is that of all that lands
    after the last sublayer."""

    taken: tuple[tuple[int, ...], ...]  # for each sublayer, the numbers of the sums that land before it
    put: tuple[int | None, ...]  # for each sublayer, the number of the sum that is put after it, or None
    span: int  # the most sums from the oldest that is not taken to the newest that was put

    @classmethod
    def of(cls, steps: tuple[Step, ...]) -> "Sums":
        """Number the sums of a schedule's steps."""
        packets, flight, lands = 0, [], []
        for step in steps:
            lands.append([flight[i] for i in step.lands])
            flight = [packet for packet in flight if packet not in lands[-1]]
            if step.sync:
                flight.append(packets)
                packets += 1
        landing = sorted(packet for row in lands for packet in row)
        number = {packet: n for n, packet in enumerate(landing)}
        order = iter(range(packets))
        put = [number.get(next(order)) if step.sync else None for step in steps]
        put[-1] = len(landing)
        taken = tuple(tuple(number[packet] for packet in row) for row in lands)
        return cls(taken, tuple(put), cls.span_of(taken, tuple(put)))

    @staticmethod
    def span_of(taken, put) -> int:
        """Return the most sums from the oldest that is not taken to the newest that was put."""
        outstanding, span = set(), 0
        for takes, n in zip(taken, put):
            outstanding -= set(takes)
            if n is not None:
                outstanding.add(n)
                span = max(span, n - min(outstanding) + 1)
        return span

    @property
    def count(self) -> int:
        return self.put[-1] + 1


class DelayedSublayers:
    """The sublayers of a schedule, with a decoder's weights and caches. See DelayedResidual for the rules.

    It keeps no reference to the decoder, which keeps one to it. So the memory of an unused decoder, which
    other GPUs can access, is freed at once, not by the garbage collector during the capture of a graph.
    """

    def __init__(self, decoder, schedule, kind: str, all_values):
        """Allocate the buffers. kind, all_values: see SplitSums; all processes must call this together."""
        self.steps = schedule.steps()
        B, C = decoder.base.shape
        local, self.W = decoder.model.ranks.local, width(schedule.channels, C)
        self.numbers = Sums.of(self.steps)
        widths = [self.W] * (self.numbers.count - 1) + [C]
        group = decoder.model.ranks.group
        self.sums = SplitSums(kind, decoder.base, widths, self.numbers.span, group, all_values)
        make = decoder.base.new_zeros
        self.bases = decoder.base, make(B, C)  # the base before and after a landing, in turns
        self.outs = make(len(self.steps), local, B, C)  # pending sum of each rank after each sublayer
        weight = decoder.layers[0][0]["attn"][0]
        # a half of a sum is a part of another kernel
        self.puts = self.sums.in_kernels and local == 1 and decode.runs_kernel(weight, B)
        self.takes = self.puts and (B > decode.VECTOR_ROWS or C <= FUSED_WIDTH)

    def run(self, decoder):
        """Run all sublayers of one token; return the base after the last.

        decoder: as in __init__.
        flight: (number of the sum, or None if it lands at the end; what the ranks sent) of each packet that
        has not landed, in the order of sending. pending: what the ranks have not sent. Both are Parts,
        (local, B, C).
        """
        base, flight, pending, last = self.bases[0], [], None, len(self.steps) - 1
        for j, step in enumerate(self.steps):
            takes = self.numbers.taken[j]
            flight = [packet for packet in flight if packet[0] is None or packet[0] not in takes]
            unsent = [part for part in (*(part for _, part in flight), pending) if part is not None]
            residual = pending if j < last or not unsent else total(unsent)  # the last sends all
            base = self._sublayer(decoder, j, base, unsent if step.sees != 0 else [], residual)
            pending = Part(self.outs[j])
            if step.sync and j < last:
                number = self.numbers.put[j]
                if number is None or number not in self.numbers.taken[j + 1]:  # else nothing reads the packet
                    flight.append((number, self._packet(j)))
                pending = None if self.W == base.shape[-1] else Part(self.outs[j], self.W)
        self.sums.take(self.numbers.put[last], base)
        return base

    def _packet(self, j: int) -> Part:
        """Return what is sent of the pending sums after a sublayer."""
        sums = self.outs[j]
        return Part(sums if self.W == sums.shape[-1] else sums - Part(sums, self.W).whole())

    def _sublayer(self, decoder, j: int, base, own: list, residual):
        """Let sums land, and run an attention or MLP; return the base after it.

        own: what the ranks see beside the base, Parts. residual: Part that is sent with its output.
        """
        takes, put = self.numbers.taken[j], self.numbers.put[j]
        own = own if len(own) <= decode.OWN else [total(own)]
        fused = self.takes and len(takes) == 1
        for number in () if fused else takes:
            self.sums.take(number, base)
        taken = dict(sums=self.sums, take=takes[0], landed=self.bases[base is self.bases[0]]) if fused else {}
        name, out = ("attn", "mlp")[j % 2], self.outs[j]
        puts = (self.sums, put) if self.puts and put is not None else None
        for r, w in enumerate(decoder.layers[j // 2]):
            stream = decode.Stream(tuple(part.of(r) for part in own), self.steps[j].sees, **taken)
            y = decoder.attend(base, w, decoder.cache[j // 2, r], stream) if name == "attn" else \
                decoder.mlp(base, w, stream)
            decode.linear(y, w[name][0], None, out[r], residual=None if residual is None else residual.of(r),
                          put=puts)
        base = taken.get("landed", base)
        if (bias := decoder.layers[j // 2][0][name][1]) is not None:
            base.add_(bias)
        if put is not None and puts is None:
            self.sums.put(put, out.sum(dim=0)[:, :self.sums.widths[put]])
        return base


def total(parts: list[Part]) -> Part:
    """Return the sum of parts, without a kernel if there is one."""
    if len(parts) == 1:
        return parts[0]
    return Part(functools.reduce(torch.add, (part.whole() for part in parts)))
