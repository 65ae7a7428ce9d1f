"""A small part of tests/fuzz.py and tests/fuzz_experiments.py: random mutations of every kind of file are
read or refused in one line.

CPU, a forked process a mutation; seconds. The whole: python tests/fuzz.py; python tests/fuzz_experiments.py

    python -m pytest tests/scripts/test_fuzz.py
"""

import os
import signal
import time

import fuzz
import fuzz_experiments
import fuzzing
from helpers import PATIENCE

from nanosync.errors import UserError


def test_mutated_files_are_read_or_refused(tmp_path):
    assert fuzz.fuzz(list(fuzz.KINDS), n=2, seed=7, folder=tmp_path) == []


def test_mutated_files_of_experiments_are_read_or_refused(tmp_path, monkeypatch):
    for module, name in ((fuzz_experiments.experiment_logger, "git_info"),
                         (fuzz_experiments.experiment_logger, "gpu_info"),
                         (fuzz_experiments.runner, "gpu_info")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after fuzz_kinds replaces it
    assert fuzz_experiments.fuzz_kinds(list(fuzz_experiments.KINDS), n=1, seed=7, folder=tmp_path) == []


def test_the_fuzz_test_finds_what_it_looks_for(tmp_path):
    def refuse(folder):
        raise UserError("no")

    def refuse_at_length(folder):
        raise UserError("no\nno")

    for read, finding in ((lambda folder: None, ""), (refuse, fuzzing.REFUSED),
                          (lambda folder: 1 / 0, "ZeroDivisionError"),
                          (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
                          (lambda folder: time.sleep(60), "hang"),
                          (refuse_at_length, "a message of several lines")):
        result = fuzzing.in_child(read, tmp_path, tmp_path / "report.txt",
                                  seconds=1 if finding == "hang" else PATIENCE)
        assert finding in result and bool(finding) == bool(result)
