"""Token files: their formats, and the meta.json beside them.

    bin     train.bin, val.bin            flat little-endian tokens, uint16 as nanoGPT's unless meta.json has
                                          another dtype
    shards  *_train_*.bin, *_val_*.bin    header of 256 int32 (magic, version, token count, zeros), then
                                          tokens: uint16 with magic 20240520, as the cached FineWeb shards of
                                          modded-nanogpt, uint32 with magic 20240801, as llm.c's for Llama 3
    npy     *_train_*.npy, *_val_*.npy    one-dimensional arrays of uint16, as build-nanogpt's, or of uint32

meta.json: name, format, tokenizer, vocab_size, chars (of a char tokenizer), dtype ("uint16" or "uint32"),
end_of_text (id of the token with which documents begin), tokenizer_json (text of a tokenizer.json),
train_tokens, val_tokens, bytes_per_token ("train", "val" -> bytes of UTF-8 a token, end-of-text tokens
excluded), sha256 (file name -> digest), source. This module imports no PyTorch, so that preparing data starts
fast.
"""

import ast
import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanosync.errors import UserError, shown
from nanosync.files import first_line, open_regular, os_error_as_user_error, read_json

HEADER_INTS = 256
SHARDS = {20240520: ("uint16", (1,)), 20240801: ("uint32", (1, 7))}  # magic -> dtype, versions
SHARD_HEADS = {dtype: (magic, versions[-1]) for magic, (dtype, versions) in SHARDS.items()}  # of new shards
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}  # of tokens, by name
MAX_VOCAB_SIZE = {"uint16": 1 << 16, "uint32": 1 << 31}  # PyTorch's token ids are signed
META = {"vocab_size": int, "tokenizer": str, "dtype": str, "end_of_text": int, "train_tokens": int,
        "val_tokens": int, "name": str, "format": str, "sha256": dict}
# entries of meta.json -> types; the first two must exist
MAX_NPY_HEADER = 4096  # bytes; numpy writes 118 for tokens
LOOK = 4096  # tokens at the beginning and in the middle of a file that show whether the dtype is right
PICKLED_META = (  # nanoGPT's character-level data sets have a meta.pkl
    "{folder} has its vocabulary in meta.pkl, a pickle, which can run code and is not loaded here: run "
    "python convert.py {folder}/meta.pkl {folder}, or write {folder}/meta.json, with all characters in "
    'the order of their ids: {{"tokenizer": "char", "vocab_size": 3, "chars": "abc"}}')
PYTHON_SOURCE_GPT2 = "python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2"


@dataclass(frozen=True)
class TokenFormat:
    """A format of token files. A new format is an entry of FORMATS."""

    pattern: str  # of the file names of a split
    open: Callable  # (open file, its size in bytes, its path, name of the dtype in meta.json or None) ->
    # read-only memory map of the tokens; raises UserError if the file is malformed
    ordered: bool  # True: the first epoch reads the windows in the order of the files


def dtype_for(vocab_size: int) -> str:
    """Return the name of the narrowest dtype that holds the tokens of a vocabulary."""
    return next(name for name, size in MAX_VOCAB_SIZE.items() if vocab_size <= size)


def split_files(folder: str, split: str) -> tuple[str, list[str]]:
    """Return the format's name and the sorted files of 'train' or 'val'. Raises UserError."""
    for name, kind in FORMATS.items():
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), kind.pattern.format(split=split))))
        paths = [path for path in paths if not os.path.isdir(path) or "*" in kind.pattern]
        if paths:
            return name, paths
    script = os.path.join(folder, "prepare.py")
    if os.path.basename(folder) == "fineweb10B":
        script = os.path.join(os.path.dirname(folder), "cached_fineweb10B.py")
    hint = f": run python {script}" if os.path.isfile(script) else ""
    if os.path.basename(folder) == "python_source_gpt2":
        hint = f": run {PYTHON_SOURCE_GPT2}"
    raise UserError(f"data set {folder} has no {split} tokens ({split}.bin, *_{split}_*.bin or "
                    f"*_{split}_*.npy){hint}")


def open_tokens(path: str, kind: str, dtype: str | None = None) -> np.ndarray:
    """Open one file as a read-only memory map of uint16 or uint32. Raises UserError if it is malformed.

    kind: name of the format. dtype: `dtype` of the data set's meta.json, None if meta.json has none.
    """
    with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
        tokens = FORMATS[kind].open(f, os.fstat(f.fileno()).st_size, path, dtype)
    name = tokens.dtype.name
    if dtype not in (None, name):
        raise UserError(f"{path} holds {name} tokens, and its folder's meta.json says {dtype}: write "
                        f'"dtype": "{name}" there')
    wider = wider_dtype(tokens)
    if wider is not None:
        fix = f'write "dtype": "{wider}" into its folder\'s meta.json, or ' if wider in DTYPES else ""
        raise UserError(f"{path} holds {wider} tokens and would be read as {name}: every second {name} of a "
                        f"sample is 0; {fix}prepare the data set again")
    return tokens


