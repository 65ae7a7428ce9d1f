"""Tokenizers: characters, and GPT-2's byte pair encoding through tiktoken. This module imports no PyTorch.

A tokenizer encodes text to a uint16 array, decodes ids to text, and decodes a stream id by id. Its `meta` is
its description in meta.json, from which `from_meta` makes the tokenizer again.
"""

import codecs
import os

import numpy as np

from nanosync.errors import UserError, shown

GPT2_META = {"tokenizer": "gpt2", "vocab_size": 50257}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class CharTokenizer:
    """Tokenizer with one token per character.

    A character that is not in `chars` becomes UNKNOWN if `chars` has UNKNOWN, else it raises UserError.
    """

    eot_token = None

    def __init__(self, chars: str):
        self.chars = chars
        self.vocab_size = len(chars)
        dtype = np.uint16 if len(chars) <= 0xFFFF else np.uint32
        self._missing = np.iinfo(dtype).max
        self._table = np.full(0x110000, chars.find(UNKNOWN) if UNKNOWN in chars else self._missing, dtype)
        self._table[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode(self, text: str) -> np.ndarray:
        ids = self._table[np.frombuffer(text.encode("utf-32-le"), "<u4")]
        if len(ids) and ids.max() == self._missing:
            raise UserError(f"character {text[int(ids.argmax())]!r} is not among the {self.vocab_size} "
                            f"characters with which the data set was prepared")
        return ids

    encode_ordinary = encode

    def decode(self, ids) -> str:
        return "".join(self.chars[i] for i in ids)

    def stream(self):
        """Return a function that decodes the ids of a stream, one per call."""
        return lambda token: self.chars[token]

    def meta(self) -> dict:
        return {"tokenizer": "char", "vocab_size": self.vocab_size, "chars": self.chars}


class GPT2Tokenizer:
    """GPT-2's byte pair encoding: 50,256 merges and bytes, and <|endoftext|>."""

    vocab_size, eot_token = 50257, 50256

    def __init__(self):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except Exception as e:  # any type, as tiktoken passes on errors of its HTTP library
            cache = os.environ.get("TIKTOKEN_CACHE_DIR")
            where = f"not in TIKTOKEN_CACHE_DIR={cache}" if cache else "not cached on this machine"
            raise UserError(f"GPT-2's tokenizer files are {where} and could not be downloaded "
                            f"({type(e).__name__}): set TIKTOKEN_CACHE_DIR to a folder that has them; with a "
                            "network, tiktoken fills that folder at first use") from None

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode(text, allowed_special={"<|endoftext|>"}), dtype=np.uint16)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Encode text, with special tokens in it as ordinary text."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids) -> str:
        return self._encoding.decode([int(i) for i in ids], errors="replace")

    def stream(self):
        """Return a function that decodes the ids of a stream, one per call.

        It returns a character when the last byte of the character has come.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._encoding.decode_single_token_bytes(token))

    def meta(self) -> dict:
        return dict(GPT2_META)


class TokenIds:
    """Tokens of a tokenizer that is unknown here. Their text is their ids, with spaces between."""

    eot_token = None

    def __init__(self, name: str, vocab_size: int):
        self.name, self.vocab_size = name, vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Encode ids with spaces between them; a text of whitespace, as nanoGPT's default prompt, is id 0."""
        words = text.replace(",", " ").split() or ["0"] * bool(text)
        unusable = [word for word in words if not (word.isdecimal() and len(word) < 10)]
        if unusable:
            raise UserError(f"the tokenizer {shown(self.name)} is unknown here and cannot encode "
                            f"{shown(unusable[0])}: give token ids, as in '12 7 99'")
        return np.array(list(map(int, words)), np.uint32)

    encode_ordinary = encode

    def decode(self, ids) -> str:
        return "".join(f"{i} " for i in ids)

    def stream(self):
        """Return a function that decodes the ids of a stream, one per call."""
        return lambda token: f"{token} "

    def meta(self) -> dict:
        return {"tokenizer": self.name, "vocab_size": self.vocab_size}


def end_of_text(meta: dict | None) -> int | None:
    """Return the token with which documents begin, None if there is none.

    It is `end_of_text` of meta.json or, without that entry, the tokenizer's. meta: see from_meta.
    """
    meta = GPT2_META if meta is None else meta
    if meta.get("end_of_text") is not None:
        return meta["end_of_text"]
    gpt2 = meta["tokenizer"] == "gpt2" and meta["vocab_size"] > GPT2Tokenizer.eot_token
    return GPT2Tokenizer.eot_token if gpt2 else None


def from_meta(meta: dict | None):
    """Make the tokenizer of a meta.json; None stands for GPT-2's, as in nanoGPT. Raises UserError."""
    kind = "gpt2" if meta is None else meta.get("tokenizer")
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "char" and isinstance(meta.get("chars"), str) and len(meta["chars"]) == meta["vocab_size"]:
        return CharTokenizer(meta["chars"])
    if isinstance(kind, str) and kind != "char":
        return TokenIds(kind, meta["vocab_size"])
    raise UserError(f"the data set's tokenizer {shown(kind)} is unknown or incomplete: prepare the data set "
                    f"again")
