"""GPT-2 as a dense model: configuration, blocks, initialisation, loss, generation, Hugging Face in and out.

The parameters have the names and shapes of nanoGPT's model.py, so every variant of this repository shares one
set of weights. Follows the GPT-2 paper and code (pre-LayerNorm, GELU in its tanh form, learned positions,
tied head).

Shapes: B batch, T tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.cross_entropy import linear_cross_entropy
from kernels.layer_norm import add_layer_norm, layer_norm
from nanosync import huggingface, recompute
from nanosync.errors import UserError
from nanosync.generation import Decoder
from nanosync.sharding import Replicated


@dataclass
class GPTConfig:
    """The architecture. Raises UserError for values that no model can be built from."""

    block_size: int = 1024  # T, the longest context
    vocab_size: int = 50304  # V, rows of the embedding: GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; without is a little faster
    used_vocab_size: int | None = None  # tokens that exist; the rows after them are padding and never sampled

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                            f"choose n_embd as a multiple of n_head")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.used_vocab_size is None:
            self.used_vocab_size = self.vocab_size
        if not 1 <= self.used_vocab_size <= self.vocab_size:
            raise UserError(f"used_vocab_size={self.used_vocab_size} must be between 1 and "
                            f"vocab_size={self.vocab_size}")


def padded_vocab_size(meta: dict | None) -> tuple[int, int]:
    """(tokens that exist, rows of the embedding) for a data set's meta.json, GPT-2's 50257 if there is none.

    Large vocabularies are padded to a multiple of 64, which the matrix units like: 50257 -> 50304.
    """
    used = 50257 if meta is None else meta["vocab_size"]
    return used, -(-used // 64) * 64 if used >= 4096 else used


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with an optional bias."""

    triton = False  # whether it runs as a Triton kernel, see use_triton_layer_norm

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        if self.triton:
            return layer_norm(x, self.weight, self.bias)
        return self.plain(x)

    def plain(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    def add(self, x, out):
        """x + out, or x if out is None, and its LayerNorm: (..., C) each."""
        if out is None:  # x is the embedding: the compiler makes both their gradients in one kernel
            return x, self.plain(x) if torch.compiler.is_compiling() else self(x)
        if self.triton:
            return add_layer_norm(x, out, self.weight, self.bias)
        x = x + out
        return x, self(x)


def use_triton_layer_norm(model: nn.Module) -> None:
    """Make every LayerNorm of a model, of any kind, run as a Triton kernel where one can (kernels.usable says
    where that is for a parameter), alone or with the residual addition before it. Elsewhere nothing changes.
    """
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.triton = True


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None):
        """x: (B, T, C) -> (B, T, C). `cache` (2, B, H, block_size, D) receives this prompt's k and v."""
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            cache[0, :, :, :T] = k
            cache[1, :, :, :T] = v
        # PyTorch takes the fastest kernel it has: cuDNN's on Hopper, flash on other GPUs
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0,
                                           is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def gelu(x):
    """GELU in GPT-2's tanh form; compiled, as x * sigmoid(2u), the same function without a slow tanh."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


class Block(nn.Module):
    recompute = "none"  # what the backward pass computes again, see nanosync.recompute
    generator = None  # of dropout masks, where it is not PyTorch's own

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, *args):
        """Return compute(*args); keep of it what `recompute` says."""
        return recompute.run(self.compute, args, self.recompute, self.generator)

    def compute(self, x, out=None, cache=None):
        """The residual stream x and the last MLP's `out`, None before the first block, both (B, T, C) -> the
        same after this block. They come apart so that a LayerNorm's kernel can add them (LayerNorm.add)."""
        x, y = self.ln_1.add(x, out)
        x, y = self.ln_2.add(x, self.attn(y, cache))
        return x, self.mlp(y)


