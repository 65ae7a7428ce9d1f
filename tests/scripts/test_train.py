"""train.py, sample.py and bench.py as a user runs them, on a tiny data set. CPU; a minute.

    python -m pytest tests/scripts/test_train.py
"""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import PATIENCE, ROOT, TINY, events, save_checkpoint, write_dataset

from model import GPT, GPTConfig
from models import weights
from nanosync import checkpoint


@pytest.fixture
def train(run_script, tiny_data, tmp_path):
    """train(*args) runs train.py on the tiny data set, into tmp_path/out."""

    def run(*args, **kwargs):
        return run_script("train.py", *TINY, f"--dataset={tiny_data}", f"--out_dir={tmp_path / 'out'}", *args,
                          **kwargs)

    return run


def test_a_run(train, tmp_path):
    done = train("--max_iters=30", "--eval_interval=10", "--log_interval=5", "--learning_rate=1e-2")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    evaluations = [line for line in lines
                   if re.fullmatch(r"step \d+: train loss \d\.\d{4}, val loss \d\.\d{4}", line)]
    assert [int(line.split()[1][:-1]) for line in evaluations] == [0, 10, 20, 30]
    iterations = [line for line in lines if re.fullmatch(
        r"iter \d+: loss \d\.\d{4}, lr \d\.\de-\d\d, norm \d+\.\d\d, time \d+\.\d\dms, tok/s \d+, "
        r"mfu n/a, epoch \d", line)]
    assert [int(line.split()[1][:-1]) for line in iterations] == [0, 5, 10, 15, 20, 25]
    assert "tokens per iteration: 4 sequences x 16 tokens x 1 accumulation x 1 DDP rank = 64" in lines
    assert lines.count("settings, with where they differ from the script's:") == 1
    out = tmp_path / "out"
    text = (out / "log.txt").read_text()
    assert all(line in text for line in evaluations + iterations)
    assert [e["step"] for e in events(out, "eval")] == [0, 10, 20, 30]
    assert [e["step"] for e in events(out, "checkpoint")] == checkpoint.steps_in(str(out)) == [10, 20, 30]
    assert events(out, "start")[0]["config"]["learning_rate"] == 1e-2 and len(events(out, "end")) == 1
    state = checkpoint.find(str(out)).state
    assert state["sample"] == 30 * 4 and state["config"]["batch_size"] == 4
    assert state["meta"]["vocab_size"] == 26
    first, last = (float(line.split()[-1]) for line in (evaluations[0], evaluations[-1]))
    assert first == pytest.approx(3.26, abs=0.05) and last < 2.0  # ln 26 at the beginning


def test_golden_curve(train):
    """The losses of a fixed run. They change only when the function computed does; the commit says why."""
    done = train("--max_iters=40", "--log_interval=8", "--learning_rate=1e-2", "--seed=1")
    # fp32 sums differ between CPUs by about 1e-6 an update
    assert done.losses == pytest.approx([3.2709, 2.3759, 1.8325, 1.5710, 1.4975], abs=5e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resume_is_exact(train, tmp_path, dropout):
    """20 updates at once, or 10 and 10 more in a new process: the same parameters and moments to the bit."""
    options = ("--eval_interval=10", f"--dropout={dropout}", "--learning_rate=1e-2")
    assert train("--max_iters=20", *options).code == 0
    whole = checkpoint.find(str(tmp_path / "out"))
    losses = [e["loss"] for e in events(tmp_path / "out", "iter")]
    again = train("--max_iters=10", *options)
    assert "moved the checkpoints of an earlier run to" in again.out
    resumed = train("--max_iters=20", "--init_from=resume", *options)
    assert resumed.code == 0 and "step 10:" not in resumed.out
    assert [e["loss"] for e in events(tmp_path / "out", "iter")] == losses  # the log goes on, too
    assert [e["step"] for e in events(tmp_path / "out", "eval")] == [0, 10, 20]
    parts = checkpoint.find(str(tmp_path / "out"))
    earlier = next((tmp_path / "out").glob("earlier-*/ckpt/step-00000020"))
    for which in ("model", "optim", "rng"):
        expected = checkpoint.Checkpoint(str(earlier), 20, whole.state).tensors(which)
        for name, tensor in parts.tensors(which).items():
            assert torch.equal(tensor, expected[name]), name
    done = train("--max_iters=20", "--init_from=resume", *options)
    assert done.code == 0 and "nothing left to do" in done.out
    text = (tmp_path / "out" / "log.txt").read_text()
    assert again.out + resumed.out == text  # every printed line


def test_document_mask(train, tmp_path):
    """A resumed run keeps the mask without the setting, to the bit; evaluation is masked, too."""
    letters = np.arange(2000) * 3 % 26
    write_dataset(tmp_path / "documents", letters[:1500], letters[1500:], 26, end_of_text=5)
    args = [f"--dataset={tmp_path / 'documents'}", "--learning_rate=1e-2", "--eval_interval=10"]
    done = train(*args, "--max_iters=20", "--document_mask", "--sample_interval=10", "--sample_prompt=A")
    assert done.code == 0 and "attention does not cross documents, which begin with token 5\n" in done.out
    whole, losses = checkpoint.find(str(tmp_path / "out")).tensors("model"), done.losses
    resumed = train(*args, "--max_iters=20", "--resume=10")
    assert resumed.code == 0 and resumed.losses == losses[10:]
    parts = checkpoint.find(str(tmp_path / "out"))
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.tensors("model").items())
    assert parts.state["config"]["document_mask"] is True
    other = train(*args, "--resume=10", "--document_mask=False")
    assert other.code == 2 and "document_mask=False (command line), but" in other.err
    evaluate = [*args, "--eval_only", f"--init_from={tmp_path / 'out'}"]
    masked, unmasked = (train(*evaluate, *mask).out.splitlines()[-1] for mask in (["--document_mask"], []))
    assert masked.replace("step 0", "step 20") in resumed.out and masked != unmasked


