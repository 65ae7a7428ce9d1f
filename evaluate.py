"""Evaluate a checkpoint of any kind: val loss, bits per byte, HellaSwag; against another one, in pairs.

$ python evaluate.py out-python-char
$ python evaluate.py --init_from=gpt2-xl --dataset=openwebtext --val_windows=500 --hellaswag
$ torchrun --standalone --nproc_per_node=4 evaluate.py out-gpt2 --json=result.json    # windows divided

What does it cost to drop syncs? The same windows and examples with both models, one difference for each:
$ python evaluate.py out-spd --against=out-tp
$ python evaluate.py --init_from=gpt2 --tp_size=2 --sync_strategy=spd --against=gpt2 --dataset=openwebtext

Tasks of lm-evaluation-harness, if it is installed:
$ python evaluate.py out-gpt2 --val_windows=0 --lm_eval=lambada_openai,arc_easy

Real TP ranks, one process each:
$ torchrun --standalone --nproc_per_node=2 evaluate.py out-spd --tp_processes=2

docs/evaluate.md says what each figure is; nanosync/comparison.py what the intervals mean.
"""

import os
import time

import numpy as np
import torch

import models
from configurator import check_at_least, configure
from nanosync import comparison, hellaswag_eval, lm_eval_adapter, tokenizers
from nanosync.bits_per_byte import known_bytes_per_token
from nanosync.dataloader import evaluation_batches, open_dataset
from nanosync.distributed import env_rank, finish, on_main, print0
from nanosync.distributed import start as start_processes
from nanosync.errors import UserError
from nanosync.files import check_output_file, write_result
from nanosync.hardware import environment, pick_dtype
from nanosync.model_kind import model_config
from nanosync.token_losses import window_losses

# -----------------------------------------------------------------------------
init_from = "resume"  # 'resume' (a checkpoint in out_dir), 'gpt2', ..., 'gpt2-xl', a folder of weights
out_dir = "out"  # folder with checkpoints
checkpoint_step = "latest"  # 'latest', 'best' or a step
against = ""  # another out_dir, checkpoint, 'gpt2' or folder of weights to compare with; '' for none
against_step = "latest"  # 'latest', 'best' or a step of `against`
json = ""  # file for the result, '' for none
# val loss and bits per byte
dataset = ""  # a folder in data/, or a path; '' for the data set that the checkpoint was trained on
val_windows: int | None = None  # windows of the val split, spread evenly; None for all, 0 for no val loss
block_size: int | None = None  # tokens of a window, None for the longest that the models take
# HellaSwag; needs GPT-2's tokens
hellaswag = False  # also evaluate HellaSwag
hellaswag_input = ""  # file in the format of hellaswag_val.jsonl; '' downloads it into data/hellaswag
n_examples: int | None = None  # number of examples, the first of the file; None for all
# tasks of lm-evaluation-harness (pip install lm_eval), for the model, not for `against`
lm_eval = ""  # names of tasks, comma-separated, e.g. 'lambada_openai,arc_easy'; '' for none
lm_eval_path = ""  # folder with further tasks, YAML files; '' for none
lm_eval_fewshot: int | None = None  # examples in each prompt, None for the number that a task names
lm_eval_limit: int | None = None  # number of examples of each task, the first; None for all
# schedule and ranks of the model, not of `against`
tp_size: int | None = None  # number of TP ranks, None for the number in training
block_types: list | None = None  # 'tp', 'spd' or 'parallel' for each layer, None for the schedule of training
sync_strategy: str | None = None  # in place of block_types, a strategy of train_reduced_sync.py
tp_processes = 1  # processes that hold the TP ranks of one model, under torchrun; 1 simulates them
# system
batch_size = 16  # windows of a batch on each process; examples of HellaSwag have 4 sequences each
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16'
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank(), takes="init_from")


