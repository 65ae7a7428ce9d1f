"""Attention over intervals: the kernels and PyTorch's code against the formula in fp64, values and gradients.
With a GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_interval_attention.py
"""

import pytest
import torch

from kernels import interval_attention as module
from kernels.interval_attention import _in_pytorch, first_visible, interval_attention, runs_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def reference(q, k, v, first, scale):
    """Loop over sequences, heads and tokens."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                seen = slice(int(first[b, t]), t + 1)
                weights = (k[b, seen, h] @ q[b, t, h] * scale).softmax(0)
                out[b, t, h] = weights @ v[b, seen, h]
    return out


def matrix_reference(q, k, v, first, scale):
    """The same by a mask, for longer sequences."""
    t = torch.arange(q.shape[1], device=q.device)
    seen = (t <= t[:, None]) & (t >= first[:, :, None])
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def documents(B, T, starts, window):
    idx = torch.ones(B, T, dtype=torch.int64)
    for b in range(B):
        idx[b, [s for s in starts[b % len(starts)] if s < T]] = 0
    return first_visible(idx, 0, window).to(DEVICE)


def compare(attend, q, k, v, first, scale, dtype, tolerance):
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, expected = attend(*given, first, scale), matrix_reference(*exact, first, scale)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert out.dtype == dtype and out.shape == q.shape
    for found, wanted in zip((out, *(x.grad for x in given)), (expected, *(x.grad for x in exact))):
        assert (found.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_reference_by_mask_is_the_formula():
    q, k, v = torch.randn(3, 2, 7, 2, 4, dtype=torch.float64)
    first = torch.tensor([[0, 0, 2, 2, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]])
    assert torch.allclose(reference(q, k, v, first, 0.3), matrix_reference(q, k, v, first, 0.3), atol=1e-12)


# starts of documents on, before and after edges of blocks; windows shorter and longer than a block; T of no
# whole number of blocks; D of no power of two
@pytest.mark.parametrize("T, H, D, starts, window", [
    (70, 1, 16, [[]], None),
    (150, 2, 32, [[0, 1, 63, 64, 65], []], None),
    (150, 1, 24, [[], [5, 128, 149]], 17),
    (300, 1, 16, [[100, 256]], 130),
    (129, 1, 64, [list(range(129))], None),
    (1, 1, 16, [[0]], 1),
])
def test_values_and_gradients(T, H, D, starts, window):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, T, H, D, device=DEVICE).to(DTYPE)
    first = documents(2, T, starts, window)
    # values are rounded once, gradients are sums of rounded products
    compare(interval_attention, q, k, v, first, 0.2, DTYPE, 2e-2 if DTYPE == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (32, 32), (128, 32)])
def test_any_sizes_of_blocks(sizes, monkeypatch):
    if not runs_kernel(torch.zeros(1, 1, 1, 16, device=DEVICE, dtype=DTYPE)):
        pytest.skip("no Triton kernel runs here")
    M, N = sizes
    configs = {name: config | dict(BLOCK_M=M, BLOCK_N=N) for name, config in module.CONFIGS.items()}
    monkeypatch.setattr(module, "CONFIGS", configs)
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 140, 1, 16, device=DEVICE).to(DTYPE)
    for window in (None, 40):
        compare(interval_attention, q, k, v, documents(1, 140, [[30, 64, 65]], window), 0.2, DTYPE,
                2e-2 if DTYPE == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_code_in_pytorch(rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    q, k, v = torch.randn(3, 2, 33, 2, 8, dtype=torch.float64)
    compare(_in_pytorch, q, k, v, documents(2, 33, [[7, 20], []], 12).cpu(), 0.3, torch.float64, 1e-12)


def test_any_layout():
    """Parts of a projection of q, k and v, and a gradient that is not contiguous."""
    qkv = torch.randn(2, 40, 3, 2, 16, device=DEVICE).to(DTYPE).requires_grad_()
    first = documents(2, 40, [[9]], None)
    out = interval_attention(*qkv.unbind(2), first)
    weight = torch.randn(2, 2, 40, 16, device=DEVICE).to(DTYPE).transpose(1, 2)
    (out * weight).sum().backward()
    other = qkv.detach().double().requires_grad_()
    (matrix_reference(*other.unbind(2), first, 0.25) * weight.double()).sum().backward()
    assert torch.allclose(qkv.grad.double(), other.grad, atol=3e-2 if DTYPE == torch.bfloat16 else 1e-5)


def test_first_visible():
    idx = torch.tensor([[5, 9, 5, 5, 9, 9, 5, 5]])
    assert first_visible(idx, None).tolist() == [[0] * 8]
    assert first_visible(idx, 9).tolist() == [[0, 1, 1, 1, 4, 5, 5, 5]]
    assert first_visible(idx, 9, 2).tolist() == [[0, 1, 1, 2, 4, 5, 5, 6]]
    assert first_visible(idx, None, 3).tolist() == [[0, 0, 0, 1, 2, 3, 4, 5]]
    assert first_visible(idx, None, 100).dtype == torch.int32
