"""Settings of the training scripts: their configuration files. CPU; seconds.

    python -m pytest tests/unit/test_settings.py
"""

import re

import pytest
import torch
from helpers import ROOT, random_model

from configurator import Config, read_settings, run_config_file, script_defaults
from nanosync import training_setup
from nanosync.distributed import Processes
from nanosync.parallelism import Parallelism


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.stem)
def test_config_files_have_only_known_keys_and_right_types(path):
    script = ROOT / ("train_reduced_sync.py" if "sync" in path.stem else
                     "train_gpt_fast.py" if path.stem.startswith("fast") else "train.py")
    namespace = {"__file__": str(script)}
    source = script.read_text()
    exec(re.split("^# -{9,}$", source, flags=re.MULTILINE)[1].split("config = configure")[0], namespace)
    settings = {s.name: s for s in read_settings(namespace)}
    values = run_config_file(str(path), {name: namespace[name] for name in settings}, settings)
    heads = values.get("n_head", namespace["n_head"])
    if values.get("model_type") == "distributed_gpt":
        assert heads % 12 == 0  # --tp_size=2, 3, 4 and 6 work
    assert values and isinstance(Config(values, dict.fromkeys(values, "")).table(), str)


@pytest.mark.parametrize("script", ["train.py", "train_reduced_sync.py"])
@pytest.mark.parametrize("given, kernels_run, used", [("auto", True, True), ("auto", False, False),
                                                      (True, False, True), (False, True, False)])
def test_use_triton(monkeypatch, script, given, kernels_run, used):
    """'auto', the default, is on where the kernels run."""
    assert script_defaults(str(ROOT / script))["use_triton"] == "auto"
    monkeypatch.setattr(training_setup, "usable", lambda tensor: kernels_run)
    monkeypatch.setattr(training_setup, "parallelism_of", lambda config, processes, dtype: processes)
    config = script_defaults(str(ROOT / script)) | {"use_triton": given, "device": "cpu", "compile": False}
    monkeypatch.setattr(training_setup, "start", lambda *args: Processes(0, 1, 0, torch.device("cpu"), None))
    training_setup.start_processes(config, {})
    assert config["use_triton"] is used
    config |= {"use_triton": given, "fp8": "emulated", "compile": True}
    monkeypatch.setattr(training_setup, "check_compile", lambda device: None)
    training_setup.start_processes(config, {})
    # with FP8 the compiler fuses casts into its own LayerNorm
    assert config["use_triton"] is (used and given != "auto")


@pytest.mark.parametrize("least, line", [
    (1, "Wrapping model with FSDP... 2 units of layers"),
    (2e4, "Wrapping model with FSDP... 1 unit of layers"),
    (1e9, "Wrapping model with FSDP... 0 units of layers: the whole model is one unit, as all layers "
          "together have fewer than fsdp_min_num_params=1e+09 parameters"),
])
def test_units_of_fsdp_are_described(least, line):
    two = Processes(0, 2, 0, torch.device("cpu"), None, dp_size=2)
    parallel = Parallelism(two, torch.float32, fsdp=True, min_num_params=least)
    assert parallel.describe(random_model()) == [line]
