"""Token files: the three formats that can be read, the two that are written, and the meta.json beside them.

    bin     train.bin, val.bin            flat little-endian uint16, as nanoGPT's
    shards  *_train_*.bin, *_val_*.bin    header of 256 int32 (20240520, 1, token count, zeros), then uint16,
                                          as the cached FineWeb shards of modded-nanogpt
    npy     *_train_*.npy, *_val_*.npy    one-dimensional uint16 arrays, as build-nanogpt's

meta.json: name, format, tokenizer, vocab_size, chars (of a char tokenizer), dtype, train_tokens, val_tokens,
sha256 (file name to digest), source. Only numpy is imported here, so preparing data does not load PyTorch.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile

import numpy as np

from configurator import UserError, install_error_hook

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
TOKEN_DTYPE = np.dtype("<u2")
REQUIRED_META = {"vocab_size": int, "tokenizer": str}
MAX_VOCAB_SIZE = 1 << 16
PICKLED_META = (  # nanoGPT's data sets by character have one, those in GPT-2's tokens none
    "{folder} has its vocabulary in meta.pkl, a pickle, which can run code and is never loaded: run a "
    "prepare.py of data/ with --out={folder}, or write {folder}/meta.json, with all characters in the "
    'order of their ids: {{"tokenizer": "char", "vocab_size": 3, "chars": "abc"}}')


def split_files(folder: str, split: str) -> tuple[str, list[str]]:
    """The format ('bin', 'shards', 'npy') and sorted files of 'train' or 'val'. Raises UserError."""
    flat = os.path.join(folder, f"{split}.bin")
    if os.path.isfile(flat):
        return "bin", [flat]
    for ending, name in (("bin", "shards"), ("npy", "npy")):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.{ending}")))
        if paths:
            return name, paths
    script = os.path.join(folder, "prepare.py")
    if os.path.basename(folder) == "fineweb10B":
        script = os.path.join(os.path.dirname(folder), "cached_fineweb10B.py")
    hint = f": run python {script}" if os.path.isfile(script) else ""
    raise UserError(f"data set {folder} has no {split} tokens ({split}.bin, *_{split}_*.bin or "
                    f"*_{split}_*.npy){hint}")


def open_tokens(path: str, kind: str) -> np.ndarray:
    """The tokens of one file as a read-only memory map of uint16. Raises UserError if it is malformed."""
    with os_error_as_user_error(f"cannot read {path}"):
        return {"bin": _open_flat, "shards": _open_shard, "npy": _open_npy}[kind](path)


def _open_flat(path: str) -> np.ndarray:
    size = os.path.getsize(path)
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, which is no number of uint16 tokens: it is truncated; "
                        f"prepare the data set again")
    return np.memmap(path, TOKEN_DTYPE, mode="r")


def _open_shard(path: str) -> np.ndarray:
    size, offset = os.path.getsize(path), 4 * HEADER_INTS
    header = np.fromfile(path, "<i4", count=3)
    if size < offset or header[0] != SHARD_MAGIC:
        first = header[0] if len(header) else "missing"
        raise UserError(f"{path} is no token shard: its first number is {first}, not {SHARD_MAGIC}")
    if header[1] != SHARD_VERSION:
        raise UserError(f"{path} is a token shard of version {header[1]}; known is version {SHARD_VERSION}")
    if size != offset + 2 * int(header[2]) or header[2] < 1:
        raise UserError(f"{path} says {header[2]} tokens and has {(size - offset) / 2:g}: it is truncated; "
                        f"get or prepare it again")
    return np.memmap(path, TOKEN_DTYPE, mode="r", offset=offset)


def _open_npy(path: str) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise UserError(f"{path} is not a readable .npy file ({first_line(e)})") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} is an .npz archive; tokens are one array in the .npy format")
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1 or len(tokens) == 0:
        raise UserError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; tokens are uint16 in one "
                        f"dimension, at least one")
    return tokens


def read_meta(folder: str) -> dict | None:
    """meta.json as a dict, None if there is none. Raises UserError if it cannot be used, or if what it would
    say is in a pickle.
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
    """meta.json for those who prepare a data set: one that cannot be used is as good as none."""
    try:
        return read_meta(folder)
    except UserError:
        return None


def check_counts(folder: str, meta: dict | None, split: str, n_tokens: int) -> None:
    """Raise UserError if meta.json, where it counts tokens at all, counts others than the files have."""
    said = (meta or {}).get(f"{split}_tokens")
    if said not in (None, n_tokens):
        raise UserError(f"{folder}/meta.json says {said!r} {split} tokens and the files have {n_tokens}: "
                        f"they are unfinished or an earlier data set's are among them; prepare the data set "
                        f"again")


