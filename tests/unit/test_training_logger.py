"""The files that a run writes, also after a resume, a kill, on a full disk, or without a console; TensorBoard
and wandb; the peak FLOP/s for MFU. CPU; seconds.

    python -m pytest tests/unit/test_training_logger.py
"""

import errno
import io
import json
import math
import os
import resource
import shutil
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import event_steps as steps
from helpers import log_a_run as run
from helpers import logged_events as said
from helpers import no_constant, wandb_run

from nanosync.errors import UserError
from nanosync.hardware import named_peak_flops, peak_flops
from nanosync.log_fields import curves_of
from nanosync.log_sinks import check_installed
from nanosync.log_text import lines_until
from nanosync.run_log import read_log
from nanosync.training_logger import TrainingLogger


@pytest.mark.parametrize("name, bf16, fp32", [
    ("NVIDIA H200", 989.5, 494.7),
    ("NVIDIA H200 NVL", None, None),
    ("NVIDIA H100 80GB HBM3", 989.5, 494.7),
    ("NVIDIA H100 PCIe", 756.0, 378.0),
    ("NVIDIA H100 NVL", None, None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ("NVIDIA GH200 480GB", 989.5, 494.7),
    ("NVIDIA B200", 2250.0, 1125.0),
    ("NVIDIA GB200", None, None),
    ("NVIDIA A100-SXM4-40GB", 312.0, 156.0),
    ("NVIDIA A100-PCIE-40GB", 312.0, 156.0),
    ("NVIDIA A100 80GB PCIe", 312.0, 156.0),
    ("A100-SXM4-80GB", 312.0, 156.0),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ("NVIDIA A800-SXM4-80GB", 312.0, 156.0),
    ("NVIDIA A10G", 70.0, 35.0),
    ("NVIDIA A10", 125.0, 62.5),
    ("NVIDIA A10M", None, None),
    ("NVIDIA L40S", 362.0, 183.0),
    ("NVIDIA L40", None, None),
    ("NVIDIA L4", 121.0, 60.0),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 4090 D", None, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ("NVIDIA GeForce RTX 3090", 71.0, 35.6),
    ("NVIDIA GeForce RTX 3090 Ti", None, None),
    ("Tesla V100-SXM2-16GB", None, None),  # no bf16
    ("Tesla T4", None, None),
    ("NVIDIA T400", None, None),
    ("NVIDIA T400 4GB", None, None),
    ("AMD Instinct MI300X", 1307.4, 653.7),
    ("AMD Instinct MI300X OAM", 1307.4, 653.7),
    ("AMD Instinct MI300A", None, None),
    ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
    ("NVIDIA GeForce RTX 5090 D", None, None),
    ("NVIDIA GeForce RTX 5090 Laptop GPU", None, None),
    ("NVIDIA RTX A6000", 154.8, 77.4),
    ("NVIDIA RTX 6000 Ada Generation", None, None),
])
def test_peaks_by_name(name, bf16, fp32):
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        peak = named_peak_flops(name, dtype)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12))


def test_peaks_in_fp16():
    assert named_peak_flops("Tesla V100-SXM2-16GB", torch.float16) == pytest.approx(125e12)
    assert named_peak_flops("Tesla V100-PCIE-16GB", torch.float16) == pytest.approx(112e12)
    assert named_peak_flops("Tesla V100S-PCIE-32GB", torch.float16) is None
    assert named_peak_flops("Tesla T4", torch.float16) == pytest.approx(65e12)
    assert peak_flops(torch.device("cpu"), torch.float16) is None
    assert peak_flops(torch.device("mps"), torch.float16) is None


LINES = """step 250: train loss 3.4512, val loss 3.4620
step 250: HellaSwag acc 0.2859, acc_norm 0.2955 on 10042
step 250: sample
def f(x):
\treturn "\\x1b[2J\\x00é"
saved checkpoint out/ckpt/step-00000250
iter 260: loss 3.4410, lr 6.0e-04, norm 0.85, time 250.31ms, tok/s 1962000, mfu 47.10%, epoch 0
iter 270: loss nan, lr 6.0e-04, norm inf, time 250.31ms, tok/s 1962000, mfu n/a, epoch 1
"""