def test_accumulation_is_a_larger_batch(train):
    """8 sequences at once, or 4 times 2: fp32 sums in another order."""
    one = train("--max_iters=10", "--batch_size=8", "--learning_rate=1e-2")
    many = train("--max_iters=10", "--batch_size=2", "--gradient_accumulation_steps=4",
                 "--learning_rate=1e-2")
    assert one.losses == pytest.approx(many.losses, abs=1.01e-4) and len(one.losses) == 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(train, tmp_path, dtype):
    options = ("--max_iters=30", "--learning_rate=1e-2", f"--dtype={dtype}")
    done = train(*options)
    assert done.code == 0, done.err
    assert done.losses[-1] < 2.3
    scaler = checkpoint.find(str(tmp_path / "out")).state["scaler"]
    assert (scaler["scale"] > 1) if dtype == "float16" else scaler == {}
    assert train("--max_iters=32", "--init_from=resume", *options[1:]).code == 0


@pytest.mark.parametrize("then, now", [("float32", "float16"), ("float16", "float32")])
def test_resume_in_another_dtype(train, then, now):
    options = ("--learning_rate=1e-2", "--decay_lr=False", "--warmup_iters=0")
    first = train("--max_iters=20", f"--dtype={then}", *options)
    done = train("--max_iters=30", "--init_from=resume", f"--dtype={now}", *options)
    assert done.code == 0, done.err
    assert len(done.losses) == 10 and done.losses[-1] < first.losses[-1]


def test_resume_takes_the_architecture_from_the_checkpoint(train, run_script, tiny_data, tmp_path):
    """Settings that are not given again are the checkpoint's, in what is used, printed and recorded."""
    assert train("--max_iters=4", "--bias=True").code == 0
    other = ("n_layer", "n_head", "n_embd", "block_size")
    again = [arg for arg in TINY if not arg.startswith(tuple("--" + name for name in other))]
    out = tmp_path / "out"
    done = run_script("train.py", *again, f"--dataset={tiny_data}", f"--out_dir={out}", "--max_iters=6",
                      "--init_from=resume")
    assert done.code == 0, done.err
    assert re.search(r"n_layer +=+ 2  \(checkpoint\)", done.out)
    assert "tokens per iteration: 4 sequences x 16 tokens" in done.out
    for config in (checkpoint.find(str(out)).state["config"], events(out, "start")[0]["config"]):
        assert [config[name] for name in (*other, "bias")] == [2, 2, 32, 16, True]


