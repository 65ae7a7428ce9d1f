"""Muon: orthogonal updates, torch.optim.Muon's steps, the same on 1, 2 and 4 processes, what they send,
checkpoints across numbers of processes, exact resume. CPU, real gloo processes; half a minute.

    python -m pytest tests/unit/test_muon.py
"""

import math

import pytest
import torch
from helpers import MUON_LAYERS as LAYERS
from helpers import MUON_MODEL as MODEL
from helpers import largest_distance as distance
from helpers import muon_model as build
from helpers import muon_step as step
from helpers import random_model, tokens

from nanosync.errors import UserError
from nanosync.muon import Muon, newton_schulz
from nanosync.optim import build_adamw, set_learning_rate
from nanosync.optimizer_state import load_state_by_name, state_by_name


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
