"""Parameter groups, AdamW, schedule, gradient norm, optimizer state by name. CPU; seconds.

    python -m pytest tests/unit/test_optim.py
"""

import math

import pytest
import torch
from helpers import random_model, tokens

from kernels.adamw import ClippingAdamW
from nanosync.errors import UserError
from nanosync.optim import (
    ShardedAdamW,
    build_adamw,
    clip_gradients,
    cosine_learning_rate,
    parameter_groups,
    share_out,
)
from nanosync.optimizer_state import load_state_by_name, state_by_name


def step(model, optimizer, seed):
    _, loss = model(tokens(4, 16, seed=seed), tokens(4, 16, seed=seed + 100))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@pytest.mark.parametrize("bias", [True, False])
def test_groups_cover_every_parameter_once(bias):
    model = random_model(bias=bias)
    decay, no_decay = parameter_groups(model, 0.1)
    assert sorted(map(id, decay["params"] + no_decay["params"])) == sorted(map(id, model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in no_decay["params"])
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_adamw_is_adamw():
    """Five steps against the formulas of arXiv 1711.05101 in fp64."""
    model = random_model()
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.items()}
    optimizer = build_adamw(model, 1e-2, (0.9, 0.95), 0.1)
    assert type(optimizer) is ClippingAdamW and issubclass(ShardedAdamW, ClippingAdamW)
    for t in range(1, 6):
        _, loss = model(tokens(4, 16, seed=t), tokens(4, 16, seed=t + 100))
        loss.backward()
        for name, p in model.named_parameters():
            m, v = moments[name]
            m.mul_(0.9).add_(0.1 * p.grad)
            v.mul_(0.95).add_(0.05 * p.grad**2)
            reference[name] *= 1 - 1e-2 * (0.1 if p.dim() >= 2 else 0.0)
            reference[name] -= 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.allclose(p, reference[name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("options", [dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)),
                                     dict(learning_rate=-1.0), dict(weight_decay=-0.1)])
def test_impossible_settings(options):
    possible = dict(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    with pytest.raises(UserError):
        build_adamw(random_model(), **(possible | options))


def test_learning_rate_is_nanogpts():
    def lr(step):
        return cosine_learning_rate(step, 6e-4, 6e-5, 10, 110)

    assert lr(0) == pytest.approx(6e-4 / 11) and lr(9) == pytest.approx(6e-4 * 10 / 11) and lr(10) == 6e-4
    assert lr(60) == pytest.approx((6e-4 + 6e-5) / 2) and lr(110) == pytest.approx(6e-5) and lr(10**6) == 6e-5
    assert cosine_learning_rate(0, 1.0, 0.1, 0, 0) == 1.0
    assert lr(35) == pytest.approx(6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4)


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e6])
def test_clipping_is_torchs(max_norm):
    model, reference = random_model(), random_model()
    for m in (model, reference):
        m(tokens(4, 16), tokens(4, 16, seed=9))[1].backward()
    norm = clip_gradients(model.parameters(), max_norm)
    limit = max_norm if max_norm else float("inf")
    assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(reference.parameters(), limit))
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12)


def test_state_by_name_continues_exactly():
    model = random_model(torch.float32)
    optimizer = build_adamw(model, 1e-2, (0.9, 0.95), 0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    twin = random_model(torch.float32)
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build_adamw(twin, 1e-2, (0.9, 0.95), 0.1)
    state = {name: t.clone() for name, t in state_by_name(optimizer, model).items()}
    assert {name.rpartition(".")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(state) == 3 * len(list(model.parameters()))
    load_state_by_name(twin_optimizer, twin, state)
    for seed in range(3, 8):
        assert step(model, optimizer, seed) == step(twin, twin_optimizer, seed)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)
    cropped = state | {"transformer.wpe.weight.exp_avg": state["transformer.wpe.weight.exp_avg"][:8]}
    with pytest.raises(UserError, match=r"wpe\.weight\.exp_avg is \(8, 32\) and the parameter \(16, 32\)"):
        load_state_by_name(twin_optimizer, twin, cropped)
    del state["transformer.wte.weight.exp_avg"]
    with pytest.raises(UserError, match=r"transformer\.wte\.weight\.exp_avg"):
        load_state_by_name(twin_optimizer, twin, state)


def test_shares_are_balanced():
    """GPT-2's: the embedding is the share of one, or a part of it, the rest goes evenly to the others."""
    with torch.device("meta"):
        sizes = [50304 * 768, 1024 * 768] + 12 * [3 * 768**2, 768**2, 4 * 768**2, 4 * 768**2, *6 * [768]]
        parameters = [torch.nn.Parameter(torch.empty(size)) for size in sizes]
    for n, largest in ((2, 0.5), (3, 1 / 3), (4, 50304 * 768 / sum(sizes))):
        owner = share_out(parameters, n)
        loads = [sum(p.numel() for p in parameters if owner[p] == rank) / sum(sizes) for rank in range(n)]
        assert max(loads) == pytest.approx(largest, rel=0.02) and sum(loads) == pytest.approx(1)
    few = share_out(parameters[:2], 4)
    assert sorted(few.values()) == [0, 1]  # and two own nothing
