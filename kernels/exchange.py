"""A small tensor of every GPU to every GPU, in one kernel: sums or gathers between the steps of a decoder.

    slots[e % 2][r][i]  =  value i of rank r at its e-th exchange, and e, in the same 64 bits

Each rank writes its values into the slots that all others have for it and waits until its own slots show the
number of this exchange. A value and its number arrive together, because 64 aligned bits do, so there is no
barrier and no flag: the latency is that of one write to a peer (NCCL's low-latency protocol is built on the
same). Two sets of slots are enough: who writes exchange e + 2 has seen all of exchange e + 1, which a rank
writes after it has read all of exchange e.

The sum adds ranks up in the same order on all of them, so all get the same bits.

Shapes: n values, P ranks.
"""

import functools

import torch
import torch.distributed as dist

from kernels import triton, usable
from kernels.collectives import functional_all_gather

ALL_REDUCES = ("nccl", "oneshot")  # how a decoding step can sum over processes
MAX_VALUES = 1 << 16  # above, twice the bytes cost more than a barrier
BLOCK = 256


class Exchange:
    """One rank's side. All ranks make the same calls; a captured CUDA graph may hold them."""

    def __init__(self, slots: torch.Tensor, addresses: list[int], rank: int, n: int):
        """slots: (2, P, n) int64 zeros in memory that the other ranks can write, on all ranks before any of
        them exchanges; addresses: of every rank's slots, as this GPU reaches them; rank: this one's.
        """
        self.slots, self.rank, self.n, self.ranks = slots, rank, n, len(addresses)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=slots.device)
        self.grid = triton.cdiv(n, BLOCK)
        self.count = torch.zeros(self.grid, dtype=torch.int32, device=slots.device)

    def add_to(self, base: torch.Tensor, values: torch.Tensor) -> None:
        """base += the sum of all ranks' values. Both hold n fp32 values."""
        self._launch(values, base, self.n, gather=False)

    def gather(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """out (..., P, K) = all ranks' values (..., K), fp32."""
        self._launch(values, out, values.shape[-1], gather=True)

    def _launch(self, values, out, width: int, gather: bool) -> None:
        _exchange_kernel[(self.grid,)](
            values, out, self.addresses, self.count, self.n, width, RANK=self.rank, RANKS=self.ranks,
            BLOCK_R=triton.next_power_of_2(self.ranks), BLOCK=BLOCK, GATHER=gather, num_warps=8)


@functools.cache
def _without_symmetric_memory(group, device: torch.device, all_values) -> bool:
    """Whether the group cannot use symmetric memory; if so, its first process prints the reason, once."""
    problem = "it needs CUDA" if device.type != "cuda" else None if usable(torch.empty(0, device=device)) \
        else "it needs Triton"
    if problem is None:
        try:
            _symmetric((1,), torch.int64, device, group)
        except (ImportError, AttributeError, RuntimeError) as e:
            problem = str(e).splitlines()[0]
    problem = next(filter(None, all_values(problem, group)), None)  # all processes or none
    if problem is not None and dist.get_rank(group) == 0:
        print(f"tp_allreduce='oneshot' does not work here ({problem}): using the group's own all-reduce",
              flush=True)
    return problem is not None


def _symmetric(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group):
    """Zeros in memory that all GPUs of the group can reach, and that memory's handle."""
    import torch.distributed._symmetric_memory as symmetric_memory

    shared = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(shared, group.group_name)
    return shared.zero_(), handle


class GroupSum:
    """The sum of a small tensor over a group, computed again and again, also inside a CUDA graph: how a
    decoding step synchronises.

    kind: 'nccl' (the group's own all-reduce); 'oneshot' (an Exchange; tensors of more than MAX_VALUES use
    'nccl'); or 'none', which adds only this process's buffer, to measure what communication costs.
    buffer: fp32, where each process puts its summand.
    all_values: function (value, group) -> the values of all processes of the group, in a list, on each.
    """

    def __init__(self, kind: str, buffer: torch.Tensor, group, all_values):
        assert kind in ("none", *ALL_REDUCES), f"unknown kind {kind!r}"
        self.kind, self.buffer, self.group = "none" if group is None else kind, buffer, group
        if self.kind == "oneshot" and (
                buffer.numel() > MAX_VALUES or buffer.dtype != torch.float32
                or _without_symmetric_memory(group, buffer.device, all_values)):
            self.kind = "nccl"
        if self.kind == "oneshot":
            shape = 2, dist.get_world_size(group), buffer.numel()
            slots, handle = _symmetric(shape, torch.int64, buffer.device, group)
            torch.cuda.synchronize(buffer.device)
            dist.barrier(group=group)  # all slots are zero before any rank writes
            self._exchange = Exchange(slots, handle.buffer_ptrs, dist.get_rank(group),
                                               buffer.numel())

    def add_to(self, base: torch.Tensor) -> None:
        """base += the sum of all processes' buffers. The buffer's content is lost."""
        if self.kind == "oneshot":
            return self._exchange.add_to(base, self.buffer)
        if self.kind == "nccl":
            dist.all_reduce(self.buffer, group=self.group)
        base.add_(self.buffer)

    def gather(self) -> torch.Tensor:
        """The buffers (..., K) of all P processes side by side, (..., P * K); 'none' has its own P times."""
        processes = 1 if self.group is None else dist.get_world_size(self.group)
        if self.kind == "oneshot":
            out = self.buffer.new_empty(*self.buffer.shape[:-1], processes, self.buffer.shape[-1])
            self._exchange.gather(out, self.buffer)
        elif self.kind == "nccl":
            parts = functional_all_gather(self.buffer, processes, self.group.group_name)
            out = parts.movedim(0, -2)
        else:
            out = self.buffer.unsqueeze(-2).expand(*self.buffer.shape[:-1], processes, -1)
        return out.flatten(-2)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _exchange_kernel(values_ptr, out_ptr, addresses_ptr, count_ptr, n, width, RANK: tl.constexpr,
                         RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
                         GATHER: tl.constexpr):
        """One program: BLOCK values of all ranks."""
        program = tl.program_id(0)
        i = program * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        count = tl.load(count_ptr + program) + 1
        number = count.to(tl.int64) << 32
        first = (count & 1) * RANKS * n  # of the slots of this exchange
        value = tl.load(values_ptr + i, mask=mask, other=0.0)
        bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        for peer in tl.static_range(RANKS):
            slots = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(slots + first + RANK * n + i, number | bits, mask=mask)
        r = tl.arange(0, BLOCK_R)[:, None]
        own = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64)) + first + r * n + i[None, :]
        wanted = (r < RANKS) & mask[None, :]
        got = tl.load(own, mask=wanted, other=0, volatile=True)
        missing = tl.max(tl.max((wanted & ((got >> 32) != count)).to(tl.int32), axis=1), axis=0)
        while missing > 0:
            got = tl.load(own, mask=wanted, other=0, volatile=True)
            missing = tl.max(tl.max((wanted & ((got >> 32) != count)).to(tl.int32), axis=1), axis=0)
        arrived = (got & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        if GATHER:
            place = (i // width)[None, :] * (RANKS * width) + r * width + (i % width)[None, :]
            tl.store(out_ptr + place, arrived, mask=wanted)
        else:
            total = tl.sum(tl.where(wanted, arrived, 0.0), axis=0)
            tl.store(out_ptr + i, tl.load(out_ptr + i, mask=mask, other=0.0) + total, mask=mask)
        tl.debug_barrier()
        tl.store(count_ptr + program, count)
