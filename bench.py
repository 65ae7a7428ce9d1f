"""Measure a training step or generation, alone or against a peer in the same process.

$ python bench.py --batch_size=64                    # tokens/s, MFU, memory of a training step
$ python bench.py --batch_size=64 --peer=FOLDER      # alternating with the GPT of FOLDER/model.py, a nanoGPT
$ python bench.py --batch_size=64 --compare=ddp,triton,eager,eager+triton    # ways to run it, see below
$ python bench.py --mode=generate --batch_size=32    # ms a step of generation; --peer=FOLDER or --peer=hf
$ torchrun --standalone --nproc_per_node=4 bench.py --batch_size=64    # DDP against GPUs alone

Strategies that divide or save memory: their speed, and the memory that each needs
$ torchrun --standalone --nproc_per_node=4 bench.py --batch_size=64 --compare=ddp,zero1,fsdp,fsdp+triton
$ torchrun --standalone --nproc_per_node=4 bench.py --mode=memory --compare=ddp,zero1,fsdp+block

Tensor-parallel ranks, beside the dense GPT: simulated, and on real ranks
$ python bench.py --model_type=distributed_gpt --tp_size=2 --block_types="['spd']*12"
$ python bench.py --model_type=distributed_gpt --tp_size=2 --syncs="[24,12,6,3,1,'palm','dtp:2']"
$ torchrun --standalone --nproc_per_node=4 bench.py --model_type=distributed_gpt --tp_size=4 --tp_processes=4
$ torchrun --standalone --nproc_per_node=4 bench.py --mode=decode --tp_allreduce=oneshot  # or --mode=prefill
$ torchrun --standalone --nproc_per_node=2 bench.py --mode=decode --tp_allreduce=oneshot,fused \
      --syncs="[24,6,[24,1],'ladder']"

Kernels of LayerNorm and of the head beside PyTorch's, torch.compile's and those of a checkout of Liger-Kernel
$ python bench.py --mode=kernels --peer=FOLDER --rows="[16384,65536]" --widths="[768,4096]" --plot=kernels.png

All contenders do the same work on the same tokens. Each is warmed up; then they take turns, `steps` steps a
turn, for `rounds` rounds. A figure is the median over the rounds, with the range. A training step is forward,
backward, clipping and AdamW. A step of generation is the time of one more token of a batch: the time for
max_new_tokens tokens less that for one. On one process a contender may fail: the others continue.

A strategy of `compare` is words with + between: ddp, zero1 or fsdp; tp (tp_processes hold a model); keep
(fsdp_reshard_after_forward=False), offload (fsdp_cpu_offload), 100M (fsdp_min_num_params=1e8, or another
number); block or selective (activation_checkpointing); triton; gelu, also with -derivative, -derivative8 or
-recompute (kernels/gelu_mlp.py); qkv (kernels/qkv_linear.py); eager (not compiled); graphs (CUDA graphs);
fp8 or fp8_emulated, fp8_head, weight_gradients and gelu_apart (no kernels/gelu_cast.py); torchao or
torchao_rowwise. In mode train they take turns, also with a peer; in mode memory each is alone.

decode and prefill measure latency, each as a CUDA graph, for every width and batch size: of one GPU (TP=1),
of all GPUs by the schedules of `syncs`, and without any (0 syncs: the cost of communication, not a
model). Weights are random; a schedule's speed does not depend on them.
"""

import itertools
import statistics

import torch

