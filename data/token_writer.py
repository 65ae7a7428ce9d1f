"""Write token files, under temporary names until all are complete, and their meta.json."""

import contextlib
import glob
import os
import shutil
import tempfile

import numpy as np

from nanosync.errors import UserError
from nanosync.files import existing_parent, made_folder, os_error_as_user_error, sha256_of, write_json
from nanosync.token_files import (
    DTYPES,
    HEADER_INTS,
    MAX_VOCAB_SIZE,
    SHARD_HEADS,
    open_tokens,
    split_files,
    usable_meta,
)


class TokenWriter:
    """A writer of one split as a flat file or as shards, under temporary names until `publish`."""

    def __init__(self, folder: str, split: str, prefix: str | None = None, shard_tokens: int | None = None,
                 dtype: str = "uint16"):
        """Write nothing yet.

        shard_tokens: most tokens a shard {prefix}_{split}_000000.bin; None for a flat {split}.bin.
        dtype: name of the tokens' dtype, see token_files.dtype_for.
        """
        self.folder, self.split, self.prefix, self.shard_tokens = folder, split, prefix, shard_tokens
        self.dtype = dtype
        self.total = 0  # tokens so far in all files
        self.finished = {}  # final path -> SHA-256 of the finished file
        self._file = self._path = None

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens. Raises UserError, as `close` does, if the disk is full or not writable."""
        if len(tokens):
            least, most = int(tokens.min()), int(tokens.max())
            assert 0 <= least <= most < MAX_VOCAB_SIZE[self.dtype], \
                f"{self.dtype} cannot hold {least} or {most}"
        tokens = np.ascontiguousarray(tokens, DTYPES[self.dtype])
        with os_error_as_user_error(f"cannot write to {self.folder}"):
            while len(tokens):
                if self._file is None:
                    self._open()
                room = len(tokens) if self.shard_tokens is None else self.shard_tokens - self._in_file
                self._file.write(tokens[:room])  # unlike tofile, its error names the cause
                self._in_file += len(tokens[:room])
                self.total += len(tokens[:room])
                tokens = tokens[room:]
                if self._in_file == self.shard_tokens:
                    self._close()

    def close(self) -> None:
        """Finish the last file; it keeps its temporary name."""
        if self._file is not None:
            with os_error_as_user_error(f"cannot write to {self.folder}"):
                self._close()

    def state(self) -> dict:
        """Flush to the disk, and return values of JSON from which `restore` continues after these tokens."""
        if self._file is not None:
            with os_error_as_user_error(f"cannot write to {self.folder}"):
                self._file.flush()
                os.fsync(self._file.fileno())
        return {"total": self.total, "unfinished": None if self._file is None else self._in_file,
                "finished": {os.path.basename(path): digest for path, digest in self.finished.items()}}

    def restore(self, state: dict) -> None:
        """Continue where another process was that left this state, and perhaps wrote more. Raises OSError if
        its files are gone or shorter."""
        self.total = state["total"]
        self.finished = {os.path.join(self.folder, name): digest
                         for name, digest in state["finished"].items()}
        for path in self.finished:
            os.stat(path + ".tmp")
        if state["unfinished"] is not None:
            self._path = self._next_path()
            self._file, self._in_file = open(self._path + ".tmp", "r+b"), state["unfinished"]
            size = self._in_file * DTYPES[self.dtype].itemsize
            size += 4 * HEADER_INTS * (self.shard_tokens is not None)
            if self._file.seek(0, os.SEEK_END) < size:
                raise OSError(f"{self._path}.tmp is shorter than it was")
            self._file.truncate(size)
            self._file.seek(size)

    def publish(self) -> None:
        """Give the files their final names."""
        for path in self.finished:
            os.replace(path + ".tmp", path)

    def discard(self) -> None:
        """Delete all files that still have temporary names."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails again
                self._file.close()
            self._file = None
        for path in {*self.finished, self._path} - {None}:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")

    def earlier_shards(self) -> set[str]:
        """Return the names of the shards that this or an earlier run wrote in the folder, finished or not."""
        if self.shard_tokens is None:
            return set()
        stem = os.path.join(glob.escape(self.folder), f"{self.prefix}_{self.split}_" + "[0-9]" * 6)
        return {os.path.basename(path) for end in (".bin", ".bin.tmp") for path in glob.glob(stem + end)}

    def _next_path(self) -> str:
        name = f"{self.split}.bin" if self.shard_tokens is None else \
            f"{self.prefix}_{self.split}_{len(self.finished):06d}.bin"
        return os.path.join(self.folder, name)

    def _open(self):
        self._path = self._next_path()
        self._file = open(self._path + ".tmp", "wb")
        self._in_file = 0
        if self.shard_tokens is not None:
            self._file.write(np.zeros(HEADER_INTS, "<i4"))  # filled in when the count is known

    def _close(self):
        if self.shard_tokens is not None:
            self._file.seek(0)
            self._file.write(np.array([*SHARD_HEADS[self.dtype], self._in_file], "<i4"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.finished[self._path] = sha256_of(self._path + ".tmp")


@contextlib.contextmanager
def dataset_writers(folder: str, prefix: str | None = None, shard_tokens: int | None = None,
                    dtype: str = "uint16"):
    """Make a folder and the TokenWriters of train and val. Unpublished files are deleted at the end, after a
    failure or an interruption too.
    """
    with made_folder(folder):
        writers = [TokenWriter(folder, split, prefix, shard_tokens, dtype) for split in ("train", "val")]
        try:
            yield writers
        finally:
            for writer in writers:
                writer.discard()


def check_out(folder: str, name: str, tokenizer: str, kind: str) -> None:
    """Raise UserError unless data set `name`, in this tokenizer's tokens and format `kind`, can be written to
    --out=folder and no other data set in the folder would be read in its place. Call it before any work.
    """
    parent = existing_parent(folder)
    if not folder or not os.path.isdir(parent):
        raise UserError(f"--out={folder}: {parent if folder else 'the empty name'} is not a folder")
    with os_error_as_user_error(f"--out={folder}: cannot write to {parent}"):
        tempfile.TemporaryFile(dir=parent).close()
    advice = "choose another folder with --out, or delete what is there"
    meta = usable_meta(folder)
    if meta is not None:
        found = (meta.get("name", name), meta["tokenizer"], meta.get("format"))
        if found != (name, tokenizer, kind):
            raise UserError(f"{folder} holds another data set, {found[0]} in {found[1]} tokens (format "
                            f"{found[2]}): {advice}")
    elif not {"meta.json", ".prepare"} & set(os.listdir(parent) if parent == os.path.abspath(folder) else ()):
        written = ["train.idx", "val.idx", "report.json"] + ["train.bin", "val.bin"] * (kind == "bin")
        for path in (os.path.join(folder, file) for file in written):
            if os.path.lexists(path):  # of nanoGPT, or of the user
                raise UserError(f"{path} would be overwritten, and no meta.json says that a prepare.py wrote "
                                f"it: {advice}")
    if kind == "shards":  # the reader takes all shards of a folder, and prefers a flat file to them
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


def publish_dataset(folder: str, meta: dict, train: TokenWriter, val: TokenWriter,
                    others: dict[str, str] | None = None) -> None:
    """Write meta.json first, then give the token files their names: after a kill in between, the folder is
    recognised as unfinished.

    Delete the files of an earlier data set that the new one does not replace, also those that a killed run
    left.

    others: further files of the data set, by name, with temporary names so far, and their SHA-256.
    """
    train.close()
    val.close()
    old_files = (usable_meta(folder) or {}).get("sha256")
    old_files = {name for name in old_files if name == os.path.basename(name)
                 and name.endswith((".bin", ".idx"))} if isinstance(old_files, dict) else set()
    meta = {"format": "bin" if train.shard_tokens is None else "shards", **meta, "dtype": train.dtype,
            "train_tokens": train.total, "val_tokens": val.total,
            "sha256": {os.path.basename(p): d for w in (train, val) for p, d in w.finished.items()}
            | (others or {})}
    write_json(os.path.join(folder, "meta.json"), meta)
    val.publish()
    train.publish()
    for name in others or {}:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    for name in (old_files | train.earlier_shards() | val.earlier_shards()) - set(meta["sha256"]):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    print(f"{folder}: train has {train.total:,} tokens, val has {val.total:,} tokens, "
          f"vocabulary {meta['vocab_size']:,}")


def is_published(folder: str, **expected) -> bool:
    """Return True if the folder holds a complete data set with these values in its meta.json."""
    meta = usable_meta(folder)
    if meta is None or any(meta.get(key) != value for key, value in expected.items()):
        return False
    counts = {}
    for split in ("train", "val"):
        try:
            kind, paths = split_files(folder, split)
            counts[split] = sum(len(open_tokens(path, kind, meta.get("dtype"))) for path in paths)
        except UserError:
            return False
    return counts == {"train": meta.get("train_tokens"), "val": meta.get("val_tokens")}
