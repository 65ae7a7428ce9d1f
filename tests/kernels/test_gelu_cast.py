"""GELU with a cast of its result, its gradient, and the MLP of these in FP8, against fp64; seconds.

    python -m pytest tests/kernels/test_gelu_cast.py
    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gelu_cast.py  # the kernel, too
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import KERNEL_DEVICE as DEVICE
from helpers import runs_fp8_products, runs_kernels

from kernels import gelu_cast
from kernels.fp8 import WeightCasts, linear
from kernels.fp8_cast import E4M3, E5M2, LARGEST, cast
from kernels.gelu_cast import fp8_gelu_mlp, gelu_backward_cast
from kernels.gelu_mlp import gelu

EMULATED = [True] + runs_fp8_products() * [False]


def sample(rows: int, H: int, dtype=torch.float32):
    """h, the gradient of y, and the exact y and gradient of h."""
    torch.manual_seed(0)
    h, grad = (torch.randn(rows, H, device=DEVICE, dtype=dtype) for _ in range(2))
    a = h.double().requires_grad_()
    y = F.gelu(a, approximate="tanh")
    return h, grad, y.detach(), torch.autograd.grad(y, a, grad.double())[0]


def check(found, exact, largest: float) -> None:
    """The result has the error of its dtype; values times scales are the result, rounded once."""
    result, values, scale = found
    rounding = 2.0**-8 if result.dtype == torch.bfloat16 else 2.0**-20
    assert (result.double() - exact).abs().max() <= rounding * exact.abs().max()
    size = result.float().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, size.clamp(min=1e-30) / largest)
    if values.dtype == torch.float32:
        torch.testing.assert_close(values * scale, result.float())
    else:
        expected = cast(result, values.dtype)
        assert torch.equal(values.float(), expected.values.float())
        # on a GPU PyTorch divides by a constant in two roundings
        torch.testing.assert_close(scale, expected.scale, rtol=2**-22 if DEVICE == "cuda" else 0, atol=0)


@runs_kernels
@pytest.mark.parametrize("H", [48, 1024, 1600])
def test_kernels(H):
    """With fp32 in place of 8-bit numbers, which Triton's interpreter rounds wrongly. H: less than a piece of
    the kernel, a piece, and a piece and a part of one."""
    h, grad, y, grad_h = sample(3, H)
    assert gelu_cast._runs(h, torch.float32)
    check(gelu_cast.gelu_cast(h, torch.float32), y, LARGEST[E4M3])
    check(gelu_backward_cast(grad, h, torch.float32), grad_h, LARGEST[E4M3])
    for run in (lambda store: gelu_cast.gelu_cast(h, torch.float32, store),
                lambda store: gelu_backward_cast(grad, h, torch.float32, store)):
        (_, *expected), (nothing, *found) = run(True), run(False)
        assert nothing.numel() == 0 and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts(dtype):
    """In FP8: the kernels on a GPU, else PyTorch's code."""
    h, grad, y, grad_h = sample(5, 48, dtype)
    check(gelu_cast.gelu_cast(h), y, LARGEST[E4M3])
    check(gelu_backward_cast(grad, h), grad_h, LARGEST[E5M2])


@runs_kernels
def test_a_row_with_a_value_that_is_not_finite_is_nan():
    h = torch.randn(3, 32, device=DEVICE)
    h[1, 5], h[2] = float("nan"), 0
    _, values, scale = gelu_cast.gelu_cast(h, torch.float32)
    assert (values * scale)[1].isnan().all() and values[[0, 2]].isfinite().all() and (values[2] == 0).all()


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("kept, biases", [(True, False), (False, True)])
def test_mlp_is_that_of_two_layers(emulated, kept, biases):
    """Values and gradients, by the rounding of bf16 in between; and FP8's error beside fp64."""
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 19, 32, device=DEVICE).bfloat16() for _ in range(2))
    weights = [torch.randn(64, 32) / 6, torch.randn(64) / 6, torch.randn(32, 64) / 8, torch.randn(32) / 8]
    w_in, b_in, w_out, b_out = parameters = [
        w.to(DEVICE).requires_grad_() if w.dim() == 2 or biases else None for w in weights]
    casts = WeightCasts([w_in, w_out]).casts if kept else (None, None)
    x.requires_grad_()
    results = []
    for one in (True, False):
        if one:
            y = fp8_gelu_mlp(x, *parameters, emulated, *casts)
        else:
            y = linear(gelu(linear(x, w_in, b_in, emulated, casts[0])), w_out, b_out, emulated, casts[1])
        results.append([y, *torch.autograd.grad(y, [x, *(w for w in parameters if w is not None)], grad)])
    inputs = [t if t is None else t.detach().double().requires_grad_() for t in (x, *parameters)]
    a, *rest = inputs
    y = F.linear(F.gelu(F.linear(a, *rest[:2]), approximate="tanh"), *rest[2:])
    exact = [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], grad.double())]
    for found, other, true in zip(*results, exact):
        assert found.dtype == other.dtype
        # a rounding of bf16 moves a cast to the next number now and then
        assert (found.double() - other.double()).norm() <= 0.03 * other.double().norm()
        assert (found.double() - true).norm() <= 0.1 * true.norm()
