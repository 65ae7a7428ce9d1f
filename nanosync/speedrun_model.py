"""What the models of the speedrun scripts have beside training: generation with a KV cache, and the interface
of model.GPT that sampling and evaluation use.

The scripts' models have rotary embeddings, and layers of their own kinds. So a decoding step is the model's
own forward pass, of which each attention reads the keys and values of earlier tokens from a cache. Everything
else of a layer depends on one token only, or on that token and the one before it (bigrams, smear).

Shapes: B = sequences, T = tokens, n = new tokens, C = n_embd, H = heads, D = channels of a head, V =
vocab_size. Simulated TP ranks are part of B.
"""

import torch
import torch.nn.functional as F

from kernels.interval_attention import interval_attention
from nanosync.errors import UserError
from nanosync.generation import Decoder
from nanosync.sharding import Replicated


class LayerCache:
    """Keys and values of the newest tokens of one layer, (B, T, H, D) each."""

    def __init__(self, window: int | None):
        """window: number of tokens that a token sees, with itself; None for no limit."""
        self.window, self.k, self.v = window, None, None
        self.count, self.last_key = 0, None  # number of tokens so far; see offset_keys

    def attend(self, q, k, v, first=None, scale: float | None = None):
        """Add the keys and values of n new tokens, and attend with their queries; return (B, n, H, D).

        The new tokens are the first tokens (a prefill), or one token.

        q, k, v: (B, n, H, D).
        first: first token that each new token sees, (B, n) int32; None for token 0.
        scale: see interval_attention.
        """
        prefill, n = self.k is None, q.size(1)
        assert prefill or n == 1, f"{n} new tokens after a prefill"
        keys, values = (k, v) if prefill else (torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1))
        before = 0 if self.window is None else max(0, keys.size(1) - self.window)  # no later token sees these
        self.k, self.v = keys[:, before:], values[:, before:]
        if prefill:
            self.count = n
            if first is not None:
                return interval_attention(q, k, v, first, scale=scale)
            return self._product(q, k, v, None, scale, n > 1)
        self.count += 1
        seen, T = None, self.k.size(1)
        if first is not None:
            seen = torch.arange(self.count - T, self.count, device=q.device) >= first[:, :, None]
            seen = seen[:, None]  # (B, 1, 1, T)
        return self._product(q, self.k, self.v, seen, scale, False)

    def _product(self, q, k, v, seen, scale, causal: bool):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale).transpose(1, 2)


def offset_keys(k, first, cache: LayerCache | None = None):
    """Give each token the previous token's key in the channels that do not turn with half_rotary.

    So a token can look for what followed an earlier occurrence of itself with one layer. The first token of a
    document has its own key.

    k: (B, n, H, D), of all tokens, or of those after the tokens in the cache.
    first: first token that each token sees, (B, n) int32.
    """
    start, D = 0 if cache is None else cache.count, k.size(-1)
    previous = torch.cat((k[:, :1] if start == 0 else cache.last_key, k[:, :-1]), dim=1)
    if cache is not None:
        cache.last_key = k[:, -1:]
    position = torch.arange(start, start + k.size(1), device=k.device)
    still = torch.arange(D, device=k.device) % (D // 2) >= D // 4
    return torch.where((first < position)[:, :, None, None] & still, previous, k)


class KVCache:
    """Keys and values of all layers for the first `length` tokens of each sequence."""

    def __init__(self, windows: list[int | None]):
        """windows: number of tokens that a token sees, with itself, in each layer; None for no limit."""
        self.layers, self.length = [LayerCache(window) for window in windows], 0


class CachedDecoder(Decoder):
    """Decoder for a model whose `hidden(idx, cache=...)` computes only the tokens that the cache lacks."""

    def allocate(self, B, make):
        self.logits = make(B, self.model.config.vocab_size, dtype=self.residual_dtype)

    def prefill(self, idx):
        self.idx, self.cache = idx, KVCache(self.model.layer_windows())
        self._forward()

    def step(self):
        self.idx = torch.cat((self.idx, self.token[:, None]), dim=1)
        self._forward()

    def _forward(self):
        x = self.model.hidden(self.idx, cache=self.cache)
        self.cache.length = self.idx.size(1)
        self.logits.copy_(self.model.head(x[:, -1]))
        self.position.fill_(self.cache.length)
        self._draw()

    def _run(self, method):
        method()  # shapes change from step to step, so a step is no CUDA graph


class SpeedrunConfig:
    """Base class of the scripts' configurations, which have sequence_length, vocab_size, used_vocab_size."""

    @property
    def block_size(self) -> int:
        """Longest context, tokens, under the name that other models have."""
        return self.sequence_length

    def check_used_vocab_size(self) -> None:
        """Set used_vocab_size to vocab_size if it is None. Raises UserError for a value out of range."""
        if self.used_vocab_size is None:
            self.used_vocab_size = self.vocab_size
        if not 1 <= self.used_vocab_size <= self.vocab_size:
            raise UserError(f"used_vocab_size={self.used_vocab_size} must be between 1 and "
                            f"vocab_size={self.vocab_size}")


class SpeedrunModel(Replicated):
    """Base class of the scripts' models. A subclass has `config`, `hidden(idx, cache=...)` and `head(x)`."""

    def layer_windows(self) -> list[int | None]:
        """Return the number of tokens that a token sees in each layer, with itself; None for all."""
        return [None] * self.config.n_layer

    def decoder(self, batch_size: int, **sampling) -> CachedDecoder:
        """Make a decoder for prompts of batch_size sequences. sampling: see Decoder."""
        return CachedDecoder(self, batch_size, **sampling)

    def generate(self, idx, max_new_tokens: int, stop_token: int | None = None, **sampling):
        """Continue token ids (B, T) to (B, T + new). sampling: see Decoder."""
        return self.decoder(idx.size(0), **sampling).generate(idx, max_new_tokens, stop_token)

    def save_pretrained(self, folder: str) -> None:
        """Raise UserError: transformers has no such model."""
        raise UserError("transformers has no model with these layers: export its checkpoint with python "
                        "convert.py OUT_DIR FOLDER, which writes their code beside the weights")

    def _apply(self, fn, recurse=True):
        """Move or cast the model as nn.Module does, but leave the rotary tables in fp32, as in training."""
        tables = {name: getattr(self, name) for name in ("cos", "sin")}
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if not table.is_meta:
                setattr(self, name, table.to(getattr(self, name).device))
        return self
