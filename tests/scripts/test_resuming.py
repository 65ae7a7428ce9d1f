"""Runs that diverge, and checkpoints that a user names to resume from. CPU; seconds.

    python -m pytest tests/scripts/test_resuming.py
"""

import json

import long_runs
from helpers import TINY

from nanosync import checkpoint
from nanosync.run_log import read_log


def test_a_loss_that_is_not_finite(run_script, tiny_data, tmp_path):
    """It ends the run before the update, and no checkpoint has it."""
    run = ["train.py", *TINY, f"--dataset={tiny_data}", f"--out_dir={tmp_path / 'out'}", "--max_iters=40",
           "--checkpoint_interval=1", "--grad_clip=0", "--warmup_iters=0"]
    done = run_script(*run, "--learning_rate=1e20")
    assert done.code == 2 and done.err.count("\n") == 1 and "--resume=STEP" in done.err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "non_finite"
    for step in checkpoint.steps_in(str(tmp_path / "out")):
        tensors = checkpoint.find(str(tmp_path / "out"), step).tensors("model")
        assert all(t.isfinite().all() for t in tensors.values())
    assert read_log(str(tmp_path / "out"))[-1]["status"] == "non_finite"


def test_resume_from_where(run_script, tiny_data, tmp_path):
    """A step, the best, another folder; what is later is moved aside; the list of checkpoints."""
    out = tmp_path / "out"
    run = ["train.py", *TINY, f"--dataset={tiny_data}", "--eval_interval=5", "--max_iters=15"]
    whole = run_script(*run, f"--out_dir={out}", "--seed=3")  # which a run that goes on keeps
    assert whole.code == 0, whole.err
    losses = long_runs.losses(out)
    listed = run_script(*run, f"--out_dir={out}", "--list_checkpoints")
    assert [line.split()[0] for line in listed.out.splitlines()] == ["step", "5", "10", "15"]
    assert listed.out.count("valid") == 3 and listed.out.count("the best") == 1
    back = run_script(*run, f"--out_dir={out}", "--resume=5")
    assert back.code == 0 and "moved the checkpoints of later steps than 5 to" in back.out
    assert long_runs.losses(out) == losses and checkpoint.steps_in(str(out)) == [5, 10, 15]
    fork = run_script(*run, f"--out_dir={tmp_path / 'fork'}", f"--resume={out}/ckpt/step-00000010")
    assert fork.code == 0 and checkpoint.steps_in(str(tmp_path / "fork")) == [15]
    assert long_runs.losses(tmp_path / "fork") == {step: losses[step] for step in range(10, 15)}
    assert long_runs.newest(tmp_path / "fork") == long_runs.newest(out)
    assert "nothing left to do" in run_script(*run, f"--out_dir={out}", "--resume=best").out
    for value, words in (("7", "has no checkpoint '7'; it has the steps 5, 10, 15"),
                         ("newest", "resume='newest' is not a checkpoint"),
                         ("latest --seed=5", "seed=5 (command line), but")):
        wrong = run_script(*run, f"--out_dir={out}", *f"--resume={value}".split())
        assert wrong.code == 2 and wrong.err.count("\n") == 1 and words in wrong.err, wrong.err
