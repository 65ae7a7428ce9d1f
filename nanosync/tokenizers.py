"""Tokenizers: characters, bytes, GPT-2's byte pair encoding through tiktoken, and any tokenizer.json through
`tokenizers`. This module imports no PyTorch.

A tokenizer encodes text to an array of ids, decodes ids to text, and decodes a stream id by id. Its `meta` is
its description in meta.json, from which `from_meta` makes the tokenizer again.
"""

import codecs
import os

import numpy as np

from nanosync.errors import UserError, shown

GPT2_META = {"tokenizer": "gpt2", "vocab_size": 50257}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")  # names of the token
# that separates documents, in the order in which a tokenizer.json is searched


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

    def ranks(self) -> dict[bytes, int]:
        """Return token -> id of all tokens but <|endoftext|>. Lower ids are merged first."""
        return {self._encoding.decode_single_token_bytes(i): i for i in range(self.eot_token)}

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


class ByteTokenizer:
    """Tokenizer with one token per byte of UTF-8, and an end-of-text token."""

    vocab_size, eot_token = 257, 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    encode_ordinary = encode

    def decode(self, ids) -> str:
        to_text = self.stream()
        return "".join(to_text(int(i)) for i in ids)

    def stream(self):
        """Return a function that decodes the ids of a stream, one per call."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(bytes([token])) if token < self.eot_token else "<|endoftext|>"

    def meta(self) -> dict:
        return {"tokenizer": "byte", "vocab_size": self.vocab_size, "end_of_text": self.eot_token}


class JsonTokenizer:
    """Tokenizer of a tokenizer.json, the format of Hugging Face's `tokenizers`."""

    def __init__(self, content: str, where: str):
        """Parse a tokenizer.json. content: its text. where: its source, for messages. Raises UserError."""
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(f"{where} needs the package tokenizers: pip install tokenizers") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as e:  # of a type that `tokenizers` does not name
            raise UserError(f"{where} is not a usable tokenizer.json ({shown(str(e))}): take a file that "
                            f"Tokenizer.save of `tokenizers` wrote") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.content, self.vocab_size = content, max(ids.values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError(f"{where} has an empty vocabulary")
        self.eot_token = next((ids[name] for name in END_OF_TEXT if name in ids), None)
        self.kind = type(self._tokenizer.model).__name__.lower()  # bpe, unigram, wordpiece or wordlevel
        self._new_stream = tokenizers.decoders.DecodeStream

    def encode(self, text: str) -> np.ndarray:
        self._tokenizer.encode_special_tokens = False
        return self._encode(text)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Encode text, with special tokens in it as ordinary text."""
        self._tokenizer.encode_special_tokens = True
        return self._encode(text)

    def _encode(self, text: str) -> np.ndarray:
        encoding, = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def stream(self):
        """Return a function that decodes the ids of a stream, one per call.

        It returns a character when the last token of the character has come.
        """
        stream = self._new_stream(skip_special_tokens=False)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def meta(self) -> dict:
        end = {} if self.eot_token is None else {"end_of_text": self.eot_token}
        return {"tokenizer": self.kind, "vocab_size": self.vocab_size, **end, "tokenizer_json": self.content}


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
    if isinstance(kind, str) and isinstance(meta.get("tokenizer_json"), str):
        tokenizer = JsonTokenizer(meta["tokenizer_json"], "tokenizer_json of meta.json")
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise UserError(f"tokenizer_json of meta.json has {tokenizer.vocab_size} tokens, and vocab_size "
                            f"is {meta['vocab_size']}: prepare the data set again")
        return tokenizer
    if kind == "byte" and meta["vocab_size"] == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if isinstance(kind, str) and kind != "char":
        return TokenIds(kind, meta["vocab_size"])
    raise UserError(f"the data set's tokenizer {shown(kind)} is unknown or incomplete: prepare the data set "
                    f"again")
