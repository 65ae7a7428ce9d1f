"""Weights of other programs: sharded Hugging Face folders are read, pickles are named. CPU; seconds.

    python -m pytest tests/unit/test_foreign_weights.py
"""

import json

import pytest
import torch
from helpers import random_model, save_random_model, tokens
from safetensors.torch import load_file, save_file

import models
from model import GPT
from nanosync import checkpoint
from nanosync.errors import UserError


@pytest.fixture
def sharded(tmp_path):
    """A folder with its weights in two files, and the model."""
    model = random_model(torch.float32).eval()
    model.save_pretrained(str(tmp_path / "whole"))
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return folder, model, parts


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_folder(sharded):
    folder, model, _ = sharded
    loaded = GPT.from_pretrained(str(folder))
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("change, words", [
    (lambda m: {**m, next(iter(m)): "../a.safetensors"}, "is not the name of a file beside it"),
    (lambda m: {**m, next(iter(m)): "a.bin"}, "'a.bin' is not the name of a file beside it"),
    (lambda m: {**m, next(iter(m)): 3}, "3 is not the name of a file beside it"),
    (lambda m: {**m, "h.9.x": "model-00001-of-00002.safetensors"}, "says that 'h.9.x' is in"),
    (lambda m: {**m, "h.9.x": "none.safetensors"}, "cannot read .*none.safetensors: No such file"),
    (lambda m: [1], "is not a list of weights"),
])
def test_a_sharded_folder_that_is_malformed(sharded, change, words):
    folder, _, parts = sharded
    write_index(folder, change({name: file for file, part in parts.items() for name in part}))
    with pytest.raises(UserError, match=words) as error:
        GPT.from_pretrained(str(folder))
    assert "\n" not in str(error.value)


def test_a_weight_in_two_files(sharded):
    folder, _, parts = sharded
    first, second = parts
    save_file(load_file(folder / second) | {parts[first][0]: torch.zeros(1)}, folder / second)
    with pytest.raises(UserError, match="in another file"):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize("path, files, words", [
    ("out", ["ckpt.pt"], "out/ckpt.pt is a checkpoint of nanoGPT, .* convert.py out/ckpt.pt OUT_DIR"),
    ("out/ckpt.pt", ["ckpt.pt"], "out/ckpt.pt is a checkpoint of nanoGPT"),
    ("out", ["config.json", "pytorch_model.bin"], "pytorch_model.bin is a pickle, .* convert.py out OUT_DIR"),
    ("out", ["config.json", "pytorch_model.bin.index.json"], "is a pickle, .* convert.py out OUT_DIR"),
    ("out/step_9.pth", ["step_9.pth"], "step_9.pth is a pickle, .* model.safetensors, beside a config.json"),
    ("out/model.safetensors", ["config.json", "model.safetensors"], "is a file: give its folder"),
    ("out", ["notes.txt"], "has neither checkpoints .* nor config.json and model.safetensors"),
    ("gone", [], "'gone' is neither a folder nor one of gpt2"),
])
def test_weights_that_are_not_read(tmp_path, monkeypatch, path, files, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for file in files:
        (tmp_path / "out" / file).write_text("{}")
    with pytest.raises(UserError, match=words) as error:
        models.load_weights(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=words):  # before a script reads or downloads anything else
        models.find_for_inference({"init_from": path, "checkpoint_step": "latest"})
    if files == ["ckpt.pt"]:
        for find in (checkpoint.find, checkpoint.find_resumed):
            with pytest.raises(UserError, match="is a checkpoint of nanoGPT"):
                find(path, "out") if find is checkpoint.find_resumed else find("out")


def test_a_folder_of_another_kind_of_model(tmp_path):
    for kind in ("llama", "gpt_neox", 3):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 8}))
        with pytest.raises(UserError, match=f"its model_type is {kind!r}$"):
            GPT.from_pretrained(str(tmp_path))
        with pytest.raises(UserError, match="its model_type is"):
            models.find_for_inference({"init_from": str(tmp_path), "checkpoint_step": "latest"})


def test_home_in_paths_of_functions(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model(torch.float32)
    model.save_pretrained("~/exported")
    assert (tmp_path / "exported" / "config.json").is_file()
    assert torch.equal(GPT.from_pretrained("~/exported").lm_head.weight, model.lm_head.weight)
    save_random_model(tmp_path / "out", 3)
    assert models.load("~/out").config.n_layer > 0


@pytest.mark.parametrize("vocab_size, token", [(61, None), (50257, 50256), (50304, None)])
def test_end_of_text_of_an_exported_model(tmp_path, vocab_size, token):
    """A model by characters has none: its last character must not end generation."""
    from transformers import GPT2LMHeadModel

    random_model(torch.float32, vocab_size=vocab_size, n_embd=8, n_layer=1).save_pretrained(str(tmp_path))
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert theirs.config.eos_token_id == token and theirs.generation_config.eos_token_id == token
    if vocab_size == 61:
        with torch.no_grad():
            theirs.transformer.ln_f.bias.copy_(100 * theirs.transformer.wte.weight[60])  # always the last one
        text = theirs.generate(tokens(1, 4), max_new_tokens=8, do_sample=False)
        assert text.shape == (1, 12) and (text[0, 4:] == 60).all()
