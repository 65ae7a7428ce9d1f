"""Checkpoints that were cut off while they were saved, or made to do harm. CPU, a process a case.

    python -m pytest tests/scripts/test_hostile_checkpoints.py
"""

import json
import multiprocessing
import os
import pickle
import shutil
import signal

import pytest
import torch
from helpers import PATIENCE, TINY, reseal
from helpers import save_random_model as save
from safetensors.torch import load_file, save_file

from nanosync import checkpoint, checkpoint_writer, run_dir
from nanosync.errors import UserError
from nanosync.files import json_text


def save_twice_and_die(folder, point):
    """Body of a process: two checkpoints of step 2, killed at a point of the second's."""
    save(folder, 2, sample=1)
    os.environ["NANOSYNC_KILL_AT"] = point
    save(folder, 2, sample=2, best=True, val_loss=1.0)


@pytest.mark.parametrize("point", checkpoint_writer.POINTS)
def test_killed_at_each_point_of_saving(tmp_path, point):
    """What is there verifies, is the old copy or the new, and the next save leaves nothing else behind."""
    save(tmp_path, 1)
    process = multiprocessing.get_context("fork").Process(target=save_twice_and_die, args=(tmp_path, point))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    held = run_dir.lock(str(tmp_path), make=True)  # as a run does that goes on
    found = checkpoint.find(str(tmp_path), warn=pytest.fail)
    assert found.step == 2
    published = checkpoint_writer.POINTS.index(point) >= checkpoint_writer.POINTS.index("published")
    assert found.state["sample"] == (2 if published else 1)
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["step-00000001", "step-00000002", "step-00000003"]
    os.close(held)


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
    with pytest.raises(UserError, match="header"):
        checkpoint.find(str(tmp_path)).tensors("model")
    assert not (tmp_path / "executed").exists()


def with_state(**changes):
    def change(folder):
        state = json.loads((folder / "state.json").read_text()) | changes
        (folder / "state.json").write_text(json.dumps(state))
    return change


def as_pickle(name):
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Malicious()))


def with_tensors(which, change):
    """Change the tensors of a file by a function of the dict."""
    def change_file(folder):
        path = str(folder / f"{which}.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return change_file


def as_pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return change


WEIGHT = "transformer.h.0.mlp.c_fc.weight"


def as_link(folder):
    folder.rename(folder.parent.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent.parent / "elsewhere", target_is_directory=True)


HOSTILE = {
    "a pickle as the weights": as_pickle("model.safetensors"),
    "a pickle as the moments": as_pickle("optim.safetensors"),
    "a pickle as the random states": as_pickle("rng.safetensors"),
    "a pickle as the state": as_pickle("state.json"),
    "a header of 2^62 bytes": lambda folder: (folder / "model.safetensors").write_bytes(
        (2**62).to_bytes(8, "little") + b"{}"),
    "a tensor beyond the file": lambda folder: (folder / "model.safetensors").write_bytes(
        (72).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'.ljust(72)),
    "a state a million deep": lambda folder: (folder / "state.json").write_text("[" * 10**6),
    "a step that is a path": with_state(step="../../../step"),
    "a model of another module": with_state(model={"kind": "os.system", "config": {}}),
    "a model too large": with_state(model={"kind": "gpt", "config": dict(n_embd=10**9, n_head=1)}),
    "a configuration that is text": with_state(model={"kind": "gpt", "config": "x"}),
    "a data cursor that is text": with_state(sample="../x"),
    "a folder that is a link": as_link,
    "a moment of one number": with_tensors("optim", lambda t: t.update(
        {f"{WEIGHT}.exp_avg": torch.zeros(())})),
    "moments of another dtype": with_tensors("optim", lambda t: t.update(
        {f"{WEIGHT}.exp_avg": torch.zeros(128, 32, dtype=torch.int64)})),
    "no moments": with_tensors("optim", lambda t: [t.pop(name) for name in list(t)[1:]]),
    "weights that are not finite": with_tensors("model", lambda t: t[WEIGHT].fill_(torch.nan)),
    "numbers at a position beyond their end": with_tensors("rng", lambda t: t["0.numpy_rest"].fill_(1e9)),
    "an empty meta": with_state(meta={}),
    "no processes": with_state(world_size=0),
    "layers without end": with_state(model={"kind": "gpt", "config": dict(
        block_size=16, vocab_size=26, n_layer=10**9, n_head=2, n_embd=32)}),
    "a pipe as the state": as_pipe("state.json"),
}


@pytest.fixture(scope="module")
def a_run():
    """An out_dir with the checkpoints of steps 5 and 10, made by the first test that needs it."""
    return {}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_checkpoints(run_script, tiny_data, tmp_path, tmp_path_factory, a_run, what):
    """With a manifest to match: refused in one line, or passed over for the one before; nothing is executed
    and nothing written beside out_dir."""
    args = ["train.py", *TINY, f"--dataset={tiny_data}", "--eval_interval=5", "--out_dir=out"]
    if not a_run:
        a_run["at"] = tmp_path_factory.mktemp("run")
        assert run_script(*args, "--max_iters=10", cwd=a_run["at"]).code == 0
    shutil.copytree(a_run["at"] / "out", tmp_path / "out")
    folder = tmp_path / "out" / "ckpt" / "step-00000010"
    HOSTILE[what](folder)
    reseal(folder)
    before = sorted(os.listdir(tmp_path))
    done = run_script(*args, "--max_iters=12", "--resume=latest")
    if done.code == 0:
        warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 and str(folder.name) in warnings[0]
        assert "iter 5:" in done.out
    else:
        assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    assert sorted(os.listdir(tmp_path)) == before and not (tmp_path / "executed").exists()
