"""The speedrun: train a GPT-2-size model to 3.28 val loss on FineWeb as fast as possible on 8 GPUs.

8 GPUs of one machine, or any other number with the same batch:
$ python data/cached_fineweb10B.py 27
$ torchrun --standalone --nproc_per_node=8 train_gpt.py
$ torchrun --standalone --nproc_per_node=4 train_gpt.py --variant=palm

One process, on tokens from Python's own source:
$ python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
$ python train_gpt.py --dataset=python_source_gpt2 --num_iterations=1000 --warmdown_iters=284

This file has the settings, the model, the variants and the run, in this order, so a changed copy of it is an
experiment. Model, schedule and printed lines are those of modded-nanogpt's record of 2024-10-14 (rotary
embeddings, QK-norm, RMSNorm, ReLU^2, zero projections, Muon). An environment variable STAGE_<KEY> overrides
config files, and the command line overrides STAGE_<KEY>.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import models
from configurator import Config, check_at_least, check_at_most, check_choice, check_seed, configure
from kernels.cross_entropy import linear_cross_entropy
from kernels.qk_rotary import qk_norm_rotary, rms_norm
from kernels.relu_squared import relu_squared, relu_squared_mlp
from model import padded_vocab_size
from nanosync.checkpoint import exit_with_listing
from nanosync.dataloader import DataLoader, evaluate, evaluation_batches, open_dataset
from nanosync.diagnose import check_diagnosis, profiled
from nanosync.distributed import env_rank
from nanosync.errors import UserError, shown
from nanosync.fp8 import check_fp8, check_fp8_device, describe_fp8, follow_weights, runs_in_fp8, use_fp8
from nanosync.hardware import peak_memory
from nanosync.model_kind import MAX_LAYERS, ModelKind, check_size, schedule_description
from nanosync.muon import build_muon
from nanosync.optim import set_learning_rate, trapezoidal_learning_rate
from nanosync.random_states import seed_random_states
from nanosync.ranks import Ranks, column_parallel, f_op, g_op, row_parallel
from nanosync.run import Run
from nanosync.speedrun_model import SpeedrunConfig, SpeedrunModel
from nanosync.speedrun_setup import evaluation_windows, start_processes
from nanosync.step_clock import STATE, StepClock
from nanosync.step_schedules import Curriculum, DepthWarm, Plan, Schedule
from nanosync.sync_schedule import SyncSchedule
from reduced_sync_model import GPTConfig as SyncStrategy

# -----------------------------------------------------------------------------
# The defaults are the speedrun's baseline.
out_dir = "out-speedrun"  # folder for checkpoints and logs
variant = "baseline"  # or 'palm', 'curriculum', 'depth_warm', 'sync'
# data
dataset = "fineweb10B"  # a folder in data/, or a path
sequence_length = 1024  # tokens
batch_size = 512  # sequences of a step, over all GPUs
device_batch_size = 64  # sequences of a micro-batch on a GPU
# model
n_layer = 12
n_head = 6
n_embd = 768
# optimizers and their schedule: linear warm-up, constant, linear warm-down to 0
num_iterations = 5100
warmup_iters = 0
warmdown_iters = 1450
learning_rate = 0.0036  # of AdamW, for the embedding, which is also the head
muon_lr_ratio = 0.5  # learning rate of Muon, for the matrices, divided by learning_rate
muon_momentum = 0.95
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
# evaluation, logs, checkpoints
val_loss_every = 125  # steps between evaluations, 0: only at the end
val_tokens = 10485760  # tokens of an evaluation, the first of the val split; rounded down to whole sequences
log_interval = 1  # steps between train_loss lines
diagnose = 0  # profile so many steps after the first 10, print where their time goes, and exit
save_checkpoint = True  # save at the end, and when interrupted; False: never
checkpoint_interval = 0  # steps between further checkpoints, 0 for none
keep_checkpoints = 2  # number of checkpoints to keep, the newest; the best is kept as well
resume = ""  # 'latest', 'best', a step, a path of a checkpoint or an out_dir; 'auto': 'latest' or a new run
list_checkpoints = False  # print the checkpoints in out_dir and exit
# variant=curriculum: attention inside pieces whose length grows, with the same tokens per step
curriculum_lengths: list | None = None  # e.g. [256, 512, 768, 1024]; None: quarters of sequence_length
curriculum_shares: list | None = None  # share of the steps at which each length ends; None: 0.1, 0.2, ...
curriculum_plateau_steps = 50  # steps of each mean loss in the test for a plateau; 0: no test
curriculum_plateau_gain = 0.01  # a length ends early if the mean loss fell by less than this value
# variant=depth_warm: layers join one by one
depth_warm_layers = 4  # number of layers in the first step
depth_warm_share = 0.2  # share of the steps after which all layers take part in every step
depth_warm_survival = 0.5  # probability with which a new layer takes part in a step
# variant=sync: simulated tensor-parallel ranks that synchronise less often (see train_reduced_sync.py)
tp_size = 2
sync_strategy = "spd"  # 'standard', 'spd', 'selective', 'grouped' or 'custom'
attn_sync_layers: list | None = None
layers_per_group = 2
sync_points: list | None = None
# system
seed = 1337  # of initialisation and data order
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16'
compile = True  # torch.compile the model
fp8: bool | str = False  # products of the blocks in FP8, on Hopper and later: True or 'emulated'
fp8_head = False  # with fp8: the head's products as well
fp8_weight_gradients = False  # with fp8: gradients of the blocks' weights as well
deterministic = False  # compute the same bits in every run on a GPU, too; slower
timeout = 600.0  # longest time that processes wait for each other, also while one is saving, in seconds
backend = "auto"  # 'auto' (nccl on CUDA, else gloo), 'nccl', 'gloo'
# -----------------------------------------------------------------------------
if __name__ == "__main__":  # tests import the classes below
    config = configure(globals(), rank=env_rank(), environment="STAGE_")


# The model. B = sequences, T = tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size.


@dataclass
class GPTConfig(SpeedrunConfig):
    """Architecture of the speedrun's GPT. Raises UserError for values from which no model can be built."""

    sequence_length: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    used_vocab_size: int | None = None  # number of tokens; later rows of the embedding are padding
    variant: str = "baseline"
    tp_size: int = 1
    sync_points: list | None = None  # variant sync: sublayers after which ranks synchronise

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(f"variant={self.variant!r} is unknown: use {', '.join(VARIANTS)}")
        check_at_least(vars(self), 1, "sequence_length", "vocab_size", "n_layer", "n_head", "n_embd",
                       "tp_size")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd={self.n_embd} and n_head={self.n_head} do not give heads of even width: "
                            f"choose n_embd as a multiple of {2 * self.n_head}")
        self.check_used_vocab_size()
        points = range(2 * self.n_layer)
        if self.variant == "sync" and (self.n_head % self.tp_size or type(self.sync_points) is not list
                                       or not all(type(j) is int and j in points for j in self.sync_points)):
            raise UserError(f"tp_size={self.tp_size} must divide n_head={self.n_head}, and sync_points="
                            f"{shown(self.sync_points)} must be numbers of sublayers, below {len(points)}")

    @property
    def other_values(self) -> int:
        """Number of values of the model besides embedding and layers' matrices, for check_size."""
        return self.sequence_length * self.n_embd // self.n_head


