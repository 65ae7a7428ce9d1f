"""GPT-2 as a dense model: configuration, blocks, initialisation, loss, generation, Hugging Face import and
export.

The parameters have the names and shapes of nanoGPT's model.py. All variants of this repository share this one
set of weights. The architecture follows the GPT-2 paper and code: pre-LayerNorm, GELU in its tanh form,
learned positions, tied head.

Shapes: B batch, T tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.cross_entropy import linear_cross_entropy
from kernels.gelu_mlp import gelu, gelu_mlp
from kernels.interval_attention import first_visible, interval_attention
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.qkv_linear import qkv_linear
from nanosync import huggingface, recompute
from nanosync.errors import UserError
from nanosync.fp8 import fused_mlp, runs_in_fp8, split_product
from nanosync.generation import Decoder
from nanosync.model_kind import check_size
from nanosync.sharding import Replicated


@dataclass
class GPTConfig:
    """Architecture of the dense GPT. Raises UserError for values from which no model can be built."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # V, rows of the embedding: GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; False is a little faster
    used_vocab_size: int | None = None  # number of tokens; later rows of the embedding are never sampled

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
    """Return (number of tokens, rows of the embedding) for a data set.

    meta: contents of its meta.json, None for GPT-2's 50257 tokens. Vocabularies of 4096 tokens and more are
    padded to a multiple of 64, for which matrix products are faster: 50257 -> 50304.
    """
    used = 50257 if meta is None else meta["vocab_size"]
    return used, -(-used // 64) * 64 if used >= 4096 else used


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension with an optional bias."""

    triton = False  # True: run as a Triton kernel, see use_triton_layer_norm

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
        """Return x + out, and its LayerNorm; out=None stands for zero. All are (..., C)."""
        if out is None:  # x is the embedding: the compiler fuses the gradients of embedding and LayerNorm
            return x, self.plain(x) if torch.compiler.is_compiling() else self(x)
        if self.triton:
            return add_layer_norm(x, out, self.weight, self.bias)
        x = x + out
        return x, self(x)


def use_triton_layer_norm(model: nn.Module) -> None:
    """Run every LayerNorm of a model, and the residual addition before it, as a Triton kernel.

    The kernel runs only if kernels.usable is True for the parameter; otherwise PyTorch's code runs.
    """
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.triton = True


def attend(q, k, v, first, dropout: float):
    """Attend causally: q, k, v (N, H, T, D) -> (N, H, T, D).

    first: first token that each token sees, (N, T) int32; None for all tokens before it.
    """
    if first is None:  # PyTorch chooses the kernel: cuDNN's on Hopper, FlashAttention on other GPUs
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    assert dropout == 0, "attention dropout with a document mask"
    return interval_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), first).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    fused_qkv = False  # True: the backward pass does not join the gradients of q, k and v, see use_qkv_linear

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None, first=None):
        """Attend causally: x (B, T, C) -> (B, T, C).

        cache: tensor (2, B, H, block_size, D) into which k and v are written; None in training.
        first: first token that each token sees, (B, T) int32; None for all tokens before it.
        """
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.qkv(x))
        if cache is not None:
            cache[0, :, :, :T] = k
            cache[1, :, :, :T] = v
        y = attend(q, k, v, first, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))

    def qkv(self, x):
        """Return q, k and v, (B, T, C) each, views of one tensor."""
        if self.fused_qkv:
            return qkv_linear(x, self.c_attn.weight, self.c_attn.bias)
        if runs_in_fp8(self.c_attn):
            return split_product(x, self.c_attn, 3)
        return self.c_attn(x).split(x.shape[-1], dim=2)


def use_qkv_linear(model: nn.Module) -> None:
    """Compute the gradients of every c_attn of a dense model from separate gradients of q, k and v.

    The kernel runs only if kernels.relu_squared.fusible is True; otherwise PyTorch's code runs.
    """
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.fused_qkv = True


class MLP(nn.Module):
    fused_gelu = ""  # what gelu_mlp keeps for the backward pass; "": a separate GELU, see use_fused_gelu
    fp8_gelu = True  # in FP8 the kernels of GELU also make the casts; False: the compiler's do

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        if self.fused_gelu:
            c_fc, c_proj = self.c_fc, self.c_proj
            return self.dropout(gelu_mlp(x, c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias,
                                         self.fused_gelu))
        if self.fp8_gelu and runs_in_fp8(self.c_fc):
            return self.dropout(fused_mlp(x, self.c_fc, self.c_proj))
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


def use_fused_gelu(model: nn.Module, keep: str) -> None:
    """Run GELU inside the matrix products of every MLP of a dense model.

    The kernel runs only if kernels.relu_squared.fusible is True; otherwise PyTorch's code runs.

    keep: see kernels.gelu_mlp.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            module.fused_gelu = keep


class Block(nn.Module):
    recompute = "none"  # activations that the backward pass recomputes, see nanosync.recompute
    generator = None  # generator of dropout masks, None: PyTorch's default generator

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, *args):
        """Return compute(*args); keep the activations that `recompute` does not name."""
        return recompute.run(self.compute, args, self.recompute, self.generator)

    def compute(self, x, out=None, cache=None, first=None):
        """Return (residual stream, output of the MLP) after this block, both (B, T, C).

        x: residual stream without `out`, (B, T, C).
        out: output of the previous block's MLP, (B, T, C), None before the first block. It is separate so
            that the LayerNorm kernel can add it (LayerNorm.add).
        cache, first: see CausalSelfAttention.forward.
        """
        x, y = self.ln_1.add(x, out)
        x, y = self.ln_2.add(x, self.attn(y, cache, first))
        return x, self.mlp(y)


