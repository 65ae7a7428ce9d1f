"""Wrong inputs of train.py, sample.py, hellaswag.py and bench.py: one line that names cause and
fix, exit code 2, and nothing written. CPU; a few seconds for all.

    python -m pytest tests/scripts/test_errors.py
"""

import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import (
    NO_NETWORK,
    ROOT,
    TINY,
    damage_flip,
    needs_gpt2_tokenizer,
    random_model,
    settings_error,
    write_dataset,
    write_shard,
)
from helpers import save_random_model as save

import model
from nanosync.errors import UserError


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of data sets, good and bad, of checkpoints and of models, to start the scripts in."""
    folder = tmp_path_factory.mktemp("sets")
    counting = np.arange(400) % 26
    write_dataset(folder / "data" / "good", counting, counting, 26)
    for name in ("truncated", "no_val", "large_token", "bad_meta", "short", "shorter"):
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
    (folder / "latin1.py").write_bytes(b"# caf\xe9\n")
    (folder / "nan.py").write_text("weight_decay = float('nan')\n")
    chars = "".join(map(chr, range(64, 124))) + "\n"
    for name, tokenizer in (("run", {"tokenizer": "char", "chars": chars}),
                            ("run_gpt2", {"tokenizer": "gpt2"})):
        save(folder / name, 3, model=random_model(torch.float32), sample=12, val_loss=1.0,
             best_val_loss=1.0, world_size=1, scaler={}, meta={"vocab_size": 61, **tokenizer},
             data={"train_tokens": 400, "val_tokens": 400, "sha256": None})
    save(folder / "run_50257", 3, model=random_model(torch.float32, vocab_size=50257, n_embd=8), val_loss=1.0,
         meta=None)
    example = {"ctx": "a", "endings": ["b", "c", "d", "e " * 40], "label": 3}
    (folder / "good.jsonl").write_text(json.dumps(example) + "\n")
    (folder / "bad.jsonl").write_text(json.dumps(example) + "\n" + json.dumps(example | {"label": 4}) + "\n")
    (folder / "blocked").mkdir()
    (folder / "blocked" / "ckpt").touch()
    for name, text in (("raises", "import no_such_module"), ("syntax", "x ="), ("no_gpt", "GPTConfig = int"),
                       ("no_optimizer", "GPT = GPTConfig = int")):
        (folder / "peers" / name).mkdir(parents=True)
        (folder / "peers" / name / "model.py").write_text(text + "\n")
    counting[:300].astype("<u2").tofile(data / "shorter" / "train.bin")
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
    (["--learning_rate=1e999"], "learning_rate=inf (the command line) must be a finite number"),
    (["--seed=99999999999999999999"], "seed=99999999999999999999 (the command line) does not fit into 64"),
    (["latin1.py"], "cannot read config file latin1.py: byte 5 is not UTF-8"),
    (["nan.py"], "weight_decay=nan (nan.py) must be a finite number"),
    (["--n_embd=100000000"], "GB of memory: choose a smaller model"),
    (["--n_layer=10000000", "--n_embd=2"], "n_layer=10000000 must be at most 10000"),
    (["--backend=foo"], "backend='foo' is unknown: use auto, nccl or gloo"),
    (["--out_dir="], "out_dir='' is not a folder"),
    (["--out_dir=bad_key.py"], "out_dir='bad_key.py': cannot write in bad_key.py: Not a directory"),
    (["--out_dir=bad_key.py/x"], "out_dir='bad_key.py/x' cannot be a folder: Not a directory"),
    (["--out_dir=/proc/x"], "out_dir='/proc/x': cannot write in /proc"),
    (["--out_dir=blocked"], "blocked/ckpt must be a folder of the run: move it"),
    (["--n_head=3"], "n_embd=32 is not divisible by n_head=3"),
    (["--n_layer=0"], "n_layer=0 must be at least 1"),
    (["--dropout=1.5"], "dropout=1.5 must be at least 0 and below 1"),
    (["--document_mask"], "document_mask needs an end-of-text token, and "),
    (["--document_mask", "--dropout=0.1"], "document_mask has no dropout of attention, and dropout is 0.1"),
    (["--device=gpu"], "device='gpu' is unknown"),
    (["--device=cuda"], "sees no CUDA GPU here: use --device=cpu"),
    (["--device=mps"], "no MPS device"),
    (["--dtype=bf16"], "dtype='bf16' is unknown"),
    (["--dataset=none"], "no data set 'none'"),
    (["--dataset=empty"], "data/empty has no train tokens"),
    (["--dataset=no_val"], "data/no_val has no val tokens"),
    (["--dataset=truncated"], "data/truncated/train.bin has 799 bytes"),
    (["--dataset=magic"], "is not a token shard: its first number is 5"),
    (["--dataset=large_token"], "val.bin has token 26 at position 400, but the vocabulary has 26"),
    (["--dataset=bad_meta"], "cannot read data/bad_meta/meta.json"),
    (["--dataset=short"], "block_size=16 needs 17 tokens and the val files of data/short have at most 10"),
    (["--block_size=5000"], "block_size=5000 needs 5001 tokens"),
    (["--init_from=resume"], "no checkpoint in out"),
    (["--init_from=resume", "--out_dir=damaged"], "none of the 1 checkpoints in damaged can be used"),
    (["--init_from=resume", "--out_dir=run", "--block_size=32"],
     "block_size=32 (command line), but run/ckpt/step-00000003 has block_size=16: leave block_size out"),
    (["--init_from=resume", "--out_dir=run", "--block_size=8"],
     "start a new run from its weights with --init_from=run/ckpt/step-00000003"),
    (["--init_from=resume", "--out_dir=run", "--n_layer=3"], "has n_layer=2: leave n_layer out"),
    (["--init_from=resume", "--out_dir=run", "--bias=False"], "has bias=True: leave bias out"),
    (["--init_from=resume", "--out_dir=run", "--dataset=shorter"],
     "not the data set that run/ckpt/step-00000003 was trained on (400 train tokens then, 300 now)"),
    (["--init_from=run", "--resume=latest"],
     "init_from='run' starts a new run and resume='latest' resumes one"),
    (["--init_from=run", "--block_size=32"], "block_size=32 must be between 1 and the model's 16 positions"),
    (["--init_from=run", "--n_head=4"], "n_head=4 (command line), but run has n_head=2: leave n_head out"),
    (["--init_from=damaged/ckpt/step-00000003"], "model.safetensors does not match its SHA-256"),
    (["--use_fsdp", "--use_zero1"], "use_fsdp already shards the optimizer's state: leave use_zero1 out"),
    (["--use_fsdp", "--dtype=float16"], "with use_fsdp or tp_processes use --dtype=bfloat16"),
    (["--use_fsdp", "--fsdp_cpu_offload"], "it needs CUDA, several processes, and tp_processes=1"),
    (["--fsdp_reshard_after_forward=False"], "fsdp_reshard_after_forward is for --use_fsdp"),
    (["--fsdp_min_num_params=-1"], "fsdp_min_num_params=-1.0 must be at least 0"),
    (["--fp8"], "fp8 needs an NVIDIA GPU since Hopper (H100), and the device is cpu: leave fp8 out, or use"),
    (["--cuda_graphs", "--compile"], "one process on a CUDA GPU, and this run has 1 process on cpu: leave"),
    (["--cuda_graphs"], "cuda_graphs records compiled passes: leave out compile=False, or cuda_graphs"),
    (["--cuda_graphs", "--compile", "--dropout=0.1"],
     "cuda_graphs draws other masks in a resumed run, and dropout is 0.1: use --dropout=0, or leave"),
    (["--fp8=emulated", "--fp8_head"], "fp8_head needs matrices whose sizes are multiples of 16"),
    (["--activation_checkpointing=layers"], "activation_checkpointing='layers' is unknown: use none"),
    (["--init_from=gpt5"], "'gpt5' is neither a folder nor one of gpt2"),
    (["--init_from=model"], "model/config.json is not the configuration of a GPT-2"),
    (["--hellaswag_interval=5", "--hellaswag_input=none.jsonl"],
     "cannot read none.jsonl: No such file or directory; or train without HellaSwag, --hellaswag_interval=0"),
]

RANKS = [  # of train.py, with --model_type=distributed_gpt
    (["--block_types=['tp']"], "block_types has 1 entries and n_layer is 2"),
    (["--block_types=['tp','sdp']"], "block_types[1]='sdp' is unknown: use tp, spd, parallel"),
    (["--block_types=spd"], "block_types='spd' (the command line) is of type str; it must be list or None"),
    (["--tp_size=3"], "tp_size=3 must divide n_head=2: choose one of [1, 2]"),
    (["--tp_processes=2"], "tp_processes=2 does not divide the number of processes, 1"),
    (["--tp_processes=0"], "tp_processes=0 does not divide"),
    (["--init_from=resume", "--out_dir=run"], "model_type=distributed_gpt (command line), but run/ckpt"),
    (["--init_from=run", "--n_embd=64"], "n_embd=64 (command line), but run has n_embd=32: leave n_embd out"),
    (["--init_from=run", "--tp_size=4"], "tp_size=4 must divide n_head=2"),
    (["--model_type=gpt", "--block_types=['spd']*2"], "block_types is for --model_type=distributed_gpt"),
    (["--model_type=gpt", "--tp_size=4"], "tp_size is for --model_type=distributed_gpt, as the dense GPT"),
    (["--model_type=gpt", "--tp_size", "2"], "tp_size is for --model_type=distributed_gpt"),
]

REDUCED_SYNC = [
    (["--sync_strategy=sdp"], "sync_strategy='sdp' is unknown: use standard, spd, selective, grouped"),
    (["--sync_strategy=sdp", "--layers_per_group=1"], "sync_strategy='sdp' is unknown: use standard, spd"),
    (["--sync_strategy=sdp", "--sync_points=[9]"], "sync_strategy='sdp' is unknown: use standard, spd"),
    (["--sync_strategy=grouped", "--layers_per_group=3"], "layers_per_group=3 does not divide n_layer=2"),
    (["--sync_strategy=selective", "--attn_sync_layers=[2]"], "attn_sync_layers has 2: with n_layer=2"),
    (["--sync_strategy=custom", "--sync_points=[4]"], "sync_points has 4: with n_layer=2"),
    (["--sync_strategy=custom", "--sync_points=3"], "sync_points=3 (the command line) is of type int"),
    (["--n_layer=10000000", "--n_embd=2"], "n_layer=10000000 must be at most 10000"),
    (["--stop_if=3.8"], "stop_if='3.8' is not a step and a loss: write it as in --stop_if=5000:3.8"),
    (["--stop_if=a:b"], "stop_if='a:b' is not a step and a loss"),
    (["--stop_if=5:nan"], "stop_if='5:nan' is not a step and a loss"),
    (["--attn_sync_layers=[0]"], "attn_sync_layers=[0] is for sync_strategy='selective'"),
    (["--layers_per_group=1"], "layers_per_group=1 is for sync_strategy='grouped'"),
    (["--init_from=resume", "--out_dir=run"], "step-00000003 holds a model of kind 'gpt': resume it with"),
    (["--init_from=run", "--n_layer=3"], "n_layer=3 (command line), but run has n_layer=2"),
    (["--init_from=run", "--resume=3"], "init_from='run' starts a new run and resume='3' resumes one"),
]

SAMPLE = [
    (["--out_dir=run", "--tp_allreduce=ring"], "tp_allreduce='ring' is unknown"),
    (["--out_dir=run", "--tp_size=3"], "tp_size=3 must divide n_head=2"),
    (["--out_dir=run", "--block_types=['spd']"], "block_types has 1 entries and n_layer is 2"),
    (["--out_dir=run", "--tp_processes=2"], "tp_processes=2 does not divide the number of processes, 1"),
    (["--out_dir=nowhere"], "no checkpoint in nowhere"),
    (["--out_dir=run", "--checkpoint_step=9"], "run has no checkpoint '9'; it has the steps 3"),
    (["--out_dir=run", "--checkpoint_step=last"], "run has no checkpoint 'last'"),
    (["--out_dir=run", "--start="], "the prompt is empty"),
    (["--out_dir=run", "--start=FILE:none.txt"], "cannot read the prompt from none.txt"),
    (["--out_dir=run", "--start=FILE:-"], "the prompt is empty"),  # of stdin, /dev/null here
    (["--out_dir=run", "--num_samples=0"], "num_samples=0 must be at least 1"),
    (["--out_dir=nowhere", "--temperature=-1"], "temperature=-1.0 must be at least 0"),  # before it loads
    (["--out_dir=nowhere", "--top_k=0"], "top_k=0 must be at least 1"),
    (["--out_dir=nowhere", "--top_p=2"], "top_p=2.0 must be above 0"),
    (["--out_dir=nowhere", "--slide=0"], "slide=0 must be at least 1"),
    (["--out_dir=run", "--stop_token=AB"], "is 2 tokens, not one"),
    (["--out_dir=run", "--stop_token=61"], "stop_token=61 is not one of the model's tokens, 0 to 60"),
    (["--out_dir=run", "--seed=99999999999999999999"], "does not fit into 64 bits"),
    (["--out_dir=run", "--start='\\ud800'"], "start='\\ud800' (the command line) is not UTF-8"),
    (["--init_from=damaged"], "none of the 1 checkpoints in damaged can be used"),
    (["--out_dir=run_gpt2"],
     "the prompt has token 198, but the model has only tokens 0 to 60: the model was trained with"),
]

HELLASWAG = [  # with --init_from=run_50257 --input=good.jsonl
    (["--n_examples=0"], "n_examples=0 must be at least 1"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--json=nodir/x.json"], "json='nodir/x.json' is not the path of a file in an existing folder"),
    (["--init_from=resume"], "no checkpoint in out: train with --out_dir=out first"),
    (["--checkpoint_step=9"], "run_50257 has no checkpoint '9'; it has the steps 3"),
    (["--init_from=damaged"], "none of the 1 checkpoints in damaged can be used"),
    (["--init_from=run"], "has the tokens of the tokenizer 'char', and HellaSwag needs GPT-2's"),
    (["--init_from=run_gpt2"], "has a vocabulary of 61 tokens, and HellaSwag needs GPT-2's 50257"),
    (["--input=none.jsonl"], "cannot read none.jsonl: No such file"),
    (["--input=data"], "cannot read data: Is a directory"),
    (["--input=bad.jsonl"], "bad.jsonl, line 2: label=4 is not a whole number from 0 to 3"),
    ([], "block_size=16 is too short for HellaSwag: an ending has 41 tokens"),
    (["--tp_processes=2"], "tp_processes=2 does not divide the number of processes, 1"),
]

BENCH = [
    (["--mode=decode", "--widths=[100]"], "widths: 100 is not made of heads of 64"),
    (["--mode=decode", "--max_new_tokens=2"], "max_new_tokens of at least 3"),
    (["--mode=decode", "--widths=[]"], "batch_sizes and widths that are not empty"),
    (["--mode=decode", "--tp_size=4"], "in mode decode every process holds one rank"),
    (["--syncs=[1]", "--block_types=['spd']*12"], "both name schedules: give one"),
    (["--tp_allreduce=ring"], "tp_allreduce='ring' is unknown: use nccl, oneshot, fused"),
    (["--mode=decode", "--batch_sizes=[0]"], "batch_sizes has 0: its entries are whole numbers from 1"),
    (["--mode=decode", "--syncs=['6']"], "syncs has '6': its entries are whole numbers from 1"),
    (["--mode=decode", "--syncs=[5]"], "5 syncs do not divide the 24 sublayers of n_layer=12"),
    (["--mode=decode", "--prompt_tokens=1000"], "exceed block_size=1024"),
    (["--tp_size=4"], "tp_size is for --model_type=distributed_gpt"),
    (["--model_type=moe"], "model_type='moe' is unknown: use gpt or distributed_gpt"),
    (["--model_type=distributed_gpt", "--peer=peers/no_gpt"], "a peer is measured against the dense GPT"),
    (["--mode=fly"], "mode='fly' is unknown"),
    (["--mode=kernels"], "kernels run on a CUDA GPU that Triton supports"),
    (["--mode=kernels", "--peer=peers"], "peer='peers' is no checkout of Liger-Kernel"),
    (["--mode=kernels", "--widths=[20000]"], "kernels need rows, and widths up to 16384"),
    (["--mode=kernels", "--rows=[]"], "kernels need rows"),
    (["--compare=ddp,fdsp"], "compare: 'fdsp' has 'fdsp', and known are ddp, zero1, fsdp"),
    (["--compare=zero1+fsdp"], "'zero1+fsdp' names two ways to do the same"),
    (["--compare=ddp,ddp"], "compare='ddp,ddp' names a strategy twice"),
    (["--compare=ddp+keep"], "keep, offload and a number are for fsdp, and 'ddp+keep'"),
    (["--compare=fsdp+tp"], "'fsdp+tp' needs --tp_processes"),
    (["--compare=gelu+gelu-recompute"], "take one of the words gelu"),
    (["--compare=ddp+gelu"], "compare: ddp+gelu: gelu and qkv are kernels for a Hopper GPU"),
    (["--compare=fsdp"], "compare: fsdp divides a model over processes: start bench.py with torchrun"),
    (["--compare=ddp,fp8"], "fp8 needs an NVIDIA GPU since Hopper"),
    (["--compare=fp8+fp8_emulated"], "'fp8+fp8_emulated': take one of fp8, fp8_emulated,"),
    (["--compare=ddp,graphs"], "graphs: graphs are for one process on a CUDA GPU, and here are 1 on"),
    (["--compare=ddp,graphs+eager"], "'graphs+eager': graphs are of compiled passes: leave out eager"),
    (["--compare=graphs", "--mode=memory"], "PyTorch does not count the memory of graphs: leave graphs out"),
    (["--compare=ddp", "--mode=decode"], "compare is for mode train or memory"),
    (["--mode=memory", "--largest"], "largest fills a GPU's memory, and the device is cpu"),
    (["--largest"], "largest is for --mode=memory"),
    (["--plot=x.png"], "plot draws what mode kernels measures"),
    (["--peer=nowhere"], "peer='nowhere' is no folder with a model.py"),
    (["--loss_steps=5"], "loss_steps needs real text"),
    (["--mode=generate", "--prompt_tokens=1000"], "max_new_tokens=256 exceed block_size=1024"),
    (["--rounds=0"], "rounds=0 must be at least 1"),
    (["--seed=99999999999999999999"], "does not fit into 64 bits"),
    (["--json=nodir/x.json"], "json='nodir/x.json' is not the path of a file in an existing folder"),
    (["--json=peers"], "json='peers' is a folder: give the path of a file"),
    (["--n_embd=100000000", "--n_head=1"], "GB of memory: choose a smaller model"),
    (["--mode=generate", "--temperature=0", "--peer=hf"], "temperature=0 (always the most likely token) is"),
    (["--mode=generate", "--temperature=0", "--peer=peers/no_gpt"], "temperature=0 (always the most likely"),
    (["--peer=peers/raises"], "peers/raises/model.py cannot be imported: ModuleNotFoundError: No module"),
    (["--peer=peers/syntax"], "peers/syntax/model.py cannot be imported: SyntaxError"),
    (["--peer=peers/no_gpt"], "peers/no_gpt/model.py has no GPT: a peer's model.py has what nanoGPT's has"),
    (["--peer=peers/no_optimizer"], "peers/no_optimizer/model.py has no configure_optimizers"),
]

ENVIRONMENT = [
    (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 but no RANK, so 2 processes would be 2 runs: start with torchrun"),
    (dict(SLURM_NTASKS="4", SLURM_PROCID="1"), "SLURM_NTASKS=4 but no RANK, so 4 processes would be 4 runs: "
                                               "start with srun --ntasks-per-node=1 torchrun"),
    (dict(RANK="0"), "the environment has RANK but no WORLD_SIZE: start with torchrun, or unset RANK"),
    (dict(RANK="0", WORLD_SIZE="1"), "RANK but no MASTER_ADDR"),
    (dict(RANK="x", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"), "RANK=x, WORLD_SIZE=1"),
    (dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"), "cannot meet at 127.0.0.1:x"),
    (dict(WANDB_API_KEY="short", args=["--wandb_log", "--out_dir=run"]),
     "run wandb login, or use --wandb_mode=offline or --wandb_log=False"),
    (dict(args=["--wandb_log", "--wandb_mode=of", "--out_dir=run"]), "wandb_mode='of' is unknown: use"),
]


def check(result, words, before, folder):
    assert result.code == 2, result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert words in result.err
    assert "Traceback" not in result.out + result.err
    assert listing(folder) == before  # nothing written, nothing lost


# of the cases that check_settings answers, those that are tried as a user would, too
END_TO_END = (["--batchsize=8"], ["bad_key.py"], ["bad_syntax.py"], ["no_such_config.py"],
              ["--batch_size=big"], ["--seed=99999999999999999999"], ["nan.py"],
              ["--use_fsdp", "--use_zero1"], ["--stop_if=3.8"], ["--mode=fly"])


@pytest.fixture
def check_error(run_script, sets, monkeypatch):
    """check_error(script, options, args, words): the error of settings in this process, if check_settings
    has it; else, and for END_TO_END, the script's."""

    def check_one(script, options, args, words, **env):
        monkeypatch.chdir(sets)
        error = settings_error(script, *options, *args)
        if error is not None:
            assert words in error and "\n" not in error, error
        if error is None or args in END_TO_END:
            before = listing(sets)
            result = run_script(script, *options, *args, cwd=sets, **env)
            check(result, words, before, sets)
            return result

    return check_one


