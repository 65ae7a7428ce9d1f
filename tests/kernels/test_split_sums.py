"""The kernels that have a half of a sum, against PyTorch, and decoding on two processes that share memory.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_split_sums.py  # in Triton's interpreter

tests/compile compiles the kernels. Two GPUs: the commands in docs/benchmarking.md.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import build, compare_decoder, random_schedule, run_processes, tokens

import kernels
from kernels import decode, exchange
from model import LayerNorm
from nanosync.ranks import Ranks
from reduced_sync_model import named_schedule

interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="the ranks share the memory of the CPU")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def connected(P: int, B: int, widths: list[int], span: int) -> list[exchange.SplitSums]:
    """The sums of P ranks that are driven in turns by this process."""
    like = torch.zeros(B, max(widths))
    ranks = [exchange.SplitSums("none", like, widths, span, None, None) for _ in range(P)]
    slots = [torch.zeros(sums.sets, P, sums.n, dtype=torch.int64) for sums in ranks]
    for r, sums in enumerate(ranks):
        sums.kind = "oneshot"
        sums.connect(slots[r], [s.data_ptr() for s in slots], r)
    return ranks


@interpreted
@pytest.mark.parametrize("P, step", [(3, 0), (2, 2**29 - 2), (2, -3)])  # steps of 4 exchanges
def test_put_and_take(P, step):
    """Two sums in flight, of several widths, also where the numbers of the exchanges overflow."""
    B, C, widths = 2, 300, [300, 130, 300, 7]
    ranks, bases = connected(P, B, widths, 3), [randn(B, C) for _ in range(P)]
    for sums in ranks:
        sums.step.fill_(step)
    for token in range(3):
        for sums in ranks:
            sums.step += 1
        values = [[randn(B, W, seed=100 * token + 10 * n + r) for r in range(P)]
                  for n, W in enumerate(widths)]
        expected = bases[0].double()
        for half, n in [("put", 0), ("put", 1), ("take", 0), ("put", 2), ("take", 2), ("take", 1), ("put", 3),
                        ("take", 3)]:
            for r, sums in enumerate(ranks):
                sums.put(n, values[n][r]) if half == "put" else sums.take(n, bases[r])
            if half == "take":
                expected[:, :widths[n]] += torch.stack(values[n]).double().sum(dim=0)
        for base in bases:
            assert torch.equal(base, bases[0])  # the same bits on all ranks
        assert (bases[0] - expected).abs().max() < 1e-5


@interpreted
@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("W", [40, 17])
def test_halves_in_a_matrix(B, own, W):
    """A matrix puts its output, or its first W channels; the next takes the sum before its LayerNorm. Of
    Parts, the channels below the first count as 0."""
    P, C, N = 2, 40, 24
    ranks = connected(P, B, [W, W], 2)
    weight, w2, norm = randn(C, 16, seed=1), randn(N, C, seed=2), LayerNorm(C, True)
    base = randn(B, C, seed=3)
    owns = [decode.Part(randn(B, C, seed=4 + i), first) for i, first in zip(range(own), (W % C, 5))]
    seen_parts = sum(F.pad(part.values[:, part.first:], (part.first, 0)).double() for part in owns)
    for token in range(5):
        x = [randn(B, 16, seed=10 * token + r) for r in range(P)]
        residual, outs = decode.Part(randn(B, C, seed=9), W % C), []
        added = residual.values.double() * (torch.arange(C) >= residual.first)
        for r, sums in enumerate(ranks):
            sums.step += 1
            outs.append(torch.empty(B, C))
            decode.linear(x[r], weight, None, outs[r], residual=residual, put=(sums, 1))
            expected = added + x[r].double() @ weight.double().T
            assert (outs[r] - expected).abs().max() < 1e-5
        for sums in ranks:
            landed, out = torch.empty(B, C), torch.empty(B, N)
            stream = decode.Stream(tuple(owns), 1.5, sums, 1, landed)
            decode.linear(base, w2, None, out, norm=norm, stream=stream)
            total = base.double() + sum(outs).double() * (torch.arange(C) < W)
            assert (landed - total).abs().max() < 1e-5
            seen = F.layer_norm(total + 1.5 * seen_parts, (C,), norm.weight.double(), norm.bias.double())
            assert (out - seen @ w2.double().T).abs().max() < 1e-4


def share_memory(folder: str, rank: int, world: int) -> None:
    """Put the slots into files that both processes map, in place of the memory of GPUs."""
    made = []

    def shared_slots(shape, device, group):
        n = shape[0] * shape[1] * shape[2]
        name = f"{folder}/slots_{len(made)}"
        torch.from_file(f"{name}_{rank}", shared=True, size=n, dtype=torch.int64).zero_()
        torch.distributed.barrier()
        every = [torch.from_file(f"{name}_{r}", shared=True, size=n, dtype=torch.int64) for r in range(world)]
        made.append(every)
        return every[rank].view(shape), [t.data_ptr() for t in every]

    exchange.shared_slots, exchange._without_symmetric_memory = shared_slots, lambda *_: False


TINY = dict(n_layer=2, n_head=4, n_embd=16, vocab_size=13, block_size=8)  # the interpreter is slow
CASES = [  # strategy or number of a random schedule, tp_allreduce, B, how it runs
    ("ladder", "oneshot", 1, "oneshot"), ("kraken", "fused", 3, "fused"), ("dtp:2", "fused", 1, "fused"),
    ("caat:0.5", "fused", 1, "fused"), ("caat:0.3", "oneshot", 3, "oneshot"), ("spd", "fused", 1, "fused"),
    (7, "oneshot", 1, "oneshot"), (17, "fused", 1, "fused")]  # 17: half of the channels, several in flight


def check_decoding(rank: int, world: int, folder: str) -> None:
    share_memory(folder, rank, world)
    model = build(dict(sync_strategy="standard"), world, torch.float32, **TINY).eval()
    model.place(Ranks(1, torch.distributed.group.WORLD))
    for name, tp_allreduce, B, kind in CASES:
        model.reschedule(random_schedule(name, 4) if isinstance(name, int) else
                         named_schedule(model.config, name))
        decoder = model.decoder(B, tp_allreduce=tp_allreduce)
        assert decoder.sum_kind == kind, (name, decoder.sum_kind)
        assert compare_decoder(model, decoder, tokens(B, 3) % 13, 3) < 1e-4, (name, tp_allreduce, B)
    two = build(dict(sync_strategy="ladder"), 2 * world, torch.float32, **TINY).eval()
    two.place(Ranks(2, torch.distributed.group.WORLD))
    decoder = two.decoder(1, tp_allreduce="oneshot")
    assert decoder.sum_kind == "oneshot"
    assert compare_decoder(two, decoder, tokens(1, 3) % 13, 3) < 1e-4


@interpreted
def test_decoding_on_two_processes(tmp_path):
    """Every way to run a schedule, with the exchanges of two processes that do not wait for each other."""
    run_processes(2, check_decoding, tmp_path, str(tmp_path))
