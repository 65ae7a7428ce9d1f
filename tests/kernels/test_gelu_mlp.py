"""GELU and the MLP around it against fp64, values and gradients.

PyTorch's code everywhere; the kernels with a Hopper GPU, or in Triton's interpreter; seconds.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_gelu_mlp.py
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import products
from benchmarks.harness import Attempts
from benchmarks.kernels import _timed
from kernels import INTERPRETED, gelu_mlp
from model import GPT, GPTConfig, use_fused_gelu, use_qkv_linear
from nanosync.recompute import use_activation_checkpointing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="no kernel runs here")


def exact(x, w_in, b_in, w_out, b_out):
    return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)


def tensors(N, C, H, dtype, bias=True):
    """x, w_in, b_in, w_out, b_out of unit-size products, and the gradient of the output."""
    torch.manual_seed(0)
    made = [torch.randn(N, C), torch.randn(H, C) / C**0.5, torch.randn(H) if bias else None,
            torch.randn(C, H) / H**0.5, torch.randn(C) if bias else None, torch.randn(N, C)]
    return [z if z is None else z.to(DEVICE, dtype).requires_grad_(z is not made[-1]) for z in made]


def check(found, out, grad, tolerance):
    """Compare output and gradients with those of fp64 from the same numbers."""
    out.backward(grad)
    reference = [z if z is None else z.detach().double().requires_grad_() for z in found]
    expected = exact(*reference)
    expected.backward(grad.double())
    pairs = [(out, expected), *((x.grad, z.grad) for x, z in zip(found, reference) if x is not None)]
    for y, z in pairs:
        assert y.dtype == out.dtype and y.shape == z.shape
        assert (y.double() - z).abs().max() <= tolerance * z.abs().max()


# tolerance of 16 bits: y and the gradient of the hidden layer are rounded (2^-11, 2^-8), then summed
@pytest.mark.parametrize("keep, dtype, tolerance", [
    ("derivative8", torch.float64, 1e-12), ("derivative8", torch.float32, 1e-5),
    *((keep, torch.float16, 4e-3) for keep in gelu_mlp.KEEP),
    *((keep, torch.bfloat16, 1.5e-2) for keep in gelu_mlp.KEEP)])
@pytest.mark.parametrize("N, C, H, bias", [(300, 72, 272, True), (5, 8, 8, False)])
def test_values_and_gradients(N, C, H, bias, keep, dtype, tolerance):
    *found, grad = tensors(N, C, H, dtype, bias)
    check(found, gelu_mlp.gelu_mlp(*found, keep), grad, tolerance)


@RUNS
@pytest.mark.parametrize("keep", gelu_mlp.KEEP)
def test_kernels_run_where_they_can(keep, monkeypatch):
    """Both of them, in a forward and a backward pass, and not for rows that TMA cannot address."""
    launched, launch = [], gelu_mlp._launch
    monkeypatch.setattr(gelu_mlp, "_launch", lambda direction, *args: (
        launched.append(direction), launch(direction, *args)))
    *found, grad = tensors(40, 16, 32, torch.float16)
    if not gelu_mlp.fusible(*found[:2]):
        pytest.skip("not a Hopper GPU")
    gelu_mlp.gelu_mlp(*found, keep).backward(grad)
    assert launched == ["forward", "backward"]
    *found, grad = tensors(40, 12, 32, torch.float16)
    check(found, gelu_mlp.gelu_mlp(*found, keep), grad, 4e-3)
    assert launched == ["forward", "backward"]


@RUNS
def test_kept_derivative_in_8_bits():
    """Exact where GELU is the identity or zero, and elsewhere within half a step, over all of its range."""
    h = torch.linspace(-6, 6, 16 * 256, device=DEVICE).half().view(256, 16)
    h[0, 0], h[0, 1] = -60, 60
    eye, keep = torch.eye(16, device=DEVICE).half(), gelu_mlp.KEEP.index("derivative8")
    if not gelu_mlp.fusible(h, eye):
        pytest.skip("not a Hopper GPU")
    y, codes = gelu_mlp._linear_gelu(h, eye, None, keep)
    grad_h, _ = gelu_mlp._linear_gelu_backward(torch.ones_like(h), eye, codes, keep, False)
    z = h.double().requires_grad_()
    F.gelu(z, approximate="tanh").sum().backward()
    assert grad_h[0, 0] == 0 and grad_h[0, 1] == 1
    assert (grad_h.double() - z.grad).abs().max() <= 0.5 / gelu_mlp.CODES + 2**-11
    assert torch.allclose(y.double(), F.gelu(h.double(), approximate="tanh"), rtol=2**-10, atol=1e-6)


def test_derivative_by_gradcheck():
    """In fp64, which PyTorch computes, and which the kernels are compared with."""
    *found, _ = tensors(3, 8, 16, torch.float64)
    assert torch.autograd.gradcheck(gelu_mlp.gelu_mlp, found)


def test_shapes_and_layouts():
    """Batches of sequences, and a gradient that is not contiguous."""
    *found, grad = tensors(24, 16, 32, torch.float16)
    out = gelu_mlp.gelu_mlp(found[0].view(2, 3, 4, 16), *found[1:])
    assert out.shape == (2, 3, 4, 16)
    check(found, out.view(24, 16), grad.T.contiguous().T, 4e-3)


@pytest.mark.parametrize("shape, keep", [((16,), "derivative"), ((2, 0, 16), "derivative8"),
                                         ((2, 0, 16), "nothing")])
def test_few_rows(shape, keep):
    *found, _ = tensors(24, 16, 32, torch.float16)
    x = found[0].detach().flatten()[:math.prod(shape)].view(shape).requires_grad_()
    out = gelu_mlp.gelu_mlp(x, *found[1:], keep)
    assert out.shape == shape
    out.sum().backward()
    assert found[2].grad.isfinite().all() and x.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nan_stays_nan(dtype):
    """A model that has diverged must not look healthy."""
    *found, _ = tensors(24, 16, 32, dtype)
    with torch.no_grad():
        found[1][3, 5] = math.nan
    assert gelu_mlp.gelu_mlp(*found).isnan().all()


@RUNS
@pytest.mark.parametrize("kernels_run", [False, True])
def test_compiled_as_one_graph(kernels_run, monkeypatch):
    """By aot_eager, which runs the interpreter's kernels, too."""
    *found, grad = tensors(40, 16, 32, torch.float16)
    if kernels_run and INTERPRETED:
        monkeypatch.setattr(gelu_mlp, "fusible", lambda x, w_in: True)
    compiled = torch.compile(gelu_mlp.gelu_mlp, fullgraph=True, backend="aot_eager", dynamic=False)
    check(found, compiled(*found), grad, 4e-3)


