"""Checkpoints: what is written, what is found, what is refused. CPU; seconds.

    python -m pytest tests/test_checkpoint.py
"""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from test_model import random_model

import checkpoint
from configurator import UserError
from data.files import json_text

CPU = torch.device("cpu")


def save(out_dir, step, keep=10, model=None, **state):
    model = random_model(torch.float32) if model is None else model
    description = checkpoint.model_description("gpt", model)
    rng = {f"0.{name}": t for name, t in checkpoint.random_states(CPU).items()}
    optim = {"a.exp_avg": torch.arange(3.0)}
    return checkpoint.save(str(out_dir), step, dict(model.named_parameters()), optim, rng,
                           {"model": description, **state}, keep)


def test_round_trip(tmp_path):
    model = random_model(torch.float32)
    path = save(tmp_path, 20, model=model, sample=80)
    assert sorted(os.listdir(path)) == sorted([*checkpoint.FILES, "MANIFEST.json"])
    assert path.endswith("ckpt/step-00000020") and (tmp_path / "latest").read_text() == "step-00000020\n"
    found = checkpoint.find(str(tmp_path))
    assert found.step == 20 and found.state["sample"] == 80
    assert torch.equal(found.tensors("optim")["a.exp_avg"], torch.arange(3.0))
    loaded = checkpoint.load_model(found, dropout=0.25)
    assert loaded.config.dropout == 0.25
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters()):
        assert name == other and torch.equal(p, q)


def test_random_states_continue(tmp_path):
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    random.gauss(0, 1), np.random.randn()  # leaves half of a pair of normal numbers behind
    save(tmp_path, 1)
    expected = torch.rand(3), np.random.randn(), random.gauss(0, 1), random.random()
    states = {name[2:]: t for name, t in checkpoint.find(str(tmp_path)).tensors("rng").items()}
    checkpoint.set_random_states(states, CPU)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.randn(), random.gauss(0, 1), random.random()) == expected[1:]


def test_pruning_keeps_the_last_the_best_and_the_protected(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep=3)
        if step == 2:
            checkpoint.write_best(str(tmp_path), 2, 1.5)
    assert checkpoint.steps_in(str(tmp_path)) == [2, 6, 7, 8]
    assert checkpoint.find(str(tmp_path), "best").step == 2 and checkpoint.find(str(tmp_path), 7).step == 7
    assert not [name for name in os.listdir(tmp_path / "ckpt") if name.startswith(".tmp")]
    with pytest.raises(UserError, match="it has the steps 2, 6, 7, 8"):
        checkpoint.find(str(tmp_path), 3)


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5, sample=1)
    save(tmp_path, 5, sample=2)
    assert checkpoint.find(str(tmp_path)).state["sample"] == 2
    assert os.listdir(tmp_path / "ckpt") == ["step-00000005"]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def damage_delete(path):
    path.unlink()


def damage_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_delete, damage_link])
@pytest.mark.parametrize("name", [*checkpoint.FILES, "MANIFEST.json"])
def test_damage_is_seen_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(tmp_path / "ckpt" / "step-00000002" / name)
    if (name, damage) == ("MANIFEST.json", damage_link):
        return  # the same bytes: no damage
    warnings = []
    assert checkpoint.find(str(tmp_path), warn=warnings.append).step == 1
    assert len(warnings) == 1 and path in warnings[0] and "\n" not in warnings[0]
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint.find(str(tmp_path), 2)


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    os.rename(tmp_path / "ckpt" / "step-00000001", tmp_path / "ckpt" / ".tmp-step-00000001")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(str(tmp_path))


def test_manifest_that_names_files_elsewhere(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads(open(os.path.join(path, "MANIFEST.json")).read())
    manifest["../../secret"] = manifest.pop("state.json")
    (tmp_path / "ckpt" / "step-00000001" / "MANIFEST.json").write_text(json_text(manifest))
    assert "lists" in checkpoint.verify(path)


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """A pickle that passes for the tensors, with a manifest to match, is refused by safetensors' reader."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    file = os.path.join(path, "model.safetensors")
    with open(file, "wb") as f:
        pickle.dump(Malicious(), f)
    manifest = json.loads(open(os.path.join(path, "MANIFEST.json")).read())
    manifest["model.safetensors"] = {"size": os.path.getsize(file), "sha256": checkpoint.sha256_of(file)}
    (tmp_path / "ckpt" / "step-00000001" / "MANIFEST.json").write_text(json_text(manifest))
    with pytest.raises(Exception, match="header"):
        checkpoint.find(str(tmp_path)).tensors("model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change, words", [
    (dict(kind="llama"), "kind 'llama'"),
    (dict(config={"n_rope": 3}), "does not fit GPTConfig"),
    (dict(config={"n_embd": 31, "n_head": 2}), "n_embd=31"),
])
def test_impossible_models(change, words):
    description = checkpoint.model_description("gpt", random_model(torch.float32)) | change
    with pytest.raises(UserError, match=words):
        checkpoint.build_model(description)


def test_parameters_that_do_not_fit():
    model, wider = random_model(torch.float32), random_model(torch.float32, n_embd=64)
    with pytest.raises(UserError, match=r"wte\.weight is \(61, 64\) there and \(61, 32\) here"):
        checkpoint.load_parameters(model, dict(wider.named_parameters()), "it")
    fewer = random_model(torch.float32, bias=False)
    with pytest.raises(UserError, match="in only one of them"):
        checkpoint.load_parameters(model, dict(fewer.named_parameters()), "it")


def test_set_aside(tmp_path):
    assert checkpoint.set_aside(str(tmp_path / "new")) is None
    save(tmp_path, 1)
    (tmp_path / "log.txt").write_text("x")
    folder = checkpoint.set_aside(str(tmp_path))
    assert sorted(os.listdir(folder)) == ["ckpt", "latest", "log.txt"]
    assert not checkpoint.steps_in(str(tmp_path))
    assert checkpoint.find(folder).step == 1