from benchmarks import kernels, latency, memory, peers, strategies
from benchmarks.harness import Attempts, Bench, in_unit, seconds_per_call, take_turns, with_range
from benchmarks.strategies import Strategy
from configurator import check_at_least, check_seed, configure
from model import GPT, GPTConfig
from nanosync.dataloader import DataLoader, evaluate, evaluation_batches, open_dataset
from nanosync.distributed import Processes, all_data_parallel, all_values, env_rank, finish, start
from nanosync.errors import UserError
from nanosync.files import check_output_file
from nanosync.hardware import check_compile, peak_flops, pick_dtype
from nanosync.model_kind import check_size
from nanosync.parallelism import Parallelism
from nanosync.rank_decoder import check_all_reduce
from nanosync.ranks import ranks_on
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig

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
syncs: list | None = None  # instead: several, each so many all-reduces, [all-reduces, delay], or a strategy
tp_processes = 1  # processes that hold the ranks of one model when training; 1 simulates them
tp_allreduce = "nccl"  # decode: 'nccl' (the group's all-reduce), 'oneshot', 'fused' (both CUDA), or several
batch_sizes: list = [1, 16]  # decode, prefill
widths: list = [768, 2048]  # decode, prefill: n_embd, in heads of 64; kernels, by default 768 to 8192
rows: list = [16384, 65536]  # kernels: how many of these a tensor has
plot = ""  # kernels: draw the shares of the copy bandwidth into this file
# measurement
steps = 10  # training steps a turn
warmup = 5  # training steps before the first turn, after the one that compiles
rounds = 7
seconds = 0  # begin no further contender or round so long after the start, 0 for no limit; one process
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


def check_settings(config: dict) -> None:
    """Raise UserError for settings that are wrong, before processes start."""
    mode, block_size = config["mode"], config["block_size"]
    check_at_least(config, 1, "batch_size", "steps", "rounds", "warmup", "prompt_tokens")
    check_at_least(config, 2, "max_new_tokens")
    check_at_least(config, 0, "loss_steps", "grad_clip", "seconds")
    check_seed(config)
    for kind in config["tp_allreduce"].split(","):
        check_all_reduce(kind)
    if mode not in ("train", "memory", "generate", "kernels", "decode", "prefill"):
        raise UserError(f"mode={mode!r} is unknown: use train, memory, generate, kernels, decode or prefill")
    strategies.check_compare(config)
    if config["model_type"] not in ("gpt", "distributed_gpt"):
        raise UserError(f"model_type={config['model_type']!r} is unknown: use gpt or distributed_gpt")
    for name in ("batch_sizes", "widths", "rows"):
        for number in config[name] or []:
            if type(number) is not int or number < 1:
                raise UserError(f"{name} has {number!r}: its entries are whole numbers from 1")
    if config["syncs"] is not None and config["block_types"] is not None:
        raise UserError("syncs and block_types both name schedules: give one of them")
    for width in config["widths"] if mode in latency.MODES else [config["n_embd"]]:
        sizes = {name: config[name] for name in ("block_size", "vocab_size", "n_layer")}
        check_size(GPTConfig(**sizes, n_head=1, n_embd=width))
    if config.origin["tp_size"] and mode in ("train", "generate") and config["model_type"] == "gpt" \
            and config["block_types"] is None and config["syncs"] is None:
        raise UserError("tp_size is for --model_type=distributed_gpt, as the dense GPT has no ranks: add "
                        "that setting, or leave tp_size out")
    latency.check_latency(config)
    latency.several_schedules(config)
    kernels.check_kernels(config)
    if mode != "kernels":
        peers.check_peer(config)
    if config["loss_steps"] and not config["dataset"]:
        raise UserError("loss_steps needs real text: name a data set with --dataset=...")
    prompt_tokens, max_new_tokens = config["prompt_tokens"], config["max_new_tokens"]
    if mode == "generate" and prompt_tokens + max_new_tokens > block_size:
        raise UserError(f"{prompt_tokens=} and {max_new_tokens=} exceed {block_size=}: lower one of them")
    for name in ("json", "plot"):
        if config[name]:
            check_output_file(config[name], name)


def name_of_blocks(model: DistributedGPTConfig) -> str:
    """Name the schedule of a model by its runs of equal blocks and its syncs: 'tp*4+spd*8, 16 syncs'."""
    blocks = itertools.groupby(model.block_types or ["tp"] * model.n_layer)
    runs = [(kind, len(list(run))) for kind, run in blocks]
    return f"{'+'.join(f'{kind}*{n}' for kind, n in runs)}, {len(model.schedule().points)} syncs"