def test_a_new_run_from_a_runs_weights(train, tmp_path):
    """Into the out_dir the weights come from, whose checkpoints move aside, and with a shorter context."""
    train("--max_iters=20", "--learning_rate=1e-2")
    tuned = train("--max_iters=2", f"--init_from={tmp_path / 'out'}", "--block_size=8", "--learning_rate=0",
                  "--min_lr=0")
    assert tuned.code == 0 and tuned.out.startswith("moved the checkpoints of an earlier run to"), tuned.err
    assert tuned.losses[0] < 2.5  # it began where the other ended
    earlier = next((tmp_path / "out").glob("earlier-*"))
    before, now = (checkpoint.find(str(folder)).tensors("model") for folder in (earlier, tmp_path / "out"))
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name][:8] if "wpe" in name else before[name]), name


def test_the_log_of_a_run_that_saved_nothing_is_kept(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("precious\n")
    done = train("--max_iters=1")
    assert done.out.startswith("moved the log of an earlier run to")
    assert next((tmp_path / "out").glob("earlier-*/log.txt")).read_text() == "precious\n"
    assert (tmp_path / "out" / "log.txt").read_text() == done.out


def test_the_best_survives_a_lost_best_json(train, tmp_path):
    """Cut off between saving the best checkpoint and best.json; resumed with room for one more."""
    options = ("--eval_interval=5", "--learning_rate=1e-2", "--decay_lr=False", "--grad_clip=0")
    train("--max_iters=20", *options)
    out = tmp_path / "out"
    best = checkpoint.best_step(str(out))
    (out / "best.json").unlink()
    ruined = train("--max_iters=40", "--init_from=resume", "--keep_checkpoints=1",
                   *(o.replace("1e-2", "3") for o in options))
    assert ruined.code == 0, ruined.err
    assert checkpoint.best_step(str(out)) == best and best in checkpoint.steps_in(str(out))


def test_only_the_best_is_kept_when_asked(train, tmp_path):
    """A learning rate that ruins the model: only evaluations that improve are saved."""
    done = train("--max_iters=60", "--eval_interval=5", "--always_save_checkpoint=False",
                 "--checkpoint_interval=0", "--learning_rate=0.3", "--grad_clip=0", "--decay_lr=False",
                 "--warmup_iters=0")
    assert done.code == 0, done.err
    evaluations = events(tmp_path / "out", "eval")
    best, expected = evaluations[0]["val_loss"], []
    for e in evaluations[1:]:
        if e["val_loss"] < best:
            best, _ = e["val_loss"], expected.append(e["step"])
    assert checkpoint.steps_in(str(tmp_path / "out")) == expected and len(expected) < 12
    assert {e["lr"] for e in evaluations} == {0.3}


def test_finetune_and_evaluate_a_folder(train, run_script, tmp_path):
    torch.manual_seed(0)
    train("--max_iters=20", "--learning_rate=1e-2")
    weights.load_model(checkpoint.find(str(tmp_path / "out"))).save_pretrained(str(tmp_path / "hf"))
    done = train("--eval_only", f"--init_from={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'none'}",
                 "--hellaswag_interval=5", "--hellaswag_input=none.jsonl")  # which is for training
    assert done.code == 0 and done.out.splitlines()[-1].startswith("step 0: train loss")
    assert not (tmp_path / "none").exists()
    tuned = train("--max_iters=5", f"--init_from={tmp_path / 'hf'}", f"--out_dir={tmp_path / 'tuned'}",
                  "--block_size=8")
    assert tuned.losses[0] < 2.5  # it began where the other ended
    assert checkpoint.find(str(tmp_path / "tuned")).state["model"]["config"]["block_size"] == 8


def test_nanogpts_folder_without_meta(run_script, tiny_data, tmp_path):
    folder = tmp_path / "data" / "plain"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).write_bytes((tiny_data / name).read_bytes())
    done = run_script("train.py", *TINY, "--dataset=plain", "--max_iters=2", "--n_embd=8")
    assert done.code == 0 and "using GPT-2's vocabulary of 50257" in done.out
    config = checkpoint.find(str(tmp_path / "out")).state["model"]["config"]
    assert (config["vocab_size"], config["used_vocab_size"]) == (50304, 50257)


def test_help(run_script):
    for script in ("train.py", "train_reduced_sync.py", "sample.py", "hellaswag.py", "evaluate.py",
                   "bench.py"):
        done = run_script(script, "--help")
        assert done.code == 0 and "--device='auto'" in done.out and "usage: python " + script in done.out