def wider_dtype(tokens: np.ndarray) -> str | None:
    """Return the name of the wider dtype as which tokens seem to be written, None if their dtype fits.

    Small numbers of a wider dtype are numbers and zeros by turns. Tokens of which all or very few differ from
    zero, or fewer than 64 tokens, show nothing.
    """
    middle = len(tokens) // 2 // 4 * 4
    sample = np.concatenate((tokens[:LOOK], tokens[middle:middle + LOOK]))
    if len(sample) < 64:
        return None
    sample = sample[:len(sample) // 4 * 4]
    for first in (0, 1):  # numbers in little-endian order are before their zeros
        if not sample[1 - first::2].any() and len(np.unique(sample[first::2])) > 2:
            bits = 8 * tokens.itemsize
            if bits == 16 and not sample[2::4].any() and not sample[3::4].any():
                return "int64"
            return f"uint{2 * bits}"
    return None


def _open_flat(f, size: int, path: str, dtype: str | None) -> np.ndarray:
    name = dtype or "uint16"
    width = DTYPES[name].itemsize
    if size == 0 or size % width:
        number = "positive even number" if width == 2 else f"positive multiple of {width}"
        raise UserError(f"{path} has {size} bytes, and {name} tokens need a {number}: the file "
                        f"is truncated; prepare the data set again")
    return np.memmap(f, DTYPES[name], mode="r")


def _open_shard(f, size: int, path: str, dtype: str | None) -> np.ndarray:
    offset = 4 * HEADER_INTS
    header = np.frombuffer(f.read(12), "<i4") if size >= 12 else []
    if size < offset or header[0] not in SHARDS:
        first = header[0] if len(header) else "missing"
        raise UserError(f"{path} is not a token shard: its first number is {first}, not "
                        f"{' or '.join(map(str, SHARDS))}")
    name, versions = SHARDS[header[0]]
    if header[1] not in versions:
        raise UserError(f"{path} is a token shard of version {header[1]}; only version "
                        f"{' or '.join(map(str, versions))} can be read")
    width = DTYPES[name].itemsize
    if size != offset + width * int(header[2]) or header[2] < 1:
        raise UserError(f"the header of {path} says {header[2]} tokens, and the file has "
                        f"{(size - offset) / width:g}: it is truncated; download or prepare it again")
    return np.memmap(f, DTYPES[name], mode="r", offset=offset)


def _open_npy(f, size: int, path: str, dtype: str | None) -> np.ndarray:
    """Open an .npy file, format 1.0 to 3.0. numpy's own reader evaluates any header and trusts its shape."""
    begin = f.read(12)
    if begin[:4] == b"PK\3\4":
        raise UserError(f"{path} is an .npz archive; tokens must be one array in the .npy format")
    width = {1: 2, 2: 4, 3: 4}.get(begin[6] if len(begin) == 12 and begin[:6] == b"\x93NUMPY" else None)
    length = 0 if width is None else int.from_bytes(begin[8:8 + width], "little")
    if not 0 < length <= MAX_NPY_HEADER:
        raise UserError(f"{path} is not a readable .npy file (its header is malformed)")
    f.seek(8 + width)
    try:
        found, shape = _npy_header(f.read(length).decode("latin-1"))
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError, RecursionError) as e:
        raise UserError(f"{path} is not a readable .npy file ({first_line(e)})") from None
    if found not in DTYPES.values() or len(shape) != 1 or shape[0] < 1:
        raise UserError(f"{path} holds {found} of shape {shown(shape)}; tokens must be uint16 or uint32 in "
                        f"one dimension, at least one token")
    offset = 8 + width + length
    if size != offset + found.itemsize * shape[0]:
        raise UserError(f"the header of {path} says {shape[0]} tokens, and the file has "
                        f"{(size - offset) / found.itemsize:g}: it is truncated; prepare it again")
    return np.memmap(f, found, mode="r", offset=offset)


def _npy_header(text: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Return dtype and shape of an .npy header, the text of a Python dict. Raises one of several errors."""
    if len(re.findall(r"[\[({]", text)) > 20:
        raise ValueError("its header is nested too deeply")
    header = ast.literal_eval(text.strip())
    if type(header) is not dict or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header has not the entries descr, fortran_order and shape")
    descr, shape = header["descr"], header["shape"]
    if type(descr) is not str or len(descr) > 16 or np.dtype(descr).hasobject:
        raise ValueError(f"its dtype is {shown(descr)}, not that of plain numbers")
    if type(shape) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise ValueError(f"its shape is {shown(shape)}")
    return np.dtype(descr), shape


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
        meta = read_json(path)
    except FileNotFoundError:
        if os.path.exists(os.path.join(folder, "meta.pkl")):
            raise UserError(PICKLED_META.format(folder=folder)) from None
        return None
    except (OSError, ValueError) as e:
        problem = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"cannot read {path}: {problem}; prepare the data set again") from None
    check_meta(meta, path)
    return meta


def check_meta(meta, where: str) -> None:
    """Raise UserError unless a value is the contents of a meta.json. where: its source, for messages."""
    for key, kind in META.items():
        value = meta.get(key) if type(meta) is dict else None
        if type(value) is not kind and (value is not None or key in ("vocab_size", "tokenizer")):
            raise UserError(f"{where} has no usable {key!r}; prepare the data set again")
    dtype = meta.get("dtype") or "uint16"
    if dtype not in DTYPES or not 1 <= meta["vocab_size"] <= MAX_VOCAB_SIZE[dtype]:
        limits = " and ".join(f"{name} for up to {size:,} symbols" for name, size in MAX_VOCAB_SIZE.items())
        raise UserError(f"{where}: vocab_size={meta['vocab_size']}, dtype={shown(dtype)} cannot be used: "
                        f"tokens are {limits}; prepare the data set again")
    if not 0 <= (meta.get("end_of_text") or 0) < meta["vocab_size"]:
        raise UserError(f"{where}: end_of_text={meta['end_of_text']} is not a token of vocab_size="
                        f"{meta['vocab_size']}: correct it, or leave it out")
    if meta["tokenizer"] == "char" and type(meta.get("chars", "")) is not str:
        raise UserError(f"{where} has no usable 'chars'; prepare the data set again")


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
