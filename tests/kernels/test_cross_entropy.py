"""The Triton kernel of cross-entropy with a softcap and several targets, against plain PyTorch in fp64.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_cross_entropy.py  # in Triton's interpreter
    python -m pytest tests/kernels/test_cross_entropy.py  # on a CUDA GPU, compiled

tests/kernels/test_kernels.py has the plain loss.
"""

import pytest
import torch
from helpers import KERNEL_DEVICE as DEVICE
from helpers import reference_cross_entropy
from helpers import runs_kernels as runs

from kernels import INTERPRETED, cross_entropy
from kernels.cross_entropy import Softcap, cap_logits, linear_cross_entropy, tanh_softcap

RECORD = Softcap(23.0, 7.5, 5.0)
WEIGHTS = [1.0, 0.5, 0.25]
# What rounding inputs and result to the dtype costs, times a small factor for the sums in between.
# A GPU's exponential is also off by 2^-22.
TOLERANCE = {torch.float32: 6e-6 if INTERPRETED else 1.2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(result, reference):
    return ((result.double() - reference).norm() / reference.norm()).item()


def reference(logits, index, weights, softcap):
    """Return losses and the gradient of their sum."""
    z = logits.double().requires_grad_()
    capped = z if softcap is None else cap_logits(z, softcap)
    losses = -(weights.double() * capped.log_softmax(1).gather(1, index)).sum(1)
    losses.sum().backward()
    return losses.detach(), z.grad


def run(logits, index, weights, softcap):
    """Return losses and gradient of the kernel, after a check that it computes the same without gradient."""
    kernel = cross_entropy._triton_weighted_loss_and_grad_
    losses, same = kernel(logits.clone(), index, weights, softcap, False)
    assert torch.equal(same, logits)
    again, grad = kernel(logits.clone(), index, weights, softcap, True)
    # two programs, and a compiler may round a product and a sum once or twice
    torch.testing.assert_close(losses, again, **(dict(rtol=0, atol=0) if INTERPRETED else
                                                 dict(rtol=3e-6, atol=5e-6)))
    return losses, grad


CASES = [(V, K, dtype) for V, K in ((5, 1), (98, 3), (1000, 2), (4096, 8), (50257, 3)) for dtype in TOLERANCE]
if INTERPRETED:  # slow: the widest in bf16
    CASES = CASES[:-3] + CASES[-2:-1]


@runs
@pytest.mark.parametrize("softcap", [None, RECORD])
@pytest.mark.parametrize("V, K, dtype", CASES)
def test_losses_and_gradients(V, K, softcap, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(4, V, generator=generator)).to(DEVICE, dtype)
    index = torch.randint(V, (4, K), generator=generator)
    index[0] = V - 1  # the same target K times
    weights = torch.rand(4, K, generator=generator)
    weights[1, K - 1] = 0  # a term that is left out, and a row
    weights[2] = 0
    index, weights = index.to(DEVICE), weights.to(DEVICE)
    expected, expected_grad = reference(logits, index, weights, softcap)
    losses, grad = run(logits, index, weights, softcap)
    # 5e-6: a few roundings of logits up to 23
    assert torch.allclose(losses.double(), expected, rtol=3e-6, atol=5e-6)
    assert error(grad, expected_grad) < TOLERANCE[dtype]
    assert losses[2] == 0 and (grad[2] == 0).all()


@runs
@pytest.mark.parametrize("softcap", [RECORD, tanh_softcap(30.0), Softcap(150.0, 1.0)])
def test_extreme_logits(softcap):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, -1e4, -1e4, -9e3], [1e4, 1e4, 1e4, 1e4],
                           [40.0, 60.0, -80.0, -float("inf")]], device=DEVICE)
    index = torch.tensor([[1, 0], [0, 3], [2, 2], [3, 0]], device=DEVICE)
    weights = torch.ones(4, 2, device=DEVICE)
    expected, expected_grad = reference(logits, index, weights, softcap)
    losses, grad = run(logits, index, weights, softcap)
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-5)
    expected_grad[3, 3] = 0  # the reference has 0 * inf there
    assert torch.allclose(grad.double(), expected_grad.nan_to_num(), rtol=1e-4, atol=1e-12)


@runs
def test_nan_stays_nan():
    logits = torch.tensor([[1.0, float("nan"), 2.0]], device=DEVICE)
    zero, one = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    losses, grad = cross_entropy._triton_weighted_loss_and_grad_(logits, zero, one, RECORD, True)
    assert losses.isnan().all() and grad.isnan().all()



@runs
@pytest.mark.parametrize("softcap, weights", [(RECORD, None), (None, WEIGHTS), (RECORD, WEIGHTS)])
def test_through_the_operator(softcap, weights, monkeypatch):
    """With chunks that end in the middle of a sequence: value and every gradient."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda x, V, products: 11)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (3 * 10, 1000))
    targets = torch.randint(1000, (3, 10), generator=generator).to(DEVICE)
    targets[0, :3] = targets[2, 5] = targets[2, 9] = -1
    w = None if weights is None else torch.tensor(weights, device=DEVICE)
    mine = [t.clone().requires_grad_() for t in (x, weight)]
    theirs = [t.double().requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*mine, targets, softcap=softcap, target_weights=w)
    expected = reference_cross_entropy(*theirs, targets, softcap, w)
    for a, b in zip(torch.autograd.grad(loss, mine), torch.autograd.grad(expected, theirs)):
        assert error(a, b) < 1e-5
    assert error(loss.detach(), expected.detach()) < 1e-6
    with torch.no_grad():
        assert torch.equal(loss, linear_cross_entropy(*mine, targets, softcap=softcap, target_weights=w))
