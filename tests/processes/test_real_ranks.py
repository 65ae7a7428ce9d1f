"""TP ranks in processes of their own against simulated ones: functions, gradients, counted collectives,
dropout, generation. CPU, 2 and 4 gloo processes.

    python -m pytest tests/processes/test_real_ranks.py
"""

import copy
import functools

import pytest
import torch
from helpers import (
    EXACT,
    FAMILY,
    SCHEDULES,
    SYNCS,
    build,
    compare_decoder,
    gradients,
    largest_difference,
    random_schedule,
    run_processes,
    tokens,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.exchange import GroupSum
from nanosync.distributed import all_values
from nanosync.errors import UserError
from nanosync.rank_decoder import check_all_reduce
from nanosync.ranks import Ranks
from nanosync.sync_schedule import Sublayer, SyncSchedule
from reduced_sync_model import named_schedule

# Real processes


class CountAllReduces(TorchDispatchMode):
    """How many all-reduces, and how many other collectives, were issued."""

    def __init__(self):
        super().__init__()
        self.all_reduces, self.channels, self.others = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if function.namespace in ("_c10d_functional", "c10d") and "wait" not in name:
            if name.startswith(("all_reduce", "allreduce")):
                self.all_reduces += 1
                self.channels.append(args[0].shape[-1])
            else:
                self.others.append(name)
        return function(*args, **(kwargs or {}))


def on_one(source: int, compute) -> dict[str, torch.Tensor]:
    """Call compute() on one process and give its tensors to all: a simulation is the same on each of them."""
    box = [compute() if torch.distributed.get_rank() == source else None]
    torch.distributed.broadcast_object_list(box, src=source)
    return box[0]


def simulate(model, idx, targets) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients, these by the names of their parameters."""
    loss = model(idx, targets)[1]
    found = gradients(model, loss)
    with torch.no_grad():
        return {"loss": loss.detach(), "logits": model(idx, all_logits=True)[0], **found}


def check_real_ranks(rank: int, world: int) -> None:
    """Every schedule, of 4 processes every other one for time, `local` 1 and 2: logits, loss, every gradient,
    gradient norm, counts, generation."""
    group = torch.distributed.group.WORLD
    idx, targets = tokens(3, 16), tokens(3, 16, seed=1)
    targets[0, :5] = -1
    for local in (1, 2):
        R = world * local
        for number, schedule in enumerate(SCHEDULES):
            if 12 % R or number % (world // 2):
                continue
            case = f"local {local}, {schedule}"
            simulated, real = ranks_of(build(schedule, R), local, group)
            expected = on_one(number % world, functools.partial(simulate, simulated, idx, targets))
            real_loss = real(idx, targets)[1]
            assert abs(real_loss - expected.pop("loss")) < EXACT, case
            real_loss.backward()
            real.reduce_partial_gradients()
            found = real.whole({name: p.grad for name, p in real.named_parameters()})
            found["logits"] = real(idx, all_logits=True)[0].detach()
            assert largest_difference(found, expected) < EXACT, case
            with CountAllReduces() as forward:
                hidden = real.hidden(idx)
            with CountAllReduces() as backward:
                hidden.square().sum().backward()
            assert (forward.all_reduces, forward.others) == (SYNCS[number], []), case
            assert (backward.all_reduces, backward.others) == (SYNCS[number], []), case
            if number in (0, 3, 10):
                real.eval()
                assert compare_decoder(real, real.decoder(2), tokens(2, 12), 7) < EXACT, case
                greedy = real.decoder(2, temperature=1e-6, top_k=3).generate(tokens(2, 12), 7)
                assert torch.equal(greedy, real.decoder(2, temperature=0).generate(tokens(2, 12), 7)), case


def check_family(rank: int, world: int) -> None:
    """Strategies whose schedules are not plain, and 200 random schedules over both numbers of processes,
    `local` 1 and 2: hidden states, every gradient, and the channels of each all-reduce, forward and backward.
    Of the strategies also logits, loss and generation; of 4 processes half of them with either `local`."""
    group = torch.distributed.group.WORLD
    for local in (1, 2):
        pair = ranks_of(build(dict(sync_strategy="standard"), world * local, n_head=8), local, group)
        for number, strategy in enumerate(FAMILY):
            if world == 4 and number % 2 == local % 2:
                continue
            schedule = named_schedule(pair[0].config, strategy)
            check_schedule(*pair, schedule, source=number % world)
            idx, targets = tokens(2, 9), tokens(2, 9, seed=1)
            pair[0].reschedule(schedule)
            with torch.no_grad():
                (logits, loss), (real_logits, real_loss) = (
                    (m(idx, all_logits=True)[0], m(idx, targets)[1]) for m in pair)
            assert (real_logits - logits).abs().max() < EXACT and abs(real_loss - loss) < EXACT, strategy
            if strategy in ("palm", "ladder", "dtp:2", "caat:0.5"):
                decoder = pair[1].eval().decoder(2)
                assert compare_decoder(pair[1], decoder, tokens(2, 12), 7) < EXACT, strategy
                pair[1].train()
        for bias in (True, False):
            pair = ranks_of(build(dict(block_types=None), world * local, n_head=8, bias=bias, n_layer=2),
                            local, group)
            for number in range(40 if world == 2 else 10):
                number += 10_000 * world + 1000 * local + 100 * bias
                check_schedule(*pair, random_schedule(number, sublayers=4), source=number % world)
            check_schedule(*pair, SyncSchedule((Sublayer(True),) * 4, channels=0.999))  # rounds up to all


def ranks_of(simulated, local: int, group) -> tuple:
    """A model with simulated ranks, and the same with real ones."""
    real = copy.deepcopy(simulated)
    real.place(Ranks(local, group))
    return simulated, real


def check_schedule(simulated, real, schedule, source: int = 0) -> None:
    """By a schedule both models have the same hidden states and gradients. All-reduces have the channels that
    the schedule says: of packets as they land and of everything at the end; in backward of each version of
    the base, of which the first has all channels."""
    idx, C = tokens(2, 9), simulated.config.n_embd
    weights = torch.linspace(-1, 1, C, dtype=torch.float64)

    def simulate_hidden() -> dict[str, torch.Tensor]:
        simulated.reschedule(schedule)
        hidden = simulated.hidden(idx)
        return {"hidden": hidden.detach(), **gradients(simulated, (hidden.sin() * weights).sum())}

    expected = on_one(source, simulate_hidden)
    real.reschedule(schedule)
    real.zero_grad()
    with CountAllReduces() as forward:
        hidden = real.hidden(idx)
    with CountAllReduces() as backward:
        (hidden.sin() * weights).sum().backward()
    real.reduce_partial_gradients()
    found = real.whole({name: p.grad for name, p in real.named_parameters()})
    assert largest_difference(found | {"hidden": hidden.detach()}, expected) < EXACT, schedule
    if schedule.is_plain:
        return
    W, L2 = max(1, round(schedule.channels * C)), len(schedule.sublayers)
    dues = [j + 1 + s.delay for j, s in enumerate(schedule.sublayers) if s.sync]
    landings = [due for due in dues if due < L2]
    left = len(landings) < len(dues) or not schedule.sublayers[-1].sync or schedule.channels < 1
    assert (forward.channels, forward.others) == ([W] * len(landings) + [C] * left, []), schedule
    assert (backward.channels, backward.others) == ([W] * len(set(landings)) + [C], []), schedule


@pytest.mark.parametrize("world", [2, 4])
def test_family_on_real_ranks(world, tmp_path):
    run_processes(world, check_family, tmp_path)


def check_dropout(rank: int, world: int) -> None:
    """Real ranks drop the same entries and scale the others up; without a generator they refuse to guess."""
    model = build(SCHEDULES[3], 2, dropout=0.25)
    model.place(Ranks(1, torch.distributed.group.WORLD))
    with pytest.raises(AssertionError, match="share_dropout"):
        model(tokens(2, 16))
    torch.manual_seed(rank)
    model.share_dropout(1, 0, "cpu")
    state = torch.get_rng_state()
    ones = torch.ones(1, 3, 16, 48, dtype=torch.float64)
    out, bias = model._residual_dropout(ones, ones[0, 0, 0])
    assert torch.equal(out[0], bias) and set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert 0.7 < (out > 0).double().mean() < 0.8
    assert torch.equal(torch.get_rng_state(), state)  # a rank's own stream, of attention, is another
    others = [torch.empty_like(out) for _ in range(world)]
    torch.distributed.all_gather(others, out.contiguous())
    assert all(torch.equal(out, other) for other in others)
    with pytest.raises(UserError, match="divided over several processes"):
        model.save_pretrained("nowhere")


def test_dropout_of_real_ranks(tmp_path):
    run_processes(2, check_dropout, tmp_path)


def check_oneshot_fallback(rank: int, world: int) -> None:
    """Where symmetric memory cannot be had, the group's own all-reduce does it, and that is said once."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(3):
            total = GroupSum("oneshot", torch.zeros(2, 3), torch.distributed.group.WORLD, all_values)
    said = printed.getvalue()
    assert total.kind == "nccl" and said.count("\n") == (rank == 0)
    assert rank or "tp_allreduce='oneshot' does not work here (it needs CUDA)" in said
    for _ in range(2):
        total.buffer.fill_(rank + 1.0)
        gathered = torch.tensor([1.0, 2.0]).repeat_interleave(3).expand(2, 6)
        assert torch.equal(total.gather(), gathered)
        base = torch.ones(2, 3)
        total.add_to(base)
        assert torch.equal(base, torch.full((2, 3), 4.0))


def test_oneshot_falls_back(tmp_path):
    run_processes(2, check_oneshot_fallback, tmp_path)
    with pytest.raises(UserError, match="tp_allreduce='ring' is unknown"):
        check_all_reduce("ring")


def test_top_k_from_each_process(tmp_path):
    run_processes(2, check_top_k, tmp_path)


def check_top_k(rank: int, world: int) -> None:
    """Draws follow the distribution over the most likely tokens of all processes, equally on all of them."""
    model = build(SCHEDULES[3], 2, torch.float32)
    prompt = tokens(1, 5).expand(4000, 5)
    logits = model(prompt[:1])[0][0, 0]
    values, ids = logits.topk(7)
    expected = torch.zeros(61).scatter(0, ids, (values / 1.5).softmax(0))
    model.place(Ranks(1, torch.distributed.group.WORLD))
    drawn = model.eval().decoder(4000, temperature=1.5, top_k=7).generate(prompt, 1)[:, 5]
    frequencies = drawn.bincount(minlength=61) / 4000
    # 4000 draws: a standard deviation of at most 0.008
    assert (frequencies - expected).abs().max() < 0.04
    others = [torch.empty_like(drawn) for _ in range(world)]
    torch.distributed.all_gather(others, drawn)
    assert all(torch.equal(drawn, other) for other in others)


@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks(world, tmp_path):
    run_processes(world, check_real_ranks, tmp_path)