def listing(folder):
    return sorted((root, tuple(sorted(files))) for root, _, files in os.walk(folder))


@pytest.mark.parametrize("args, words", TRAIN, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_train(check_error, args, words):
    result = check_error("train.py", [*TINY, "--dataset=good"], args, words, HF_HUB_OFFLINE="1")
    if {"--out_dir=damaged", "--init_from=damaged"} & set(args):  # which also warns, on stdout, of each
        assert result.out.count("warning: ") == 1


@pytest.mark.parametrize("args, words", RANKS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_ranks(check_error, args, words):
    check_error("train.py", [*TINY, "--dataset=good", "--model_type=distributed_gpt"], args, words)


@pytest.mark.parametrize("args, words", REDUCED_SYNC, ids=lambda v: " ".join(v) * isinstance(v, list))
def test_train_reduced_sync(check_error, args, words):
    check_error("train_reduced_sync.py", [*TINY, "--dataset=good"], args, words)


@pytest.mark.parametrize("env, words", ENVIRONMENT, ids=lambda v: " ".join(v) if isinstance(v, dict) else "")
def test_train_in_environments(run_script, sets, env, words):
    args, before = env.get("args", []), listing(sets)
    env = {name: value for name, value in env.items() if name != "args"}
    check(run_script("train.py", *TINY, "--dataset=good", *args, cwd=sets, **env), words, before, sets)


@pytest.mark.parametrize("args", [[], ["--init_from=resume", "--out_dir=run"]], ids=["scratch", "resume"])
def test_tokens_are_checked_before_the_model_is_built(sets, monkeypatch, args):
    def build(self, config):
        raise AssertionError("built")

    np.full(400, 61, "<u2").tofile(sets / "data" / "good" / "val.bin")  # above either vocabulary
    try:
        monkeypatch.setattr(model.GPT, "__init__", build)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # to be put back
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "--dataset=good", *args])
        monkeypatch.chdir(sets)
        with pytest.raises(UserError, match="has token 61 at position 0"):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        (np.arange(400) % 26).astype("<u2").tofile(sets / "data" / "good" / "val.bin")


