"""The two halves of the sums of a decoding step: their order, and the protocol of their slots in every
interleaving of the ranks. CPU; seconds.

    python -m pytest tests/unit/test_split_sums_protocol.py
"""

import gc
import weakref

import pytest
import torch
from helpers import FAMILY, build, compare_decoder, random_schedule, tokens

from benchmarks.latency import several_schedules
from kernels.exchange import SplitSums, slot_sets
from nanosync.delayed_decoding import Sums
from nanosync.errors import UserError
from nanosync.rank_decoder import check_all_reduce
from nanosync.sync_schedule import Sublayer, SyncSchedule
from reduced_sync_model import GPTConfig, named_schedule


def steps_of(name: str, n_layer: int = 2) -> tuple:
    config = GPTConfig(n_layer=n_layer, n_head=2, n_embd=8, vocab_size=8, block_size=4)
    return named_schedule(config, name).steps()


def program(numbers: Sums) -> list[tuple[str, int]]:
    """The halves of a step in their order: ("put" or "take", number of the sum)."""
    halves = []
    for taken, put in zip(numbers.taken, numbers.put):
        halves += [("take", n) for n in taken] + [("put", put)] * (put is not None)
    return [*halves, ("take", numbers.count - 1)]


def test_order_of_the_halves():
    assert program(Sums.of(steps_of("ladder"))) == [
        ("put", 0), ("put", 1), ("take", 0), ("take", 1), ("put", 2), ("take", 2)]
    assert Sums.of(steps_of("ladder")).span == 2  # delay + 1
    assert Sums.of(steps_of("standard")).span == Sums.of(steps_of("palm")).span == 1
    assert [Sums.of(steps_of(f"dtp:{d}", 6)).span for d in (1, 2, 3)] == [2, 3, 4]
    assert [slot_sets(span) for span in (1, 2, 3, 4, 5)] == [2, 4, 8, 8, 16]


@pytest.mark.parametrize("kind", ["family", "random"])
def test_every_sum_is_put_and_then_taken(kind):
    model = build(dict(sync_strategy="standard"), 2)
    schedules = [named_schedule(model.config, name) for name in FAMILY] if kind == "family" else \
        [random_schedule(number) for number in range(200)]
    for schedule in schedules:
        model.reschedule(schedule)
        numbers = Sums.of(schedule.steps())
        halves, outstanding = program(numbers), []
        assert numbers.count == model.syncs
        assert [n for half, n in halves if half == "put"] == list(range(numbers.count))
        for half, n in halves:
            outstanding.append(n) if half == "put" else outstanding.remove(n)
            assert not outstanding or max(outstanding) - min(outstanding) < numbers.span
        assert outstanding == []


def check_protocol(halves: list, ranks: int, tokens: int, exchanges: int, sets: int) -> str | None:
    """Run all interleavings of ranks that decode so many tokens; return what goes wrong, None for nothing.

    A put is a write to each rank. Writes of two ranks arrive in any order, but those to one slot in the order
    in which they were made; those of more ranks arrive at once, or the states would be too many. A take waits
    for the ranks one after another. A rank may stop before any of these.
    """
    numbers = [(half, token * exchanges + n + 1) for token in range(1, tokens + 1) for half, n in halves]
    # the operations of a rank: ("write", to rank, number), ("read", from rank, number)
    operations = [("write" if half == "put" else "read", other, number) for half, number in numbers
                  for other in range(ranks)]

    def arrived(slots, done, reader, writer, number):
        """Return (problem, the slots after a write has arrived)."""
        slot = (reader * ranks + writer) * sets + number % sets
        old = slots[slot]
        if old and ("read", writer, old) in operations[done[reader]:]:
            return f"{number} of rank {writer} overwrites {old}, which rank {reader} has not read", slots
        return None, (*slots[:slot], number, *slots[slot + 1:])

    # state: operations done by each rank; number in each (reader, writer, slot); writes that have not arrived
    start = (0,) * ranks, (0,) * (ranks * ranks * sets), ()
    seen, pending = {start}, [start]
    while pending:
        done, slots, flying = pending.pop()
        following = []
        for me in range(ranks):
            if done[me] == len(operations):
                continue
            kind, other, number = operations[done[me]]
            after = *done[:me], done[me] + 1, *done[me + 1:]
            if kind == "write":
                if ranks == 2 and other != me:
                    following.append((after, slots, (*flying, (other, me, number))))
                    continue
                problem, slots_after = arrived(slots, done, other, me, number)
                if problem:
                    return problem
                following.append((after, slots_after, flying))
            elif slots[(me * ranks + other) * sets + number % sets] == number:
                following.append((after, slots, flying))
        for i, (reader, writer, number) in enumerate(flying):
            if any((r, w, n % sets) == (reader, writer, number % sets) for r, w, n in flying[:i]):
                continue
            problem, slots_after = arrived(slots, done, reader, writer, number)
            if problem:
                return problem
            following.append((done, slots_after, (*flying[:i], *flying[i + 1:])))
        if not following and set(done) != {len(operations)}:
            return f"no rank goes on after {done}"
        new = set(following) - seen
        seen |= new
        pending += new
    return None