def say_all(log):
    log.evaluation(250, 3.4512, 3.462, 6e-4)
    log.hellaswag(250, 0.2859, 0.2955, 10042)
    log.sample(250, 'def f(x):\n\treturn "\x1b[2J\0é"')
    log.checkpoint(250, "out/ckpt/step-00000250", np.float32(3.462), 1.5)
    log.iteration(260, 3.441, 6e-4, 0.85, 0.25031, 491108.22, 0.471, 0, memory=2**30)
    log.iteration(270, math.nan, 6e-4, math.inf, 0.25031, 491108.22, None, 1)


def test_lines_and_events(tmp_path, capsys):
    log = TrainingLogger()
    log.open_files(str(tmp_path), {"n_layer": 2}, {"torch": "2"})
    say_all(log)
    log.close(status="finished", step=280, best_val_loss=math.inf)
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == LINES
    start, evaluation, hellaswag, sample, checkpoint, iteration, last, end = said(tmp_path)
    assert start["config"] == {"n_layer": 2} and start["resumed"] is False
    assert evaluation["val_loss"] == 3.462 and evaluation["lr"] == 6e-4
    assert (hellaswag["acc"], hellaswag["acc_norm"], hellaswag["n"]) == (0.2859, 0.2955, 10042)
    assert sample["text"] == 'def f(x):\n\treturn "\x1b[2J\0é"'
    assert checkpoint["seconds"] == 1.5 and iteration["memory"] == 2**30 and last["memory"] is None
    assert last["loss"] is last["norm"] is end["best_val_loss"] is None and end["status"] == "finished"
    assert read_log(str(tmp_path))[1:] == said(tmp_path)[1:]


def test_bits_per_byte_are_at_the_end_of_the_line_and_a_curve(tmp_path, capsys):
    """Of data whose bytes per token are known; the logs of other data have no such field."""
    log = TrainingLogger()
    log.open_files(str(tmp_path), {}, {})
    log.evaluation(8, 3.0, 2.0, 1e-3, bits_per_byte=0.75)
    log.evaluation(9, 3.0, 2.0, 1e-3)
    log.close(status="finished", step=9, best_val_loss=2.0)
    assert capsys.readouterr().out == ("step 8: train loss 3.0000, val loss 2.0000, bits per byte 0.7500\n"
                                       "step 9: train loss 3.0000, val loss 2.0000\n")
    _, known, unknown, _ = read_log(str(tmp_path))
    assert known["bits_per_byte"] == 0.75 and "bits_per_byte" not in unknown
    assert curves_of(known)["val/bits_per_byte"] == 0.75 and "val/bits_per_byte" not in curves_of(unknown)


def test_log_has_the_lines_from_before_it_was_opened_and_is_appended_to(tmp_path, capsys):
    for name in ("first", "second"):
        log = TrainingLogger()
        log.line(f"{name}, early")
        log.open_files(str(tmp_path), {}, {})
        log.line(f"{name}, late")
        log.close()
    lines = "first, early\nfirst, late\nsecond, early\nsecond, late\n"
    assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == lines


def test_processes_that_do_not_log(tmp_path, capsys):
    log = TrainingLogger(active=False)
    log.start_wandb("p", "n", {}, str(tmp_path / "out"))
    log.open_files(str(tmp_path / "out"), {}, {}, resumed_step=3, tensorboard=True)
    log.begin(0, 1)
    log.line("x")
    say_all(log)
    log.status("running", 1)
    log.close()
    assert not capsys.readouterr().out and not (tmp_path / "out").exists()


# resuming

