"""The dense GPT: against transformers and plain PyTorch, initialisation, causality, FLOPs. CPU; seconds.

    python -m pytest tests/unit/test_model.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, random_model, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.cross_entropy import linear_cross_entropy
from model import GPT, GPTConfig, init_parameter, padded_vocab_size
from nanosync.errors import UserError
from nanosync.huggingface import GPT2_SIZES


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_same_logits_as_transformers(name, tmp_path):
    """Both directions, at each GPT-2's width and heads (less depth, vocabulary, context; random weights)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = GPT2_SIZES[name] | dict(n_layer=2 if name == "gpt2" else 1)  # 30M parameters a layer of gpt2-xl
    torch.manual_seed(0)
    config = GPT2Config(n_positions=32, vocab_size=301, bos_token_id=0, eos_token_id=0, **size)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    idx = tokens(2, 32, vocab_size=301)
    ours = GPT.from_pretrained(str(tmp_path / "theirs")).eval()
    with torch.no_grad():
        expected = theirs(idx).logits
        # fp32: 1e-4 is the bar; sums of up to 6400 terms in another order differ by about 1e-5
        assert (ours(idx, all_logits=True)[0] - expected).abs().max() < 1e-4
        ours.save_pretrained(str(tmp_path / "ours"))
        back = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
        assert (back(idx).logits - expected).abs().max() < 1e-4
    assert back.config.n_head == size["n_head"]


def test_save_pretrained_without_biases_and_padding(tmp_path):
    from transformers import GPT2LMHeadModel

    ours = random_model(torch.float32, bias=False, vocab_size=64, used_vocab_size=61).eval()
    ours.save_pretrained(str(tmp_path))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = tokens(2, 16)
    with torch.no_grad():
        assert torch.allclose(theirs(idx).logits, ours(idx, all_logits=True)[0][..., :61], atol=1e-5)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="bert"), "its model_type is 'bert'"),
    (dict(activation_function="relu"), "activation_function='relu'"),
    (dict(scale_attn_weights=False), "scale_attn_weights=False; this model supports only True"),
    (dict(n_layer=1), r"has 12 weights .* such as h\.1\.attn\.c_attn\.bias"),
    (dict(n_layer="many"), "is not the configuration of a GPT-2"),
    (dict(n_embd=64), "should be"),
])
def test_from_pretrained_errors(tmp_path, change, words):
    import json

    random_model(torch.float32).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor one of gpt2"):
        GPT.from_pretrained("gpt3")


