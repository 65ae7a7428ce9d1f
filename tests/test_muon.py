"""Muon: orthogonal updates, torch.optim.Muon's steps, the same on 1, 2 and 4 processes, what they send,
checkpoints across numbers of processes, exact resume. CPU, real gloo processes; half a minute.

    python -m pytest tests/test_muon.py
"""

import math

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, run_processes, torchrun
from long_runs import losses, newest
from test_model import random_model, tokens

from models import weights
from nanosync import checkpoint_writer
from nanosync.distributed import all_reduce_sum, all_values
from nanosync.errors import UserError
from nanosync.optim import (
    Muon,
    build_adamw,
    build_muon,
    newton_schulz,
    set_learning_rate,
)
from nanosync.optimizer_state import load_state_by_name, state_by_name

MODEL = dict(n_layer=3, n_head=4, n_embd=32)
LAYERS = 3
MATRICES = 12 * 32 * 32 * LAYERS  # entries of c_attn, c_proj, c_fc and c_proj of each layer


def build(group=None, sum_gradients=False, dtype=torch.float32, **options):
    model = random_model(dtype, **MODEL)
    settings = dict(learning_rate=1e-2, muon_learning_rate=2e-2, betas=(0.9, 0.95), weight_decay=0.1,
                    momentum=0.95) | options
    return model, build_muon(model, **settings, group=group, sum_gradients=sum_gradients)


def gradients(model, it, rank=0, processes=1) -> None:
    """This process's share of the gradient of 4 sequences' mean loss."""
    for i in range(rank, 4, processes):
        loss = model(tokens(1, 16, seed=4 * it + i), tokens(1, 16, seed=1000 + 4 * it + i))[1]
        (loss / 4).backward()


def step(model, optimizer, it) -> None:
    gradients(model, it)
    optimizer.step()
    optimizer.zero_grad()


def distance(model, other) -> float:
    pairs = zip(model.parameters(), other.parameters())
    return max((p - q).abs().max().item() for p, q in pairs)


@pytest.mark.parametrize("rows, columns", [(48, 48), (32, 128)])
def test_newton_schulz_is_nearly_orthogonal(rows, columns):
    """All singular values near 1, in the directions that the matrix had."""
    torch.manual_seed(0)
    matrices = torch.randn(5, rows, columns, dtype=torch.float64)
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    matrices = U @ torch.diag_embed(torch.linspace(0.02, 1.0, rows, dtype=S.dtype).expand_as(S)) @ V
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = newton_schulz(matrices, dtype).double()
        inside = U.mT @ found @ V.mT  # diagonal if the directions are the same
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert 0.65 < values.min() and values.max() < 1.25
        assert (inside - torch.diag_embed(values)).abs().max() < tolerance


def test_updates():
    """A matrix moves by an orthogonal one, of RMS 0.2 if that were exact; q, k and v each by its own."""
    model, optimizer = build(weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, 0)
    for name, p in model.named_parameters():
        if not (".h." in name and p.dim() == 2):
            continue
        parts = (before[name] - p.detach()).chunk(3 if "c_attn" in name else 1)
        for part in parts:
            part = part / (2e-2 * 0.2 * math.sqrt(max(part.shape)))
            values = torch.linalg.svdvals(part)
            assert values.max() < 1.3 and values.median() > 0.6, (name, values)
            assert part.square().mean().sqrt() * math.sqrt(max(part.shape)) == pytest.approx(0.9, abs=0.2)


