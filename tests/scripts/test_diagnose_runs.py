"""--diagnose in the training scripts: sleeps in a run, what is written, what is left alone. CPU; a minute.

    python -m pytest tests/scripts/test_diagnose_runs.py
"""

import gzip
import json

import pytest

from nanosync.step_profile import EXPOSED, GAPS, ROWS, WAITING, profile_of

TINY = ("--device=cpu", "--compile=False", "--n_layer=1", "--n_head=2", "--n_embd=16")
TRAIN = (*TINY, "--block_size=16", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1")
SPEEDRUN = (*TINY, "--sequence_length=64", "--val_tokens=64")
SLOW_DATA = """
import itertools, time
from nanosync.dataloader import DataLoader
_batch, _calls = DataLoader._batch, itertools.count()
def _slow(self, start):
    time.sleep(1.5 if next(_calls) >= 9 else 0)  # the steps before the profiled ones need no sleep
    return _batch(self, start)
DataLoader._batch = _slow
"""
SLOW_HOST = """
import itertools, time
from nanosync.parallelism import Parallelism
_clip, _calls = Parallelism.clip, itertools.count()
def _slow(self, *arguments):
    time.sleep(1.0 if next(_calls) >= 9 else 0)
    return _clip(self, *arguments)
Parallelism.clip = _slow
"""


def profile_in(out_dir):
    path, = out_dir.glob("trace_*.json.gz")
    return profile_of(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


@pytest.mark.parametrize("slow, row, least", [(SLOW_DATA, WAITING, 0.1), (SLOW_HOST, GAPS, 1.0)])
def test_a_sleep_lands_in_its_row(run_script, tiny_data, tmp_path, slow, row, least):
    """A sleep is never shorter than it says. The loader's goes on during the work of the step before, which
    takes 7 ms, and on a loaded machine far less than 1.4 s."""
    (tmp_path / "slow.py").write_text(slow)
    done = run_script("train.py", "slow.py", *TRAIN, f"--dataset={tiny_data}", "--out_dir=out",
                      "--diagnose=3")
    assert done.code == 0 and done.err == "", done.err
    found = profile_in(tmp_path / "out")
    assert found.steps == 3 and sum(found.seconds.values()) == pytest.approx(found.step)
    measured = float(done.out.split(" ms with it; trace: ")[0].split()[-1]) / 1e3
    assert found.step == pytest.approx(measured, rel=0.2)  # of another number of steps: 1/4 or more
    assert found.seconds[row] >= least
    assert all(f"  {name} " in done.out for name in (*ROWS, "step"))


@pytest.mark.parametrize("script, settings, steps", [
    ("train.py", (*TRAIN, "--log_interval=1"), "max_iters"),
    ("train_gpt.py", (*SPEEDRUN, "--batch_size=2", "--device_batch_size=1"), "num_iterations"),
    ("train_gpt_fast.py", (*SPEEDRUN, "--batch_sizes=[1,1,1,1]", "--document_mask=False"), "num_iterations")])
def test_a_diagnosis_leaves_a_run_as_it_is(run_script, tiny_data, tmp_path, script, settings, steps):
    """A finished run stays, and its checkpoint can be diagnosed with more steps."""
    command = (script, *settings, f"--dataset={tiny_data}", "--out_dir=out")
    assert run_script(*command, f"--{steps}=2").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    refused = run_script(*command, "--resume=latest", "--diagnose=2", f"--{steps}=2")
    assert refused.code == 2 and refused.err == (
        f"error: diagnose=2 needs 10 steps of warm-up before it, and the run begins at step 2: use "
        f"--{steps}=14 or more, not 2\n")
    done = run_script(*command, "--resume=latest", "--diagnose=2", f"--{steps}=14")
    assert done.code == 0 and "where a step's time goes: 2 steps" in done.out, done.err
    assert "val_loss:" not in done.out  # the last step is no reason for an evaluation
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    trace, = set(after) - set(before)
    assert trace.name.startswith("trace_") and after == before | {trace: after[trace]}
    assert profile_in(tmp_path / "out").seconds[EXPOSED] == 0, "one process waits for no other"
