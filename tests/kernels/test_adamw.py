"""AdamW with clipping against PyTorch in fp64.

PyTorch's code everywhere; the kernels with a GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_adamw.py
"""

import pytest
import torch

from kernels import INTERPRETED, adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")
SHAPES = [(5, 7), (3, 4096), (1,), (9000,)]
OPTIONS = dict(lr=1e-2, betas=(0.9, 0.999))


def groups(dtype):
    """Two groups of parameters on the device, with the same values for every dtype."""
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape).to(DEVICE, dtype)) for shape in SHAPES]
    return [{"params": made[:2], "weight_decay": 0.1}, {"params": made[2:], "weight_decay": 0.0}]


def set_gradients(optimizer, seed):
    torch.manual_seed(seed)
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        p.grad = torch.randn(p.shape).to(p)


def parameters(optimizer):
    return [p for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("max_norm", [1.0, 1e6, 0.0])
def test_steps_against_fp64(max_norm):
    """Three steps with another learning rate each: parameters, moments and norm."""
    ours, exact = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS), \
        torch.optim.AdamW(groups(torch.float64), **OPTIONS)
    for step in range(3):
        for optimizer in (ours, exact):
            set_gradients(optimizer, step)
            for g in optimizer.param_groups:
                g["lr"] = 1e-2 / (step + 1)
        norm = ours.clip_and_step(max_norm)
        expected = torch.nn.utils.clip_grad_norm_(parameters(exact), max_norm or 1e30)
        exact.step()
        assert abs(float(norm / expected) - 1) < 1e-5
    for p, q in zip(parameters(ours), parameters(exact)):
        assert torch.allclose(p.double(), q, rtol=1e-5, atol=1e-6)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            found, z = ours.state[p][name].double(), exact.state[q][name].double()
            assert torch.allclose(found, z, rtol=1e-4, atol=1e-6 * float(z.abs().max()))


@RUNS
def test_gradients_stay_as_they_are():
    ours = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS)
    set_gradients(ours, 0)
    before = [p.grad.clone() for p in parameters(ours)]
    ours.clip_and_step(0.1)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters(ours), before))


@pytest.mark.parametrize("kind", ["missing", "strided"])
def test_other_gradients(kind):
    """A parameter without a gradient is left alone, and a strided gradient is read as it is."""
    ours, exact = (cls(groups(torch.float32), **OPTIONS) for cls in (adamw.ClippingAdamW, torch.optim.AdamW))
    for optimizer in (ours, exact):
        set_gradients(optimizer, 0)
        p = parameters(optimizer)[0]
        p.grad = None if kind == "missing" else p.grad.T.contiguous().T
    ours.clip_and_step(1.0)
    torch.nn.utils.clip_grad_norm_(parameters(exact), 1.0)
    exact.step()
    for p, q in zip(parameters(ours), parameters(exact)):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_nan_reaches_norm_and_parameters():
    """A run that has diverged must not look healthy."""
    ours = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS)
    set_gradients(ours, 0)
    parameters(ours)[1].grad[2, 5] = float("nan")
    assert ours.clip_and_step(1.0).isnan()
    assert all(p.isnan().all() for p in parameters(ours))


def test_state_is_that_of_adamw():
    """A checkpoint of one loads into the other."""
    ours, theirs = (cls(groups(torch.float32), **OPTIONS) for cls in (adamw.ClippingAdamW, torch.optim.AdamW))
    set_gradients(ours, 0)
    ours.clip_and_step(1.0)
    theirs.load_state_dict(ours.state_dict())
    for p, q in zip(parameters(ours), parameters(theirs)):
        assert set(theirs.state[q]) == set(ours.state[p])
        assert torch.equal(theirs.state[q]["exp_avg"], ours.state[p]["exp_avg"])


def test_hooks_after_a_step_run_once():
    """Casts of weights to FP8 are made in one."""
    weight = torch.nn.Parameter(torch.ones(5, 7, device=DEVICE))
    optimizer, seen = adamw.ClippingAdamW([{"params": [weight]}], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    weight.grad = torch.ones_like(weight)
    optimizer.clip_and_step(1.0)
    assert len(seen) == 1 and torch.equal(seen[0], weight) and (weight < 1).all()
