"""Checkpoints: what is written, what is found, what is refused. CPU; seconds.

    python -m pytest tests/unit/test_checkpoint.py
"""

import errno
import json
import os
import random

import numpy as np
import pytest
import torch
from helpers import damage_flip, random_model
from helpers import save_random_model as save

from configurator import Config
from model import GPTConfig
from models import registry, weights
from nanosync import checkpoint, checkpoint_writer, model_kind, random_states, resuming, run_dir
from nanosync.dataloader import DataSet
from nanosync.errors import UserError
from nanosync.files import json_text

CPU = torch.device("cpu")


def test_round_trip(tmp_path):
    model = random_model(torch.float32)
    path = save(tmp_path, 20, model=model, sample=80)
    assert sorted(os.listdir(path)) == sorted([*checkpoint.FILES, "MANIFEST.json"])
    assert path.endswith("ckpt/step-00000020") and (tmp_path / "latest").read_text() == "step-00000020\n"
    found = checkpoint.find(str(tmp_path))
    assert found.step == 20 and found.state["sample"] == 80
    assert torch.equal(found.tensors("optim")["a.exp_avg"], torch.arange(3.0))
    loaded = weights.load_model(found, dropout=0.25)
    assert loaded.config.dropout == 0.25
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters()):
        assert name == other and torch.equal(p, q)


def test_random_states_continue(tmp_path):
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    random.gauss(0, 1), np.random.randn()  # leaves half of a pair of normal numbers behind
    save(tmp_path, 1)
    expected = torch.rand(3), np.random.randn(), random.gauss(0, 1), random.random()
    states = {name[2:]: t for name, t in checkpoint.find(str(tmp_path)).tensors("rng").items()}
    random_states.set_random_states(states, CPU)
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


def test_the_best_is_known_before_pruning(tmp_path, monkeypatch):
    """Cut off in the middle of saving or right after, with room for one checkpoint: the best stays."""
    save(tmp_path, 1, keep=1, best=True, val_loss=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "_prune", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(tmp_path, 2, keep=1, best=True, val_loss=1.5)
    assert checkpoint.find(str(tmp_path), "best").step == 2
    save(tmp_path, 3, keep=1, val_loss=1.7)
    assert checkpoint.steps_in(str(tmp_path)) == [2, 3] and checkpoint.best_step(str(tmp_path)) == 2


def test_a_best_that_is_behind_is_mended(tmp_path):
    for step, val_loss in ((1, 2.0), (2, 1.5), (3, 1.7), (4, float("nan"))):
        save(tmp_path, step, val_loss=val_loss)
    for known in (None, 1, 9):  # missing, behind, or of a step that is not there
        if known is None:
            assert not (tmp_path / "best.json").exists()
        else:
            checkpoint.write_best(str(tmp_path), known, 1.0)
        checkpoint.repair_best(str(tmp_path))
        assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "val_loss": 1.5}
    damage_flip(tmp_path / "ckpt" / "step-00000002" / "model.safetensors")
    os.remove(tmp_path / "best.json")
    checkpoint.repair_best(str(tmp_path))
    assert checkpoint.best_step(str(tmp_path)) == 3


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 5, sample=1)
    save(tmp_path, 5, sample=2)
    assert checkpoint.find(str(tmp_path)).state["sample"] == 2
    assert os.listdir(tmp_path / "ckpt") == ["step-00000005"]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


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


@pytest.mark.parametrize("change, words", [
    (dict(kind="llama"), "kind 'llama'"),
    (dict(config={"n_rope": 3}), "does not fit GPTConfig"),
    (dict(config={"n_embd": 31, "n_head": 2}), "n_embd=31"),
])
def test_impossible_models(change, words):
    description = model_kind.model_description("gpt", random_model(torch.float32)) | change
    with pytest.raises(UserError, match=words):
        registry.build_model(description)