@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_a_resumed_run_goes_on_in_its_log(tmp_path, evaluated, killed):
    """Killed in the middle of a line or ended: after step 10, and resumed from the checkpoint of step 8."""
    run(tmp_path, 0, 10, closed=not killed)
    if killed:
        for name in ("log.txt", next(tmp_path.glob("*.jsonl")).name):
            with open(tmp_path / name, "a") as f:
                f.write('{"event": "iter", "st')
    run(tmp_path, 8, 12, 8, evaluated)
    run(tmp_path / "whole", 0, 12)
    events, whole = said(tmp_path), steps(said(tmp_path / "whole"))
    if not evaluated:  # saved at a signal, before the evaluation, and after it again
        whole.insert(whole.index(("eval", 8)), ("checkpoint", 8))
    assert steps(events) == whole
    first, second = (e for e in events if e["event"] == "start")
    assert not first["resumed"] and second["resumed"]
    assert (second["resumed_step"], second["evaluated"], second["reached"]) == (8, evaluated, 9)
    assert steps(read_log(str(tmp_path))) == steps(read_log(str(tmp_path / "whole")))
    text = (tmp_path / "log.txt").read_text()
    for line in ("iter 8: ", "iter 9: ", "step 8: sample\n", "step 8: train loss", "\nstep 8\n", "iter 7: "):
        assert text.count(line) == 1, line
    assert '{"event"' not in text
    assert os.listdir(tmp_path).count("log.txt") == 1 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("line, step, evaluated, epoch, stays", [
    ("iter 7: loss 3.1, lr 1e-3", 8, True, 0, True), ("iter 8: loss 3.1", 8, True, 0, False),
    ("step 8: train loss 3.1, val loss 3.2", 8, True, 0, True),
    ("step 8: train loss 3.1", 8, False, 0, False),
    ("step 8: train loss 3.1, val loss 3.2, bits per byte 1.5", 8, True, 0, True),
    ("step:8/20 val_loss:3.1 train_time:5ms step_avg:nanms bits_per_byte:1.5", 8, False, 0, False),
    ("step 9: HellaSwag acc 0.2", 8, True, 0, False), ("step:8/20 val_loss:3.1", 8, True, 0, True),
    ("step:8/20 val_loss:3.1", 8, False, 0, False), ("step:8/20 train_loss:3.1", 8, False, 0, True),
    ("step:9/20 train_loss:3.1", 8, True, 0, False), ("saved checkpoint a b/step-00000008", 8, True, 0, True),
    ("saved checkpoint out/ckpt/step-00000010", 8, True, 0, False), ("Completed epoch 0", 8, True, 1, True),
    ("Completed epoch 0", 8, True, 0, False), ("Starting epoch 1", 8, True, 1, True),
    ("Shuffled 99 training shards for epoch 1", 8, True, 0, False), ("Starting epoch 1", 8, True, 0, False),
    ("interrupted at step 8: use --resume=latest", 8, True, 0, True), ("warning: x", 8, True, 0, True)])
def test_lines_that_a_resumed_run_repeats(line, step, evaluated, epoch, stays):
    assert lines_until([line, "after"], step, evaluated, epoch, {}) == [line, "after"][not stays:]


def test_lines_of_a_sample_stay_or_go_together():
    texts = {4: "iter 99: x\nb", 8: "iter 1: x\n\x1b"}
    lines = [line for step, text in texts.items()
             for line in f"step {step}: sample\n{text}\niter {step}: y".split("\n")]
    assert lines_until(lines, 6, True, 0, texts) == lines[:4]


@pytest.mark.parametrize("name", ["log.txt", "run_*.jsonl", "events.out*"])
def test_a_file_that_is_deleted_is_written_anew(tmp_path, capsys, name):
    log = run(tmp_path, 0, 4, closed=False, tensorboard=True)
    path, = tmp_path.rglob(name)
    before = path.read_bytes()
    path.unlink()
    for step in (4, 5):
        log.iteration(step, 3.0, 1e-3, 0.5, 0.25, 1000, None, 0)
    after = path.read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    assert capsys.readouterr().out.count(f"warning: {path} was deleted or replaced: it is written anew") == 1
    path.rename(tmp_path / "moved")
    path.write_bytes(b"of another program\n")
    log.iteration(6, 3.0, 1e-3, 0.5, 0.25, 1000, None, 0)
    log.close()
    assert path.read_bytes().startswith(b"of another program\n")
    assert (tmp_path / "moved").read_bytes() == after


