"""Batches from token files, in an order that is a pure function of (seed, epoch, global sample number).

A sample is a window of block_size + 1 tokens. The inputs are all tokens but the last, the targets all but the
first. Samples are numbered from the start of the run, over all DDP ranks. Each DDP rank takes its slice of a
global batch. So the sequence of global batches is the same for any number of DDP ranks, the state of the
loader is one integer, and resuming is exact.

An epoch is a grid of adjacent windows, each served once. In a flat file (`bin`) every epoch has its own grid
offset and its own random order. Shards are read in the order of the files in epoch 0. In every later epoch
the shards, and the windows inside each shard, have a new order. Evaluation has one grid, which begins at the
first token of each file. nanosync.packing has another way to cut a split: packed documents.

B = sequences of a micro-batch, T = block_size.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import record_function

from nanosync import tokenizers
from nanosync.bits_per_byte import bits_per_byte, stated_bytes_per_token
from nanosync.distributed import all_reduce_sum
from nanosync.errors import UserError
from nanosync.files import ROOT, dataset_folder
from nanosync.step_profile import WAIT
from nanosync.token_files import (
    FORMATS,
    PYTHON_SOURCE_GPT2,
    check_counts,
    open_tokens,
    read_meta,
    split_files,
)

CHECK_TOKENS = 500_000_000  # tokens of a split, evenly spread, that are compared with the vocabulary


class Split:
    """A split of a data set: its token files and the windows in them.

    A derived class cuts the files in another way: it overrides count, order, gather and hide_context.
    """

    shortest: int | None = None  # tokens of a file that has a window; None: T + 1

    def __init__(self, folder: str, split: str, block_size: int, length_key: str = "block_size",
                 dtype: str | None = None, end_of_text: int | None = None):
        """Open and check the files. Raises UserError.

        split: 'train' or 'val'.
        block_size: T, tokens.
        length_key: name of the script's setting for block_size, for error messages.
        dtype: `dtype` of the folder's meta.json, None if it has none.
        end_of_text: token with which documents begin, None if there is none.
        """
        self.name, self.block_size, self.end_of_text = split, block_size, end_of_text
        self.kind, self.paths = split_files(folder, split)
        self.files = [open_tokens(path, self.kind, dtype) for path in self.paths]
        self.dtype = max((f.dtype for f in self.files), key=lambda dtype: dtype.itemsize)
        T = block_size
        self.eval_windows = [(len(f) - 1) // T for f in self.files]  # all that fit
        self.windows = [self.count(len(f)) for f in self.files]
        if sum(self.windows) == 0:
            lower = f"lower {length_key} or " if self.shortest is None else ""
            raise UserError(f"{length_key}={T} needs {self.shortest or T + 1} tokens and the {split} files "
                            f"of {folder} have at most {max(map(len, self.files))}: {lower}prepare more data")

    def count(self, n_tokens: int) -> int:
        """Return the number of training windows of a file.

        It leaves room for any grid offset below T. A file that has a window has at least one.
        """
        T = self.block_size
        return max((n_tokens - T) // T, min((n_tokens - 1) // T, 1))

    def order(self, seed: int) -> "WindowOrder":
        """Make the order in which training reads the split."""
        return WindowOrder(self, seed)

    @property
    def n_windows(self) -> int:
        """Number of windows in an epoch of training."""
        return sum(self.windows)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.files))

    def check_tokens(self, vocab_size: int) -> None:
        """Raise UserError if one of up to CHECK_TOKENS tokens is not below vocab_size."""
        for path, start, part in self._pieces():
            if part.max() >= vocab_size:
                at = int((part >= vocab_size).argmax())
                raise UserError(f"{path} has token {part[at]} at position {start + at}, but the vocabulary "
                                f"has {vocab_size}: the file was prepared with another tokenizer")

    def has(self, token: int) -> bool:
        """Return True if one of up to CHECK_TOKENS tokens is `token`."""
        return any((part == token).any() for _, _, part in self._pieces())

    def _pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (path, first position, tokens) of pieces with up to CHECK_TOKENS tokens, evenly spread."""
        share, piece = min(1.0, CHECK_TOKENS / self.n_tokens), 1 << 20
        for path, tokens in zip(self.paths, self.files):
            for start in range(0, len(tokens), int(piece / share)):
                yield path, start, tokens[start:start + piece]

    def gather(self, places: np.ndarray) -> np.ndarray:
        """Read windows: places (n, 2) of (file, start) -> tokens (n, T + 1), uint16 or uint32."""
        out = np.empty((len(places), self.block_size + 1), self.dtype)
        for row, (file, start) in zip(out, places):
            row[:] = self.files[file][start:start + self.block_size + 1]
        return out

    def hide_context(self, targets: torch.Tensor, places: np.ndarray) -> None:
        """Set targets (n, T) that do not count to -1. places: places of the order."""


