"""Exchange of a small tensor between all GPUs in one kernel, for sums and gathers in a decoder's steps.

    slots[e % 2][r][i]  =  value i of rank r in its e-th exchange, and e, in the same 64 bits

In this module "rank" means the rank of a process in the group. Each rank writes its values into its slots on
all ranks, and waits until its own slots show the number of this exchange. A write of 64 aligned bits is
atomic, so a value and its number arrive together, without a barrier or a flag. The latency is that of one
write to a peer. (NCCL's low-latency protocol works in the same way.) Two sets of slots are enough: a rank
that writes exchange e + 2 has received all of exchange e + 1, and each rank wrote that exchange after it had
read all of exchange e.

All ranks add up the values in the same order, so all get the same bits.

Shapes: n = values, P = ranks.
"""

import functools

import torch
import torch.distributed as dist

from kernels import triton, usable
from kernels.collectives import functional_all_gather

ALL_REDUCES = ("nccl", "oneshot")  # kinds of sum over processes in a decoding step
MAX_VALUES = 1 << 16  # for larger tensors the doubled bytes cost more than a barrier
BLOCK = 256


class Exchange:
    """Exchange on the side of one rank. All ranks make the same calls, also from captured CUDA graphs."""

    def __init__(self, slots: torch.Tensor, addresses: list[int], rank: int, n: int):
        """Prepare the exchange. The slots of all ranks must be zero before any rank exchanges.

        slots: (2, P, n) int64 zeros in memory that the other ranks can write.
        addresses: addresses of all ranks' slots on this GPU.
        rank, n: this rank; number of values.
        """
        self.slots, self.rank, self.n, self.ranks = slots, rank, n, len(addresses)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=slots.device)
        self.grid = triton.cdiv(n, BLOCK)
        self.count = torch.zeros(self.grid, dtype=torch.int32, device=slots.device)

    def add_to(self, base: torch.Tensor, values: torch.Tensor) -> None:
        """Add the sum of all ranks' values to base. values, base: n fp32 values each."""
        self._launch(values, base, self.n, gather=False)

    def gather(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Gather all ranks' values (..., K) into out (..., P, K), fp32."""
        self._launch(values, out, values.shape[-1], gather=True)

    def _launch(self, values, out, width: int, gather: bool) -> None:
        _exchange_kernel[(self.grid,)](
            values, out, self.addresses, self.count, self.n, width, RANK=self.rank, RANKS=self.ranks,
            BLOCK_R=triton.next_power_of_2(self.ranks), BLOCK=BLOCK, GATHER=gather, num_warps=8)


@functools.cache
def _without_symmetric_memory(group, device: torch.device, all_values) -> bool:
    """Return True if the group cannot use symmetric memory; its first process prints the reason once."""
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
    """Allocate zeros in memory that all GPUs of the group can access; return the tensor and its handle."""
    import torch.distributed._symmetric_memory as symmetric_memory

    shared = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(shared, group.group_name)
    return shared.zero_(), handle


class GroupSum:
    """Repeated sum of a small tensor over a group, also inside a CUDA graph, for the syncs of decoding steps.

    kind: 'nccl' (the group's all-reduce), 'oneshot' (an Exchange; tensors of more than MAX_VALUES use
        'nccl'), or 'none' (adds only this process's buffer, to measure the cost of communication).
    buffer: fp32 tensor into which each process writes its summand.
    all_values: function (value, group) -> list of the values of all processes, on every process.
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
        """Add the sum of all processes' buffers to base. The buffer's content is lost."""
        if self.kind == "oneshot":
            return self._exchange.add_to(base, self.buffer)
        if self.kind == "nccl":
            dist.all_reduce(self.buffer, group=self.group)
        base.add_(self.buffer)

    def gather(self) -> torch.Tensor:
        """Concatenate the buffers (..., K) of all P processes to (..., P * K); 'none' repeats its own."""
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
        """Exchange BLOCK values of all ranks per program."""
        program = tl.program_id(0)
        i = program * BLOCK + tl.arange(0, BLOCK)
        mask = i < n
        count = tl.load(count_ptr + program) + 1
        number = count.to(tl.int64) << 32
        first = (count & 1) * RANKS * n  # first slot of this exchange
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
