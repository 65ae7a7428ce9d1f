"""Measure a training step or generation, alone or against a peer in the same process.

$ python bench.py --batch_size=64                    # tokens/s, MFU, memory of a training step
$ python bench.py --batch_size=64 --peer=FOLDER      # alternating with the GPT of FOLDER/model.py, a nanoGPT
$ python bench.py --batch_size=64 --compare=ddp,triton,eager,eager+triton    # ways to run it, see below
$ python bench.py --mode=generate --batch_size=32    # ms a step of generation; --peer=FOLDER or --peer=hf
$ torchrun --standalone --nproc_per_node=4 bench.py --batch_size=64    # DDP against GPUs alone

What divides or saves memory, by turns, and what each takes of it
$ torchrun --standalone --nproc_per_node=4 bench.py --batch_size=64 --compare=ddp,zero1,fsdp,fsdp+triton
$ torchrun --standalone --nproc_per_node=4 bench.py --mode=memory --compare=ddp,zero1,fsdp+block

Tensor-parallel ranks, beside the dense GPT: simulated, and on real ranks
$ python bench.py --model_type=distributed_gpt --tp_size=2 --block_types="['spd']*12"
$ python bench.py --model_type=distributed_gpt --tp_size=2 --syncs="[24,12,6,3,1]"
$ torchrun --standalone --nproc_per_node=4 bench.py --model_type=distributed_gpt --tp_size=4 --tp_processes=4
$ torchrun --standalone --nproc_per_node=4 bench.py --mode=decode --tp_allreduce=oneshot  # or --mode=prefill

Kernels of LayerNorm and of the head (n_embd, vocab_size) beside PyTorch's, torch.compile's and those of a
checkout of Liger-Kernel
$ python bench.py --mode=kernels --peer=FOLDER --rows="[16384,65536]" --widths="[768,4096]" --plot=kernels.png

All contenders do the same work on the same tokens. Each is warmed up, then they take turns, `steps` steps a
turn, for `rounds` rounds; a figure is the median over rounds, with the range. A training step is forward,
backward, clipping and AdamW. A step of generation is the time that one more token takes a batch: that of
max_new_tokens less that of one.

A strategy of `compare` is words with + between: ddp, zero1 or fsdp; tp (tp_processes hold a model); keep
(fsdp_reshard_after_forward=False), offload (fsdp_cpu_offload), 100M (fsdp_min_num_params=1e8, or another
number); block or selective (activation_checkpointing); triton; eager (not compiled). In mode train they take
turns in the same processes; in mode memory each has the GPUs to itself.

decode and prefill measure latency, each as a CUDA graph, for every width and batch size: of one GPU (TP=1),
of all of them by schedules with so many all-reduces, and without any (0 syncs: what communication costs, not
a model). Weights are random; a schedule's speed does not depend on them.
"""

import copy
import dataclasses
import gc
import importlib.util
import itertools
import json as json_
import os
import re
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks import kernels as benchmark
from configurator import check_at_least, check_seed, configure
from kernels import usable
from kernels.exchange import check_all_reduce
from kernels.layer_norm import MAX_WIDTH
from model import (
    GPT,
    GPTConfig,
    compile_blocks,
    initial_parameters,
    use_activation_checkpointing,
    use_triton_layer_norm,
)
from models import registry
from nanosync.dataloader import DataLoader, evaluate, evaluation_batches, open_dataset
from nanosync.distributed import Processes, all_data_parallel, all_values, barrier, env_rank, finish, start
from nanosync.errors import UserError
from nanosync.files import check_output_file, first_line
from nanosync.generation import capture_graph
from nanosync.hardware import check_compile, environment, peak_flops, pick_dtype
from nanosync.optim import build_adamw, clip_gradients
from nanosync.ranks import Ranks, ranks_on
from nanosync.sharding import Sharding, data_parallel, local_part
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig, SyncSchedule

