"""What train_gpt.py and train_gpt_fast.py trained, loaded for sampling and evaluation: logits, KV cache,
checkpoints with hostile values. CPU; seconds.

    python -m pytest tests/unit/test_speedrun_inference.py
"""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, compare_with_uncached, random_hellaswag, tokens
from helpers import random_speedrun_model as baseline_model
from saved_models import EOT, SWITCHES, fast_model
from saved_models import save_speedrun as save

import models
import train_gpt
from nanosync import checkpoint
from nanosync.errors import UserError
from nanosync.hellaswag_eval import accuracy, make_rows
from nanosync.model_kind import check_size, model_config
from nanosync.token_losses import token_losses


def prompt(T: int, rows: int = 3):
    """Random tokens with documents that begin inside."""
    idx = tokens(rows, T)
    idx[0, T // 2] = EOT
    idx[1, T - 1] = EOT
    return idx


class Logits:
    """A model whose logits are of the last position only, for helpers."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def __call__(self, idx):
        with torch.no_grad():
            return self.model(idx)[0], None


def largest_error(model, T: int, steps: int = 30, **options) -> float:
    """The largest difference of the logits with a cache from those of the whole window, past its end too."""
    with torch.no_grad():
        return compare_with_uncached(Logits(model), model.decoder(3, **options), prompt(T), steps,
                                     options.get("slide", 1))


@pytest.mark.parametrize("T", [1, 2, 5, 24, 31])  # also longer than windows, and than sequence_length
def test_cache_of_the_fast_model(T):
    assert largest_error(fast_model(), T) < 1e-12


@pytest.mark.parametrize("changes", [
    *({name: False} for name in SWITCHES), dict.fromkeys(SWITCHES, False), dict(untied=True),
    dict(untied=True, softcap=False), dict(end_of_text=None), dict(windows=[1, 40]), dict(value_layers=[]),
    dict(long_layers=[]), dict(offset_layers=[]),
    dict(n_layer=1, long_layers=[0], value_layers=[0], offset_layers=[0], exclusive_layers=[0])], ids=str)
def test_cache_with_each_technique_off(changes):
    assert largest_error(fast_model(**changes), 5, 22) < 1e-12


def test_slide_of_several_tokens():
    assert largest_error(fast_model(), 5, slide=7) < 1e-12


@pytest.mark.parametrize("variant, changes", [
    *((variant, {}) for variant in train_gpt.VARIANTS if variant != "sync"),
    ("sync", dict(tp_size=2, sync_points=[1, 4])), ("sync", dict(tp_size=2, sync_points=[]))])
def test_cache_of_each_variant(variant, changes):
    model = baseline_model(variant, **changes).eval()
    assert largest_error(model, 5, 40) < 1e-12 and largest_error(model, 40, 5) < 1e-12


@pytest.mark.parametrize("model", [fast_model(), baseline_model()], ids=["fast", "baseline"])
def test_greedy_tokens_are_those_of_the_plain_forward_pass(model):
    idx = expected = prompt(4)
    for _ in range(40):
        window = expected[:, -model.config.block_size:]
        expected = torch.cat((expected, model(window)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 40, temperature=0.0), expected)


def test_the_cache_keeps_windows_only():
    model = fast_model()
    decoder = model.decoder(1)
    list(decoder.run(tokens(1, 15), 4))
    assert [layer.k.size(1) for layer in decoder.cache.layers] == [3, 6, 3, 3, 6]


def test_rotary_tables_stay_in_fp32():
    for model in (fast_model(torch.float32), baseline_model(dtype=torch.float32)):
        tables = model.cos.clone(), model.sin.clone()
        model.to(torch.bfloat16)
        assert model.cos.dtype == torch.float32 and torch.equal(torch.stack(tables),
                                                                torch.stack((model.cos, model.sin)))
        assert list(model.generate(tokens(2, 5), 5).shape) == [2, 10]


@pytest.mark.parametrize("model", [
    *(fast_model(torch.float32, **changes) for changes in ({}, dict(untied=True), dict(bigram=False))),
    *(baseline_model(variant, torch.float32) for variant in train_gpt.VARIANTS if variant != "sync"),
    baseline_model("sync", torch.float32, tp_size=2, sync_points=[1, 4])],
    ids=lambda model: f"{type(model).__module__}-{getattr(model.config, 'variant', model.config)}"[:60])
def test_a_loaded_model_is_the_trained_one(model, tmp_path):
    save(tmp_path, model)
    loaded = models.load(str(tmp_path))
    assert type(loaded) is type(model) and loaded.config == model.config
    assert torch.equal(loaded(prompt(20))[0], model(prompt(20))[0])
    with pytest.raises(UserError, match="no model with these layers: export its checkpoint"):
        loaded.save_pretrained(str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("model", [fast_model(), fast_model(untied=True, softcap=False),
                                   baseline_model()], ids=["fast", "untied", "baseline"])
def test_hellaswag_losses_are_those_of_the_logits(model):
    examples = random_hellaswag(5)
    idx, targets = make_rows(examples, model.config.block_size)
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten(), reduction="none",
                               ignore_index=-1).view(targets.shape)
    with torch.no_grad():
        losses = token_losses(model, idx, targets, torch.device("cpu"))
    assert torch.allclose(losses, expected, rtol=0, atol=1e-12)
    assert accuracy(model, examples, 2, torch.device("cpu"))["n"] == 5


HOSTILE = [  # changes of a configuration, words of the error
    (dict(n_layer=10**9), "n_layer=1000000000 is above"), (dict(n_layer=0), "n_layer=0"),
    (dict(n_layer=2**40), "which no model has"), (dict(n_embd="24"), "must be of type int"),
    (dict(sequence_length=2**30, n_embd=2**10), "GB of parameters"), (dict(vocab_size=10**9), "GB of"),
    (dict(used_vocab_size=62), "between 1 and vocab_size=61"), (dict(used_vocab_size=0), "between 1 and"),
    (dict(n_head=5), "choose n_embd"), (dict(unknown=1), "does not fit GPTConfig"),
]
HOSTILE_FAST = [
    *HOSTILE,
    (dict(windows=[1, 2**31]), "two positive whole"), (dict(windows=[1]), "two positive whole"),
    (dict(windows=[1, "2"]), "two positive whole"), (dict(long_layers=[5]), "must be numbers of layers"),
    (dict(offset_layers=[5]), "must be numbers of layers"),
    (dict(value_layers=[[0]]), "must be numbers of layers"), (dict(long_layers=None), "must be of type list"),
    (dict(bigram=1), "must be of type bool"), (dict(end_of_text=2**40), "which no model has")]
HOSTILE_BASELINE = [
    *HOSTILE,
    (dict(variant="x"), "variant='x' is unknown"), (dict(variant=["sync"]), "must be of type str"),
    (dict(variant="sync"), "sync_points=None"), (dict(variant="sync", sync_points=[6]), "below 6"),
    (dict(variant="sync", sync_points=[[1]]), "below 6"), (dict(tp_size=0), "tp_size=0"),
    (dict(variant="sync", sync_points=[1], tp_size=3), "tp_size=3 must divide n_head=2")]


@pytest.mark.parametrize("kind, changes, words", [
    *((models.FAST, *case) for case in HOSTILE_FAST),
    *((models.SPEEDRUN, *case) for case in HOSTILE_BASELINE)], ids=str)
def test_hostile_configurations(kind, changes, words):
    """Refused before a model is built."""
    config = fast_model().config if kind == models.FAST else baseline_model().config
    description = {"kind": kind, "config": dataclasses.asdict(config) | changes}
    with pytest.raises(UserError, match=words) as error:
        check_size(model_config(description, models.INFERENCE_KINDS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [dict(untied=1), dict(untied=None), dict(train_seconds="1")], ids=str)
def test_hostile_entries_of_state(state, tmp_path):
    save(tmp_path, fast_model(torch.float32), **state)
    with pytest.raises(UserError, match=f"{next(iter(state))} is"):
        models.load(str(tmp_path))


def test_weights_of_another_architecture(tmp_path):
    save(tmp_path, fast_model(torch.float32), config={"bigram": False})
    with pytest.raises(UserError, match="does not fit the model: 1 parameters"):
        models.load(str(tmp_path))


def test_other_scripts_do_not_take_the_weights(tmp_path):
    save(tmp_path, baseline_model(dtype=torch.float32))
    with pytest.raises(UserError, match=r"only train_gpt\.py can use it"):
        models.load_weights(str(tmp_path), warn=lambda text: None)
    assert checkpoint.find(str(tmp_path)).step == 1


def test_scripts_are_imported_for_their_checkpoints_only():
    code = ("import sys, models; loaded = lambda: [n for n in ('train_gpt', 'train_gpt_fast') if n in "
            "sys.modules]; assert loaded() == []; models.INFERENCE_KINDS['gpt']; assert loaded() == []; "
            "models.INFERENCE_KINDS['fast_gpt']; assert loaded() == ['train_gpt_fast']")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
