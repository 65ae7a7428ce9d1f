"""Muon on several processes: the steps of one, what is sent, checkpoints across numbers of processes, exact
resume; the same with NorMuon and tables sharded by rows. CPU, real gloo processes.

    python -m pytest tests/processes/test_muon_processes.py
"""

import pytest
import torch
import torch.distributed as dist
from helpers import MUON_LAYERS as LAYERS
from helpers import TINY, losses, newest, run_processes, torchrun
from helpers import largest_distance as distance
from helpers import muon_gradients as gradients
from helpers import muon_model as build
from helpers import muon_step as step

from models import weights
from nanosync import checkpoint_writer
from nanosync.distributed import all_reduce_sum, all_values
from nanosync.optimizer_state import load_state_by_name, state_by_name

MATRICES = 12 * 32 * 32 * LAYERS  # entries of c_attn, c_proj, c_fc and c_proj of each layer


def check_processes(rank: int, world: int) -> None:
    groups = {1: None, 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    for n in (2, 4):
        if rank < n:
            check_steps(n, groups[n])
            for sum_gradients in (False, True):
                check_training(rank, n, groups[n], sum_gradients)
    check_states(rank, groups)


def check_steps(n: int, group) -> None:
    """The same fp32 gradients on 1 and on n processes: the same weights."""
    (alone, optimizer), (model, sharded) = build(), build(group)
    torch.manual_seed(0)
    sent = []
    for it in range(5):
        for (name, p), q in zip(alone.named_parameters(), model.parameters()):
            inactive = it == 3 and ".h.1." in name  # a layer that took no part
            p.grad = None if inactive else torch.randn_like(p)
            q.grad = None if inactive else p.grad.clone()
        optimizer.step()
        before = sharded.bytes_sent
        sharded.step()
        sent.append(sharded.bytes_sent - before)
    assert distance(model, alone) <= 1e-6, n
    # 2 of 3 layers: owners of more of these have larger parts, and all parts are as the largest
    assert len({*sent[:3], sent[4]}) == 1 and (n == 1 or sent[3] < (0.8, 0.95)[n > 2] * sent[0]), sent


def check_training(rank: int, n: int, group, sum_gradients: bool) -> None:
    """4 updates: equal weights, each momentum in one place, bytes as stated. In fp64, because gradients are
    summed in another order and Newton-Schulz enlarges that up to 500 times in directions that hardly count.
    """
    alone, optimizer = build(dtype=torch.float64)
    model, sharded = build(group, sum_gradients, torch.float64)
    for it in range(4):
        step(alone, optimizer, it)
        gradients(model, it, rank, n)
        if not sum_gradients:
            for p in model.parameters():
                dist.all_reduce(p.grad, group=group)
        sharded.step()
        sharded.zero_grad()
    assert distance(model, alone) <= 1e-6, (n, sum_gradients)
    check_replicas(model, group)
    rest = sum(8 * p.numel() for name, p in model.named_parameters() if not (".h." in name and p.dim() == 2))
    updates = 4 * MATRICES * (n - 1)  # of all processes together: fp32, as the products that make them
    sums = (8 * MATRICES + 2 * rest) * (n - 1)
    sent = all_reduce_sum(torch.tensor(sharded.bytes_sent), group).item()
    # every owner's part is as large as the largest
    assert 1 <= sent / (4 * (updates + sums * sum_gradients)) < 1.15, (n, sum_gradients)
    assert optimizer.bytes_sent == 0
    names = all_values([name for name in state_by_name(sharded, model) if "momentum_buffer" in name], group)
    names = [name for of_one in names for name in of_one]
    assert len(names) == len(set(names)) == 4 * LAYERS
    held = [sharded.state[p]["momentum_buffer"] for p in sharded.owner if sharded.owns(p)]
    assert sum(t.numel() for t in held) == pytest.approx(MATRICES / n, rel=0.15)


def check_replicas(model, group) -> None:
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, group_src=0, group=group)
    assert torch.equal(mine, first)


