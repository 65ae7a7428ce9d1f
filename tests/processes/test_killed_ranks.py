"""Runs that continue by themselves: a rank is killed under torchrun, a scheduler warns. Real processes; a
part of tests/restarts.py, which has the loop.

    python -m pytest tests/processes/test_killed_ranks.py
"""

import json
import re
import signal
import time
from pathlib import Path

import long_runs
import restarts
from long_runs import Run


def test_run_goes_on_after_a_rank_is_killed(tmp_path):
    """Weights, moments, random states and losses are those of the unbroken run, and log.txt has each step
    once."""
    data = restarts.write_shards(tmp_path / "shards")
    assert restarts.finish(data, tmp_path / "whole", processes=2) == 0
    case = restarts.kill_and_compare(data, tmp_path / "out", tmp_path / "whole", [(0, 11)],
                                     long_runs.hold(tmp_path, "update", 11), saved=True)
    assert case["ok"], case
    text = (tmp_path / "out" / "log.txt").read_text()
    # of step 10, which has a validation loss of its own; of step 5 if the kill came before that was written
    assert re.search(r"resuming from .*: step (?:10, epoch 0, val|5, epoch 0, best val) loss ", text)
    assert text.count("\nShuffled 4 training shards for epoch 1\nStarting epoch 1\niter 11: ") == 1
    assert "evaluating: 4 batches of each split\nstep 0: " in text


def test_warning_of_a_scheduler_saves_and_is_answered(tmp_path):
    """SIGUSR1, and then SIGTERM, which ends no run that is saving; in an evaluation of many batches."""
    data = restarts.write_shards(tmp_path / "shards")
    run = Run(data, tmp_path / "out", "--eval_iters=100000", "--eval_interval=3", "--max_iters=4",
              "--checkpoint_interval=0")
    while "evaluating: " not in Path(run.output.name).read_text():
        assert run.process.poll() is None
        time.sleep(0.05)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        run.process.send_signal(number)
    assert run.wait() == 0
    text = Path(run.output.name).read_text()
    assert text.count("finishing this step, then saving; again to end at once\n") == 1
    assert "step 0: train loss" not in text and "interrupted at step 0: use --resume=latest" in text
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "interrupted"
    assert long_runs.newest(tmp_path / "out")["step"] == 0
