"""QK-norm with rotary embedding: the kernels against plain PyTorch, values and gradients. With a GPU, or in
Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_qk_rotary.py
"""

import pytest
import torch

from kernels import usable
from kernels.qk_rotary import EPS, qk_norm_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(qkv, cos, sin):
    """By the formulas, with complex numbers, in fp64."""
    def turned(x):
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        a, b = x.chunk(2, dim=-1)
        y = torch.complex(a, b) * torch.complex(cos, -sin)[:, None]
        return torch.cat((y.real, y.imag), dim=-1)
    q, k, v = qkv.unbind(2)
    return turned(q), turned(k), v


# tolerance: values are rounded once and are up to about 4; gradients are sums of rounded products
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("B, T, H, D", [(2, 5, 3, 16), (1, 11, 6, 128), (3, 7, 1, 24)])
def test_values_and_gradients(B, T, H, D, dtype, tolerance):
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D).mul_(torch.rand(B, T, 3, H, 1) * 2).to(DEVICE, dtype).requires_grad_()
    angles = torch.outer(torch.arange(T), 10000 ** -(torch.arange(0, D, 2) / D))
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    exact = qkv.detach().double().requires_grad_()
    found, expected = qk_norm_rotary(qkv, cos, sin), reference(exact, cos.double(), sin.double())
    grads = [torch.randn_like(y) for y in found]
    assert all(y.dtype == dtype and y.shape == (B, T, H, D) for y in found)
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for y, z in zip((*found, qkv.grad), (*expected, exact.grad)):
        assert (y.double() - z).abs().max() <= tolerance * max(1.0, z.abs().max().item())
    assert torch.equal(found[2], qkv[:, :, 2])


@pytest.mark.skipif(not usable(torch.empty(0, device=DEVICE)), reason="no Triton kernel runs here")
def test_gradients_in_any_layout():
    """Gradients that attention returns need not be contiguous."""
    qkv = torch.randn(2, 4, 3, 2, 8, device=DEVICE, requires_grad=True)
    cos, sin = (f(torch.outer(torch.arange(4.0), torch.ones(4))).to(DEVICE) for f in (torch.cos, torch.sin))
    y = torch.stack([part.transpose(1, 2) for part in qk_norm_rotary(qkv, cos, sin)])
    weight = torch.randn(y.shape, device=DEVICE).transpose(-1, -2).contiguous().transpose(-1, -2)
    (y * weight).sum().backward()
    other = qkv.detach().double().requires_grad_()
    z = torch.stack([part.transpose(1, 2) for part in reference(other, cos.double(), sin.double())])
    (z * weight).sum().backward()
    assert torch.allclose(qkv.grad.double(), other.grad, atol=1e-5)
