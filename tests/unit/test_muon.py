"""Muon: orthogonal updates, torch.optim.Muon's steps; Polar Express, NorMuon, cautious decay and scales
against plain PyTorch; AdamW's groups; state by name. CPU; seconds. Several processes:
tests/processes/test_muon_processes.py.

    python -m pytest tests/unit/test_muon.py
"""

import math

import pytest
import torch
from helpers import MUON_LAYERS as LAYERS
from helpers import MUON_MODEL as MODEL
from helpers import largest_distance as distance
from helpers import muon_gradients as gradients
from helpers import muon_model as build
from helpers import muon_step as step
from helpers import random_model, tokens

from nanosync.errors import UserError
from nanosync.muon import (
    Muon,
    decay_cautiously,
    newton_schulz,
    normalise_neurons,
    polar_factor,
)
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


@pytest.mark.parametrize("rows, columns", [(48, 48), (32, 128)])
def test_polar_factor_is_closer_to_orthogonal_than_newton_schulz(rows, columns):
    """Singular values from 0.01 to 1 of the largest: near 1 afterwards, and the directions stay."""
    torch.manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(5, rows, columns, dtype=torch.float64), full_matrices=False)
    matrices = 30 * U @ torch.diag_embed(torch.linspace(0.01, 1.0, rows, dtype=U.dtype).expand(5, rows)) @ V
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        inside = U.mT @ polar_factor(matrices, dtype).double() @ V.mT
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert 0.85 < values.min() and values.max() < 1.15
        assert (inside - torch.diag_embed(values)).abs().max() < tolerance
        worst = (torch.linalg.svdvals(newton_schulz(matrices, dtype).double()) - 1).abs().max()
        assert (values - 1).abs().max() < 0.6 * worst
    assert polar_factor(torch.zeros(1, 4, 4), torch.float32).abs().max() == 0


def test_polar_factor_is_its_formula():
    torch.manual_seed(0)
    M = torch.randn(8, 16, dtype=torch.float64)
    X = M / (1.02 * M.square().sum().sqrt() + 1e-6)
    for a, b, c in ((8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5), (3.8917, -2.7725, 0.5061),
                    (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232)):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    assert torch.allclose(polar_factor(M[None], torch.float64)[0], X, rtol=1e-10)


@pytest.mark.parametrize("rows, columns", [(6, 6), (6, 24), (24, 6)])
def test_normalise_neurons_is_its_formula(rows, columns):
    """Moments along the longer side over three steps; the Frobenius norm stays; step 1 equalises neurons."""
    torch.manual_seed(0)
    along, shape = (1, (rows, 1)) if rows >= columns else (0, (1, columns))
    seconds, reference = torch.zeros(2, *shape, dtype=torch.float64), torch.zeros(2, *shape).double()
    for it in range(3):
        X = torch.randn(2, rows, columns, dtype=torch.float64) * torch.rand(2, *shape)
        expected = []
        for i, matrix in enumerate(X):
            reference[i] = 0.9 * reference[i] + 0.1 * matrix.square().mean(along, keepdim=True)
            scaled = matrix / reference[i].sqrt()
            expected.append(scaled * matrix.norm() / scaled.norm())
        result = X.clone()
        normalise_neurons(result, seconds, 0.9)
        assert torch.allclose(seconds, reference, rtol=1e-12)
        assert torch.allclose(result, torch.stack(expected), rtol=1e-10)
        assert torch.allclose(result.flatten(1).norm(dim=1), X.flatten(1).norm(dim=1), rtol=1e-12)
        if it == 0:
            lengths = result.norm(dim=along + 1)
            assert torch.allclose(lengths, lengths[:, :1].expand_as(lengths), rtol=1e-10)
    half, moments = X.bfloat16(), seconds.float()  # as on CUDA: moments and factors stay in fp32
    normalise_neurons(half, moments, 0.9)
    normalise_neurons(X, seconds, 0.9)
    assert torch.allclose(half.double(), X, rtol=0.02)
    assert torch.allclose(moments.double(), seconds, rtol=0.02)
    zeros = torch.zeros(1, rows, columns)
    normalise_neurons(zeros, torch.zeros(1, *shape), 0.9)
    assert zeros.abs().max() == 0  # a matrix without a gradient stays finite


NORMUON = dict(polar_express=True, norm_beta2=0.9, cautious=True, scale="spectral")


