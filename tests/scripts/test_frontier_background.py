"""experiments/frontier_background.py with toy protocols and a fake training script: begin and wait, a kill
in the middle, another machine with the earlier runs, another with other data. CPU.

    python -m pytest tests/scripts/test_frontier_background.py
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PATIENCE, python
from test_sync_frontier_runs import FAKE, rows

from experiments import frontier_background

SCRIPT = "experiments/frontier_background.py"
SHALLOW_IS_WORSE = FAKE.replace("+ 0.01 * n_layer", "- 0.01 * n_layer").replace(
    'exists("hold")', 'exists(os.path.join(os.path.dirname(__file__), "hold"))')  # held beside the script


def write_folder(folder: Path, sources: Path) -> Path:
    """A pilot of four runs, a template of two arms, and the data's description."""
    folder.mkdir()
    (folder / "fake_train.py").write_text(SHALLOW_IS_WORSE)
    for package in "ab":
        (sources / package).mkdir(parents=True)
        for i in range(40):
            (sources / package / f"m{i}.py").write_text(f"x = {i}  # {package}\n" * 20)
    arms = {"dense_4": {"n_layer": 4}, "dense_2": {"n_layer": 2}}
    pilot = {"name": "toy-pilot", "script": str(folder / "fake_train.py"), "dataset": "python_source_gpt2",
             "data_sha256": None, "tokens": 640, "seeds": [1, 2], "settings": {},
             "baseline": "dense_4", "arms": arms, "seconds_per_run": 1}
    template = {"name": "toy", "seeds": [11, 12], "settings": {}, "baseline": "dense_4", "arms": arms,
                "shallow": "dense_2", "depth": 3, "spread": 0.0025}
    long = {"name": "toy-long", "tokens": 1280, "seeds": [21, 22], "settings": {}, "baseline": "dense_4",
            "arms": arms}
    data = {"roots": str(sources), "tokenizer": "char"}
    for name, values in (("protocol_regime", pilot), ("template", template), ("template_long", long),
                         ("data", data)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def background(tmp_path: Path, command: str, what: str, *args: str, code: int = 0) -> str:
    done = python(SCRIPT, command, what, *args, cwd=tmp_path)
    assert done.code == code, done.out + done.err
    assert code != 2 or done.err.count("\n") == 1, done.err
    return done.out + done.err


def begin(folder: Path, work: str, what: str = "pilot", *args: str, code: int = 0) -> str:
    return background(folder.parent, "begin", what, f"--folder={folder}", f"--work={folder.parent / work}",
                      "--minutes=20", "--commit=abc", "--per_gpu=2", *args, code=code)


def wait_for_end(tmp_path: Path, work: str, out: Path, code: int = 0) -> str:
    said, until = "", time.monotonic() + PATIENCE
    while "the sequence ended" not in said and time.monotonic() < until:
        said += background(tmp_path, "wait", "600", f"--work={tmp_path / work}", f"--out={out}", code=code)
    return said


def test_a_killed_sequence_goes_on_where_its_results_are(tmp_path):
    """From the pilot to the frozen protocol: no run is repeated, on the same machine or on another."""
    folder, out = write_folder(tmp_path / "frontier", tmp_path / "sources"), tmp_path / "out"
    wait = ["wait", "1", f"--work={tmp_path / 'one'}", f"--out={out}"]
    assert "nothing was begun" in background(tmp_path, *wait, code=2)
    assert "give the seconds" in background(tmp_path, "wait", "nan", *wait[2:], code=2)
    assert "--out is for wait: leave it out" in background(tmp_path, "begin", "pilot", "--out=x", code=2)
    assert "--per_gpu is for begin: leave it" in background(tmp_path, *wait, "--per_gpu=2", code=2)
    assert "--accept is for begin pilot" in background(tmp_path, "begin", "next", "--accept", code=2)
    described = (folder / "data.json").read_text()
    (folder / "data.json").write_text("{")
    assert "data.json, line 1: not JSON" in begin(folder, "broken", code=2)
    (folder / "data.json").write_text(described)
    assert "has no protocol.json: begin pilot freezes one" in begin(folder, "one", "next", code=2)
    (folder / "hold").touch()
    process = int(re.search(r"process (\d+) started", begin(folder, "one")).group(1))
    assert "is in use" in begin(folder, "one", code=2), "two sequences in one folder"
    until = time.monotonic() + PATIENCE
    while not (out / "runs_regime.jsonl").exists() or len(rows(out, "runs_regime.jsonl")) < 2:
        assert "wait again" in background(tmp_path, *wait) and time.monotonic() < until
    os.kill(process, signal.SIGKILL)
    while python(SCRIPT, *wait, cwd=tmp_path).code == 0:
        assert time.monotonic() < until
    assert "the sequence was killed: begin again" in background(tmp_path, *wait, code=1)
    begun = rows(out, "runs_regime.jsonl")
    assert [row["seed"] for row in begun] == [1, 1] and {row["commit"] for row in begun} == {"abc"}
    (folder / "hold").unlink()

    for name in ("runs_regime.jsonl", "data.json"):  # on another machine, which has only what came back
        shutil.copy(out / name, folder)
    begin(folder, "two")
    said = wait_for_end(tmp_path, "two", out)
    assert "written: protocol.json" in said and "protocol.json: 0 runs are missing of 4" in said
    pilot, runs = rows(out, "runs_regime.jsonl"), rows(out)
    assert pilot[:2] == begun and [run["seed"] for run in pilot] == [1, 1, 2, 2]
    assert sorted(run["seed"] for run in runs) == [11, 11, 12, 12]

    # the frozen protocol alone, on the same machine again, then on one with other packages
    (folder / "template.json").unlink()
    assert "has no template.json: name a folder" in begin(folder, "four", "pilot", code=2)
    for name in ("protocol_regime.json", "runs_regime.jsonl", "template_long.json"):
        (folder / name).unlink()
    for name in ("protocol.json", "runs.jsonl"):
        shutil.copy(out / name, folder)
    begin(folder, "two", "next")  # which replaces the links of the checkout in its copy
    assert (tmp_path / "two" / "code" / "records" / "sync-frontier" / "tier_2" / "data.json").is_symlink()
    assert wait_for_end(tmp_path, "two", out) and rows(out) == runs
    (tmp_path / "sources" / "b" / "m3.py").write_text("x = 4\n")
    said = begin(folder, "three", "next", code=2)
    assert "not compare: sources/b. Use" in said
    assert not list((tmp_path / "three").glob("code/data/**/*.bin"))


@pytest.mark.parametrize("accept", [False, True])
def test_a_pilot_is_accepted_without_a_longer_one(accept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sequence = frontier_background.Sequence(SimpleNamespace(
        until=time.time() + 1000, commit="abc", work=str(tmp_path), accept=accept, per_gpu=1))
    calls = []
    monkeypatch.setattr(sequence, "next", lambda name: True)
    monkeypatch.setattr(sequence, "frontier", lambda *words: calls.append(words) or accept)
    assert sequence.pilot() == accept
    assert ["--accept" in words for words in calls] == ([True] if accept else [False, False])


def test_a_longer_pilot_follows_one_that_shows_too_little(tmp_path):
    """Neither shows that depth matters, so nothing is frozen, unless that is asked for. A failing run is
    tried twice, and reported."""
    folder, out = write_folder(tmp_path / "frontier", tmp_path / "sources"), tmp_path / "out"
    (folder / "fake_train.py").write_text(FAKE)
    begin(folder, "work")
    said = wait_for_end(tmp_path, "work", out, code=1)
    assert said.count("no pilot is good enough") == 2 and "not for lack of time" in said
    assert len(rows(out, "runs_regime_long.jsonl")) == 4 and not (out / "protocol.json").exists()
    begin(folder, "work", "pilot", "--accept")
    said = wait_for_end(tmp_path, "work", out)
    assert "accepted although it is less than was asked for" in said and len(rows(out)) == 4

    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "sources")
    write_folder(folder, tmp_path / "sources")
    pilot = json.loads((folder / "protocol_regime.json").read_text())
    pilot["arms"]["dense_2"]["behaviour"] = "crash"
    (folder / "protocol_regime.json").write_text(json.dumps(pilot))
    begin(folder, "other")
    said = wait_for_end(tmp_path, "other", out, code=1)
    assert said.count("runs failed and have no line") == 2 and "2 runs are missing of 4" in said
    assert "crashed before its first step" in (out / "failed.txt").read_text()
