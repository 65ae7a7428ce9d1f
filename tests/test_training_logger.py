"""What a run writes, and the peaks that MFU is a share of. CPU; seconds.

    python -m pytest tests/test_training_logger.py
"""

import json
import sys

import pytest
import torch

from configurator import UserError
from training_logger import TrainingLogger, named_peak_flops, peak_flops


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
    ("NVIDIA A10", None, None),
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
    ("AMD Instinct MI300X", None, None),
])
def test_peaks_by_name(name, bf16, fp32):
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        peak = named_peak_flops(name, dtype)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12))


def test_peaks_in_fp16():
    assert named_peak_flops("Tesla V100-SXM2-16GB", torch.float16) == pytest.approx(125e12)
    assert named_peak_flops("Tesla V100-PCIE-16GB", torch.float16) == pytest.approx(112e12)
    assert named_peak_flops("Tesla V100S-PCIE-32GB", torch.float16) is None
    assert peak_flops(torch.device("cpu"), torch.float16) is None


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_losses_that_json_does_not_have(tmp_path):
    log = TrainingLogger()
    log.open_files(str(tmp_path), {}, {})
    log.evaluation(1, float("nan"), float("inf"), 1e-3)
    log.iteration(1, float("nan"), 1e-3, float("-inf"), 0.1, 64, None, 0)
    log.close(best_val_loss=float("inf"))
    lines = next(tmp_path.glob("run_*.jsonl")).read_text().splitlines()
    _, evaluation, iteration, end = (json.loads(line, parse_constant=no_constant) for line in lines)
    assert evaluation["train_loss"] is evaluation["val_loss"] is end["best_val_loss"] is None
    assert iteration["loss"] is iteration["norm"] is None and iteration["lr"] == 1e-3
    assert "train loss nan, val loss inf" in (tmp_path / "log.txt").read_text()


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
    log.open_files(str(tmp_path / "out"), {}, {})
    log.start_wandb("p", "n", {})
    log.line("x")
    log.evaluation(1, 2.0, 2.0, 1e-3)
    log.close()
    assert not capsys.readouterr().out and not (tmp_path / "out").exists()


def test_wandb_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or use --wandb_log=False"):
        TrainingLogger().start_wandb("project", "name", {})
