"""visualize_training.py as a user runs it, and all that a user can get wrong. CPU; seconds.

    python -m pytest tests/scripts/test_visualize_script.py
"""

import os

import pytest
from helpers import TINY
from helpers import write_log as write

from nanosync.run_log import read_log

SCRIPT = "visualize_training.py"


def start(time: float, resumed: bool = False) -> dict:
    return {"event": "start", "time": time, "config": {"n_layer": 2}, "environment": {}, "resumed": resumed}


def iteration(step: int, loss: float | None, mfu: float | None = None) -> dict:
    return {"event": "iter", "step": step, "loss": loss, "lr": 1e-3, "norm": loss, "seconds": 0.1,
            "tokens_per_second": 100.0 + step, "mfu": mfu, "epoch": 0}


def evaluation(step: int, loss: float | None) -> dict:
    return {"event": "eval", "step": step, "train_loss": loss, "val_loss": loss, "lr": 1e-3}


def saved(step: int, loss: float | None) -> dict:
    return {"event": "checkpoint", "step": step, "path": "", "val_loss": loss}


def end(step: int) -> dict:
    return {"event": "end", "step": step, "status": "finished"}


FIRST = (start(1), evaluation(0, 4.0), iteration(0, 4.0), iteration(5, 3.5), evaluation(10, 3.0),
         saved(10, 3.0), iteration(10, 3.0), iteration(15, 2.5), evaluation(20, 2.0), end(20))


def test_summary_and_place_of_the_picture(run_script, tmp_path):
    write(tmp_path / "a" / "run_1.jsonl", *FIRST)
    write(tmp_path / "a" / "run_2.jsonl", start(2, True), iteration(10, 3.1), evaluation(15, 3.2),
          rest='{"event": "iter", "st')
    write(tmp_path / "_b$x$" / "run_1.jsonl", start(1.5), iteration(0, 4.0, 0.4), iteration(1, 3.0, 0.5))
    done = run_script(SCRIPT, "a", "_b$x$")
    assert done.code == 0 and not done.err, done.err
    assert done.out.splitlines() == [
        f"written: {os.path.join('a', 'run_2_analysis.png')}",
        "a: 15 steps, last val loss 3.2000, best 3.0000 at step 10, median 105 tok/s",
        "_b$x$: 2 steps, no val loss yet, median 100 tok/s"]
    assert (tmp_path / "a" / "run_2_analysis.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir(tmp_path / "a")) == ["run_1.jsonl", "run_2.jsonl", "run_2_analysis.png"]
    one = run_script(SCRIPT, "a/run_1.jsonl", "--out=new/one.svg")
    assert one.code == 0 and "a/run_1: 20 steps, last val loss 2.0000" in one.out, one.err
    assert (tmp_path / "new" / "one.svg").read_text().startswith("<?xml")


def test_losses_that_are_no_number_or_huge(tmp_path, run_script):
    events = [start(1), evaluation(0, 4.0), *[iteration(i, 4.0 - i / 10) for i in range(10)],
              iteration(10, 1e30), iteration(11, None), evaluation(12, None), saved(12, None)]
    write(tmp_path / "out" / "run_1.jsonl", *events)
    write(tmp_path / "nothing" / "run_1.jsonl", start(1), evaluation(0, None), iteration(0, None))
    done = run_script(SCRIPT, "out", "nothing", "--out=nan.png")
    assert done.code == 0 and not done.err, done.err
    assert "12 steps, last val loss nan, best 4.0000 at step 0" in done.out
    assert "1 steps, last val loss nan, best none" in done.out
    alone = run_script(SCRIPT, "nothing")
    assert alone.code == 0 and not alone.err, alone.err


def test_a_real_run_and_its_continuation(run_script, tiny_data, tmp_path):
    args = (*TINY, "--eval_interval=10", "--log_interval=1", f"--dataset={tiny_data}",
            "--always_save_checkpoint")
    for more in (["--max_iters=20"], ["--max_iters=30", "--init_from=resume"]):
        done = run_script("train.py", *args, *more)
        assert done.code == 0, done.err
    picture = run_script(SCRIPT)
    assert picture.code == 0 and not picture.err, picture.err
    assert "out: 30 steps, last val loss" in picture.out
    steps = [e["step"] for e in read_log(str(tmp_path / "out")) if e["event"] == "iter"]
    assert steps == list(range(30))
    newest = sorted(path.stem for path in (tmp_path / "out").glob("run_*.jsonl"))[-1]
    assert (tmp_path / "out" / f"{newest}_analysis.png").stat().st_size > 20_000


@pytest.mark.parametrize("args, message", [
    (["none"], "there is no run in none: give the out_dir of a run or"),
    ([], "there is no run in out: give"),
    (["empty"], "no run_*.jsonl"),
    (["text.txt"], "text.txt is no log of a training run"),
    (["binary"], "binary is no log of a training run"),
    (["other.jsonl"], "other.jsonl is no log of a training run"),
    (["torn.jsonl"], "torn.jsonl is no log of a training run"),
    (["new"], "new has no iteration yet"),
    (["half.jsonl"], "half.jsonl has no iteration yet"),
    (["good", "new"], "new has no iteration yet"),
    (["good", "--out=good"], "--out=good names no picture"),
    (["good", "--out=x.txt"], "--out=x.txt names no picture"),
    (["good", "--out=text.txt/x.png"], "text.txt"),
    (["good", "--out=/proc/x.png"], "/proc"),
    (["good", "--size=3"], "unrecognized arguments: --size=3"),
])
def test_what_a_user_can_get_wrong(run_script, tmp_path, args, message):
    write(tmp_path / "good" / "run_1.jsonl", *FIRST)
    write(tmp_path / "new" / "run_1.jsonl", start(1), evaluation(0, 4.0))
    write(tmp_path / "half.jsonl", rest='{"event": "start"')
    write(tmp_path / "other.jsonl", {"event": "started", "level": "info"})
    write(tmp_path / "torn.jsonl", start(1), {"event": "iter", "step": 1})
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = run_script(SCRIPT, *args)
    assert done.code == 2 and message in done.err, done.err
    assert done.err.count("\n") == 1 and not done.out and sorted(tmp_path.rglob("*")) == before