def attend(qkv, cos, sin, crop: int, cache=None):
    """Apply QK-norm, rotary embedding, and causal attention inside pieces of `crop` tokens.

    If crop does not divide T, each sequence ends with a shorter piece.

    qkv: (B, T, 3, H, D). cos, sin: (T, D / 2). The result has the shape (B, T, H * D).
    cache: LayerCache with the tokens before these, instead of pieces; None in training.
    """
    B, T, _, H, D = qkv.shape
    qkv = qk_norm_rotary(qkv, cos, sin)
    if cache is not None:
        return cache.attend(*qkv).reshape(B, T, H * D)
    parts, begin = [], 0
    for end in [T] if T % crop == 0 or T < crop else [T - T % crop, T]:
        length = min(crop, end - begin)
        q, k, v = (x[:, begin:end].reshape(-1, length, H, D).transpose(1, 2) for x in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        parts.append(y.transpose(1, 2).reshape(B, end - begin, H * D))
        begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, crop: int, cache=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return self.c_proj(attend(qkv, cos, sin, crop, cache))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        if runs_in_fp8(self.c_fc):
            return self.c_proj(relu_squared(self.c_fc(x)))
        return relu_squared_mlp(x, self.c_fc.weight, self.c_proj.weight)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, crop: int, cache=None):
        x = x + self.attn(rms_norm(x), cos, sin, crop, cache)
        return x + self.mlp(rms_norm(x))


