"""evaluate.py on two processes: windows divided over models, and real TP ranks of one model. CPU, gloo.

    python -m pytest tests/processes/test_evaluate_processes.py
"""

import json

import numpy as np
import pytest
import torch
from helpers import build, save_checkpoint, torchrun, write_dataset

from nanosync.model_kind import model_description, schedule_description


def test_processes_get_the_figures_of_one_process(run_script, tmp_path):
    """25 windows on two processes, in pairs with another model; one model on two real ranks."""
    tokens = np.random.RandomState(0).randint(0, 61, 403)
    folder = write_dataset(tmp_path / "set", tokens, tokens, 61)
    state = {"meta": json.loads((folder / "meta.json").read_text()), "config": {"dataset": "./set"}}
    for schedule, kind in ((dict(block_types=["spd"] * 4), "distributed_gpt"), (None, "gpt")):
        model = build(schedule, 2, torch.float32)
        save_checkpoint(tmp_path / kind, 1, model, schedule=schedule_description(model),
                        model=model_description(kind, model), **state)
    options = ("distributed_gpt", "--against=gpt", "--device=cpu", "--batch_size=3", "--json=result.json")
    alone, results = run_script("evaluate.py", *options), []
    assert (alone.code, alone.err) == (0, "")
    results.append(json.loads((tmp_path / "result.json").read_text()))
    for further in ((), ("--tp_processes=2",)):
        done = torchrun(2, "evaluate.py", *options, *further, cwd=tmp_path)
        assert done.code == 0, done.err
        assert [line.split(",")[0] for line in done.out.splitlines()] == \
            [line.split(",")[0] for line in alone.out.splitlines()]
        results.append(json.loads((tmp_path / "result.json").read_text()))
    for found in results[1:]:
        for mine, theirs in ((found, results[0]), (found["against"], results[0]["against"])):
            assert mine["val"].pop("dataset") == "./set" and theirs["val"].pop("dataset", "./set") == "./set"
            assert mine["val"] == pytest.approx(theirs["val"], rel=1e-6)  # fp32
        difference = [of["difference"]["val"]["loss"] for of in (found, results[0])]
        assert difference[0]["mean"] == pytest.approx(difference[1]["mean"], abs=1e-6)
        assert difference[0]["interval"] == pytest.approx(difference[1]["interval"], abs=1e-6)
