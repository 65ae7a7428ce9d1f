"""Estimates of training time: figures worked out by hand, logs of runs that go on, were resumed, have died or
ended, and what a user can get wrong. CPU; seconds.

    python -m pytest tests/scripts/test_estimate_training_time.py
"""

import os
import re
import subprocess
import sys
from datetime import datetime

import pytest
from helpers import ROOT, TINY
from helpers import write_log as write

SCRIPT = "estimate_training_time.py"
NOW = datetime(2027, 1, 31, 18, 0).timestamp()  # local
AT = "--now=2027-01-31 18:00"
# 4 x 25 x 10 = 1000 tokens an iteration
SIZES = {"batch_size": 4, "block_size": 25, "gradient_accumulation_steps": 10, "max_iters": 1000,
         "eval_interval": 100}


def start(time: float, resumed: bool = False, **config) -> dict:
    return {"event": "start", "time": time, "config": SIZES | config, "environment": {}, "resumed": resumed}


def iteration(time: float, step: int, seconds: float | None = 2.0) -> dict:
    return {"event": "iter", "time": time, "step": step, "loss": 3.0, "lr": 1e-3, "norm": 1.0, "mfu": None,
            "seconds": seconds, "tokens_per_second": None if seconds is None else 1000 / seconds, "epoch": 0}


def evaluation(time: float, step: int) -> dict:
    return {"event": "eval", "time": time, "step": step, "train_loss": 3.0, "val_loss": 3.0, "lr": 1e-3}


def going(until: float = NOW, **config) -> list[dict]:
    """250 iterations of 2 s, 30 s an evaluation, from a log line every 10 iterations; the last at `until`.

    The first log line took 100 s, and from it to the last are 60 s of evaluation and 48 pauses of 0.5 s.
    """
    time = until - (240 * 2 + 2 * 30 + 22 * 0.5)
    events = [start(time - 130, **config), evaluation(time - 100, 0), iteration(time, 0, 100.0)]
    for step in range(10, 250, 10):
        if step in (100, 200):
            time += 30
            events.append(evaluation(time, step))
        else:
            time += 0.5
        time += 20
        events.append(iteration(time, step))
    return events


def parts(out: str) -> dict[str, str]:
    """The lines above the table, by their first word."""
    return {line[:12].strip(): line[12:] for line in out.split("\n\n")[0].splitlines()}


def table(out: str) -> dict[int, tuple[str, str]]:
    """Step to time from now and what is there."""
    rows = out.split("\n\n")[1].splitlines()[1:]
    cells = [re.split(r"  +", row.strip()) for row in rows]
    return {int(step.replace(",", "")): (after, what) for step, _, after, _, what in cells}


def local(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%a %Y-%m-%d %H:%M %Z}"


def test_from_a_config_file(run_script):
    """600,000 iterations of 12 x 1024 x 40 tokens at 1.9M tokens/s take 155,217 s."""
    done = run_script(SCRIPT, ROOT / "config" / "train_gpt2.py", "--tokens_per_second=1_900_000", "--gpus=4",
                      "--price_per_hour=3.5", "--tokens_per_epoch=9_000_000_000",
                      "--checkpoint_interval=0", AT)
    assert done.code == 0 and not done.err, done.err
    said = parts(done.out)
    assert said["training"] == "600,000 iterations of 491,520 tokens, 294.91 billion tokens in all"
    assert said["speed"] == "1,900,000 tok/s, 258.7 ms an iteration, as given"
    assert said["epochs"] == "32.77 of 9.00 billion tokens"
    assert said["evaluations"] == "601, not counted without --seconds_per_evaluation"
    assert said["time"] == f"1 d 19:06, until {local(NOW + 155217)}"
    assert said["cost"] == "603.62 for 172.5 GPU-hours at 3.50, on 4 GPUs"
    ends = [(1000, "00:04:19"), (2000, "00:08:37"), (3000, "00:12:56"), (18311, "01:18:57"),
            (36622, "02:37:54"), (54932, "03:56:51"), (585938, "1 d 18:06"), (600000, "1 d 19:06")]
    assert [(step, after) for step, (after, _) in table(done.out).items()] == ends
    whats = [what for _, what in table(done.out).values()]
    assert whats == ["evaluation, checkpoint", "checkpoint", "checkpoint", "end of epoch 0", "end of epoch 1",
                     "end of epoch 2", "end of epoch 31", "checkpoint, end of training"]


