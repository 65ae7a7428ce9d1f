"""Bits per byte: a loss that compares across tokenizers.

    bits per byte = loss / (ln 2 * bytes per token)        loss: nats per token

Bytes per token are the bytes of a split's text in UTF-8, divided by its number of tokens. Special tokens such
as end-of-text have no text: they count in neither number. A model that finds all V tokens equally likely has
log2(V) * tokens / bytes. This module imports no PyTorch.
"""

import math

import numpy as np

from nanosync import tokenizers
from nanosync.errors import UserError, shown

KEY = "bytes_per_token"  # in meta.json: {"train": number, "val": number}
MOST = 1e6  # bytes per token
DECODED = 2**24  # tokens of a split, evenly spread, that are decoded if meta.json does not have KEY
PIECE = 2**18  # tokens that are decoded at a time


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token."""
    return loss / (math.log(2) * bytes_per_token)


def stated_bytes_per_token(meta: dict | None, folder: str, split: str = "val") -> float | None:
    """Return the entry of a data set's meta.json, None if it has none. Raises UserError if it is malformed.

    folder: of the data set, for error messages.
    """
    entry = (meta or {}).get(KEY)
    if entry is None:
        return None
    value = entry.get(split) if type(entry) is dict else None
    if type(value) not in (int, float) or not 0 < value <= MOST:
        raise UserError(f"{folder}/meta.json: {KEY}={shown(entry)} must be an object with \"train\" and "
                        f"\"val\", numbers above 0 and at most {MOST:g}: correct it, or leave it out")
    return float(value)


def measured_bytes_per_token(split, meta: dict | None) -> float | None:
    """Decode the tokens of a split, or DECODED of them, and count the bytes of their text.

    Return None if the tokenizer is unknown here, or if no token has text. Raises UserError if the tokenizer's
    files are missing.

    split: dataloader.Split. meta: contents of the data set's meta.json.
    """
    tokenizer, special = tokenizers.from_meta(meta), tokenizers.end_of_text(meta)
    if isinstance(tokenizer, tokenizers.TokenIds):
        return None
    n_bytes = n_tokens = 0
    skipped = PIECE * max(0, math.ceil(split.n_tokens / DECODED) - 1)  # tokens between two pieces
    for tokens in split.files:
        end = -skipped
        while (start := end + skipped) < len(tokens):
            end = start + PIECE
            text, count = _decoded(tokens[start:end], tokenizer, special)
            for _ in range(8):  # tokens after which a character is complete
                if end < len(tokens) and text.endswith(tokenizers.UNKNOWN):
                    end += 1
                    text, count = _decoded(tokens[start:end], tokenizer, special)
            n_bytes += len(text.encode(errors="surrogatepass"))
            n_tokens += count
    return n_bytes / n_tokens if n_bytes else None


def _decoded(tokens: np.ndarray, tokenizer, special: int | None) -> tuple[str, int]:
    """Return the text of tokens, and the number of tokens that have text. special: token without text."""
    tokens = tokens[tokens < tokenizer.vocab_size]
    tokens = tokens if special is None else tokens[tokens != special]
    return tokenizer.decode(tokens.tolist()), len(tokens)
