"""Settings of the training scripts: their configuration files. CPU; seconds.

    python -m pytest tests/unit/test_settings.py
"""

import pytest
from helpers import ROOT

from configurator import Config, read_settings, run_config_file


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.stem)
def test_config_files_have_only_known_keys_and_right_types(path):
    script = ROOT / ("train_reduced_sync.py" if "sync" in path.stem else "train.py")
    namespace = {"__file__": str(script)}
    source = script.read_text()
    exec(source[source.index("# ----"):source.index("config = configure")], namespace)
    settings = {s.name: s for s in read_settings(namespace)}
    values = run_config_file(str(path), {name: namespace[name] for name in settings}, settings)
    heads = values.get("n_head", namespace["n_head"])
    if values.get("model_type") == "distributed_gpt":
        assert heads % 12 == 0  # --tp_size=2, 3, 4 and 6 work
    assert values and isinstance(Config(values, dict.fromkeys(values, "")).table(), str)