def check_settings(config: dict) -> None:
    """Raise UserError for wrong settings, before any work is done."""
    check_at_least(config, 1, "batch_size", "tp_processes")
    for name, least in (("val_windows", 0), ("block_size", 1), ("n_examples", 1), ("lm_eval_fewshot", 0),
                        ("lm_eval_limit", 1)):
        if config[name] is not None:
            check_at_least(config, least, name)
    if config["val_windows"] == 0 and not config["hellaswag"] and not config["lm_eval"]:
        raise UserError("val_windows=0 without --hellaswag and --lm_eval=... leaves nothing to evaluate: add "
                        "one of them, or leave val_windows out")
    if config["against"] and config["val_windows"] == 0 and not config["hellaswag"]:
        raise UserError("against compares val losses and HellaSwag, and lm_eval is for the model alone: "
                        "leave val_windows=0 or against out, or add --hellaswag")
    for switch, need, names in (("hellaswag", "--hellaswag", ("hellaswag_input", "n_examples")),
                                ("lm_eval", "--lm_eval=...", ("lm_eval_path", "lm_eval_fewshot",
                                                              "lm_eval_limit")),
                                ("against", "--against=...", ("against_step",))):
        for name in names:
            if config.origin[name] and not config[switch]:
                raise UserError(f"{name} is for {need}: add that setting, or leave {name} out")
    if config["lm_eval_path"] and not os.path.isdir(config["lm_eval_path"]):
        raise UserError(f"lm_eval_path={config['lm_eval_path']} is not a folder: give the folder of your "
                        f"tasks' YAML files")
    if config["json"]:
        check_output_file(config["json"], "json")
    if config["against"]:
        comparison.check_installed()


check_settings(config)
processes = start_processes(device, tp_processes=tp_processes)
group, device = processes.group, processes.device
compute_dtype = pick_dtype(dtype, device)


def say(text: str) -> None:
    """Print a line on the main process."""
    print0(text, processes)


# checkpoints, data and examples; checks come before slow work
other_config = {**config, "init_from": against, "checkpoint_step": against_step, "tp_size": None,
                "block_types": None, "sync_strategy": None, "tp_processes": 1}
sources = [(settings, models.find_for_inference(settings, group))
           for settings in (config, other_config)[:1 + bool(against)]]
names = [settings["init_from"] if found is None else found.path for settings, found in sources]
metas = [models.meta_of(name) if found is None else found.state["meta"]
         for name, (_, found) in zip(names, sources)]
if val_windows != 0:
    trained_on = {"config": {}, "data": {}} if sources[0][1] is None else sources[0][1].state
    dataset = dataset or trained_on["config"].get("dataset")
    if type(dataset) is not str:
        raise UserError(f"{names[0]} does not say on which data it was trained: add --dataset=..., or "
                        f"--val_windows=0 for no val loss")
    data = open_dataset(dataset, block_size or 1)
    if not config["dataset"] and any(trained_on["data"].get(key) not in (None, value)
                                     for key, value in data.fingerprint.items()):
        say(f"warning: {data.folder} has changed since {names[0]} was trained on it")
for name, meta, (_, found) in zip(names, metas, sources):
    if val_windows != 0:
        comparison.check_same_tokens(meta, name, data.meta, data.folder)
    if hellaswag and found is not None:
        trained = model_config(found.state["model"], models.INFERENCE_KINDS)
        hellaswag_eval.check_vocabulary(trained.used_vocab_size, meta, name)
tasks = lm_eval_adapter.Tasks(lm_eval, lm_eval_path) if lm_eval else None
if lm_eval:
    tokenizer = tokenizers.from_meta(metas[0])
    if isinstance(tokenizer, tokenizers.TokenIds):
        raise UserError(f"lm_eval needs text, and the tokenizer {tokenizer.name!r} is unknown here: leave "
                        f"lm_eval out")
examples = on_main(lambda: hellaswag_eval.load(hellaswag_input, n_examples, "hellaswag_input"), group) \
    if hellaswag else []