def test_help(run_script):
    done = run_script(SCRIPT, "--help")
    assert done.code == 0 and "--now=''" in done.out and "--use_tensorboard" not in done.out


def test_evaluations_and_settings_of_either_script(run_script, tiny_data, tmp_path):
    (tmp_path / "mine.py").write_text("max_iters = 100\nsync_strategy = 'spd'\neval_interval = 30\n"
                                      "checkpoint_interval = 40\ntokens_per_second = 64.0\n")
    done = run_script(SCRIPT, "mine.py", *TINY, "--eval_interval=30", f"--dataset={tiny_data}", AT,
                      "--seconds_per_evaluation=100", "--milestones=1")
    assert done.code == 0, done.err
    assert parts(done.out)["evaluations"] == "5 of 100 s: 00:08:20"  # at 0, 30, 60, 90 and the end
    assert parts(done.out)["epochs"] == "2.15 of 2,976 tokens"  # 6400 tokens; 186 windows of 16
    assert table(done.out) == {30: ("00:03:50", "evaluation, checkpoint"), 47: ("00:04:07", "end of epoch 0"),
                               93: ("00:08:13", "end of epoch 1"),
                               100: ("00:10:00", "checkpoint, end of training")}


def test_a_run_that_goes_on(run_script, tmp_path):
    write(tmp_path / "out" / "run_1.jsonl", *going(NOW - 5), rest='{"event": "it')
    options = ("--tokens_per_epoch=100_000", "--price_per_hour=2", "--gpus=2", AT)
    done = run_script(SCRIPT, "out", *options)
    assert done.code == 0 and not done.err, done.err
    said = parts(done.out)
    assert said["run"] == f"out, begun {local(NOW - 5 - 551 - 130)}"
    assert said["status"] == "last heard of 00:00:05 ago"
    assert said["done"] == "241 of 1,000 iterations (24.1%), 241,000 tokens"
    assert said["speed"] == "500 tok/s, 2,000.0 ms an iteration: the median of the last 25 log lines"
    # 60 + 22 x 0.5 of 551 s
    assert said["pauses"] == "12.9% of the time; 30.0 s an evaluation with what is saved then, mean of 2"
    # 759 iterations of 2.05 s and 8 evaluations, less the 5 s since
    assert said["time left"] == f"00:29:51, until {local(NOW + 1791)}"
    assert said["cost"] == "1.99 for 1.0 GPU-hours at 2.00, on 2 GPUs"
    assert table(done.out) == {300: ("00:02:26", "evaluation, checkpoint, end of epoch 2"),
                               400: ("00:06:21", "checkpoint, end of epoch 3"),
                               500: ("00:10:16", "checkpoint, end of epoch 4"),
                               1000: ("00:29:51", "checkpoint, end of epoch 9, end of training")}
    one = run_script(SCRIPT, "out/run_1.jsonl", *options)
    assert one.out == done.out.replace("out, ", "out/run_1.jsonl, ")


def test_between_an_evaluation_and_its_update(run_script, tmp_path):
    """Of the evaluation that was logged last nothing is left; it is not yet known what evaluations take."""
    events = [start(NOW - 50), evaluation(NOW - 40, 0), iteration(NOW - 30, 0), evaluation(NOW, 100)]
    write(tmp_path / "out" / "run_1.jsonl", *events)
    done = run_script(SCRIPT, "out", AT)
    assert "what evaluations take is not known yet, and not counted" in parts(done.out)["pauses"]
    assert parts(done.out)["done"].startswith("100 of 1,000") and min(table(done.out)) == 200
    assert parts(done.out)["time left"].startswith("00:30:00,")
    assert parts(done.out)["epochs"] == "not known without --tokens_per_epoch"


