"""GPT-2 as a dense model: configuration, blocks, initialisation, loss, generation, Hugging Face in and out.

The parameters have the names and shapes of nanoGPT's model.py, so every variant of this repository shares one
set of weights. Follows the GPT-2 paper and code (pre-LayerNorm, GELU in its tanh form, learned positions,
tied head).

Shapes: B batch, T tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.
"""

import copy
import json
import logging
import math
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from configurator import UserError
from kernels import decode
from kernels.cross_entropy import linear_cross_entropy
from kernels.layer_norm import add_layer_norm, layer_norm

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


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
    recompute = "none"  # what its backward pass computes again, see use_activation_checkpointing

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, *args):
        """What `compute` does, with or without keeping what the backward pass needs."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*args)
        if self.recompute == "block":
            return checkpoint(self.compute, *args, use_reentrant=False)
        return checkpoint(self.compute, *args, use_reentrant=False, context_fn=selective_contexts)

    def compute(self, x, out=None, cache=None):
        """The residual stream x and the last MLP's `out`, None before the first block, both (B, T, C) -> the
        same after this block. They come apart so that a LayerNorm's kernel can add them (LayerNorm.add)."""
        x, y = self.ln_1.add(x, out)
        x, y = self.ln_2.add(x, self.attn(y, cache))
        return x, self.mlp(y)


ACTIVATION_CHECKPOINTING = ("none", "block", "selective")
aten = torch.ops.aten
KEPT = [  # by 'selective': what costs the most to compute again for what it takes to keep
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
]


def selective_contexts():
    """What surrounds the forward pass and its recomputation."""
    return create_selective_checkpoint_contexts(KEPT)


def use_activation_checkpointing(model: nn.Module, kind: str) -> None:
    """What a model of any kind keeps of its blocks for the backward pass: 'none' means that nothing is
    computed again; 'block' keeps only what goes into each and computes it again (arXiv 1604.06174);
    'selective' keeps the results of matrix products, attention and all-reduces and computes the rest again
    (arXiv 2205.05198). Raises UserError for another.
    """
    if kind not in ACTIVATION_CHECKPOINTING:
        raise UserError(f"activation_checkpointing={kind!r} is unknown: use "
                        f"{', '.join(ACTIVATION_CHECKPOINTING)}")
    for block in model.transformer.h:
        block.recompute = kind
    # compiled, 'selective' is met with a warning about operations in place, of which blocks have none
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(
        lambda record: "context_fn is passed" not in record.getMessage())


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each block of a model by itself, for FSDP, which has work to do between them. Blocks that
    compute the same share one compilation; there may be as many as blocks, in training and evaluation."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(model.transformer.h))
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward)