def test_a_folder_that_is_deleted_comes_back(tmp_path):
    log = run(tmp_path / "out", 0, 4, closed=False)
    shutil.rmtree(tmp_path / "out")
    log.iteration(4, 3.0, 1e-3, 0.5, 0.25, 1000, None, 0)
    log.close()
    assert [e["step"] for e in read_log(str(tmp_path / "out")) if e["event"] == "iter"] == [0, 1, 2, 3, 4]


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    run(tmp_path, 0, 4, closed=False).close(status="interrupted")  # an end without a step
    log = run(tmp_path, 4, 6, 4, closed=False)
    assert "end" not in [event["event"] for event in read_log(str(tmp_path))]
    log.close(status="finished", step=6)
    assert [event["status"] for event in said(tmp_path) if event["event"] == "end"] == ["finished"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_anew_is_appended_to(tmp_path, monkeypatch, capsys):
    """Whoever reads it drops what is done again, and so does the next time it is resumed."""
    run(tmp_path, 0, 10, closed=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        run(tmp_path, 4, 7, 4, closed=False)
    assert capsys.readouterr().out.count("warning: cannot write") == 2 and not list(tmp_path.glob("*.tmp"))
    events = said(tmp_path)
    assert len(set(steps(events))) < len(steps(events))
    run(tmp_path / "whole", 0, 7, closed=False)
    assert steps(read_log(str(tmp_path))) == steps(said(tmp_path / "whole"))
    run(tmp_path, 4, 12, 4)
    run(tmp_path / "longer", 0, 12)
    assert steps(said(tmp_path)) == steps(said(tmp_path / "longer"))
    assert [e.get("reached") for e in said(tmp_path) if e["event"] == "start"] == [None, 9, 9]


def test_the_newest_of_several_logs_is_continued(tmp_path, capsys):
    """By what the logs say. A file a start, as earlier versions wrote, and one that cannot be read."""
    run(tmp_path, 0, 6)
    old = next(tmp_path.glob("*.jsonl")).rename(tmp_path / "run_z.jsonl")
    start = {"event": "start", "time": time.time(), "config": {}, "environment": {}, "resumed": True}
    iteration = next(e for e in said(tmp_path) if e["event"] == "iter")
    (tmp_path / "run_a.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (
        start, *({**iteration, "step": step} for step in (4, 5, 6, 7)))))
    (tmp_path / "run_b.jsonl").write_bytes(bytes(range(256)))
    before = old.read_bytes()
    run(tmp_path, 6, 9, 6)
    assert "run_b.jsonl is no log of a training run: the file is ignored" in capsys.readouterr().out
    assert old.read_bytes() == before and len(list(tmp_path.glob("*.jsonl"))) == 3
    (tmp_path / "run_b.jsonl").unlink()
    assert [step for _, step in steps(read_log(str(tmp_path)), "iter")] == list(range(9))
    run(tmp_path, 4, 5, 4)  # before anything that the continued file has
    assert [step for _, step in steps(read_log(str(tmp_path)), "iter")] == list(range(5))
    run(tmp_path / "new", 6, 7, 6)  # from a checkpoint of elsewhere
    assert steps(said(tmp_path / "new"), "iter") == [("iter", 6)] and said(tmp_path / "new")[0]["resumed"]


def test_bad_lines_are_left_out(tmp_path):
    log = run(tmp_path, 0, 2, closed=False)
    path = next(tmp_path.glob("*.jsonl"))
    with open(path, "ab") as f:
        f.write(b'{"event": "iter", "st\n\0\0\0\xff\n[[\n')
    log.iteration(2, 1.0, 1e-3, 0.5, 0.25, 1000, None, 0)
    with open(path, "ab") as f:
        f.write(b'{"event": "iter", "step": 3')
    assert steps(read_log(str(path)), "iter") == [("iter", 0), ("iter", 1), ("iter", 2)]


# what must not stop a run

