"""train_gpt.py: a run as a user starts it, its settings, exact resume, and what each variant claims. CPU; a
minute.

    python -m pytest tests/unit/test_train_gpt.py
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import random_speedrun_model as random_model
from helpers import tokens
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from configurator import read_settings
from nanosync.dataloader import evaluation_batches, open_dataset
from nanosync.errors import UserError
from nanosync.optim import trapezoidal_learning_rate

VARIANTS = list(train_gpt.VARIANTS)


def config(**changes) -> dict:
    """The script's settings, smaller, for schedules."""
    settings = {setting.name: vars(train_gpt)[setting.name] for setting in read_settings(vars(train_gpt))}
    return settings | dict(n_layer=4, sequence_length=32, num_iterations=100) | changes


def test_val_tokens_are_the_first(tiny_data):
    """Those that other scripts for the same record look at."""
    val = open_dataset(str(tiny_data), 32).val
    x = torch.cat([x for x, _ in evaluation_batches(val, 10, 4, torch.device("cpu"), spread=False)])
    assert x[:10].flatten().tolist() == val.files[0][:320].tolist()


def test_trapezoidal_schedule():
    rates = [trapezoidal_learning_rate(step, 2.0, 4, 10, 100) for step in range(101)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[90] == 2.0 and rates[91] == pytest.approx(1.8)
    assert rates[100] == 0.0 and trapezoidal_learning_rate(0, 2.0, 0, 0, 5) == 2.0
    overlapping = [trapezoidal_learning_rate(step, 12.0, 8, 6, 10) for step in range(11)]
    assert overlapping == [1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 8.0, 6.0, 4.0, 2.0, 0.0]  # never the peak, no jump


def test_initialisation_and_groups():
    torch.manual_seed(0)
    model = train_gpt.GPT(train_gpt.GPTConfig(sequence_length=8, vocab_size=50304, n_layer=12, n_head=6,
                                              n_embd=768))
    assert model.n_parameters() == 12 * 12 * 768**2 + 50304 * 768
    for name, p in model.named_parameters():
        std = 0 if "c_proj" in name else (3 * 768)**-0.5
        assert p.std().item() == pytest.approx(std, rel=0.01), name


def test_baseline_by_the_formulas():
    """Rotary embedding, QK-norm, RMSNorm, ReLU^2 and the tied head, written out; loss and logits agree."""
    model, idx = random_model(), tokens(2, 20)
    C, H, D, T = 16, 2, 8, 20
    angle = torch.outer(torch.arange(T), 10000 ** -(torch.arange(0, D, 2) / D)).double()

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):  # (B, H, T, D)
        y = torch.complex(*norm(x).chunk(2, -1)) * torch.polar(torch.ones_like(angle), -angle)
        return torch.cat((y.real, y.imag), -1)

    x = model.transformer.wte.weight[idx]
    for block in model.transformer.h:
        q, k, v = (part.view(2, T, H, D).transpose(1, 2)
                   for part in (norm(x) @ block.attn.c_attn.weight.T).chunk(3, -1))
        future = torch.ones(T, T).triu(1).bool()
        scores = (turned(q) @ turned(k).mT / math.sqrt(D)).masked_fill(future, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, C) @ block.attn.c_proj.weight.T
        x = x + F.relu(norm(x) @ block.mlp.c_fc.weight.T)**2 @ block.mlp.c_proj.weight.T
    logits = norm(x) @ model.transformer.wte.weight.T
    assert torch.allclose(model(idx)[0], logits, atol=1e-6)  # the tables of angles are fp32
    loss = F.cross_entropy(logits.flatten(0, 1), tokens(2, 20, seed=2).flatten())
    assert model(idx, tokens(2, 20, seed=2))[1].item() == pytest.approx(loss.item(), abs=1e-6)


def test_palm_has_one_norm_and_scales(monkeypatch):
    model, norms = random_model("palm"), []
    rms_norm = train_gpt.rms_norm
    monkeypatch.setattr(train_gpt, "rms_norm", lambda x: norms.append(x) or rms_norm(x))
    block, x = model.transformer.h[0], torch.randn(2, 8, 16, dtype=torch.float64)
    cos, sin = model.rotations(8, 8)
    out = block(x, cos, sin, 8)
    assert len(norms) == 1 and norms[0] is x
    y = rms_norm(x)
    assert torch.allclose(out, x + (block.attn(y, cos, sin, 8) + block.mlp(y)) / math.sqrt(2))