class GPT(SpeedrunModel):
    block = Block

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # also the head
            h=nn.ModuleList([self.block(config) for _ in range(config.n_layer)])))
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.sequence_length), 10000 ** -(torch.arange(0, D, 2) / D))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set projections into the residual stream to zero, other matrices to nn.Linear's distribution."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
            elif name.endswith(("wte.weight", "c_attn.weight", "c_fc.weight")):
                p.uniform_(-p.shape[1]**-0.5, p.shape[1]**-0.5)
            else:
                raise AssertionError(f"no initialisation rule for parameter {name}")

    def embed(self, idx):
        """Map token ids (B, T) to embeddings (B, T, C) in the compute dtype."""
        x = self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def rotations(self, T: int, crop: int):
        """Return cos and sin (T, D / 2) of positions that start at 0 in every piece of `crop` tokens."""
        lengths = [crop] * (T // crop) + [T % crop] * (T % crop > 0)
        return tuple(torch.cat([table[:n] for n in lengths]) if len(lengths) > 1 else table[:T]
                     for table in (self.cos, self.sin))

    def begin(self, idx, crop: int | None, layers: tuple[int, ...] | None, cache):
        """Return cos and sin, the embeddings, the length of pieces, and (number, LayerCache) of each layer,
        for `hidden`."""
        start = 0 if cache is None else cache.length
        crop = idx.size(1) if crop is None else crop
        cos, sin = (table[start:] for table in self.rotations(idx.size(1), crop))
        layers = range(self.config.n_layer) if layers is None else layers
        caches = [(i, None if cache is None else cache.layers[i]) for i in layers]
        return cos, sin, self.embed(idx[:, start:]), crop, caches

    def hidden(self, idx, crop: int | None = None, layers: tuple[int, ...] | None = None, cache=None):
        """Map token ids (B, T) to the input of the head (B, T, C), or of the tokens that the cache lacks.

        crop, layers: see forward. cache: KVCache of the tokens before them, None in training.
        """
        cos, sin, x, crop, caches = self.begin(idx, crop, layers, cache)
        for i, layer_cache in caches:
            x = self.transformer.h[i](x, cos, sin, crop, layer_cache)
        return rms_norm(x)

    def head(self, x):
        """Map the output of `hidden` (..., C) to logits (..., V), in its dtype."""
        return F.linear(x, self.transformer.wte.weight.to(x.dtype))

    def forward(self, idx, targets=None, crop: int | None = None, layers: tuple[int, ...] | None = None):
        """Map token ids (B, T) to (None, mean loss) with targets, or to (logits (B, T, V), None) without.

        targets: token ids (B, T), -1 at positions that the loss ignores.
        crop: length of the pieces inside which tokens see each other, None for T.
        layers: numbers of the layers that take part, None for all.
        """
        x = self.hidden(idx, crop, layers)
        if targets is None:
            return self.head(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.transformer.wte.weight, targets.flatten(),
                                          fp8=self.head_fp8, fp8_casts=self.head_casts)

    def flops_per_token(self, crop: int, n_layer: int) -> int:
        """Return the FLOPs of a training step per token, counted as in model.GPT.flops_per_token."""
        C, V = self.config.n_embd, self.config.vocab_size
        return 6 * (n_layer * 12 * C**2 + V * C) + 12 * n_layer * C * crop


# Variants: other blocks, or other schedules of the steps' computation.


class PalmBlock(Block):
    """Attention and MLP in parallel behind one norm (PaLM, arXiv 2204.02311, section 2).

    Their sum is scaled by 2**-0.5, as for two independent terms.
    """

    def forward(self, x, cos, sin, crop: int, cache=None):
        y = rms_norm(x)
        return x + (self.attn(y, cos, sin, crop, cache) + self.mlp(y)) * 2**-0.5


class PalmGPT(GPT):
    block = PalmBlock


class SyncGPT(GPT):
    """Simulated tensor-parallel ranks that add up their pending sums only where the schedule has a sync.

    f, g and shapes are those of tensor_parallel_model.py. Every process simulates all TP ranks.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.schedule = SyncSchedule.at(config.n_layer, config.sync_points)
        self.ranks, trace = Ranks(config.tp_size), []
        self.syncs_into(trace)
        self.syncs = len(trace)  # all-reduces of a forward pass

    @torch.no_grad()
    def syncs_into(self, trace: list) -> None:
        """Append the shape of each all-reduce of a forward pass to trace."""
        ranks, self.ranks = self.ranks, Ranks(self.config.tp_size, trace=trace)
        self.hidden(torch.zeros(1, 1, dtype=torch.int64), 1, tuple(range(self.config.n_layer)))
        self.ranks = ranks

    def hidden(self, idx, crop: int | None = None, layers: tuple[int, ...] | None = None, cache=None):
        cos, sin, base, crop, caches = self.begin(idx, crop, layers, cache)
        pending = None  # (R, B, T, C); base (B, T, C) is the same on all TP ranks
        for i, layer_cache in caches:
            after_attention, after_mlp = self.schedule.sublayers[2 * i:2 * i + 2]
            block = self.transformer.h[i]
            y = self.heads(block.attn, self.seen(base, pending), cos, sin, crop, layer_cache)
            base, pending = self.add(base, pending, y, block.attn.c_proj, after_attention.sync)
            y = relu_squared(column_parallel(self.seen(base, pending), block.mlp.c_fc))
            base, pending = self.add(base, pending, y, block.mlp.c_proj, after_mlp.sync)
        return rms_norm(base if pending is None else base + g_op(pending, self.ranks))

    def seen(self, base, pending):
        """Return the normalised streams of the ranks, (R, B, T, C), or (1, B, T, C) while they agree."""
        x = f_op(base, self.ranks if pending is not None else self.ranks.as_one)
        return rms_norm(x if pending is None else x + pending)

    def heads(self, attn, x, cos, sin, crop: int, cache):
        """Attend with each rank's heads: (m, B, T, C) -> (m, B, T, C / m)."""
        m, B, T, C = x.shape
        qkv = column_parallel(x, attn.c_attn, parts=3).view(m * B, T, 3, attn.n_head // m, C // attn.n_head)
        return attend(qkv, cos, sin, crop, cache).view(m, B, T, -1)

    def add(self, base, pending, y, projection: nn.Linear, sync: bool):
        """Add the row-parallel product of y (m, B, T, K / m), and synchronise if `sync`."""
        out = row_parallel(y, projection, self.ranks.local, together=sync)
        if not sync:
            return base, out if pending is None else pending + out
        if pending is not None:  # dtype: under autocast CUDA's sum would return fp32
            out = out + pending.sum(dim=0, keepdim=True, dtype=pending.dtype)
        return base + g_op(out, self.ranks), None


VARIANTS = {  # name -> model, schedule, names of the settings that only this variant has
    "baseline": (GPT, Schedule, ()),
    "palm": (PalmGPT, Schedule, ()),
    "curriculum": (GPT, Curriculum, ("curriculum_lengths", "curriculum_shares", "curriculum_plateau_steps",
                                     "curriculum_plateau_gain")),
    "depth_warm": (GPT, DepthWarm, ("depth_warm_layers", "depth_warm_share", "depth_warm_survival")),
    "sync": (SyncGPT, Schedule, ("tp_size", "sync_strategy", "attn_sync_layers", "layers_per_group",
                                 "sync_points")),
}


def model_config(config: Config, sequence_length: int, used_vocab_size: int, vocab_size: int) -> GPTConfig:
    """Make the architecture that the settings name. Raises UserError."""
    shape = {name: config[name] for name in ("n_layer", "n_head", "n_embd")}
    shared = dict(sequence_length=sequence_length, vocab_size=vocab_size, used_vocab_size=used_vocab_size)
    check_size(GPTConfig(**shape, **shared))
    if config["variant"] != "sync":
        return GPTConfig(**shape, **shared, variant=config["variant"])
    strategy = SyncStrategy(**shape, **{name: config[name] for name in VARIANTS["sync"][2]})
    if not strategy.schedule().is_plain:
        raise UserError(f"sync_strategy={strategy.sync_strategy!r} has sums that land late or weighted, and "
                        f"variant='sync' has none: use standard, spd, selective, grouped or custom")
    return GPTConfig(**shape, **shared, variant="sync", tp_size=strategy.tp_size,
                     sync_points=strategy.schedule().points)


def model_of(config: GPTConfig) -> GPT:
    """Build and initialise the model of a configuration."""
    return VARIANTS[config.variant][0](config)


# The run.
SPEEDRUN = ModelKind(
    "train_gpt.py", GPTConfig, model_of, settings_entry="config",
    settings=("sequence_length", "n_layer", "n_head", "n_embd", "variant",
              *(name for _, _, names in VARIANTS.values() for name in names)),
    state={"variant": dict, **STATE})


def check_settings(config: dict) -> None:
    """Raise UserError for wrong settings, before any work is done."""
    check_at_least(config, 1, "batch_size", "device_batch_size", "sequence_length", "n_layer", "n_head",
                   "n_embd", "val_tokens", "log_interval", "keep_checkpoints", "timeout")
    check_at_least(config, 0, "num_iterations", "warmup_iters", "warmdown_iters", "val_loss_every",
                   "checkpoint_interval", "curriculum_plateau_steps", "muon_lr_ratio")
    check_at_most(config, 1e6, "timeout")
    check_at_most(config, MAX_LAYERS, "n_layer")
    check_seed(config)
    check_diagnosis(config)
    check_fp8(config)


def check_variant(config: Config) -> None:
    """Raise UserError for an unknown variant, and for settings of another variant."""
    check_choice(config, "variant", VARIANTS)
    for other in VARIANTS:
        for name in VARIANTS[other][2]:
            if other != config["variant"] and config.origin[name] not in ("", "checkpoint"):
                raise UserError(f"{name} is for --variant={other}, but variant is {config['variant']!r}: "
                                f"leave {name} out")


if __name__ == "__main__":
    check_settings(config)
    kinds = models.KINDS | {models.SPEEDRUN: SPEEDRUN}
    exit_with_listing(config, kinds)
    processes, compute_dtype = start_processes(config)
    check_fp8_device(config, processes.device, compute_dtype)
    group, device = processes.group, processes.device
    at_once = device_batch_size * processes.world_size
    if batch_size % at_once:
        raise UserError(f"{batch_size=} is the total over all processes and must be a multiple of {at_once}, "
                        f"{device_batch_size=} times the number of processes, {processes.world_size}")
    micro_steps, share = batch_size // at_once, device_batch_size / batch_size  # weight in the mean loss

    # a resumed checkpoint decides the architecture
    run = Run(config, processes, kinds, own=(models.SPEEDRUN,), steps="num_iterations")
    tokens_per_step = batch_size * sequence_length
    check_variant(config)
    schedule = VARIANTS[variant][1](config)
    data = open_dataset(dataset, sequence_length, "sequence_length")
    run.check_data(data)
    architecture = model_config(config, sequence_length, *padded_vocab_size(data.meta))
    data.check_tokens(architecture.vocab_size)

    # model and optimizer; every process has all weights, and the momentum of its own matrices
    seed_random_states(seed)
    model = model_of(architecture)
    if run.resumed is not None:
        models.load_parameters(model, run.resumed.tensors("model"), run.resumed.path)
    model.to(device)
    use_fp8(model, config)
    optimizer = build_muon(model, learning_rate, learning_rate * muon_lr_ratio, (beta1, beta2), weight_decay,
                           muon_momentum, group, sum_gradients=True)
    clock = StepClock(run, compute_dtype, schedule.observe)
    run.restore(model, optimizer)
    if run.resumed is not None:
        schedule.load(run.resumed.state["variant"])
        clock.load(run.resumed.state)
    run.open(source=__file__)
    run.line("Python {python}, PyTorch {torch}, {device}, git {git_commit}".format(**run.environment))
    run.line(f"{model.n_parameters() / 1e6:.2f}M parameters, {compute_dtype}; {data.folder}: "
             f"{data.train.n_tokens:,} train and {data.val.n_tokens:,} val tokens")
    run.line(f"tokens per step: {device_batch_size} sequences x {sequence_length} tokens x {micro_steps} "
             f"accumulation x {processes.world_size} process{'es' * (processes.world_size > 1)} = "
             f"{tokens_per_step:,}")
    if fp8:
        follow_weights(model, optimizer)
        run.line(describe_fp8(config, model))
    if variant == "sync":
        run.line(f"{model.syncs} of {2 * n_layer} synchronization points, {tp_size} simulated ranks")
        run.log.event("schedule", **schedule_description(model))

    val_windows = evaluation_windows(config, data.val, run.line)
    if warmup_iters + warmdown_iters > num_iterations + (warmup_iters > 0):
        run.line(f"warning: {warmup_iters=} and {warmdown_iters=} exceed {num_iterations=}: the learning "
                 f"rate never reaches its peak")

    # speed
    torch.set_float32_matmul_precision("high")  # TF32 where a product is in fp32
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    if compile:
        model.compile(dynamic=False)
        limits = torch._dynamo.config  # a graph for each plan, and a graph without gradients
        limits.recompile_limit = max(limits.recompile_limit, len(schedule.plans()) + 2)
        if variant == "depth_warm":  # sets of layers are too many for a graph each, so compile blocks
            for block in model.transformer.h:
                block.compile(dynamic=False)
    whole = schedule.plans()

    def loss_of(x, y, plan: Plan):
        """Compute the mean loss of a micro-batch by a plan."""
        forward = model if plan in whole else model.forward  # compiled as a whole, or block by block
        with autocast:
            return forward(x, y, plan.crop, plan.layers)[1]

    def warm_up() -> None:
        """Compile everything before the clock starts, without a change of the weights."""
        run.line("compiling the model (about a minute)")
        zeros = torch.zeros(device_batch_size, sequence_length, dtype=torch.int64, device=device)
        for plan in whole + [Plan(sequence_length, (0,))] * (variant == "depth_warm"):
            loss_of(zeros, zeros.clone(), plan).backward()  # clone: x = y would trace another graph
        model.zero_grad(set_to_none=True)

    def run_evaluation() -> float | None:
        """Compute the mean loss of the first val_tokens tokens of the val split, None if asked to stop."""
        batches = evaluation_batches(data.val, val_windows, device_batch_size, device, processes.rank,
                                     processes.world_size, spread=False)
        return evaluate(lambda x, y: (None, loss_of(x, y, schedule.full)), batches, group,
                        run.stop_anywhere)

    # training loop
    loader = DataLoader(data.train, device_batch_size, micro_steps, architecture.vocab_size, seed, device,
                        processes.rank, processes.world_size, run.sample)
    run.begin(loader, tokens_per_step, kind=models.SPEEDRUN, random_states=False, progress=False,
              extra_state=lambda: {"variant": schedule.state(), **clock.state()},
              extra_status=lambda: {"variant": variant, "seed": seed, **clock.status()})
    if compile:
        warm_up()
    clock.start()
    for step in profiled(run):
        last, lr = step == num_iterations, trapezoidal_learning_rate(
            step, learning_rate, warmup_iters, warmdown_iters, num_iterations)
        save_due = save_checkpoint and step > 0 and \
            (last or (run.is_due(checkpoint_interval) and step % checkpoint_interval == 0))
        clock.begin_step(settle=save_due or run.is_due(val_loss_every))
        if run.due(val_loss_every) or (last and not diagnose):
            if step == run.first_step:  # nothing is on the screen yet that moves
                run.line(f"evaluating on {val_windows * sequence_length:,} tokens")
            clock.evaluated(run_evaluation(), lr)
        if not run.proceed(save=save_due):
            break

        # forward and backward; the loss of a step is the mean over its micro-batches and processes
        plan = schedule.plan(step)
        loss_share = torch.zeros((), device=device)
        for _ in range(micro_steps):
            loss = loss_of(*loader.next(), plan) * share
            loss.backward()
            loss_share += loss.detach()
        set_learning_rate(optimizer, lr)
        optimizer.step()  # also sums the gradients over the processes
        optimizer.zero_grad(set_to_none=True)
        flops = model.flops_per_token(plan.crop, len(plan.layers)) * tokens_per_step
        clock.step_done(step, loss_share, flops, tokens_per_step, lr=lr, crop=plan.crop,
                        layers=len(plan.layers))

    memory = peak_memory(device)
    notes = [] if memory is None else [f"peak memory: {memory / 2**20:.0f} MiB"]
    steps = max(1, run.step - run.first_step)
    run.end(*notes, f"each process sent {optimizer.bytes_sent / steps:,.0f} bytes a step")
