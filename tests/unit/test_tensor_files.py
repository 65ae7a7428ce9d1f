"""Tensors of checkpoints and Hugging Face files: names, shapes, dtypes and values are checked. CPU; seconds.

    python -m pytest tests/unit/test_tensor_files.py
"""

import json
import os

import numpy as np
import pytest
import torch
from helpers import random_model
from helpers import save_random_model as save
from safetensors.torch import load_file, save_file

from models import weights
from nanosync import checkpoint, random_states, tensor_files
from nanosync.errors import UserError
from nanosync.files import json_text
from nanosync.optim import build_adamw
from nanosync.optimizer_state import load_state_by_name, state_by_name

WEIGHT = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def trained():
    """A model, its optimizer after an update, and the optimizer's state."""
    model = random_model(torch.float32)
    optimizer = build_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    return model, optimizer, state_by_name(optimizer, model)


STATES = [  # what is changed in an optimizer's state, words of the error
    (lambda s: s | {f"{WEIGHT}.exp_avg": torch.tensor(0.0)}, r"avg is \(\) and the parameter \(128, 32\)"),
    (lambda s: s | {f"{WEIGHT}.exp_avg_sq": torch.zeros(128, 31)}, r"exp_avg_sq is \(128, 31\)"),
    (lambda s: s | {f"{WEIGHT}.exp_avg": s[f"{WEIGHT}.exp_avg"].T}, r"exp_avg is \(32, 128\)"),
    (lambda s: s | {f"{WEIGHT}.step": torch.zeros(128, 32)}, "it must be a scalar"),
    (lambda s: s | {f"{WEIGHT}.step": torch.tensor(3)}, "step is int64 and must be floating-point"),
    (lambda s: s | {f"{WEIGHT}.exp_avg": torch.zeros(128, 32, dtype=torch.bool)}, "exp_avg is bool"),
    (lambda s: {k: v for k, v in s.items() if k != f"{WEIGHT}.exp_avg"}, "1 entries differ"),
    (lambda s: {k: v for k, v in s.items() if not k.endswith(".exp_avg")}, "entries differ"),
    (lambda s: {}, "entries differ"),
    (lambda s: s | {"transformer.x.exp_avg": torch.zeros(3)}, "such as 'transformer.x.exp_avg'"),
    (lambda s: s | {f"{WEIGHT}.max_exp_avg_sq": torch.zeros(128, 32)}, "with the --optimizer of the run"),
]


@pytest.mark.parametrize("change, words", STATES)
def test_optimizer_states_that_do_not_fit(trained, change, words):
    model, optimizer, state = trained
    with pytest.raises(UserError, match=words):
        load_state_by_name(optimizer, model, change(state))


def test_optimizer_state_of_another_float_is_converted(trained):
    """Kernels take moments in the parameter's dtype only."""
    model, _, state = trained
    optimizer = build_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    load_state_by_name(optimizer, model, {name: t.double() for name, t in state.items()})
    assert {t.dtype for entries in optimizer.state.values() for t in entries.values()} == {torch.float32}
    fresh = build_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    load_state_by_name(fresh, model, {}, begun=False)
    assert not fresh.state


@pytest.mark.parametrize("name, value, words", [
    ("a", torch.ones(3, dtype=torch.int64), "int64"),
    ("a", torch.ones(3, dtype=torch.bool), "bool"),
    ("a", torch.ones(3).to(torch.float8_e4m3fn), "float8"),
    ("a", torch.tensor([1.0, torch.nan]), "not finite"),
    ("a", torch.tensor([1.0, -torch.inf]), "not finite"),
    ("a", torch.tensor([1.0, torch.inf]).half(), "not finite"),
    ("a", torch.tensor([1.0, torch.nan]).bfloat16(), "not finite"),
    ("a.step", torch.tensor(-1.0), "negative"),
    ("a.last_step", torch.tensor([0.0, -1.0]), "negative"),
    ("a.exp_avg_sq", torch.tensor([1.0, -1e-9]), "negative"),
])
def test_values(name, value, words):
    tensor_files.check_values({"b": torch.zeros(2), "c": torch.zeros(0), "d.exp_avg": -torch.ones(1)}, "it")
    with pytest.raises(UserError, match=words):
        tensor_files.check_values({"b": torch.zeros(2), name: value}, "it")


def reseal(folder):
    """Write a manifest for the files as they are now."""
    paths = {name: os.path.join(folder, name) for name in checkpoint.FILES}
    manifest = {name: {"size": os.path.getsize(path), "sha256": checkpoint.sha256_of(path)}
                for name, path in paths.items()}
    with open(os.path.join(folder, "MANIFEST.json"), "w") as f:
        f.write(json_text(manifest))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.fill_(torch.nan), "not finite"),
    (lambda t: t.long(), "int64"),
    (lambda t: t > 0, "bool"),
    (lambda t: t[:-1], "does not fit the model"),
])
def test_weights_of_a_checkpoint(tmp_path, change, words):
    """Refused before they are used, for sampling as for training."""
    folder = save(tmp_path, 1)
    path = os.path.join(folder, "model.safetensors")
    tensors = load_file(path)
    tensors[WEIGHT] = change(tensors[WEIGHT].clone()).contiguous()
    save_file(tensors, path)
    reseal(folder)
    for load in (weights.load, weights.load_weights):
        with pytest.raises(UserError, match=words):
            load(str(tmp_path))


