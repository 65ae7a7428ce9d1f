"""Text generation: sampling, and decoding with a static KV cache.

Shapes: B batch, T tokens of a sequence, C = n_embd, H = n_head, D = C / H, V = vocab_size, L = n_layer.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from kernels import decode
from nanosync.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Options for drawing the next token. A new option is a field, its check and its effect in `draw`."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None  # keep the k most likely tokens; None: all
    top_p: float | None = None  # then keep the fewest tokens whose probabilities reach p (arXiv 1904.09751)

    def check(self) -> None:
        """Raise UserError for a value outside its range."""
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be at least 0 (0 takes the most likely "
                            f"token)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1, or None for all tokens")

    def draw(self, logits):
        """Draw one token per row: logits (B, V) -> ids (B,).

        The Gumbel-max trick needs no synchronisation with the host: argmax(logits - log E) with exponential E
        is a draw from softmax(logits).
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float()
        V, index = logits.shape[-1], None
        if self.top_p is not None or (self.top_k is not None and self.top_k < V):
            kept = min(self.top_k or V, V)
            logits, index = logits.topk(kept, dim=-1, sorted=self.top_p is not None)  # most likely first
        if self.top_p is not None:
            probs = (logits / self.temperature).softmax(dim=-1)
            logits = logits.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, float("-inf"))
        noise = torch.empty_like(logits).exponential_()
        if index is not None:
            return decode.draw(logits, index, noise, self.temperature, torch.empty_like(index[:, 0]))
        noise = noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()
        return (logits / self.temperature - noise).argmax(dim=-1)


@torch.no_grad()
def sample_text(model, tokenizer, prompt: str, max_new_tokens: int, seed: int, stop=lambda: False) -> str:
    """Return the prompt and the text that a model generates after it during training.

    Keeps all random states and the model's mode. The caller chooses the autocast.

    stop: function that is called after every token; the text ends there if it returns True.
    """
    device, training = model.lm_head.weight.device, model.training
    idx = torch.tensor(tokenizer.encode(prompt).astype("int64"), device=device)[None]
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.eval()
        decoder = model.decoder(1, temperature=0.8, top_k=min(200, model.config.used_vocab_size))
        for all_tokens, n in decoder.run(idx, max_new_tokens):
            idx = all_tokens[:, :n + 1]
            if stop():
                break
        model.train(training)
    return tokenizer.decode(idx[0].tolist())


class Decoder:
    """Generator of tokens with a static KV cache: a prefill, then one token per step.

    On CUDA a step is one CUDA graph. A Decoder has a fixed batch size and fixed sampling options, and can be
    used for many prompts. It runs in the dtype of the weights. If it is built under autocast it runs on a
    copy of the weights in autocast's dtype.

    Past `block_size` tokens the window slides. GPT-2's positions are absolute, so a slide changes every key
    and value and needs a new prefill. With `slide=1`, nanoGPT's rule, every token sees the block_size tokens
    before it. With a larger `slide` the window drops so many tokens at once and slides less often.
    """

    def __init__(self, model, batch_size: int, slide: int = 1, **sampling):
        """Allocate cache and buffers. Raises UserError.

        batch_size: B, sequences. slide: tokens to drop at once. sampling: fields of Sampling.
        """
        config, weight = model.config, next(model.parameters())
        self.sampling = Sampling(**sampling)
        self.sampling.check()
        if not 1 <= slide <= config.block_size:
            raise UserError(f"slide={slide} must be between 1 and block_size={config.block_size}")
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
        self.token = make(B, dtype=torch.int64)  # newest token, not yet in the cache
        self.position = make(1, dtype=torch.int64)  # number of tokens in the cache
        self.window = make(B, self.keep, dtype=torch.int64)
        self.graphs = {}

    def allocate(self, B: int, make):
        """Allocate cache and buffers of a step. make: function (*shape) -> zeros in the weights' dtype."""
        config = self.model.config
        C, H = config.n_embd, config.n_head
        self.cache = make(config.n_layer, 2, B, H, self.block_size, C // H)
        self.attention = decode.Attention(self.cache)
        self.x = make(B, C, dtype=self.residual_dtype)
        self.qkv, self.y, self.h = make(B, 3 * C), make(B, C), make(B, 4 * C)
        self.logits = make(B, config.vocab_size, dtype=self.residual_dtype)

    def prefill(self, idx):
        """Fill the cache with idx (B, T), T <= block_size; draw the next token."""
        x = self.model.hidden(idx, self.cache)
        self.logits.copy_(self.model.lm_head(x[:, -1]))
        self.position.fill_(idx.shape[1])
        self._draw()

    def step(self):
        """Append `token` to the cache; draw the next token.

        Shapes and addresses are static, and nothing waits for the host.
        """
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
        """Fill the cache from `window`, where the caller has put the last tokens. Shapes are static."""
        self.prefill(self.window)

    def _draw(self):
        self.token.copy_(self.sampling.draw(self.logits[:, :self.used_vocab_size]))

    def _run(self, method):
        """Call `step` or `slide`. On CUDA, capture the first call as a graph, and replay the graph."""
        if self.device.type != "cuda":
            return method()
        name = method.__name__
        if name not in self.graphs:
            self.graphs[name] = capture_graph(method, restore=(self.token, self.position))
        self.graphs[name].replay()

    @torch.no_grad()
    def run(self, idx, max_new_tokens: int):
        """Yield (all tokens (B, T + max_new_tokens), column of the new token) after each new token.

        Nothing waits for the device.

        idx: the prompt, (B, T), T >= 1. The model sees its last block_size tokens.
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
        """Continue a prompt idx (B, T) by up to max_new_tokens tokens; return (B, T + new).

        stop_token: id that ends a row. Shorter rows are filled up with it. None: no row ends early.
        """
        tokens, T = idx, idx.shape[1]
        for tokens, n in self.run(idx, max_new_tokens):
            new = tokens[:, T:n + 1]
            if stop_token is not None and (n - T) % 16 == 15 and (new == stop_token).any(dim=1).all():
                break  # checked every 16 steps only, because the check waits for the device
        if stop_token is None or max_new_tokens == 0:
            return tokens
        new = tokens[:, T:n + 1]
        stopped = (new == stop_token).cumsum(dim=1) > 0  # from the stop token on
        new = new.masked_fill(stopped, stop_token)
        length = min(int((~stopped).sum(dim=1).max()) + 1, new.shape[1])
        return torch.cat((idx, new[:, :length]), dim=1)

    def stream(self, idx, max_new_tokens: int):
        """Yield each step's tokens as a list of B ints. The device computes one step ahead."""
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
    """Capture the kernels of `function` as a CUDA graph, after a warm-up call.

    restore: tensors whose values the warm-up does not change. It does not change the random state either.
    """
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
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
        function()
    return graph