def test_parameters_that_do_not_fit():
    model, wider = random_model(torch.float32), random_model(torch.float32, n_embd=64)
    with pytest.raises(UserError, match=r"wte\.weight is \(61, 64\) there and \(61, 32\) here"):
        weights.load_parameters(model, dict(wider.named_parameters()), "it")
    fewer = random_model(torch.float32, bias=False)
    with pytest.raises(UserError, match="in only one of them"):
        weights.load_parameters(model, dict(fewer.named_parameters()), "it")


def test_set_aside(tmp_path):
    assert run_dir.archive(str(tmp_path / "new")) is None
    save(tmp_path, 1)
    (tmp_path / "log.txt").write_text("x")
    folder = run_dir.archive(str(tmp_path))
    assert sorted(os.listdir(folder)) == ["ckpt", "latest", "log.txt"]
    assert not checkpoint.steps_in(str(tmp_path))
    assert checkpoint.find(folder).step == 1
    (tmp_path / "log.txt").write_text("of a run that saved nothing")
    folder = run_dir.archive(str(tmp_path))
    assert os.listdir(folder) == ["log.txt"] and not (tmp_path / "log.txt").exists()


def test_check_out_dir(tmp_path):
    (tmp_path / "file").touch()
    run_dir.check_out_dir(str(tmp_path / "new" / "newer"))
    save(tmp_path / "run", 1)
    run_dir.check_out_dir(str(tmp_path / "run"))
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]
    for name, other in (("ckpt", "a_file"), ("log.txt", "a_folder"), ("latest", "a_folder")):
        path = tmp_path / name.replace(".", "_") / name
        path.parent.mkdir()
        path.touch() if other == "a_file" else path.mkdir()
        with pytest.raises(UserError, match=r"must be a f[a-z]+ of the run: move it"):
            run_dir.check_out_dir(str(path.parent))
    for out_dir in ("", str(tmp_path / "file"), str(tmp_path / "file" / "x"), "/proc/nanosync",
                    str(tmp_path / "run" / "ckpt" / "step-00000001")):
        with pytest.raises(UserError, match=r"out_dir=.* name "):
            run_dir.check_out_dir(out_dir)


def test_weights_of_other_tokens_are_named(tmp_path):
    char = {"tokenizer": "char", "vocab_size": 3, "chars": "abc"}
    other = char | {"chars": "abd"}
    save(tmp_path / "run", 1, meta=char)
    save(tmp_path / "gpt2", 1)
    save(tmp_path / "unknown", 1, meta={"tokenizer": "unknown", "vocab_size": 3})
    for run, meta, words in (("run", char, None), ("run", other, "chars='abc', and data/x has 'abd'"),
                             ("run", None, "tokenizer='char', and data/x has 'gpt2'"), ("gpt2", None, None),
                             ("gpt2", char, "tokenizer='gpt2', and data/x"), ("unknown", char, None)):
        warnings, data = [], DataSet("data/x", meta, None, None)
        weights.load_weights(str(tmp_path / run), warn=warnings.append, data=data)
        assert [words in warning for warning in warnings] == [True] * (words is not None), (run, meta)


def test_load_weights_of_runs_checkpoints_and_hugging_face(tmp_path):
    model = random_model(torch.float32)
    save(tmp_path / "run", 1, model=random_model(torch.float32, n_embd=64))
    step = save(tmp_path / "run", 2, model=model)
    model.save_pretrained(str(tmp_path / "hf"))
    for name in (str(tmp_path / "run"), step, step + "/", str(tmp_path / "hf")):
        loaded = weights.load_weights(name, dropout=0.25)
        assert loaded.config.dropout == 0.25
        for (name_, p), q in zip(model.named_parameters(), loaded.parameters()):
            assert torch.equal(p, q), name_
    damage_flip(tmp_path / "run" / "ckpt" / "step-00000002" / "model.safetensors")
    warnings = []
    assert weights.load_weights(str(tmp_path / "run"), warn=warnings.append).config.n_embd == 64
    assert len(warnings) == 1
    with pytest.raises(UserError, match=r"model\.safetensors does not match its SHA-256"):
        weights.load_weights(step)
    with pytest.raises(UserError, match="it is not a folder"):
        weights.load_weights(str(tmp_path / "run" / "ckpt" / "step-00000009"))