def test_sample(train, run_script, tmp_path):
    train("--max_iters=40", "--learning_rate=1e-2", "--eval_interval=20")
    out = f"--out_dir={tmp_path / 'out'}"
    options = (out, "--num_samples=2", "--max_new_tokens=40", "--device=cpu", "--top_k=5")
    first = run_script("sample.py", *options, "--start=AD")
    assert first.code == 0, first.err
    samples = first.out.split("val loss", 1)[1].split("\n", 1)[1].split("\n---------------\n")
    assert [len(s) for s in samples] == [42, 42, 0]
    assert samples[0].startswith("AD") and samples[0] != samples[1]
    again = run_script("sample.py", *options, "--start=AD", "--compile")  # which nanoGPT's has
    assert [line for line in again.out.splitlines() if "compile=True has no effect" not in line] \
        == first.out.splitlines() != again.out.splitlines()
    (tmp_path / "prompt.txt").write_text("AD")
    assert run_script("sample.py", *options, f"--start=FILE:{tmp_path / 'prompt.txt'}").out == first.out
    options = (out, "--num_samples=1", "--max_new_tokens=30", "--start=A", "--temperature=0",
               "--checkpoint_step=20")
    greedy = run_script("sample.py", *options)
    assert greedy.code == 0 and "step 20" in greedy.out
    text = greedy.out.splitlines()[1]
    stopped = run_script("sample.py", *options, f"--stop_token='{text[5]}'")
    assert stopped.out.splitlines()[1] == text[:1 + text[1:].index(text[5])]


def test_sample_from_a_folder(run_script, tmp_path):
    """An out_dir as weights, whose model has more tokens than its tokenizer: only the tokenizer's come."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(tmp_path / "run", 1, model, best=True, val_loss=1.0,
                    meta={"vocab_size": 3, "tokenizer": "char", "chars": "ABC"})
    done = run_script("sample.py", f"--init_from={tmp_path / 'run'}", "--device=cpu", "--num_samples=1",
                      "--max_new_tokens=50", "--start=A")
    assert done.code == 0, done.err
    assert re.fullmatch(r".*step 1, val loss 1\.0000\nA[ABC]{50}\n-+\n", done.out)
    pipe = f"{sys.executable} {ROOT / 'sample.py'} --init_from=run --device=cpu --start=A | head -n1"
    piped = subprocess.run(["sh", "-c", pipe], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert piped.stdout == "run/ckpt/step-00000001: step 1, val loss 1.0000\n" and not piped.stderr


PEER = '''
import torch
from dataclasses import dataclass
import model as ours

@dataclass
class GPTConfig(ours.GPTConfig):
    pass

class GPT(ours.GPT):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
    def generate(self, idx, n, temperature, top_k):
        for _ in range(n):
            idx = torch.cat((idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)), 1)
        return idx
'''


def test_bench(run_script, tiny_data, tmp_path):
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "model.py").write_text(PEER)
    size = ("--n_layer=2", "--n_head=2", "--n_embd=32", "--vocab_size=26", "--batch_size=4", "--device=cpu",
            "--compile=False", "--rounds=2", f"--peer={tmp_path / 'peer'}")
    done = run_script("bench.py", *size, "--block_size=16", "--steps=2", f"--dataset={tiny_data}",
                      "--loss_steps=8", "--learning_rate=1e-2", f"--json={tmp_path / 'b.json'}")
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "b.json").read_text())["contenders"]
    assert list(figures) == ["ours", "peer"] and f"ours / peer = {figures['peer']['ratio']:.3f}x" in done.out
    assert figures["ours"]["val_loss"] == pytest.approx(figures["peer"]["val_loss"], abs=2e-2)
    assert done.out.count("  peak n/a") == 2 and figures["ours"]["peak_memory_gb"] is None
    assert figures["ours"]["val_loss"] < 3.2 and len(figures["ours"]["ms_all"]) == 2
    done = run_script("bench.py", *size, "--block_size=16", "--steps=1", "--compare=ddp,fp8_emulated",
                      "--warmup=1", "--rounds=1")
    assert done.code == 0 and "fp8_emulated / peer = " in done.out, done.err
    done = run_script("bench.py", *size, "--block_size=64", "--mode=generate", "--max_new_tokens=8")
    assert done.code == 0 and "ours / peer = " in done.out and "ms/step" in done.out, done.err


def test_gpt2_names_without_a_network(run_script, tmp_path):
    done = run_script("sample.py", "--init_from=gpt2", "--device=cpu", HF_HUB_OFFLINE="1",
                      HF_HOME=str(tmp_path))
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith("error: could not download gpt2")
