"""Restarts by torchrun, and --resume=auto: which checkpoint a run resumes. No process; milliseconds.

    python -m pytest tests/unit/test_restarts.py
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import damage_flip, save_random_model, settings_error

from configurator import Config
from nanosync import resuming, run_dir
from nanosync.distributed import Job, Processes, fresh_store
from nanosync.errors import UserError

ONE = Processes(0, 1, 0, torch.device("cpu"), None)


def config_of(out_dir, **values):
    origin = dict.fromkeys(values, "command line")
    values = {"out_dir": str(out_dir), "resume": "", "init_from": "scratch", **values}
    return Config(values, dict.fromkeys(values, "") | origin)


def find(out_dir, **values):
    """Return step of the checkpoint (None without), whether it is a restart, and the printed lines."""
    lines = []
    found, restarted = resuming.find_checkpoint(config_of(out_dir, **values), ONE, lines.append, None)
    return None if found is None else found.step, restarted, lines


def write_job(out_dir, name, launcher):
    out_dir.mkdir(exist_ok=True)
    (out_dir / "status.json").write_text(json.dumps({"status": "running", "job": [name, launcher]}))


def test_auto_resumes_the_newest_valid_checkpoint_or_starts(tmp_path):
    out = tmp_path / "out"
    assert find(out, resume="auto")[:2] == (None, False)
    with pytest.raises(UserError, match="no checkpoint"):
        find(out, resume="latest")
    out.mkdir()
    (out / "ckpt.pt").touch()
    assert "ckpt.pt is a checkpoint of nanoGPT" in find(out, resume="auto")[2][0]
    for step in (5, 10):
        save_random_model(out, step)
    assert find(out, resume="auto")[:2] == find(out, resume="latest")[:2] == (10, False)
    assert find(out, resume="auto", init_from="gpt2")[0] == 10
    damage_flip(out / "ckpt" / "step-00000010" / "model.safetensors")
    step, _, lines = find(out, resume="auto")
    assert step == 5 and "step-00000010" in lines[0]
    damage_flip(out / "ckpt" / "step-00000005" / "model.safetensors")
    step, _, lines = find(out, resume="auto")
    assert step is None and "this is the start of the run" in lines[-1]
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        find(out, resume="latest")


def test_auto_does_not_contradict_init_from():
    assert resuming.resume_of(config_of("out", resume="auto", init_from="gpt2")) == "auto"
    assert resuming.resume_of(config_of("out", resume="auto", init_from="resume")) == "latest"
    for script in ("train.py", "train_reduced_sync.py"):
        assert settings_error(script, "--resume=auto", "--init_from=gpt2") is None
        assert "contradict" not in settings_error(script, "--resume=latest", "--init_from=gpt2")
    assert settings_error("train_reduced_sync.py", "--resume=auto", "--layers_per_group=2") == \
        settings_error("train_reduced_sync.py", "--layers_per_group=2")


@pytest.mark.parametrize("run_id", ["none", "23f1"])
@pytest.mark.parametrize("values", [{}, {"resume": "5"}, {"init_from": "gpt2"}, {"resume": "latest"}])
def test_restart_resumes_the_newest_checkpoint_whatever_the_settings_say(tmp_path, monkeypatch,
                                                                         run_id, values):
    out = tmp_path / "out"
    for step in (5, 10):
        save_random_model(out, step)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    job = Job.of_process()
    assert not find(out, **values)[1]  # the first start: status.json is of no job
    write_job(out, job.name, job.launcher)
    assert find(out, **values)[:2] == (10, True)  # also if another machine counts the failure
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find(out, **values)[:2] == (10, True)
    assert not find(out, **values, eval_only=True)[1]
    write_job(out, job.name, "another host 1 2")  # global rank 0 moved to another machine
    assert find(out, **values)[1] == (run_id != "none")
    write_job(out, "of an earlier run", job.launcher)
    assert not find(out, **values)[1]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    write_job(out, job.name, job.launcher)
    assert not find(out, **values)[1]  # without torchrun


def test_restart_before_the_first_checkpoint_follows_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    save_random_model(tmp_path / "other", 7)
    write_job(tmp_path / "out", *Job.of_process().fields()["job"])
    assert find(tmp_path / "out")[:2] == (None, True)
    assert find(tmp_path / "out", resume=str(tmp_path / "other"))[:2] == (7, True)
    with pytest.raises(UserError, match="no checkpoint"):
        find(tmp_path / "out", resume="latest")


@pytest.mark.parametrize("text", ["", "[", "null", "[]", '{"job": 1}', '{"job": ["a"]}', '{"status": "x"}'])
def test_status_without_a_job(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert run_dir.job_in(str(tmp_path)) is None
    os.unlink(tmp_path / "status.json")
    assert run_dir.job_in(str(tmp_path)) is None


def test_restart_moves_nothing_of_its_own_run(tmp_path):
    for name in ("log.txt", "run_20260101-000000.jsonl", "status.json"):
        (tmp_path / name).write_text("x")
    run_dir.make_room(str(tmp_path), None, print, restarted=True)
    assert len(os.listdir(tmp_path)) == 3
    run_dir.make_room(str(tmp_path), None, print)
    assert [name[:8] for name in os.listdir(tmp_path)] == ["earlier-"]


@pytest.mark.parametrize("first", [0, 1])
def test_processes_meet_in_a_store_that_has_traces_of_earlier_starts(first):
    """Three starts; in the first two of them a process died on the way. Whichever process is first."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=600))
    for died in ("greeting", "address", None):
        if died == "greeting":
            store.set("greeting/1", "of a process that died")
            store.set("greeting/2", "another")
            continue
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(fresh_store, store, rank, 3, 600.0) for rank in (first, 2, 1 - first)]
        stores = [start.result() for start in starts]
        assert not any(own.check(["address"]) for own in stores)
        stores[0].set("address", "x")
        assert all(own.check(["address"]) for own in stores)


def test_process_that_does_not_start_is_named():
    with pytest.raises(UserError, match="rank 1 of 2 has not started after"):
        fresh_store(dist.HashStore(), 0, 2, 0.01)
