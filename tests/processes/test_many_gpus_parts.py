"""Parts of benchmarks/many_gpus.py with tiny models. CPU, two real gloo processes; about ten seconds.

    python -m pytest tests/processes/test_many_gpus_parts.py

The processes of a job are forked here, for time, as in other tests.
"""

import sys
from pathlib import Path

import pytest
from helpers import python, torchrun

from benchmarks import many_gpus
from configurator import configure

SIZES = ["--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
         "--batch_size=2"]


@pytest.fixture
def run_part(tmp_path, monkeypatch):
    """run_part("scaling", ...) -> (exit code, text of the table)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def forked(config, job, seconds):
        start = python if job.processes == 1 else lambda *args, **kw: torchrun(job.processes, *args, **kw)
        done = start(job.script, *job.arguments, cwd=tmp_path)
        Path(many_gpus.place(config, job.name, ".log")).write_text(done.out + done.err)
        return {"code": done.code, "seconds": 1.0, "ended_by": "itself"}

    monkeypatch.setattr(many_gpus, "supervise", forked)

    def run(part: str, *args: str):
        scripts = tuple(f"{many_gpus.ROOT}/{script}" for script in many_gpus.PARTS[part])
        config = configure(dict(vars(many_gpus)), [f"--part={part}", f"--out={tmp_path / 'out'}", *args],
                           others=scripts)
        many_gpus.check_settings(config)
        return many_gpus.main(config), (tmp_path / "out" / f"{part}-table.md").read_text()

    return run


def test_resume_part(run_part, monkeypatch):
    monkeypatch.setattr(many_gpus, "STEPS", 8)
    monkeypatch.setattr(many_gpus, "SAVED", 4)
    code, table = run_part("resume", *SIZES, "--eval_iters=2", "--only=fsdp-whole,fsdp-again,fsdp-on-1")
    assert "| fsdp | again | 4 losses, weights, moments, random states: equal bits | ok |" in table
    assert "| fsdp | on-1 | 4 losses differ by up to " in table and "FAILED" not in table
    assert code == 1 and "\nddp-whole, ddp-again, " in table


def test_scaling_part(run_part):
    code, table = run_part("scaling", *SIZES, "--vocab_size=64", "--steps=1", "--rounds=1",
                           "--only=XL-ddp,XL-strategies")
    assert all(f"| XL | {name} | " in table for name in ("one GPU", "ddp", "zero1", "fsdp+120M"))
    assert code == 1 and "\n124M-ddp, 124M-strategies: not run\n" in table


def test_killed_supervisor_is_the_problem_of_its_job(tmp_path):
    (tmp_path / "job.py").write_text("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(60)")
    job = many_gpus.Job("a", 1, str(tmp_path / "job.py"), (), 1.0)
    report = many_gpus.supervise({"out": str(tmp_path), "part": "decode"}, job, 0)
    assert report["ended_by"] == "a kill of its supervisor" and report["code"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode-a.log", "job.py"]


def test_user_error_is_one_line(run_script, tmp_path):
    done = run_script("benchmarks/many_gpus.py", "--part=speedrun", "--device=cpu", "--peer=record.py")
    assert done.code == 2 and not list(tmp_path.iterdir())
    assert done.err == "error: peer='record.py' is no file: give the path of a training script\n"
