"""Tokenizers as files of transformers: tokenizer.json and tokenizer_config.json, from the contents of a
meta.json. They encode and decode as nanosync.tokenizers does."""

import itertools
import json
import os

from nanosync import tokenizers as own
from nanosync.errors import UserError

END_OF_TEXT = "<|endoftext|>"


def bytes_to_characters() -> dict[int, str]:
    """Return the visible character by which byte-level tokenizers of GPT-2's kind name each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(others)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair of tokens that each token of several bytes is made of, in the order of their ranks.

    ranks: token -> id, of a byte pair encoding in which a lower id is merged first.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _byte_level(ranks: dict[bytes, int], use_regex: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = bytes_to_characters()

    def name(token: bytes) -> str:
        return "".join(names[b] for b in token)

    vocabulary = {name(token): rank for token, rank in ranks.items()}
    merges = [(name(a), name(b)) for a, b in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])  # it gets the next id
    return tokenizer


def _gpt2(meta: dict):
    return _byte_level(own.GPT2Tokenizer().ranks(), use_regex=True)


def _byte(meta: dict):
    return _byte_level({bytes([b]): b for b in range(256)}, use_regex=False)


def _char(meta: dict):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: i for i, c in enumerate(meta["chars"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=own.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _own_json(meta: dict):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(meta["tokenizer_json"])


def tokenizer_of(meta: dict | None, vocab_size: int):
    """Make the tokenizer of a meta.json as an object of the package tokenizers, None if it is unknown.

    Raises UserError if files of the tokenizer are missing, or if it has more tokens than the model.

    meta: contents of meta.json, None for GPT-2's. vocab_size: number of tokens of the model.
    """
    known = own.from_meta(meta) if meta is not None or vocab_size == own.GPT2Tokenizer.vocab_size else None
    make = {own.GPT2Tokenizer: _gpt2, own.ByteTokenizer: _byte, own.CharTokenizer: _char,
            own.JsonTokenizer: _own_json}.get(type(known))
    if make is None:
        return None
    if known.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {known.vocab_size} tokens and the model {vocab_size}: the "
                        f"checkpoint names the meta.json of another data set")
    return make(meta)


def write(tokenizer, folder: str, end_of_text: int | None, block_size: int) -> None:
    """Write the files from which AutoTokenizer.from_pretrained(folder) makes a tokenizer. Raises OSError.

    tokenizer: of tokenizer_of. end_of_text: its token with which documents begin, None without.
    block_size: longest context of the model, tokens.
    """
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "model_max_length": block_size}
    if end_of_text is not None:
        name = tokenizer.id_to_token(end_of_text)
        config |= {"eos_token": name, "bos_token": name, "pad_token": name}
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(tokenizer.to_str(pretty=False))
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=1, ensure_ascii=False)
