"""AdamW with clipping against PyTorch in fp64.

The kernels run with a GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_adamw.py
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import run_processes

from kernels import INTERPRETED, adamw
from nanosync import parallelism
from nanosync.optim import ShardedAdamW

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


def clip_and_step(optimizer, max_norm):
    norm = optimizer.clip(max_norm)
    optimizer.step()
    return norm


@RUNS
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
        norm = clip_and_step(ours, max_norm)
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
    clip_and_step(ours, 0.1)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters(ours), before))


def pair():
    return [adamw.ClippingAdamW(groups(torch.float32), **OPTIONS),
            torch.optim.AdamW(groups(torch.float32), fused=True, **OPTIONS)]


@RUNS
def test_a_parameter_without_a_gradient_is_left_alone():
    ours, exact = pair()
    for optimizer in (ours, exact):
        set_gradients(optimizer, 0)
        parameters(optimizer)[0].grad = None
    assert ours.fits()
    clip_and_step(ours, 1.0)
    torch.nn.utils.clip_grad_norm_(parameters(exact), 1.0)
    exact.step()
    for p, q in zip(parameters(ours), parameters(exact)):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


class Subclass(torch.Tensor):
    """As a DTensor, whose address is that of a part."""


@RUNS
@pytest.mark.parametrize("kind", ["strided", "strided parameter", "subclass", "double", "empty",
                                  "at 4 bytes", "no gradient", "not fused"])
def test_other_tensors_do_not_fit(kind):
    ours, _ = pair()
    set_gradients(ours, 0)
    assert ours.fits()
    p = parameters(ours)[0]
    if kind == "strided":
        p.grad = p.grad.T.contiguous().T
    elif kind == "strided parameter":
        p.data = p.data.T.contiguous().T
    elif kind == "subclass":
        p.grad = p.grad.as_subclass(Subclass)
    elif kind == "at 4 bytes":
        p.grad = torch.zeros(36, device=DEVICE)[1:].view(5, 7)
    elif kind == "no gradient":
        ours.zero_grad()
    elif kind == "not fused":
        ours.load_state_dict(torch.optim.AdamW(groups(torch.float32)).state_dict())
    else:
        p.data = p.data.double() if kind == "double" else p.data[:0]
        p.grad = torch.zeros_like(p)
    assert not ours.fits()


def test_strided_gradients_are_read_as_they_are():
    ours, exact = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS), \
        torch.optim.AdamW(groups(torch.float64), **OPTIONS)
    for optimizer in (ours, exact):
        set_gradients(optimizer, 0)
        for p in parameters(optimizer)[:2]:
            p.grad = p.grad.T.contiguous().T
        optimizer.step()
    for p, q in zip(parameters(ours), parameters(exact)):
        assert torch.allclose(p.double(), q, rtol=1e-5, atol=1e-6)


@RUNS
def test_a_clip_is_forgotten_with_its_gradients():
    """After a step that a scaler left out, the next one does not use its factor. A copy has none either."""
    ours, theirs = pair()
    set_gradients(ours, 9)
    ours.clip(1e-3)
    copied = copy.deepcopy(ours)
    ours.zero_grad()
    for optimizer in (ours, theirs, copied):
        set_gradients(optimizer, 0)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(parameters(optimizer), parameters(ours)))


def test_a_step_without_clip_is_pytorchs():
    """Also the step after one with clip: each clip is for one step."""
    ours, theirs = pair()
    for step in range(3):
        if step == 1 and ours.fits():
            set_gradients(ours, 9)
            clip_and_step(ours, 1.0)
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # it would share the tensors
            for p, q in zip(parameters(ours), parameters(theirs)):
                q.data.copy_(p)
        for optimizer in (ours, theirs):
            set_gradients(optimizer, step)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(parameters(ours), parameters(theirs)))


def check_sharded(rank: int, world: int) -> None:
    """Two steps; the third parameter has no gradient in the first."""
    whole = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS)
    sharded = ShardedAdamW(groups(torch.float32), torch.distributed.group.WORLD, **OPTIONS)
    for step in range(2):
        for optimizer in (whole, sharded):
            set_gradients(optimizer, step)
            if step == 0:
                parameters(optimizer)[2].grad = None
            assert optimizer.fits()
        assert torch.equal(clip_and_step(whole, 1.0), clip_and_step(sharded, 1.0))
        for p, q in zip(parameters(whole), parameters(sharded)):
            assert torch.equal(p, q)
            assert ("exp_avg" in sharded.state[q]) == (sharded.owns(q) and q.grad is not None)


@pytest.mark.skipif(not INTERPRETED, reason="gloo, for processes without a GPU each")
def test_sharded_state_has_the_same_bits(tmp_path):
    run_processes(2, check_sharded, tmp_path)


@RUNS
def test_nan_reaches_norm_and_parameters():
    """A run that has diverged must not look healthy."""
    ours = adamw.ClippingAdamW(groups(torch.float32), **OPTIONS)
    set_gradients(ours, 0)
    parameters(ours)[1].grad[2, 5] = float("nan")
    assert clip_and_step(ours, 1.0).isnan()
    assert all(p.isnan().all() for p in parameters(ours))


@RUNS
def test_state_is_that_of_adamw():
    """A checkpoint of one loads into the other."""
    ours, theirs = pair()
    set_gradients(ours, 0)
    clip_and_step(ours, 1.0)
    theirs.load_state_dict(ours.state_dict())
    for p, q in zip(parameters(ours), parameters(theirs)):
        assert set(theirs.state[q]) == set(ours.state[p])
        assert torch.equal(theirs.state[q]["exp_avg"], ours.state[p]["exp_avg"])


@pytest.mark.parametrize("clip", [pytest.param(True, marks=RUNS), False])
def test_hooks_after_a_step_run_once(clip):
    """Casts of weights to FP8 are made in one. An AdamW of PyTorch has hooks of its own."""
    weight = torch.nn.Parameter(torch.ones(5, 7, device=DEVICE))
    torch.optim.AdamW([weight])
    optimizer, seen = adamw.ClippingAdamW([{"params": [weight]}], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    weight.grad = torch.ones_like(weight)
    clip_and_step(optimizer, 1.0) if clip else optimizer.step()
    assert len(seen) == 1 and torch.equal(seen[0], weight) and (weight < 1).all()


@RUNS
def test_a_scaler_leaves_out_a_step():
    """A gradient beyond float16's range changes neither parameters nor moments."""
    ours, scaler = pair()[0], torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones(1, device=DEVICE))
    before = [p.detach().clone() for p in parameters(ours)]
    for bad in (True, False):
        set_gradients(ours, 0)
        if bad:
            parameters(ours)[0].grad[0, 0] = float("inf")
        scaler.unscale_(ours)
        ours.clip(1.0)
        scaler.step(ours)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(parameters(ours), before)) == bad


