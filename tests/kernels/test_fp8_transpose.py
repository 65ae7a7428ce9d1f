"""Gradients of weights in FP8 against fp64, and the kernel that transposes their factors; seconds.

    python -m pytest tests/kernels/test_fp8_transpose.py
    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_fp8_transpose.py  # the kernel, too
"""

import pytest
import torch
from helpers import KERNEL_DEVICE as DEVICE
from helpers import runs_fp8_products, runs_kernels

from kernels import fp8, fp8_transpose
from kernels.fp8 import linear, product
from kernels.fp8_cast import E4M3, E5M2, LARGEST, cast
from kernels.fp8_transpose import cast_transposed, transposed, transposed_factors
from kernels.gelu_cast import fp8_gelu_mlp

EMULATED = [True] + runs_fp8_products() * [False]


@runs_kernels
@pytest.mark.parametrize("M, K", [(16, 16), (128, 256), (304, 48), (272, 129), (0, 16), (16, 0)])
def test_kernel(M, K):
    """Bytes of any value, and fp32 in place of 8-bit numbers, which Triton's interpreter rounds wrongly."""
    torch.manual_seed(0)
    values = torch.randint(256, (M, K), dtype=torch.uint8, device=DEVICE)
    assert fp8_transpose._runs(values, torch.uint8)
    assert torch.equal(transposed(values), values.T)
    x, factors = torch.randn(M, K, device=DEVICE).bfloat16(), torch.rand(M, 1, device=DEVICE)
    check_cast_transposed(x, factors)


def check_cast_transposed(x, factors):
    """The kernel has the bits of PyTorch's code."""
    scale = torch.full((1, 1), 0.7, device=DEVICE)
    found = cast_transposed(x, factors, scale, torch.float32)
    assert found.is_contiguous() and torch.equal(found, (x.float() * (factors * (1 / scale))).T)


