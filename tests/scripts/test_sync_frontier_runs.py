"""frontier.py as a command: next that is killed in its middle and resumes, next at its limit, merge, draw,
and a model that trains. CPU.

    python -m pytest tests/scripts/test_sync_frontier_runs.py
"""

import json
import time
from pathlib import Path

import pytest
from helpers import PATIENCE, Forked, python, python_command
from runner_kills import wait_for_the_end

SCRIPT = "experiments/frontier.py"
FAKE = '''"""Writes the log of train_reduced_sync.py, with a loss that is made up."""
import json, os, time

from configurator import configure

dataset = "letters"
n_layer = 4
batch_size = 4
block_size = 16
max_iters = 10
behaviour = ""
seed = 1
out_dir = "out"
config = configure(globals())
if behaviour == "crash":
    raise SystemExit("crashed before its first step")
while seed == 2 and os.path.exists("hold"):
    time.sleep(0.05)
os.makedirs(out_dir)
log = open(os.path.join(out_dir, "run_1.jsonl"), "w", buffering=1)


def event(kind, **fields):
    log.write(json.dumps({"event": kind, "time": time.time(), **fields}) + "\\n")


event("start", config=config, environment={"device": "cpu", "torch": "2.13.0"}, resumed=False)
event("schedule", syncs=2 * n_layer)
loss = 2.0 + 0.01 * n_layer + 0.001 * seed
for step in range(max_iters + 1):
    if step:
        event("iter", step=step - 1, loss=loss, lr=0.1, norm=None, seconds=1e-3, tokens_per_second=1.0,
              mfu=None)
    if step % 5 == 0:
        event("eval", step=step, train_loss=loss, val_loss=loss, lr=0.1)
    if step == 5 and behaviour == "diverges":
        break
with open(os.path.join(out_dir, "status.json"), "w") as f:
    json.dump({"status": "non_finite" if behaviour == "diverges" else "finished", "step": step}, f)
'''


def write_protocol(folder: Path, data: Path, **changed) -> None:
    (folder / "fake_train.py").write_text(FAKE)
    plan = {"name": "toy", "script": str(folder / "fake_train.py"), "dataset": str(data), "data_sha256": None,
            "tokens": 640, "seeds": [1, 2], "settings": {}, "baseline": "dense_4",
            "arms": {"dense_4": {"n_layer": 4}, "dense_3": {"n_layer": 3}, "dense_2": {"n_layer": 2}},
            "seconds_per_run": 5}
    (folder / "protocol.json").write_text(json.dumps(plan | changed))


def frontier(folder: Path, *args: str, code: int = 0, **env: str) -> str:
    done = python(SCRIPT, *args, "--protocol=protocol.json", cwd=folder, **env)
    assert done.code == code, done.out + done.err
    assert code != 2 or done.err.count("\n") == 1, done.err
    return done.out + done.err


def rows(folder: Path, name: str = "runs.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_killed_call_resumes(tmp_path, tiny_data):
    """A run is in runs.jsonl or not; those that are there are not repeated; nothing outlives the call."""
    write_protocol(tmp_path, tiny_data)
    printed = tmp_path / "printed"
    for file in (printed, tmp_path / "hold", tmp_path / "runs.jsonl"):
        file.touch()
    first = Forked(1, SCRIPT, ["next", "--protocol=protocol.json", "--minutes=20"], str(printed), {})
    while (tmp_path / "runs.jsonl").read_text().count("\n") < 2 and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait(PATIENCE)
    (tmp_path / "hold").unlink()
    wait_for_the_end(tmp_path)
    before = (tmp_path / "runs.jsonl").read_text()
    assert 2 <= before.count("\n") < 6, printed.read_text()
    with open(tmp_path / "runs.jsonl", "a") as f:
        f.write('{"protocol": "abc')  # the end of a line that was being written
    said = frontier(tmp_path, "next", "--minutes=20")  # of two at a time, either could end first
    assert "0 missing" in said and (tmp_path / "runs.jsonl").read_text().startswith(before)
    found = rows(tmp_path)
    assert sorted((row["arm"], row["seed"]) for row in found) == sorted(
        (arm, seed) for seed in (1, 2) for arm in ("dense_4", "dense_3", "dense_2"))
    assert [row["seed"] for row in found] == [1, 1, 1, 2, 2, 2], "not seed by seed"
    assert all(row["curve"][-1] == [10, row["val_loss"], row["val_loss"]] and row["card"] == "cpu"
               for row in found)

    # runs of another machine; the picture; another protocol
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:2]))
    assert "0 runs added, 2 were there already, 0 are missing" in frontier(tmp_path, "merge", "other.jsonl")
    assert "6 of 6 runs" in frontier(tmp_path, "draw") and "-0.4" in (tmp_path / "frontier.md").read_text()
    write_protocol(tmp_path, tiny_data, tokens=1280)
    assert "a changed protocol is a new file" in frontier(tmp_path, "next", "--minutes=1", code=2)