@pytest.mark.parametrize("chunk_rows", [128, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_every_gradient(bias, chunk_rows, monkeypatch):
    """Against cross-entropy of whole logits, in fp64, with targets left out and with more than one chunk."""
    monkeypatch.setattr("kernels.cross_entropy._chunk_rows", lambda x, V, products: chunk_rows)
    model = random_model(bias=bias)
    idx, targets = tokens(12, 16), tokens(12, 16, seed=2)
    targets[0, :5] = targets[3] = -1
    _, loss = model(idx, targets)
    (3 * loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits, none = model(idx, all_logits=True)
    assert none is None and logits.shape == (12, 16, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    (3 * expected).backward()
    assert loss.dtype == torch.float64 and (loss - expected).abs() < 1e-14
    for name, p in model.named_parameters():
        assert torch.allclose(gradients[name], p.grad, rtol=1e-11, atol=1e-14), name


def test_loss_without_a_valid_target_is_nan():
    x = torch.randn(4, 8, requires_grad=True)
    assert linear_cross_entropy(x, torch.randn(5, 8), torch.full((4,), -1)).isnan()


def test_loss_needs_no_gradient_in_evaluation():
    x, w, targets = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 4])
    loss = linear_cross_entropy(x, w, targets)
    assert not loss.requires_grad and torch.allclose(loss, F.cross_entropy(x @ w.T, targets))


def test_loss_operator_is_registered_correctly():
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    from kernels.cross_entropy import _loss_and_grads

    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(_loss_and_grads, (x, w, torch.tensor([0, 1, 2, 4, -1, 3]), -1, [], False, True),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_low_precision_loss_and_gradients():
    """bf16 and fp16 against fp64 of the same rounded inputs: the error of rounding itself (2^-8, 2^-11)."""
    torch.manual_seed(0)
    x64, w64, t = torch.randn(300, 64), 0.3 * torch.randn(97, 64), torch.randint(97, (300,))
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        x, w = x64.to(dtype).requires_grad_(), w64.to(dtype).float().requires_grad_()
        xr, wr = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        loss, expected = linear_cross_entropy(x, w, t), F.cross_entropy(xr @ wr.T, t)
        scale = 65536.0  # of a GradScaler: small gradients must survive fp16
        (scale * loss).backward()
        (scale * expected).backward()
        assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < tolerance
        for mine, reference in ((x.grad, xr.grad), (w.grad, wr.grad)):
            assert (mine.double() - reference).norm() / reference.norm() < tolerance


LARGER = dict(block_size=64, vocab_size=3000, n_layer=6, n_head=4, n_embd=256)


@pytest.mark.parametrize("config", [SMALL, LARGER])
def test_initialisation(config):
    """Standard deviations within 2% of GPT-2's, or within what chance allows; biases 0, norms 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * config["n_layer"]) if name.endswith("c_proj.weight") else 0.02
        tolerance = max(0.02, 4 / math.sqrt(2 * p.numel()))  # four standard errors
        assert abs(p.std().item() / std - 1) < tolerance, name
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_initialisation_fails_on_an_unknown_parameter():
    with pytest.raises(AssertionError, match="no initialisation rule for parameter extra"):
        init_parameter("extra", torch.zeros(3, 3), 2)


def test_parameters_of_gpt2():
    with torch.device("meta"):
        for vocab_size, millions in ((50257, 124.4), (50304, 124.5)):
            model = GPT(GPTConfig(vocab_size=vocab_size))
            assert round(model.n_parameters() / 1e6, 1) == millions
    names = [name for name, _ in model.named_parameters()]
    assert names[:3] == ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight"]
    assert len(names) == 2 + 12 * 12 + 2 and "lm_head.weight" not in names
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("bias", [True, False])
def test_rows_and_later_tokens_do_not_matter(bias):
    """Row 1 of a batch never changes row 0; a token changes nothing before it."""
    model = random_model(bias=bias).eval()
    idx = tokens(2, 16)
    logits = model(idx, all_logits=True)[0]
    other = idx.clone()
    other[1] = (other[1] + 1) % 61
    assert torch.equal(model(other, all_logits=True)[0][0], logits[0])
    for position in range(16):
        other = idx.clone()
        other[:, position] = (other[:, position] + 1) % 61
        changed = (model(other, all_logits=True)[0] - logits).abs().amax(dim=(0, 2)) > 1e-12
        assert changed.tolist() == [i >= position for i in range(16)]


def test_last_logits_by_default():
    model = random_model().eval()
    idx = tokens(3, 9)
    assert torch.allclose(model(idx)[0], model(idx, all_logits=True)[0][:, -1:], atol=1e-13)


def test_dropout_is_off_in_evaluation_only():
    model = random_model(dropout=0.5)
    idx, y = tokens(2, 16), tokens(2, 16, seed=3)
    assert model(idx, y)[1] != model(idx, y)[1]
    model.eval()
    assert model(idx, y)[1] == model(idx, y)[1]


def test_flops_are_those_of_every_matrix_product():
    """Against PyTorch's own count of forward and backward, of attention written out as matrix products."""
    model = random_model(torch.float32)
    idx, y = tokens(3, 16), tokens(3, 16, seed=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(idx, all_logits=True)[0]
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    assert counter.get_total_flops() == model.flops_per_token(16) * idx.numel()


def test_crop_block_size():
    model = random_model().eval()
    idx = tokens(2, 8)
    expected = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], expected) and model.transformer.wpe.weight.requires_grad
    with pytest.raises(UserError, match="longer than block_size=8"):
        model(tokens(2, 9))
    with pytest.raises(UserError):
        model.crop_block_size(9)


@pytest.mark.parametrize("change", [dict(n_head=5), dict(n_layer=0), dict(dropout=1.0), dict(dropout=-0.1),
                                    dict(vocab_size=0), dict(used_vocab_size=62), dict(block_size=-1)])
def test_impossible_configurations(change):
    with pytest.raises(UserError):
        GPTConfig(**(SMALL | change))


def test_padded_vocab_size():
    assert padded_vocab_size(None) == (50257, 50304)
    assert padded_vocab_size({"vocab_size": 65}) == (65, 65)
    assert padded_vocab_size({"vocab_size": 50304}) == (50304, 50304)