def test_a_disk_that_is_full_for_a_while(tmp_path, capsys):
    """Files may not grow beyond 2000 bytes, so the last write that fits is torn. Nothing is lost."""
    log = run(tmp_path, 0, 4, closed=False)
    path = next(tmp_path.glob("*.jsonl"))
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 700, allowed[1]))
    try:
        for step in range(4, 30):
            log.iteration(step, 1.0, 1e-3, 0.5, 0.25, 1000, None, 0)
        assert steps(read_log(str(path)), "iter")[:5] == [("iter", step) for step in range(5)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    log.iteration(30, 1.0, 1e-3, 0.5, 0.25, 1000, None, 0)
    log.close()
    assert steps(said(tmp_path), "iter") == [("iter", step) for step in range(31)]
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("iter")]
    assert [int(line.split()[1][:-1]) for line in lines] == [*range(31)]
    out = capsys.readouterr().out
    assert out.count("iter ") == 31 and out.count(f"warning: cannot write {path}: File too large") == 1


def test_a_disk_that_stays_full(tmp_path, capsys):
    for name in ("log.txt", "run_x.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    log = TrainingLogger()
    log.open_files(str(tmp_path), {}, {})
    log._events = type(log._events)(str(tmp_path / "run_x.jsonl"), log.line)
    for _ in range(3):
        say_all(log)
    log.close()
    out = capsys.readouterr().out
    assert out.count("No space left on device; training continues") == 2 and out.count("iter 260") == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        TrainingLogger().open_files(str(tmp_path / "file" / "out"), {}, {})


@pytest.mark.parametrize("error, tries", [
    (BrokenPipeError(), 2), (OSError(errno.EIO, "terminal"), 2), (ValueError("closed"), 2),  # and at the end
    (OSError(errno.ENOSPC, "full"), 13),  # may have space again
])
def test_a_console_that_fails(tmp_path, monkeypatch, error, tries):
    class Console(io.StringIO):
        calls = 0

        def flush(self):
            self.calls += 1
            raise error

    monkeypatch.setattr(sys, "stdout", Console())
    run(tmp_path, 0, 4)
    assert steps(said(tmp_path))[-1] == ("end", 4) and sys.stdout.calls == tries


def test_a_console_with_few_characters(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", console)
    TrainingLogger().line("é, ∞")
    assert console.buffer.getvalue() == b"\xe9, \\u221e\n"


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    """Iterations only move it; other lines are printed above it, and all are in log.txt."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    log = TrainingLogger()
    log.open_files(str(tmp_path), {}, {})
    log.line("before")
    log.begin(250, 271)
    say_all(log)
    log.close()
    log.line("after")
    shown = sys.stdout.getvalue()
    assert "iter 2" not in shown and "271/271" in shown
    assert "loss nan, tok/s 1962000, mfu n/a, epoch 1" in shown
    lines = [line.rpartition("\r")[2] for line in shown.split("\n")]
    assert lines[0] == "before" and LINES.splitlines()[:6] == lines[1:7] and lines[-2:] == ["after", ""]
    assert (tmp_path / "log.txt").read_text() == "before\n" + LINES
    assert steps(said(tmp_path), "iter") == [("iter", 260), ("iter", 270)]


def test_status(tmp_path, monkeypatch, capsys):
    log = TrainingLogger()
    log.status("running", 0)  # no out_dir yet
    log.open_files(str(tmp_path / "out"), {}, {})
    log.status("running", 3, max_iters=10, best_val_loss=math.inf)
    status = json.loads((tmp_path / "out" / "status.json").read_text(), parse_constant=no_constant)
    assert list(status) == ["status", "step", "max_iters", "best_val_loss", "time", "host", "pid"]
    assert (status["status"], status["step"], status["max_iters"], status["best_val_loss"]) == \
        ("running", 3, 10, None) and status["pid"] == os.getpid()
    monkeypatch.setattr(os, "replace", full_disk)
    log.status("finished", 10)
    assert json.loads((tmp_path / "out" / "status.json").read_text()) == status
    assert "status.json: No space left" in capsys.readouterr().out and len(os.listdir(tmp_path / "out")) == 3


# TensorBoard

def curves(folder):
    """Steps and values of each tag, as TensorBoard reads them: by its page, and by its older reader."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
    from tensorboard.util import tensor_util

    page = plugin_event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"tensors": 0})
    older = event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    page.Reload()
    older.Reload()
    values = {}
    for tag in page.Tags()["tensors"]:
        values[tag] = [(e.step, tensor_util.make_ndarray(e.tensor_proto).tolist()) for e in page.Tensors(tag)]
        assert len({step for step, _ in values[tag]}) == len(values[tag]), tag
    for tag in older.Tags()["scalars"]:
        assert repr([(e.step, e.value) for e in older.Scalars(tag)]) == repr(values[tag])  # NaN is not NaN
    return values


