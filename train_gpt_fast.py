"""The fast speedrun: train a GPT-2-size model with what the public speedrun's later records found.

8 GPUs of one machine, or any other number with the same tokens per step:
$ python data/cached_fineweb10B.py 4
$ torchrun --standalone --nproc_per_node=8 train_gpt_fast.py

One GPU, on tokens from Python's own source:
$ python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards
$ python train_gpt_fast.py config/fast_python_source.py

train_gpt.py is the baseline: this file has its own model, its own schedule and NorMuon, and learns more from
a token. Sequences are packed with documents, and a token attends to a window of its own document. Each
technique is a setting, so an ablation is a command line: --bigram=False. docs/speedrun.md has what each one
gains. An environment variable STAGE_<KEY> overrides config files, and the command line overrides STAGE_<KEY>.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import models
from configurator import Config, check_at_least, check_at_most, check_seed, configure
from kernels.cross_entropy import Softcap, cap_logits, linear_cross_entropy
from kernels.interval_attention import first_visible, interval_attention
from kernels.qk_rotary import qk_norm_rotary, rms_norm
from kernels.relu_squared import relu_squared_mlp
from model import padded_vocab_size
from nanosync.checkpoint import exit_with_listing
from nanosync.dataloader import DataLoader, evaluate, evaluation_batches, open_dataset
from nanosync.diagnose import check_diagnosis, profiled
from nanosync.distributed import env_rank
from nanosync.errors import UserError, shown
from nanosync.hardware import peak_memory
from nanosync.model_kind import MAX_FIELD, MAX_LAYERS, ModelKind, check_size
from nanosync.muon import Muon
from nanosync.ngram_features import SuffixMatch, ngram_rows
from nanosync.optim import set_learning_rate
from nanosync.packing import PackedSplit
from nanosync.random_states import seed_random_states
from nanosync.run import Run
from nanosync.speedrun_model import SpeedrunConfig, SpeedrunModel, offset_keys
from nanosync.speedrun_setup import evaluation_windows, start_processes
from nanosync.step_clock import STATE, StepClock
from nanosync.step_schedules import Stage, stages_of

# -----------------------------------------------------------------------------
out_dir = "out-fast"  # folder for checkpoints and logs
# data
dataset = "fineweb10B"  # a folder in data/, or a path
sequence_length = 16384  # tokens of a packed sequence
device_batch_size = 1  # sequences of a micro-batch on a GPU
document_mask = True  # attention does not cross documents
# stages: each of these lists has an entry for each stage
stage_shares = [0.325, 0.325, 0.325, 0.025]  # share of the steps
batch_sizes = [8, 16, 24, 24]  # sequences of a step, over all GPUs
short_windows = [128, 384, 640, 768]  # tokens that a token sees, with itself
long_windows = [384, 896, 1408, 1664]  # the same in the layers long_layers
stage_rates = [1.0, 1.52, 1.73, 1.73]  # factors of the learning rates
eval_windows = [768, 2560]  # short and long window of evaluations, and of the finished model
# model
n_layer = 11
n_head = 6
n_embd = 768
long_layers: list | None = None  # layers with long windows; None: the fourth and the last
offset_layers: list | None = None  # layers where half of a key is the token before's; None: long_layers
value_layers: list | None = None  # layers whose values get a table of tokens; None: the first and last three
value_tables: int | None = None  # number of these tables, which the layers take in turn; None: one a layer
bigram = True  # a table of pairs of tokens, added to the input of every layer
trigram = False  # a table of triples of tokens, added to the rows of pairs
suffix_match = False  # add to every layer the token after the longest earlier match of the last tokens
embedding_skip = True  # add the embedding to the input of every layer, with a learned factor
smear = True  # add a share of the previous token's embedding to each embedding
exclusive_layers: list | None = None  # layers that subtract a part of a token's own value; None: 1, 3, 4, 7
attention_gate = True  # scale each head's output by a gate
late_attention = True  # the last layers attend to the stream after layer 2/3 n_layer
backout = True  # subtract half of that stream before the head
half_rotary = True  # rotate half of the channels only
softcap = True  # cap the logits
untie_at = 0.65  # share of the steps after which head and embedding are two matrices; 1: never
further_targets = True  # early stages also predict the second and third next token
# optimizers: NorMuon for the matrices of layers, AdamW for the rest
num_iterations = 1490
cooldown_share = 0.6  # share of the steps, the last ones, in which the rates fall linearly
final_rate = 0.15  # share of the learning rates that is left at the last step
muon_learning_rate = 0.023
muon_momentum = 0.95
muon_momentum_warmup = 300  # steps from 0.85 to muon_momentum; the last sixth as many steps lead back
muon_beta2 = 0.9  # NorMuon's; 0: Muon
muon_weight_decay = 1.2  # cautious; times the square of the learning rate
muon_heads: int | None = None  # heads of q, k or v in a matrix for NorMuon; None: 2, or all if n_head is odd
polar_express = True  # orthogonalise with Polar Express, not with Muon's Newton-Schulz
adam_learning_rate = 0.008  # embedding and head
table_learning_rate = 0.6  # tables of tokens, pairs and triples
lazy_tables = False  # update only a table's rows that have a gradient, without a first moment
scalar_learning_rate = 0.04  # factors and shares
gate_learning_rate = 0.008  # gates, and rows of matches
# evaluation, logs, checkpoints
val_loss_every = 250  # steps between evaluations, 0: only at the end
val_tokens = 10485760  # tokens of an evaluation, the first of the val split; rounded down to whole sequences
log_interval = 1  # steps between train_loss lines
diagnose = 0  # profile so many steps after the first 10, print where their time goes, and exit
save_checkpoint = True  # save at the end, and when interrupted; False: never
checkpoint_interval = 0  # steps between further checkpoints, 0 for none
keep_checkpoints = 2  # number of checkpoints to keep, the newest; the best is kept as well
resume = ""  # 'latest', 'best', a step, a path of a checkpoint or an out_dir; 'auto': 'latest' or a new run
list_checkpoints = False  # print the checkpoints in out_dir and exit
# system
seed = 1337  # of initialisation and data order
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16'
compile = True  # torch.compile the model
deterministic = False  # compute the same bits in every run on a GPU, too; slower
timeout = 600.0  # longest time that processes wait for each other, also while one is saving, in seconds
backend = "auto"  # 'auto' (nccl on CUDA, else gloo), 'nccl', 'gloo'
# -----------------------------------------------------------------------------
if __name__ == "__main__":  # tests import the classes below
    config = configure(globals(), rank=env_rank(), environment="STAGE_")


# The model. B = sequences, T = tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size.
GATE = 12  # channels that a gate reads
CAP = Softcap(23.0, 7.5, 5.0)  # of the logits


@dataclass
class GPTConfig(SpeedrunConfig):
    """Architecture of the fast speedrun's GPT. Raises UserError if no model has these values."""

    sequence_length: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    windows: list  # tokens that a token sees in short and in long layers
    long_layers: list
    value_layers: list
    used_vocab_size: int | None = None  # number of tokens; later rows of the embedding are padding
    end_of_text: int | None = None  # token with which a document begins; None: a sequence is one document
    value_tables: int | None = None  # see value_table; None: one a layer
    offset_layers: list = field(default_factory=list)
    exclusive_layers: list = field(default_factory=list)
    bigram: bool = False
    trigram: bool = False
    suffix_match: bool = False
    embedding_skip: bool = False
    smear: bool = False
    attention_gate: bool = False
    late_attention: bool = False
    backout: bool = False
    half_rotary: bool = False
    softcap: bool = False

    def __post_init__(self):
        check_at_least(vars(self), 1, "sequence_length", "vocab_size", "n_layer", "n_head")
        check_at_least(vars(self), GATE, "n_embd")
        if self.n_embd % (4 * self.n_head):
            raise UserError(f"n_embd={self.n_embd} and n_head={self.n_head} do not give heads whose width is "
                            f"a multiple of 4: choose n_embd as a multiple of {4 * self.n_head}")
        if len(self.windows) != 2 or not all(type(n) is int and 0 < n < MAX_FIELD for n in self.windows):
            raise UserError(f"eval_windows={shown(self.windows)} must be two positive whole numbers < 2**31")
        for name in ("long_layers", "value_layers", "offset_layers", "exclusive_layers"):
            layers = getattr(self, name)
            if not all(type(i) is int and 0 <= i < self.n_layer for i in layers):
                raise UserError(f"{name}={shown(layers)} must be numbers of layers, 0 to {self.n_layer - 1}")
        if self.value_tables is not None:
            check_at_least(vars(self), 1, "value_tables")
        self.check_used_vocab_size()

    def value_table(self, layer: int) -> str | None:
        """Return the name of the table that a layer adds to its values: the first layer that has it."""
        layers = sorted(set(self.value_layers))
        if layer not in layers:
            return None
        return str(layers[layers.index(layer) % (self.value_tables or len(layers))])

    @property
    def other_values(self) -> int:
        """Number of values of the model besides embedding and layers' matrices, for check_size."""
        tables = 1 + len(set(map(self.value_table, self.value_layers))) + 5 * (self.bigram + self.trigram)
        return tables * self.vocab_size * self.n_embd + self.sequence_length * self.n_embd // self.n_head

    @property
    def middle(self) -> int:
        """Number of the layer whose output late layers attend to, and of which half is backed out."""
        return (2 * self.n_layer - 1) // 3


