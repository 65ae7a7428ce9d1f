"""The speedrun: train a GPT-2-size model to 3.28 val loss on FineWeb as fast as possible on 8 GPUs.

8 GPUs of one machine, or any other number with the same batch:
$ python data/cached_fineweb10B.py 27
$ torchrun --standalone --nproc_per_node=8 train_gpt.py
$ torchrun --standalone --nproc_per_node=4 train_gpt.py --variant=palm

One process, on tokens that are on every machine:
$ python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
$ python train_gpt.py --dataset=python_source --num_iterations=1000 --warmdown_iters=284

Architecture, schedules and loop are all here, so that a copy of this file is an experiment: its settings,
then the model, then the variants, then the run. Model, schedule and the lines that are printed are those of
modded-nanogpt's record of 2024-10-14 (rotary embeddings, QK-norm, RMSNorm, ReLU^2, zero projections, Muon).
Settings also come from the environment, STAGE_<KEY>, after config files and before the command line.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from configurator import Config, UserError, before_exit, check_at_least, check_at_most, check_seed, configure
from dataloader import DataLoader, epoch_messages, evaluate, evaluation_batches, open_dataset
from distributed import (
    StopSignal,
    all_reduce_sum,
    barrier,
    check_compile,
    env_rank,
    finish,
    make_deterministic,
    on_main,
    peak_memory,
    pick_dtype,
    start,
)
from kernels.cross_entropy import linear_cross_entropy
from kernels.qk_rotary import qk_norm_rotary, rms_norm
from kernels.relu_squared import relu_squared, relu_squared_mlp
from model import padded_vocab_size
from optim import build_muon, load_state_by_name, set_learning_rate, trapezoidal_learning_rate
from reduced_sync_model import GPTConfig as SyncStrategy
from tensor_parallel_model import Ranks, SyncSchedule, column_parallel, f_op, g_op, row_parallel
from training_logger import Stopwatch, TrainingLogger, environment, peak_flops

# -----------------------------------------------------------------------------
# The defaults are the speedrun's baseline.
out_dir = "out-speedrun"  # checkpoints and logs go here
variant = "baseline"  # or 'palm', 'curriculum', 'depth_warm', 'sync'
# data
dataset = "fineweb10B"  # a folder in data/, or a path
sequence_length = 1024  # tokens
batch_size = 512  # sequences of a step, over all GPUs
device_batch_size = 64  # sequences that a GPU takes at a time; more are accumulated
# model
n_layer = 12
n_head = 6
n_embd = 768
# optimizers and their schedule: linear up, constant, linear down to 0
num_iterations = 5100
warmup_iters = 0
warmdown_iters = 1450
learning_rate = 0.0036  # AdamW's, of the embedding, which is the head, too
muon_lr_ratio = 0.5  # Muon's, of the matrices, as a multiple of that
muon_momentum = 0.95
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.0
# evaluation, logs, checkpoints
val_loss_every = 125  # steps between evaluations, 0: only at the end
val_tokens = 10485760  # of an evaluation, the first ones of the val split; as many whole sequences as fit
log_interval = 1  # steps between train_loss lines
save_checkpoint = True  # at the end, and when interrupted
checkpoint_interval = 0  # steps between checkpoints besides those, 0 for none
keep_checkpoints = 2  # how many to keep besides the best, the oldest go first
resume = ""  # go on with a run: 'latest', 'best', a step, or the path of a checkpoint or of another out_dir
list_checkpoints = False  # print the checkpoints in out_dir and exit
# variant=curriculum: tokens that see each other grow, the tokens of a step stay
curriculum_lengths: list | None = None  # e.g. [256, 512, 768, 1024]; None: quarters of sequence_length
curriculum_shares: list | None = None  # of the steps, by which each gives way at the latest; None: 0.1 each
curriculum_plateau_steps = 50  # a length gives way when the mean loss of so many steps is not below that of
curriculum_plateau_gain = 0.01  # as many steps before by this much; 0 steps: never before its share
# variant=depth_warm: layers join one after the other
depth_warm_layers = 4  # of the first step
depth_warm_share = 0.2  # share of the steps after which all layers are there in every step
depth_warm_survival = 0.5  # probability with which a layer that has just joined takes part in a step
# variant=sync: tensor-parallel ranks, simulated, that synchronise less often (see train_reduced_sync.py)
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
deterministic = False  # the same bits in every run on a GPU, too; slower
timeout = 600.0  # seconds after which a process that does not answer, or is still saving, ends the run
backend = "auto"  # 'auto' (nccl on CUDA, else gloo), 'nccl', 'gloo'
# -----------------------------------------------------------------------------
if __name__ == "__main__":  # tests import the classes below
    config = configure(globals(), rank=env_rank(), environment="STAGE_")


# The model. B sequences of T tokens, C = n_embd, H heads of D = C / H, V = vocab_size.


@dataclass
class GPTConfig:
    sequence_length: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    used_vocab_size: int | None = None  # the rows of the embedding after these are padding
    variant: str = "baseline"
    tp_size: int = 1
    sync_points: list | None = None  # variant sync: the sublayers after which ranks synchronise

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(f"variant={self.variant!r} is unknown: use {', '.join(VARIANTS)}")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd={self.n_embd} does not give n_head={self.n_head} heads of even width: "
                            f"choose n_embd as a multiple of {2 * self.n_head}")


def attend(qkv, cos, sin, crop: int):
    """QK-norm, rotary embedding, and causal attention inside pieces of `crop` tokens: (B, T, 3, H, D) ->
    (B, T, H * D). If crop does not divide T, each sequence ends with a shorter piece."""
    B, T, _, H, D = qkv.shape
    qkv = qk_norm_rotary(qkv, cos, sin)
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

    def forward(self, x, cos, sin, crop: int):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        return self.c_proj(attend(qkv, cos, sin, crop))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return relu_squared_mlp(x, self.c_fc.weight, self.c_proj.weight)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, crop: int):
        x = x + self.attn(rms_norm(x), cos, sin, crop)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    block = Block

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # the head, too
            h=nn.ModuleList([self.block(config) for _ in range(config.n_layer)])))
        D = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.sequence_length), 10000 ** -(torch.arange(0, D, 2) / D))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What is added to the residual stream begins at zero; the other matrices have nn.Linear's spread."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
            elif name.endswith(("wte.weight", "c_attn.weight", "c_fc.weight")):
                p.uniform_(-p.shape[1]**-0.5, p.shape[1]**-0.5)
            else:
                raise AssertionError(f"no rule for {name}")

    def embed(self, idx):
        """Token ids (B, T) -> (B, T, C), in the dtype that everything is computed in."""
        x = self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def rotations(self, T: int, crop: int):
        """cos and sin (T, D / 2) of positions that begin anew in every piece of `crop` tokens."""
        lengths = [crop] * (T // crop) + [T % crop] * (T % crop > 0)
        return tuple(torch.cat([table[:n] for n in lengths]) if len(lengths) > 1 else table[:T]
                     for table in (self.cos, self.sin))

    def hidden(self, idx, crop: int, layers: tuple[int, ...]):
        """Token ids (B, T) -> what the head is applied to (B, T, C)."""
        cos, sin = self.rotations(idx.size(1), crop)
        x = self.embed(idx)
        for i in layers:
            x = self.transformer.h[i](x, cos, sin, crop)
        return rms_norm(x)

    def forward(self, idx, targets=None, crop: int | None = None, layers: tuple[int, ...] | None = None):
        """Token ids (B, T) -> (None, mean loss) with `targets` (B, T), -1 where one does not count, else
        (logits (B, T, V), None).

        crop: tokens that see each other, None: all; layers: those that take part, None: all.
        """
        every = tuple(range(self.config.n_layer))
        x = self.hidden(idx, idx.size(1) if crop is None else crop, every if layers is None else layers)
        weight = self.transformer.wte.weight
        if targets is None:
            return F.linear(x, weight), None
        return None, linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, crop: int, n_layer: int) -> int:
        """Of a training step, counted as model.GPT.flops_per_token counts them."""
        C, V = self.config.n_embd, self.config.vocab_size
        return 6 * (n_layer * 12 * C**2 + V * C) + 12 * n_layer * C * crop

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For checkpoint.py: every process has the whole model."""
        return tensors