class GPT(nn.Module):
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

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # For models that lie in parts on several processes; this one never does.

    def whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, of this process's parameters or their optimizer state -> those of all of them."""
        return tensors

    def own_part(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `whole`."""
        return tensors

    def split_parameters(self) -> list[nn.Parameter]:
        """Those of which this process has only a part."""
        return []

    def reduce_partial_gradients(self) -> None:
        """Complete the gradients of which this process has computed only a share. Before each update."""

    def align_replicas(self, optimizer) -> None:
        """Make parameters that every process has whole, and their optimizer state, equal to the last bit."""

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
        folder = name if os.path.isdir(name) else _download(name)
        config = GPTConfig(**_read_huggingface_config(folder), dropout=dropout)
        model = cls(config)
        _load_huggingface_weights(model, folder)
        return model

    @torch.no_grad()
    def save_pretrained(self, folder: str) -> None:
        """Write a folder that transformers loads as GPT2LMHeadModel, with equal logits.

        Padding rows of the vocabulary are left out; biases that the model does not have are written as zeros.
        """
        from safetensors.torch import save_file

        c = self.config
        tensors = {}
        for name, p in self.named_parameters():
            p = p.detach().cpu()
            if name == "transformer.wte.weight":
                p = p[:c.used_vocab_size]
            tensors[name] = (p.T if name.endswith(CONV1D_WEIGHTS) else p).contiguous()
            if name.endswith(".weight") and not c.bias and "wte" not in name and "wpe" not in name:
                tensors[name.removesuffix("weight") + "bias"] = p.new_zeros(p.shape[0])
        os.makedirs(folder, exist_ok=True)
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump({
                "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
                "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_head": c.n_head,
                "n_layer": c.n_layer, "vocab_size": c.used_vocab_size, "layer_norm_epsilon": 1e-5,
                "tie_word_embeddings": True, "attn_pdrop": c.dropout, "embd_pdrop": c.dropout,
                "resid_pdrop": c.dropout, "bos_token_id": c.used_vocab_size - 1,
                "eos_token_id": c.used_vocab_size - 1,
            }, f, indent=1)


# Hugging Face keeps these as Conv1D, transposed.
CONV1D_WEIGHTS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _download(name: str) -> str:
    """The folder of a GPT-2 from the hub, downloaded if it is not in the cache. Raises UserError."""
    if name not in GPT2_SIZES:
        raise UserError(f"{name!r} is neither a folder nor one of {', '.join(GPT2_SIZES)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what goes wrong is said below, once
    try:
        files = ["config.json", "model.safetensors"]
        return snapshot_download(f"openai-community/{name}", allow_patterns=files)
    except Exception as e:  # of huggingface_hub or its HTTP library
        raise UserError(f"could not download {name} ({type(e).__name__}): without a network, give a folder "
                        f"with its config.json and model.safetensors instead of the name") from None


def _read_huggingface_config(folder: str) -> dict:
    """The fields of GPTConfig that a config.json determines. Raises UserError for what is not a GPT-2."""
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            c = json.load(f)
        fields = dict(block_size=int(c["n_positions"]), vocab_size=int(c["vocab_size"]),
                      n_layer=int(c["n_layer"]), n_head=int(c["n_head"]), n_embd=int(c["n_embd"]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is no configuration of a GPT-2 ({type(e).__name__}: {e})") from None
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "tie_word_embeddings": True, "n_inner": None}
    for key, value in wanted.items():
        if c.get(key, value) != value and not (key == "n_inner" and c[key] == 4 * fields["n_embd"]):
            raise UserError(f"{path} has {key}={c[key]!r}; this model has {value!r}")
    return fields


@torch.no_grad()
def _load_huggingface_weights(model: GPT, folder: str) -> None:
    """Copy model.safetensors into the model. Raises UserError for what is missing, of another shape, or of
    layers that the model does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = os.path.join(folder, "model.safetensors")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    # the hub's own GPT-2 files name the parameters without "transformer." and carry the causal masks
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for name, p in model.named_parameters():
        tensor = tensors.get(name.removeprefix("transformer."))
        if tensor is not None and name.endswith(CONV1D_WEIGHTS):
            tensor = tensor.T
        if tensor is None or tensor.shape != p.shape:
            shape = None if tensor is None else tuple(tensor.shape)
            raise UserError(f"{path}: {name} should be {tuple(p.shape)} and is {shape}")
        p.copy_(tensor)
    expected = {name.removeprefix("transformer.") for name, _ in model.named_parameters()}
    masks = (".attn.bias", ".attn.masked_bias")
    unused = sorted(name for name in set(tensors) - expected
                    if name.startswith("h.") and not name.endswith(masks))
    if unused:
        raise UserError(f"{path} has {len(unused)} weights that the model of config.json has no place for, "
                        f"such as {unused[0]}: the two files do not belong together")


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


def sample_tokens(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Draw one token a row: logits (B, V) -> ids (B,). Temperature 0 takes the most likely one.

    `top_k` keeps the k most likely tokens; `top_p` the fewest whose probabilities reach p (arXiv 1904.09751),
    of those that top_k left. Draws by the Gumbel-max trick: argmax(logits - log E), E exponential, is a draw
    from softmax(logits), and needs no synchronisation with the host.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    V = logits.shape[-1]
    index = None
    if top_p is not None or (top_k is not None and top_k < V):
        logits, index = logits.topk(min(top_k or V, V), dim=-1, sorted=top_p is not None)  # most likely first
    if top_p is not None:
        probs = (logits / temperature).softmax(dim=-1)
        logits = logits.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, float("-inf"))
    noise = torch.empty_like(logits).exponential_()
    if index is not None:
        return decode.draw(logits, index, noise, temperature, torch.empty_like(index[:, 0]))
    return (logits / temperature - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()).argmax(dim=-1)


@torch.no_grad()
def sample_text(model, tokenizer, prompt: str, max_new_tokens: int, seed: int) -> str:
    """The prompt and what a model that is being trained makes of it; leaves all random states and the model's
    mode as they are. Under the caller's autocast."""
    device, training = model.lm_head.weight.device, model.training
    idx = torch.tensor(tokenizer.encode(prompt).astype("int64"), device=device)[None]
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        tokens = model.generate(idx, max_new_tokens, temperature=0.8,
                                top_k=min(200, model.config.used_vocab_size))
        model.train(training)
    return tokenizer.decode(tokens[0].tolist())


class Decoder:
    """Generates from a model with a static KV cache: prefill, then one token a step; on CUDA a step is one
    graph.

    Built once for a batch size and sampling settings, used for any number of prompts. Runs in the dtype of
    the weights, or, built under autocast, on a copy of them in autocast's dtype.

    Past `block_size` the window slides. GPT-2's positions are absolute, so every key and value changes when
    it does: each slide is a new prefill. `slide=1` (nanoGPT's rule) lets every token see the block_size
    before it; a larger one drops that many at once and is that much cheaper.
    """

    def __init__(self, model: GPT, batch_size: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, slide: int = 1):
        config, weight = model.config, model.lm_head.weight
        self.sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        check_sampling(config, slide=slide, **self.sampling)
        self.device = weight.device
        autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if autocast else weight.dtype
        self.model = model if dtype == weight.dtype else copy.deepcopy(model).to(dtype)
        self.used_vocab_size = config.used_vocab_size
        self.block_size, self.keep = config.block_size, config.block_size - slide + 1

        B = batch_size
        make = partial(torch.zeros, device=self.device, dtype=dtype)
        self.residual_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.allocate(B, make)
        self.token = make(B, dtype=torch.int64)  # the newest token, not yet in the cache
        self.position = make(1, dtype=torch.int64)  # how many tokens the cache holds
        self.window = make(B, self.keep, dtype=torch.int64)
        self.graphs = {}

    def allocate(self, B: int, make):
        """Cache and buffers of a step; `make` makes a tensor of zeros in the weights' dtype."""
        config = self.model.config
        C, H = config.n_embd, config.n_head
        self.cache = make(config.n_layer, 2, B, H, self.block_size, C // H)
        self.attention = decode.Attention(self.cache)
        self.x = make(B, C, dtype=self.residual_dtype)
        self.qkv, self.y, self.h = make(B, 3 * C), make(B, C), make(B, 4 * C)
        self.logits = make(B, config.vocab_size, dtype=self.residual_dtype)

    def prefill(self, idx):
        """Fill the cache with idx (B, T), T <= block_size; compute and draw the token after it."""
        x = self.model.hidden(idx, self.cache)
        self.logits.copy_(self.model.lm_head(x[:, -1]))
        self.position.fill_(idx.shape[1])
        self._draw()

    def step(self):
        """Feed `token` at `position`, likewise. Static shapes and addresses, no wait for the host."""
        transformer = self.model.transformer
        decode.embed(self.token, self.position, transformer.wte.weight, transformer.wpe.weight, self.x)
        for block, cache in zip(transformer.h, self.cache):
            attn, mlp = block.attn, block.mlp
            decode.linear(self.x, attn.c_attn.weight, attn.c_attn.bias, self.qkv, norm=block.ln_1)
            self.attention(self.qkv, cache, self.position, self.y)
            decode.linear(self.y, attn.c_proj.weight, attn.c_proj.bias, self.x, residual=self.x)
            decode.linear(self.x, mlp.c_fc.weight, mlp.c_fc.bias, self.h, norm=block.ln_2, gelu=True)
            decode.linear(self.h, mlp.c_proj.weight, mlp.c_proj.bias, self.x, residual=self.x)
        decode.linear(self.x, self.model.lm_head.weight, None, self.logits, norm=transformer.ln_f)
        self.position += 1
        self._draw()

    def slide(self):
        """Start again from the last tokens, which the caller has put into `window`. Static shapes, too."""
        self.prefill(self.window)

    def _draw(self):
        self.token.copy_(sample_tokens(self.logits[:, :self.used_vocab_size], **self.sampling))

    def _run(self, method):
        """Call `step` or `slide`; on CUDA capture it as a graph the first time, and replay that."""
        if self.device.type != "cuda":
            return method()
        name = method.__name__
        if name not in self.graphs:
            self.graphs[name] = capture_graph(method, restore=(self.token, self.position))
        self.graphs[name].replay()

    @torch.no_grad()
    def run(self, idx, max_new_tokens: int):
        """Yield after each new token all there is, (B, T + max_new_tokens), and the column just written.

        idx: the prompt (B, T), T >= 1, of which the last block_size tokens count. Nothing waits for the
        device.
        """
        T = idx.shape[1]
        if T < 1:
            raise UserError("the prompt is empty: it needs at least one token")
        tokens = F.pad(idx, (0, max_new_tokens))
        filled = min(T, self.block_size)
        for n in range(T, T + max_new_tokens):
            with torch.autocast(self.device.type, enabled=False):
                if n == T:
                    self.prefill(idx[:, -self.block_size:])
                elif filled < self.block_size:
                    self._run(self.step)
                    filled += 1
                else:
                    self.window.copy_(tokens[:, n - self.keep:n])
                    self._run(self.slide)
                    filled = self.keep
            tokens[:, n] = self.token
            yield tokens, n

    def generate(self, idx, max_new_tokens: int, stop_token: int | None = None):
        """(B, T) -> (B, T + new): the prompt and up to max_new_tokens more.

        Rows end at their first `stop_token` and are filled up with it; the result ends where the longest row
        does.
        """
        tokens, T = idx, idx.shape[1]
        for tokens, n in self.run(idx, max_new_tokens):
            new = tokens[:, T:n + 1]
            if stop_token is not None and (n - T) % 16 == 15 and (new == stop_token).any(dim=1).all():
                break  # looked at every 16 steps: each look waits for the device
        if stop_token is None or max_new_tokens == 0:
            return tokens
        new = tokens[:, T:n + 1]
        stopped = (new == stop_token).cumsum(dim=1) > 0  # from the stop token on
        new = new.masked_fill(stopped, stop_token)
        length = min(int((~stopped).sum(dim=1).max()) + 1, new.shape[1])
        return torch.cat((idx, new[:, :length]), dim=1)

    def stream(self, idx, max_new_tokens: int):
        """Yield each step's tokens as a list of B ints, as they come; the device works one step ahead."""
        ahead = None
        for tokens, n in self.run(idx, max_new_tokens):
            fetched = tokens[:, n].to("cpu", non_blocking=True)
            event = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
            if ahead is not None:
                yield _wait(*ahead)
            ahead = fetched, event
        if ahead is not None:
            yield _wait(*ahead)


def _wait(fetched, event) -> list[int]:
    if event is not None:
        event.synchronize()
    return fetched.tolist()


def capture_graph(function, restore=()) -> torch.cuda.CUDAGraph:
    """Capture what `function` launches, after a warm-up run that changes neither `restore` nor the RNG."""
    before, rng = [t.clone() for t in restore], torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        for tensor, value in zip(restore, before):
            tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_rng_state(rng)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog has a thread, too
        function()
    return graph


def check_sampling(config: GPTConfig, temperature: float, top_k: int | None, top_p: float | None,
                   slide: int) -> None:
    """Raise UserError for sampling settings that mean nothing."""
    if temperature < 0:
        raise UserError(f"temperature={temperature} must be at least 0 (0 takes the most likely token)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must be above 0 and at most 1, or None for all tokens")
    if not 1 <= slide <= config.block_size:
        raise UserError(f"slide={slide} must be between 1 and block_size={config.block_size}")