# -----------------------------------------------------------------------------
mode = "train"  # 'train', 'memory', 'generate', 'kernels', or, under torchrun, 'decode' or 'prefill'
compare = ""  # train, memory: strategies by turns, e.g. 'ddp,zero1,fsdp,fsdp+tp'
largest = False  # memory: also the most layers with which a step fits, for each strategy
peer = ""  # a folder with a nanoGPT-like model.py; generate: or 'hf' (transformers); kernels: of Liger-Kernel
json = ""  # write the figures to this file as well
# model: GPT-2 (124M) with nanoGPT's padded vocabulary
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
bias = False
dropout = 0.0
model_type = "gpt"  # 'distributed_gpt' measures tensor-parallel ranks beside the dense GPT
tp_size = 2  # ranks of a distributed_gpt
block_types: list | None = None  # 'tp', 'spd' or 'parallel' for each layer; None: all 'tp'
syncs: list | None = None  # instead: several schedules, with so many all-reduces each, equally far apart
tp_processes = 1  # processes that hold the ranks of one model when training; 1 simulates them
tp_allreduce = "nccl"  # decode: 'nccl' (the group's all-reduce) or 'oneshot' (through symmetric memory)
batch_sizes: list = [1, 16]  # decode, prefill
widths: list = [768, 2048]  # decode, prefill: n_embd, in heads of 64; kernels, by default 768 to 8192
rows: list = [16384, 65536]  # kernels: how many of these a tensor has
plot = ""  # kernels: draw the shares of the copy bandwidth into this file
# measurement
steps = 10  # training steps a turn
warmup = 5  # training steps before the first turn, after the one that compiles
rounds = 7
dataset = ""  # tokens for training from this data set; '' takes random ones
loss_steps = 0  # first train each this many steps from the same weights and compare losses (needs dataset)
learning_rate = 6e-4
grad_clip = 1.0
# generation
prompt_tokens = 16
max_new_tokens = 256
temperature = 0.8
top_k: int | None = 200
# system
seed = 1337
device = "auto"
dtype = "auto"
compile = True  # torch.compile for training; generation uses its own kernels and CUDA graph
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank())


@dataclass(frozen=True)
class Strategy:
    """How a training step is divided over processes and what it keeps."""

    name: str
    zero1: bool
    fsdp: bool
    tp: bool
    keep: bool
    offload: bool
    triton: bool
    eager: bool
    min_num_params: float
    recompute: str


def parse_strategy(text: str) -> Strategy:
    """'fsdp+block' -> a Strategy. Raises UserError."""
    words = [word for word in text.split("+") if not re.fullmatch(r"\d+M", word)]
    sizes = [1e6 * int(word[:-1]) for word in text.split("+") if word not in words]
    known = ("ddp", "zero1", "fsdp", "tp", "keep", "offload", "block", "selective", "triton", "eager")
    for word in words:
        if word not in known:
            raise UserError(f"compare: {text!r} has {word!r}, and known are {', '.join(known)}, 100M")
    has = set(words).__contains__
    if sum(map(has, ("ddp", "zero1", "fsdp"))) > 1 or (has("block") and has("selective")):
        raise UserError(f"compare: {text!r} names two ways to do the same: take one of ddp, zero1 and fsdp, "
                        f"and one of block and selective")
    if len(sizes) > 1:
        raise UserError(f"compare: {text!r} has several numbers: give one")
    if (has("keep") or has("offload") or sizes) and not has("fsdp"):
        raise UserError(f"compare: keep, offload and a number are for fsdp, and {text!r} is without")
    if has("offload") and has("tp"):
        raise UserError(f"compare: {text!r}: offload and tp do not go together")
    if has("tp") and (tp_processes == 1 or dropout > 0):
        raise UserError(f"compare: {text!r} needs --tp_processes, how many processes hold a model, and no "
                        f"dropout")
    recompute = "block" if has("block") else "selective" if has("selective") else "none"
    return Strategy(text, *map(has, ("zero1", "fsdp", "tp", "keep", "offload", "triton", "eager")),
                    sizes[-1] if sizes else 1e6, recompute)


check_at_least(config, 1, "batch_size", "steps", "rounds", "warmup", "prompt_tokens")
check_at_least(config, 2, "max_new_tokens")
check_at_least(config, 0, "loss_steps", "grad_clip")
check_seed(config)
check_all_reduce(tp_allreduce)
if mode not in ("train", "memory", "generate", "kernels", "decode", "prefill"):
    raise UserError(f"mode={mode!r} is unknown: use train, memory, generate, kernels, decode or prefill")
if compare and (mode not in ("train", "memory") or peer or model_type != "gpt" or syncs or loss_steps):
    raise UserError("compare is for mode train or memory, and for nothing else at a time: leave peer, "
                    "model_type, syncs and loss_steps out")
if mode == "memory" and not compare:
    compare = "ddp"
if largest and mode != "memory":
    raise UserError("largest is for --mode=memory")
strategies = [parse_strategy(text) for text in compare.split(",")] if compare else []
if len({s.name for s in strategies}) < len(strategies):
    raise UserError(f"compare={compare!r} names a strategy twice")
recorded = {**config, "json": "", "peer": os.path.basename(os.path.normpath(peer)) if peer else ""}
if model_type not in ("gpt", "distributed_gpt"):
    raise UserError(f"model_type={model_type!r} is unknown: use gpt or distributed_gpt")
for name in ("syncs", "batch_sizes", "widths", "rows"):
    for number in config[name] or []:
        if type(number) is not int or number < 1:
            raise UserError(f"{name} has {number!r}: its entries are whole numbers from 1")
latency = mode in ("decode", "prefill")
if latency and config.origin["tp_size"]:
    raise UserError(f"tp_size: in mode {mode} every process holds one rank, so leave it out")
if syncs is not None and block_types is not None:
    raise UserError("syncs and block_types both name schedules: give one of them")