# Variants: another block, or another schedule of what a step computes.


class PalmBlock(Block):
    """Attention and MLP side by side behind one norm (PaLM, arXiv 2204.02311, section 2). Their sum is scaled
    as that of two independent terms."""

    def forward(self, x, cos, sin, crop: int):
        y = rms_norm(x)
        return x + (self.attn(y, cos, sin, crop) + self.mlp(y)) * 2**-0.5


class PalmGPT(GPT):
    block = PalmBlock


class SyncGPT(GPT):
    """Tensor-parallel ranks that add up what they have pending only where the schedule says; see
    tensor_parallel_model.py, whose f, g and shapes these are. All of them in each process."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.schedule = SyncSchedule.at(config.n_layer, config.sync_points)
        self.ranks, trace = Ranks(config.tp_size), []
        self.syncs_into(trace)
        self.syncs = len(trace)  # all-reduces of a forward pass: counted, not calculated

    @torch.no_grad()
    def syncs_into(self, trace: list) -> None:
        ranks, self.ranks = self.ranks, Ranks(self.config.tp_size, trace=trace)
        self.hidden(torch.zeros(1, 1, dtype=torch.int64), 1, tuple(range(self.config.n_layer)))
        self.ranks = ranks

    def hidden(self, idx, crop: int, layers: tuple[int, ...]):
        cos, sin = self.rotations(idx.size(1), crop)
        base, pending = self.embed(idx), None  # (B, T, C), the same on all ranks; (R, B, T, C), each one's
        for i in layers:
            after_attention, after_mlp = self.schedule.sublayers[2 * i:2 * i + 2]
            block = self.transformer.h[i]
            y = self.heads(block.attn, self.seen(base, pending), cos, sin, crop)
            base, pending = self.add(base, pending, y, block.attn.c_proj.weight, after_attention.sync)
            y = relu_squared(column_parallel(self.seen(base, pending), block.mlp.c_fc))
            base, pending = self.add(base, pending, y, block.mlp.c_proj.weight, after_mlp.sync)
        return rms_norm(base if pending is None else base + g_op(pending, self.ranks))

    def seen(self, base, pending):
        """The norm of what the ranks see, (R, B, T, C), or (1, B, T, C) while they agree."""
        x = f_op(base, self.ranks if pending is not None else self.ranks.as_one)
        return rms_norm(x if pending is None else x + pending)

    def heads(self, attn, x, cos, sin, crop: int):
        """Each rank's heads: (m, B, T, C) -> (m, B, T, C / m)."""
        m, B, T, C = x.shape
        qkv = column_parallel(x, attn.c_attn, parts=3).view(m * B, T, 3, attn.n_head // m, C // attn.n_head)
        return attend(qkv, cos, sin, crop).view(m, B, T, -1)

    def add(self, base, pending, y, weight, sync: bool):
        """Take in a sublayer's y (m, B, T, K / m) through its row-parallel matrix."""
        out = row_parallel(y, weight, self.ranks.local, together=sync)
        if not sync:
            return base, out if pending is None else pending + out
        if pending is not None:  # in its dtype, which autocast would have fp32 on CUDA
            out = out + pending.sum(dim=0, keepdim=True, dtype=pending.dtype)
        return base + g_op(out, self.ranks), None


@dataclass(frozen=True)
class Plan:
    """What a step computes."""

    crop: int  # tokens that see each other
    layers: tuple[int, ...]  # those that take part


class Schedule:
    """All layers on whole sequences in every step. Others are derived from it."""

    def __init__(self, config: Config):
        self.config = config
        self.full = Plan(config["sequence_length"], tuple(range(config["n_layer"])))

    def plan(self, step: int) -> Plan:
        """What step `step` computes. Called once for each step, in order."""
        return self.full

    def plans(self) -> list[Plan]:
        """Every plan whose graph is compiled as a whole."""
        return [self.full]

    def observe(self, step: int, loss: float) -> None:
        """The train loss of a step, the same on all processes."""

    def state(self) -> dict:
        """What a checkpoint has to keep, as JSON."""
        return {}

    def load(self, state: dict) -> None:
        """The inverse of `state`."""


class Curriculum(Schedule):
    """Short pieces first: sequences are cut into pieces of `crop` tokens, which grow. The tokens of a step,
    and their order, are the baseline's; if crop does not divide a sequence, it ends with a shorter piece.

    A length gives way to the next after its share of the steps, or on a plateau: when the mean loss of the
    last plateau_steps steps is less than plateau_gain below that of as many steps before.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        T = config["sequence_length"]
        self.lengths, shares = config["curriculum_lengths"], config["curriculum_shares"]
        if self.lengths is None:
            if T < 4:
                raise UserError(f"sequence_length={T} has no quarters: give curriculum_lengths")
            self.lengths = [T // 4, T // 2, T - T // 4, T]
        if shares is None:
            shares = [0.1 * (i + 1) for i in range(len(self.lengths) - 1)]
        if not all(type(n) is int and n > 0 for n in self.lengths) or self.lengths[-1:] != [T] \
                or sorted(set(self.lengths)) != self.lengths:
            raise UserError(f"curriculum_lengths={self.lengths} must grow, and end with sequence_length={T}")
        if len(shares) != len(self.lengths) - 1 \
                or not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares) \
                or sorted(shares) != shares:
            raise UserError(f"curriculum_shares={shares} must be {len(self.lengths) - 1} numbers from 0 to 1 "
                            f"that do not fall, one for each length but the last")
        self.latest = [round(share * config["num_iterations"]) for share in shares]
        self.stage, self.since, self.losses = 0, 0, []  # of the stage that began at step `since`

    def plan(self, step: int) -> Plan:
        while self.stage < len(self.latest) and (step >= self.latest[self.stage] or self.plateau(step)):
            self.stage, self.since, self.losses = self.stage + 1, step, []
        return Plan(self.lengths[self.stage], self.full.layers)

    def plateau(self, step: int) -> bool:
        """By the losses up to step - 2, which are known in time however early a checkpoint asks for more."""
        n, losses = self.config["curriculum_plateau_steps"], self.losses[:max(0, step - 1 - self.since)]
        if n == 0 or len(losses) < 2 * n:
            return False
        return sum(losses[-2 * n:-n]) / n - sum(losses[-n:]) / n < self.config["curriculum_plateau_gain"]

    def plans(self) -> list[Plan]:
        return [Plan(length, self.full.layers) for length in self.lengths]

    def observe(self, step: int, loss: float) -> None:
        if step >= self.since:
            self.losses.append(loss)

    def state(self) -> dict:
        return {"stage": self.stage, "since": self.since, "losses": self.losses}

    def load(self, state: dict) -> None:
        self.stage, self.since, self.losses = state["stage"], state["since"], list(state["losses"])


class DepthWarm(Schedule):
    """Layers join one after the other, from the bottom, while the network warms up. One that has joined takes
    part in a step with a probability that grows to 1 (stochastic depth, arXiv 1603.09382). What does not take
    part is neither computed nor sent. A layer that has not joined yet adds zero, so that it changes nothing
    when it does.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.first, L = config["depth_warm_layers"], config["n_layer"]
        if not 1 <= self.first <= L:
            raise UserError(f"depth_warm_layers={self.first} must be between 1 and n_layer={L}")
        for name in ("depth_warm_share", "depth_warm_survival"):
            if not 0 <= config[name] <= 1:
                raise UserError(f"{name}={config[name]} must be between 0 and 1")
        self.end = round(config["depth_warm_share"] * config["num_iterations"])  # of the warm-up

    def survival(self, layer: int, step: int) -> float:
        """The probability with which a layer takes part in a step."""
        if layer < self.first or step >= self.end:
            return 1.0
        joins = self.end * (layer - self.first + 1) / (self.config["n_layer"] - self.first + 1)
        if step < joins:
            return 0.0
        lowest = self.config["depth_warm_survival"]
        return lowest + (1 - lowest) * (step - joins) / (self.end - joins)

    def plan(self, step: int) -> Plan:
        random = np.random.RandomState([self.config["seed"] % 2**32, step])
        drawn = random.random_sample(len(self.full.layers))  # in [0, 1)
        return Plan(self.full.crop, tuple(i for i in self.full.layers if drawn[i] < self.survival(i, step)))


VARIANTS = {  # name -> model, schedule, the settings that only it has
    "baseline": (GPT, Schedule, ()),
    "palm": (PalmGPT, Schedule, ()),
    "curriculum": (GPT, Curriculum, ("curriculum_lengths", "curriculum_shares", "curriculum_plateau_steps",
                                     "curriculum_plateau_gain")),
    "depth_warm": (GPT, DepthWarm, ("depth_warm_layers", "depth_warm_share", "depth_warm_survival")),
    "sync": (SyncGPT, Schedule, ("tp_size", "sync_strategy", "attn_sync_layers", "layers_per_group",
                                 "sync_points")),
}


def model_config(config: Config, sequence_length: int, used_vocab_size: int, vocab_size: int) -> GPTConfig:
    """The architecture that the settings name. Raises UserError."""
    shape = {name: config[name] for name in ("n_layer", "n_head", "n_embd")}
    shared = dict(sequence_length=sequence_length, vocab_size=vocab_size, used_vocab_size=used_vocab_size)
    if config["variant"] != "sync":
        return GPTConfig(**shape, **shared, variant=config["variant"])
    strategy = SyncStrategy(**shape, **{name: config[name] for name in VARIANTS["sync"][2]})
    return GPTConfig(**shape, **shared, variant="sync", tp_size=strategy.tp_size,
                     sync_points=strategy.schedule().points)


def model_of(config: GPTConfig) -> GPT:
    return VARIANTS[config.variant][0](config)


class LateReport:
    """What a step has to say, read while the next one is running: a loop that waits for every loss leaves the
    GPU without work in between."""

    def __init__(self, step: int, plan: Plan, lr: float, loss: torch.Tensor, stop: bool, group):
        """loss: this process's share of the mean; stop: whether it was asked to end."""
        self.step, self.plan, self.lr = step, plan, lr
        values = all_reduce_sum(torch.stack((loss, torch.full_like(loss, float(stop)))), group)
        self._event, self._values = None, values
        if values.is_cuda:
            self._values, self._event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, bool]:
        """The mean loss and whether any process was asked to end; waits until the step is done."""
        if self._event is not None:
            self._event.synchronize()
        loss, stops = self._values.tolist()
        return loss, stops > 0


