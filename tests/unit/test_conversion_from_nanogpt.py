"""nanoGPT's ckpt.pt and meta.pkl, converted: logits, further updates, moments, and pickles that hold code.
With NANOGPT, a folder of nanoGPT (by default the one beside this repository), also its own train.py; that
test takes ten seconds, the others less. CPU.

    python -m pytest tests/unit/test_conversion_from_nanogpt.py
"""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nanogpt
import numpy as np
import pytest
import torch
from helpers import ROOT, tokens

import models
from convert import convert_vocabulary
from models.conversion import Options, convert
from nanosync import checkpoint, nanogpt_files
from nanosync.errors import UserError
from nanosync.foreign_weights import UNKNOWN_DATA
from nanosync.nanogpt_files import read_vocabulary
from nanosync.optim import build_adamw
from nanosync.optimizer_state import load_state_by_name

NANOGPT = Path(os.environ.get("NANOGPT", ROOT.parent / "nanoGPT"))


def resumed(out_dir):
    """Model and optimizer as a resumed run has them."""
    found = checkpoint.find(str(out_dir))
    model = models.load_model(found)
    optimizer = build_adamw(model, 1e-3, (0.9, 0.95), 0.1, None)
    load_state_by_name(optimizer, model, found.tensors("optim"))
    return found, model, optimizer


def largest_relative_difference(ours, theirs) -> float:
    """Of a parameter. The bias of keys is left out: softmax does not see it, so its gradient is rounding,
    which AdamW scales to steps of full size."""
    worst = 0.0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        if name.endswith("c_attn.bias"):
            p, q = (torch.cat((b.chunk(3)[0], b.chunk(3)[2])) for b in (p, q))
        worst = max(worst, ((p - q).norm() / q.norm()).item())
    return worst


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_updates_continue_after_conversion(tmp_path, bias, prefix):
    model, optimizer = nanogpt.trained(bias=bias)
    torch.save(nanogpt.content_of(model, optimizer, 8, prefix), tmp_path / "ckpt.pt")
    to, notes = convert(str(tmp_path), str(tmp_path / "out"), None, Options())
    assert to == "checkpoint" and any("not known: the position in the data" in note for note in notes)
    found, ours, our_optimizer = resumed(tmp_path / "out")
    assert (found.step, found.state["val_loss"], found.state["config"]["learning_rate"]) == (8, 1.5, 1e-3)
    idx = tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(ours(idx, all_logits=True)[0], model(idx, all_logits=True)[0])
    assert nanogpt.updates(ours, our_optimizer, 10, 8) == pytest.approx(
        nanogpt.updates(model, optimizer, 10, 8), rel=1e-5)
    assert largest_relative_difference(ours, model) < 1e-5


def test_an_optimizer_without_state_and_moments_new(tmp_path):
    path = nanogpt.write(tmp_path / "a" / "ckpt.pt", optimizer=None)
    convert(str(path), str(tmp_path / "none"), None, Options())
    path = nanogpt.write(tmp_path / "b" / "ckpt.pt")
    convert(str(path), str(tmp_path / "new"), None, Options(moments="new"))
    for name in ("none", "new"):
        state = resumed(tmp_path / name)[0].tensors("optim")
        assert all((t == 0).all() for t in state.values()) and any(t.shape == () for t in state.values())


def test_settings_are_a_config_file(tmp_path):
    code = "x'\n__import__('os').mkdir('executed')\ny='"
    path = nanogpt.write(tmp_path / "ckpt.pt", config=nanogpt.SETTINGS | {"dataset": code, "import os": 1})
    notes = convert(str(path), str(tmp_path / "out"), None, Options())[1]
    assert notes[-1].endswith("--resume=latest")
    names = {}
    exec((tmp_path / "out" / "settings.py").read_text(), names)
    assert names["learning_rate"] == 1e-3 and names["dataset"] == code
    assert not {"out_dir", "init_from", "device"} & set(names) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("device, dtype", [("cpu", None), ("mps", None), ("cuda:1", "float16"),
                                           (None, "float16")])