class GPT(Replicated):
    block_class = Block

    def __init__(self, config: GPTConfig):
        """On PyTorch's default device; on 'meta' it is a model without values, see initial_parameters."""
        super().__init__()
        self.config = config
        with torch.device("meta"):  # PyTorch would draw values, which are drawn below
            self.transformer = nn.ModuleDict(dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([self.block_class(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, config.bias),
            ))
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device=torch.get_default_device())
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            init_parameter(name, p, config.n_layer)

    def hidden(self, idx, cache=None):
        """Token ids (B, T) -> the hidden states after ln_f (B, T, C). cache: (L, 2, B, H, block_size, D)."""
        x, out = self.transformer.drop(self.embed(idx)), None
        for i, block in enumerate(self.transformer.h):
            x, out = block(x, out, None if cache is None else cache[i])
        return self.transformer.ln_f.add(x, out)[1]

    def embed(self, idx):
        """Token ids (B, T) -> their embeddings with that of their position (B, T, C)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # the residual stream is in the compute dtype throughout
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def forward(self, idx, targets=None, all_logits: bool = False):
        """Token ids (B, T) -> (logits, loss).

        With `targets` (B, T), -1 where a position does not count: (None, mean loss). The logits of a whole
        batch are never held. Without: (logits, None), of the last position (B, 1, V), or of all with
        `all_logits`.
        """
        x = self.hidden(idx)
        if targets is not None:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return self.lm_head(x if all_logits else x[:, -1:]), None

    def generate(self, idx, max_new_tokens: int, stop_token: int | None = None, **sampling):
        """Token ids (B, T) -> (B, T + new). `sampling` is what Decoder takes."""
        return self.decoder(idx.shape[0], **sampling).generate(idx, max_new_tokens, stop_token)

    def decoder(self, batch_size: int, **sampling) -> "Decoder":
        """What generates from this model, to be kept for more prompts; see Decoder."""
        return Decoder(self, batch_size, **sampling)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations of a training step (forward, and backward as twice that) per token, at
        length T.

        Every matrix product of the model: 6 per weight in one, head included, plus attention's two products
        over the whole T x T square, as PaLM (arXiv 2204.02311, appendix B) and nanoGPT count them, so that
        MFU compares. Causal kernels skip up to half of that square; embedding look-ups, LayerNorm and biases
        are not counted.
        """
        c = self.config
        weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * T

    @torch.no_grad()
    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first block_size positions. Raises UserError for more than there are."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f"block_size={block_size} is not among the model's 1 to {self.config.block_size} "
                            f"positions")
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].clone(),
                                                            freeze=False)

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0) -> "GPT":
        """GPT-2 weights in Hugging Face's format: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' from the hub
        (or its cache on this machine), or a local folder with config.json and model.safetensors. Raises
        UserError.
        """
        folder = huggingface.find_folder(name)
        model = cls(GPTConfig(**huggingface.read_config(folder), dropout=dropout))
        huggingface.load_weights(model, folder)
        return model

    def save_pretrained(self, folder: str) -> None:
        """Write a folder that transformers loads as GPT2LMHeadModel, with equal logits."""
        huggingface.save(self, folder)


@torch.no_grad()
def init_parameter(name: str, p: torch.Tensor, n_layer: int) -> None:
    """GPT-2's initialisation, by parameter name: a name that no rule covers is an error, not left to chance.

    Matrices and embeddings are normal with std 0.02, the two projections back into the residual stream with
    0.02 / sqrt(2L); LayerNorm weights are one, biases zero.
    """
    if name.endswith("bias"):
        p.zero_()
    elif name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
        p.fill_(1.0)
    elif name.endswith("c_proj.weight"):
        p.normal_(std=0.02 / math.sqrt(2 * n_layer))
    elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
        p.normal_(std=0.02)
    else:
        raise AssertionError(f"no initialisation rule for parameter {name}")


def initial_parameters(model: nn.Module, device="cpu"):
    """(name, value) of each parameter of a model, a dense one or with all ranks here, drawn in the order and,
    on the same device, to the bits in which a new model has them. Each is gone when the next is asked for."""
    shapes, n_layer = {name: p.shape for name, p in model.named_parameters()}, model.config.n_layer

    def drawn(name):
        p = torch.empty(shapes[name], device=device)
        init_parameter(name, p, n_layer)
        return p

    return ((name, drawn(name)) for name in shapes)
