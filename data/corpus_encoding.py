"""Workers that encode the jobs of a corpus, and the tokenizers that are made from its text.

Each function here that takes a job runs in a worker process. A worker has its settings from `start_worker`.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np

from data.corpus_documents import WORD_BITS, hash_of, is_taken, key_of, pieces, read_job, split_of
from data.ngrams import hashes_of_ngrams
from nanosync.errors import UserError
from nanosync.files import first_line, read_file
from nanosync.token_files import DTYPES, dtype_for
from nanosync.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, JsonTokenizer, from_meta

DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u4"), ("exact", "<u8"), ("key", "<u8"), ("flags", "u1")])
VAL, CONTINUED, REPEATED = 1, 2, 4  # flags of a document
SEPARATORS = "\N{SYMBOL FOR END OF TEXT}\N{SYMBOL FOR END OF TRANSMISSION}\N{SYMBOL FOR RECORD SEPARATOR}"
TRAINING_BYTES = 200_000_000  # of text from which a tokenizer is trained
MAX_TOKENIZER_JSON = 32 << 20  # bytes; meta.json holds it

_settings: dict = {}  # of this worker


@dataclass
class Encoded:
    """The result of a job."""

    tokens: dict  # split -> array of its tokens
    documents: np.ndarray  # DOCUMENT each, in their order
    ngrams: np.ndarray  # hashes of the n-grams of val documents
    ngram_counts: list  # of them, a val document each
    counts: dict = field(default_factory=dict)  # of documents that are left out


def start_worker(settings: dict) -> None:
    """Set up this worker. settings: `meta` of the tokenizer, None if there is none yet; `end_of_text`, None
    if no token separates documents; `val_share`; `report`: whether n-grams are needed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel
    _settings.clear()
    _settings.update(settings, tokenizer=from_meta(settings["meta"]) if settings.get("meta") else None)


def _start_process(settings: dict, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends the workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start_worker(settings)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def in_order(workers: int, settings: dict, function: Callable, jobs: Iterable) -> Iterator:
    """Yield (job, function(job)) in the order of the jobs. Up to 2 * workers + 1 results are in memory.

    workers: processes; 1: this process. Raises UserError.
    """
    if workers == 1:
        start_worker(settings)
        yield from ((job, function(job)) for job in jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_process,
                               (settings, os.getpid()))
    try:
        waiting = deque()
        for job in jobs:
            waiting.append((job, pool.submit(function, job)))
            if len(waiting) > 2 * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps because memory ran out: use fewer --workers") \
            from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_job(job) -> Encoded:
    """Return the tokens of a job's documents."""
    tokenizer, end_of_text = _settings["tokenizer"], _settings["end_of_text"]
    dtype = DTYPES[dtype_for(tokenizer.vocab_size)]
    separator = np.array([] if end_of_text is None else [end_of_text], dtype)
    tokens, documents, val_texts = {"train": [], "val": []}, [], []
    counts = {"empty": 0, "not_utf8": 0}
    for document in read_job(job):
        if document.text is None or not (document.text.strip() or document.kept or not document.begins):
            counts["not_utf8" if document.text is None else "empty"] += not job.repetition
            continue
        key = key_of(document.text)
        split = split_of(job, key, _settings["val_share"])
        if not is_taken(job, key, split):
            continue
        parts = [tokenizer.encode_ordinary(piece) for piece in pieces(document.text)]
        tokens[split] += [separator, *parts] if document.begins else parts
        content = document.text.encode()
        flags = VAL * (split == "val") + CONTINUED * (not document.begins) + REPEATED * bool(job.repetition)
        documents.append((sum(map(len, parts)), len(content), hash_of(content), key, flags))
        if split == "val" and _settings["report"]:
            val_texts.append(content)
    ngrams, of_text = hashes_of_ngrams(val_texts)
    joined = {split: np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="unsafe")
              for split, parts in tokens.items()}
    return Encoded(joined, np.array(documents, DOCUMENT), ngrams,
                   np.bincount(of_text, minlength=len(val_texts)).tolist(), counts)


def characters_of(job) -> np.ndarray:
    """Return the code points of a job's documents, sorted."""
    seen = np.zeros(0x110000, bool)
    for document in read_job(job):
        seen[np.frombuffer((document.text or "").encode("utf-32-le"), "<u4")] = True
    return np.flatnonzero(seen)