@pytest.mark.parametrize("crop", [8, 16, 24, 32])
def test_crops_are_sequences_of_their_own(crop):
    """Losses of pieces are those of the same tokens as short sequences, also where crop does not divide T."""
    model, x, y = random_model(), tokens(3, 32), tokens(3, 32, seed=2)
    pieces = [slice(start, min(start + crop, 32)) for start in range(0, 32, crop)]
    apart = sum(model(x[:, p], y[:, p])[1] * (p.stop - p.start) for p in pieces) / 32
    assert model(x, y, crop)[1].item() == pytest.approx(apart.item(), rel=1e-9)
    assert (crop == 32) == (model(x, y)[1].item() == pytest.approx(apart.item(), rel=1e-9))


def test_plateau_rule():
    """A length gives way when n losses are less than `gain` below the n before, by what is known two steps
    later, or at its share; and starts counting anew."""
    def run(losses, **options):
        schedule = train_gpt.Curriculum(config(curriculum_plateau_steps=5, curriculum_plateau_gain=0.1,
                                               curriculum_shares=[0.4, 0.8, 0.9], **options))
        crops = []
        for step, loss in enumerate(losses):
            crops.append(schedule.plan(step).crop)
            schedule.observe(step, loss)
        return [crops.index(length) for length in sorted(set(crops))], sorted(set(crops))

    falling = [10 - 0.1 * step for step in range(100)]
    assert run(falling) == ([0, 40, 80, 90], [8, 16, 24, 32])  # by the shares alone
    flat = falling[:20] + [8.0] * 80
    gains = {s: np.mean(flat[s - 11:s - 6]) - np.mean(flat[s - 6:s - 1]) for s in range(11, 100)}
    first = next(s for s in gains if gains[s] < 0.1)
    assert run(flat)[0][1] == first and 20 < first < 30
    assert run(flat)[0][2] == first + 11  # 2 x 5 losses of its own, and the one that is late
    assert run(flat, curriculum_lengths=[4, 8, 16, 32])[1] == [4, 8, 16, 32]
    schedule = train_gpt.Curriculum(config(curriculum_plateau_steps=0))
    assert [schedule.plan(step).crop for step in (0, 9, 10, 19, 20, 30, 99)] == [8, 8, 16, 16, 24, 32, 32]


def test_a_report_read_early_changes_no_plan():
    """A checkpoint reads the last loss before its step would have: no plateau may come sooner for it."""
    def plans(early):
        schedule, crops, late = train_gpt.Curriculum(config(curriculum_plateau_steps=3)), [], None
        for step in range(60):
            if step % early == 0 and late is not None:
                schedule.observe(*late)
                late = None
            crops.append(schedule.plan(step).crop)
            if late is not None:
                schedule.observe(*late)
            late = step, 5 - 0.02 * min(step, 7)
        return crops
    assert plans(1) == plans(4) == plans(1000)


def test_depth_warm_plan():
    schedule = train_gpt.DepthWarm(config(n_layer=12, depth_warm_layers=4, depth_warm_share=0.5,
                                          num_iterations=1000))
    plans = [schedule.plan(step).layers for step in range(1000)]
    assert plans[0] == (0, 1, 2, 3) and set(plans[500:]) == {tuple(range(12))}
    assert all(set(range(4)) <= set(plan) and list(plan) == sorted(plan) for plan in plans)
    counts = [np.mean([len(plan) for plan in plans[start:start + 100]]) for start in range(0, 500, 100)]
    assert counts == sorted(counts) and 4 <= counts[0] < 5.5 and 10 < counts[-1] < 12
    takes_part = np.mean([8 in plan for plan in plans[300:400]])
    expected = np.mean([schedule.survival(8, step) for step in range(300, 400)])
    assert takes_part == pytest.approx(expected, abs=0.15)
    assert schedule.survival(11, 400) == 0.0 and schedule.survival(0, 0) == schedule.survival(11, 500) == 1.0
    again = train_gpt.DepthWarm(config(n_layer=12, depth_warm_share=0.5, num_iterations=1000))
    assert [again.plan(step).layers for step in (250, 120)] == [plans[250], plans[120]]  # no state