def sublayers(*delays: int) -> SyncSchedule:
    return SyncSchedule(tuple(Sublayer(True, delay) for delay in delays))


CASES = {  # name -> steps of a schedule, ranks, tokens
    "standard": (sublayers(0, 0).steps(), 2, 3),
    "three ranks": (sublayers(0).steps(), 3, 3),
    "ladder": (sublayers(1, 1, 1, 1).steps(), 2, 2),
    "delay 2": (sublayers(2, 2, 2, 2).steps(), 2, 2),
    "lands out of order": (sublayers(2, 0, 0, 0).steps(), 2, 2),
    "only at the end": (SyncSchedule((Sublayer(False),) * 2).steps(), 2, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_protocol(case):
    """No slot is overwritten before it was read, and no rank waits forever."""
    steps, ranks, n_tokens = CASES[case]
    numbers = Sums.of(steps)
    arguments = program(numbers), ranks, n_tokens, numbers.count
    assert check_protocol(*arguments, slot_sets(numbers.span)) is None
    assert check_protocol(*arguments, 2 * numbers.span) is None


def test_fewer_sets_of_slots_fail():
    """So the check finds faults, and 2 D sets are needed for one outstanding exchange."""
    steps, ranks, n_tokens = CASES["standard"]
    numbers = Sums.of(steps)
    assert "overwrites" in check_protocol(program(numbers), ranks, n_tokens, numbers.count, 1)
    numbers = Sums.of(CASES["ladder"][0])
    assert "overwrites" in check_protocol(program(numbers), 2, 2, numbers.count, 2)
    assert "no rank goes on" in check_protocol([("take", 0), ("put", 0)], 2, 1, 1, 2)


@pytest.mark.parametrize("schedule", [dict(sync_strategy="spd"), dict(sync_strategy="custom"),
                                      dict(block_types=["tp", "spd", "parallel", "parallel"])], ids=str)
def test_schedules_that_only_drop_syncs_in_halves(schedule):
    """tp_allreduce='fused' runs every schedule by put and take."""
    model = build(schedule, 2).eval()
    decoder = model.decoder(2, tp_allreduce="fused")
    assert decoder.delayed is not None and decoder.sum_kind == "none"
    assert compare_decoder(model, decoder, tokens(2, 5), 14) < 1e-12


@pytest.mark.parametrize("schedule, options", [
    (None, {}), (dict(sync_strategy="spd"), {}), (dict(sync_strategy="ladder"), {}),
    (dict(sync_strategy="spd"), dict(tp_allreduce="fused"))], ids=str)
def test_the_memory_of_a_decoder_is_freed_at_once(schedule, options):
    """Not at some later time by the garbage collector, at which other processes do not free theirs."""
    decoder = build(schedule, 2).eval().decoder(2, **options)
    decoder.generate(tokens(2, 5), 3)
    gone = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


def test_sums_without_a_group_are_the_values():
    base = torch.zeros(2, 4)
    sums = SplitSums("oneshot", base, [3, 4], 1, None, None)
    values = torch.arange(6.0).view(2, 3)
    sums.put(0, values)
    sums.take(0, base)
    assert sums.kind == "none" and torch.equal(base[:, :3], values) and base[:, 3].eq(0).all()


def test_delayed_schedules_of_the_benchmark():
    config = dict(mode="decode", n_layer=12, tp_size=2, block_types=None, widths=[2048, 64], n_embd=2)
    found = several_schedules(config | dict(syncs=[24, [24, 2], [6, 1], "ladder"]))
    assert list(found) == ["24 syncs", "24 syncs, delay 2", "6 syncs, delay 1", "ladder"]
    assert found["24 syncs"].is_dense and {s.delay for s in found["24 syncs, delay 2"].sublayers} == {2}
    assert found["6 syncs, delay 1"].points == [3, 7, 11, 15, 19, 23]
    assert Sums.of(found["6 syncs, delay 1"].steps()).count == 6
    for entry in ([24], [24, 1, 1], [24, -1], [24, 0.5], [0, 1], [True, 1], None):
        with pytest.raises(UserError, match="pairs"):
            several_schedules(config | dict(syncs=[entry]))
    shares = several_schedules(config | dict(syncs=["caat:0.5", "caat:0.02"]))  # of 64 channels
    assert [schedule.channels for schedule in shares.values()] == [0.5, 0.02]
    for share, changed in (("caat:0.005", {}), ("caat:0.02", {"widths": [8]}),
                           ("caat:0.25", {"mode": "train"})):
        with pytest.raises(UserError, match=f"{share}.* which is some of n_embd="):
            several_schedules(config | dict(syncs=[share]) | changed)


def test_unknown_sums():
    with pytest.raises(UserError, match="use nccl, oneshot, fused"):
        check_all_reduce("ring")
