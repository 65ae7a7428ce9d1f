"""ReLU^2 and the MLP around it against fp64, values and gradients: PyTorch everywhere; the kernels with a
Hopper GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_relu_squared.py
"""

import math

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
    """Batches of sequences, and a gradient that is not contiguous."""
    *found, grad = tensors(24, 16, 32, torch.float16)
    x, w_in, w_out = found
    out = relu_squared_mlp(x.view(2, 3, 4, 16), w_in, w_out)
    assert out.shape == (2, 3, 4, 16)
    check(found, out.view(24, 16), grad.T.contiguous().T, 2e-3)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 0, 16)])
def test_few_rows(shape):
    """A vector, a row whose stride says nothing, and none."""
    *found, grad = tensors(24, 16, 32, torch.float16)
    x = torch.cat((found[0].detach(), grad), dim=1)[:1, :16] if shape == (1, 16) else \
        found[0].detach().flatten()[:math.prod(shape)].view(shape)
    out = relu_squared_mlp(x, *found[1:])
    assert out.shape == shape
    assert torch.allclose(out.double(), exact(x.double(), *(w.double() for w in found[1:])), atol=1e-2)
    out.sum().backward()


def test_no_hidden_units():
    x, w_in, w_out = torch.ones(8, 16).half(), torch.ones(0, 16).half(), torch.ones(16, 0).half()
    assert torch.equal(relu_squared_mlp(x, w_in, w_out), torch.zeros(8, 16).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shapes_that_do_not_fit(dtype):
    x, w_in, w_out = (torch.ones(shape, dtype=dtype) for shape in ((8, 16), (32, 24), (16, 32)))
    for wrong in ((x, w_in, w_out), (x, w_in[:, :16], w_out.T), (x, w_in[:, :16], w_out[:8])):
        with pytest.raises(ValueError, match=r"must have the shapes \(\.\.\., C\), \(H, C\) and \(C, H\)"):
            relu_squared_mlp(*wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_stays_nan(dtype):
    """A model that has diverged must not look healthy. On a GPU the kernel's own maximum, too."""
    *found, _ = tensors(24, 16, 32, dtype)
    with torch.no_grad():
        found[1][3, 5] = math.nan
    assert relu_squared_mlp(*found).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_second_derivative(dtype):
    """There is none from the root of the output, and it is said."""
    *found, grad = tensors(24, 16, 32, dtype)
    first, = torch.autograd.grad(relu_squared_mlp(*found), found[1], grad.requires_grad_(),
                                 create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kernels_run", [False, True])
@pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")
def test_compiled_as_one_graph(kernels_run, monkeypatch):
    """By aot_eager, which runs the interpreter's kernels, too."""
    *found, grad = tensors(40, 16, 32, torch.float16)
    if kernels_run and INTERPRETED:
        monkeypatch.setattr(relu_squared, "fusible", lambda x, w_in: True)
    compiled = torch.compile(relu_squared_mlp, fullgraph=True, backend="aot_eager", dynamic=False)
    check(found, compiled(*found), grad, 2e-3)


@pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")
def test_operators_are_registered_correctly():
    """Schema and fake tensors, as torch.compile relies on them."""
    x, w_in, w_out, grad = (z.detach() for z in tensors(40, 16, 32, torch.float16))
    if not fusible(x, w_in):
        pytest.skip("not a Hopper GPU")
    y, tests = relu_squared._linear_relu_squared(x, w_in), ("test_schema", "test_faketensor")
    torch.library.opcheck(relu_squared._linear_relu_squared, (x, w_in), test_utils=tests)
    torch.library.opcheck(relu_squared._linear_relu_squared_backward, (grad, w_out, y), test_utils=tests)
    torch.library.opcheck(relu_squared._linear_relu_squared_backward, (grad, w_out, y.T.contiguous().T),
                          test_utils=tests)


def test_weights_anywhere_in_memory():
    """Views into a larger tensor, as a sharded optimizer may make, at addresses that TMA cannot take."""
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