evaluated = [models.load_for_inference(settings, found, processes, say).eval() for settings, found in sources]
if hellaswag:
    for model, name, meta in zip(evaluated, names, metas):
        hellaswag_eval.check_vocabulary(model.config.used_vocab_size, meta, name)
        hellaswag_eval.check_lengths(examples, model.config.block_size)
if val_windows != 0:
    longest = min(model.config.block_size for model in evaluated)
    if block_size is not None and block_size > longest:
        raise UserError(f"block_size={block_size} is longer than the longest sequence of the models, "
                        f"{longest}: leave block_size out")
    data = open_dataset(dataset, block_size or longest)
    data.val.check_tokens(min(model.config.vocab_size for model in evaluated))
    available = sum(data.val.eval_windows)
    n_windows = available if val_windows is None else min(val_windows, available)
    per_token = on_main(lambda: known_bytes_per_token(data, say), group)

# evaluation
torch.set_float32_matmul_precision("high")
last_said = time.perf_counter()


def progress(done: int, n: int, what: str = "windows") -> None:
    """Print how much is done every 10 seconds."""
    global last_said
    if time.perf_counter() - last_said > 10:
        last_said = time.perf_counter()
        say(f"{done:,} of {n:,} {what}")


def losses_of(model, found) -> np.ndarray:
    """Return the sums of each window, see window_losses. All processes call this function."""
    end_of_text = tokenizers.end_of_text(data.meta)
    if found is not None and found.state["model"]["kind"] not in models.SCRIPTS_OWN \
            and found.state["config"].get("document_mask") is True:
        model.end_of_text = end_of_text
    batches = evaluation_batches(data.val, n_windows, batch_size, device, processes.dp_rank,
                                 processes.dp_size)
    return window_losses(model, batches, n_windows, device, end_of_text, processes.dp_group, progress)


results, windows, answers = [], [], []
for model, name, (_, found) in zip(evaluated, names, sources):
    model.to(device)
    source = {"weights": name, "step": None if found is None else found.step, "val": None, "hellaswag": None,
              "lm_eval": None}
    say(name if found is None else f"{name}: {found.described()}")
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        if lm_eval and not results:
            texts = tasks.model(model, tokenizer, tokenizers.end_of_text(metas[0]), batch_size, device,
                                processes.dp_rank, processes.dp_size, processes.dp_group)
            source["lm_eval"] = tasks.evaluate(texts, lm_eval_fewshot, lm_eval_limit)
            for line in lm_eval_adapter.lines(source["lm_eval"] or {}):
                say(line)
        if val_windows != 0:
            windows.append(losses_of(model, found))
            source["val"] = comparison.val_summary(windows[-1], per_token, data.val.block_size, name)
            source["val"]["dataset"] = data.folder
            say(comparison.val_line(source["val"]))
        if hellaswag:
            answers.append(hellaswag_eval.judge(
                model, examples, batch_size, device, processes.dp_rank, processes.dp_size, processes.dp_group,
                progress=lambda done, n: progress(done, n, "examples")))
            source["hellaswag"] = comparison.hellaswag_summary(answers[-1])
            say(comparison.hellaswag_line(source["hellaswag"]))
    model.to("cpu")
    results.append(source)

# pairs
result = results[0]
if against:
    difference = {"val": None, "hellaswag": None}
    if val_windows != 0:
        difference["val"] = comparison.val_difference(*windows, per_token)
        say(comparison.val_difference_line(difference["val"]))
    if hellaswag:
        difference["hellaswag"] = comparison.hellaswag_difference(*answers)
        for line in comparison.hellaswag_difference_lines(difference["hellaswag"]):
            say(line)
    result |= {"against": results[1], "difference": difference}
if json and processes.main:
    write_result(json, {**result, "config": config, "environment": environment(device)})
finish(processes)
