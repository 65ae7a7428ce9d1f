"""The setting --fp8: its errors, the layers and models that it changes, and what it leaves as it is. CPU.

    python -m pytest tests/unit/test_fp8_layers.py
"""

import copy

import pytest
import torch
import torch.nn as nn
from helpers import build, gradients, random_speedrun_model, tokens

from kernels.fp8 import WeightCasts
from nanosync.errors import UserError
from nanosync.fp8 import (
    Float8Linear,
    check_fp8,
    check_fp8_device,
    describe_fp8,
    follow_weights,
    layers_of,
    use_fp8,
)
from nanosync.ranks import column_parallel, row_parallel

SIZES = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64)
ON = dict(fp8="emulated", fp8_head=True, fp8_weight_gradients=False)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("config, words", [
    (dict(fp8="rowwise", fp8_head=False), "fp8='rowwise' is unknown: use True, False or emulated"),
    (dict(fp8=1, fp8_head=False), "fp8=1 is unknown"),
    (dict(fp8="True", fp8_head=False), "fp8='True' is unknown"),
    (dict(fp8=False, fp8_head=True), "fp8_head adds the head to the products in FP8: add --fp8"),
    (dict(fp8=False, fp8_head=False, fp8_weight_gradients=True), "fp8_weight_gradients adds the"),
])
def test_wrong_settings(config, words):
    with pytest.raises(UserError, match=words):
        check_fp8(dict(fp8_weight_gradients=False) | config)


@pytest.mark.parametrize("name, capability, dtype, words", [
    ("NVIDIA A100-SXM4-80GB", (8, 0), "bfloat16", "since Hopper .H100., and the device is NVIDIA A100-SXM4"),
    ("NVIDIA L4", (8, 9), "bfloat16", "since Hopper .H100., and the device is NVIDIA L4"),
    ("NVIDIA H100 80GB HBM3", (9, 0), "float32", "fp8 needs dtype='bfloat16' for all other products"),
    ("NVIDIA H100 80GB HBM3", (9, 0), "float16", "does not go with float16"),
    ("NVIDIA H100 80GB HBM3", (9, 0), "bfloat16", None),
    ("NVIDIA B200", (10, 0), "bfloat16", None),
])
def test_devices(monkeypatch, name, capability, dtype, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if words is None:
        check_fp8_device(dict(fp8=True), CUDA, getattr(torch, dtype))
    else:
        with pytest.raises(UserError, match=words):
            check_fp8_device(dict(fp8=True), CUDA, getattr(torch, dtype))
    check_fp8_device(dict(fp8=False), CUDA, getattr(torch, dtype))
    if dtype != "float16":
        check_fp8_device(dict(fp8="emulated"), CUDA, getattr(torch, dtype))


@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=40), "fp8 needs matrices whose sizes are multiples of 16, and on a process transformer"),
    (dict(vocab_size=65), "fp8_head needs matrices .* the head has 65 x 32: choose other sizes, or leave"),
])
def test_sizes_that_do_not_fit(changes, words):
    with torch.device("meta"):
        model = build(None, dtype=torch.float32, **SIZES | changes)
    with pytest.raises(UserError, match=words):
        use_fp8(model, ON)


MODELS = {
    "dense": lambda: build(None, dtype=torch.float32, **SIZES),
    "spd": lambda: build(dict(block_types=["spd"] * 2), 2, torch.float32, **SIZES),
    "speedrun": lambda: random_speedrun_model(dtype=torch.float32, **SIZES),
}


