"""Checkpoints of each kind of model, loaded as every other kind. CPU; seconds.

    python -m pytest tests/unit/test_model_kinds.py
"""

import json

import pytest
import torch
from helpers import ARCHITECTURE, build, save_checkpoint, tokens
from helpers import MODEL_VARIANTS as VARIANTS

from models import weights
from nanosync import checkpoint, model_kind


@pytest.mark.parametrize("source", VARIANTS)
def test_a_checkpoint_becomes_any_kind(source, tmp_path):
    """Through files: saved as one kind, loaded as itself and as every other, at other tp_sizes."""
    model = build(VARIANTS[source], 2, torch.float32)
    save_checkpoint(tmp_path, 1, model, model=model_kind.model_description(source, model),
                    schedule=model_kind.schedule_description(model))
    loaded = weights.load_model(checkpoint.find(str(tmp_path)))
    assert type(loaded) is type(model) and loaded.config == model.config
    idx = tokens(2, 16)
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    for kind, fields in VARIANTS.items():
        for R in (1,) if kind == "gpt" else (1, 2, 4):
            options = {} if kind == "gpt" else dict(fields, tp_size=R)
            other = weights.as_kind(loaded, kind, **options)
            assert torch.equal(other(idx)[0], build(fields, R, torch.float32)(idx)[0]), (kind, R)
    assert ARCHITECTURE["n_layer"] == loaded.config.n_layer


@pytest.mark.parametrize("strategy", ["spd", "ladder", "kraken", "caat:0.5"])
def test_a_schedule_is_described_as_json_reads_it(strategy):
    """So that the same schedule is not reported as another when a checkpoint is run."""
    described = model_kind.schedule_description(build(dict(sync_strategy=strategy), 2))
    assert json.loads(json.dumps(described)) == described
    assert str(json.loads(json.dumps(described))) == str(described)
    assert ("channels" in described) == (strategy != "spd")


@pytest.mark.parametrize("strategy, tp_size, dense", [
    ("standard", 2, True), ("spd", 2, False), ("spd", 1, True), ("ladder", 2, False), ("ladder", 1, False),
    ("caat:0.5", 2, False)])
def test_the_dense_function_is_known_by_its_schedule(strategy, tp_size, dense):
    described = model_kind.schedule_description(build(dict(sync_strategy=strategy), tp_size))
    assert weights.is_dense(described, tp_size) is dense and weights.is_dense(None, 1)