def test_groups_cover_every_parameter_once():
    model, optimizer = build()
    names = {p: name for name, p in model.named_parameters()}
    grouped = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, names))
    stacked = {names[p]: g["stacked"] for g in optimizer.param_groups if "stacked" in g for p in g["params"]}
    assert len(stacked) == 4 * LAYERS and {n for n in stacked if stacked[n] == 3} == {
        f"transformer.h.{i}.attn.c_attn.weight" for i in range(LAYERS)}
    set_learning_rate(optimizer, 5e-3)
    assert {g["lr"] for g in optimizer.param_groups if "stacked" in g} == {1e-2}
    assert {g["lr"] for g in optimizer.param_groups if "stacked" not in g} == {5e-3}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_parity_with_torch(exact, nesterov, monkeypatch):
    """torch.optim.Muon has bfloat16 built in: with that, and in fp32 with that taken out, the same steps."""
    torch.manual_seed(0)
    shapes = [(32, 32), (128, 32), (32, 128), (32, 32)]
    weights = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    optimizer = Muon([{"params": ours, "stacked": 1}], lr=0.01, weight_decay=0.1, nesterov=nesterov,
                     product_dtype=torch.float32 if exact else torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=nesterov,
                                 adjust_lr_fn="match_rms_adamw")
    if exact:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    # a step is 0.01 * 0.2: 4 of them in bfloat16, whose products are rounded in another order in a batch
    tolerance = 1e-6 if exact else 4 * 0.01 * 0.2 * 0.1
    assert max((p - q).abs().max().item() for p, q in zip(ours, theirs)) < tolerance
    assert max((p - w).abs().max().item() for p, w in zip(ours, weights)) > 5e-3


def test_the_rest_is_adamw():
    """Embeddings and vectors move as build_adamw moves them, with the same gradients."""
    (model, optimizer), other = build(), random_model(torch.float32, **MODEL)
    adamw = build_adamw(other, 1e-2, (0.9, 0.95), 0.1)
    rest = [name for name, p in model.named_parameters() if not (".h." in name and p.dim() == 2)]
    for it in range(3):
        for i in range(2):
            (model(tokens(1, 16, seed=2 * it + i), tokens(1, 16, seed=99 - it))[1] / 2).backward()
        for p, q in zip(model.parameters(), other.parameters()):
            q.grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        adamw.step()
    assert len(rest) == 3 + 8 * LAYERS + 1 and all(
        torch.equal(model.get_parameter(name), other.get_parameter(name)) for name in rest)
    assert distance(model, other) > 1e-3


@pytest.mark.parametrize("options, message", [
    (dict(momentum=1.0), "muon_momentum=1.0"), (dict(muon_learning_rate=-1.0), "muon_learning_rate=-1.0"),
    (dict(learning_rate=0.0), "learning_rate=0.0 must be above 0"), (dict(betas=(1.0, 0.9)), "beta1=1.0")])
def test_impossible_settings(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


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
    """10 updates: equal weights, each momentum in one place, bytes as stated. In fp64, because gradients are
    summed in another order and Newton-Schulz enlarges that up to 500 times in directions that hardly count.
    """
    alone, optimizer = build(dtype=torch.float64)
    model, sharded = build(group, sum_gradients, torch.float64)
    for it in range(10):
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
    assert 1 <= sent / (10 * (updates + sums * sum_gradients)) < 1.15, (n, sum_gradients)
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


@pytest.mark.slow
def test_any_number_of_processes(tmp_path):
    run_processes(4, check_processes, tmp_path)


def test_state_is_of_this_optimizer():
    model, optimizer = build()
    step(model, optimizer, 0)
    state = state_by_name(optimizer, model)
    adamw = build_adamw(model, 1e-2, (0.9, 0.95), 0.1)
    with pytest.raises(UserError, match="saved with another --optimizer"):
        load_state_by_name(adamw, model, state)
    for name in list(state):
        if name.endswith("momentum_buffer"):
            matrix, zeros = name.rpartition(".")[0], torch.zeros_like(state.pop(name))
            state |= {f"{matrix}.exp_avg": zeros, f"{matrix}.exp_avg_sq": zeros,
                      f"{matrix}.step": torch.ones(())}
    load_state_by_name(adamw, model, state)
    with pytest.raises(UserError, match="saved with another --optimizer"):
        load_state_by_name(optimizer, model, state)


RUN = [*TINY, "--optimizer=muon", "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=12",
       "--learning_rate=1e-2", "--muon_learning_rate=1e-2", "--checkpoint_interval=6", "--eval_interval=6"]


@pytest.mark.slow
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
    assert resumed.code == 2 and "saved with another --optimizer" in resumed.err
    for wrong, message in (("--optimizer=sgd", "use adamw or muon"), ("--use_zero1", "leave use_zero1 out"),
                           ("--tp_processes=2", "needs whole matrices"),
                           ("--use_fsdp", "and use_fsdp divides them")):
        done = run_script(script, *args, wrong)
        assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1