@pytest.mark.parametrize("args, words", SAMPLE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_sample(run_script, sets, args, words):
    if "--out_dir=run_gpt2" in args:
        needs_gpt2_tokenizer()
    before = listing(sets)
    check(run_script("sample.py", "--device=cpu", *args, cwd=sets), words, before, sets)


def test_sample_without_tokenizer_files(run_script, sets, tmp_path):
    before = listing(sets)
    result = run_script("sample.py", "--device=cpu", "--out_dir=run_gpt2", cwd=sets,
                        TIKTOKEN_CACHE_DIR=str(tmp_path), **NO_NETWORK)
    check(result, "set TIKTOKEN_CACHE_DIR to a folder that has them", before, sets)


@pytest.mark.parametrize("args, words", HELLASWAG, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_hellaswag(run_script, sets, args, words):
    if not args:
        needs_gpt2_tokenizer()
    before = listing(sets)
    args = ["--device=cpu", "--init_from=run_50257", "--input=good.jsonl", *args]
    result = run_script("hellaswag.py", *args, cwd=sets)
    if "--init_from=damaged" in args:  # which also warns, on stdout
        assert result.out.count("warning: ") == 1
    check(result, words, before, sets)


@pytest.mark.parametrize("args, words", BENCH, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bench(check_error, args, words):
    check_error("bench.py", ["--device=cpu"], args, words)