class WindowOrder:
    """Order of the windows: a pure function of (seed, epoch, number in the epoch)."""

    columns = 2  # numbers that describe a place

    def __init__(self, split: Split, seed: int):
        self.split, self.seed = split, seed
        self._epoch = -1

    def places(self, first: int, count: int) -> np.ndarray:
        """Return (file, start) of the windows of the run's samples first to first + count - 1:
        (count, columns)."""
        samples = np.arange(first, first + count)
        epochs, numbers = np.divmod(samples, self.split.n_windows)
        places = np.empty((count, self.columns), np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            places[of_epoch] = self._in_epoch(int(epoch), numbers[of_epoch])
        return places

    def shard_order(self, epoch: int) -> np.ndarray:
        """Return the numbers of the files in the order in which an epoch reads them."""
        files = np.arange(len(self.split.files))
        return files if epoch == 0 else self._random(epoch).permutation(files)

    def _in_epoch(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._files, self._starts = epoch, self.shard_order(epoch), {}
            self._ends = np.cumsum(np.array(self.split.windows)[self._files])
        turns = np.searchsorted(self._ends, numbers, side="right")
        places = np.empty((len(numbers), self.columns), np.int64)
        for turn in np.unique(turns):
            of_turn, file = turns == turn, self._files[turn]
            inside = numbers[of_turn] - (self._ends[turn] - self.split.windows[file])
            places[of_turn, 0] = file
            places[of_turn, 1:] = self._inside(epoch, file, inside)
        return places

    def _inside(self, epoch: int, file: int, numbers: np.ndarray) -> np.ndarray:
        """Return places without the file, (n, columns - 1). numbers: of an epoch's windows of the file."""
        return self._file_starts(epoch, file)[numbers, None]

    def _file_starts(self, epoch: int, file: int) -> np.ndarray:
        """Return the starts of a file's windows in the order in which an epoch reads them."""
        if file not in self._starts:
            T, n = self.split.block_size, self.split.windows[file]
            starts = np.arange(n, dtype=np.int64) * T
            if not FORMATS[self.split.kind].ordered or epoch > 0:
                random = self._random(epoch, 1 + file)
                slack = min(T, len(self.split.files[file]) - n * T)
                starts = random.permutation(starts) + random.randint(slack)
            self._starts = {file: starts}  # keep only the file in use
        return self._starts[file]

    def _random(self, *key: int) -> np.random.RandomState:
        """Make a generator. The numbers of a RandomState are the same in all versions of numpy."""
        return np.random.RandomState([self.seed % 2**32, *key])


@dataclass(frozen=True)
class DataSet:
    """A data set: its folder, the contents of its meta.json, and its two splits."""

    folder: str
    meta: dict | None  # None if the folder has no meta.json
    train: Split
    val: Split
    bytes_per_token: float | None = None  # of the val split, None if meta.json does not have it

    def bits_per_byte(self, val_loss: float) -> float | None:
        """Convert a loss of the val split, nats per token; None if bytes_per_token is unknown."""
        return None if self.bytes_per_token is None else bits_per_byte(val_loss, self.bytes_per_token)

    def check_tokens(self, vocab_size: int) -> None:
        """Raise UserError if a token of either split is not below vocab_size, see Split.check_tokens."""
        for split in (self.train, self.val):
            split.check_tokens(vocab_size)

    def document_token(self) -> int:
        """Return the token with which documents begin. Raises UserError if the train split has none."""
        token, fix = self.train.end_of_text, "leave document_mask out"
        if token is None:
            raise UserError(f"document_mask needs an end-of-text token, and {self.folder} has none: {fix}, "
                            f"or write the token's id into its meta.json as end_of_text")
        if not self.train.has(token):
            raise UserError(f"document_mask: the train tokens of {self.folder} have no end-of-text token "
                            f"({token}), so they are one document: {fix}, or use another data set")
        return token

    @property
    def fingerprint(self) -> dict:
        """Token counts and digests, from which a resumed run sees that the data set is the same."""
        digests = (self.meta or {}).get("sha256")
        return {"train_tokens": self.train.n_tokens, "val_tokens": self.val.n_tokens, "sha256": digests}


def open_dataset(name: str, block_size: int, length_key: str = "block_size",
                 train_split: type[Split] = Split) -> DataSet:
    """Open the data set data/<name>, or the folder `name` if it is a path. Raises UserError.

    block_size, length_key: see Split.
    train_split: Split, or packing.PackedSplit for packed documents.
    """
    if not name:
        raise UserError("dataset='' names no data set: name a folder in data/, or a path, with --dataset=...")
    folder = dataset_folder(name)
    if not os.path.isdir(folder):
        there = sorted(d.name for d in os.scandir(os.path.join(ROOT, "data")) if d.is_dir())
        hint = "in data/: " + ", ".join(name for name in there if name[0] not in "._")
        script = os.path.join("data", f"cached_{os.path.basename(folder)}.py")
        if os.path.exists(os.path.join(ROOT, script)):
            hint = f"run python {script}"
        elif os.path.basename(folder) == "python_source_gpt2":
            hint = f"run {PYTHON_SOURCE_GPT2} --format=shards"
        raise UserError(f"no data set {name!r}: there is no folder {folder} ({hint})")
    meta = read_meta(folder)
    dtype = (meta or {}).get("dtype")
    train, val = (cut(folder, split, block_size, length_key, dtype, tokenizers.end_of_text(meta))
                  for cut, split in ((train_split, "train"), (Split, "val")))
    for split in (train, val):
        check_counts(folder, meta, split.name, split.n_tokens)
    return DataSet(folder, meta, train, val, stated_bytes_per_token(meta, folder))


def epoch_messages(split: Split, before: int, now: int) -> list[str]:
    """Return the lines to print when the epoch changes from `before` to `now`."""
    messages = []
    for epoch in range(before, now):
        messages.append(f"Completed epoch {epoch}")
        if FORMATS[split.kind].ordered:
            messages.append(f"Shuffled {len(split.files)} training shards for epoch {epoch + 1}")
        messages.append(f"Starting epoch {epoch + 1}")
    return messages


class DataLoader:
    """Loader of the train split's micro-batches, which a background thread reads ahead."""

    def __init__(self, split: Split, batch_size: int, accumulation_steps: int, vocab_size: int, seed: int,
                 device: torch.device, rank: int = 0, world_size: int = 1, sample: int = 0,
                 prefetch: int = 4):
        """Start the background thread.

        A global batch has batch_size * accumulation_steps * world_size samples.

        batch_size: B, sequences.
        accumulation_steps: micro-batches of a DDP rank in a global batch.
        rank, world_size: DDP rank of this process, and number of DDP ranks.
        sample: number of the first sample, the `sample` of a checkpoint for a resumed run.
        prefetch: micro-batches that are read ahead.
        """
        self.split, self.device, self.batch_size, self.vocab_size = split, device, batch_size, vocab_size
        self.order = split.order(seed)
        self.rank_samples = batch_size * accumulation_steps
        self.global_samples = self.rank_samples * world_size
        self.rank = rank
        self.sample = sample  # samples served so far, over all DDP ranks, in whole global batches
        self._steps, self._step = accumulation_steps, 0
        self._ready = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dataloader", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        return self.sample // self.split.n_windows

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next micro-batch of this DDP rank: inputs and targets, (B, T) int64, on the device.

        Targets that do not count are -1.
        """
        with record_function(WAIT):
            batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        self._step += 1
        if self._step == self._steps:
            self._step = 0
            self.sample += self.global_samples
        return tuple(t.to(self.device, non_blocking=True) for t in batch)

    def close(self) -> None:
        """Stop the background thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()  # the thread may wait for room in the queue
            except queue.Empty:
                pass
            self._thread.join(timeout=0.05)

    def _work(self) -> None:
        sample = self.sample
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread's current device is GPU 0
            while not self._stop.is_set():
                first = sample + self.rank * self.rank_samples
                for start in range(first, first + self.rank_samples, self.batch_size):
                    self._put(self._batch(start))
                sample += self.global_samples
        except Exception as e:  # `next` raises it
            self._put(e)

    def _put(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _batch(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.order.places(start, self.batch_size)
        windows = self.split.gather(places)
        if windows.max() >= self.vocab_size:
            row, column = np.argwhere(windows >= self.vocab_size)[0]
            path = self.split.paths[places[row, 0]]
            raise UserError(f"{path} has token {windows[row, column]} at position {places[row, 1] + column}, "
                            f"but the vocabulary has {self.vocab_size}: the file was prepared with another "
                            f"tokenizer")
        x, y = to_tensors(windows, self.device)
        self.split.hide_context(y, places)
        return x, y


def to_tensors(windows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Split windows (n, T + 1) into inputs and targets (n, T) int64, in pinned memory if device is a GPU."""
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (windows[:, :-1], windows[:, 1:]))
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)


def evaluation_batches(split: Split, n_windows: int, batch_size: int, device: torch.device, rank: int = 0,
                       world_size: int = 1, spread: bool = True
                       ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this DDP rank's share of fixed windows as batches of inputs and targets, (B, T) int64 each.

    The windows are the same for any number of DDP ranks. Every DDP rank gets the same number of batches. Rows
    that only fill up a batch have targets -1.

    n_windows: number of windows over all DDP ranks, at most those that the split has.
    batch_size: B, sequences.
    rank, world_size: DDP rank of this process, and number of DDP ranks.
    spread: True for windows spread evenly over the split, False for the first windows.
    """
    total = sum(split.eval_windows)
    assert total, f"no {split.name} file has a window of {split.block_size + 1} tokens"
    n = min(n_windows, total)
    numbers = np.arange(n) * total // n if spread else np.arange(n)
    ends = np.cumsum(split.eval_windows)
    files = np.searchsorted(ends, numbers, side="right")
    starts = (numbers - (ends - split.eval_windows)[files]) * split.block_size
    places = np.stack((files, starts), axis=1)
    per_rank = -(-n // world_size)
    mine = places[rank * per_rank:(rank + 1) * per_rank]
    for start in range(0, per_rank, batch_size):
        windows = split.gather(mine[start:start + batch_size])
        padding = batch_size - len(windows)
        x, y = to_tensors(np.pad(windows, ((0, padding), (0, 0))), device)
        y[len(windows):] = -1
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(model, batches, group=None, stop: Callable[[], bool] | None = None) -> float | None:
    """Return the mean loss over all targets of all batches of all processes of the group, None if stop()
    returned True.

    model: function (x, y) -> (anything, mean loss). batches: this process's share, see evaluation_batches.
    stop: function that all processes call after every batch, with the same result.
    """
    total = 0.0
    for x, y in batches:
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no fp64
        count = (y != -1).sum().to(exact)
        _, loss = model(x, y)
        total = total + torch.stack((torch.where(count > 0, loss.to(exact) * count, 0.0), count))
        if stop is not None and stop():
            return None
    loss_sum, count = all_reduce_sum(total, group).tolist()
    return loss_sum / count