@contextlib.contextmanager
def os_error_as_user_error(what: str):
    """Of files the user chose: an OSError becomes a UserError "what: reason"."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class TokenWriter:
    """Writes the tokens of one split as a flat file or as shards, under temporary names until `publish`."""

    def __init__(self, folder: str, split: str, prefix: str | None = None, shard_tokens: int | None = None):
        """A flat {split}.bin; with `shard_tokens`, files {prefix}_{split}_000000.bin of at most so many."""
        self.folder, self.split, self.prefix, self.shard_tokens = folder, split, prefix, shard_tokens
        self.total = 0  # tokens so far, in all files
        self.finished = {}  # final path -> SHA-256 of the finished file
        self._file = self._path = None

    def write(self, tokens: np.ndarray) -> None:
        """Raises UserError, here and in close, if the disk is full or will not have it."""
        tokens = np.ascontiguousarray(tokens, TOKEN_DTYPE)
        with os_error_as_user_error(f"cannot write to {self.folder}"):
            while len(tokens):
                if self._file is None:
                    self._open()
                room = len(tokens) if self.shard_tokens is None else self.shard_tokens - self._in_file
                self._file.write(tokens[:room])  # unlike tofile, it says why it fails
                self._in_file += len(tokens[:room])
                self.total += len(tokens[:room])
                tokens = tokens[room:]
                if self._in_file == self.shard_tokens:
                    self._close()

    def close(self) -> None:
        """Finish the last file, under its temporary name still."""
        if self._file is not None:
            with os_error_as_user_error(f"cannot write to {self.folder}"):
                self._close()

    def publish(self) -> None:
        """Give the files their final names."""
        for path in self.finished:
            os.replace(path + ".tmp", path)

    def discard(self) -> None:
        """Delete what is there under temporary names still."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, again
                self._file.close()
            self._file = None
        for path in {*self.finished, self._path} - {None}:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")

    def earlier_shards(self) -> set[str]:
        """Names of the shards in the folder that this or an earlier run wrote, finished or not."""
        if self.shard_tokens is None:
            return set()
        stem = os.path.join(glob.escape(self.folder), f"{self.prefix}_{self.split}_" + "[0-9]" * 6)
        return {os.path.basename(path) for end in (".bin", ".bin.tmp") for path in glob.glob(stem + end)}

    def _open(self):
        name = f"{self.split}.bin" if self.shard_tokens is None else \
            f"{self.prefix}_{self.split}_{len(self.finished):06d}.bin"
        self._path = os.path.join(self.folder, name)
        self._file = open(self._path + ".tmp", "wb")
        self._in_file = 0
        if self.shard_tokens is not None:
            self._file.write(np.zeros(HEADER_INTS, "<i4"))  # filled in when the count is known

    def _close(self):
        if self.shard_tokens is not None:
            self._file.seek(0)
            self._file.write(np.array([SHARD_MAGIC, SHARD_VERSION, self._in_file], "<i4"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.finished[self._path] = sha256_of(self._path + ".tmp")


@contextlib.contextmanager
def dataset_writers(folder: str, prefix: str | None = None, shard_tokens: int | None = None):
    """TokenWriters of train and val in a folder that is made for them. What they have not published by the
    end, because it failed, was interrupted or is not wanted, is deleted.
    """
    with made_folder(folder):
        writers = [TokenWriter(folder, split, prefix, shard_tokens) for split in ("train", "val")]
        try:
            yield writers
        finally:
            for writer in writers:
                writer.discard()


@contextlib.contextmanager
def made_folder(folder: str):
    """Make a folder and its parents; if the body fails, remove those again that are new and still empty."""
    new, path = [], os.path.abspath(folder)
    while path != existing_parent(folder):
        new.append(path)
        path = os.path.dirname(path)
    try:
        with os_error_as_user_error(f"cannot make {folder}"):
            os.makedirs(folder, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in new:
                os.rmdir(path)
        raise


def existing_parent(folder: str) -> str:
    """The folder, or what is the nearest of its parents that exists."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def check_out(folder: str, name: str, tokenizer: str, kind: str) -> None:
    """Raise UserError unless data set `name`, in this tokenizer's tokens and format `kind`, can be written to
    --out=folder and would be what is read from there. To be called before any work.
    """
    parent = existing_parent(folder)
    if not folder or not os.path.isdir(parent):
        raise UserError(f"--out={folder}: {parent if folder else 'the empty name'} is not a folder")
    with os_error_as_user_error(f"--out={folder}: cannot write to {parent}"):
        tempfile.TemporaryFile(dir=parent).close()
    advice = "choose another folder with --out, or delete what is there"
    there = usable_meta(folder)
    if there is not None:
        holds = (there.get("name", name), there["tokenizer"], there.get("format"))
        if holds != (name, tokenizer, kind):
            raise UserError(f"{folder} holds another data set, {holds[0]} in {holds[1]} tokens (format "
                            f"{holds[2]}): {advice}")
    if kind == "shards":  # which are read with all other shards, and not at all beside a flat file
        for split in ("train", "val"):
            others = glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin"))
            others = [path for path in others if not os.path.basename(path).startswith(f"{name}_{split}_")]
            others += glob.glob(os.path.join(glob.escape(folder), f"{split}.bin"))
            if others:
                raise UserError(f"{others[0]} would be read with the new shards or in their place: {advice}")


def check_space(folder: str, needed: float, advice: str = "") -> None:
    """Raise UserError if the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free:
        raise UserError(f"{folder} needs about {needed / 1e6:,.0f} MB and has {free / 1e6:,.0f} MB free: "
                        f"{advice}choose another folder with --out")


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def publish_dataset(folder: str, meta: dict, train: TokenWriter, val: TokenWriter) -> None:
    """Name meta.json first, then the token files it counts: a folder cut off in between is seen to be
    unfinished.

    Files of an earlier data set here that the new one has no use for are deleted, also those that a run
    which was killed before it came to that has left.
    """
    train.close()
    val.close()
    old_files = (usable_meta(folder) or {}).get("sha256")
    old_files = {name for name in old_files if name == os.path.basename(name) and name.endswith(".bin")} \
        if isinstance(old_files, dict) else set()
    meta = {"format": "bin" if train.shard_tokens is None else "shards", **meta, "dtype": "uint16",
            "train_tokens": train.total, "val_tokens": val.total,
            "sha256": {os.path.basename(p): d for w in (train, val) for p, d in w.finished.items()}}
    write_json(os.path.join(folder, "meta.json"), meta)
    val.publish()
    train.publish()
    for name in (old_files | train.earlier_shards() | val.earlier_shards()) - set(meta["sha256"]):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    print(f"{folder}: train has {train.total:,} tokens, val has {val.total:,} tokens, "
          f"vocabulary {meta['vocab_size']:,}")


def is_published(folder: str, **expected) -> bool:
    """Whether the folder holds a whole data set made with these values in its meta.json."""
    meta = usable_meta(folder)
    if meta is None or any(meta.get(key) != value for key, value in expected.items()):
        return False
    counts = {}
    for split in ("train", "val"):
        try:
            kind, paths = split_files(folder, split)
            counts[split] = sum(len(open_tokens(path, kind)) for path in paths)
        except UserError:
            return False
    return counts == {"train": meta.get("train_tokens"), "val": meta.get("val_tokens")}


def unused_path(stem: str, ending: str = "") -> str:
    """stem + ending, or, if that exists, stem_1 + ending and so on."""
    path, n = stem + ending, 0
    while os.path.exists(path):
        n += 1
        path = f"{stem}_{n}{ending}"
    return path


def json_text(value) -> str:
    """A value as write_json writes it, to the byte."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: str, value) -> None:
    replace_file(path, json_text(value).encode())


def replace_file(path: str, content: bytes) -> None:
    """Write a file anew, whole or not at all. Raises OSError."""
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # which may be a link to elsewhere
    try:
        with open(temporary, "xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def fetch(url: str, otherwise: str) -> bytes:
    """What is at a URL. Raises UserError; otherwise: what to do without a network."""
    import requests

    try:
        response = requests.get(url, timeout=60)
        response.raise_for_status()
    except requests.RequestException as e:
        raise UserError(f"could not download {url} ({type(e).__name__}): without a network, "
                        f"{otherwise}") from None
    return response.content


class Parser(argparse.ArgumentParser):
    """Arguments of a prepare.py: `--help` as usual, an error as one line with exit code 2, and Ctrl-C as one
    with 130.
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        install_error_hook()
        install_interrupt_hook()

    def parse_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            if not is_utf8(arg):  # it could be neither printed nor written to meta.json
                self.error(f"argument {arg!r} is not valid UTF-8")
        return super().parse_args(args, namespace)

    def error(self, message):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def is_utf8(text: str) -> bool:
    """False for a file name or argument with bytes that are not, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def install_interrupt_hook() -> None:
    """End the process on Ctrl-C with one line and exit code 130, once all that was to be tidied up is."""
    previous, process = sys.excepthook, os.getpid()

    def hook(kind, error, traceback):
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__  # `datasets` fails with a timeout while it handles the interruption
        if cause is None:
            return previous(kind, error, traceback)
        sys.stdout.flush()
        os.write(2, b"interrupted\n")
        os._exit(130)  # as a shell says of Ctrl-C; threads of libraries must not hold the exit back

    def on_interrupt(signum, frame):
        if os.getpid() == process:  # forked workers get the signal as well and would each print a traceback;
            raise KeyboardInterrupt  # the process that forked them ends them

    sys.excepthook = hook
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a background job
        signal.signal(signal.SIGINT, on_interrupt)