def test_normuon_is_its_formula():
    """Four steps of stacked, wide and tall matrices with a rising momentum, against plain PyTorch in fp64."""
    torch.manual_seed(0)
    shapes = {"stacked": (24, 8), "wide": (8, 32), "tall": (32, 8)}
    ours = {name: torch.nn.Parameter(torch.randn(shape).double()) for name, shape in shapes.items()}
    optimizer = Muon([dict(params=[ours["stacked"]], stacked=3, lr_ratio=2.0),
                      dict(params=[ours["wide"], ours["tall"]], stacked=1)], lr=0.02, weight_decay=0.5,
                     product_dtype=torch.float64, **NORMUON)
    matrices = {(name, i): m.clone() for name, p in ours.items()
                for i, m in enumerate(p.detach().chunk(3 if name == "stacked" else 1))}
    momenta, seconds = dict.fromkeys(matrices, 0), dict.fromkeys(matrices, 0)
    for momentum in (0.85, 0.9, 0.95, 0.95):
        optimizer.momentum = momentum
        for p in ours.values():
            p.grad = torch.randn_like(p)
        for (name, i), W in matrices.items():
            key, lr = (name, i), 0.04 if name == "stacked" else 0.02
            grad = ours[name].grad.chunk(3 if name == "stacked" else 1)[i]
            momenta[key] = momentum * momenta[key] + (1 - momentum) * grad
            move = momentum * momenta[key] + (1 - momentum) * grad
            tall = W.shape[0] > W.shape[1]
            X = polar_factor((move.T if tall else move)[None], torch.float64)[0]
            X = X.T if tall else X
            along = 0 if name == "wide" else 1
            seconds[key] = 0.9 * seconds[key] + 0.1 * X.square().mean(along, keepdim=True)
            scaled = X / seconds[key].sqrt()
            X = scaled * X.norm() / scaled.norm()
            W -= lr * 0.5 * W * (X * W >= 0) + lr * max(1, W.shape[0] / W.shape[1])**0.5 * X
        optimizer.step()
    for (name, i), W in matrices.items():
        found = ours[name].detach().chunk(3 if name == "stacked" else 1)[i]
        assert torch.allclose(found, W, rtol=1e-9, atol=1e-12), (name, i)
    assert [tuple(optimizer.state[p]["second_moment"].shape) for p in ours.values()] == [
        (24, 1), (1, 32), (32, 1)]


def test_cautious_decay_needs_a_common_sign():
    """Only weights that the update moves towards 0 decay; with an update of 0 a weight decays as well."""
    weights = torch.tensor([[1.0, -1.0, 2.0, -2.0], [3.0, 0.0, 1.0, -1.0]])
    update = torch.tensor([[1.0, 1.0, -1.0, -1.0], [0.0, 1.0, -0.5, -0.5]])
    p = torch.nn.Parameter(weights.clone())
    decay_cautiously([p.data], [update], 0.1)
    kept = torch.tensor([[0.9, 1.0, 1.0, 0.9], [0.9, 0.9, 1.0, 0.9]])
    assert torch.allclose(p, weights * kept)


def test_groups_of_adamw_have_their_own_options():
    """Tables and scalars with their own betas, eps, decay and learning rate: as torch.optim.AdamW of each."""
    torch.manual_seed(0)
    shapes = [(8, 8), (40, 4), (3,)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = [dict(betas=(0.75, 0.95), eps=1e-10, weight_decay=0.2), dict(betas=(0.9, 0.99))]
    optimizer = Muon([dict(params=ours[:1], stacked=1), dict(params=ours[1:2], lr_ratio=75.0, **options[0]),
                      dict(params=ours[2:], lr_ratio=5.0, **options[1])], lr=1e-4, weight_decay=0.0)
    references = [torch.optim.AdamW(theirs[1:2], lr=75e-4, fused=True, **options[0]),
                  torch.optim.AdamW(theirs[2:], lr=5e-4, weight_decay=0.0, fused=True, **options[1])]
    for it in range(3):
        set_learning_rate(optimizer, 1e-4 / (it + 1))
        for reference, ratio in zip(references, (75.0, 5.0)):
            reference.param_groups[0]["lr"] = 1e-4 / (it + 1) * ratio
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for each in (optimizer, *references):
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(ours[1:], theirs[1:]))


@pytest.mark.parametrize("options, message", [
    (dict(norm_beta2=1.0), "norm_beta2=1.0"), (dict(scale="unit"), "use rms or spectral"),
    (dict(betas=(0.9, 1.5)), "beta2=1.5"), (dict(lr_ratio=-1.0), "learning_rate=-0.01")])
def test_impossible_options(options, message):
    group = {key: options.pop(key) for key in ("betas", "lr_ratio") if key in options}
    with pytest.raises(UserError, match=message):
        Muon([dict(params=[torch.nn.Parameter(torch.ones(4, 4))], stacked=1),
              dict(params=[torch.nn.Parameter(torch.ones(4))], **group)], lr=0.01, **options)


def test_a_parameter_without_a_gradient_has_a_state():
    """A head that is tied until late in training: a checkpoint from before that loads."""
    model, optimizer = build(norm_beta2=0.9)
    gradients(model, 0)
    model.transformer.wpe.weight.grad = None
    optimizer.step()
    state = state_by_name(optimizer, model)
    assert state["transformer.wpe.weight.step"] == 0 and state["transformer.wte.weight.step"] == 1
    twin, other = build(norm_beta2=0.9)
    load_state_by_name(other, twin, state)
    assert all(torch.equal(t, state[name]) for name, t in state_by_name(other, twin).items())
    wrong = {"transformer.h.0.mlp.c_fc.weight.second_moment": torch.ones(32, 1)}
    with pytest.raises(UserError, match=r"c_fc.weight.second_moment is \(32, 1\) and must be \(128, 1\)"):
        load_state_by_name(other, twin, state | wrong)


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
    with pytest.raises(UserError, match="resume with the --optimizer of the run"):
        load_state_by_name(adamw, model, state)
    for name in list(state):
        if name.endswith("momentum_buffer"):
            matrix, zeros = name.rpartition(".")[0], torch.zeros_like(state.pop(name))
            state |= {f"{matrix}.exp_avg": zeros, f"{matrix}.exp_avg_sq": zeros,
                      f"{matrix}.step": torch.ones(())}
    load_state_by_name(adamw, model, state)
    with pytest.raises(UserError, match="resume with the --optimizer of the run"):
        load_state_by_name(optimizer, model, state)
