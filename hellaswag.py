"""Evaluate a checkpoint of this repository, or GPT-2 weights, on HellaSwag: find the right ending of four.

$ python hellaswag.py out-gpt2
$ python hellaswag.py --init_from=gpt2-xl --n_examples=1000
$ python hellaswag.py --input=hellaswag_val.jsonl                           # without a network
$ torchrun --standalone --nproc_per_node=4 hellaswag.py --init_from=gpt2    # examples divided over processes

Weights of any kind with another sync schedule, and on real TP ranks, one process each:
$ python hellaswag.py --init_from=gpt2 --tp_size=2 --block_types="['spd']*12"
$ torchrun --standalone --nproc_per_node=2 hellaswag.py --out_dir=out-spd --tp_processes=2

nanosync/hellaswag_eval.py describes data, measure and method.
"""

import time

import torch

import models
from configurator import check_at_least, configure
from nanosync import hellaswag_eval
from nanosync.distributed import env_rank, finish, on_main, print0
from nanosync.distributed import start as start_processes
from nanosync.files import check_output_file, write_result
from nanosync.hardware import environment, pick_dtype
from nanosync.model_kind import model_config

# -----------------------------------------------------------------------------
init_from = "resume"  # 'resume' (a checkpoint in out_dir), 'gpt2', ..., 'gpt2-xl', a folder of weights
out_dir = "out"  # folder with checkpoints
checkpoint_step = "latest"  # 'latest', 'best' or a step
input = ""  # file in the format of hellaswag_val.jsonl; '' downloads that file into data/hellaswag
n_examples: int | None = None  # number of examples, the first of the file; None for all
batch_size = 32  # examples of a batch on each process, 4 sequences each
json = ""  # file for the result, '' for none
tp_size: int | None = None  # number of TP ranks, None for the number in training
block_types: list | None = None  # 'tp', 'spd' or 'parallel' for each layer, None for the schedule of training
sync_strategy: str | None = None  # in place of block_types, a strategy of train_reduced_sync.py
tp_processes = 1  # processes that hold the TP ranks of one model, under torchrun; 1 simulates them
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16'
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank(), takes="init_from")
check_at_least(config, 1, "batch_size")
if n_examples is not None:
    check_at_least(config, 1, "n_examples")
if json:
    check_output_file(json, "json")
processes = start_processes(device, tp_processes=tp_processes)
group, device = processes.group, processes.device
compute_dtype = pick_dtype(dtype, device)


def say(text: str) -> None:
    """Print a line on the main process."""
    print0(text, processes)


# weights and examples; checks come before slow work
found = models.find_for_inference(config, group)
if found is not None:
    trained = model_config(found.state["model"], models.INFERENCE_KINDS)
    hellaswag_eval.check_vocabulary(trained.used_vocab_size, found.state["meta"], found.path)
examples = on_main(lambda: hellaswag_eval.load(input, n_examples), group)
model = models.load_for_inference(config, found, processes, say)
if found is None:
    hellaswag_eval.check_vocabulary(model.config.used_vocab_size, models.meta_of(init_from), init_from)
hellaswag_eval.check_lengths(examples, model.config.block_size)
model.to(device)
if found is not None:
    say(f"{found.path}: {found.described()}")

# evaluation
torch.set_float32_matmul_precision("high")
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
last_said = time.perf_counter()


def progress(done: int, n: int) -> None:
    """Print the number of evaluated examples every 10 seconds."""
    global last_said
    if time.perf_counter() - last_said > 10:
        last_said = time.perf_counter()
        say(f"{done} of {n} examples")


with autocast:
    result = hellaswag_eval.accuracy(model, examples, batch_size, device, processes.dp_rank,
                                     processes.dp_size, processes.dp_group, progress=progress)
say(f"HellaSwag: acc {result['acc']:.4f}, acc_norm {result['acc_norm']:.4f} on {result['n']} examples")
if json and processes.main:
    source = {"weights": init_from, "step": None} if found is None else \
        {"weights": found.path, "step": found.step}
    write_result(json, {**source, **result, "config": config, "environment": environment(device)})
finish(processes)
