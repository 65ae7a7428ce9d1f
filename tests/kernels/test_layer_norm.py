"""kernels/layer_norm.py: both results and all gradients against fp64, and how it sits in PyTorch.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_layer_norm.py  # in Triton's interpreter
    python -m pytest tests/kernels/test_layer_norm.py  # on a CUDA GPU, compiled
"""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from helpers import KERNEL_DEVICE as DEVICE
from helpers import random_model, tokens
from helpers import runs_kernels as runs

import kernels
from benchmarks import kernels as benchmark
from benchmarks.harness import Attempts
from kernels import layer_norm as module
from kernels.layer_norm import add_layer_norm, layer_norm
from model import LayerNorm, use_triton_layer_norm
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig

SIZES = [(1, 64), (65, 64), (2, 127), (7, 768), (2, 1023), (1, 1600), (1, 2050)]  # rows, width
LOW_PRECISION_SIZES = [(2, 127), (7, 768)]  # the interpreter is slow
if DEVICE == "cuda":
    SIZES = [(n, c) for c in (64, 127, 768, 1023, 1600, 4096, 8192, 16384) for n in (1, 7, 300, 65536)]
    LOW_PRECISION_SIZES = SIZES
CASES = [(torch.bfloat16, *size) for size in LOW_PRECISION_SIZES]
CASES += [(torch.float16, n, c) for n, c in LOW_PRECISION_SIZES if n * c <= 2**29]  # memory
CASES += [(torch.float32, n, c) for n, c in SIZES if n * c <= 2**28]
CASES = [(*case, bias) for case in CASES for bias in (True, False)]
if kernels.INTERPRETED:  # alone with half of them: it is the same kernel without the addition
    CASES = [case for i, case in enumerate(CASES) if i % 4 < 3]
CHUNK = 2**25  # values of a tensor in fp64 at a time


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def error(result, reference):
    return ((result.double() - reference).norm() / reference.norm()).item()


def inputs(N, C, dtype=torch.float32, weights=None, bias=True):
    """x, out (N, C), weight and bias (C,), all requiring gradients, and gradients of sum and norm (N, C)."""
    weights = weights or dtype
    values = [2 * randn(N, C, dtype=dtype) + 1, randn(N, C, dtype=dtype, seed=1),
              1 + randn(C, dtype=weights, seed=2) / 2, randn(C, dtype=weights, seed=3) if bias else None]
    grads = [randn(N, C, dtype=dtype, seed=4), randn(N, C, dtype=dtype, seed=5)]
    return [v if v is None else v.requires_grad_() for v in values], grads


def plain_add(x, out, weight, bias):
    s = x + out
    return s, F.layer_norm(s, weight.shape, weight, bias)


