"""The linear layer of q, k and v against fp64, values and gradients.

PyTorch's code everywhere; the kernel with a Hopper GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_qkv_linear.py
"""

import pytest
import torch
import torch.nn.functional as F

from kernels import INTERPRETED, qkv_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")


def tensors(N, W, C, dtype, bias=True):
    """x, weight and bias of products of unit size, and gradients of q, k and v that lie in one tensor."""
    torch.manual_seed(0)
    made = [torch.randn(N, W), torch.randn(3 * C, W) / W**0.5, torch.randn(3 * C) if bias else None]
    grads = torch.randn(3 * N + 8, C).to(DEVICE, dtype)  # rows between them, v first
    return ([z if z is None else z.to(DEVICE, dtype).requires_grad_() for z in made],
            (grads[N + 8:2 * N + 8], grads[2 * N + 8:], grads[:N]))


def check(found, results, grads, tolerance):
    """Compare results and gradients with those of fp64 from the same numbers."""
    torch.autograd.backward(results, grads)
    reference = [z if z is None else z.detach().double().requires_grad_() for z in found]
    expected = F.linear(*reference).chunk(3, dim=-1)
    torch.autograd.backward(expected, [g.double().view_as(e) for g, e in zip(grads, expected)])
    gradients = [(x.grad, z.grad) for x, z in zip(found, reference) if x is not None]
    for y, z in [*zip(results, expected), *gradients]:
        assert y.dtype == results[0].dtype and y.shape == z.shape
        assert (y.double() - z).abs().max() <= tolerance * z.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                              (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("N, W, C, bias", [(300, 264, 72, True), (5, 8, 8, False)])
def test_values_and_gradients(N, W, C, bias, dtype, tolerance):
    found, grads = tensors(N, W, C, dtype, bias)
    check(found, qkv_linear.qkv_linear(*found), grads, tolerance)


def test_derivative_by_gradcheck():
    found, _ = tensors(3, 8, 8, torch.float64)
    assert torch.autograd.gradcheck(qkv_linear.qkv_linear, found)


@RUNS
@pytest.mark.parametrize("together", [True, False])
def test_the_kernel_joins_nothing(together, monkeypatch):
    """Gradients that one descriptor can address are not joined, and others give the same result."""
    joined, cat = [], torch.cat
    found, grads = tensors(40, 16, 24, torch.float16, bias=False)
    if not qkv_linear.fusible(*found[:2]):
        pytest.skip("not a Hopper GPU")
    if not together:  # an address that TMA cannot take
        grads = [torch.cat((g.new_zeros(1), g.flatten()))[1:].view_as(g) for g in grads]
    monkeypatch.setattr(torch, "cat", lambda *args, **options: joined.append(1) or cat(*args, **options))
    check(found, qkv_linear.qkv_linear(*found), grads, 2e-3)
    assert len(joined) == (not together)


def test_views_without_a_copy():
    """q, k and v are views of one tensor, in heads as attention reads them."""
    found, _ = tensors(24, 16, 24, torch.float16)
    parts = qkv_linear.qkv_linear(found[0].view(2, 12, 16), *found[1:])
    starts = [part.view(2, 12, 3, 8).transpose(1, 2).data_ptr() for part in parts]
    assert [start - starts[0] for start in starts] == [0, 48, 96]


@RUNS
@pytest.mark.parametrize("kernels_run", [False, True])
def test_compiled_as_one_graph(kernels_run, monkeypatch):
    """By aot_eager, which runs the interpreter's kernels, too."""
    found, grads = tensors(40, 16, 24, torch.float16)
    if kernels_run and INTERPRETED:
        monkeypatch.setattr(qkv_linear, "fusible", lambda x, weight: True)
    compiled = torch.compile(qkv_linear.qkv_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    check(found, compiled(*found), grads, 2e-3)


@RUNS
def test_operators_are_registered_correctly():
    """Schema and fake tensors, as torch.compile relies on them."""
    (x, weight, _), grads = tensors(40, 16, 24, torch.float16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(qkv_linear._qkv_input_gradient, (*grads, weight.detach()), test_utils=tests)
    torch.library.opcheck(qkv_linear._qkv_weight_gradient, (*grads, x.detach()), test_utils=tests)


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_that_are_wanted(wanted):
    found, grads = tensors(24, 16, 24, torch.float16)
    torch.autograd.backward(qkv_linear.qkv_linear(*found), grads)
    alone = [z.detach().requires_grad_(i == wanted) for i, z in enumerate(found)]
    torch.autograd.backward(qkv_linear.qkv_linear(*alone), grads)
    for i, (z, y) in enumerate(zip(found, alone)):
        assert torch.equal(z.grad, y.grad) if i == wanted else y.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Everything in autocast's dtype, and gradients in the weights' own."""
    found, grads = tensors(24, 16, 24, torch.float32)
    with torch.autocast(DEVICE, dtype):
        parts = qkv_linear.qkv_linear(*found)
    assert all(part.dtype == dtype for part in parts)
    torch.autograd.backward(parts, [g.to(dtype) for g in grads])
    assert all(z.grad.dtype == torch.float32 for z in found)