# The run.
SKIPPED = 10  # steps before the clock starts, as the record's clock does
KEPT = ("sequence_length", "n_layer", "n_head", "n_embd", "variant", "seed",
        *(name for _, _, names in VARIANTS.values() for name in names))  # that a checkpoint decides

if __name__ == "__main__":
    # what can be known to be wrong before anything is built
    check_at_least(config, 1, "batch_size", "device_batch_size", "sequence_length", "n_layer", "n_head",
                   "n_embd", "val_tokens", "log_interval", "keep_checkpoints", "timeout")
    check_at_least(config, 0, "num_iterations", "warmup_iters", "warmdown_iters", "val_loss_every",
                   "checkpoint_interval", "curriculum_plateau_steps", "muon_lr_ratio")
    check_at_most(config, 1e6, "timeout")
    check_seed(config)
    checkpoint.MODELS[checkpoint.SPEEDRUN] = __name__, "model_of", "GPTConfig"  # of a changed copy, its own
    if list_checkpoints:
        if env_rank() == 0:
            print(checkpoint.listing(out_dir))
        raise SystemExit(0)
    if deterministic:
        make_deterministic()
    processes = start(device, backend, timeout)
    main, group, device = processes.main, processes.group, processes.device
    compute_dtype = pick_dtype(dtype, device)
    if compute_dtype == torch.float16:
        raise UserError("float16 would need scaled losses: use --dtype=bfloat16 or --dtype=float32")
    if compile:
        check_compile(device)
    at_once = device_batch_size * processes.world_size
    if batch_size % at_once:
        raise UserError(f"{batch_size=} is the total over {processes.world_size} processes and must "
                        f"be a multiple of {at_once}, {device_batch_size=} for each")
    micro_steps, share = batch_size // at_once, device_batch_size / batch_size  # of one in the mean loss
    tokens_per_step = batch_size * sequence_length
    log = TrainingLogger(active=main)
    on_main(lambda: checkpoint.check_out_dir(out_dir), group)
    held = on_main(lambda: checkpoint.lock(out_dir, make=False), group)  # until the process ends

    # what is continued decides the architecture
    resumed = checkpoint.find_resumed(resume, out_dir, log.line, group) if resume else None
    if resumed is not None:
        checkpoint.check_kind(resumed, (checkpoint.SPEEDRUN,))
        checkpoint.take_architecture(config, resumed.state["config"], resumed.path, KEPT)
        globals().update({name: config[name] for name in KEPT})
    if variant not in VARIANTS:
        raise UserError(f"variant={variant!r} is unknown: use {', '.join(VARIANTS)}")
    for other in VARIANTS:
        for name in VARIANTS[other][2]:
            if other != variant and config.origin[name] not in ("", "checkpoint"):
                raise UserError(f"{name} is for --variant={other}, and it is {variant!r}")
    schedule = VARIANTS[variant][1](config)

    # data
    data = open_dataset(dataset, sequence_length, "sequence_length")
    if resumed is not None:
        checkpoint.check_same_data(resumed, data.folder, data.fingerprint)
    architecture = model_config(config, sequence_length, *padded_vocab_size(data.meta))
    checkpoint.check_size(architecture)
    for split in (data.train, data.val):
        split.check_tokens(architecture.vocab_size)

    # model and optimizer; every process has all weights, and its own matrices' momentum
    checkpoint.seed_random_states(seed)
    model = model_of(architecture)
    if resumed is not None:
        checkpoint.load_parameters(model, resumed.tensors("model"), resumed.path)
    model.to(device)
    optimizer = build_muon(model, learning_rate, learning_rate * muon_lr_ratio, (beta1, beta2), weight_decay,
                           muon_momentum, group, sum_gradients=True)
    first_step, first_sample, evaluated, train_seconds = 0, 0, False, 0.0
    val_loss, val_step, best_val_loss, train_loss = None, None, math.inf, None
    same_run = resumed is not None and checkpoint.belongs_to(resumed, out_dir)  # or in another out_dir
    where = environment(device) | {"world_size": processes.world_size}
    if resumed is not None:
        load_state_by_name(optimizer, model, resumed.tensors("optim"))
        schedule.load(resumed.state["variant"])
        first_step, first_sample, evaluated, train_seconds, train_loss, val_loss, val_step = (
            resumed.state[name] for name in ("step", "sample", "evaluated", "train_seconds", "train_loss",
                                             "last_val_loss", "last_val_step"))
        if resumed.state["best_val_loss"] is not None:
            best_val_loss = resumed.state["best_val_loss"]
        if first_step > num_iterations or (first_step == num_iterations and evaluated):
            log.line(f"nothing left to do: {resumed.path} is at step {first_step} of {num_iterations=}")
            finish(processes)
            raise SystemExit(0)

    def open_out_dir() -> None:
        """From here on files are written."""
        global held
        if held is None:
            held = checkpoint.lock(out_dir, make=True)
        checkpoint.make_room(out_dir, resumed, log.line)
        log.open_files(out_dir, config, where, first_step if same_run else None, evaluated)
        log.source(__file__)

    barrier(group)  # nobody still reads weights that are moved now
    on_main(open_out_dir, group)
    log.line("settings, with where they differ from the script's:\n" + config.table())
    log.line("Python {python}, PyTorch {torch}, {device}, git {git_commit}".format(**where))
    log.line(f"{model.n_parameters() / 1e6:.2f}M parameters, {compute_dtype}; {data.folder}: "
             f"{data.train.n_tokens:,} train and {data.val.n_tokens:,} val tokens")
    log.line(f"tokens per step: {device_batch_size} sequences x {sequence_length} tokens x {micro_steps} "
             f"accumulation x {processes.world_size} processes = {tokens_per_step:,}")
    if variant == "sync":
        log.line(f"{model.syncs} of {2 * n_layer} synchronization points, {tp_size} simulated ranks")
        log.event("schedule", **checkpoint.schedule_description(model))

    val_windows = min(max(1, val_tokens // sequence_length), sum(data.val.eval_windows))
    if val_windows * sequence_length != val_tokens:
        why = "whole sequences" if val_windows < sum(data.val.eval_windows) else "all that the val split has"
        log.line(f"warning: {val_tokens=}, and evaluations are on {val_windows * sequence_length}: {why}")
    if warmup_iters + warmdown_iters > num_iterations + (warmup_iters > 0):
        log.line(f"warning: {warmup_iters=} and {warmdown_iters=} exceed {num_iterations=}: the learning "
                 f"rate never reaches its peak")

    # speed
    torch.set_float32_matmul_precision("high")  # TF32 where a product is in fp32
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    if compile:
        model.compile(dynamic=False)
        limits = torch._dynamo.config  # a graph for each plan, and one without gradients
        limits.recompile_limit = max(limits.recompile_limit, len(schedule.plans()) + 2)
        if variant == "depth_warm":  # a graph for every set of layers would be too many: one for a block
            for block in model.transformer.h:
                block.compile(dynamic=False)
    peak, whole = peak_flops(device, compute_dtype), schedule.plans()

    def loss_of(x, y, plan: Plan):
        """Mean loss of a micro-batch by a plan."""
        forward = model if plan in whole else model.forward  # compiled as a whole, or block by block
        with autocast:
            return forward(x, y, plan.crop, plan.layers)[1]

    def warm_up() -> None:
        """Compile everything before the clock starts; leaves no trace in the weights."""
        log.line("compiling the model (about a minute)")
        zeros = torch.zeros(device_batch_size, sequence_length, dtype=torch.int64, device=device)
        plans = whole + [Plan(sequence_length, (0,))] * (variant == "depth_warm")
        for plan in plans:
            loss_of(zeros, zeros.clone(), plan).backward()  # one tensor as both would make another graph
        model.zero_grad(set_to_none=True)

    def run_evaluation() -> float:
        """Mean loss of the first val_tokens tokens of the val split."""
        batches = evaluation_batches(data.val, val_windows, device_batch_size, device, processes.rank,
                                     processes.world_size, spread=False)
        return evaluate(lambda x, y: (None, loss_of(x, y, schedule.full)), batches, group)

    def timing(done: int) -> dict:
        """The clock after `done` steps."""
        timed = done - SKIPPED
        return {"train_time_ms": 1e3 * train_seconds,
                "step_avg_ms": 1e3 * train_seconds / timed if timed > 0 else math.nan}

    def report(what: str, done: int) -> None:
        clock = timing(done)
        log.line(f"step:{done}/{num_iterations} {what} train_time:{clock['train_time_ms']:.0f}ms "
                 f"step_avg:{clock['step_avg_ms']:.2f}ms")

    def settle(late: LateReport | None) -> None:
        """Read a step's report, take the time, and log it."""
        global train_loss, train_seconds, asked, problem
        if late is None:
            return
        train_loss, asked = late.read()
        seconds = stopwatch.lap()
        if late.step >= SKIPPED:  # who resumes later than that pays for starting again
            train_seconds += seconds
        schedule.observe(late.step, train_loss)
        if not math.isfinite(train_loss):
            problem = f"the loss is {train_loss} at step {late.step}"
        if (late.step + 1) % log_interval == 0:
            flops = model.flops_per_token(late.plan.crop, len(late.plan.layers)) * tokens_per_step
            report(f"train_loss:{train_loss:.4f}", late.step + 1)
            log.event("iter", step=late.step, loss=train_loss, lr=late.lr, norm=None, seconds=seconds,
                      tokens_per_second=tokens_per_step / seconds, epoch=loader.epoch,
                      memory=peak_memory(device),
                      mfu=None if peak is None else flops / seconds / (peak * processes.world_size),
                      crop=late.plan.crop, layers=len(late.plan.layers), **timing(late.step + 1))

    def write_status(status: str) -> None:
        log.status(status, step, max_iters=num_iterations, best_val_loss=best_val_loss, val_loss=val_loss,
                   val_step=val_step, train_loss=train_loss, variant=variant, seed=seed, **timing(step))

    def save(measured: float | None, evaluated: bool) -> None:
        """Begin to write a checkpoint; all processes take part. measured: the val loss of this step;
        evaluated: whether the evaluation due at it, if one is, was done."""
        started = time.perf_counter()
        if main:
            saver.wait()  # before there is a second copy in memory
        tensors = checkpoint.snapshot(model, optimizer, device, None, group)
        if main:
            state = {"sample": loader.sample, "epoch": loader.epoch, "seed": seed, "evaluated": evaluated,
                     "val_loss": measured, "best_val_loss": best_val_loss, "world_size": processes.world_size,
                     "scaler": {}, "model": checkpoint.model_description(checkpoint.SPEEDRUN, model),
                     "schedule": checkpoint.schedule_description(model), "variant": schedule.state(),
                     "train_seconds": train_seconds, "train_loss": train_loss, "last_val_loss": val_loss,
                     "last_val_step": val_step, "config": config, "data": data.fingerprint, "meta": data.meta,
                     "environment": where}
            saver.save(step, tensors, state, measured is not None and measured <= best_val_loss, started)

    def end_run(status: str) -> None:
        """Let what is being written be written, and end the logs; also if an error ends the run."""
        loader.close()
        saver.wait()
        write_status(status)
        log.close(status=status, step=step, best_val_loss=best_val_loss, val_loss=val_loss,
                  tokens=step * tokens_per_step, **timing(step))

    # training loop
    loader = DataLoader(data.train, device_batch_size, micro_steps, architecture.vocab_size, seed, device,
                        processes.rank, processes.world_size, sample=first_sample)
    saver = checkpoint.Saver(out_dir, keep_checkpoints, (resumed.step,) if same_run else (), log)
    signals, status, problem, asked = StopSignal(group), "finished", None, False
    step, epoch, late, stopwatch = first_step, loader.epoch, None, Stopwatch()
    before_exit.append(lambda: end_run(status if status == "non_finite" else "failed"))
    write_status("running")
    if compile:
        warm_up()
    stopwatch.lap()
    for step in range(first_step, num_iterations + 1):
        last, done, measured = step == num_iterations, step == first_step and evaluated, None
        evaluation_due = not done and (last or (val_loss_every > 0 and step % val_loss_every == 0))
        save_due = not done and 0 < step and ((last and save_checkpoint) or (
            checkpoint_interval > 0 and step % checkpoint_interval == 0))
        if evaluation_due or save_due or asked or step == SKIPPED:
            settle(late)
            late = None
        if problem is not None:
            break
        stopwatch.pause()
        if asked and not last:  # what is due here and not done is done by who goes on
            if save_checkpoint and step > first_step:
                save(None, not evaluation_due)
            status = "interrupted"
            break
        if evaluation_due:
            val_loss, val_step = run_evaluation(), step
            measured, best_val_loss = val_loss, min(best_val_loss, val_loss)
            report(f"val_loss:{val_loss:.4f}", step)
            lr = trapezoidal_learning_rate(step, learning_rate, warmup_iters, warmdown_iters, num_iterations)
            log.event("eval", step=step, train_loss=train_loss, val_loss=val_loss, lr=lr, **timing(step))
            if not math.isfinite(val_loss):
                problem = f"the val loss is {val_loss} at step {step}"
                break
            write_status("running")
        if save_due:
            save(measured, True)
        stopwatch.go_on()
        if last:
            break

        # forward and backward; the loss of a step is the mean over its micro-batches and processes
        plan = schedule.plan(step)
        lr = trapezoidal_learning_rate(step, learning_rate, warmup_iters, warmdown_iters, num_iterations)
        loss_share = torch.zeros((), device=device)
        for _ in range(micro_steps):
            loss = loss_of(*loader.next(), plan) * share
            loss.backward()
            loss_share += loss.detach()
        set_learning_rate(optimizer, lr)
        optimizer.step()  # sums the gradients over the processes, too
        optimizer.zero_grad(set_to_none=True)

        settle(late)  # of the step before
        late = LateReport(step, plan, lr, loss_share, signals.received > 0, group)
        if device.type != "cuda":  # there is nothing to wait for
            settle(late)
            late = None
        for message in epoch_messages(data.train, epoch, loader.epoch):
            log.line(message)
        epoch = loader.epoch
        saver.poll()

    if problem is not None:
        status = "non_finite"
        raise UserError(f"{problem}: no checkpoint has what came of it; go on from an earlier one "
                        f"(--list_checkpoints shows them) with --resume=STEP and a lower learning_rate")
    on_main(lambda: saver.wait(final=True), group)
    if status == "interrupted":
        how = "go on with --resume=latest" if save_checkpoint else "no checkpoint was to be saved"
        log.line(f"interrupted at step {step}: {how}")
    if device.type == "cuda":
        log.line(f"peak memory: {peak_memory(device) / 2**20:.0f} MiB")
    log.line(f"each process sent {optimizer.bytes_sent / max(1, step - first_step):,.0f} bytes a step")
    end_run(status)
    finish(processes)
