"""update_rows_ against its formula in fp64 and against Adam.

PyTorch's code everywhere; the kernel with a GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_lazy_rows.py
"""

import pytest
import torch

from kernels.lazy_rows import update_rows_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA2, EPS = 0.95, 1e-10


def table(rows, C, dtype=torch.float32):
    torch.manual_seed(0)
    p = torch.randn(rows, C, dtype=torch.float64).to(DEVICE, dtype)
    return p, torch.zeros_like(p), torch.zeros(rows, device=DEVICE, dtype=dtype)


def gradient(rows, C, number, share=0.5, dtype=torch.float32):
    """Some rows have a gradient, with zeros in it."""
    torch.manual_seed(number)
    has_one, zero = torch.rand(rows, 1) < share, torch.rand(rows, C) < 0.3
    return (torch.randn(rows, C, dtype=torch.float64) * has_one * ~zero).to(DEVICE, dtype)


def update(p, v, last, g, number, lr=0.1):
    update_rows_(p, g, v, last, torch.tensor(float(number), device=DEVICE, dtype=p.dtype), lr, BETA2, EPS)


def by_the_formula(p, v, g, touched, number, lr):
    """One row after another, in Python; the second moments of all rows decay in every step."""
    v *= BETA2
    for row in touched:
        v[row] += (1 - BETA2) * g[row]**2
        p[row] -= lr * g[row] / ((v[row] / (1 - BETA2**number)).sqrt() + EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, C", [(9, 7), (5, 64), (3, 768), (1, 1)])
def test_steps_by_the_formula(rows, C, dtype):
    p, v, last = table(rows, C, dtype)
    exact, square = p.double().clone(), v.double().clone()
    for number in range(1, 13):
        g = gradient(rows, C, number, dtype=dtype)
        touched = [row for row in range(rows) if g[row].abs().max() > 0]
        update(p, v, last, g, number, lr=0.1 / number)
        by_the_formula(exact, square, g.double(), touched, number, 0.1 / number)
        assert all(last[row] == number for row in touched)
    # each of twelve updates rounds once or twice, at numbers of about 1
    limit = 1e-5 if dtype == torch.float32 else 1e-13
    assert (p.double() - exact).abs().max() < limit
    decayed = BETA2 ** (12 - last.double())[:, None] * v.double()
    assert (decayed - square).abs().max() < limit


def test_rows_without_a_gradient_stay():
    p, v, last = table(8, 16)
    update(p, v, last, gradient(8, 16, 1, share=1.0), 1)
    before = [t.clone() for t in (p, v, last)]
    g = gradient(8, 16, 2, share=1.0)
    g[2:6] = 0
    update(p, v, last, g, 2)
    for now, then in zip((p, v, last), before):
        assert torch.equal(now[2:6], then[2:6])
        assert not torch.equal(now[:2], then[:2]) and not torch.equal(now[6:], then[6:])


def test_with_a_gradient_in_every_step_it_is_adam_without_a_first_moment():
    p, v, last = table(6, 32)
    other = torch.nn.Parameter(p.clone())
    adam = torch.optim.Adam([other], lr=0.01, betas=(0.0, BETA2), eps=EPS)
    for number in range(1, 8):
        other.grad = torch.randn_like(other)
        update(p, v, last, other.grad, number, lr=0.01)
        adam.step()
    assert torch.allclose(p, other, rtol=1e-5, atol=1e-6)  # seven sums of numbers that are rounded to 1e-7


def test_the_way_after_one_gradient_is_about_adams():
    """4.47 and 4.85 learning rates, once the corrections of the bias are 1."""
    p, v, last = table(1, 4)
    other = torch.nn.Parameter(p.clone())
    adam = torch.optim.Adam([other], lr=0.01, betas=(0.75, BETA2), eps=EPS)
    before = p.clone()
    for number in range(1, 400):
        other.grad = torch.full_like(other, float(number == 200))
        update(p, v, last, other.grad, number, lr=0.01)
        adam.step()
    assert torch.allclose((before - p) / 0.01, torch.full_like(p, 4.472), rtol=1e-3)
    assert torch.allclose((before - other.detach()) / 0.01, torch.full_like(p, 4.849), rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(value):
    p, v, last = table(4, 8)
    g = torch.zeros_like(p)
    g[1, 3] = value
    update(p, v, last, g, 1)
    assert not torch.isfinite(p[1]).all() and torch.isfinite(p[[0, 2, 3]]).all()


def test_a_table_without_rows():
    p, v, last = (t[:0] for t in table(1, 8))
    update(p, v, last, p.clone(), 1)