def test_hugging_face_weights(tmp_path):
    model = random_model(torch.float32)
    model.save_pretrained(str(tmp_path))
    path = str(tmp_path / "model.safetensors")
    good = load_file(path)
    short = WEIGHT.removeprefix("transformer.")
    for change, words in (({short: good[WEIGHT] + 1}, r"has both 'h\.0.* and 'transformer\.h\.0"),
                          ({WEIGHT: good[WEIGHT] * torch.nan}, "not finite"),
                          ({WEIGHT: good[WEIGHT].int()}, "int32")):
        save_file(good | change, path)
        with pytest.raises(UserError, match=words):
            weights.load_weights(str(tmp_path))
    save_file({short if name == WEIGHT else name: t.half() for name, t in good.items()}, path)
    loaded = weights.load_weights(str(tmp_path))
    assert torch.allclose(loaded.get_parameter(WEIGHT), model.get_parameter(WEIGHT), atol=1e-3)


@pytest.mark.parametrize("change", [
    dict(numpy_rest=torch.tensor([10.0**9, 0, 0], dtype=torch.float64)),
    dict(numpy_rest=torch.tensor([-1.0, 0, 0], dtype=torch.float64)),
    dict(numpy_rest=torch.tensor([torch.nan, 0, 0], dtype=torch.float64)),
    dict(numpy=torch.zeros(3, dtype=torch.int64)),
    dict(numpy=torch.full((624,), 2**40)),
    dict(numpy=torch.zeros(624)),
    dict(python=torch.full((625,), 625)),
    dict(python=torch.full((625,), -1)),
    dict(torch=torch.zeros(5056)),
    dict(torch=torch.zeros(3, dtype=torch.uint8)),
    dict(torch=torch.full((5056,), 255, dtype=torch.uint8)),
    dict(other=torch.zeros(3)),
])
def test_random_states_out_of_range(change):
    """numpy would take a position beyond its keys, and read there."""
    cpu = torch.device("cpu")
    before = random_states.random_states(cpu)
    with pytest.raises(UserError, match="no valid random states"):
        random_states.set_random_states(before | change, cpu)
    random_states.set_random_states(before, cpu)
    assert np.random.randint(10) < 10


STATE_CHANGES = [
    dict(seed=2**70), dict(seed=-2**70), dict(world_size=0), dict(step=True), dict(step=1.0), dict(sample=-1),
    dict(sample=2**53), dict(epoch=2**60), dict(evaluated=1), dict(val_loss="2.0"), dict(scaler=[]),
    dict(meta={}), dict(meta={"vocab_size": 61}), dict(meta={"vocab_size": 61.5, "tokenizer": "char"}),
    dict(meta={"vocab_size": 10**30, "tokenizer": "char"}), dict(meta=[]), dict(tp_processes=0),
    dict(schedule={"sublayers": 3}), dict(schedule={"syncs": 1, "sublayers": [{"sync": 2}]}),
    dict(model="gpt"),
    dict(model={"kind": ["gpt"], "config": {}}), dict(model={"kind": "gpt\x1b[2J", "config": {}}),
    *(dict(model={"kind": "gpt", "config": {name: value}}) for name, value in (
        ("n_layer", 1.5), ("n_layer", 10**9), ("n_layer", "2"), ("n_embd", 2**40), ("n_head", True),
        ("vocab_size", 10**30), ("vocab_size", None), ("dropout", "0"), ("bias", 1), ("dropout", [0.1]))),
    dict(config={"x": float("nan")}), dict(config={"x": float("inf")}), dict(config={"x": "\x00"}),
    dict(config={"x": "\ud800"}), dict(config={"x\x07": 1}),
]


@pytest.mark.parametrize("change", STATE_CHANGES, ids=str)
def test_state_of_wrong_types_and_ranges(tmp_path, change):
    folder = save(tmp_path, 1)
    path = os.path.join(folder, "state.json")
    with open(path) as f:
        state = json.load(f)
    if type(change.get("model")) is dict and change["model"]["config"]:
        change["model"]["config"] = state["model"]["config"] | change["model"]["config"]
    with open(path, "w") as f:
        json.dump(state | change, f)
    reseal(folder)
    with pytest.raises(UserError, match=r"none of the 1 checkpoints|n_layer") as error:
        weights.load(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("text", ['{"step": 1, "step": 1', "[" * 10**5, '{"a": 1e999}', "{}", "null", "3",
                                  "\ufeff{}"])
def test_state_that_is_no_state(tmp_path, text):
    folder = save(tmp_path, 1)
    with open(os.path.join(folder, "state.json"), "w") as f:
        f.write(text)
    reseal(folder)
    with pytest.raises(UserError, match=r"state\.json is malformed|has format None"):
        weights.load(str(tmp_path))


def test_names_that_are_no_step(tmp_path):
    save(tmp_path, 7)
    for name in ("step-000000099", "step-0000009", "step-00000\N{ARABIC-INDIC DIGIT NINE}09",
                 "step-" + "9" * 200, "step-00000009.bak", "step-1e000000"):
        (tmp_path / "ckpt" / name).mkdir()
    (tmp_path / "ckpt" / "step-123456789").mkdir()
    assert checkpoint.steps_in(str(tmp_path)) == [7, 123456789]
    (tmp_path / "ckpt" / "step-123456789").rmdir()
    assert checkpoint.find(str(tmp_path), warn=pytest.fail).step == 7
    with pytest.raises(UserError, match="has no checkpoint"):
        checkpoint.find(str(tmp_path), "9" * 5000)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_a_written_file_has_the_mode_of_any_new_file(tmp_path, umask, mode):
    path, before = str(tmp_path / "model.safetensors"), os.umask(umask)
    try:
        tensor_files.write_tensors({"x": torch.ones(2)}, path, {"format": "pt"})
    finally:
        os.umask(before)
    assert os.stat(path).st_mode & 0o777 == mode
    assert torch.equal(tensor_files.read_tensors(path)["x"], torch.ones(2))
