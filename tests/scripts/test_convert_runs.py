"""convert.py as a user runs it: nanoGPT's files and GPT-2 folders become runs that resume; exported models of
all kinds and tokenizers in a pipeline of transformers, in a process without a network. CPU; a minute.

    python -m pytest tests/scripts/test_convert_runs.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nanogpt
import pytest
import torch
from helpers import build, events, random_model
from helpers import random_speedrun_model as speedrun_model
from saved_models import TOKENIZERS, fast_model, gpt2_folder, save

from models.conversion import Options, convert
from nanosync import tokenizers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PROMPT = "ld f(x) "  # each tokenizer has its characters
LENGTH = 12  # new tokens
SMALL = dict(n_layer=2, n_head=2, n_embd=16)

# Runs in a fresh process. Any connection is an error.
PIPELINE = """
import json, socket, sys
def refuse(*args, **options):
    raise OSError("this process has no network")
socket.socket.connect = socket.getaddrinfo = refuse
from transformers import pipeline
texts = {}
for folder in sys.argv[3:]:
    generate = pipeline("text-generation", model=folder, trust_remote_code=True)
    result, = generate(sys.argv[1], max_new_tokens=int(sys.argv[2]), do_sample=False)
    texts[folder] = result["generated_text"]
    if type(generate.model).__name__ == "GPT2LMHeadModel":
        generate(sys.argv[1])  # by default up to 256 tokens, and the model has 24 positions