def check_states(rank: int, groups: dict) -> None:
    """Saved on n processes and loaded on m: the same state, and the next weights to 1e-6."""
    saved = {}
    for n, group in groups.items():
        if rank < n:
            model, optimizer = build(group, sum_gradients=True, dtype=torch.float64)
            for it in range(3):
                gradients(model, it, rank, n)
                optimizer.step()
                optimizer.zero_grad()
            saved[n] = checkpoint_writer.snapshot(model, optimizer, torch.device("cpu"), None, group)
    box = [saved]
    dist.broadcast_object_list(box, src=0)
    names = {n: sorted(tensors["optim"]) for n, tensors in box[0].items()}
    assert names[1] == names[2] == names[4] and len(names[1]) == 4 * LAYERS + 3 * (4 + 8 * LAYERS)
    for n, tensors in box[0].items():
        ends = {}
        for m, group in groups.items():
            if rank >= m:
                continue
            model, optimizer = build(group, sum_gradients=True, dtype=torch.float64)
            weights.load_parameters(model, tensors["model"], "the file")
            load_state_by_name(optimizer, model, tensors["optim"])
            again = checkpoint_writer.snapshot(model, optimizer, torch.device("cpu"), None, group)
            assert rank > 0 or all(torch.equal(t, again["optim"][name])
                                   for name, t in tensors["optim"].items()), (n, m)
            gradients(model, 3, rank, m)
            optimizer.step()
            ends[m] = model
        assert all(distance(model, ends[max(ends)]) <= 1e-6 for model in ends.values())


NORMUON = dict(polar_express=True, norm_beta2=0.9, cautious=True, scale="spectral", shard_rows_from=512)
STEPS = 3
SHARDED = {"transformer.wte.weight": (61, 32), "transformer.wpe.weight": (16, 32)}  # 61 rows: with padding


def normuon(group=None):
    """A model and its optimizer, in fp64 for the reason that check_training gives."""
    return build(group, sum_gradients=True, dtype=torch.float64, **NORMUON)


def normuon_steps(model, optimizer, steps, rank, n) -> None:
    for it in steps:
        optimizer.momentum = 0.85 + it / 100
        gradients(model, it, rank, n)
        optimizer.step()
        optimizer.zero_grad()


