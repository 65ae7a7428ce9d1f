"""train_reduced_sync.py on simulated TP ranks, and the summary of its runs. CPU; seconds.

    python -m pytest tests/scripts/test_reduced_sync_runs.py
"""

import json

from helpers import TINY

RUN = [*TINY, "--n_head=4", "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=20",
       "--bias=True", "--learning_rate=1e-3", "--eval_interval=10", "--eval_iters=5"]


def test_stopping_a_bad_run_and_the_summary(run_script, tiny_data, tmp_path):
    out = [tmp_path / name for name in ("standard", "spd", "grouped")]
    for path, more in zip(out, (["--seed=1"], [], ["--stop_if=5:1.0"])):
        done = run_script("train_reduced_sync.py", *RUN, f"--sync_strategy={path.name}", "--tp_size=4", *more,
                          f"--dataset={tiny_data}", f"--out_dir={path}")
        assert done.code == 0, done.err
    assert "stopped: val loss" in done.out and "at step 10 is above 1.0" in (out[2] / "log.txt").read_text()
    summary = run_script("experiments/results_summary.py", *out, f"--out={tmp_path / 'summary'}")
    assert summary.code == 0, summary.err
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [(r["run"], r["syncs"], r["status"], r["step"]) for r in rows] == [
        ("standard", 4, "finished", 20), ("spd", 2, "finished", 20), ("grouped", 1, "stopped", 10)]
    assert rows[0]["percent"] == 0 and [r["differs"] for r in rows] == [[], [], ["step"]]
    assert (tmp_path / "summary.md").read_text() in summary.out
    assert (tmp_path / "summary.png").stat().st_size > 5000
    resumed = run_script("train_reduced_sync.py", *RUN, "--sync_strategy=spd", "--tp_size=4",
                         "--init_from=resume", f"--dataset={tiny_data}", f"--out_dir={out[1]}")
    assert "nothing left to do" in resumed.out
    again = run_script("experiments/results_summary.py", *out, f"--out={tmp_path / 'again'}")
    assert again.code == 0 and "| spd | 4 | 2 | 20 |" in again.out
    none = run_script("experiments/results_summary.py", tmp_path)
    assert none.code == 2 and none.err.count("\n") == 1 and "no run_*.jsonl" in none.err


def test_a_diverged_run_is_stopped_and_shown(run_script, tiny_data, tmp_path):
    done = run_script("train_reduced_sync.py", *RUN, "--learning_rate=1e20", "--grad_clip=0",
                      "--decay_lr=False", "--stop_if=5:4.0", f"--dataset={tiny_data}", "--out_dir=bad")
    assert done.code == 2 and "the loss is " in done.err and done.err.count("\n") == 1
    summary = run_script("experiments/results_summary.py", "bad")
    assert summary.code == 0 and "| non_finite |" in summary.out


def test_resume_with_the_same_command(run_script, tiny_data, tmp_path):
    args = (*RUN, "--sync_strategy=custom", "--sync_points=[3,1]", f"--dataset={tiny_data}", "--out_dir=out")
    assert run_script("train_reduced_sync.py", *args, "--max_iters=10").code == 0
    again = run_script("train_reduced_sync.py", *args, "--init_from=resume")
    assert again.code == 0 and "step 20:" in again.out, again.err


def test_picture_of_schedules(run_script, tmp_path):
    done = run_script("experiments/draw_schedules.py", f"--out={tmp_path / 's.png'}")
    assert done.code == 0 and (tmp_path / "s.png").stat().st_size > 10000, done.err