def test_tensorboard(tmp_path):
    """Killed after step 10; resumed at 8 twice, at 4, and when it had ended: the curves of one run."""
    config = {"seed": 2**62, "lr": 1e-3, "compile": True, "stop_if": "", "blocks": ["spd"], "types": None}
    run(tmp_path, 0, 10, closed=False, tensorboard=True, config=config)
    run(tmp_path, 8, 10, 8, closed=False, tensorboard=True)
    run(tmp_path, 8, 9, 8, closed=False, tensorboard=True)
    run(tmp_path, 4, 12, 4, evaluated=False, tensorboard=True)
    run(tmp_path, 12, 12, 12, tensorboard=True)
    found = curves(tmp_path)
    run(tmp_path / "whole", 0, 12, tensorboard=True)
    whole = curves(tmp_path / "whole")
    assert found == whole and {tag: len(points) for tag, points in found.items()} == {
        "train/iter_loss": 12, "lr": 12, "norm": 12, "tokens_per_second": 12, "memory_gb": 12,
        "train/loss": 4, "val/loss": 4, "hellaswag/acc": 4, "hellaswag/acc_norm": 4, "best_val_loss": 1,
        "sample/text_summary": 4, "_hparams_/experiment": 1, "_hparams_/session_start_info": 1,
        "_hparams_/session_end_info": 1}
    assert found["memory_gb"][0] == (0, 2.0) and found["best_val_loss"][0][0] == 12
    assert found["val/loss"] == [(step, pytest.approx(4 - step / 10)) for step in (0, 4, 8, 12)]
    assert found["sample/text_summary"][1] == (4, [b"    text of\n    step 4"])


def test_tensorboard_that_begins_later_or_after_another_run(tmp_path, monkeypatch):
    run(tmp_path, 0, 10, closed=False)
    run(tmp_path, 8, 12, 8, tensorboard=True)
    found = curves(tmp_path)
    assert [step for step, _ in found["train/iter_loss"]] == list(range(12)) and len(found["val/loss"]) == 4
    monkeypatch.setattr(time, "time", lambda: 1.0)  # a clock that was set back
    run(tmp_path, 0, 2, closed=False, tensorboard=True)
    assert [step for step, _ in curves(tmp_path)["train/iter_loss"]] == [0, 1]


def test_tensorboard_has_a_point_where_a_loss_is_no_number(tmp_path):
    log = TrainingLogger()
    log.open_files(str(tmp_path), {}, {}, tensorboard=True)
    say_all(log)
    losses = curves(tmp_path)["train/iter_loss"]  # written at once: the log is still open
    assert losses[0] == (260, pytest.approx(3.441)) and math.isnan(losses[1][1])
    assert curves(tmp_path)["mfu_percent"] == [(260, pytest.approx(47.1))]


def test_packages_that_are_not_installed(monkeypatch, tmp_path):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    check_installed()
    with pytest.raises(UserError, match="use_tensorboard=True needs the package tensorboard: pip install"):
        check_installed(tensorboard=True)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TrainingLogger().open_files(str(tmp_path / "out"), {}, {}, tensorboard=True)
    with pytest.raises(UserError, match="pip install wandb, or use --wandb_log=False"):
        TrainingLogger().start_wandb("project", "name", {}, str(tmp_path / "out"))
    assert not os.listdir(tmp_path)


# wandb

class UsageError(Exception):
    """As wandb has it."""