def check_normuon(rank: int, world: int) -> None:
    groups = {1: None, 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    through, optimizer = normuon()
    normuon_steps(through, optimizer, range(STEPS), 0, 1)
    state = state_by_name(optimizer, through)
    tensors = checkpoint_writer.snapshot(through, optimizer, torch.device("cpu"), None, None)
    for n, group in ((2, groups[2]), (4, groups[4]), (1, None)):  # each resumes what the one before saved
        if rank < n:
            tensors = check_normuon_on(rank, n, group, tensors, through, state)
        box = [tensors]
        dist.broadcast_object_list(box, src=0)
        tensors = box[0]


def check_normuon_on(rank, n, group, tensors, through, state) -> dict:
    """Steps as on one process, what they send and hold; a checkpoint's state; exact resume."""
    model, optimizer = normuon(group)
    load_state_by_name(optimizer, model, tensors["optim"])  # of another number of processes
    again = checkpoint_writer.snapshot(model, optimizer, torch.device("cpu"), None, group)
    assert rank > 0 or all(torch.equal(t, again["optim"][name]) for name, t in tensors["optim"].items())
    model, optimizer = normuon(group)
    normuon_steps(model, optimizer, range(STEPS), rank, n)
    assert distance(model, through) <= 1e-9, n
    if n > 1:
        check_replicas(model, group)
        check_normuon_bytes(model, optimizer, n, group)
        rows = {name: optimizer.rows_of(p) for name, p in model.named_parameters()}
        assert {name for name, own in rows.items() if own is not None} == set(SHARDED)
        for name, (count, _) in SHARDED.items():
            p, n_rows = model.get_parameter(name), -(-count // n)
            expected = min(n_rows, count - rank * n_rows), 32
            assert optimizer.state[p]["exp_avg"].shape == optimizer.state[p]["exp_avg_sq"].shape == expected
    tensors = checkpoint_writer.snapshot(model, optimizer, torch.device("cpu"), None, group)
    if rank == 0:
        assert sorted(tensors["optim"]) == sorted(state)
        for name, t in tensors["optim"].items():
            assert t.shape == state[name].shape and torch.allclose(t, state[name], 1e-6, 1e-9), name
    box = [tensors]
    if group is not None:
        dist.broadcast_object_list(box, group_src=0, group=group)
    resumed, other = normuon(group)
    weights.load_parameters(resumed, box[0]["model"], "the file")
    load_state_by_name(other, resumed, box[0]["optim"])
    for each, its in ((model, optimizer), (resumed, other)):
        normuon_steps(each, its, range(STEPS, STEPS + 2), rank, n)
    assert distance(model, resumed) == 0, n
    return box[0]


def check_normuon_bytes(model, optimizer, n, group) -> None:
    """A step sends matrices as Muon does, tables once as gradients and once as weights, twice if small."""
    padded = sum(-(-count // n) * n * width for count, width in SHARDED.values())
    small = [p for name, p in model.named_parameters() if not (".h." in name and p.dim() == 2)
             and name not in SHARDED]
    # of one process, fp64: gradients of matrices and fp32 updates, in parts as large as the largest
    part = max(sum(p.numel() for p in optimizer.owner if optimizer.owner[p] == rank) for rank in range(n))
    sent = (n - 1) * ((8 + 4) * part + 2 * 8 * padded // n)
    sent += sum(2 * (n - 1) * 8 * p.numel() // n for p in small)
    assert optimizer.bytes_sent == STEPS * sent, (n, optimizer.bytes_sent / STEPS, sent)


def test_normuon_with_sharded_tables_on_any_number_of_processes(tmp_path):
    run_processes(4, check_normuon, tmp_path)


def test_any_number_of_processes(tmp_path):
    run_processes(4, check_processes, tmp_path)


RUN = [*TINY, "--optimizer=muon", "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=12",
       "--learning_rate=1e-2", "--muon_learning_rate=1e-2", "--checkpoint_interval=6", "--eval_interval=6"]


def test_exact_resume(tiny_data, tmp_path):
    """train.py on two processes: losses, weights, momentum, to the last bit; on one, the losses to 1e-4."""
    done = torchrun(2, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    done = torchrun(2, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=again",
                    "--resume=out/ckpt/step-00000006", cwd=tmp_path)
    assert done.code == 0 and newest(tmp_path / "again") == newest(tmp_path / "out"), done.err
    through = losses(tmp_path / "out")
    assert losses(tmp_path / "again") == {it: through[it] for it in range(6, 12)}
    assert through[11] < 2.9 < through[0]


@pytest.mark.parametrize("script", ["train.py", "train_reduced_sync.py"])
def test_scripts(script, run_script, tiny_data, tmp_path):
    args = [*RUN, f"--dataset={tiny_data}", "--out_dir=out"]
    done = run_script(script, *args)
    assert done.code == 0 and done.losses[-1] < done.losses[0] - 0.3, done.err
    resumed = run_script(script, *args, "--optimizer=adamw", "--resume=6")
    assert resumed.code == 2 and "resume with the --optimizer of the run" in resumed.err
    for wrong, message in (("--optimizer=sgd", "use adamw or muon"), ("--use_zero1", "leave use_zero1 out"),
                           ("--tp_processes=2", "needs whole matrices"),
                           ("--use_fsdp", "and use_fsdp divides them")):
        done = run_script(script, *args, wrong)
        assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
