"""What a user can get wrong in train.py, sample.py and bench.py: one line that names cause and fix, exit code
2, and nothing written. CPU; a few seconds for all.

    python -m pytest tests/test_errors.py
"""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import NO_NETWORK, TINY, write_dataset
from test_checkpoint import damage_flip, save
from test_data import write_shard
from test_model import random_model


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of data sets, good and bad, of checkpoints and of models, to start the scripts in."""
    folder = tmp_path_factory.mktemp("sets")
    counting = np.arange(400) % 26
    write_dataset(folder / "data" / "good", counting, counting, 26)
    for name in ("truncated", "no_val", "large_token", "bad_meta", "short"):
        write_dataset(folder / "data" / name, counting, counting, 26)
    data = folder / "data"
    (data / "truncated" / "train.bin").write_bytes((data / "good" / "train.bin").read_bytes()[:-1])
    (data / "no_val" / "val.bin").unlink()
    np.append(counting, 26).astype("<u2").tofile(data / "large_token" / "val.bin")
    (data / "bad_meta" / "meta.json").write_text("{")
    counting[:10].astype("<u2").tofile(data / "short" / "val.bin")
    (data / "magic").mkdir()
    write_shard(data / "magic" / "x_train_0.bin", counting, magic=5)
    write_shard(data / "magic" / "x_val_0.bin", counting)
    (data / "empty").mkdir()
    (folder / "bad_key.py").write_text("batchsize = 8\n")
    (folder / "bad_type.py").write_text("batch_size = '8'\n")
    (folder / "bad_syntax.py").write_text("batch_size = \n")
    save(folder / "run", 3, model=random_model(torch.float32), sample=12, val_loss=1.0,
         best_val_loss=1.0, world_size=1, scaler={}, meta={"vocab_size": 61, "tokenizer": "gpt2"})
    shutil.copytree(folder / "run", folder / "damaged")
    damage_flip(folder / "damaged" / "ckpt" / "step-00000003" / "model.safetensors")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return folder


TRAIN = [  # arguments after TINY and the good data set, words of the line
    (["--batchsize=8"], "unknown key 'batchsize' in the command line: did you mean 'batch_size'?"),
    (["bad_key.py"], "unknown key 'batchsize' in bad_key.py: did you mean 'batch_size'?"),
    (["bad_type.py"], "batch_size='8' (bad_type.py) is of type str; it must be int"),
    (["bad_syntax.py"], "bad_syntax.py, line 1: SyntaxError"),
    (["no_such_config.py"], "cannot read config file no_such_config.py"),
    (["--batch_size=big"], "batch_size='big' (the command line) is of type str; it must be int"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--eval_interval=0"], "eval_interval=0 must be at least 1"),
    (["--max_iters=-1"], "max_iters=-1 must be at least 0"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must not be negative"),
    (["--beta2=1"], "beta2=1.0 must be at least 0 and below 1"),
    (["--n_head=3"], "n_embd=32 is not divisible by n_head=3"),
    (["--n_layer=0"], "n_layer=0 must be at least 1"),
    (["--dropout=1.5"], "dropout=1.5 must be at least 0 and below 1"),
    (["--device=gpu"], "device='gpu' is unknown"),
    (["--device=cuda"], "sees no CUDA GPU here: use --device=cpu"),
    (["--device=mps"], "no MPS device"),
    (["--dtype=bf16"], "dtype='bf16' is unknown"),
    (["--dataset=none"], "no data set 'none'"),
    (["--dataset=empty"], "data/empty has no train tokens"),
    (["--dataset=no_val"], "data/no_val has no val tokens"),
    (["--dataset=truncated"], "data/truncated/train.bin has 799 bytes"),
    (["--dataset=magic"], "is no token shard: its first number is 5"),
    (["--dataset=large_token"], "val.bin has token 26 at position 400, but the vocabulary has 26"),
    (["--dataset=bad_meta"], "cannot read data/bad_meta/meta.json"),
    (["--dataset=short"], "block_size=16 needs 17 tokens and the val files of data/short have at most 10"),
    (["--block_size=5000"], "block_size=5000 needs 5001 tokens"),
    (["--init_from=resume"], "no checkpoint in out"),
    (["--init_from=resume", "--out_dir=damaged"], "none of the 1 checkpoints in damaged can be used"),
    (["--init_from=resume", "--out_dir=run", "--block_size=32"], "block_size=32 is not among the model's"),
    (["--init_from=gpt5"], "'gpt5' is neither a folder nor one of gpt2"),
    (["--init_from=model"], "model/config.json is no configuration of a GPT-2"),
]

SAMPLE = [
    (["--out_dir=nowhere"], "no checkpoint in nowhere"),
    (["--out_dir=run", "--checkpoint_step=9"], "run has no checkpoint '9'; it has the steps 3"),
    (["--out_dir=run", "--checkpoint_step=best"], "run has no checkpoint 'best'"),
    (["--out_dir=run", "--checkpoint_step=last"], "run has no checkpoint 'last'"),
    (["--out_dir=run", "--start="], "the prompt is empty"),
    (["--out_dir=run", "--start=FILE:none.txt"], "cannot read the prompt from none.txt"),
    (["--out_dir=run", "--num_samples=0"], "num_samples=0 must be at least 1"),
    (["--out_dir=run", "--temperature=-1"], "temperature=-1.0 must be at least 0"),
    (["--out_dir=run", "--top_k=0"], "top_k=0 must be at least 1"),
    (["--out_dir=run", "--top_p=2"], "top_p=2.0 must be above 0"),
    (["--out_dir=run", "--stop_token=two words"], "is 2 tokens, not one"),
]

BENCH = [
    (["--mode=fly"], "mode='fly' is unknown"),
    (["--peer=nowhere"], "peer='nowhere' is no folder with a model.py"),
    (["--loss_steps=5"], "loss_steps needs real text"),
    (["--mode=generate", "--prompt_tokens=1000"], "together exceed block_size=1024"),
    (["--rounds=0"], "rounds=0 must be at least 1"),
]

NEEDS_TOKENIZER = {"--stop_token=two words", "--start=", "--temperature=-1", "--top_k=0", "--top_p=2"}


def check(result, words, before, folder):
    assert result.code == 2, result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert words in result.err
    assert "Traceback" not in result.out + result.err
    assert listing(folder) == before  # nothing written, nothing lost


def listing(folder):
    return sorted((root, tuple(sorted(files))) for root, _, files in os.walk(folder))


@pytest.mark.parametrize("args, words", TRAIN, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_train(run_script, sets, args, words):
    before = listing(sets)
    result = run_script("train.py", *TINY, "--dataset=good", *args, cwd=sets, HF_HUB_OFFLINE="1")
    if "--out_dir=damaged" in args:  # which also warns, on stdout, of each that cannot be used
        assert result.out.count("warning: ") == 1
    check(result, words, before, sets)


@pytest.mark.parametrize("args, words", SAMPLE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_sample(run_script, sets, args, words):
    if NEEDS_TOKENIZER & set(args):
        from conftest import needs_gpt2_tokenizer

        needs_gpt2_tokenizer()
    before = listing(sets)
    check(run_script("sample.py", "--device=cpu", *args, cwd=sets), words, before, sets)


def test_sample_without_tokenizer_files(run_script, sets, tmp_path):
    before = listing(sets)
    result = run_script("sample.py", "--device=cpu", "--out_dir=run", cwd=sets,
                        TIKTOKEN_CACHE_DIR=str(tmp_path), **NO_NETWORK)
    check(result, "set TIKTOKEN_CACHE_DIR to a folder that has them", before, sets)


@pytest.mark.parametrize("args, words", BENCH, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bench(run_script, sets, args, words):
    before = listing(sets)
    check(run_script("bench.py", "--device=cpu", *args, cwd=sets), words, before, sets)