def test_settings_that_nanogpt_ignores_or_both_have(device, dtype):
    config = {"dtype": "float16", "compile": False, "wandb_project": "mine"}
    names = {}
    exec(nanogpt_files.settings_text(config | ({"device": device} if device else {})), names)
    assert names.get("dtype") == dtype and not names["compile"] and names["wandb_project"] == "mine"


@pytest.mark.parametrize("vocab_size, used, tokenizer", [(61, 61, "unknown"), (50304, 50257, "gpt2")])
def test_tokenizer_of_an_unknown_data_set(tmp_path, vocab_size, used, tokenizer):
    model, optimizer = nanogpt.trained(1, vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2)
    torch.save(nanogpt.content_of(model, optimizer, 1), tmp_path / "ckpt.pt")
    convert(str(tmp_path), str(tmp_path / "out"), None, Options())
    state = checkpoint.find(str(tmp_path / "out")).state
    assert state["data"] == UNKNOWN_DATA
    assert state["model"]["config"]["used_vocab_size"] == used
    assert "gpt2" if state["meta"] is None else state["meta"]["tokenizer"] == tokenizer


# Pickles that hold code: each would make a folder if it ran


class Calls:
    """A pickle of it is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(folder: str) -> dict[str, bytes]:
    """Pickles of five kinds that run code in pickle.load."""
    call = Calls(os.mkdir, folder)
    nested = {"vocab_size": 1, "itos": {0: Calls(exec, f"import os; os.mkdir({folder!r})")}}
    instance = f"(S'{folder}'\nios\nmkdir\n.".encode()  # opcode INST of protocol 0
    stacked = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + pickle.dumps(folder, 4)[2:-1] + b"\x85R."
    key = {Calls(os.mkdir, folder): 1}
    text = b"X" + len(folder).to_bytes(4, "little") + folder.encode()
    built = b"\x80\x02cos\nmkdir\n(" + text + b"tR}b."
    return {"call": pickle.dumps(call), "nested": pickle.dumps(nested), "instance": instance,
            "stacked": stacked, "key": pickle.dumps(key), "built": built}


KINDS = list(payloads("."))


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_that_run_code_are_refused(tmp_path, kind):
    executed = tmp_path / "executed"
    content = payloads(str(executed))[kind]
    try:
        pickle.loads(content)
    except Exception:
        pass
    assert executed.is_dir(), "the test's own pickle is harmless"
    executed.rmdir()
    (tmp_path / "meta.pkl").write_bytes(content)
    (tmp_path / "legacy.pt").write_bytes(content)
    source = nanogpt.write(tmp_path / "whole.pt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as new:
        for item in old.infolist():
            new.writestr(item, content if item.filename.endswith("data.pkl") else old.read(item))
    with pytest.raises(UserError, match="refused, and nothing of it was executed") as error:
        convert_vocabulary(str(tmp_path / "meta.pkl"), str(tmp_path / "data"))
    assert "\n" not in str(error.value)
    for name in ("legacy.pt", "ckpt.pt"):
        with pytest.raises(UserError, match=r"nothing of it was executed|is not a readable file") as error:
            convert(str(tmp_path / name), str(tmp_path / "out"), None, Options())
        assert "\n" not in str(error.value)
    assert not any((tmp_path / name).exists() for name in ("executed", "out", "data"))


def test_a_checkpoint_that_holds_code_beside_its_weights(tmp_path):
    path = nanogpt.write(tmp_path / "ckpt.pt", extra=Calls(os.mkdir, str(tmp_path / "executed")))
    with pytest.raises(UserError, match="is refused, and nothing of it was executed: it is not a file"):
        convert(str(path), str(tmp_path / "out"), None, Options())
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


# Wrong inputs


def changed(name, change):
    """An entry of a ckpt.pt after a change in place."""
    entry = nanogpt.content()[name]
    change(entry)
    return {name: entry}


ROWS = "_orig_mod.transformer.wte.weight"


@pytest.mark.parametrize("entries, words", [
    (lambda: {"iter_num": -1}, "its iter_num is -1"), (lambda: {"iter_num": "8"}, "its iter_num is '8'"),
    (lambda: {"model": [1]}, "its model is a list, not a state_dict"),
    (lambda: {"model_args": 3}, "its model_args is 3, not a dict"),
    (lambda: {"best_val_loss": float("nan")}, "its best_val_loss is nan"),
    (lambda: {"config": {"a": "\x1b[2J"}}, "of its config, 'a' has control characters"),
    (lambda: changed("model_args", lambda a: a.update(n_layer="4")), "n_layer is '4' and must be of type"),
    (lambda: changed("model_args", lambda a: a.update(n_head=5)), "not divisible by n_head=5"),
    (lambda: changed("model_args", lambda a: a.update(n_layer=10**6)), "n_layer=1000000 is above"),
    (lambda: changed("model_args", lambda a: a.update(n_layer=9)), "h.2.attn.c_attn.bias' is missing"),
    (lambda: changed("model_args", lambda a: a.update(vocab_size=60)), r"shape \(61, .* by its model_args"),
    (lambda: changed("model", lambda m: m.pop(ROWS)), "is missing"),
    (lambda: changed("model", lambda m: m.update({"a": torch.ones(1)})), "'a' is too many"),
    (lambda: changed("model", lambda m: m.update({f"module.{ROWS}": m[ROWS]})), "twice, with and without"),
    (lambda: changed("model", lambda m: m.update({ROWS: m[ROWS] + 1})), "another head than its embedding"),
    (lambda: changed("model", lambda m: m[ROWS][0].fill_(float("nan"))), "another head|not finite"),
    (lambda: changed("model", lambda m: m.update({"b": torch.ones(2).to_sparse()})), "not a tensor of fl"),
    (lambda: changed("model", lambda m: m.update({"b": torch.ones(2, device="meta")})), "not a tensor of fl"),
    (lambda: changed("optimizer", lambda o: o["state"].pop(3)), "groups of its optimizer.*--moments=new"),
    (lambda: changed("optimizer", lambda o: o["param_groups"].pop()), "groups of its opt.*--moments=new"),
    (lambda: changed("optimizer", lambda o: o["state"][0].update(exp_avg=torch.ones(3))), r"exp_avg .*\(3,"),
    (lambda: changed("optimizer", lambda o: o["state"][0].pop("step")), "is not AdamW's: .*--moments=new"),
    (lambda: {"optimizer": {"state": {0: 1}, "param_groups": 3}}, "has no groups of parameters"),
])
def test_checkpoints_that_cannot_be_converted(tmp_path, entries, words):
    path = nanogpt.write(tmp_path / "ckpt.pt", **entries())
    with pytest.raises(UserError, match=words) as error:
        convert(str(path), str(tmp_path / "out"), None, Options())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("content, words", [
    (b"", "is not a"), (b"PK\3\4 and no more", "is not a readable file"), (b"hello", "not a"),
    (pickle.dumps({"weights": 1}, 2), "is not a readable file"), ({"weights": 1}, "has no entries model")])
def test_files_that_are_no_checkpoint(tmp_path, content, words):
    if type(content) is dict:
        torch.save(content, tmp_path / "ckpt.pt")
    else:
        (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        convert(str(tmp_path), str(tmp_path / "out"), None, Options())


def test_folders_that_are_not_free(tmp_path):
    path = nanogpt.write(tmp_path / "ckpt.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for out, words in (("full", "is not empty"), ("ckpt.pt", "is not a folder")):
        with pytest.raises(UserError, match=words):
            convert(str(path), str(tmp_path / out), None, Options())
    for path, words in (("gone", "does not exist: give one of"), ("full", "is none of")):
        with pytest.raises(UserError, match=words):
            convert(str(tmp_path / path), str(tmp_path / "out"), None, Options())


def test_vocabulary(tmp_path):
    path = nanogpt.write_vocabulary(tmp_path / "meta.pkl", "\n abcé")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))
        assert read_vocabulary(str(path)) == {"tokenizer": "char", "vocab_size": 6, "chars": "\n abcé"}
    convert_vocabulary(str(path), str(tmp_path))
    assert json.loads((tmp_path / "meta.json").read_text())["chars"] == "\n abcé"
    with pytest.raises(UserError, match="exists: remove it first"):
        convert_vocabulary(str(path), str(tmp_path))


@pytest.mark.parametrize("entries, words", [
    ({"itos": {0: "a", 2: "b", 1: "c"}}, "contradict each other"), ({"vocab_size": 3}, "contradict each"),
    ({"itos": {0: "a", 2: "b"}}, "ids of its 2 characters are not 0 to 1"), ({"itos": {}}, "has no chara"),
    ({"itos": {0: "ab", 1: "c"}}, "'ab' is not one character"), ({"itos": {0: 1, 1: "c"}}, "1 is not one"),
    ({"itos": {0: "a", 1: "a"}}, "twice"), ({"itos": {0: "\ud800", 1: "a"}}, "is not one character"),
    ({"itos": [1]}, "holds more than dict, str and int"), ({"a": 1.5}, "holds more than dict, str and int"),
    ({"a": b"x"}, "holds more than"), ({"a": {1, 2}}, "holds more than"), ({"a": None}, "holds more than"),
])
def test_vocabularies_that_cannot_be_converted(tmp_path, entries, words):
    path = nanogpt.write_vocabulary(tmp_path / "meta.pkl", "xy", **entries)
    with pytest.raises(UserError, match=words) as error:
        read_vocabulary(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04}", b"\x80\x04h\x05.", b"\x80\x09."])
def test_vocabularies_that_are_no_pickles(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="is not a"):
        read_vocabulary(str(tmp_path / "meta.pkl"))


@pytest.mark.skipif(not (NANOGPT / "train.py").is_file(), reason=f"nanoGPT is not in {NANOGPT}")
def test_nanogpt_itself(tmp_path):
    """nanoGPT's own files train 50 updates; logits and the next ten updates are the same here."""
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(NANOGPT / name, tmp_path)
    letters = np.random.RandomState(7).randint(0, 26, 4000).astype("<u2")
    nanogpt.write_vocabulary(tmp_path / "data" / "letters" / "meta.pkl", "abcdefghijklmnopqrstuvwxyz")
    for split, part in (("train", letters[:3000]), ("val", letters[3000:])):
        part.tofile(tmp_path / "data" / "letters" / f"{split}.bin")
    settings = nanogpt.SETTINGS | dict(n_layer=3, n_head=2, n_embd=32, block_size=16, max_iters=50,
                                       compile=False, dtype="float32", beta2=0.95, weight_decay=0.1)
    subprocess.run([sys.executable, "train.py", *(f"--{k}={v}" for k, v in settings.items())], cwd=tmp_path,
                   check=True, capture_output=True)
    data = tmp_path / "data" / "letters"
    convert_vocabulary(str(data / "meta.pkl"), str(data))
    convert(str(tmp_path / "out"), str(tmp_path / "mine"), None, Options(dataset=str(data)))
    found, ours, our_optimizer = resumed(tmp_path / "mine")
    assert found.step == 50 and found.state["meta"]["chars"].startswith("abc")
    assert found.state["data"]["train_tokens"] == 3000

    spec = importlib.util.spec_from_file_location("model_of_nanogpt", tmp_path / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    model = theirs.GPT(theirs.GPTConfig(**content["model_args"]))
    model.load_state_dict(content["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(content["optimizer"])
    for group in (*optimizer.param_groups, *our_optimizer.param_groups):
        group["lr"] = 1e-3
    idx = tokens(2, 16, vocab_size=26)
    with torch.no_grad():
        theirs_logits, ours_logits = model(idx, idx)[0], ours(idx, all_logits=True)[0]
    assert (theirs_logits - ours_logits).abs().max() < 1e-5
    assert nanogpt.updates(ours, our_optimizer, 10, 50, 26) == pytest.approx(
        nanogpt.updates(model, optimizer, 10, 50, 26), rel=1e-5)
    assert largest_relative_difference(ours, model) < 1e-5
