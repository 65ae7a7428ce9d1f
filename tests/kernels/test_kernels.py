"""Triton kernels against plain PyTorch in fp64.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_kernels.py  # anywhere, in Triton's interpreter
    python -m pytest tests/kernels/test_kernels.py  # on a CUDA GPU, compiled

Without a GPU and without the interpreter they are skipped; tests/compile compiles them.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import KERNEL_DEVICE as DEVICE
from helpers import compare_with_uncached, random_model, tokens
from helpers import runs_kernels as runs

import kernels
from kernels import cross_entropy, decode, exchange, pending_norm
from model import LayerNorm
from nanosync.generation import Decoder

# What rounding inputs and result to the dtype costs, times a small factor for the sums in between.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(result, reference):
    return ((result.double().cpu() - reference.cpu()).norm() / reference.norm().cpu()).item()


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@runs
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, V", [(3, 5), (5, 98), (4, 4096), (2, 50304)])
def test_cross_entropy(rows, V, dtype):
    logits = 3 * randn(rows, V, dtype=dtype)
    targets = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[1] = -1
    targets[0] = V - 1
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z, targets, ignore_index=-1, reduction="none")
    expected.sum().backward()
    losses, same = cross_entropy._triton_loss_and_grad_(logits.clone(), targets, -1, False)
    assert torch.equal(same, logits)  # without gradients the logits stay
    assert losses[1] == 0 and error(losses, expected.detach()) < 2e-6
    again, grad = cross_entropy._triton_loss_and_grad_(logits.clone(), targets, -1, True)
    assert torch.equal(losses, again) and (grad[1] == 0).all()
    assert error(grad, z.grad) < TOLERANCE[dtype]


@runs
def test_cross_entropy_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4], [88.0, 89.0, -float("inf")]], device=DEVICE)
    targets = torch.tensor([0, 2, 1], device=DEVICE)
    losses, grad = cross_entropy._triton_loss_and_grad_(logits.clone(), targets, -1, True)
    z = logits.double().requires_grad_()
    expected = F.cross_entropy(z, targets, reduction="none")
    expected.sum().backward()
    # fp32 logits of 3e4 have a spacing of 0.002 and are scaled by log2(e) inside
    assert torch.allclose(losses.double(), expected, atol=4e-3)
    assert torch.allclose(grad.double(), z.grad, atol=4e-3)


LINEAR_SIZES = [(B, K, N) for B in (1, 2, 3, 17, 64) for K, N in ((32, 70), (100, 33), (768, 48))]
if kernels.INTERPRETED:  # slow: each B, and each K and N in either kernel
    LINEAR_SIZES = [(1, 32, 70), (1, 768, 48), (2, 100, 33), (3, 768, 48), (17, 32, 70), (64, 100, 33)]


@runs
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B, K, N", LINEAR_SIZES)
@pytest.mark.parametrize("case", [
    dict(norm=True, bias=True), dict(norm=True, gelu=True), dict(bias=True, residual="out"), dict(),
    dict(bias=True, residual="other", also=True), dict(bias=True, residual="out", also=True, also_add=True),
    dict(bias=True, residual="out", also=True, also_add=True, also_bias=False)], ids=str)
def test_linear(B, K, N, case, dtype):
    if kernels.INTERPRETED and dtype == torch.bfloat16 and B > decode.VECTOR_ROWS:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 matrices as integers")
    x, w, out = randn(B, K), randn(N, K, dtype=dtype, seed=1) / K**0.5, randn(B, N, seed=2)
    b = randn(N, dtype=dtype, seed=3) if "bias" in case else None
    residual = {None: None, "out": out, "other": randn(B, N, seed=5)}[case.get("residual")]
    also = randn(B, N, seed=6) if "also" in case else None
    ln = LayerNorm(K, b is not None).to(DEVICE, dtype)
    with torch.no_grad():
        for p in ln.parameters():
            p.add_(0.3 * randn(K, dtype=dtype, seed=4))
    y = x.double()
    if "norm" in case:
        y = F.layer_norm(y, (K,), ln.weight.double(), None if ln.bias is None else ln.bias.double())
    else:
        x = x.to(dtype)  # what the kernels before it hand over
        y = x.double()
    product = F.linear(y, w.double())
    y = product if b is None else product + b.double()
    expected_also = None if also is None else (y if case.get("also_bias", True) else product)
    if case.get("also_add"):
        expected_also = expected_also + also.double()
    if "gelu" in case:
        y = F.gelu(y, approximate="tanh")
    if residual is not None:
        y = y + residual.double()
    decode._launch(x, w, b, out, ln if "norm" in case else None, "gelu" in case,
                   None if residual is None else decode.Part(residual), also, case.get("also_add", False),
                   case.get("also_bias", True))
    assert error(out, y.detach()) < TOLERANCE[dtype]
    if also is not None:
        assert error(also, expected_also.detach()) < TOLERANCE[dtype]


@runs
@pytest.mark.parametrize("V", [1, 100, 33000])
def test_cross_entropy_in_two_parts(V):
    """Log-sum-exp of a part of the columns, then its gradient given that of all, here of twice as many."""
    logits, index = randn(6, V), torch.tensor([0, V - 1, -1, V // 2, 0, -1], device=DEVICE)
    lse, target = cross_entropy._lse_and_target_logit(logits, index)
    assert error(lse, logits.double().logsumexp(dim=1)) < 1e-5
    assert torch.equal(target, logits.gather(1, index.clamp(min=0)[:, None])[:, 0].where(index >= 0, 0))
    lse_of_all = (lse + 0.6931472).double()
    lse_of_all[4] = float("inf")  # a row that does not count
    expected = (logits.double() - lse_of_all[:, None]).exp()
    for row, column in enumerate(index.tolist()):
        if column >= 0 and row != 4:
            expected[row, column] -= 1
    grad = cross_entropy._grad_logits_(logits, lse_of_all.float(), index)
    assert error(grad, expected) < 1e-5 and (grad[4] == 0).all()


@runs
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("C", [40, 768])
def test_embed(C, dtype):
    wte, wpe = randn(50, C, dtype=dtype), randn(9, C, dtype=dtype, seed=1)
    token, position = torch.tensor([3, 49, 0], device=DEVICE), torch.tensor([8], device=DEVICE)
    out = decode.embed(token, position, wte, wpe, torch.empty(3, C, device=DEVICE))
    assert torch.equal(out, wte[token].float() + wpe[position].float())


@runs
@pytest.mark.parametrize("K", [1, 7, 200])
def test_draw(K):
    logits, noise = randn(5, K), randn(5, K, seed=1).abs()
    noise[0, 0] = 0  # an exponential can be
    index = torch.randperm(5 * K).view(5, K).to(DEVICE)
    out = decode.draw(logits, index, noise, 0.7, torch.empty_like(index[:, 0]))
    score = logits.double() / 0.7 - noise.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    assert torch.equal(out, index.gather(1, score.argmax(dim=1, keepdim=True))[:, 0])


ATTENTION_SIZES = [(dtype, *size) for size in ((1, 2, 64, 300), (3, 2, 16, 40), (2, 2, 80, 130),
                                               (2, 1, 25, 7)) for dtype in TOLERANCE]
if kernels.INTERPRETED:  # slow: a dtype for each of the long ones
    ATTENTION_SIZES = ATTENTION_SIZES[0:1] + ATTENTION_SIZES[4:5] + ATTENTION_SIZES[8:]


@runs
@pytest.mark.parametrize("dtype, B, H, D, S", ATTENTION_SIZES)
def test_attention(B, H, D, S, dtype):
    """Every kind of position: the first, inside a block, at its end, in the last span, the last one. In the
    interpreter each position takes as long as the positions before it."""
    C = H * D
    cache = randn(1, 2, B, H, S, D, dtype=dtype)
    attention = decode.Attention(cache)
    span = attention.span
    for position in {0, 1, 5, S // 2, 63, 64, 65, 127, 128, 129, span - 1, span, S - 1} & set(range(S)):
        qkv = randn(B, 3 * C, dtype=dtype, seed=position)
        k_v, out = cache[0].clone(), torch.full((B, C), float("nan"), device=DEVICE, dtype=dtype)
        attention(qkv, k_v, torch.tensor([position], device=DEVICE), out)
        q, k, v = qkv.view(B, 3, H, D).unbind(1)
        assert torch.equal(k_v[0, :, :, position], k) and torch.equal(k_v[1, :, :, position], v)
        others = torch.arange(S, device=DEVICE) != position
        assert torch.equal(k_v[:, :, :, others], cache[0][:, :, :, others])
        keys, values = k_v[0, :, :, :position + 1].double(), k_v[1, :, :, :position + 1].double()
        expected = F.scaled_dot_product_attention(q.double()[:, :, None], keys, values)
        assert error(out.view(B, H, D), expected[:, :, 0]) < TOLERANCE[dtype], position
        assert (attention.done == 0).all()


@runs
@pytest.mark.parametrize("R, N, C", [(2, 5, 40), (3, 2, 64), (1, 3, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("pending", [False, True])
def test_pending_layer_norm(R, N, C, pending, last, bias):
    """Outputs and every gradient, against the definition in fp64."""
    inputs = [randn(N, C), randn(R, N, C, seed=1) if pending else None, randn(R, N, C, seed=2),
              randn(C, seed=3), randn(C, seed=4) if bias else None]
    ours = [t if t is None else t.requires_grad_() for t in inputs]
    exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    results = pending_norm.pending_layer_norm(*ours, last)
    new = exact[2] if exact[1] is None else exact[1] + exact[2]
    expected = (F.layer_norm(exact[0] + new, (C,), exact[3], exact[4]), new.sum(dim=0) if last else new)
    grads = [randn(*y.shape, seed=5 + i) for i, y in enumerate(expected)]
    torch.autograd.backward(results, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    for ours_, exact_ in zip(results, expected):
        assert error(ours_, exact_.detach()) < 1e-5
    for ours_, exact_ in zip(ours, exact):
        assert ours_ is None or error(ours_.grad, exact_.grad) < 1e-5


@pytest.mark.skipif(not kernels.INTERPRETED, reason="the other ranks are only pretended")
@pytest.mark.parametrize("P", [2, 3, 4])
def test_exchange(P):
    """The last of P ranks: what it sends to each of the others, and what it makes of what they sent."""
    n, me = 1500, P - 1
    slots = [torch.zeros(2, P, n, dtype=torch.int64) for _ in range(P)]
    ranks = exchange.Exchange(slots[me], [s.data_ptr() for s in slots], me, n)
    base = randn(n)
    for number in (1, 2, 3, 4):
        values = randn(P, n, seed=number)
        packed = (values.view(torch.int32).long() & 0xFFFFFFFF) | number << 32
        slots[me][number % 2, :me] = packed[:me]
        if number < 4:
            expected = base.double() + values.double().sum(dim=0)
            ranks.add_to(base, values[me])
            assert error(base, expected) < 2e-7  # P additions in fp32
        else:
            out = torch.empty(2, 5, P, 150)
            ranks.gather(out, values[me].view(2, 5, 150))
            assert torch.equal(out, values.view(P, 2, 5, 150).permute(1, 2, 0, 3))
        for r in range(P):
            assert torch.equal(slots[r][number % 2, me], packed[me])


@runs
@pytest.mark.parametrize("B", [1, 5])
def test_decoder_with_kernels(B):
    """Steps with a cache that fills, and two steps past the end of the window, which fill it anew."""
    model = random_model(torch.float32, block_size=5).to(DEVICE).eval()
    decoder = Decoder(model, B)
    # fp32, two layers, logits of about 1
    assert compare_with_uncached(model, decoder, tokens(B, 3).to(DEVICE), 5) < 2e-5
