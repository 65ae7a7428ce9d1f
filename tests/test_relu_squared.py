"""ReLU^2 and the MLP around it against fp64, values and gradients: PyTorch everywhere; the kernels with a
Hopper GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/test_relu_squared.py
"""

import pytest
import torch

from kernels import INTERPRETED, relu_squared
from kernels.relu_squared import fusible, relu_squared_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def exact(x, w_in, w_out):
    return torch.relu(x @ w_in.T).square() @ w_out.T


def tensors(N, C, H, dtype):
    """x, w_in, w_out of unit-size products, and the gradient of the output."""
    torch.manual_seed(0)
    x, w_in, w_out, grad = torch.randn(N, C), torch.randn(H, C) / C**0.5, torch.randn(C, H) / H**0.5, \
        torch.randn(N, C)
    return [z.to(DEVICE, dtype).requires_grad_(z is not grad) for z in (x, w_in, w_out, grad)]


def check(found, out, grad, tolerance):
    """Output and gradients of x, w_in and w_out, against fp64 from the same numbers."""
    out.backward(grad)
    reference = [z.detach().double().requires_grad_() for z in found]
    expected = exact(*reference)
    expected.backward(grad.double())
    for y, z in zip((out, *(x.grad for x in found)), (expected, *(x.grad for x in reference))):
        assert y.dtype == out.dtype and y.shape == z.shape
        assert (y.double() - z).abs().max() <= tolerance * z.abs().max()


# tolerance of 16 bits: y and the gradient of the hidden layer are rounded (2^-11, 2^-8), then summed
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5),
                                              (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("N, C, H", [(300, 72, 264), (5, 8, 8), (129, 64, 520)])
def test_values_and_gradients(N, C, H, dtype, tolerance):
    *found, grad = tensors(N, C, H, dtype)
    check(found, relu_squared_mlp(*found), grad, tolerance)


@pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")
def test_kernels_run_where_they_can(monkeypatch):
    """Both of them, in a forward and a backward pass, and not for rows that TMA cannot address."""
    launched, launch = [], relu_squared._launch
    monkeypatch.setattr(relu_squared, "_launch", lambda *args, backward: (
        launched.append(backward), launch(*args, backward=backward)))
    *found, grad = tensors(40, 16, 32, torch.float16)
    if not fusible(*found[:2]):
        pytest.skip("not a Hopper GPU")
    relu_squared_mlp(*found).backward(grad)
    assert launched == [False, True]
    *found, grad = tensors(40, 12, 32, torch.float16)
    check(found, relu_squared_mlp(*found), grad, 2e-3)
    assert launched == [False, True]


def test_shapes_and_layouts():
    """Batches of sequences, none at all, and a gradient that is not contiguous."""
    *found, grad = tensors(24, 16, 32, torch.float16)
    x, w_in, w_out = found
    out = relu_squared_mlp(x.view(2, 3, 4, 16), w_in, w_out)
    assert out.shape == (2, 3, 4, 16)
    check(found, out.view(24, 16), grad.T.contiguous().T, 2e-3)
    empty = relu_squared_mlp(x[:0], w_in, w_out)
    assert empty.shape == (0, 16)
    empty.sum().backward()


def test_weights_anywhere_in_memory():
    """Views into a larger tensor, as a sharded optimizer may make: not where TMA could address them."""
    *found, grad = tensors(24, 16, 32, torch.float16)
    shifted = [torch.cat((z.new_zeros(1), z.detach().flatten()))[1:].view_as(z) for z in found]
    assert all(z.data_ptr() % 16 for z in shifted)
    shifted = [z.requires_grad_() for z in shifted]
    check(shifted, relu_squared_mlp(*shifted), grad, 2e-3)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_that_are_wanted(wanted):
    *found, grad = tensors(24, 16, 32, torch.float16)
    relu_squared_mlp(*found).backward(grad)
    alone = [z.detach().requires_grad_(i == wanted) for i, z in enumerate(found)]
    relu_squared_mlp(*alone).backward(grad)
    for i, (z, y) in enumerate(zip(found, alone)):
        assert torch.equal(z.grad, y.grad) if i == wanted else y.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Everything in autocast's dtype, and gradients in the weights' own."""
    *found, grad = tensors(24, 16, 32, torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = relu_squared_mlp(*found)
    assert out.dtype == dtype
    out.backward(grad.to(dtype))
    low = [z.detach().to(dtype).requires_grad_() for z in found]
    relu_squared_mlp(*low).backward(grad.to(dtype))
    for z, y in zip(found, low):
        assert z.grad.dtype == torch.float32 and torch.equal(z.grad, y.grad.float())


def test_relu_squared():
    """The derivative from the root of the output: exact, and in bfloat16 as near as its rounding."""
    x = torch.randn(64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared.relu_squared, x)
    low = x.detach().bfloat16().requires_grad_()
    relu_squared.relu_squared(low).sum().backward()
    assert torch.allclose(low.grad.double(), 2 * low.detach().double().relu(), rtol=2**-7)