def plain_alone(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def run(function, values, grads):
    """Results, then the gradients of what is not None."""
    results = function(*values)
    results = results if isinstance(results, tuple) else (results,)
    grads = [g.to(y.dtype) for g, y in zip(grads[-len(results):], results)]
    return [*results, *torch.autograd.grad(results, [v for v in values if v is not None], grads)]


def exact(values):
    return [v if v is None else v.detach().double().requires_grad_() for v in values]


@contextlib.contextmanager
def poisoned_memory():
    """PyTorch fills what is allocated with NaN: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def errors(function, values, grads, *candidates):
    """Of results and gradients as `run` gives them, for each candidate: relative to `function` in fp64, which
    sees some rows at a time."""
    n = len(grads[-2:] if function is plain_add else grads[-1:])
    rows = max(1, CHUNK // values[0].shape[1])
    wrong = [torch.zeros(len(c), dtype=torch.float64, device=DEVICE) for c in candidates]
    size, sums = torch.zeros_like(wrong[0]), 0
    of_weights = [i for i, result in enumerate(candidates[0]) if result.dim() == 1]
    for start in range(0, values[0].shape[0], rows):
        part = [v if v is None or v.dim() == 1 else v[start:start + rows] for v in values]
        true = run(function, exact(part), [g[start:start + rows].double() for g in grads[-n:]])
        sums = [s + true[i] for s, i in zip(sums or [0] * len(of_weights), of_weights)]
        for i, t in enumerate(true):
            if i not in of_weights:
                size[i] += t.detach().square().sum()
                for w, c in zip(wrong, candidates):
                    w[i] += (c[i][start:start + rows].detach().double() - t.detach()).square().sum()
    for i, t in zip(of_weights, sums):
        size[i] = t.square().sum()
        for w, c in zip(wrong, candidates):
            w[i] = (c[i].double() - t).square().sum()
    return [(w / size).sqrt().tolist() for w in wrong]


@runs
@pytest.mark.parametrize("dtype, N, C, bias", CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_against_fp64(N, C, dtype, bias):
    """Alone without a bias, with the addition and a bias. No further from the truth than PyTorch's own, which
    in fp32 may be luckier by half: both are a few roundings away from it."""
    (x, out, weight, b), grads = inputs(N, C, dtype, bias=bias)
    if bias:
        values, ours, plain = [x, out, weight, b], add_layer_norm, plain_add
    else:
        values, ours, plain = [x, weight, b], layer_norm, plain_alone
    with poisoned_memory():
        results = run(ours, values, grads)
    eager = run(plain, values, grads)
    slack = 1.5 if dtype == torch.float32 else 1.02
    if kernels.INTERPRETED and dtype == torch.bfloat16:
        slack = 2.5  # Triton's interpreter cuts bits off where the GPU rounds
    assert all(r.dtype == e.dtype == dtype for r, e in zip(results, eager, strict=True))
    for i, (mine, theirs) in enumerate(zip(*errors(plain, values, grads, results, eager), strict=True)):
        # of a few values a single one that is rounded the other way shows
        assert mine <= (slack + results[i].numel() ** -0.5) * theirs + 1e-7, i
    if bias:  # x and out get the same gradient
        assert torch.equal(results[2], results[3])
    del eager
    if DEVICE == "cuda" or N * C < 1000:  # programs of the interpreter run one after another
        for first, second in zip(results, run(ours, values, grads)):
            assert torch.equal(first, second)


@runs
def test_far_from_zero():
    """A mean a thousand times the deviation: squares of what is not centred would leave nothing."""
    x = (1000 + randn(3, 300)).requires_grad_()
    weight = torch.ones(300, device=DEVICE)
    y, grad = layer_norm(x, weight, None), randn(3, 300, seed=1)
    z = x.detach().double().requires_grad_()
    true = F.layer_norm(z, (300,))
    assert error(y, true.detach()) < 1e-4  # 1000 is rounded to 6e-5
    true_grad = torch.autograd.grad(true, z, grad.double())[0]
    assert error(torch.autograd.grad(y, x, grad)[0], true_grad) < 1e-4


@runs
def test_strides_shapes_and_no_rows():
    weight, bias = randn(96)[::2].requires_grad_(), randn(48, 2)[:, 1].requires_grad_()
    wide = randn(2, 3, 96)
    for x in (wide[..., 48:], wide.view(6, 96).T[:48].T, wide[0, 0, :48], wide[:, :0, :48],
              wide[:, -1:, ::2]):
        x = x.detach().requires_grad_()
        grad = x.new_ones(()).expand(x.shape)  # what .sum() sends back, strides 0
        for function, first in ((layer_norm, ()), (add_layer_norm, (x.detach().flip(0).requires_grad_(),))):
            other = run(function, [x, *first, weight, bias], [grad, grad])
            own = [(x if first == () else x + first[0]).detach().contiguous().requires_grad_(), weight, bias]
            norm = run(layer_norm, own, [grad.contiguous()])
            assert torch.equal(other[1 if first else 0], norm[0]) and other[0].shape == x.shape
            assert torch.equal(other[-2], norm[-2]) and torch.equal(other[-1], norm[-1])
            if x.numel() == 0:
                assert (other[-2] == 0).all() and (other[-1] == 0).all()


@runs
def test_either_result_alone():
    values, (grad_s, grad_y) = inputs(3, 40)
    values, (x, out, weight, bias) = exact(values), values
    for part, grad in enumerate((grad_s, grad_y)):
        mine = torch.autograd.grad(add_layer_norm(x, out, weight, bias)[part], (x, out, weight, bias), grad,
                                   allow_unused=True)
        true = torch.autograd.grad(plain_add(*values)[part], values, grad.double(), allow_unused=True)
        for a, b in zip(mine, true):
            assert (a is None) == (b is None) and (a is None or error(a, b) < 1e-6)
    s, y = add_layer_norm(x, out, weight.detach(), bias.detach())  # frozen
    assert torch.autograd.grad(s.sum() + y.sum(), x)[0].isfinite().all()
    with torch.no_grad():
        assert torch.equal(add_layer_norm(x, out, weight, bias)[1], y)


@runs
@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
def test_autocast(stream):
    """The norm is in autocast's dtype, rounded once; sum and gradients are in the dtypes of what came in."""
    (x, out, weight, bias), grads = inputs(5, 100, stream, weights=torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        s, y = add_layer_norm(x, out, weight, bias)
        assert torch.equal(layer_norm(s, weight, bias), y)
    assert s.dtype == stream and y.dtype == torch.float16
    assert torch.equal(layer_norm(s.float(), weight, bias).half(), y)
    results = torch.autograd.grad((s, y), (x, out, weight, bias), (grads[0], grads[1].half()))
    assert [g.dtype for g in results] == [stream, stream, torch.float32, torch.float32]
    assert layer_norm(x, weight, bias).dtype == stream
    mixed, _ = add_layer_norm(x, out.bfloat16(), weight, bias)
    assert mixed.dtype == (x + out.bfloat16()).dtype


def test_without_triton(monkeypatch):
    """PyTorch's path, to the bit; fp64 and rows that are too wide take it anywhere."""
    (x, out, weight, bias), grads = inputs(3, 33, torch.float64)
    for got, expected in zip(run(add_layer_norm, [x, out, weight, bias], grads),
                             run(plain_add, [x, out, weight, bias], grads)):
        assert torch.equal(got, expected)
    x, weight = randn(1, module.MAX_WIDTH + 1), randn(module.MAX_WIDTH + 1, seed=1)
    assert torch.equal(layer_norm(x, weight, None), F.layer_norm(x, weight.shape, weight))
    monkeypatch.setattr(kernels.layer_norm, "usable", lambda x: False)
    assert torch.equal(layer_norm(x[:, :9], weight[:9], None), F.layer_norm(x[:, :9], (9,), weight[:9]))


@pytest.mark.parametrize("dynamic", [False, True] if DEVICE == "cuda" else [True])
def test_compiled(dynamic):
    """One graph. On a GPU with the kernels in it; the interpreter cannot be compiled, PyTorch's path can."""
    (x, out, weight, bias), grads = inputs(6, 64)

    def function(x, out, weight, bias):
        s, y = add_layer_norm(x * 1.5, out, weight, bias)
        return s, layer_norm(2 * y, weight, None)

    torch.compiler.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (6, 4):
        values, part = [x[:n], out[:n], weight, bias], [g[:n] for g in grads]
        for got, expected in zip(run(compiled, values, part), run(function, values, part)):
            assert error(got, expected.detach().double()) < 1e-6


def in_models():
    dense = random_model(torch.float32)
    ranks = DistributedGPT(DistributedGPTConfig(**vars(dense.config), tp_size=2, block_types=["spd", "tp"]))
    return dense, ranks


@runs
@pytest.mark.parametrize("kind", [0, 1], ids=["GPT", "DistributedGPT"])
def test_in_models(kind):
    """The same loss and gradients, and that the kernels were what ran."""
    model, idx = in_models()[kind].to(DEVICE), tokens(2, 6).to(DEVICE)
    names = dict(model.named_parameters())
    before = [model(idx, idx.roll(-1, 1))[1]]
    before += torch.autograd.grad(before[0], list(names.values()))
    use_triton_layer_norm(model)
    assert all(m.triton for m in model.modules() if isinstance(m, LayerNorm)) and not LayerNorm.triton
    loss = model(idx, idx.roll(-1, 1))[1]
    functions, seen = [loss.grad_fn], set()
    while functions:
        node = functions.pop()
        if node is not None and node not in seen:
            seen.add(node)
            functions += [f for f, _ in node.next_functions]
    kinds = [type(node).__name__ for node in seen]
    assert "NativeLayerNormBackward0" not in kinds and "_EagerBackward" in kinds
    after = [loss, *torch.autograd.grad(loss, list(names.values()))]
    for name, a, b in zip(["loss", *names], after, before, strict=True):
        assert error(a.detach(), b.detach().double()) < 1e-5, name


@runs
def test_benchmark(tmp_path):
    device = torch.device(DEVICE)
    bandwidth, attempts = benchmark.copy_bandwidth(device, 2), Attempts()
    figures = [f for add in (False, True)
               for f in benchmark.measure(add, 2, 64, torch.float32, True, None, 2, device, bandwidth,
                                         attempts)]
    assert len(figures) == 4 * (4 if DEVICE == "cuda" else 3) and bandwidth > 0
    for f in figures:
        values = {"forward": 2, "backward": 3, "add forward": 4, "add backward": 4}[f["operation"]]
        moved = values * 2 * 64 * 4
        assert f["of_copy"] == pytest.approx(moved / (1e-6 * f["us"]) / bandwidth) and len(f["us_all"]) == 2
    benchmark.plot(figures, str(tmp_path / "k.png"), "LayerNorm")
    assert (tmp_path / "k.png").stat().st_size > 10_000


@runs
@pytest.mark.parametrize("capped", [False, True])
def test_benchmark_of_the_head(capped):
    """Contenders compute the same, and its FLOP/s are of three products."""
    device = torch.device(DEVICE)
    head = benchmark.head_contenders(None, False, capped)
    x, weight = torch.randn(5, 16, device=device, requires_grad=True), torch.randn(40, 16, device=device)
    targets = torch.tensor([3, 39, -1, 0, 7], device=device)
    found = [(loss, *torch.autograd.grad(loss, x)) for loss in (f(x, weight, targets) for f in head.values())]
    torch.testing.assert_close(found[0], found[1])
    figures = benchmark.measure_head(5, 16, 40, torch.float32, None, 2, device, Attempts(), capped)
    assert {f["operation"] for f in figures} == {"capped head" if capped else "head"}
    assert [f["name"] for f in figures] == ["ours", "eager", "inductor"][:3 if DEVICE == "cuda" else 2]
    for f in figures:
        assert f["tflop_per_second"] == pytest.approx(6 * 5 * 16 * 40 / f["us"] / 1e6)
        assert (f["peak_bytes"] is None) == (DEVICE == "cpu") and len(f["us_all"]) == 2


@runs
def test_through_the_operator():
    """Where a dispatch mode looks on the operators are there to be seen, with the same bits as without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Onlooker(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    values, grads = inputs(3, 40)
    direct = run(add_layer_norm, values, grads)
    with Onlooker():
        for one, other in zip(run(add_layer_norm, values, grads), direct):
            assert torch.equal(one, other)
    assert "nanosync.layer_norm.default" in seen and "nanosync.layer_norm_backward.default" in seen
    y = layer_norm(values[0], values[2], None)
    grad = torch.autograd.grad(y.square().sum(), values[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