if (mode == "decode" and max_new_tokens < 3) or (latency and not (batch_sizes and widths)):
    raise UserError("decode needs max_new_tokens of at least 3, and batch_sizes and widths that are not "
                    "empty")
if latency and block_types is not None:
    syncs = []
elif syncs is None:
    syncs = [2 * n_layer // n for n in (1, 2, 4, 8, 24) if 2 * n_layer % n == 0] if latency else []
schedules = {f"{n} syncs": SyncSchedule.evenly(n_layer, n) for n in syncs}
if mode == "kernels":
    if not config.origin["widths"]:
        widths = recorded["widths"] = [768, 1024, 1600, 4096, 8192]
    if not (widths and rows) or max(widths) > MAX_WIDTH:
        raise UserError(f"kernels need rows, and widths up to {MAX_WIDTH}")
    liger = benchmark.load_liger(peer) if peer else None
elif plot:
    raise UserError("plot draws what mode kernels measures")
elif peer and not (os.path.isfile(os.path.join(peer, "model.py")) or (peer == "hf" and mode == "generate")):
    raise UserError(f"peer={peer!r} is no folder with a model.py" + ", nor 'hf'" * (mode == "generate"))
if peer == "hf" and importlib.util.find_spec("transformers") is None:
    raise UserError("peer='hf' needs the package transformers: pip install transformers")
if peer and mode == "generate" and temperature == 0:
    raise UserError("temperature=0 (always the most likely token) is nothing that a peer can do: compare at "
                    "a temperature above 0")
if loss_steps and not dataset:
    raise UserError("loss_steps needs real text: name a data set with --dataset=...")
if mode == "generate" and prompt_tokens + max_new_tokens > block_size:
    raise UserError(f"prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} together exceed "
                    f"block_size={block_size}")
for name in ("json", "plot"):
    if config[name]:
        check_output_file(config[name], name)
processes = start(device, tp_processes=tp_processes)
device = processes.device
if tp_processes > 1 and not (mode == "train" and model_type == "distributed_gpt") and not compare:
    raise UserError("tp_processes is for training a distributed_gpt, or for compare: decode and prefill use "
                    "all processes")
for s in strategies:
    if processes.world_size == 1 and (s.zero1 or s.fsdp or s.tp):
        raise UserError(f"compare: {s.name} divides a model over processes: start bench.py with torchrun")
    if s.tp and (s.zero1 or s.fsdp) and processes.dp_size == 1:
        raise UserError(f"compare: {s.name}: tp_processes={tp_processes} are all processes: nothing is left "
                        f"to divide: start more")
    if s.offload and device.type != "cuda":
        raise UserError(f"compare: {s.name}: offload moves memory off a GPU, and the device is {device}")
    if s.triton and not usable(torch.empty(0, device=device)):
        raise UserError(f"compare: {s.name}: no Triton kernel runs on {device} here")
if largest and device.type != "cuda":
    raise UserError(f"largest fills a GPU's memory, and the device is {device}")
if peer and (latency or model_type != "gpt"):
    raise UserError("a peer is measured against the dense GPT, in mode train or generate")
if peer and processes.world_size > 1:
    raise UserError("a peer is measured on one process: start bench.py with python, not torchrun")
if mode in ("generate", "kernels") and processes.world_size > 1:
    raise UserError(f"mode {mode} is measured on one process: start bench.py with python, not torchrun")
compute_dtype = pick_dtype(dtype, device)


def bench_kernels():
    """Print a line for each operation, size and contender; return the figures."""
    bandwidth = benchmark.copy_bandwidth(device, rounds)
    where, name, figures = environment(device), str(compute_dtype).removeprefix("torch."), []
    print(f"LayerNorm: {where['device']}, torch {where['torch']}, {name}, bias={bias}; a copy moves "
          f"{bandwidth / 1e9:.0f} GB/s; us, median of {rounds} rounds (range), share of the copy")
    for add, N, C in itertools.product((False, True), rows, widths):
        for f in benchmark.measure(add, N, C, compute_dtype, bias, liger, rounds, device, bandwidth):
            figures.append(f)
            print(f"{f['operation']:>12} {N:6} x {C:5} {f['name']:>8}  {f['us']:9.1f} "
                  f"({min(f['us_all']):.1f}-{max(f['us_all']):.1f})  {f['gb_per_second']:6.0f} GB/s  "
                  f"{100 * f['of_copy']:5.1f}%", flush=True)
    after = benchmark.copy_bandwidth(device, rounds)
    print(f"after that a copy moves {after / 1e9:.0f} GB/s")
    print(f"head, loss and gradients, V={vocab_size}: us, median (range), TFLOP/s, memory it adds")
    for N in rows:
        for f in benchmark.measure_head(N, n_embd, vocab_size, compute_dtype, liger, rounds, device):
            figures.append(f)
            memory = "n/a" if f["peak_bytes"] is None else f"{f['peak_bytes'] / 2**30:.2f} GB"
            print(f"{f['operation']:>12} {N:6} x {n_embd:5} {f['name']:>8}  {f['us']:9.1f} "
                  f"({min(f['us_all']):.1f}-{max(f['us_all']):.1f})  {f['tflop_per_second']:6.0f} TFLOP/s  "
                  f"{memory}", flush=True)
    if plot:
        benchmark.plot([f for f in figures if f["operation"] != "head"], plot,
                       f"LayerNorm, {where['device']}, {name}")
    return {"copy_gb_per_second": bandwidth / 1e9, "copy_gb_per_second_after": after / 1e9,
            "rows": figures}


if mode == "kernels":
    if not usable(torch.empty(0, device=device, dtype=compute_dtype)):
        raise UserError("kernels run on a CUDA GPU that Triton supports; TRITON_INTERPRET=1 only tries them, "
                        "slowly, on a CPU")
    if peer and device.type != "cuda":
        raise UserError("Liger's kernels need a GPU: they do not run in Triton's interpreter. Leave peer out")
    figures = bench_kernels()
    if json:
        with open(json, "w") as f:
            json_.dump({"config": recorded, "environment": environment(device), **figures}, f, indent=1)
    finish(processes)
    raise SystemExit(0)

if compile and mode in ("train", "memory"):
    check_compile(device)
data = open_dataset(dataset, block_size) if dataset else None
architecture = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                    n_embd=n_embd, dropout=dropout, bias=bias)
registry.check_size(GPTConfig(**architecture))
if (model_type == "distributed_gpt" or block_types is not None) and not (schedules or compare):
    ranks = processes.world_size if latency else tp_size
    blocks = DistributedGPTConfig(**architecture, tp_size=ranks, block_types=block_types)
    schedules = {f"{ranks} ranks": blocks.schedule()}