def test_a_resumed_run(run_script, tmp_path):
    """On a faster machine; what lies between the two is no pause, and its settings are the new ones."""
    write(tmp_path / "out" / "run_1.jsonl", *going(NOW - 9000))
    write(tmp_path / "out" / "run_2.jsonl", start(NOW - 120, True, max_iters=500, checkpoint_interval=150),
          *[iteration(NOW - 90 + 10 * i, 200 + 10 * i, 1.0) for i in range(10)])
    done = run_script(SCRIPT, "out", AT)
    said = parts(done.out)
    assert said["speed"].startswith("1,000 tok/s") and said["speed"].endswith("of the last 10 log lines")
    assert said["done"].startswith("291 of 500 iterations (58.2%)")
    assert said["run"] == f"out, begun {local(NOW - 9000 - 551 - 130)}"
    # to step 190: 30 s of evaluation and 18 x 0.5 s of 419 s; then 90 s without
    assert said["pauses"].startswith("7.7% of the time; 30.0 s an evaluation")
    # pauses: 9 s of 270 iterations without an evaluation
    assert table(done.out)[300] == ("00:00:39", "evaluation, checkpoint") and 450 in table(done.out)


@pytest.mark.parametrize("after, silent", [(290, False), (310, True)])
def test_a_run_that_may_have_died(run_script, tmp_path, after, silent):
    """100 s is its longest silence so far."""
    write(tmp_path / "out" / "run_1.jsonl", *going(NOW - after))
    done = run_script(SCRIPT, "out", AT)
    if silent:
        said = "silent for 00:05:10, and before for 00:01:40 at most: it may have died"
        assert parts(done.out)["status"] == said
        assert parts(done.out)["time left"].startswith("00:29:56,") and "if it is resumed now" in done.out
    else:
        assert parts(done.out)["status"] == "last heard of 00:04:50 ago"
        assert parts(done.out)["time left"].startswith("00:25:06,")


def test_a_run_that_has_ended(run_script, tmp_path):
    end = {"event": "end", "time": NOW, "step": 250, "status": "stopped"}
    write(tmp_path / "out" / "run_1.jsonl", *going(NOW - 10), end)
    done = run_script(SCRIPT, "out", AT)
    assert parts(done.out)["status"] == f"stopped {local(NOW)}" and "if it is resumed now" in done.out
    write(tmp_path / "out" / "run_1.jsonl", *going(NOW - 10, max_iters=250), end | {"status": "finished"})
    done = run_script(SCRIPT, "out", AT)
    assert parts(done.out)["status"] == f"finished {local(NOW)}" and "left" not in done.out
    assert parts(done.out)["done"] == "250 of 250 iterations (100.0%), 250,000 tokens"


def test_a_real_run(run_script, tiny_data, tmp_path):
    args = (*TINY, "--eval_interval=10", "--log_interval=1", "--max_iters=20", f"--dataset={tiny_data}")
    assert run_script("train.py", *args).code == 0
    done = run_script(SCRIPT, "out")
    assert done.code == 0 and not done.err, done.err
    said = parts(done.out)
    assert said["status"].startswith("finished") and said["done"].startswith("20 of 20 iterations")
    assert said["pauses"].endswith("mean of 1") and "20 log lines" in said["speed"]
    log = next((tmp_path / "out").glob("run_*.jsonl"))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-4]))  # as it was some steps earlier
    done = run_script(SCRIPT, "out")
    assert done.code == 0 and max(table(done.out)) == 20, done.err