class Gate(nn.Module):
    """A number between 0 and 1 for each head, from the first channels of a stream; 1/2 at first."""

    def __init__(self, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, GATE))

    def forward(self, x):
        return F.linear(x[..., :GATE], self.weight.to(x.dtype)).sigmoid()


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.gate = Gate(config.n_head) if config.attention_gate else None
        self.value_gate = Gate(config.n_head) if layer in config.value_layers else None
        self.offset = layer in config.offset_layers and config.half_rotary
        exclusive = layer in config.exclusive_layers
        self.own_share = nn.Parameter(torch.zeros(config.n_head)) if exclusive else None

    def forward(self, x, cos, sin, first, value, cache=None):
        """Attend. first: of interval_attention. value: (B, T, C), added to v; None in layers without.
        cache: LayerCache with the tokens before these; None in training."""
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qk_norm_rotary(qkv, cos, sin)
        if value is not None:
            share = 2 * self.value_gate(torch.cat((x[..., :GATE // 2], value[..., :GATE // 2]), dim=-1))
            v = v + share[..., None] * value.view_as(v)
        if self.offset:
            k = offset_keys(k, first, cache)
        y = (interval_attention if cache is None else cache.attend)(q, k, v, first, scale=0.1)
        if self.own_share is not None:  # subtract a learned part of what is along the token's own value
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
            y = y - self.own_share.tanh().to(y.dtype)[:, None] * along * v
        if self.gate is not None:
            y = y * self.gate(x)[..., None]
        return self.c_proj(y.reshape(B, T, C))


class Block(nn.Module):
    """x = a x + b x0 + c ngram + match + attn(norm(source)); x = d x + mlp(norm(x)). Learned: a, b, c, d."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.attn = Attention(config, layer)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C, bias=False),
                                      c_proj=nn.Linear(4 * C, C, bias=False)))
        self.factors = nn.Parameter(torch.tensor([1.1**0.5, 0.0, 0.05, 1.1**0.5]))
        self.embedding_skip = config.embedding_skip

    def forward(self, x, x0, ngram, match, source, cos, sin, first, value, cache=None):
        """x: stream; x0: embedding; ngram, match: of tables and of suffix_match; source: see GPT.hidden."""
        a, b, c, d = self.factors.to(x.dtype).unbind()
        y = self.attn(rms_norm(x if source is None else source), cos, sin, first, value, cache)
        x = a * x + y
        if self.embedding_skip:
            x = x + b * x0
        if ngram is not None:
            x = x + c * ngram
        if match is not None:
            x = x + match
        return d * x + relu_squared_mlp(rms_norm(x), self.mlp.c_fc.weight, self.mlp.c_proj.weight)


class GPT(SpeedrunModel):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.tied = config, True
        V, C = config.vocab_size, config.n_embd
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C), h=nn.ModuleList([Block(config, i) for i in range(config.n_layer)])))
        self.lm_head = nn.Linear(C, V, bias=False)  # in use after `untie`
        self.values = nn.ParameterDict({name: torch.zeros(V, C)
                                        for name in map(config.value_table, config.value_layers)})
        self.pairs = nn.Parameter(torch.zeros(5 * V, C)) if config.bigram else None
        self.triples = nn.Parameter(torch.zeros(5 * V, C)) if config.trigram else None
        self.match = SuffixMatch(config.n_layer, C) if config.suffix_match else None
        self.smear = Gate(1) if config.smear else None
        self.smear_factor = nn.Parameter(torch.zeros(1)) if config.smear else None
        # base 1024; the second half of a head's channels does not turn with half_rotary
        D = C // config.n_head
        turning = D // 4 if config.half_rotary else D // 2
        speeds = F.pad(1024 ** -(torch.arange(turning) / max(1, turning - 1)), (0, D // 2 - turning))
        angles = torch.outer(torch.arange(config.sequence_length), speeds)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (T, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("windows", torch.tensor(config.windows, dtype=torch.int32), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set projections into the stream to zero, other matrices of layers to a standard deviation of 0.5
        C**-0.5, embedding and head to 0.005. Gates, tables and factors have values already."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
            elif name.endswith(("c_attn.weight", "c_fc.weight")):
                bound = 3**0.5 * 0.5 * p.shape[1]**-0.5
                p.uniform_(-bound, bound)
            elif name.endswith("wte.weight"):
                p.normal_(std=0.005)
            else:
                assert kind_of(name) in ("embedding", "table", "scalar", "gate"), name
        self.lm_head.weight.copy_(self.transformer.wte.weight)

    @torch.no_grad()
    def untie(self, optimizer=None) -> None:
        """Make the head a copy of the embedding, which also begins with the embedding's moments."""
        self.tied = False
        if optimizer is not None:
            self.lm_head.weight.copy_(self.transformer.wte.weight)
            for name, value in optimizer.state[self.transformer.wte.weight].items():
                optimizer.state[self.lm_head.weight][name].copy_(value)

    def load_state(self, state: dict) -> None:
        """Load the entry `untied` of state.json."""
        if state["untied"]:
            self.untie()

    def embed(self, idx, start: int = 0):
        """Return smeared embeddings and sums of rows of n-grams or None, (B, T - start, C), from start on."""
        idx, before = idx[:, max(0, start - 2):], min(start, 2)  # a triple needs two tokens before its last
        begins = idx == (-1 if self.config.end_of_text is None else self.config.end_of_text)  # of documents
        x = self.transformer.wte(idx)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ngrams = [F.embedding(ngram_rows(idx, begins, n, len(table)), table).to(x.dtype)
                  for n, table in ((2, self.pairs), (3, self.triples)) if table is not None]
        if self.smear is not None:
            share = self.smear_factor.to(x.dtype) * self.smear(x[:, 1:]) * ~begins[:, 1:, None]
            x = torch.cat((x[:, :1], x[:, 1:] + share * x[:, :-1]), dim=1)
        return x[:, before:], sum(ngrams)[:, before:] if ngrams else None

    def hidden(self, idx, windows=None, cache=None):
        """Map token ids (B, T) to the input of the head (B, T, C), or of the tokens that the cache lacks.

        windows: see forward. cache: KVCache of the tokens before them, None in training.
        """
        config, start = self.config, 0 if cache is None else cache.length
        windows = self.windows if windows is None else windows
        short, long = (first_visible(idx, config.end_of_text, n)[:, start:] for n in windows.unbind())
        cos, sin = self.cos[start:idx.size(1)], self.sin[start:idx.size(1)]
        x, ngram = self.embed(idx, start)
        rows, shares = (None, None) if self.match is None else self.match(
            idx, first_visible(idx, config.end_of_text), self.transformer.wte, start, x.dtype)
        idx, dtype, x = idx[:, start:], x.dtype, rms_norm(x)
        x0, middle = x, None  # middle: the stream after the layer config.middle
        for i, block in enumerate(self.transformer.h):
            table = config.value_table(i)
            value = None if table is None else F.embedding(idx, self.values[table]).to(dtype)
            x = block(x, x0, ngram, None if rows is None else rows * shares[..., i:i + 1],
                      middle if config.late_attention else None, cos, sin,
                      long if i in config.long_layers else short, value,
                      None if cache is None else cache.layers[i])
            if i == config.middle and i < config.n_layer - 1:
                middle = x
        return rms_norm(x - 0.5 * middle if config.backout and middle is not None else x)

    def layer_windows(self) -> list[int]:
        return [self.config.windows[i in self.config.long_layers] for i in range(self.config.n_layer)]

    def head_weight(self):
        return self.transformer.wte.weight if self.tied else self.lm_head.weight

    def head(self, x):
        """Map the output of `hidden` (..., C) to logits (..., V); with softcap at least in fp32."""
        logits = F.linear(x, self.head_weight().to(x.dtype))
        return cap_logits(logits.to(torch.promote_types(x.dtype, torch.float32)), CAP) \
            if self.config.softcap else logits

    def forward(self, idx, targets=None, windows=None, target_weights=None):
        """Map token ids (B, T) to (None, mean loss) with targets, or to (logits (B, T, V), None) without.

        targets: token ids (B, T), -1 at positions that the loss ignores.
        windows: short and long window, (2,) int32; None for the configuration's.
        target_weights: of the next tokens in the loss, see linear_cross_entropy.
        """
        x = self.hidden(idx, windows)
        if targets is None:
            return self.head(x), None
        return None, linear_cross_entropy(x.flatten(0, 1), self.head_weight(), targets,
                                          target_weights=target_weights,
                                          softcap=CAP if self.config.softcap else None)

    def flops_per_token(self, windows: list) -> int:
        """Return the FLOPs of a training step per token, counted as in model.GPT.flops_per_token."""
        config = self.config
        C, L, long = config.n_embd, config.n_layer, len(set(config.long_layers))
        seen = (L - long) * windows[0] + long * windows[1]
        return 6 * (L * 12 * C**2 + config.vocab_size * C) + 12 * C * seen


def kind_of(name: str) -> str:
    """Return the kind of a parameter, which decides how the optimizer updates it."""
    kinds = {"c_attn.weight": "stacked", "c_fc.weight": "matrix", "c_proj.weight": "matrix",
             **dict.fromkeys(("wte.weight", "lm_head.weight"), "embedding"),
             **dict.fromkeys(("gate.weight", "smear.weight", "match.rows"), "gate"),
             **dict.fromkeys(("factors", "own_share", "smear_factor", "match.shares"), "scalar")}
    found = {kind for end, kind in kinds.items() if name.endswith(end)}
    found |= {"table"} if name.startswith(("values.", "pairs", "triples")) else set()
    assert len(found) == 1, f"no rule for parameter {name}"
    return found.pop()


def model_config(config: Config, used_vocab_size: int, vocab_size: int, end_of_text: int | None) -> GPTConfig:
    """Make the architecture that the settings, or a resumed checkpoint, name. Raises UserError."""
    L = config["n_layer"]
    ends = {min(3, L - 1), L - 1} if config["long_layers"] is None else config["long_layers"]
    usual = dict(long_layers=ends, offset_layers=ends, exclusive_layers={1, 3, 4, 7}.intersection(range(L)),
                 value_layers={*range(min(3, L)), *range(max(0, L - 3), L)})
    architecture = GPTConfig(
        **{name: config[name] for name in SETTINGS if name in GPTConfig.__annotations__
           and not name.endswith("_layers")},
        windows=config["eval_windows"], used_vocab_size=used_vocab_size, vocab_size=vocab_size,
        end_of_text=end_of_text if config["document_mask"] else None,
        **{name: sorted(usual[name]) if config[name] is None else config[name] for name in usual})
    if (heads := config["muon_heads"]) is not None and (heads < 1 or config["n_head"] % heads):
        raise UserError(f"muon_heads={heads} must divide n_head={config['n_head']}")
    check_size(architecture)
    return architecture


SETTINGS = ("sequence_length", "n_layer", "n_head", "n_embd", "document_mask", "eval_windows", "long_layers",
            "offset_layers", "value_layers", "value_tables", "exclusive_layers", "bigram", "trigram",
            "suffix_match", "embedding_skip", "smear", "attention_gate", "late_attention", "backout",
            "half_rotary", "softcap", "muon_heads")
FAST = ModelKind("train_gpt_fast.py", GPTConfig, GPT, settings_entry="config", settings=SETTINGS,
                 state={"untied": bool, **STATE}, finish=GPT.load_state)


def target_weights_at(config: Config, stages: list[Stage], step: int) -> list[float]:
    """Return the weights of the next three tokens. The third fades in the first stage of the settings, the
    second in the next. The last stage of the settings has the next token only."""
    stage = next(stage for stage in stages if step < stage.end)
    left = 1 - (step - stage.begin) / (stage.end - stage.begin)
    last = len(config["stage_shares"]) - 1
    if not config["further_targets"] or stage.number >= min(2, last):
        return [1.0, 0.0, 0.0]
    return [1.0, 0.5, 0.25 * left] if stage.number == 0 else [1.0, 0.5 * left, 0.0]


def rate_at(config: Config, stage: Stage, step: int) -> float:
    """Return the factor of the learning rates."""
    left = (config["num_iterations"] - step) / max(1, config["cooldown_share"] * config["num_iterations"])
    return stage.rate * (config["final_rate"] + (1 - config["final_rate"]) * min(1.0, left))


def momentum_at(config: Config, step: int) -> float:
    """Return Muon's momentum: 0.85 at the first step and after the last, if there is a warm-up."""
    peak, warmup = config["muon_momentum"], config["muon_momentum_warmup"]
    if warmup == 0:
        return peak
    up, down = step / warmup, (config["num_iterations"] - step) / max(1, warmup / 6)
    return min(0.85, peak) + (peak - min(0.85, peak)) * min(1.0, up, down)


def build_optimizer(model: GPT, config: Config, group) -> Muon:
    """Build NorMuon for the matrices of layers, and AdamW for embedding, head, tables, factors and gates."""
    lr, H, lazy, kinds = config["muon_learning_rate"], model.config.n_head, config["lazy_tables"], {}
    heads = config["muon_heads"] or (H if H % 2 else 2)  # of a matrix
    rules = {  # kind -> further keys of its group
        "stacked": dict(stacked=3 * H // heads), "matrix": dict(stacked=1),
        "embedding": dict(lr_ratio=config["adam_learning_rate"] / lr, betas=(0.5, 0.95)),
        "table": dict(lr_ratio=config["table_learning_rate"] / lr, betas=(0.75, 0.95), lazy_rows=lazy),
        "gate": dict(lr_ratio=config["gate_learning_rate"] / lr, betas=(0.9, 0.99)),
        "scalar": dict(lr_ratio=config["scalar_learning_rate"] / lr, betas=(0.9, 0.99))}
    for name, p in model.named_parameters():
        kinds.setdefault(kind_of(name), []).append(p)
    groups = [dict(params=parameters, **rules[kind]) for kind, parameters in kinds.items()]
    return Muon(groups, group, sum_gradients=True, momentum=config["muon_momentum"], scale="spectral",
                polar_express=config["polar_express"], norm_beta2=config["muon_beta2"] or None, cautious=True,
                shard_rows_from=1_000_000, lr=lr, eps=1e-10, weight_decay=0.0)


def check_settings(config: dict) -> None:
    """Raise UserError for wrong settings, before any work is done."""
    check_at_least(config, 1, "device_batch_size", "sequence_length", "n_layer", "n_head", "n_embd",
                   "val_tokens", "log_interval", "keep_checkpoints", "timeout")
    rates = "adam_learning_rate", "table_learning_rate", "scalar_learning_rate", "gate_learning_rate"
    check_at_least(config, 0, "num_iterations", "val_loss_every", "checkpoint_interval", "muon_beta2",
                   "muon_momentum", "muon_momentum_warmup", "muon_weight_decay", "untie_at", "cooldown_share",
                   "final_rate", *rates)
    check_at_most(config, 1.0, "untie_at", "cooldown_share", "final_rate")
    for name in ("muon_momentum", "muon_beta2"):
        if config[name] >= 1:
            raise UserError(f"{name}={config[name]} must be below 1")
    check_at_most(config, 1e6, "timeout", "muon_learning_rate", "muon_weight_decay", *rates)  # finite updates
    check_at_most(config, MAX_LAYERS, "n_layer")
    check_at_least(config, 1e-9, "muon_learning_rate")  # so that ratios to the other rates are finite
    check_seed(config)
    check_diagnosis(config)


if __name__ == "__main__":
    check_settings(config)
    stages = stages_of(config)
    kinds = models.KINDS | {models.FAST: FAST}
    exit_with_listing(config, kinds)
    processes, compute_dtype = start_processes(config)
    group, device = processes.group, processes.device
    at_once = device_batch_size * processes.world_size
    if any(stage.batch_size % at_once for stage in stages):
        raise UserError(f"{batch_sizes=} are totals over all processes and must be multiples of {at_once}, "
                        f"{device_batch_size=} times the number of processes, {processes.world_size}")

    # a resumed checkpoint decides the architecture
    run = Run(config, processes, kinds, own=(models.FAST,), steps="num_iterations")
    data = open_dataset(dataset, sequence_length, "sequence_length", PackedSplit)
    run.check_data(data)
    architecture = model_config(config, *padded_vocab_size(data.meta), data.train.end_of_text)
    data.check_tokens(architecture.vocab_size)

    # model and optimizer; every process has all weights, and the state of its own matrices and rows
    seed_random_states(seed)
    model = GPT(architecture)
    if run.resumed is not None:
        models.load_parameters(model, run.resumed.tensors("model"), run.resumed.path)
    model.to(device)
    optimizer = build_optimizer(model, config, group)
    clock = StepClock(run, compute_dtype)
    run.restore(model, optimizer)
    if run.resumed is not None:
        clock.load(run.resumed.state)
        model.load_state(run.resumed.state)
    run.open(source=__file__)
    run.line("Python {python}, PyTorch {torch}, {device}, git {git_commit}".format(**run.environment))
    run.line(f"{model.n_parameters() / 1e6:.2f}M parameters, {compute_dtype}; {data.folder}: "
             f"{data.train.n_tokens:,} train and {data.val.n_tokens:,} val tokens")
    if document_mask and (data.train.end_of_text is None or not data.train.has(data.train.end_of_text)):
        run.line("the train tokens have no end-of-text token: each sequence is one document")
    for stage in stages:
        run.line(f"steps {stage.begin} to {stage.end - 1}: {stage.batch_size} sequences x {sequence_length} "
                 f"tokens = {stage.batch_size * sequence_length:,}, windows of {stage.windows[0]} and "
                 f"{stage.windows[1]} tokens")
    val_windows = evaluation_windows(config, data.val, run.line)

    # speed
    torch.set_float32_matmul_precision("high")  # TF32 where a product is in fp32
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
    hidden = torch.compile(model.hidden, dynamic=False) if compile else model.hidden
    model.hidden = hidden  # the loss after it is one operator

    def loss_of(x, y, windows=None, target_weights=None):
        """Compute the mean loss of a micro-batch."""
        with autocast:
            return model(x, y, windows, target_weights)[1]

    def warm_up() -> None:
        """Compile everything before the clock starts, without a change of the weights."""
        run.line("compiling the model (about a minute)")
        zeros = torch.zeros(device_batch_size, sequence_length, dtype=torch.int64, device=device)
        loss_of(zeros, zeros.clone(), model.windows, torch.ones(3, device=device)).backward()
        model.zero_grad(set_to_none=True)

    def run_evaluation() -> float | None:
        """Compute the mean loss of the first val_tokens tokens of the val split, None if asked to stop."""
        batches = evaluation_batches(data.val, val_windows, device_batch_size, device, processes.rank,
                                     processes.world_size, spread=False)
        return evaluate(lambda x, y: (None, loss_of(x, y)), batches, group, run.stop_anywhere)

    # training loop. A global batch of the loader is a micro-batch of each process, so that stages can differ
    loader = DataLoader(data.train, device_batch_size, 1, architecture.vocab_size, seed, device,
                        processes.rank, processes.world_size, run.sample)
    run.begin(loader, sequence_length, kind=models.FAST, random_states=False, progress=False,
              extra_state=lambda: {"untied": not model.tied, **clock.state()},
              extra_status=lambda: {"seed": seed, **clock.status()})
    if compile:
        warm_up()
    clock.start()
    for step in profiled(run):
        last = step == num_iterations
        save_due = save_checkpoint and step > 0 and \
            (last or (run.is_due(checkpoint_interval) and step % checkpoint_interval == 0))
        clock.begin_step(settle=save_due or run.is_due(val_loss_every))
        if run.due(val_loss_every) or (last and not diagnose):
            if step == run.first_step:  # nothing is on the screen yet that moves
                run.line(f"evaluating on {val_windows * sequence_length:,} tokens")
            clock.evaluated(run_evaluation(), optimizer.param_groups[0]["lr"])
        if not run.proceed(save=save_due):
            break

        # forward and backward; the loss of a step is the mean over its micro-batches and processes
        if model.tied and step >= untie_at * num_iterations:
            model.untie(optimizer)
        stage = next(stage for stage in stages if step < stage.end)
        windows = torch.tensor(stage.windows, dtype=torch.int32, device=device)
        target_weights = torch.tensor(target_weights_at(config, stages, step), device=device)
        share, loss_share = device_batch_size / stage.batch_size, torch.zeros((), device=device)
        for _ in range(stage.batch_size // at_once):
            loss = loss_of(*loader.next(), windows, target_weights) * share
            loss.backward()
            loss_share += loss.detach()
        set_learning_rate(optimizer, rate := muon_learning_rate * rate_at(config, stage, step))
        tokens = stage.batch_size * sequence_length
        optimizer.momentum, optimizer.lookups = momentum_at(config, step), tokens // processes.world_size
        for parameters in optimizer.param_groups:
            if "stacked" in parameters:
                parameters["weight_decay"] = muon_weight_decay * rate
        optimizer.step()  # also sums the gradients over the processes
        optimizer.zero_grad(set_to_none=True)
        clock.step_done(step, loss_share, model.flops_per_token(stage.windows) * tokens, tokens, lr=rate)

    memory = peak_memory(device)
    notes = [] if memory is None else [f"peak memory: {memory / 2**20:.0f} MiB"]
    steps = max(1, run.step - run.first_step)
    run.end(*notes, f"each process sent {optimizer.bytes_sent / steps:,.0f} bytes a step")
