"""A report on a corpus: duplicates, and how much of val is in train, exactly or by 13-grams of words.

Hashes of documents and of val's n-grams stand for the texts. Documents are compared in parts by the leading
bits of their hashes, so memory does not grow with the corpus.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from data.corpus_documents import is_taken, key_of, read_job, split_of
from data.corpus_encoding import CONTINUED, DOCUMENT, REPEATED, VAL, _settings
from data.ngrams import N, hashes_of_ngrams

MAX_NGRAMS = 1_000_000  # n-grams of val that are looked for in train
ROWS = 1 << 20  # documents in memory at a time
WORST = 10  # documents of val that the report names
LEAKED = 0.5  # share of a document's n-grams

_table: dict = {}  # of this worker: the n-grams to look for


def count_copies(path: str, field: str, rows: int = ROWS) -> dict:
    """Count the documents of which an earlier one has the same hash, from a file of DOCUMENT.

    field: 'exact' or 'key'. Returns the numbers in train, in val, and of documents of val that train has.
    """
    total = os.path.getsize(path) // DOCUMENT.itemsize
    counts = {"train": 0, "val": 0, "val_in_train": 0}
    bits = max(0, (2 * total // rows).bit_length())
    for leading in range(1 << bits):
        found = {False: [], True: []}
        for documents in read_documents(path, rows):
            documents = documents[documents["flags"] & (CONTINUED | REPEATED) == 0]
            if bits:
                documents = documents[documents[field] >> np.uint64(64 - bits) == leading]
            for val in (False, True):
                found[val].append(documents[field][(documents["flags"] & VAL > 0) == val])
        train, val = (np.concatenate([np.zeros(0, np.uint64), *found[split]]) for split in (False, True))
        counts["val_in_train"] += int(np.isin(val, train).sum())
        counts["train"] += len(train) - len(sorted_unique(train))
        counts["val"] += len(val) - len(sorted_unique(val))
    return counts


def sorted_unique(values: np.ndarray) -> np.ndarray:
    """Return the values in order, each once; with less memory than np.unique needs."""
    values = np.sort(values)
    return values[np.concatenate(([True], values[1:] != values[:-1]))[:len(values)]]


def read_documents(path: str, rows: int = ROWS) -> Iterator[np.ndarray]:
    """Yield the entries of a file of DOCUMENT, `rows` at a time."""
    with open(path, "rb") as f:
        while content := f.read(rows * DOCUMENT.itemsize):
            yield np.frombuffer(content, DOCUMENT)


def found_in_train(job) -> np.ndarray:
    """Return the places, in the worker's table of n-grams, of those that train documents of a job have."""
    if not _table:
        ngrams = np.load(_settings["ngrams"], mmap_mode="r")
        leading = np.zeros(1 << 24, bool)  # rules out most n-grams without a search
        leading[ngrams >> np.uint64(40)] = True
        _table.update(ngrams=ngrams, leading=leading)
    texts = []
    for document in read_job(job):
        text = document.text or ""
        key = key_of(text)
        split = split_of(job, key, _settings["val_share"])
        if split == "train" and is_taken(job, key, split):
            texts.append(text.encode())
    hashes, _ = hashes_of_ngrams(texts)
    hashes = hashes[_table["leading"][hashes >> np.uint64(40)]]
    places = np.searchsorted(_table["ngrams"], hashes)
    places[places == len(_table["ngrams"])] = 0
    return places[_table["ngrams"][places] == hashes]


def overlap(ngrams: np.ndarray, counts: np.ndarray, unique: np.ndarray, results: Iterable) -> dict:
    """Return the report on n-grams.

    ngrams: hashes of val's n-grams, document by document. counts: their number a document.
    unique: the sorted hashes in which `found_in_train` looked. results: (job, its result) of all jobs.
    """
    found = np.zeros(len(unique), bool)
    for _, places in results:
        found[places] = True
    hits = found[np.searchsorted(unique, ngrams)] if len(unique) else np.zeros(0, bool)
    ends = np.cumsum(counts)
    sums = np.concatenate(([0], np.cumsum(hits)))
    shares = (sums[ends] - sums[ends - counts])[counts > 0] / counts[counts > 0]
    numbers = np.flatnonzero(counts > 0)
    worst = sorted(zip(-shares, numbers))[:WORST]
    return {"n": N, "ngrams": len(ngrams), "documents": int((counts > 0).sum()),
            "share_of_ngrams": float(hits.mean()) if len(hits) else 0.0,
            "documents_with_any": int((shares > 0).sum()),
            "documents_with_half": int((shares >= LEAKED).sum()),
            "worst": [{"document": int(n), "share": round(float(-share), 4)} for share, n in worst if share]}