def test_time_zone():
    """In a process of its own, since a zone is read once."""
    command = [sys.executable, str(ROOT / SCRIPT), "--tokens_per_second=491520", "--max_iters=60",
               "--tokens_per_epoch=1000000000", "--now=2027-01-31 18:00+00:00"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TZ": "ABC-05:30"})
    assert "00:01:00, until Sun 2027-01-31 23:31 ABC" in done.stdout, done.stderr


@pytest.mark.parametrize("args, message", [
    ([], "there is no run in out: give the out_dir of a run, or a config file"),
    (["--max_iters=5"], "tokens_per_second is missing: give it as in --tokens_per_second=100_000"),
    (["good.py", "--tokens_per_second=0"], "tokens_per_second=0.0 must be above 0"),
    (["good.py", "--tokens_per_second=-5"], "tokens_per_second=-5.0 must be above 0"),
    (["good.py", "--tokens_per_second=fast"], "tokens_per_second='fast' (the command line) is of type str"),
    (["good.py", "--tokens_per_second=nan"], "tokens_per_second='nan' (the command line) is of type str"),
    (["good.py", "--tokens_per_secnd=5"], "unknown key 'tokens_per_secnd' in the command line: did you mean"),
    (["good.py", "--max_itres=5"], "unknown key 'max_itres' in the command line: did you mean 'max_iters'?"),
    (["typo.py", "--tokens_per_second=5"], "unknown key 'batchsize' in typo.py: did you mean 'batch_size'?"),
    (["none.py", "--tokens_per_second=5"], "cannot read config file none.py"),
    (["good.py", "--tokens_per_second=5", "--max_iters=0"], "max_iters=0: to train, it must be at least 1"),
    (["good.py", "--tokens_per_second=5", "--eval_only"], "eval_only=True: nothing is trained"),
    (["good.py", "--tokens_per_second=5", "--gpus=0"], "gpus=0 must be at least 1"),
    (["good.py", "--tokens_per_second=5", "--price_per_hour=-1"], "price_per_hour=-1.0 must be above 0"),
    (["good.py", "--tokens_per_second=5", "--tokens_per_epoch=0"], "tokens_per_epoch=0 must be above 0"),
    (["good.py", "--tokens_per_second=5", "--checkpoint_interval=-1"], "checkpoint_interval=-1: it must"),
    (["good.py", "--tokens_per_second=5", "--now=tomorrow"], "now='tomorrow' is no time"),
    (["good.py", "run"], "--max_iters is for a run that has not begun"),
    (["run", "run"], "run, run: give one of them"),
    (["run", "--max_iters=5"], "--max_iters is for a run that has not begun"),
    (["run", "--tokens_per_second=5"], "--tokens_per_second is for a run that has not begun"),
    (["nowhere"], "there is no run in nowhere: give"),
    (["empty"], "empty has no run_*.jsonl"),
    (["text.txt"], "text.txt is no log of a training run"),
    (["new.jsonl"], "new.jsonl has no iteration yet"),
    (["null.jsonl"], "null.jsonl has no iteration yet"),
    (["begun.jsonl"], "begun.jsonl has no iteration yet"),
    (["bare.jsonl"], "bare.jsonl has block_size=None: to train, it must be at least 1"),
    (["timeless.jsonl"], "timeless.jsonl is no log of a training run: it has events without a time"),
])
def test_what_a_user_can_get_wrong(run_script, tmp_path, args, message):
    (tmp_path / "good.py").write_text("max_iters = 10\n")
    (tmp_path / "typo.py").write_text("batchsize = 10\n")
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "run" / "run_1.jsonl", *going())
    write(tmp_path / "new.jsonl", rest='{"event": "start"')
    write(tmp_path / "begun.jsonl", start(1.0), evaluation(2.0, 0))
    write(tmp_path / "null.jsonl", start(1.0), iteration(2.0, 0, None))
    write(tmp_path / "bare.jsonl", start(1.0, block_size=None), iteration(2.0, 0))
    write(tmp_path / "timeless.jsonl", start(1.0), iteration(None, 0))
    before = sorted(tmp_path.rglob("*"))
    done = run_script(SCRIPT, *args)
    assert done.code == 2 and message in done.err, done.out + done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and not done.out
    assert sorted(tmp_path.rglob("*")) == before