@pytest.mark.parametrize("tp_group, kind, kernel", [
    (None, adamw.ClippingAdamW, True), ("a group", adamw.ClippingAdamW, False),
    (None, torch.optim.AdamW, False)])
def test_a_training_step_clips_by_the_kernels_where_they_run(monkeypatch, tp_group, kind, kernel):
    """Real tensor-parallel ranks add up their norms; other optimizers have no `clip`."""
    called = []
    monkeypatch.setattr(parallelism, "clip_gradients", lambda *args: called.append(args[1]))
    model = torch.nn.Linear(4, 4, device=DEVICE)
    model.split_parameters = list
    optimizer = kind([{"params": list(model.parameters())}], lr=0.1)
    model(torch.ones(4, 4, device=DEVICE)).sum().backward()
    processes = SimpleNamespace(tp_group=tp_group)
    norm = parallelism.Parallelism(processes, torch.float32).clip(model, 0.5, optimizer)
    if kernel and (torch.cuda.is_available() or INTERPRETED):
        assert not called and float(norm) == pytest.approx(320**0.5)  # 16 weights and 4 biases, each 4
        optimizer.step()
        average = optimizer.state[model.weight]["exp_avg"]  # 0.1 of the first gradient, clipped
        assert torch.allclose(average, torch.full_like(average, 0.1 * 4 * 0.5 / 320**0.5))
    else:
        assert called == [0.5]