def test_resume_of():
    """init_from of a config file is for the first start; on the command line it contradicts resume."""
    for resume, init_from, origin, expected in (
            ("", "run", "command line", ""), ("", "resume", "command line", "latest"),
            ("best", "resume", "command line", "best"), ("latest", "scratch", "", "latest"),
            ("latest", "gpt2-xl", "a.py", "latest"), ("latest", "gpt2-xl", "command line", None),
            ("5", "scratch", "command line", None)):
        config = Config(dict(resume=resume, init_from=init_from), dict(resume="", init_from=origin))
        if expected is None:
            with pytest.raises(UserError, match=r"starts a new run and resume=.* resumes one"):
                resuming.resume_of(config)
        else:
            assert resuming.resume_of(config) == expected


def test_take_architecture():
    described = dict(block_size=16, n_layer=2, n_head=2, n_embd=32, bias=True)
    config = Config(dict(block_size=16, n_layer=12, n_head=2, n_embd=768, bias=True, seed=1),
                    dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd", "bias", "seed"), ""))
    config.origin["block_size"] = "command line"
    resuming.take_values(config, described, "there", registry.ARCHITECTURE)
    assert config == described | {"seed": 1}
    assert config.origin.pop("seed") == "" and config.origin.pop("block_size") == "command line"
    assert set(config.origin.values()) == {"checkpoint"}
    for name, value, hint in (("n_layer", 3, "leave n_layer out"), ("bias", False, "leave bias out"),
                              ("block_size", 32, "leave block_size out"),
                              ("block_size", 8, "start a new run from its weights with --init_from=there")):
        given = Config(config | {name: value}, dict.fromkeys(config, "") | {name: "a.py"})
        with pytest.raises(UserError, match=rf"{name}={value} \(a\.py\), but there has {name}=") as error:
            resuming.take_values(given, described, "there", registry.ARCHITECTURE)
        assert hint in str(error.value)


def test_same_data(tmp_path):
    def check(**now):
        then = {"train_tokens": 1000, "val_tokens": 100, "sha256": {"train.bin": "aa"}}
        resuming.check_same_data(checkpoint.Checkpoint("there", 1, {"data": then}), "data/x", then | now,
                                 registry.KINDS)

    check()
    check(sha256=None)  # its meta.json is gone
    for now, words in ((dict(train_tokens=900), "1,000 train tokens then, 900 now"),
                       (dict(sha256={"train.bin": "bb"}), "its tokens have changed")):
        with pytest.raises(UserError, match=words) as error:
            check(**now)
        assert "data/x" in str(error.value) and "--init_from=there" in str(error.value)


def test_a_model_that_no_memory_holds():
    with pytest.raises(UserError, match=r"n_embd=100000000,.* GB of parameters"):
        registry.check_size(GPTConfig(n_embd=10**8, n_head=1))
    registry.check_size(GPTConfig())


@pytest.mark.parametrize("unreadable", ["listdir", "scandir"])
def test_folders_that_cannot_be_read(tmp_path, monkeypatch, unreadable):
    """By a mock, as the tests may run as root, who can read everything."""
    save(tmp_path, 5)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, unreadable, refuse)
    if unreadable == "scandir":  # of a checkpoint: the listing has its line
        assert "0.0 MB" in checkpoint.listing(str(tmp_path))
        return
    for find in (checkpoint.steps_in, checkpoint.listing, checkpoint.find, checkpoint.find_weights):
        with pytest.raises(UserError, match=r"cannot read .*ckpt: Permission denied"):
            find(str(tmp_path))