def check_processes(config: dict, processes: Processes) -> None:
    """Raise UserError for settings that these processes and their device cannot measure."""
    mode, peer, device, alone = config["mode"], config["peer"], processes.device, processes.world_size == 1
    compared = strategies.parse(config)
    trains_ranks = mode == "train" and config["model_type"] == "distributed_gpt"
    if config["tp_processes"] > 1 and not trains_ranks and not compared:
        raise UserError("tp_processes is for training a distributed_gpt, or for compare: decode and prefill "
                        "use all processes")
    strategies.check_processes(compared, processes, pick_dtype(config["dtype"], device))
    if config["largest"] and device.type != "cuda":
        raise UserError(f"largest fills a GPU's memory, and the device is {device}")
    if peer and (mode in latency.MODES or config["model_type"] != "gpt"):
        raise UserError("a peer is measured against the dense GPT, in mode train or generate")
    if peer and not alone:
        raise UserError("a peer is measured on one process: start bench.py with python, not torchrun")
    if mode in ("generate", "kernels") and not alone:
        raise UserError(f"mode {mode} is measured on one process: start bench.py with python, not torchrun")


check_settings(config)
if mode == "kernels" and not config.origin["widths"]:
    config["widths"] = kernels.WIDTHS
compared, schedules = strategies.parse(config), latency.several_schedules(config)
processes = start(device, tp_processes=tp_processes)
device = processes.device
check_processes(config, processes)
compute_dtype = pick_dtype(dtype, device)
bench = Bench(config, processes, compute_dtype)
if mode == "kernels":
    kernels.run(bench)
    finish(processes)
    raise SystemExit(0)

# data, sizes and schedules
if compile and mode in ("train", "memory"):
    check_compile(device)
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64  # models of all contenders share the code of `forward`
data = open_dataset(dataset, block_size) if dataset else None
if (model_type == "distributed_gpt" or block_types is not None) and not (schedules or compared):
    ranks = processes.world_size if mode in latency.MODES else tp_size
    blocks = DistributedGPTConfig(**bench.architecture, tp_size=ranks, block_types=block_types)
    schedules = {f"{ranks} ranks, {name_of_blocks(blocks)}": blocks.schedule()}
if data is not None:
    data.train.check_tokens(vocab_size)
peer_module = peers.load_module(peer, mode) if peer not in ("", "hf") else None
torch.set_float32_matmul_precision("high")
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
if mode in latency.MODES:
    latency.run(bench, schedules)
    finish(processes)
    raise SystemExit(0)


def random_tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(vocab_size, 50257), shape, generator=generator).to(device)


def make_model(name: str):
    torch.manual_seed(seed)
    if name in schedules:
        model = DistributedGPT(DistributedGPTConfig(**bench.architecture, tp_size=tp_size))
        model.reschedule(schedules[name])
        if tp_processes > 1:
            model.place(ranks_on(processes.tp_group, tp_size))
    else:
        model = GPT(GPTConfig(**bench.architecture))
    if name == "peer":
        model = peers.build_model(peer_module, model, bench)
    return model.to(device)


