"""Contenders of bench.py and fused_step.py that fail, or for which no time is left. CPU; a second.

    python -m pytest tests/unit/test_benchmarks.py
"""

import functools
import importlib
import sys

import pytest
import torch

from benchmarks import fp8_products, fused_checks, products
from benchmarks import kernels as benchmark
from benchmarks.harness import Attempts, take_turns
from benchmarks.kernels import _timed
from benchmarks.strategies import parse
from nanosync.errors import UserError

CPU = torch.device("cpu")


def test_a_contender_that_fails_leaves_the_turns(capsys):
    def fails():
        if len(rounds) == 1:
            raise RuntimeError("out of memory\nand much more")
        return 2.0

    rounds, attempts = [], Attempts()
    figures = take_turns({"a": lambda: 1.0, "b": fails}, 3, uncounted=0, attempts=attempts,
                         after_round=lambda figures: rounds.append({n: len(t) for n, t in figures.items()}))
    assert figures == {"a": [1.0] * 3, "b": [2.0]}
    assert rounds == [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 3, "b": 1}]
    assert attempts.failures == {"b": "RuntimeError: out of memory"}
    assert "b: RuntimeError: out of memory\n" in capsys.readouterr().out


def test_a_user_error_is_no_failure():
    def wrong():
        raise UserError("sizes do not fit")

    with pytest.raises(UserError, match="sizes do not fit"):
        Attempts().run("a", wrong)


def test_nothing_new_begins_when_the_time_is_over():
    attempts = Attempts(1000)
    attempts.started -= 800
    assert not attempts.late() and attempts.late(0.75)
    assert attempts.run("a", lambda: 1, share=0.75) is None and attempts.run("b", lambda: 1) == 1
    assert attempts.failures == {"a": "left out, 1000 s are nearly over"}
    attempts.started -= 800
    assert take_turns({"a": lambda: 1.0}, 3, uncounted=0, attempts=attempts) == {"a": [1.0]}
    assert not Attempts(0).late()


def test_a_kernel_that_fails_leaves_the_others(monkeypatch, capsys):
    """In every part: its compilation in LayerNorm's, its first call in the head's and the products'."""
    def fails(*args, **options):
        raise RuntimeError("does not compile\nbecause of this")

    attempts, found = Attempts(), {}
    timed = functools.partial(_timed, rounds=1, device=CPU, attempts=attempts)
    monkeypatch.setattr(benchmark, "_ours", fails)
    monkeypatch.setattr(benchmark, "linear_cross_entropy", fails)
    monkeypatch.setattr(products.qkv_linear, "qkv_linear", fails)
    monkeypatch.setattr(products.gelu_mlp, "gelu_mlp", fails)
    for rows in (benchmark.measure(False, 4, 8, torch.float32, True, None, 1, CPU, 1e9, attempts),
                 benchmark.measure_head(4, 8, 16, torch.float32, None, 1, CPU, attempts),
                 products.measure(4, 8, torch.float32, False, CPU, timed)):
        for row in rows:
            found.setdefault(row["operation"], []).append(row["name"])
    assert found == {"forward": ["eager", "copy"], "backward": ["eager", "copy"], "head": ["eager"],
                     "MLP": ["eager"], "q, k, v": ["eager"]}
    assert set(attempts.failures.values()) == {"RuntimeError: does not compile"}
    assert {"forward 4 x 8, ours", "head 4 x 8, ours", "q, k, v 4 x 8, ours"} < set(attempts.failures)
    assert "\nhead 4 x 8, ours: RuntimeError: does not compile\n" in capsys.readouterr().out


@pytest.mark.parametrize("calls", range(1, 6))
def test_a_kernel_that_fails_later_has_no_row(calls):
    """In its second call, which wakes the GPU, or in a later round."""
    left = iter(range(calls))
    attempts = Attempts()
    found = _timed("cast", {"bad": lambda: next(left), "good": lambda: None}, 3, CPU, attempts)
    assert list(found) == (["good"] if calls < 5 else ["bad", "good"]) and len(found["good"]) == 3
    assert list(attempts.failures) == ["cast, bad"] * (calls < 5)


def test_checks_go_on_after_a_kernel_that_fails(monkeypatch):
    def fails(*args):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(fused_checks.qkv_linear, "qkv_linear", fails)
    monkeypatch.setattr(fused_checks, "check_adamw", fails)
    noted = []
    assert fused_checks.check(CPU, torch.bfloat16, [(8, 16, 32)], noted.append) == {"qkv", "adamw"}
    assert [f["good"] for f in noted[-1]] == [True] * 8 + [False] * 2


def test_rows_about_fp8():
    timed = functools.partial(_timed, rounds=1, device=CPU, attempts=Attempts())
    rows = fp8_products.measure(32, 16, 64, torch.bfloat16, CPU, timed, emulated=True)
    assert len(rows) == 11 * 9 + 18 + 2 * 5 and all(row["us"] > 0 for row in rows)


@pytest.mark.parametrize("compare, words", [
    ("fp8+gelu", "gelu and qkv have products in bfloat16, and FP8 replaces these"),
    ("fp8+fp8_emulated", "take one of fp8, fp8_emulated, torchao"),
])
def test_strategies_that_contradict_themselves(compare, words):
    with pytest.raises(UserError, match=words):
        parse(dict(compare=compare, mode="train", tp_processes=1, dropout=0.0))


@pytest.mark.parametrize("contenders, said", [("base,fp8+torchao", "take one of fp8, torchao"),
                                              ("torchao+qkv", "FP8 goes with none of qkv"),
                                              ("torchao_rowwise+fp8_head", "fp8_head and weight_gradients")])
def test_contenders_of_fused_step_have_one_kind_of_products(monkeypatch, contenders, said):
    monkeypatch.setattr(sys, "argv", ["fused_step.py", f"--contenders={contenders}"])
    monkeypatch.delitem(sys.modules, "benchmarks.fused_step", raising=False)
    with pytest.raises(UserError, match=said):
        importlib.import_module("benchmarks.fused_step").check_settings()