class GPT(Replicated):
    block_class = Block
    end_of_text: int | None = None  # token with which documents begin, if attention must not cross documents.
    # Decoding ignores it, because a prompt and its continuation are one document.

    def __init__(self, config: GPTConfig):
        """Build and initialise the model on PyTorch's default device.

        On the meta device the model has no values; see initial_parameters.
        """
        super().__init__()
        self.config = config
        with torch.device("meta"):  # skips PyTorch's own initialisation
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
        """Map token ids (B, T) to the hidden states after ln_f (B, T, C).

        cache: tensor (L, 2, B, H, block_size, D) into which k and v are written, or None.
        """
        x, out, first = self.transformer.drop(self.embed(idx)), None, self.first_visible(idx, cache)
        for i, block in enumerate(self.transformer.h):
            x, out = block(x, out, None if cache is None else cache[i], first)
        return self.transformer.ln_f.add(x, out)[1]

    def first_visible(self, idx, cache=None):
        """Return the first token that each token sees, (B, T) int32; None for all tokens before it.

        cache: see hidden.
        """
        if self.end_of_text is None or cache is not None:
            return None
        return first_visible(idx, self.end_of_text)

    def embed(self, idx):
        """Map token ids (B, T) to the sum of token and position embeddings (B, T, C).

        Raises UserError if T exceeds block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            # keep the residual stream in the compute dtype
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def head(self, x):
        """Map the output of `hidden` (..., C) to logits (..., V), in its dtype."""
        return F.linear(x, self.lm_head.weight.to(x.dtype))

    def forward(self, idx, targets=None, all_logits: bool = False):
        """Map token ids (B, T) to (logits, loss).

        With targets, return (None, mean loss); the logits of the whole batch are never in memory. Without
        targets, return (logits, None).

        targets: token ids (B, T), -1 at positions that the loss ignores.
        all_logits: True for the logits of all positions (B, T, V), False for the last position (B, 1, V).
        """
        x = self.hidden(idx)
        if targets is not None:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                              fp8=self.head_fp8, fp8_casts=self.head_casts)
        return self.lm_head(x if all_logits else x[:, -1:]), None

    def generate(self, idx, max_new_tokens: int, stop_token: int | None = None, **sampling):
        """Continue token ids (B, T) to (B, T + new). sampling: keyword arguments of Decoder."""
        return self.decoder(idx.shape[0], **sampling).generate(idx, max_new_tokens, stop_token)

    def decoder(self, batch_size: int, **sampling) -> "Decoder":
        """Make a Decoder for prompts of batch_size sequences. The caller can reuse it for more prompts."""
        return Decoder(self, batch_size, **sampling)

    def flops_per_token(self, T: int) -> int:
        """Return the floating-point operations of a training step per token, in sequences of T tokens.

        Each weight of a matrix product, head included, costs 2 in the forward and 4 in the backward pass.
        Attention's two products count over the whole T x T square, although causal kernels skip up to half of
        it. Embedding look-ups, LayerNorm and biases do not count. PaLM (arXiv 2204.02311, appendix B) and
        nanoGPT count the same way, so MFU is comparable.
        """
        c = self.config
        weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * T

    @torch.no_grad()
    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first block_size positions. Raises UserError if the model has fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f"block_size={block_size} must be between 1 and the model's "
                            f"{self.config.block_size} positions")
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].clone(),
                                                            freeze=False)

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0) -> "GPT":
        """Load GPT-2 weights in Hugging Face's format. Raises UserError.

        name: 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl', from the hub or its local cache, or a local
            folder with config.json and model.safetensors.
        """
        folder = huggingface.find_folder(name)
        config = GPTConfig(**huggingface.read_config(folder), dropout=dropout)
        check_size(config)
        model = cls(config)
        huggingface.load_weights(model, folder)
        return model

    def save_pretrained(self, folder: str) -> None:
        """Write a folder that transformers loads as a GPT2LMHeadModel with the same logits."""
        huggingface.save(self, folder)


@torch.no_grad()
def init_parameter(name: str, p: torch.Tensor, n_layer: int) -> None:
    """Initialise a parameter as GPT-2 does, by a rule for its name. A name without a rule is an error.

    Matrices and embeddings are normal with std 0.02, the two projections back into the residual stream with
    std 0.02 / sqrt(2L). LayerNorm weights are 1, biases 0.
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
    """Return an iterator over (name, initial value) of each parameter of a model, which may be on meta.

    The values have the order and, on the same device, the bits of a newly built model's. The iterator keeps
    no value, so the caller decides how many are in memory.

    model: a dense model, or a model whose process holds all tensor-parallel ranks.
    device: device of the values.
    """
    shapes, n_layer = {name: p.shape for name, p in model.named_parameters()}, model.config.n_layer

    def drawn(name):
        p = torch.empty(shapes[name], device=device)
        init_parameter(name, p, n_layer)
        return p

    return ((name, drawn(name)) for name in shapes)