def test_runs_that_do_not_fit_diverge_or_fail(tmp_path, tiny_data):
    """A run that does not fit is not started; one that diverges has a line, one that crashes has none."""
    write_protocol(tmp_path, tiny_data, seeds=[1], arms={
        "dense_4": {}, "dense_3": {"n_layer": 3, "behaviour": "diverges"},
        "dense_2": {"n_layer": 2, "behaviour": "crash"}})
    said = frontier(tmp_path, "next", "--minutes=20", "--estimate=5000")
    assert "dense_4 with seed 1 needs 5500 s" in said and "0 runs done, 3 missing" in said
    assert not (tmp_path / "runs.jsonl").exists()
    said = frontier(tmp_path, "next", "--minutes=20", code=2)
    assert "1 runs failed and have no line: dense_2 with seed 1; see stdout.log" in said
    assert [(row["arm"], row["status"], row["val_loss"]) for row in rows(tmp_path)] == [
        ("dense_4", "finished", 2.041), ("dense_3", "non_finite", None)]
    frozen = json.loads((tmp_path / "protocol.json").read_text()) | {"data_sha256": {
        "train.bin": "0" * 64, "val.bin": "0" * 64}}
    (tmp_path / "protocol_2.json").write_text(json.dumps(frozen))
    done = python(SCRIPT, "next", "--dry_run", "--protocol=protocol_2.json", cwd=tmp_path)
    assert done.code == 2 and "train.bin is not the file of protocol_2.json" in done.err


def test_a_tiny_model_from_next_to_the_picture(tmp_path, tiny_data):
    """train_reduced_sync.py itself: no checkpoint is written, the syncs are those that the model counts."""
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "device": "cpu",
                "gradient_accumulation_steps": 1, "compile": False, "eval_iters": 2, "eval_interval": 3,
                "warmup_iters": 2}
    write_protocol(tmp_path, tiny_data, script="train_reduced_sync.py", settings=settings, tokens=384,
                   seeds=[7], arms={"dense_4": {"sync_strategy": "standard"},
                                    "drop_1_r2": {"sync_strategy": "custom", "sync_points": [3]}})
    frontier(tmp_path, "next", "--minutes=20", "--parallel=2", TEST_PYTHON=python_command())
    found = {row["arm"]: row for row in rows(tmp_path)}
    assert found["dense_4"]["syncs"] == 4 and found["drop_1_r2"]["syncs"] == 1
    assert [step for step, *_ in found["drop_1_r2"]["curve"]] == [0, 3, 6]
    assert [row["spikes"] for row in found.values()] == [0.0, 0.0], "four updates with similar gradients"
    for seconds in (row["seconds"] for row in found.values()):
        assert seconds["training"] > 0 and seconds["start"] > 0
        assert sum(seconds.values()) == pytest.approx(2 * seconds["wall"], abs=0.01)  # its parts, and itself
    assert not list(tmp_path.glob("experiment_logs/toy/*/runs/*/out/ckpt"))
    frontier(tmp_path, "draw")
    assert (tmp_path / "frontier.png").stat().st_size > 1e4