@pytest.mark.parametrize("weight_gradients", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_models_train_in_fp8_and_evaluate_as_without(kind, weight_gradients):
    """Names of parameters stay; gradients differ from those in fp32, but by no more than FP8 rounds; without
    gradients there is no bit's difference, and off means off."""
    model, idx, targets = MODELS[kind](), tokens(2, 16, vocab_size=64), tokens(2, 16, 5, vocab_size=64)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    use_fp8(model, dict(fp8=False, fp8_head=False, fp8_weight_gradients=False))
    assert layers_of(model) == [] and model.head_fp8 is False
    use_fp8(model, ON | dict(fp8_weight_gradients=weight_gradients))
    follow_weights(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(layers_of(model)) == 8 and list(model.state_dict()) == names
    assert model.head_fp8 == "emulated"
    with torch.no_grad():
        assert model.head_fp8 is False
        assert torch.equal(model(idx, targets)[1], plain(idx, targets)[1])
        assert torch.equal(model(idx)[0], plain(idx)[0])
    expected, found = (gradients(m, m(idx, targets)[1]) for m in (plain, model))
    for name, grad in found.items():
        difference = (grad - expected[name]).norm() / expected[name].norm()
        assert 1e-4 < difference < 0.3, (name, difference)


def test_casts_follow_the_optimizer():
    model = MODELS["dense"]()
    use_fp8(model, ON)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    follow_weights(model, optimizer)
    layer = layers_of(model)[0]
    before = layer.casts.values.float().clone()
    model(tokens(2, 16, vocab_size=64), tokens(2, 16, 5, vocab_size=64))[1].backward()
    optimizer.step()
    after = layer.casts.values.float() * layer.casts.scale[0]
    assert not torch.equal(layer.casts.values.float(), before)
    assert (after - layer.weight).abs().max() <= 2**-4 * layer.weight.abs().max()


@pytest.mark.parametrize("kept", [False, True])
def test_products_of_ranks(kept):
    """All products of ranks are in FP8, also batched ones. They have the bits of the products of whole
    matrices: of the same rows, or of a row whose largest entry is in each rank's part."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 96)
    layer.__class__, layer.emulated = Float8Linear, True
    layer.casts = WeightCasts([layer.weight.detach()]).casts[0] if kept else None
    x = torch.randn(2, 3, 32)
    joined = layer(x) - layer.bias
    for parts in (1, 3):
        apart = column_parallel(x.expand(2, 2, 2, 3, 32)[0], layer, parts)  # (m, B, T, N / m)
        expected = layer(x).view(2, 3, parts, 2, -1).permute(3, 0, 1, 2, 4).reshape(2, 2, 3, -1)
        assert torch.equal(apart, expected)
    y = torch.randn(1, 2, 3, 32)
    y[..., ::16] = 9.0
    joined = row_parallel(y, layer, 2, together=True)
    for local in (row_parallel(y, layer, 2, together=False),
                  row_parallel(y.view(1, 2, 3, 2, 16).transpose(0, 3)[..., 0, :], layer, 2, together=False)):
        assert local.shape == (2, 2, 3, 96) and torch.allclose(local.sum(0), joined[0], atol=1e-5)
    assert not torch.allclose(joined, y @ layer.weight.T, atol=1e-3)


def test_simulated_ranks_train_with_the_casts_of_whole_weights():
    """A batched product takes its part of the casts, and gradients reach all of the weight."""
    model, idx, targets = MODELS["spd"](), tokens(2, 16, vocab_size=64), tokens(2, 16, 5, vocab_size=64)
    use_fp8(model, ON)
    grads = []
    for kept in (False, True):
        if kept:
            follow_weights(model, torch.optim.SGD(model.parameters(), lr=0.1))
            assert model.head_casts is not None
        grads.append(gradients(model, model(idx, targets)[1]))
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_parts_of_simulated_ranks_that_do_not_fit():
    model = build(dict(block_types=["spd"] * 2), 4, torch.float32, n_layer=2, n_head=4, n_embd=32,
                  vocab_size=64)
    with pytest.raises(UserError, match=r"on a simulated rank .*c_attn\.weight has 24 x 32"):
        use_fp8(model, ON)


@pytest.mark.parametrize("kind, setting, words", [
    ("dense", dict(fp8_head=False), "FP8: 8 matrices of the blocks (scales per row)"),
    ("dense", dict(fp8_weight_gradients=True),
     "FP8: 8 matrices of the blocks and the head, 6 weight gradients (scales per row)"),
    ("spd", dict(fp8_weight_gradients=True),
     "FP8: 8 matrices of the blocks and the head, no weight gradients, which batches of simulated ranks "
     "leave as they are (scales per row)"),
    ("spd", dict(fp8="emulated", compile=False),
     "FP8: 8 matrices of the blocks and the head (emulated, which is slow)"),
    ("dense", dict(fp8_head=False, compile=False),
     "FP8: 8 matrices of the blocks (scales per row); without compile the casts cost more than FP8 saves"),
])
def test_description(kind, setting, words):
    model, setting = MODELS[kind](), ON | dict(fp8=True, compile=True) | setting
    use_fp8(model, setting)
    assert describe_fp8(setting, model) == words
