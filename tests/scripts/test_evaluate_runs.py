"""evaluate.py as a user types it: every kind of model, another checkpoint, HellaSwag, GPT-2's weights; wrong
inputs, one line each; bits per byte in training logs. CPU; half a minute.

    python -m pytest tests/scripts/test_evaluate_runs.py
"""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from helpers import (
    HELLASWAG_RECORDS,
    TINY,
    build,
    needs_gpt2_tokenizer,
    random_model,
    random_speedrun_model,
    save_checkpoint,
    write_dataset,
    write_lines,
)

import models
import train_gpt_fast
from nanosync import hellaswag_eval
from nanosync.bits_per_byte import bits_per_byte
from nanosync.dataloader import evaluate, evaluation_batches, open_dataset
from nanosync.model_kind import model_description, schedule_description
from nanosync.run_log import RunLog

CPU = torch.device("cpu")
CLOCK = {"train_seconds": 1.0, "train_loss": 2.0, "last_val_loss": None, "last_val_step": None}
META = {"tokenizer": "other", "vocab_size": 61, "end_of_text": 7}
LINE = re.compile(r"val loss (\S+) \(standard error \S+\), bits per byte (\S+), on (\d+) windows of (\d+) "
                  r"tokens")


def fast_model():
    """A model of train_gpt_fast.py with an untied head, of which no parameter is zero."""
    torch.manual_seed(0)
    model = train_gpt_fast.GPT(train_gpt_fast.GPTConfig(
        sequence_length=16, vocab_size=61, n_layer=4, n_head=2, n_embd=16, windows=[3, 6], long_layers=[1, 3],
        value_layers=[0, 3], offset_layers=[0], end_of_text=7))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.untie()
    return model


def masked_model():
    """A dense model that was trained with document_mask."""
    model = random_model(torch.float32)
    model.end_of_text = 7
    return model


MODELS = {  # kind -> model, further entries of state.json
    "gpt": (masked_model, {"config": {"document_mask": True}}),
    "distributed_gpt": (lambda: build(dict(block_types=["spd"] * 4), 2, torch.float32), {}),
    "reduced_sync_gpt": (lambda: build(dict(sync_strategy="palm"), 2, torch.float32), {}),
    "speedrun_gpt": (lambda: random_speedrun_model("sync", torch.float32, tp_size=2, sync_points=[1],
                                                   sequence_length=16), {"variant": {}, **CLOCK}),
    "fast_gpt": (fast_model, {"untied": True, **CLOCK})}


@pytest.fixture
def val_data(tmp_path):
    tokens = np.random.RandomState(0).randint(0, 61, 403)
    tokens[::9] = 7
    return write_dataset(tmp_path / "set", tokens, tokens, 61, tokenizer="other", end_of_text=7,
                         bytes_per_token={"train": 3, "val": 4.5})


def save(folder, kind, val_data, **state):
    make, own = MODELS[kind]
    model = make().eval()
    own = own | {"config": {"dataset": str(val_data), **own.get("config", {})},
                 "schedule": schedule_description(model), "model": model_description(kind, model)}
    save_checkpoint(folder, 1, model, **{"meta": META} | own | state)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_val_loss_is_that_of_training_for_every_kind(run_script, tmp_path, val_data, kind):
    model = save(tmp_path / "out", kind, val_data)
    data = open_dataset(str(val_data), 16)
    with torch.no_grad():
        expected = evaluate(model, evaluation_batches(data.val, 25, 4, CPU))
    assert kind in models.INFERENCE_KINDS
    done = run_script("evaluate.py", "out", "--device=cpu", "--batch_size=7", "--json=result.json")
    assert (done.code, done.err) == (0, "")
    found = LINE.fullmatch(done.out.splitlines()[1])
    assert float(found[1]) == pytest.approx(expected, abs=6e-5) and found.group(3, 4) == ("25", "16")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["val"]["loss"] == pytest.approx(expected, rel=1e-6)  # fp32
    assert written["val"]["bytes_per_token"] == 4.5
    assert written["val"]["bits_per_byte"] == pytest.approx(bits_per_byte(expected, 4.5), rel=0.2)
    assert written["weights"] == "out/ckpt/step-00000001" and written["config"]["batch_size"] == 7


def test_data_that_changed_since_training_is_a_warning(run_script, tmp_path, val_data):
    save(tmp_path / "out", "gpt", val_data, data={"train_tokens": 403, "val_tokens": 5, "sha256": None})
    for args, expected in (((), 1), ((f"--dataset={val_data}",), 0)):
        done = run_script("evaluate.py", "out", "--device=cpu", "--val_windows=1", *args)
        assert (done.code, done.err) == (0, "")
        assert done.out.count(f"warning: {val_data} has changed since out/ckpt/step-00000001 was") == expected
        assert "val loss" in done.out and "standard error" not in done.out  # of one window