def texts_to_train_on(job) -> list[str]:
    """Return the train documents of a job that are among those from which a tokenizer is trained."""
    texts = []
    for document in read_job(job):
        key = key_of(document.text or "")
        mixed = key * 0xD1342543DE82EF95 % 2**WORD_BITS  # not the bits of the split
        if split_of(job, key, _settings["val_share"]) == "train" and \
                mixed < _settings["training_share"] * 2**WORD_BITS:
            texts += pieces(document.text or "")
    return texts


def check_tokenizer(name: str) -> tuple[str, int]:
    """Return the kind of --tokenizer=name, as in meta.json, and about how many tokens it has. Raises
    UserError unless its files and packages are there."""
    if name.startswith("bpe:"):
        size = name[4:]
        if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
            raise UserError(f"--tokenizer={name}: the vocabulary has 257 to 1,000,000 tokens, as in "
                            f"bpe:32000")
        _import_tokenizers(name)
        return "bpe", int(size)
    if name == "char":
        return name, 1 << 16
    tokenizer = load_tokenizer(name)
    return tokenizer.meta()["tokenizer"], tokenizer.vocab_size


def tokenizer_path(name: str) -> str | None:
    """Return the path of the tokenizer.json that --tokenizer names, None if it names none."""
    if name in ("gpt2", "char", "byte") or name.startswith("bpe:"):
        return None
    return os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name


def load_tokenizer(name: str):
    """Return the tokenizer of --tokenizer=gpt2, byte or the path of a tokenizer.json. Raises UserError."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "byte":
        return ByteTokenizer()
    path = tokenizer_path(name)
    if not path.endswith(".json") and not os.path.exists(path):
        raise UserError(f"--tokenizer={name} is unknown: use gpt2, char, byte, bpe:SIZE or the path of a "
                        f"tokenizer.json")
    try:
        content = read_file(path, MAX_TOKENIZER_JSON).decode()
    except OSError as e:
        raise UserError(f"--tokenizer: cannot read {path}: {e.strerror or first_line(e)}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--tokenizer: {path} is no tokenizer.json: byte {e.start} is not UTF-8") from None
    return JsonTokenizer(content, path)


def make_tokenizer(name: str, workers: int, settings: dict, jobs: Callable[[], Iterable], size: float,
                   one_document: bool):
    """Return (tokenizer, end of text) of --tokenizer, made from the text if need be.

    jobs: function that makes the jobs. size: bytes of text, about. one_document: no token separates
    documents.
    """
    if name == "char":
        return _char_tokenizer(in_order(workers, settings, characters_of, jobs()), one_document)
    if name.startswith("bpe:"):
        settings = {**settings, "training_share": min(1.0, TRAINING_BYTES / max(size, 1))}
        tokenizer = _train_bpe(int(name[4:]), in_order(workers, settings, texts_to_train_on, jobs()))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    else:
        tokenizer = load_tokenizer(name)
    if tokenizer.eot_token is None and not one_document:
        print(f"{name} has no end-of-text token: documents follow each other without a token between")
    return tokenizer, None if one_document else tokenizer.eot_token


def _char_tokenizer(results: Iterable, one_document: bool):
    seen = set()
    for _, codes in results:
        seen.update(codes.tolist())
    chars = "".join(map(chr, sorted(seen)))
    if one_document or not chars:
        return CharTokenizer(chars), None
    separator = next((c for c in [*SEPARATORS, *map(chr, range(0xE000, 0xF900))] if c not in chars), None)
    chars = "".join(sorted(chars + separator))
    return CharTokenizer(chars), chars.index(separator)


def _train_bpe(vocab_size: int, results: Iterable) -> JsonTokenizer:
    """Train a byte pair encoding with GPT-2's pattern of words."""
    tokenizers = _import_tokenizers(f"bpe:{vocab_size}")
    pre_tokenizers, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator((text for _, texts in results for text in texts), trainer)
    return JsonTokenizer(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False), "the new tokenizer")


def _import_tokenizers(name: str):
    try:
        import tokenizers
        import tokenizers.trainers
    except ModuleNotFoundError:
        raise UserError(f"--tokenizer={name} needs the package tokenizers: pip install tokenizers") from None
    return tokenizers
