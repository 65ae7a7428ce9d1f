"""Parts of benchmarks/many_gpus.py with tiny models. CPU, two real gloo processes; ten seconds.

    python -m pytest tests/processes/test_many_gpus_parts.py

Jobs are forked here, for time, as in other tests; a job's command with torchrun itself is tested for one.
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


def test_resume_part(run_part):
    code, table = run_part("resume", *SIZES, "--only=fsdp-whole,fsdp-again,fsdp-on-1")
    assert "| fsdp | again | 20 losses, weights, moments, random states: equal bits | ok |" in table
    assert "| fsdp | on-1 | 20 losses differ by up to " in table and "FAILED" not in table
    assert code == 1 and "ddp-whole: not run" in table


def test_scaling_and_decode_parts(run_part):
    code, table = run_part("scaling", *SIZES, "--vocab_size=64", "--steps=1", "--rounds=1")
    assert code == 0 and all(f"| {size} | {name} | " in table for size, name in (
        ("124M", "ddp"), ("124M", "fsdp+40M"), ("XL", "one GPU"), ("XL", "zero1")))
    code, table = run_part("decode", "--device=cpu", "--n_layer=2", "--widths=[128]", "--vocab_size=64",
                           "--block_size=32", "--max_new_tokens=4", "--rounds=1")
    assert code == 0 and table.count("| 128 | 1 | 2 | ") == 4 and "| 4 | 2 | 1 | 0 |" in table