def test_against_another_schedule_of_the_same_weights(run_script, tmp_path, val_data):
    model = save(tmp_path / "out", "distributed_gpt", val_data)
    other = models.with_ranks(model, 2, ["tp"] * 4).eval()
    data = open_dataset(str(val_data), 16)
    losses = [evaluate(m, evaluation_batches(data.val, 20, 4, CPU)) for m in (other, model)]
    done = run_script("evaluate.py", "out", "--against=out/ckpt/step-00000001", "--device=cpu",
                      "--val_windows=20", "--block_types=['tp']*4", "--json=result.json")
    assert (done.code, done.err) == (0, "")
    assert "was trained as 4 syncs on 2 ranks and is run as the dense function" in done.out
    assert "val loss, difference in 20 pairs of windows: " in done.out and "95% interval" in done.out
    written = json.loads((tmp_path / "result.json").read_text())
    difference = written["difference"]["val"]["loss"]
    assert difference["mean"] == pytest.approx(losses[0] - losses[1], abs=1e-5) and difference["n"] == 20
    assert difference["interval"][0] < difference["mean"] < difference["interval"][1]
    assert written["val"]["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert written["against"]["val"]["loss"] == pytest.approx(losses[1], rel=1e-6)
    assert written["difference"]["hellaswag"] is None


def test_hellaswag_and_weights_of_a_hugging_face_folder(run_script, tmp_path):
    """Without val loss; the dense weights and a schedule that drops syncs."""
    needs_gpt2_tokenizer()
    shape = dict(vocab_size=50304, used_vocab_size=50257, n_embd=8, block_size=32)
    model = random_model(torch.float32, **shape).eval()
    model.save_pretrained(str(tmp_path / "hf"))
    records = [HELLASWAG_RECORDS[i % 4] | {"label": label} for i in range(4) for label in range(2)]
    path = write_lines(tmp_path / "x.jsonl", records)
    examples = hellaswag_eval.load(path)
    expected = [hellaswag_eval.accuracy(m, examples, 8, CPU)
                for m in (models.with_ranks(model, 2, ["parallel"] * 2), model)]
    done = run_script("evaluate.py", "--init_from=hf", "--tp_size=2", "--block_types=['parallel']*2",
                      "--against=hf", "--hellaswag", f"--hellaswag_input={path}", "--val_windows=0",
                      "--device=cpu", "--json=result.json")
    assert (done.code, done.err) == (0, "")
    written = json.loads((tmp_path / "result.json").read_text())
    for found, of in zip((written, written["against"]), expected):
        assert {key: found["hellaswag"][key] for key in of} == of and found["val"] is None
    difference = written["difference"]["hellaswag"]["acc_norm"]
    assert difference["mean"] == pytest.approx(expected[0]["acc_norm"] - expected[1]["acc_norm"])
    assert f"McNemar's p {difference['p']:.2g}" in done.out


@pytest.mark.parametrize("args, state, words", [
    (["out", "--dataset=none"], {}, "no data set 'none'"),
    (["missing"], {}, "'missing' is neither a folder nor one of gpt2"),
    (["out"], {"config": {}}, "does not say on which data it was trained: add --dataset="),
    (["out"], {"config": {"dataset": 5}}, "does not say on which data it was trained: add --dataset="),
    (["out", "--block_size=17"], {}, "block_size=17 is longer than the longest sequence of the models, 16"),
    (["out", "--block_size=500"], {}, "block_size=500 needs 501 tokens"),
    (["out"], {"meta": META | {"vocab_size": 60}}, "tokens with vocab_size=60 and"),
    (["out", "--against=nowhere"], {}, "'nowhere' is neither a folder nor one of gpt2"),
    (["out", "--against=out", "--against_step=7"], {}, "out has no checkpoint '7'; it has the steps 1"),
    (["out", "--hellaswag"], {}, "HellaSwag needs GPT-2's"),
    (["out", "--tp_processes=2"], {}, "tp_processes=2 does not divide the number of processes, 1"),
], ids=str)
def test_wrong_inputs_are_one_line(run_script, tmp_path, val_data, args, state, words):
    save(tmp_path / "out", "gpt", val_data, **state)
    done = run_script("evaluate.py", *args, "--device=cpu", "--json=result.json")
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("script, settings", [
    ("train.py", [*TINY, "--max_iters=4", "--eval_interval=4", "--eval_iters=7"]),
    ("train_gpt.py", ["--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32",
                      "--sequence_length=16", "--batch_size=4", "--device_batch_size=4", "--num_iterations=4",
                      "--warmdown_iters=2", "--val_loss_every=4", "--val_tokens=400"])])
def test_training_logs_have_the_bits_per_byte(run_script, tmp_path, script, settings):
    """At the end of the line and in the event, where the data set knows its bytes per token."""
    tokens = np.random.RandomState(0).randint(0, 61, 403)
    data = write_dataset(tmp_path / "set", tokens, tokens, 61, bytes_per_token={"train": 3.0, "val": 4.5})
    done = run_script(script, *settings, f"--dataset={data}", "--out_dir=out")
    assert done.code == 0, done.err
    found = re.findall(r"^(?:step 4: .*val loss |step:4/4 val_loss:)(\d\.\d{4}).* ?bits[_ ]per[_ ]byte[: ]"
                       r"(\d\.\d{4})$", done.out, re.MULTILINE)
    event = RunLog.read(str(tmp_path / "out")).of("eval")[-1]
    assert event["bits_per_byte"] == bits_per_byte(event["val_loss"], 4.5)
    assert found == [(f"{event['val_loss']:.4f}", f"{event['bits_per_byte']:.4f}")]
    done = run_script("evaluate.py", "out", "--device=cpu", "--json=result.json")
    assert done.code == 0, done.err
    val = json.loads((tmp_path / "result.json").read_text())["val"]
    assert val["loss"] == pytest.approx(event["val_loss"], rel=1e-6)  # fp32
    assert val["bits_per_byte"] == pytest.approx(event["bits_per_byte"], rel=1e-6)


LIBRARY = {  # a library with one task, which asks for the log-probabilities of two continuations
    "__init__.py": """
def simple_evaluate(model, tasks, num_fewshot, limit, task_manager, log_samples):
    try:
        import evaluate  # a metric's package, which need not be installed
    except ImportError:
        evaluate = None
    assert not hasattr(evaluate, "losses_of") and (num_fewshot, limit) == (2, 7) and model.world_size == 1
    requests = [type("Request", (), {"args": ("AB", of)}) for of in ("C", "DE")]
    scores = [score for score, greedy in model.loglikelihood(requests)]
    return {"results": {name: {"alias": name, "first,none": scores[0], "second,none": scores[1],
                               "second_stderr,none": 0.5, "sample_len": 2} for name in tasks}}
""",
    "tasks.py": """
class TaskManager:
    def __init__(self, include_path):
        self.known = ["tiny"] + ["own"] * (include_path == "mine")
    def match_tasks(self, names):
        return [name for name in self.known if name in names]
""",
    "api/__init__.py": "", "api/model.py": """
class LM:
    def __init__(self):
        self.world_size = 1
"""}


def test_tasks_of_the_library(run_script, tmp_path, val_data):
    """A stand-in for the library: evaluate.py must not become the package `evaluate`; unknown tasks."""
    for name, text in LIBRARY.items():
        path = tmp_path / "site" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    model = save(tmp_path / "out", "gpt", val_data, meta=json.loads((val_data / "meta.json").read_text())
                 | {"tokenizer": "char"})
    options = ("out", "--val_windows=0", "--device=cpu", "--lm_eval_fewshot=2", "--lm_eval_limit=7",
               "--json=result.json")
    use = "import sys; sys.path.insert(0, 'site')"
    (tmp_path / "mine").mkdir()
    (tmp_path / "use_site.py").write_text(use + "\n")
    done = run_script("evaluate.py", *options, "use_site.py", "--lm_eval=tiny,own", "--lm_eval_path=mine")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "result.json").read_text())["lm_eval"]
    with torch.no_grad():
        scores = model.head(model.hidden(torch.tensor([[0, 1, 3]])))[0, 1:].log_softmax(-1)
    expected = {"first": scores[0, 2].item(), "second": (scores[0, 3] + scores[1, 4]).item(),
                "second_stderr": 0.5}
    assert found == {"tiny": pytest.approx(expected, abs=1e-5), "own": pytest.approx(expected, abs=1e-5)}
    assert f"lm_eval tiny: first {expected['first']:.4f}, second {expected['second']:.4f} " \
           f"(standard error 0.5000)\n" in done.out
    done = run_script("evaluate.py", *options, "use_site.py", "--lm_eval=tiny,own,third")
    assert done.code == 2 and "has no task own, third: `lm_eval ls tasks` lists its tasks" in done.err
    done = run_script("evaluate.py", *options, "--lm_eval=tiny")
    assert (done.code == 2 and "pip install lm_eval, or leave lm_eval out" in done.err) or \
        importlib.util.find_spec("lm_eval")
