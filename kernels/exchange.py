"""Exchange of a small tensor between all GPUs in one kernel, for sums and gathers in a decoder's steps.

    slots[e % 2][r][i]  =  value i of rank r in its e-th exchange, and e, in the same 64 bits

In this module "rank" means the rank of a process in the group. Each rank writes its values into its slots on
all ranks, and waits until its own slots show the number of this exchange. A write of 64 aligned bits is
atomic, so a value and its number arrive together, without a barrier or a flag. The latency is that of one
write to a peer. (NCCL's low-latency protocol works in the same way.) Two sets of slots are enough: a rank
that writes exchange e + 2 has received all of exchange e + 1, and each rank wrote that exchange after it had
read all of exchange e.

An exchange can have two halves, which may be many kernels apart:

    put     write the values of exchange e into slots e % S of all ranks
    take    wait until the own slots e % S show exchange e; return the sum of all ranks' values

Up to D exchanges are outstanding: before a rank puts e, it has taken e - D and all before. S = 2 D sets of
slots are enough. The slots of e had exchange e - 2D before. A rank that puts e has taken e - D, so each rank
has put e - D, and each rank took e - 2D before that. In a step of a decoder the exchanges have the numbers
step * exchanges + 1, step * exchanges + 2, ..., and all ranks count steps.

All ranks add up the values in the same order, so all get the same bits.

Shapes: n = values, P = ranks, B = sequences, C = n_embd.
"""

import functools

import torch
import torch.distributed as dist

from kernels import triton, usable
from kernels.collectives import functional_all_gather

KINDS = "none", "nccl", "oneshot"  # kinds of sum over processes in a decoding step, see GroupSum
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


def working_kind(kind: str, n: int, like: torch.Tensor, group, all_values) -> str:
    """Return the kind of sum for n values that works here: 'nccl' where 'oneshot' cannot, 'none' without a
    group. like: tensor with the dtype and device of the values; others: see GroupSum."""
    assert kind in KINDS, f"unknown kind {kind!r}"
    if group is None:
        return "none"
    if kind == "oneshot" and (n > MAX_VALUES or like.dtype != torch.float32
                              or _without_symmetric_memory(group, like.device, all_values)):
        return "nccl"
    return kind


def shared_slots(shape: tuple[int, ...], device: torch.device, group) -> tuple[torch.Tensor, list[int]]:
    """Allocate slots, all zero, that all ranks can write; return them and the addresses on this GPU of all
    ranks' slots."""
    slots, handle = _symmetric(shape, torch.int64, device, group)
    torch.cuda.synchronize(device)
    dist.barrier(group=group)  # all slots are zero before any rank writes
    return slots, handle.buffer_ptrs


def _symmetric(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group):
    """Allocate zeros in memory that all GPUs of the group can access; return the tensor and its handle."""
    import torch.distributed._symmetric_memory as symmetric_memory

    shared = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(shared, group.group_name)
    return shared.zero_(), handle


class SplitSums:
    """Sums over a group, each in two halves, put and take, also inside a CUDA graph. The sums of a step have
    the numbers 0, 1, ..., in the order in which they are put.

    kind: as GroupSum's; with 'oneshot' the halves are kernels, or parts of the kernels of decode.linear. Else
        take does it all.
    """

    def __init__(self, kind: str, like: torch.Tensor, widths: list[int], span: int, group, all_values):
        """Allocate the slots. All processes must call this together.

        like: base to which the sums are added, (B, C). widths: channels of each sum of a step. span: D, the
        most sums from the oldest that is not taken to the newest that was put.
        """
        B = like.shape[0]
        self.kind = working_kind(kind, B * max(widths), like, group, all_values)
        self.widths, self.group = widths, group
        self.values: list[torch.Tensor | None] = [None] * len(widths)
        self.step = torch.zeros(1, dtype=torch.int32, device=like.device)  # that decode.embed counted
        self.n = B * max(widths)  # values of a slot
        self.sets = slot_sets(span)
        if self.kind == "oneshot":
            shape = self.sets, dist.get_world_size(group), self.n
            self.connect(*shared_slots(shape, like.device, group), dist.get_rank(group))

    def connect(self, slots: torch.Tensor, addresses: list[int], rank: int) -> None:
        """Use these slots, (sets, P, n) int64 zeros. addresses: of all ranks' slots on this GPU."""
        self.slots, self.rank, self.ranks = slots, rank, len(addresses)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=slots.device)

    @property
    def in_kernels(self) -> bool:
        """True if the halves are kernels."""
        return self.kind == "oneshot"

    def constants(self) -> dict:
        """Return the constants of the kernels that have a half of a sum."""
        return dict(RANK=self.rank, RANKS=self.ranks, SETS=self.sets)

    def put(self, index: int, values: torch.Tensor) -> None:
        """Send values (B, width) of this process. They must stay as they are until `take` was called."""
        assert values.shape[1] == self.widths[index]
        self.values[index] = values
        if self.in_kernels:
            values = values.contiguous()
            _put_kernel[(triton.cdiv(values.numel(), BLOCK),)](
                values, self.addresses, self.step, index, len(self.widths), values.numel(), self.n,
                **self.constants(), BLOCK=BLOCK, num_warps=8)

    def take(self, index: int, base: torch.Tensor) -> None:
        """Add the sum of all processes' values to the first channels of base (B, C)."""
        W, (B, C) = self.widths[index], base.shape
        if self.in_kernels:
            _take_kernel[(triton.cdiv(B * W, BLOCK),)](
                base, self.addresses, self.step, index, len(self.widths), B * W, self.n, W, C,
                **self.constants(), BLOCK=BLOCK, num_warps=8)
            return
        total = self.values[index]
        if self.kind == "nccl":
            total = total.clone()
            dist.all_reduce(total, group=self.group)
        base[:, :W] += total


