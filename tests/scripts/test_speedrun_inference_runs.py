"""sample.py and hellaswag.py on what the speedrun scripts trained, as a user types them. CPU; half a minute.

    python -m pytest tests/scripts/test_speedrun_inference_runs.py
"""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from helpers import HELLASWAG_RECORDS, needs_gpt2_tokenizer, save_checkpoint, write_dataset, write_lines
from helpers import random_speedrun_model as baseline_model

import models
from nanosync.model_kind import model_description

FAST = ["--device=cpu", "--compile=False", "--n_layer=3", "--n_head=1", "--n_embd=16", "--sequence_length=64",
        "--batch_sizes=[1,2]", "--stage_shares=[0.5,0.5]", "--short_windows=[4,8]", "--long_windows=[8,16]",
        "--stage_rates=[1.0,1.0]", "--eval_windows=[8,20]", "--num_iterations=3", "--val_loss_every=0",
        "--val_tokens=64", "--untie_at=0.5", "--suffix_match=True",
        "--trigram=True"]
SAMPLE = ["--device=cpu", "--num_samples=1", "--max_new_tokens=90"]
CLOCK = {"train_seconds": 1.0, "train_loss": 2.0, "last_val_loss": None, "last_val_step": None}


def test_what_train_gpt_fast_trained(run_script, tmp_path):
    """Trained, sampled past its sequence length, evaluated; the same by the path of its checkpoint."""
    needs_gpt2_tokenizer()
    random = np.random.RandomState(0)
    idx = np.where(random.rand(1500) < 0.05, 50256, random.randint(0, 5000, 1500))
    write_dataset(tmp_path / "set", idx[:1000], idx[1000:], 50257, tokenizer="gpt2")
    done = run_script("train_gpt_fast.py", *FAST, f"--dataset={tmp_path / 'set'}", "--out_dir=out")
    assert done.code == 0, done.err
    state = json.loads((tmp_path / "out" / "ckpt" / "step-00000003" / "state.json").read_text())
    assert state["untied"] and state["model"]["config"]["end_of_text"] == 50256
    done = run_script("sample.py", "out", *SAMPLE, "--start=Once upon<|endoftext|>a", "--slide=32")
    assert done.code == 0, done.err
    first, text = done.out.split("\n", 1)
    assert re.fullmatch(r"out/ckpt/step-00000003: step 3, val loss \d+\.\d{4}", first)
    assert text.startswith("Once upon<|endoftext|>a") and text.endswith("\n---------------\n")
    path = write_lines(tmp_path / "x.jsonl", HELLASWAG_RECORDS)
    results = []
    for source in ("out", "--init_from=out/ckpt/step-00000003"):
        done = run_script("hellaswag.py", source, f"--input={path}", "--device=cpu", "--json=result.json")
        assert done.code == 0 and "HellaSwag: acc " in done.out, done.err
        results.append(json.loads((tmp_path / "result.json").read_text()))
    assert results[0]["acc"] == results[1]["acc"] and results[0]["n"] == len(HELLASWAG_RECORDS)


@pytest.mark.parametrize("variant, changes", [("sync", dict(tp_size=2, sync_points=[1])), ("palm", {})])
def test_what_train_gpt_trained(run_script, tmp_path, variant, changes):
    needs_gpt2_tokenizer()
    model = baseline_model(variant, torch.float32, **changes, vocab_size=50304, used_vocab_size=50257)
    save_checkpoint(tmp_path / "out", 1, model, model=model_description(models.SPEEDRUN, model), variant={},
                    meta={"tokenizer": "gpt2", "vocab_size": 50257}, **CLOCK)
    done = run_script("sample.py", "out", *SAMPLE, "--start=Once", "--max_new_tokens=40")
    assert done.code == 0 and "\nOnce" in done.out, done.err
    path = write_lines(tmp_path / "x.jsonl", HELLASWAG_RECORDS)
    done = run_script("hellaswag.py", "--out_dir=out", f"--input={path}", "--device=cpu")
    assert done.code == 0 and "on 4 examples" in done.out, done.err


@pytest.mark.parametrize("script, args, config, words", [
    ("sample.py", ["--tp_size=2"], {}, "tp_size=2 is for models of train.py and train_reduced_sync.py"),
    ("hellaswag.py", ["--block_types=['spd']*3"], {}, "is from train_gpt.py: leave block_types out"),
    ("sample.py", [], {"n_layer": 10**9}, "n_layer=1000000000 is above"),
    ("hellaswag.py", [], {}, "HellaSwag needs GPT-2's"),
    ("sample.py", [], {"used_vocab_size": 10**6}, "between 1 and vocab_size=61")])
def test_what_cannot_be_done_is_one_line(run_script, tmp_path, script, args, config, words):
    model = baseline_model(dtype=torch.float32)
    description = {"kind": models.SPEEDRUN, "config": dataclasses.asdict(model.config) | config}
    save_checkpoint(tmp_path / "out", 1, model, model=description, variant={},
                    meta={"tokenizer": "char", "vocab_size": 3, "chars": "ABC"}, **CLOCK)
    done = run_script(script, "out", "--device=cpu", *args)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