@pytest.fixture
def fake(monkeypatch):
    """A wandb that notes what it is told, and fails where a test says so."""
    class Run:
        def __init__(self, fake, id, step):
            self.id, self.step, self.summary, self._fake = id or f"run{len(fake.started)}", step, {}, fake

        def log(self, values, step):
            if self._fake.fails_at == step:
                raise ConnectionError("reset\nby peer")
            self._fake.logged.append((step, values))

        def finish(self):
            if self._fake.fails_at == "finish":
                raise TimeoutError
            self._fake.finished += 1

    class Fake(types.ModuleType):
        def init(self, **options):
            self.started.append(options)
            assert not self.in_use, "run ID in use"  # as after an init that failed, without a teardown
            self.in_use = self.problem is not None and options["mode"] != "offline"
            if self.problem is not None and options["mode"] != "offline":
                raise self.problem
            return Run(self, options["id"], self.step)

        def teardown(self):
            self.in_use = False

        class Settings(types.SimpleNamespace):
            finish_timeout = 0

    module = Fake("wandb")
    module.started, module.logged, module.finished = [], [], 0
    module.problem = module.fails_at = None
    module.step, module.in_use = 0, False
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_is_told_each_step_once(fake, tmp_path):
    """Resumed: the same run, and only the steps that it does not have; also those before the checkpoint."""
    wandb_run(tmp_path, 0, 6)
    assert [step for step, _ in fake.logged[::2]] == [0, 1, 2, 3, 4, 5]
    fake.step = 2  # the others were lost
    wandb_run(tmp_path, 4, 8, resumed=4)
    assert [step for step, _ in fake.logged[12::2]] == [2, 3, 4, 5, 6, 7]
    fake.step = 8
    wandb_run(tmp_path, 2, 8, resumed=2)
    wandb_run(tmp_path, 4, 11, resumed=4)
    assert [step for step, _ in fake.logged[24::2]] == [8, 9, 10]
    assert fake.logged[0][1] == {"iter": 0, "train/loss": 3.0, "val/loss": 4.0}
    assert math.isnan(fake.logged[1][1]["train/iter_loss"]) and "mfu_percent" not in fake.logged[1][1]
    first, *others = fake.started
    assert first["id"] is None and "resume" not in first and first["dir"] == str(tmp_path)
    assert [(other["id"], other["resume"]) for other in others] == [("run1", "allow")] * 3
    assert fake.finished == 4
    assert (tmp_path / "wandb_id").read_text() == "run1\n"
    (tmp_path / "wandb_id").write_text("../../etc\n")
    wandb_run(tmp_path, 0, 1, resumed=0)
    assert fake.started[-1]["id"] is None


def test_wandb_out_of_reach(fake, tmp_path, capsys):
    fake.problem = ConnectionError("no such host\nand more")
    wandb_run(tmp_path, 0, 2)
    assert [options["mode"] for options in fake.started] == ["online", "offline"] and len(fake.logged) == 4
    out = capsys.readouterr().out
    assert out.startswith("warning: wandb is not reachable (no such host): logging offline, into")


@pytest.mark.parametrize("fails_at", [1, "finish"])
def test_wandb_that_fails_later(fake, tmp_path, capsys, fails_at):
    fake.fails_at = fails_at
    wandb_run(tmp_path, 0, 4)
    assert capsys.readouterr().out.count("warning: wandb fails (") == 1
    assert steps(said(tmp_path))[-1] == ("end", 4) and len(fake.logged) == (2 if fails_at == 1 else 8)


def test_wandb_modes(fake, tmp_path, monkeypatch):
    wandb_run(tmp_path, 0, 1, mode="offline")
    wandb_run(tmp_path, 1, 2, resumed=1, mode="offline")
    assert fake.started[-1]["mode"] == "offline" and fake.started[-1]["id"] == "run1"
    assert "resume" not in fake.started[-1]
    monkeypatch.setenv("WANDB_MODE", "offline")  # the user's
    wandb_run(tmp_path, 0, 1)
    assert fake.started[-1]["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb_run(tmp_path, 0, 1)
    assert len(fake.started) == 3
    with pytest.raises(UserError, match="wandb_mode='of' is unknown: use online or offline"):
        TrainingLogger().start_wandb("p", "n", {}, str(tmp_path), "of")


def test_wandb_without_login_leaves_nothing(fake, tmp_path):
    fake.problem = UsageError("No API key configured.")
    with pytest.raises(UserError, match=r"wandb cannot start \(No API key configured.\): run wandb login"):
        TrainingLogger().start_wandb("p", "n", {}, str(tmp_path / "out"))
    assert len(fake.started) == 1 and not os.listdir(tmp_path)