@RUNS
@pytest.mark.parametrize("keep", range(4))
def test_operators_are_registered_correctly(keep):
    """Schema and fake tensors, as torch.compile relies on them."""
    x, w_in, b_in, w_out, _, grad = (z.detach() for z in tensors(40, 16, 32, torch.float16))
    if not gelu_mlp.fusible(x, w_in):
        pytest.skip("not a Hopper GPU")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(gelu_mlp._linear_gelu, (x, w_in, b_in, keep), test_utils=tests)
    _, kept = gelu_mlp._linear_gelu(x, w_in, b_in, keep)
    if gelu_mlp.KEEP[keep] != "nothing":
        for has_bias in (False, True):
            torch.library.opcheck(gelu_mlp._linear_gelu_backward, (grad, w_out, kept, keep, has_bias),
                                  test_utils=tests)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_wanted(wanted):
    *found, grad = tensors(24, 16, 32, torch.float16)
    gelu_mlp.gelu_mlp(*found).backward(grad)
    alone = [z.detach().requires_grad_(i == wanted) for i, z in enumerate(found)]
    gelu_mlp.gelu_mlp(*alone).backward(grad)
    for i, (z, y) in enumerate(zip(found, alone)):
        assert torch.equal(z.grad, y.grad) if i == wanted else y.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Everything in autocast's dtype, and gradients in the weights' own."""
    *found, grad = tensors(24, 16, 32, torch.float32)
    with torch.autocast(DEVICE, dtype):
        out = gelu_mlp.gelu_mlp(*found)
    assert out.dtype == dtype
    out.backward(grad.to(dtype))
    assert all(z.grad.dtype == torch.float32 for z in found)


def test_unknown_keep():
    *found, _ = tensors(8, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="keep='all' is unknown"):
        gelu_mlp.gelu_mlp(*found, keep="all")


def test_benchmark_of_the_products():
    """Every way runs, and its work is counted: three products a matrix."""
    device = torch.device(DEVICE)
    timed = functools.partial(_timed, rounds=2, device=device, attempts=Attempts())
    figures = products.measure(16, 16, torch.float16, True, device, timed)
    ways = {f["name"] for f in figures if f["operation"] == "MLP"}
    assert ways >= {"eager", *(f"keep {keep}" for keep in gelu_mlp.KEEP)}
    for f in figures:
        flops = 6 * 16 * sum(rows * 16 for rows in ((64, 64) if f["operation"] == "MLP" else (48,)))
        assert abs(f["tflop_per_second"] * f["us"] * 1e6 / flops - 1) < 1e-6


@RUNS
@pytest.mark.parametrize("kind", ["block", "selective"])
def test_with_activation_checkpointing(kind, monkeypatch):
    """A model with the kernels for Hopper has the same gradients when it recomputes activations."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).to(DEVICE)
    use_fused_gelu(model, "derivative8")
    use_qkv_linear(model)
    launched, launch = [], gelu_mlp._launch
    monkeypatch.setattr(gelu_mlp, "_launch", lambda *args: (launched.append(args[0]), launch(*args)))
    idx, found = torch.randint(64, (2, 16), device=DEVICE), []
    for recompute in ("none", kind):
        use_activation_checkpointing(model, recompute)
        with torch.autocast(DEVICE, torch.float16):
            model(idx, idx)[1].backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    if launched:  # a Hopper GPU or the interpreter
        assert (launched.count("forward"), launched.count("backward")) == (6, 4)
