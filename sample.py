"""Generate text from a checkpoint of this repository or from GPT-2 weights, and print it token by token.

$ python sample.py out-python-char --start="def "
$ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
$ python sample.py --start=FILE:prompt.txt
$ git diff | python sample.py --start=FILE:-

Weights of any kind with another sync schedule, and on real TP ranks, one process each:
$ python sample.py --init_from=gpt2 --tp_size=2 --block_types="['spd']*12"
$ torchrun --standalone --nproc_per_node=2 sample.py --out_dir=out-spd --tp_processes=2 --tp_allreduce=oneshot
"""

import dataclasses
import signal
import sys

import torch

import models
from configurator import check_at_least, check_seed, configure
from nanosync import tokenizers
from nanosync.distributed import env_rank, finish
from nanosync.distributed import start as start_processes
from nanosync.errors import UserError
from nanosync.files import decode_text, expand_path, read_file
from nanosync.generation import Sampling
from nanosync.hardware import pick_dtype
from nanosync.rank_decoder import check_all_reduce

# -----------------------------------------------------------------------------
init_from = "resume"  # 'resume' (a checkpoint in out_dir), 'gpt2', ..., 'gpt2-xl', a folder of weights
out_dir = "out"  # folder with checkpoints
checkpoint_step = "best"  # 'best' (by val loss), 'latest' or a step
start = "\n"  # the prompt, "FILE:prompt.txt" for a file with it, "FILE:-" for stdin; may have <|endoftext|>
num_samples = 10
max_new_tokens = 500  # of each sample
temperature = 0.8  # 0 always takes the most likely token, 1 samples from the model's probabilities
top_k: int | None = 200  # sample from this many most likely tokens, None for all
top_p: float | None = None  # sample from the fewest tokens that together have this probability, None for all
stop_token: int | str | None = None  # end a sample at this token, an id or a text of one token
tp_size: int | None = None  # number of TP ranks, None for the number in training
block_types: list | None = None  # 'tp', 'spd' or 'parallel' for each layer, None for the schedule of training
sync_strategy: str | None = None  # in place of block_types, a strategy of train_reduced_sync.py
tp_processes = 1  # processes that hold the TP ranks, under torchrun; 1 simulates them
tp_allreduce = "nccl"  # sum over processes: 'nccl' (the group's all-reduce), 'oneshot' or 'fused' (CUDA)
slide = 1  # tokens that the window drops at once past block_size; 1: longest context, more: faster
seed = 1337
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16'
compile = False  # nanoGPT's setting, without effect: generation has its own kernels and CUDA graph
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank(), takes="init_from")
check_at_least(config, 1, "num_samples")
check_at_least(config, 0, "max_new_tokens")
check_seed(config)
check_at_least(config, 1, "slide")
check_all_reduce(tp_allreduce)
sampling = {field.name: config[field.name] for field in dataclasses.fields(Sampling)}
Sampling(**sampling).check()
MAX_PROMPT = 2**24  # bytes

# prompt and model
if start in ("FILE:-", "FILE:/dev/stdin"):
    if tp_processes > 1:
        raise UserError(f"start={start!r} is for one process: give several a file, --start=FILE:prompt.txt")
    start = decode_text(sys.stdin.buffer.read(), "stdin")
elif start.startswith("FILE:"):
    try:
        start = decode_text(read_file(expand_path(start[5:]), MAX_PROMPT), start[5:])
    except OSError as e:
        raise UserError(f"cannot read the prompt from {start[5:]}: {e.strerror or e}") from None
processes = start_processes(device, tp_processes=tp_processes)
if processes.dp_size > 1:
    raise UserError(f"the number of processes, {processes.world_size}, is not tp_processes={tp_processes}: "
                    f"start as many")
main, group, device = processes.main, processes.group, processes.device


def say(text: str, end: str = "\n") -> None:
    """Print a text on the main process."""
    if main:
        print(text, end=end, flush=True)


found = models.find_for_inference(config, group)
meta = models.meta_of(init_from) if found is None else found.state["meta"]
model = models.load_for_inference(config, found, processes, say)
tokenizer = tokenizers.from_meta(meta)
if isinstance(tokenizer, tokenizers.TokenIds):
    say(f"the tokenizer {tokenizer.name!r} is unknown here: prompt and samples are token ids")
prompt = tokenizer.encode(start)
if len(prompt) == 0:
    raise UserError("the prompt is empty: give at least one character as --start=...")
if isinstance(stop_token, str):
    ids = tokenizer.encode(stop_token)
    if len(ids) != 1:
        raise UserError(f"stop_token={stop_token!r} is {len(ids)} tokens, not one")
    stop_token = int(ids[0])
if isinstance(tokenizer, tokenizers.TokenIds):
    start = tokenizer.decode(prompt)
vocab_size = model.config.used_vocab_size
if prompt.max() >= vocab_size:
    raise UserError(f"the prompt has token {prompt.max()}, but the model has only tokens 0 to "
                    f"{vocab_size - 1}: the model was trained with another tokenizer")
if stop_token is not None and not 0 <= stop_token < vocab_size:
    raise UserError(f"stop_token={stop_token} is not one of the model's tokens, 0 to {vocab_size - 1}")
model.config.used_vocab_size = min(vocab_size, tokenizer.vocab_size)  # later tokens have no text
options = {"tp_allreduce": tp_allreduce} if tp_processes > 1 else {}
model.to(device, pick_dtype(dtype, device)).eval()

# generation
if hasattr(signal, "SIGPIPE"):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently when `| head` closes the pipe
if found is not None:
    say(f"{found.path}: {found.described()}")
if compile:
    say("compile=True has no effect: generation has its own kernels and, on a GPU, its own CUDA graph")
torch.manual_seed(seed)
torch.set_float32_matmul_precision("high")
decoder = model.decoder(1, slide=slide, **sampling, **options)
idx = torch.tensor(prompt.astype("int64"), device=device)[None]
for _ in range(num_samples):
    to_text = tokenizer.stream()
    say(start, end="")
    for (token,) in decoder.stream(idx, max_new_tokens):
        if token == stop_token:
            break
        say(to_text(token), end="")
    say("\n---------------")
finish(processes)