def slot_sets(span: int) -> int:
    """Return the number of sets of slots for `span` outstanding exchanges: 2 D, rounded up to a power of two,
    which numbers of 32 bits that overflow need."""
    return 1 << (2 * span - 1).bit_length()


class GroupSum:
    """Repeated sum of a small tensor over a group, also inside a CUDA graph, for the syncs of decoding steps.

    kind: 'nccl' (the group's all-reduce), 'oneshot' (an Exchange; tensors of more than MAX_VALUES use
        'nccl'), or 'none' (adds only this process's buffer, to measure the cost of communication).
    buffer: fp32 tensor into which each process writes its summand.
    all_values: function (value, group) -> list of the values of all processes, on every process.
    """

    def __init__(self, kind: str, buffer: torch.Tensor, group, all_values):
        self.kind, self.buffer, self.group = working_kind(kind, buffer.numel(), buffer, group, all_values), \
            buffer, group
        if self.kind == "oneshot":
            shape = 2, dist.get_world_size(group), buffer.numel()
            slots, addresses = shared_slots(shape, buffer.device, group)
            self._exchange = Exchange(slots, addresses, dist.get_rank(group), buffer.numel())

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

    @triton.jit
    def put_values(values, offsets, mask, addresses_ptr, step_ptr, index, exchanges, n, RANK: tl.constexpr,
                   RANKS: tl.constexpr, SETS: tl.constexpr):
        """Write values, with the number of their exchange, into this rank's slots on all ranks."""
        number = tl.load(step_ptr) * exchanges + index + 1  # overflows as SETS, a power of two, allows
        first = ((number & (SETS - 1)) * RANKS + RANK) * n
        bits = values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        for peer in tl.static_range(RANKS):
            slots = tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(slots + first + offsets, (number.to(tl.int64) << 32) | bits, mask=mask)

    @triton.jit
    def taken_values(offsets, mask, addresses_ptr, step_ptr, index, exchanges, n, RANK: tl.constexpr,
                     RANKS: tl.constexpr, SETS: tl.constexpr):
        """Wait for the values of all ranks, one rank after another; return their sum."""
        number = tl.load(step_ptr) * exchanges + index + 1
        own = tl.load(addresses_ptr + RANK).to(tl.pointer_type(tl.int64))
        own += (number & (SETS - 1)) * RANKS * n
        total = tl.zeros(offsets.shape, tl.float32)
        for r in tl.static_range(RANKS):
            got = tl.load(own + r * n + offsets, mask=mask, other=0, volatile=True)
            missing = tl.max((mask & ((got >> 32) != number)).to(tl.int32), axis=0)
            while missing > 0:
                got = tl.load(own + r * n + offsets, mask=mask, other=0, volatile=True)
                missing = tl.max((mask & ((got >> 32) != number)).to(tl.int32), axis=0)
            arrived = (got & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
            total += tl.where(mask, arrived, 0.0)
        return total

    @triton.jit(do_not_specialize=["index", "exchanges", "n_values", "n"])
    def _put_kernel(values_ptr, addresses_ptr, step_ptr, index, exchanges, n_values, n, RANK: tl.constexpr,
                    RANKS: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr):
        """Put BLOCK values per program."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n_values
        values = tl.load(values_ptr + i, mask=mask, other=0.0)
        put_values(values, i, mask, addresses_ptr, step_ptr, index, exchanges, n, RANK, RANKS, SETS)

    @triton.jit(do_not_specialize=["index", "exchanges", "n_values", "n"])
    def _take_kernel(base_ptr, addresses_ptr, step_ptr, index, exchanges, n_values, n, W, C,
                     RANK: tl.constexpr, RANKS: tl.constexpr, SETS: tl.constexpr, BLOCK: tl.constexpr):
        """Add BLOCK sums per program to base (B, C). The values are (B, W)."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n_values
        base_ptr += i // W * C + i % W
        total = taken_values(i, mask, addresses_ptr, step_ptr, index, exchanges, n, RANK, RANKS, SETS)
        tl.store(base_ptr, tl.load(base_ptr, mask=mask, other=0.0) + total, mask=mask)
