"""Features of a position that follow from the ids of the tokens up to it: rows for pairs and triples of
tokens, and the token after the longest earlier match.

The match of position t is the last p < t in t's document such that the n tokens up to p are the n tokens up
to t, with the largest n of 1, 2, 4, 8, 16, 32. In text that repeats itself, as source code does, the token
after p often comes next again, however far away it is. Attention learns to find it inside its window (an
induction head, arXiv 2209.11895). Here it is found and not learned, as in the n-gram heads of arXiv
2401.12973.

Shapes: B = sequences, T = tokens of a sequence, C = channels.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels.qk_rotary import rms_norm

FACTORS = 36313, 27191, 50591  # of the hash: of a token, the one before it, and the one before that
LEVELS = 6  # matches of 1, 2, 4, 8, 16 and 32 tokens


def ngram_rows(idx: torch.Tensor, begins: torch.Tensor, n: int, size: int) -> torch.Tensor:
    """Return the row of a table of n-grams for each token and the n - 1 before it, (B, T), by a hash.

    The last row is for tokens with fewer than n - 1 tokens before them in the document and the sequence.

    idx: token ids, (B, T).
    begins: True where a document begins, (B, T).
    n: 2 or 3.
    size: number of rows.
    """
    T, idx = idx.size(1), idx.long()  # products exceed int32
    rows = FACTORS[0] * idx
    none = begins = F.pad(begins[:, 1:], (1, 0), value=True)
    for i in range(1, n):
        rows = rows ^ FACTORS[i] * F.pad(idx, (i, 0))[:, :T]
        none = none | F.pad(begins, (i - 1, 0), value=True)[:, :T]
    return (rows % (size - 1)).masked_fill(none, size - 1)


def suffix_matches(idx: torch.Tensor, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token after the longest match of each position, and the match's level, (B, T) int64 each.

    The level of a match of 2**i tokens is i + 1. Without a match it is 0, and so is the token. The results at
    t depend on the tokens document[t] to t only.

    idx: token ids, (B, T).
    document: first token of each token's document, (B, T), see first_visible.
    """
    T, n, idx = idx.size(1), 1, idx.long()
    keys, token, level = idx, torch.zeros_like(idx), torch.zeros_like(idx)
    for i in range(LEVELS):
        previous, ranks = _occurrences(keys)
        matches = previous - (n - 1) >= document  # so p's n tokens are in the document, and t's
        token = torch.where(matches, idx.gather(1, previous + 1), token)
        level = torch.where(matches, i + 1, level)
        # 2 n tokens are equal if the last n are, and the n before them
        keys = ranks * T + F.pad(ranks, (n, 0))[:, :T]
        keys = keys.int() if T * T < 2**31 else keys  # half the digits to sort by
        n *= 2
    return token, level


def _occurrences(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each position the last earlier one with an equal key, -1 without one, and the rank of its
    key among the different keys of the sequence, (B, T) int64 each. keys: (B, T) integers."""
    ordered, order = keys.sort(dim=1, stable=True)  # equal keys by position
    same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    before = torch.where(same, order.roll(1, dims=1), -1)
    previous = torch.empty_like(order).scatter(1, order, before)
    return previous, torch.empty_like(order).scatter(1, order, (~same).cumsum(1) - 1)


class SuffixMatch(nn.Module):
    """The token after the longest match, for each layer's stream: a share, which each layer has for each
    level, times the token's normalised embedding plus a row of the level. Nothing without a match."""

    def __init__(self, layers: int, channels: int):
        super().__init__()
        self.shares = nn.Parameter(torch.zeros(layers, LEVELS))
        self.rows = nn.Parameter(torch.zeros(LEVELS, channels))

    def forward(self, idx, document, embedding: nn.Embedding, start: int, dtype: torch.dtype
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (B, T - start, C) and their shares (B, T - start, layers), from the token `start` on.

        idx, document: see suffix_matches.
        embedding: of the model's tokens.
        dtype: of the results.
        """
        token, level = (x[:, start:] for x in suffix_matches(idx, document))
        one_hot = (level[..., None] == torch.arange(1, LEVELS + 1, device=level.device)).to(dtype)
        rows = rms_norm(embedding(token).to(dtype)) + one_hot @ self.rows.to(dtype)
        return rows, one_hot @ self.shares.to(dtype).T
