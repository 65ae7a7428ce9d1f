"""Cross-entropy with a softcap and several targets a row: PyTorch code against loops in fp64. CPU; seconds.

    python -m pytest tests/unit/test_weighted_cross_entropy.py

tests/kernels/test_cross_entropy.py does the same with the Triton kernel.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import reference_cross_entropy

from kernels import cross_entropy
from kernels.cross_entropy import Softcap, cap_logits, linear_cross_entropy, tanh_softcap

RECORD = Softcap(23.0, 7.5, 5.0)


def inputs(B=2, T=12, C=8, V=17, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, C, generator=generator).to(dtype).requires_grad_() for n in (B * T, V))
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, :3] = targets[1, 5] = targets[1, T - 1] = -1
    return x, weight, targets


def compare(x, weight, targets, softcap, weights):
    """Compare value and both gradients; 3 as the loss's gradient, to see that it is used."""
    w = None if weights is None else torch.tensor(weights)
    loss = linear_cross_entropy(x, weight, targets, softcap=softcap, target_weights=w)
    expected = reference_cross_entropy(x, weight, targets.view(-1, targets.shape[-1]), softcap, w)
    assert loss.dtype == torch.float64 and torch.allclose(loss, expected, rtol=1e-13)
    for mine, theirs in zip(*(torch.autograd.grad(3 * value, (x, weight)) for value in (loss, expected))):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("rows", [5, 128])  # a chunk ends in the middle of a sequence, or all is one chunk
@pytest.mark.parametrize("softcap", [None, RECORD, tanh_softcap(30.0)])
@pytest.mark.parametrize("weights", [None, [1.0], [1.0, 0.5, 0.25], [1.0, 0.0, 0.25], [0.0] * 7 + [1.0]])
def test_loss_and_every_gradient(weights, softcap, rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda x, V, products: rows)
    compare(*inputs(), softcap, weights)


@pytest.mark.parametrize("T", [1, 2])
def test_targets_beyond_the_sequence_are_left_out(T):
    """Also where every sequence is shorter than the number of targets."""
    compare(*inputs()[:2], torch.arange(24).view(-1, T) % 17, RECORD, [1.0, 0.5, 0.25])


def test_one_sequence_by_default():
    x, weight, targets = inputs()
    compare(x, weight, targets.flatten(), RECORD, [1.0, 0.5])


def test_one_target_of_weight_one_is_the_plain_loss():
    x, weight, targets = inputs()
    plain = linear_cross_entropy(x, weight, targets.flatten())
    assert torch.equal(plain, linear_cross_entropy(x, weight, targets))
    assert torch.allclose(plain, linear_cross_entropy(x, weight, targets, target_weights=torch.ones(1)))
    assert torch.allclose(plain, F.cross_entropy(x @ weight.T, targets.flatten(), ignore_index=-1))


def test_plain_loss_does_not_reach_the_weighted_operator(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_weighted_loss_and_grads", None)
    x, weight, targets = inputs()
    linear_cross_entropy(x, weight, targets).backward()


def test_tanh_softcap_is_tanh_up_to_a_constant():
    z = torch.linspace(-100, 100, 11, dtype=torch.float64)
    assert torch.allclose(cap_logits(z, tanh_softcap(30.0)) - 30, 30 * torch.tanh(z / 30))


def test_no_valid_row_is_nan():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -1), -1, RECORD, torch.ones(2))
    assert loss.isnan()


def test_ignored_rows_have_no_gradient():
    x, weight, targets = inputs()
    linear_cross_entropy(x, weight, targets, -1, RECORD, torch.ones(3)).backward()
    ignored = targets.flatten() == -1
    assert (x.grad[ignored] == 0).all() and (x.grad[~ignored] != 0).any(dim=1).all()


@pytest.mark.parametrize("scale", [0.01, 1e4])
def test_extreme_logits_are_finite(scale):
    x = torch.tensor([[scale], [-scale], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 0, 2]), -1, RECORD, torch.ones(2))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_low_precision():
    """bf16 and fp16 against fp64 of the same rounded inputs: the error of rounding itself."""
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        x, weight, targets = inputs(B=4, T=50, C=32, V=97, dtype=dtype)
        w64 = weight.detach().double().requires_grad_()
        w32, x64 = weight.detach().float().requires_grad_(), x.detach().double().requires_grad_()
        weights = torch.tensor([1.0, 0.5, 0.25])
        loss = linear_cross_entropy(x, w32, targets, -1, RECORD, weights)
        expected = reference_cross_entropy(x64, w64, targets, RECORD, weights)
        scale = 65536.0  # of a GradScaler: small gradients must survive fp16
        (scale * loss).backward()
        (scale * expected).backward()
        assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < tolerance
        for mine, theirs in ((x.grad, x64.grad), (w32.grad, w64.grad)):
            assert (mine.double() - theirs).norm() / theirs.norm() < tolerance


@pytest.mark.parametrize("call", [
    lambda *args: linear_cross_entropy(*args, target_weights=torch.ones(9)),
    lambda *args: linear_cross_entropy(*args, target_weights=torch.ones(0)),
    lambda *args: linear_cross_entropy(*args, softcap=Softcap(0.0, 1.0)),
    lambda *args: linear_cross_entropy(*args, softcap=Softcap(23.0, -7.5))])
def test_wrong_arguments(call):
    with pytest.raises(ValueError, match=r"target_weights has [09] entries\. Use 1 to 8|Use a positive cap"):
        call(*inputs())


@pytest.mark.parametrize("softcap", [None, list(RECORD)])
def test_operator_is_registered_correctly(softcap):
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    x, weight, targets = inputs(dtype=torch.float32)
    table = cross_entropy._target_table(targets, torch.tensor([1.0, 0.5]), -1)
    torch.library.opcheck(cross_entropy._weighted_loss_and_grads, (x, weight, *table, softcap, True),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_weights_change_without_a_new_graph():
    """One graph without breaks, for all values of the weights."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    x, weight, targets = inputs()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=count)
    for weights in ([1.0, 0.5], [1.0, 0.0]):
        w = torch.tensor(weights)
        eager, loss = (f(x, weight, targets, -1, RECORD, w) for f in (linear_cross_entropy, compiled))
        assert torch.equal(eager, loss)
        for a, b in zip(*(torch.autograd.grad(value, (x, weight)) for value in (eager, loss))):
            assert torch.equal(a, b)
    assert len(graphs) == 1