def test_inactive_layers_are_not_computed():
    """Arithmetic follows the active depth; inactive layers get no gradient."""
    model = random_model(dtype=torch.float32, n_layer=8, n_embd=128, n_head=2)
    x, y = tokens(16, 32), tokens(16, 32, seed=2)

    def cost(n: int) -> int:
        with FlopCounterMode(display=False) as flops:
            model(x, y, None, tuple(range(n)))[1].backward()
        return flops.get_total_flops()

    layer = cost(2) - cost(1)
    assert cost(8) == cost(1) + 7 * layer and layer > 0
    model.zero_grad()
    model(x, y, None, (0, 3))[1].backward()
    reached = [block.mlp.c_fc.weight.grad is not None for block in model.transformer.h]
    assert [i for i in range(8) if reached[i]] == [0, 3]


def test_a_layer_that_joins_changes_nothing():
    model = train_gpt.GPT(train_gpt.GPTConfig(sequence_length=32, vocab_size=61, n_layer=4, n_head=2,
                                              n_embd=16))
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    assert torch.equal(model(x, y, None, (0,))[1], model(x, y)[1])


def test_sync_everywhere_is_the_baseline():
    dense, sync = random_model(), random_model("sync", tp_size=2, sync_points=list(range(6)))
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    losses = [model(x, y)[1] for model in (dense, sync)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12) and sync.syncs == 6
    for p, q in zip(dense.parameters(), sync.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("points, syncs", [([1, 3, 5], 3), ([3], 2), ([0, 4], 3), ([], 1)])
def test_sync_by_its_definition(points, syncs):
    """Each rank works on the shared base and its own pending part, with its own part of each matrix."""
    model, idx, R = random_model("sync", tp_size=2, sync_points=points), tokens(2, 20), 2
    rms_norm, cos_sin = train_gpt.rms_norm, model.rotations(20, 20)
    base = model.transformer.wte.weight[idx]
    pending = [torch.zeros_like(base) for _ in range(R)]
    for j in range(6):
        block = model.transformer.h[j // 2]
        for r in range(R):
            x = rms_norm(base + pending[r])
            if j % 2 == 0:
                rows = block.attn.c_attn.weight.view(3, R, 8, 16)[:, r].reshape(24, 16)
                y = train_gpt.attend((x @ rows.T).view(2, 20, 3, 1, 8), *cos_sin, 20)
                out = y @ block.attn.c_proj.weight.chunk(R, 1)[r].T
            else:
                y = F.relu(x @ block.mlp.c_fc.weight.chunk(R)[r].T)**2
                out = y @ block.mlp.c_proj.weight.chunk(R, 1)[r].T
            pending[r] = pending[r] + out
        if j in points:
            base, pending = base + sum(pending), [torch.zeros_like(base) for _ in range(R)]
    logits = rms_norm(base + sum(pending)) @ model.transformer.wte.weight.T
    assert torch.allclose(model(idx)[0], logits, rtol=1e-9, atol=1e-11) and model.syncs == syncs


class SumsInFp32(TorchFunctionMode):
    """CUDA's autocast, unlike the CPU's, computes a sum in fp32 unless the sum names a dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.float() if func is torch.Tensor.sum and "dtype" not in (kwargs or {}) else out


@pytest.mark.parametrize("variant, changes", [
    *((variant, {}) for variant in VARIANTS if variant != "sync"),
    ("sync", dict(tp_size=2, sync_points=[1, 3, 5])), ("sync", dict(tp_size=2, sync_points=[]))])
def test_the_residual_stream_is_in_the_compute_dtype(variant, changes, monkeypatch):
    """In and after every block; fp32 would double what most of a step's memory traffic moves."""
    model, seen = random_model(variant, torch.float32, **changes), []
    rms_norm = train_gpt.rms_norm
    monkeypatch.setattr(train_gpt, "rms_norm", lambda x: seen.append(x.dtype) or rms_norm(x))
    with torch.autocast("cpu", torch.bfloat16), SumsInFp32():
        x = model.hidden(tokens(2, 8), 8, (0, 1, 2))
    assert x.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16} and len(seen) >= 4


def test_variant_of_another_name_is_refused():
    with pytest.raises(UserError, match="variant='x' is unknown"):
        train_gpt.GPTConfig(sequence_length=8, vocab_size=61, n_layer=1, n_head=1, n_embd=8, variant="x")