print(json.dumps(texts))
"""


def exported(folder: Path) -> dict[str, tuple]:
    """Export models with each tokenizer, and of each kind; return folder -> (model, tokenizer)."""
    kinds = dict.fromkeys(("char", "byte", "bpe"), random_model)
    kinds |= {"gpt2": random_model} if "TIKTOKEN_CACHE_DIR" in os.environ else {}
    kinds |= {"spd": None, "speedrun": speedrun_model, "fast": fast_model}
    found = {}
    for name, make in kinds.items():
        tokenizer = TOKENIZERS[name if name in TOKENIZERS else "bpe"]()
        shape = SMALL | {"vocab_size": tokenizer.vocab_size}
        if name == "spd":
            model = build(dict(sync_strategy="spd"), 2, torch.float32, **shape, block_size=24)
        elif make is random_model:
            model = make(torch.float32, **shape, block_size=24)
        else:
            model = make(dtype=torch.float32, vocab_size=tokenizer.vocab_size, sequence_length=24)
        out = save(folder / f"out-{name}", model.eval(), meta=tokenizer.meta())
        convert(out, str(folder / name), None, Options("latest"))
        found[str(folder / name)] = model, tokenizer
    return found


def test_pipelines_without_a_network(tmp_path):
    cases = exported(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", PIPELINE, PROMPT, str(LENGTH), *cases], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")})
    assert result.returncode == 0, result.stderr
    texts = json.loads(result.stdout.splitlines()[-1])
    for folder, (model, tokenizer) in cases.items():
        idx = torch.tensor(tokenizer.encode(PROMPT).astype("int64"))[None]
        ids = model.generate(idx, LENGTH, temperature=0.0)[0].tolist()
        end = tokenizers.end_of_text(tokenizer.meta())
        ids = ids[:ids.index(end)] if end in ids else ids  # where the pipeline ends
        unfinished = tokenizers.UNKNOWN  # of a character whose bytes are not all there yet
        assert texts[folder].rstrip(unfinished) == tokenizer.decode(ids).rstrip(unfinished), folder


def test_nanogpt_resumes_and_samples(run_script, tiny_data, tmp_path):
    model, optimizer = nanogpt.trained(8, vocab_size=26, **SMALL, block_size=16)
    content = nanogpt.content_of(model, optimizer, 8)
    torch.save(content | {"config": nanogpt.SETTINGS | {"eval_interval": 8}}, tmp_path / "ckpt.pt")
    result = run_script("convert.py", "ckpt.pt", "mine", f"--dataset={tiny_data}")
    assert result.code == 0 and "resume: python train.py mine/settings.py" in result.out, result.err
    result = run_script("train.py", "mine/settings.py", "--out_dir=mine", "--resume=latest", "--device=cpu",
                        "--compile=False", "--max_iters=10")
    assert result.code == 0, result.err
    assert "step 8, epoch 0, val loss 1.5000" in result.out and "step 8: train loss" in result.out
    updates = [(e["step"], e["lr"]) for e in events(tmp_path / "mine", "iter")]
    assert [step for step, _ in updates] == [8, 9] and all(9e-4 < lr < 1e-3 for _, lr in updates)
    result = run_script("sample.py", "mine", "--num_samples=1", "--max_new_tokens=5", "--start=ABC",
                        "--device=cpu")
    assert result.code == 0 and "\nABC" in result.out


def test_any_data_set_if_the_data_set_is_unknown(run_script, tiny_data, tmp_path):
    gpt2_folder(tmp_path / "hf")
    assert run_script("convert.py", "hf", "mine").code == 0
    result = run_script("train.py", "--out_dir=mine", "--resume=latest", "--device=cpu", "--compile=False",
                        "--max_iters=2", f"--dataset={tiny_data}", "--batch_size=2", "--eval_iters=1",
                        "--gradient_accumulation_steps=1", "--optimizer=muon")
    assert result.code == 0, result.err
    assert "step 0, epoch 0, best val loss n/a" in result.out and "step 2: train loss" in result.out


def test_nanogpt_straight_to_transformers(run_script, tiny_data, tmp_path):
    model, optimizer = nanogpt.trained(8, vocab_size=26, **SMALL, block_size=16)
    torch.save(nanogpt.content_of(model, optimizer, 8), tmp_path / "ckpt.pt")
    result = run_script("convert.py", "ckpt.pt", "hf", f"--dataset={tiny_data}", "--to=huggingface")
    assert result.code == 0 and "resume" not in result.out and "AdamW" not in result.out, result.err
    assert {"tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "hf").iterdir()}
    result = run_script("sample.py", "hf", "--num_samples=1", "--max_new_tokens=5", "--start=ABC")
    assert result.code == 0 and result.out.startswith("ABC"), result.err


def test_an_imported_speedrun_model_is_not_resumed(run_script, tiny_data, tmp_path):
    convert(save(tmp_path / "out", speedrun_model(dtype=torch.float32)), str(tmp_path / "hf"), None,
            Options("latest"))
    convert(str(tmp_path / "hf"), str(tmp_path / "back"), None, Options())
    result = run_script("train_gpt.py", "--out_dir=back", "--resume=latest", f"--dataset={tiny_data}")
    assert result.code == 2 and "was converted from a folder of weights" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("args, words", [
    (["gone", "new"], "gone does not exist: give one of a checkpoint of this repository, a"),
    (["notes.txt", "new"], "notes.txt is none of"), (["one"], "the following arguments are required: OUT"),
    (["ckpt.pt", "new", "--to=onnx"], "--to=onnx is not a format that is written: use checkpoint or"),
    (["ckpt.pt", "new", "--to=nanogpt"], "--to=nanogpt is not a format that is written"),
    (["ckpt.pt", "full"], "full is not empty: name a new folder"),
    (["ckpt.pt", "new", "--dataset=none"], "no data set 'none'"), (["meta.pkl", "new"], "cannot read meta"),
    (["ckpt.pt", "notes.txt/new"], "cannot be a folder"),
    (["ckpt.pt", "new", "--moments=old"], "invalid choice"),
    (["meta.pkl", "new", "--to=checkpoint"], "is a vocabulary, which becomes a meta.json"),
    (["ckpt.pt", "new", "--step=3"], "--step is for a checkpoint of this repository, and ckpt.pt is nano"),
    (["ckpt.pt", "new", "--momets=new"], "unrecognized arguments"),
])
def test_wrong_inputs(run_script, tmp_path, args, words):
    nanogpt.write(tmp_path / "ckpt.pt")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    before = sorted(tmp_path.rglob("*"))
    result = run_script("convert.py", *args)
    assert result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert words in result.err and result.out == "" and sorted(tmp_path.rglob("*")) == before
