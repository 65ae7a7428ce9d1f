"""Requests to stop: which signals, how they are answered. No process; milliseconds.

    python -m pytest tests/unit/test_signals.py
"""

import math
import os
import signal
import types

import pytest
import torch

from configurator import Config
from nanosync import run, signals
from nanosync.distributed import Processes
from nanosync.signals import StopSignal
from nanosync.training_logger import TrainingLogger


@pytest.fixture
def requests(monkeypatch):
    """A StopSignal that installs no handler; the exit codes with which it would have ended the process."""
    ended = []
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda *args, **options: None)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(StopSignal, "installed", None)
    monkeypatch.setattr(os, "_exit", ended.append)
    return StopSignal("answer"), ended


def names(*numbers):
    return " ".join(signal.Signals(number).name for number in numbers)


TERM, INT, HUP, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


@pytest.mark.parametrize("sequence, codes", [
    ([INT], []), ([USR1], []), ([USR2], []), ([INT, INT], [130]), ([HUP, INT], [130]), ([TERM, TERM], []),
    ([HUP, HUP], []), ([TERM, HUP], []), ([HUP, TERM, INT], [130]),
    ([USR1, USR1], []), ([USR1, USR2, USR1], []), ([USR1, TERM], []), ([USR1, INT], []),
    ([USR1, INT, INT], [130]), ([TERM, USR1], []), ([TERM, USR1, INT], [130])],
    ids=lambda value: names(*value) if value and value[0] in StopSignal.SIGNALS else "")
def test_second_request_ends_the_process_but_a_warning_never_does(requests, capfd, monkeypatch, sequence,
                                                                     codes):
    stop, ended = requests
    monkeypatch.setattr(StopSignal, "TOGETHER", math.inf)
    for number in sequence:
        stop.ask(number)
        assert stop.received
    assert ended == codes and capfd.readouterr().err == "answer\n"


@pytest.mark.parametrize("seconds, codes", [(1.9, []), (2.1, [128 + TERM])])
def test_a_repeated_signal_is_one_request_for_two_seconds(requests, monkeypatch, seconds, codes):
    stop, ended = requests
    clock = types.SimpleNamespace(monotonic=iter([100.0, 100.0 + seconds]).__next__)
    monkeypatch.setattr(signals, "time", clock)
    stop.ask(TERM)
    stop.ask(TERM)
    assert ended == codes


def test_signals_after_the_end_of_a_run_do_not_change_its_exit_code(requests, monkeypatch):
    """Python restores the default actions of signals with a handler of its own before it exits."""
    set_to = {}
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    requests[0].end()
    assert set_to == dict.fromkeys((TERM, HUP, USR1, USR2), signal.SIG_IGN)


def test_no_process_trains_before_all_handle_signals(monkeypatch):
    """A signal to all processes would end one without a handler, and the others would fail with it."""
    order, one = [], Processes(0, 1, 0, torch.device("cpu"), None)
    monkeypatch.setattr(run, "StopSignal", lambda answer: order.append("handlers"))
    monkeypatch.setattr(run, "barrier", lambda group: order.append("barrier"))
    monkeypatch.setattr(run, "before_exit", [])
    monkeypatch.setattr(Config, "table", str)
    config = Config({"out_dir": "out", "keep_checkpoints": 1}, {})
    begun = types.SimpleNamespace(processes=one, resumed=None, continues=False, config=config, writes=False,
                                  log=TrainingLogger(False), line=len, write_status=order.append,
                                  stop_anywhere=lambda: order.append("agreed"))
    run.Run.open(begun)
    run.Run.begin(begun, types.SimpleNamespace(epoch=0), 1, kind="gpt", random_states=False, progress=False)
    assert order == ["handlers", "barrier", "agreed", "running"]


@pytest.mark.parametrize("error, before, status", [
    (KeyboardInterrupt(), "finished", "interrupted"), (ValueError(), "finished", "failed"),
    (ValueError(), "non_finite", "non_finite")])
def test_a_run_that_ends_before_its_first_step_says_how(error, before, status, monkeypatch, tmp_path):
    """The logs are open, and no step has begun."""
    hooks, said = [], []
    monkeypatch.setattr(run, "before_exit", hooks)
    monkeypatch.setattr(run, "barrier", lambda group: None)
    monkeypatch.setattr(run.run_dir, "open_out_dir", lambda *args: None)
    log = types.SimpleNamespace(status=lambda status, step, **fields: said.append(status),
                                close=lambda status, **fields: said.append(status))
    opened = run.Run.__new__(run.Run)
    vars(opened).update(writes=True, _lock=None, processes=Processes(0, 1, 0, torch.device("cpu"), None),
                        config=types.SimpleNamespace(table=str, get=bool), line=len, log=log, status=before,
                        step=0, saver=None, tokens=0, best_val_loss=0.0, last_step=9, _extra_status=dict,
                        _job={})
    opened.open()
    for hook in hooks:
        hook(error)
    assert said == [status] * 2


def test_answer_does_not_wait_for_a_reader(requests):
    """stderr is a pipe that is full, or that is closed."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # Python's own; --help, tested elsewhere, changes it
    stop, _ = requests
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writes, b"x" * 4096)
    os.set_blocking(writes, True)
    saved = os.dup(2)
    try:
        os.dup2(writes, 2)
        stop.ask(TERM)
        os.close(reads)
        stop._print_answer()
    finally:
        os.dup2(saved, 2)
    os.close(writes)
    os.close(saved)
    assert stop.received == TERM
