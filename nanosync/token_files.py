"""Token files: their formats, and the meta.json beside them.

    bin     train.bin, val.bin            flat little-endian uint16, as nanoGPT's
    shards  *_train_*.bin, *_val_*.bin    header of 256 int32 (20240520, 1, token count, zeros), then uint16,
                                          as the cached FineWeb shards of modded-nanogpt
    npy     *_train_*.npy, *_val_*.npy    one-dimensional uint16 arrays, as build-nanogpt's

meta.json: name, format, tokenizer, vocab_size, chars (of a char tokenizer), dtype, train_tokens, val_tokens,
sha256 (file name -> digest), source. This module imports no PyTorch, so that preparing data starts fast.
"""

import glob
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanosync.errors import UserError
from nanosync.files import first_line, os_error_as_user_error

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
TOKEN_DTYPE = np.dtype("<u2")
REQUIRED_META = {"vocab_size": int, "tokenizer": str}
MAX_VOCAB_SIZE = 1 << 16
PICKLED_META = (  # nanoGPT's character-level data sets have a meta.pkl
    "{folder} has its vocabulary in meta.pkl, a pickle, which can run code and is never loaded: run a "
    "prepare.py of data/ with --out={folder}, or write {folder}/meta.json, with all characters in the "
    'order of their ids: {{"tokenizer": "char", "vocab_size": 3, "chars": "abc"}}')


@dataclass(frozen=True)
class TokenFormat:
    """A format of token files. A new format is an entry of FORMATS."""

    pattern: str  # of the file names of a split
    open: Callable  # (path) -> read-only memory map of the tokens; raises UserError if the file is malformed
    ordered: bool  # True: the first epoch reads the windows in the order of the files


def split_files(folder: str, split: str) -> tuple[str, list[str]]:
    """Return the format's name and the sorted files of 'train' or 'val'. Raises UserError."""
    for name, kind in FORMATS.items():
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), kind.pattern.format(split=split))))
        paths = [path for path in paths if os.path.isfile(path) or "*" in kind.pattern]
        if paths:
            return name, paths
    script = os.path.join(folder, "prepare.py")
    if os.path.basename(folder) == "fineweb10B":
        script = os.path.join(os.path.dirname(folder), "cached_fineweb10B.py")
    hint = f": run python {script}" if os.path.isfile(script) else ""
    raise UserError(f"data set {folder} has no {split} tokens ({split}.bin, *_{split}_*.bin or "
                    f"*_{split}_*.npy){hint}")


def open_tokens(path: str, kind: str) -> np.ndarray:
    """Open one file as a read-only memory map of uint16. Raises UserError if it is malformed."""
    with os_error_as_user_error(f"cannot read {path}"):
        return FORMATS[kind].open(path)


def _open_flat(path: str) -> np.ndarray:
    size = os.path.getsize(path)
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, and uint16 tokens need a positive even number: the file "
                        f"is truncated; prepare the data set again")
    return np.memmap(path, TOKEN_DTYPE, mode="r")


def _open_shard(path: str) -> np.ndarray:
    size, offset = os.path.getsize(path), 4 * HEADER_INTS
    header = np.fromfile(path, "<i4", count=3)
    if size < offset or header[0] != SHARD_MAGIC:
        first = header[0] if len(header) else "missing"
        raise UserError(f"{path} is not a token shard: its first number is {first}, not {SHARD_MAGIC}")
    if header[1] != SHARD_VERSION:
        raise UserError(f"{path} is a token shard of version {header[1]}; only version {SHARD_VERSION} can "
                        f"be read")
    if size != offset + 2 * int(header[2]) or header[2] < 1:
        raise UserError(f"the header of {path} says {header[2]} tokens, and the file has "
                        f"{(size - offset) / 2:g}: it is truncated; download or prepare it again")
    return np.memmap(path, TOKEN_DTYPE, mode="r", offset=offset)


def _open_npy(path: str) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise UserError(f"{path} is not a readable .npy file ({first_line(e)})") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} is an .npz archive; tokens must be one array in the .npy format")
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1 or len(tokens) == 0:
        raise UserError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; tokens must be uint16 in one "
                        f"dimension, at least one token")
    return tokens


FORMATS = {  # name -> format; the first format that has files of a split counts
    "bin": TokenFormat("{split}.bin", _open_flat, ordered=False),
    "shards": TokenFormat("*_{split}_*.bin", _open_shard, ordered=True),
    "npy": TokenFormat("*_{split}_*.npy", _open_npy, ordered=True),
}


def read_meta(folder: str) -> dict | None:
    """Read a folder's meta.json, None if the file is missing.

    Raises UserError if meta.json is malformed, or if the folder has only a pickled meta.pkl.
    """
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
    except FileNotFoundError:
        if os.path.exists(os.path.join(folder, "meta.pkl")):
            raise UserError(PICKLED_META.format(folder=folder)) from None
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {first_line(e)}; prepare the data set again") from None
    for key, kind in REQUIRED_META.items():
        if not isinstance(meta, dict) or type(meta.get(key)) is not kind:
            raise UserError(f"{path} has no usable {key!r}; prepare the data set again")
    if not 1 <= meta["vocab_size"] <= MAX_VOCAB_SIZE or meta.get("dtype", "uint16") != "uint16":
        raise UserError(f"{path}: vocab_size={meta['vocab_size']}, dtype={meta.get('dtype', 'uint16')!r} "
                        f"cannot be used: tokens are uint16, so up to {MAX_VOCAB_SIZE} symbols; prepare the "
                        f"data set again")
    return meta


def usable_meta(folder: str) -> dict | None:
    """Read a folder's meta.json, None if it is missing or malformed; for scripts that prepare data."""
    try:
        return read_meta(folder)
    except UserError:
        return None


def check_counts(folder: str, meta: dict | None, split: str, n_tokens: int) -> None:
    """Raise UserError if meta.json has a token count of the split that differs from the files'."""
    said = (meta or {}).get(f"{split}_tokens")
    if said not in (None, n_tokens):
        raise UserError(f"{folder}/meta.json says {said!r} {split} tokens and the files have {n_tokens}: "
                        f"files are incomplete or belong to an earlier data set; prepare the data set again")