if data is not None:
    data.train.check_tokens(vocab_size)
torch.set_float32_matmul_precision("high")
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)


def synchronize():
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def allocated(peak: bool = False) -> int:
    """Bytes of GPU memory in use, or the most since the last reset."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def random_tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(vocab_size, 50257), shape, generator=generator).to(device)


def load_peer_module(folder: str):
    """The module FOLDER/model.py, under a name that does not collide with ours. Raises UserError."""
    path = os.path.join(folder, "model.py")
    spec = importlib.util.spec_from_file_location("peer_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # it is the user's code
        raise UserError(f"peer {path} cannot be imported: {type(e).__name__}: {first_line(e)}") from None
    method = "configure_optimizers" if mode == "train" else "generate"
    for owner, name in ((module, "GPTConfig"), (module, "GPT"), (getattr(module, "GPT", None), method)):
        if not hasattr(owner, name):
            raise UserError(f"peer {path} has no {name}: a peer's model.py has what nanoGPT's has")
    return module


def make_model(name: str):
    """A freshly initialised model on the device, all with the weights of ours."""
    torch.manual_seed(seed)
    if name in schedules:
        model = DistributedGPT(DistributedGPTConfig(**architecture, tp_size=tp_size))
        model.reschedule(schedules[name])
        if tp_processes > 1:
            model.place(ranks_on(processes.tp_group, tp_size))
        return model.to(device)
    ours = GPT(GPTConfig(**architecture))
    if name != "peer":
        return ours.to(device)
    try:
        theirs = peer_module.GPT(peer_module.GPTConfig(**architecture))
        theirs.load_state_dict(ours.state_dict(), strict=False)  # buffers such as a causal mask stay theirs
    except Exception as e:
        raise UserError(f"peer {peer}/model.py makes no model with the weights of ours: {type(e).__name__}: "
                        f"{first_line(e)}") from None
    return theirs.to(device)


peer_module = load_peer_module(peer) if peer not in ("", "hf") else None


def make_divided(strategy: Strategy, on: Processes, layers: int):
    """A model of so many layers by a strategy, with random weights drawn on the device."""
    torch.manual_seed(seed)
    config, kind = architecture | dict(n_layer=layers), "gpt"
    if strategy.tp:
        config, kind = config | dict(tp_size=tp_processes, block_types=block_types), "distributed_gpt"
    with torch.device("meta"):
        model = registry.build_model({"kind": kind, "config": config})
    weights = initial_parameters(model, device)
    if strategy.tp:
        model.place(ranks_on(on.tp_group, tp_processes))
    use_activation_checkpointing(model, strategy.recompute)
    if strategy.triton:
        use_triton_layer_norm(model)
    sharding = None
    if strategy.fsdp:
        sharding = Sharding(on, compute_dtype, strategy.min_num_params, not strategy.keep, strategy.offload)
    weights.fill(model, weights, "bench.py", device, sharding)
    return model


class Training:
    """A contender that trains: `step()` is one update on its next batch."""

    def __init__(self, name: str, on: Processes, strategy: Strategy | None = None, layers: int = 0):
        """on: the processes it runs on. A model on several of them gets the batches that they would have."""
        self.name, self.on = name, on
        self.batch_size = batch_size * (on.world_size // on.dp_size)
        before = allocated()
        self.model = make_divided(strategy, on, layers or n_layer) if strategy else make_model(name)
        if name == "peer":
            self.optimizer = self.model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), device.type)
        else:
            self.optimizer = build_adamw(self.model, learning_rate, (0.9, 0.95), 0.1,
                                         on.dp_group if strategy and strategy.zero1 else None)
        compiled = compile and not (strategy and strategy.eager)
        if compiled and strategy and strategy.fsdp:
            compile_blocks(self.model)
        elif compiled:
            self.model.compile()
        self.trained = data_parallel(self.model, on, compiled)
        self.batches = self.make_batches()
        started = time.perf_counter()
        self.step()
        synchronize()
        self.first_step_seconds = time.perf_counter() - started
        if device.type == "cuda":
            if on.dp_group is not None:  # DDP's first buckets are alive until the third
                self.step(), self.step()
            torch.cuda.reset_peak_memory_stats()
        self.step(zero_grad=False)
        self.peak_bytes, self.held_bytes = allocated(peak=True) - before, allocated() - before
        self.memory = self.tensors_by_role()
        self.optimizer.zero_grad(set_to_none=True)
        if loss_steps:
            self.val_loss = self.train_and_evaluate()
        for _ in range(warmup):
            self.step()

    def make_batches(self):
        if data is not None:
            return DataLoader(data.train, self.batch_size, 1, vocab_size, seed, device, self.on.dp_rank,
                              self.on.dp_size).next
        x, y = random_tokens(2, self.batch_size, block_size)
        return lambda: (x, y)

    def tensors_by_role(self) -> dict[str, int]:
        """Bytes on this device, when an update has been made and its gradients are still there."""
        parameters = list(self.model.parameters())
        roles = {"parameters": parameters, "gradients": [p.grad for p in parameters],
                 "optimizer": [t for state in self.optimizer.state.values() for t in state.values()
                               if torch.is_tensor(t)]}
        return {role: sum(t.nbytes for t in map(local_part, tensors) if t.device.type == device.type)
                for role, tensors in roles.items()}

    def step(self, zero_grad: bool = True):
        x, y = self.batches()
        with autocast:
            _, loss = self.trained(x, y)
        loss.backward()
        if self.name == "peer":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        else:
            model = self.model
            model.reduce_partial_gradients()
            clip_gradients(model.parameters(), grad_clip, model.split_parameters(), self.on.tp_group)
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def train_and_evaluate(self) -> float:
        """Val loss over 16 fixed batches after loss_steps further steps, 40 of them warm-up."""
        for i in range(loss_steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (i + 1) / 40)
            self.step()
        self.model.eval()
        with autocast:
            loss = evaluate(self.model, evaluation_batches(data.val, 16 * batch_size, batch_size, device))
        self.model.train()
        return loss

    def turn(self) -> float:
        """Seconds a step."""
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize()
        return (time.perf_counter() - started) / steps


class Generation:
    """A contender that generates: `generate(idx, n)` appends n tokens to each row of idx."""

    def __init__(self, name: str):
        self.name = name
        make = self.make_ours if name in schedules else getattr(self, "make_" + name.replace("-", "_"))
        self.generate = make()
        self.prompt = random_tokens(batch_size, prompt_tokens)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(2):
                self.generate(self.prompt, max_new_tokens)
                self.generate(self.prompt, 1)
        synchronize()
        self.first_step_seconds = time.perf_counter() - started

    def make_ours(self):
        model = make_model(self.name).to(compute_dtype).eval()
        return model.decoder(batch_size, temperature=temperature, top_k=top_k).generate

    def make_peer(self):
        model = make_model("peer").eval()

        def generate(idx, n):
            with autocast:
                return model.generate(idx, n, temperature=temperature, top_k=top_k)
        return generate

    def make_hf_dynamic(self, cache: str | None = None):
        from transformers import GPT2Config, GPT2LMHeadModel

        hf = GPT2LMHeadModel(GPT2Config(n_positions=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                        vocab_size=vocab_size)).to(device, compute_dtype).eval()
        options = dict(do_sample=True, temperature=temperature, top_k=top_k or 0, pad_token_id=0,
                       cache_implementation=cache)
        return lambda idx, n: hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                          min_new_tokens=n, **options)

    def make_hf_static(self):
        return self.make_hf_dynamic("static")

    @torch.no_grad()
    def turn(self) -> float:
        """Seconds a step: of max_new_tokens tokens, less the first with its prefill."""
        times = []
        for n in (1, max_new_tokens):
            synchronize()
            started = time.perf_counter()
            self.generate(self.prompt, n)
            synchronize()
            times.append(time.perf_counter() - started)
        self.prefill_seconds = times[0]
        return (times[1] - times[0]) / (max_new_tokens - 1)


def measure(contenders: list) -> dict[str, list[float]]:
    """Seconds a step of each contender in each round; they take turns."""
    times = {c.name: [] for c in contenders}
    for round_ in range(-1, rounds):  # the first does not count
        for contender in contenders:
            barrier(processes.group)
            if contender.name == "one GPU" and not processes.main:
                continue  # the others stand still meanwhile
            seconds = contender.turn()
            if contender.name == "each alone":  # of all GPUs at once, without communication: the slowest
                seconds = max(all_values(seconds, processes.group))
            if round_ >= 0:
                times[contender.name].append(seconds)
    barrier(processes.group)
    return times


def report(contenders: list, times: dict[str, list[float]], quiet: bool = False) -> dict:
    """Print the table, unless quiet; return its figures."""
    rows, peak = {}, peak_flops(device, compute_dtype)
    for c in contenders:
        seconds = statistics.median(times[c.name])
        row = {"ms": 1e3 * seconds, "ms_all": [1e3 * t for t in times[c.name]],
               "first_step_s": c.first_step_seconds}
        if mode in ("train", "memory"):
            scale = processes.world_size if c.name == "each alone" else c.on.world_size
            row["tokens_per_second"] = scale * batch_size * block_size / seconds
            flops = GPT.flops_per_token(contenders[0].model, block_size) * row["tokens_per_second"] / scale
            row["mfu"] = None if peak is None else flops / peak
            row["peak_memory_gb"] = c.peak_bytes / 2**30 if device.type == "cuda" else None
            if loss_steps:
                row["val_loss"] = c.val_loss
        else:
            row["tokens_per_second"] = batch_size / seconds
            row["prefill_ms"] = 1e3 * c.prefill_seconds
        rows[c.name] = row
    if quiet:
        return rows
    first = rows[contenders[0].name]
    for name, row in rows.items():
        extra = ""
        if mode in ("train", "memory"):
            mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
            gb = row["peak_memory_gb"]
            extra = f"  mfu {mfu:>6}  peak " + ("n/a" if gb is None else f"{gb:5.1f} GB")
            extra += f"  val loss after {loss_steps + 2} steps {row['val_loss']:.4f}" if loss_steps else ""
        else:
            extra = f"  first token {row['prefill_ms']:.2f} ms"
        print(f"{name:>10}  {row['ms']:9.3f} ms/step ({min(row['ms_all']):.3f}-{max(row['ms_all']):.3f})  "
              f"{row['tokens_per_second']:12,.0f} tok/s{extra}")
    for name, row in list(rows.items())[1:]:
        ratio = first["tokens_per_second"] / row["tokens_per_second"]
        if name == "one GPU":
            ratio /= processes.world_size
            print(f"DDP reaches {ratio:.3f} of {processes.world_size} times one GPU")
        elif name == "each alone":
            print(f"DDP reaches {ratio:.3f} of as many GPUs at once that do not communicate")
        elif name in schedules or compare:
            ratio = 1 / ratio
            print(f"{name} / {contenders[0].name} = {ratio:.3f}x in tokens/s")
        else:
            print(f"ours / {name} = {ratio:.3f}x in tokens/s")
        row["ratio"] = ratio
    return rows


class Latency:
    """A contender that answers one request at a time: `turn()` is seconds a token, or a prefill."""

    def __init__(self, name: str, model, B: int, **options):
        self.name, self.model = name, model
        self.variant = (model.schedule, model.ranks) if name != "TP=1" else None
        self.prompt = torch.randint(min(vocab_size, 50257), (B, prompt_tokens), device=device)
        self.decoder = model.decoder(B, temperature=temperature, top_k=top_k, **options)
        self.graph = None
        with torch.no_grad():
            if mode == "prefill" and device.type == "cuda":
                self.decoder.prefill(self.prompt)
                self.graph = capture_graph(lambda: self.decoder.prefill(self.prompt))
            self.turn()

    @torch.no_grad()
    def turn(self) -> float:
        if self.variant is not None:  # contenders share a model
            self.model.reschedule(self.variant[0])
            self.model.ranks = self.variant[1]
        synchronize()
        if mode == "prefill":
            started = time.perf_counter()
            for _ in range(steps):
                self.graph.replay() if self.graph else self.decoder.prefill(self.prompt)
            synchronize()
            return (time.perf_counter() - started) / steps
        for n, _ in enumerate(self.decoder.run(self.prompt, max_new_tokens)):  # prefill and capture first
            if n == 1:
                synchronize()
                started = time.perf_counter()
        synchronize()
        return (time.perf_counter() - started) / (max_new_tokens - 2)


def measure_latency(C: int, B: int) -> list[dict]:
    """A row for each contender of one width and batch size."""
    P = processes.world_size
    shape = architecture | dict(n_embd=C, n_head=C // 64)
    torch.manual_seed(seed)
    with torch.device(device):
        model = DistributedGPT(DistributedGPTConfig(**shape, tp_size=P))
        dense = GPT(GPTConfig(**shape)) if processes.main else None
    if P > 1:
        model.place(Ranks(1, processes.group))
    contenders = []
    for name, schedule in schedules.items() if P > 1 else ():
        model.reschedule(schedule)
        contenders.append(Latency(name, model.to(compute_dtype).eval(), B, tp_allreduce=tp_allreduce))
    if P > 1:
        model.reschedule(SyncSchedule.evenly(n_layer, 1))
        model.ranks = dataclasses.replace(model.ranks, dry=True)
        contenders.append(Latency("0 syncs", model, B))
    if dense is not None:
        contenders.append(Latency("TP=1", dense.to(compute_dtype).eval(), B))
    times = {c.name: [] for c in contenders}
    for round_ in range(-1, rounds):  # the first does not count
        for name in [*schedules, "0 syncs"] * (P > 1) + ["TP=1"]:
            barrier(processes.group)
            for c in contenders:
                if c.name == name:
                    seconds = c.turn()
                    if round_ >= 0:
                        times[name].append(1e6 * seconds)
    barrier(processes.group)
    if not processes.main:
        return []
    alone = statistics.median(times["TP=1"])
    sums = {c.name: c.decoder.group_sum.kind for c in contenders if c.name != "TP=1"}  # one may fall back
    if mode == "prefill":  # whose sums are always the group's own
        sums = {name: "none" if kind == "none" else "nccl" for name, kind in sums.items()}
    return [{"n_embd": C, "batch_size": B, "processes": 1 if name == "TP=1" else P, "name": name,
             "allreduce": sums.get(name), "us": statistics.median(t), "us_all": t,
             "of_one_gpu": statistics.median(t) / alone}
            for name, t in times.items()]


if latency:
    for C in widths:
        if C % 64 or (C // 64) % processes.world_size:
            raise UserError(f"widths: {C} is not made of heads of 64, equally many for each of "
                            f"{processes.world_size} processes")
    if prompt_tokens + (max_new_tokens if mode == "decode" else 0) > block_size:
        raise UserError(f"prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} exceed "
                        f"block_size={block_size}")
    where, figures = environment(device), []
    if processes.main:
        print(f"{mode}: {processes.world_size} x {where['device']}, torch {where['torch']}, "
              f"{str(compute_dtype).removeprefix('torch.')}, L={n_layer}, V={vocab_size}, prompt "
              f"{prompt_tokens}, {tp_allreduce}; us a {'token' if mode == 'decode' else 'prefill'}, median "
              f"of {rounds} rounds (range)")
    for C in widths:
        for B in batch_sizes:
            for row in measure_latency(C, B):
                figures.append(row)
                print(f"C={C:5} B={B:3} {row['name']:>9} on {row['processes']}  {row['us']:9.1f} "
                      f"({min(row['us_all']):.1f}-{max(row['us_all']):.1f})  {row['of_one_gpu']:.3f} of TP=1",
                      flush=True)
    if processes.main and json:
        with open(json, "w") as f:
            json_.dump({"config": recorded, "environment": where, "world_size": processes.world_size,
                        "rows": figures}, f, indent=1)
    finish(processes)
    raise SystemExit(0)

alone, everyone = Processes(0, 1, 0, device, None), all_data_parallel(processes)


def contender(strategy: Strategy, layers: int = 0) -> Training:
    return Training(strategy.name, processes if strategy.tp else everyone, strategy, layers)


def predicted_bytes(strategy: Strategy, c: Training) -> float:
    """Of parameters and gradients in fp32 and AdamW's two moments: 16 bytes a parameter, less what is divided
    over the data-parallel processes (arXiv 1910.02054); the parameters are this model's or its part's."""
    n, dp = sum(p.numel() for p in c.model.parameters()), c.on.dp_size
    if strategy.offload:
        return 0.0
    return n * (16 / dp if strategy.fsdp else 8 + 8 / dp if strategy.zero1 else 16)


def free_memory() -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    barrier(processes.group)


def measure_memory(strategy: Strategy) -> dict:
    """One strategy with the GPUs to itself: a row of what it takes, of the process that takes the most."""
    c = contender(strategy)
    times = measure([c])
    mine = {"bytes": c.memory | {"held": c.held_bytes, "peak": c.peak_bytes},
            "predicted": predicted_bytes(strategy, c)}
    rows = report([c], times, quiet=True) if processes.main else {strategy.name: {}}
    worst = max(all_values(mine, processes.group), key=lambda m: m["bytes"]["peak"])
    return rows[strategy.name] | worst


def largest_model(strategy: Strategy) -> dict:
    """About the most layers with which a step fits, 97% of the memory that is free now: by the peaks at two
    sizes, and then steps at the limit; what does not fit is noted as None."""
    free_memory()
    limit = 0.97 * min(all_values(torch.cuda.mem_get_info()[0], processes.group))
    tried, parameters = {}, {}

    def fits(layers: int) -> bool:
        try:
            c = contender(strategy, layers)
            peak, parameters[layers] = c.peak_bytes, c.model.n_parameters()
        except torch.OutOfMemoryError:  # on all alike: they hold the same
            peak = None
        peaks = all_values(peak, processes.group)
        tried[layers] = None if None in peaks else max(peaks)
        return tried[layers] is not None

    fitting = [n for n in (n_layer, n_layer + max(4, n_layer // 2)) if fits(n)]
    for _ in range(2):
        if len(fitting) < 2:
            break
        free_memory()
        n1, n2 = fitting[-2:]
        n = n2 + int((limit - tried[n2]) / (tried[n2] - tried[n1]) * (n2 - n1))
        if n <= n2 or not fits(n):
            break
        fitting.append(n)
    free_memory()
    best = max(fitting, default=None)
    return {"layers": best, "parameters": parameters.get(best), "peak": tried.get(best), "limit": limit,
            "tried": tried}


def print_memory(rows: list[dict]) -> None:
    """held: after an update with its gradients; what the peak has beyond that are activations and buffers."""
    columns = ("parameters", "gradients", "optimizer", "held", "predicted", "peak", "activations")
    first = rows[0]
    print(f"{'GB a GPU':>20}" + "".join(f"{column:>12}" for column in (*columns, "held/pred.", "tokens/s"))
          + f"  of {first['name']}")
    for row in rows:
        b = row["bytes"] | {"predicted": row["predicted"]}
        b["activations"] = b["peak"] - b["held"]
        if device.type != "cuda":  # nobody counts there
            b |= dict.fromkeys(("held", "peak", "activations"))
        cells = ["n/a" if b[column] is None else f"{b[column] / 2**30:.2f}" for column in columns]
        cells += [f"{b['held'] / b['predicted']:.3f}" if b["predicted"] and b["held"] else "n/a",
                  f"{row['tokens_per_second']:,.0f}"]
        ratio = row["tokens_per_second"] / first["tokens_per_second"]
        print(f"{row['name']:>20}" + "".join(f"{cell:>12}" for cell in cells) + f"  {ratio:.3f}")
        best = row.get("largest", {"layers": None})
        if best["layers"] is not None:
            print(f"{'':>20} a step fits with {best['layers']} layers, {best['parameters'] / 1e9:.2f}B "
                  f"parameters: {best['peak'] / 2**30:.1f} of {best['limit'] / 2**30:.1f} GB")


if mode == "memory":
    where, rows = environment(device), []
    for strategy in strategies:
        rows.append({"name": strategy.name, **measure_memory(strategy)})
        free_memory()
        if largest:
            rows[-1]["largest"] = largest_model(strategy)
        if processes.main and json:  # as far as it has come
            with open(json, "w") as f:
                json_.dump({"config": recorded, "environment": where, "world_size": processes.world_size,
                            "rows": rows}, f, indent=1)
    if processes.main:
        print(f"memory: {processes.world_size} x {where['device']}, torch {where['torch']}, "
              f"{str(compute_dtype).removeprefix('torch.')}, compile={compile}, B={batch_size} a process, "
              f"T={block_size}, L={n_layer} H={n_head} C={n_embd} V={vocab_size}; median of {rounds} rounds")
        print_memory(rows)
    finish(processes)
    raise SystemExit(0)

if strategies:
    contenders = [contender(s) for s in strategies]
elif mode == "train" and processes.world_size > 1:
    contenders = [Training("DDP", everyone), *(Training(name, processes) for name in schedules)]
    if not schedules:
        each = Training("each alone", alone)
        one = copy.copy(each)
        one.name = "one GPU"
        contenders += [each, one]
elif mode == "train":
    contenders = [Training(name, alone) for name in ["ours", *["peer"] * bool(peer), *schedules]]
else:
    peers = ["hf-dynamic", "hf-static"] if peer == "hf" else ["peer"] * bool(peer)
    contenders = [Generation(name) for name in ["ours", *peers, *schedules]]
where = environment(device)
if processes.main:
    print(f"{mode}: {where['device']}, torch {where['torch']}, {str(compute_dtype).removeprefix('torch.')}, "
          f"compile={compile if mode == 'train' else 'n/a'}, B={batch_size}, "
          f"T={block_size if mode == 'train' else f'{prompt_tokens}+{max_new_tokens}'}, "
          f"L={n_layer} H={n_head} C={n_embd} V={vocab_size}, {processes.world_size} processes; "
          f"median of {rounds} rounds (range)")
times = measure(contenders)
if processes.main:
    figures = report(contenders, times)
    if json:
        with open(json, "w") as f:
            json_.dump({"config": recorded, "environment": where, "world_size": processes.world_size,
                        "contenders": figures}, f, indent=1)
finish(processes)