class Training:
    """A contender that trains: `step()` is one update on its next batch, `turn()` the seconds of a step."""

    def __init__(self, name: str, on: Processes, strategy: Strategy | None = None, layers: int = 0):
        """on: the processes that train. A model on several gets the batches of them all. layers: of the model
        by a strategy, 0 for n_layer."""
        self.name, before = name, memory.allocated(device)
        if strategy is None:
            self.parallel, self.model = Parallelism(on, compute_dtype), make_model(name)
        else:
            self.parallel = strategy.parallelism(on, compute_dtype)
            self.model = strategies.build_model(strategy, self.parallel, bench, layers or n_layer)
        if name == "peer":
            self.optimizer = self.model.configure_optimizers(0.1, learning_rate, (0.9, 0.95), device.type)
        else:
            self.optimizer = strategies.build_optimizer(self.model, self.parallel, learning_rate)
        self.trained = self.parallel.prepare(self.model, compile and (strategy is None or strategy.compiled),
                                             strategy is not None and strategy.graphs)
        self.batches = self.make_batches(batch_size * (on.world_size // on.dp_size))
        self.first_step_seconds = seconds_per_call(self.step, device)
        self.measure_memory(before)
        if loss_steps:
            self.val_loss = self.train_and_evaluate()
        for _ in range(warmup):
            self.step()

    def make_batches(self, sequences: int):
        """Return a function that makes the next batch (x, y), each (sequences, block_size)."""
        if data is not None:
            on = self.parallel.processes
            return DataLoader(data.train, sequences, 1, vocab_size, seed, device, on.dp_rank, on.dp_size).next
        x, y = random_tokens(2, sequences, block_size)
        return lambda: (x, y)

    def step(self, zero_grad: bool = True) -> None:
        x, y = self.batches()
        with autocast:
            _, loss = self.trained(x, y)
        loss.backward()
        if self.name == "peer":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        else:
            self.model.reduce_partial_gradients()
            self.parallel.clip(self.model, grad_clip, self.optimizer)
        self.optimizer.step()
        if zero_grad:
            self.optimizer.zero_grad(set_to_none=True)

    def measure_memory(self, before: int) -> None:
        """Make two more steps, more under DDP on GPUs, and note what the second holds; before: bytes in use
        without this contender."""
        if device.type == "cuda":
            if self.parallel.processes.dp_group is not None:  # DDP's first buckets are alive until the third
                self.step(), self.step()
            torch.cuda.reset_peak_memory_stats()
        self.step(zero_grad=False)
        self.peak_bytes = memory.allocated(device, peak=True) - before
        self.held_bytes = memory.allocated(device) - before
        self.memory = memory.bytes_by_role(self.model, self.optimizer, device)
        self.optimizer.zero_grad(set_to_none=True)

    def train_and_evaluate(self) -> float:
        """Return the val loss over 16 fixed batches after loss_steps further steps, 40 of them warm-up."""
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
        return seconds_per_call(self.step, device, steps)

    def figures(self, times: list[float]) -> dict:
        """Make a row of the table from the seconds a step in each round."""
        world_size = self.parallel.processes.world_size
        tokens_per_second = world_size * batch_size * block_size / statistics.median(times)
        flops, peak = flops_per_token * tokens_per_second / world_size, peak_flops(device, compute_dtype)
        row = {**in_unit("ms", 1e3, times), "first_step_s": self.first_step_seconds,
               "tokens_per_second": tokens_per_second, "mfu": None if peak is None else flops / peak,
               "peak_memory_gb": self.peak_bytes / 2**30 if device.type == "cuda" else None}
        return row | ({"val_loss": self.val_loss} if loss_steps else {})

    @staticmethod
    def in_words(row: dict) -> str:
        mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        peak = "n/a" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:5.1f} GB"
        loss = f"  val loss after {loss_steps + 2} steps {row['val_loss']:.4f}" if loss_steps else ""
        return f"mfu {mfu:>6}  peak {peak}{loss}"


class Generation:
    """A contender that generates: `generate(idx, n)` appends n tokens to each row of idx, `turn()` is the
    seconds of a step."""

    def __init__(self, name: str):
        self.generate = self.make_generator(name)
        self.prompt = random_tokens(batch_size, prompt_tokens)
        self.first_step_seconds = seconds_per_call(self.warm_up, device)

    def make_generator(self, name: str):
        if name.startswith("hf-"):
            return peers.hugging_face_generator("static" if name == "hf-static" else None, bench)
        model = make_model(name).eval()
        if name == "peer":
            return peers.generator(model, bench, autocast)
        return model.to(compute_dtype).decoder(batch_size, temperature=temperature, top_k=top_k).generate

    @torch.no_grad()
    def warm_up(self) -> None:
        for _ in range(2):
            self.generate(self.prompt, max_new_tokens)
            self.generate(self.prompt, 1)

    @torch.no_grad()
    def turn(self) -> float:
        """Time the generation of max_new_tokens tokens, less the first token with its prefill."""
        self.prefill_seconds = seconds_per_call(lambda: self.generate(self.prompt, 1), device)
        whole = seconds_per_call(lambda: self.generate(self.prompt, max_new_tokens), device)
        return (whole - self.prefill_seconds) / (max_new_tokens - 1)

    def figures(self, times: list[float]) -> dict:
        return {**in_unit("ms", 1e3, times), "first_step_s": self.first_step_seconds,
                "tokens_per_second": batch_size / statistics.median(times),
                "prefill_ms": 1e3 * self.prefill_seconds}

    @staticmethod
    def in_words(row: dict) -> str:
        return f"first token {row['prefill_ms']:.2f} ms"


alone, everyone = Processes(0, 1, 0, device, None), all_data_parallel(processes)


def train_by(strategy: Strategy, layers: int = 0) -> Training:
    return Training(strategy.name, processes if strategy.tp else everyone, strategy, layers)


with torch.device("meta"):  # of the dense GPT, for all contenders
    flops_per_token = GPT(GPTConfig(**bench.architecture)).flops_per_token(block_size)
if mode == "memory":
    memory.run(bench, compared, train_by)
    finish(processes)
    raise SystemExit(0)

# contenders by name; the others are compared with the first
if compared:
    makers = {"peer": lambda: Training("peer", alone)} if peer else {}
    makers |= {strategy.name: lambda s=strategy: train_by(s) for strategy in compared}
elif mode == "train" and processes.world_size > 1:
    makers = {name: lambda n=name: Training(n, processes if n in schedules else everyone)
              for name in ["DDP", *schedules]}
    if not schedules:
        makers |= {"each alone": lambda: Training("ours", alone), "one GPU": lambda: contenders["each alone"]}
elif mode == "train":
    makers = {n: lambda n=n: Training(n, alone) for n in ["ours", *["peer"] * bool(peer), *schedules]}
else:
    rivals = ["hf-dynamic", "hf-static"] if peer == "hf" else ["peer"] * bool(peer)
    makers = {name: lambda n=name: Generation(n) for name in ["ours", *rivals, *schedules]}
attempts, contenders = Attempts(seconds) if processes.world_size == 1 else None, {}
for name, make in makers.items():
    contender = make() if attempts is None else attempts.run(name, make, share=0.75)
    if contender is not None:
        contenders[name] = contender
if not contenders:
    raise UserError(f"no contender runs: {attempts.failures}")
turns = {name: contender.turn for name, contender in contenders.items()}
if "each alone" in turns:  # all GPUs at a time without communication, of which the slowest counts
    turns["each alone"] = lambda: max(all_values(contenders["each alone"].turn(), processes.group))
    turns["one GPU"] = contenders["one GPU"].turn if processes.main else None  # the others are idle meanwhile


def rows_of(times: dict[str, list[float]]) -> dict[str, dict]:
    rows = {name: contenders[name].figures(t) for name, t in times.items() if t}
    if "each alone" in rows:
        rows["each alone"]["tokens_per_second"] *= processes.world_size
    return rows


def write(rows: dict[str, dict]) -> None:
    failed = {name: {"failed": reason} for name, reason in attempts.failures.items()} if attempts else {}
    bench.write_json(world_size=processes.world_size, contenders=failed | rows)


if processes.main:
    tokens = block_size if mode == "train" else f"{prompt_tokens}+{max_new_tokens}"
    print(f"{mode}: {bench.machine}, compile={compile if mode == 'train' else 'n/a'}, B={batch_size}, "
          f"T={tokens}, L={n_layer} H={n_head} C={n_embd} V={vocab_size}, {processes.world_size} processes; "
          f"median of {rounds} rounds (range)", flush=True)
times = take_turns(turns, rounds, processes.group, attempts=attempts,
                   after_round=lambda figures: write(rows_of(figures)) if processes.main else None)
if processes.main:
    rows = rows_of(times)
    width = max(map(len, [*rows, " " * 10]))
    for name, row in rows.items():
        print(f"{name:>{width}}  {with_range(row, 'ms', 9, 3, ' ms/step')}  "
              f"{row['tokens_per_second']:12,.0f} tok/s  {contenders[name].in_words(row)}")
    for name, reason in attempts.failures.items() if attempts else ():
        print(f"{name:>{width}}  {reason}")
    first = next(iter(rows), None)
    for name, row in list(rows.items())[1:]:
        ratio = rows[first]["tokens_per_second"] / row["tokens_per_second"]
        if name == "one GPU":
            ratio /= processes.world_size
            line = f"DDP reaches {ratio:.3f} of {processes.world_size} times one GPU"
        elif name == "each alone":
            line = f"DDP reaches {ratio:.3f} of as many GPUs at once that do not communicate"
        elif name in schedules or compared:
            ratio = 1 / ratio
            line = f"{name} / {first} = {ratio:.3f}x in tokens/s"
        else:
            line = f"ours / {name} = {ratio:.3f}x in tokens/s"
        row["ratio"] = ratio
        print(line)
    write(rows)
finish(processes)