@runs_kernels
@pytest.mark.parametrize("M", [15, 20, 300])
def test_rows_that_are_no_multiple_of_16(M, monkeypatch):
    """The kernel of bytes would store 16 of them at addresses that are no multiple of 16; the one that casts
    takes any number of rows."""
    values = torch.randint(256, (M, 48), dtype=torch.uint8, device=DEVICE)
    monkeypatch.setattr(fp8_transpose, "_transposed", lambda values: pytest.fail("the kernel ran"))
    assert torch.equal(transposed(values), values.T)
    check_cast_transposed(torch.randn(M, 48, device=DEVICE).bfloat16(), torch.rand(M, 1, device=DEVICE))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_casts(dtype):
    """The largest entry becomes at most the largest of the format, whatever the sizes of the rows. A row of
    zeros, and zeros alone, stay zeros."""
    torch.manual_seed(0)
    sizes = 10.0**torch.arange(-19, 13, device=DEVICE)[:, None]
    wide, narrow = (torch.randn(32, n, device=DEVICE) * sizes for n in (64, 16))
    narrow, narrow[3] = narrow.flip(0), 0
    a, b = cast(wide, E5M2), cast(narrow, dtype)
    wide_t, narrow_t = transposed_factors(a, narrow, b.scale, dtype)
    assert torch.equal(wide_t.values.float(), a.values.float().T) and wide_t.scale == 1
    found = narrow_t.values.double() * narrow_t.scale.double()
    exact = (narrow.double() * a.scale.double()).T
    largest = narrow_t.values.float().abs().max()
    assert LARGEST[dtype] / 4 < largest <= LARGEST[dtype]
    # entries far below the largest are in steps of the smallest number of the format
    step = {E4M3: 2**-9 / 448, E5M2: 2**-16 / 57344}[dtype] * 4
    bound = torch.maximum(exact.abs() * {E4M3: 2**-4, E5M2: 2**-3}[dtype], exact.abs().max() * step)
    assert ((found - exact).abs() <= bound * (1 + 1e-5)).all()
    wide, zeros = torch.zeros_like(wide), torch.zeros_like(narrow)
    _, of_zeros = transposed_factors(cast(wide, E5M2), zeros, cast(zeros, dtype).scale, dtype)
    assert (of_zeros.values.float() == 0).all() and of_zeros.scale.isfinite().all()


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("N, K", [(96, 32), (32, 96)])
def test_gradient_of_a_weight(N, K, emulated):
    """Wide gradients and wide inputs, tokens whose gradients differ by 10^4: the error is that of two
    roundings to FP8. The other results are those without."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, K, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(N, K, device=DEVICE) / 8).requires_grad_()
    grad = torch.randn(2, 64, N, device=DEVICE) * 10 ** (-4 * torch.rand(2, 64, 1, device=DEVICE))
    grad, results = grad.bfloat16(), []
    for in_fp8 in (False, True):
        y = linear(x, weight, None, emulated, None, in_fp8)
        results.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    for plain, found in zip(results[0][:2], results[1][:2]):
        assert torch.equal(plain, found)
    exact = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    assert 0.01 < (results[1][2].double() - exact).norm() / exact.norm() < 0.08


@pytest.mark.parametrize("emulated", EMULATED)
@pytest.mark.parametrize("biases, tokens", [(False, 48), (True, 48), (False, 19)])
def test_mlp(biases, tokens, emulated):
    """Gradients of both weights; with biases, whose gradients need that of the preactivation; and 19 tokens,
    which FP8 cannot take, so the gradients have their usual bits."""
    torch.manual_seed(0)
    x, grad = (torch.randn(tokens, 32, device=DEVICE).bfloat16() for _ in range(2))
    sizes = ((64, 32), (64,), (32, 64), (32,))
    parameters = [(torch.randn(*s, device=DEVICE) / 6).requires_grad_() if len(s) == 2 or biases else None
                  for s in sizes]
    used, results = [x.requires_grad_(), *(p for p in parameters if p is not None)], []
    for in_fp8 in (False, True):
        y = fp8_gelu_mlp(x, *parameters, emulated, None, None, in_fp8)
        results.append((y, *torch.autograd.grad(y, used, grad)))
    for plain, found, of_weight in zip(*results, [False, False, *(p.dim() == 2 for p in used[1:])]):
        if of_weight and tokens % 16 == 0:
            assert 0.01 < (found - plain).norm() / plain.norm() < 0.08
        else:
            assert torch.equal(plain, found)


def test_no_tokens():
    x, weight = torch.ones(0, 16, device=DEVICE), torch.ones(32, 16, device=DEVICE, requires_grad=True)
    linear(x, weight, None, True, None, True).sum().backward()
    assert (weight.grad == 0).all()


def test_gradients_that_nothing_needs_are_not_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(fp8, "product", lambda a, b, *args, product=fp8.product, **options: (
        calls.append(a.values.shape), product(a, b, *args, **options))[1])
    tensors = [torch.ones(shape, device=DEVICE) for shape in ((16, 16), (32, 16), (32,))]
    for needed, expected in ((0, [(16, 16), (16, 32)]), (1, [(16, 16), (32, 16)]), (2, [(16, 16)])):
        calls.clear()
        x, weight, bias = (t.clone().requires_grad_(i == needed) for i, t in enumerate(tensors))
        linear(x, weight, bias, True, None, True).sum().backward()
        assert calls == expected  # forward, and the gradient of x or of the weight


def test_a_gradient_that_is_not_finite_stays_so():
    x, weight = (torch.ones(16, 16, device=DEVICE).requires_grad_() for _ in range(2))
    grad = torch.ones(16, 16, device=DEVICE)
    grad[3, 4] = float("inf")
    y = linear(x, weight, None, True, None, True)
    assert torch.autograd.grad(y, weight, grad)[0].isnan().any()


def test_sums_over_tokens_are_exact():
    """A sum of 65,536 ones: with 14 bits, ones would be lost from 16,384 on."""
    if not runs_fp8_products() or DEVICE != "cuda":
        pytest.skip("a GPU's sums of 14 bits are in question")
    ones = torch.ones(65536, 16, device=DEVICE).bfloat16()
    wide, narrow = transposed_factors(cast(ones, E5M2), ones, cast(ones, E4M3).scale, E4M3)
    found = product(wide, narrow, None, torch.bfloat16, False, fast=False)
    assert (found.double() / 65536 - 1).abs().max() < 2**-8
