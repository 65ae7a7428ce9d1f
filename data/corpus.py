"""Prepare a corpus as a data set: the steps from jobs to published token files, each of which can be resumed.

A folder .prepare inside the data set's folder holds what a killed run leaves: LOCK, the tokenizer that was
made from the text, an entry for each document, n-grams of val, and state.json. state.json is written every
SAVE_SECONDS, after the files that it describes are on the disk. A resumed run cuts the files back to the
sizes in state.json and continues with the next job. So it writes the bytes that an uninterrupted run writes.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from data import leakage
from data.corpus_encoding import CONTINUED, REPEATED, VAL, encode_job, in_order, make_tokenizer
from data.corpus_inputs import Job, TextFile, fingerprint, merged_jobs, weighted_jobs
from data.token_writer import TokenWriter, check_space, is_published, publish_dataset
from nanosync.errors import UserError
from nanosync.files import made_folder, os_error_as_user_error, read_json, write_json
from nanosync.folder_lock import lock_folder
from nanosync.token_files import DTYPES, dtype_for
from nanosync.tokenizers import from_meta

SAVE_SECONDS = 2.0  # between two savings of the state
TOKENS_PER_BYTE = {"char": 1.0, "byte": 1.0}  # for the estimate, of others OTHER
OTHER = 0.35
VERSION = 1  # of the tokens that a plan gives
FILES = {name + end for name in ("state.json", "tokenizer.json", "documents", "ngrams", "ngram_counts",
                                 "ngrams.npy") for end in ("", ".tmp")} | {"LOCK"}  # of .prepare


@dataclass
class Plan:
    """Settings of a data set: those that decide its bytes, and how it is made."""

    name: str
    out: str  # folder
    tokenizer: str  # value of --tokenizer
    inputs: list[list]  # sources of each input
    weights: list[float]
    source: dict  # for meta.json
    val_inputs: list[list] = field(default_factory=list)  # their documents are val, and those of inputs train
    val_share: float | None = None  # of the documents, 0.05 without a value; of one document, 0.1
    vocab_size: int = 1 << 16  # about
    shard_tokens: int | None = None  # None: flat files
    workers: int = 1
    report: bool = True  # False: without copies and 13-grams
    resumable: bool = True  # False: Ctrl-C leaves nothing
    made: object = None  # a tokenizer in place of the one that `tokenizer` would make

    def __post_init__(self):
        sources = list(itertools.chain(*self.inputs))
        self.one_document = (len(sources) == 1 and isinstance(sources[0], TextFile) and not self.val_inputs
                             and self.weights == [1.0] and not sources[0].has_separator())
        if self.val_share is None:
            self.val_share = 0.1 if self.one_document else 0.05
        weights = self.weights + [1.0] * len(self.val_inputs)
        self.size = sum(weight * sum(source.size for source in each)
                        for weight, each in zip(weights, self.inputs + self.val_inputs))  # bytes, about

    @property
    def fingerprint(self) -> str:
        """A text that changes when the data set has to be made again."""
        identities = [[source.identity for source in sources] for sources in self.inputs + self.val_inputs]
        return fingerprint([VERSION, identities, self.weights, len(self.val_inputs), self.tokenizer,
                            self.val_share, self.shard_tokens, self.name, self.source])

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs, in the order of the tokens."""
        if self.one_document:
            yield from self.inputs[0][0].jobs_of_one_document(self.val_share)
            return
        inputs = [weighted_jobs(*each) for each in zip(self.inputs, self.weights)]
        inputs += [weighted_jobs(sources, 1.0) for sources in self.val_inputs]
        for number, job in merged_jobs(inputs):
            if self.val_inputs:
                job = replace(job, split="train" if number < len(self.inputs) else "val")
            yield job


class Appended:
    """A file of records to which a run appends, and which a resumed run cuts back."""

    def __init__(self, path: str, size: int):
        """Open the file with its first `size` bytes. Raises OSError if it has fewer."""
        self.path, self.file = path, open(path, "r+b" if size else "wb")
        if self.file.seek(0, os.SEEK_END) < size:
            raise OSError(f"{path} is shorter than it was")
        self.file.truncate(size)
        self.size = self.file.seek(size)

    def write(self, array: np.ndarray) -> None:
        self.file.write(array.tobytes())
        self.size += array.nbytes

    def sync(self) -> int:
        """Write to the disk. Returns the size."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size


class Progress:
    """Progress of a run: the files written so far, in memory and in .prepare/state.json."""

    def __init__(self, plan: Plan, work: str):
        """Continue the state in the folder `work` if it is that of this plan, else begin anew."""
        self.plan, self.work, self.path = plan, work, os.path.join(work, "state.json")
        self.identity = plan.fingerprint
        state = None
        with contextlib.suppress(OSError, ValueError):
            state = read_json(self.path)
        if not isinstance(state, dict) or state.get("plan") != self.identity:
            discard_leftovers(plan, work)
            state = {"plan": self.identity, "tokenizer": None}
        self.state = state

    def tokenizer(self, settings: dict):
        """Return (tokenizer, end of text), made from the text unless an earlier run did."""
        plan, saved = self.plan, os.path.join(self.work, "tokenizer.json")
        if plan.made is not None:
            return plan.made, plan.made.eot_token
        if self.state["tokenizer"] is not None:
            meta = read_json(saved)
            return from_meta(meta), self.state["tokenizer"]["end_of_text"]
        tokenizer, end_of_text = make_tokenizer(
            plan.tokenizer, plan.workers, settings, lambda: bar(plan.jobs(), "reading text"), plan.size,
            plan.one_document)
        write_json(saved, tokenizer.meta())
        self.state["tokenizer"] = {"end_of_text": end_of_text}
        return tokenizer, end_of_text

    def open(self, dtype: str) -> None:
        """Open the files at the place where they continue."""
        plan = self.plan
        for attempt in (self.state, {}):
            self.writers = {split: TokenWriter(plan.out, split, plan.name, plan.shard_tokens, dtype)
                            for split in ("train", "val")}
            try:
                self.jobs, self.counts = attempt.get("jobs", 0), attempt.get("counts", {})
                for split, state in attempt.get("writers", {}).items():
                    self.writers[split].restore(state)
                sizes = attempt.get("sizes", {})
                self.files = {name: Appended(os.path.join(self.work, name), sizes.get(name, 0))
                              for name in ("documents", "ngrams", "ngram_counts")}
            except OSError:
                if attempt is not self.state:
                    raise
                continue
            if self.jobs:
                print(f"resuming {plan.out} after {self.jobs} of its parts", flush=True)
            return

    def add(self, encoded) -> None:
        """Append the result of a job."""
        for split, tokens in encoded.tokens.items():
            self.writers[split].write(tokens)
        self.files["documents"].write(encoded.documents)
        if self.files["ngrams"].size < 8 * leakage.MAX_NGRAMS:
            self.files["ngrams"].write(encoded.ngrams)
            self.files["ngram_counts"].write(np.array(encoded.ngram_counts, np.int64))
        for name, count in encoded.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.jobs += 1

    def save(self) -> None:
        """Write the files and then state.json to the disk."""
        writers = {split: writer.state() for split, writer in self.writers.items()}
        sizes = {name: appended.sync() for name, appended in self.files.items()}
        write_json(self.path, {**self.state, "jobs": self.jobs, "counts": self.counts, "writers": writers,
                               "sizes": sizes})


def prepare_corpus(plan: Plan) -> None:
    """Make the data set of a plan and print what it holds. Raises UserError."""
    work = os.path.join(plan.out, ".prepare")
    source = {**plan.source, "fingerprint": plan.fingerprint}
    if is_published(plan.out, source=source):
        print(f"{plan.out} is up to date")
        return
    width = DTYPES[dtype_for(plan.vocab_size)].itemsize
    tokens = plan.size * TOKENS_PER_BYTE.get(plan.tokenizer, OTHER)
    print(f"{millions(plan.size)} MB of text: about {millions(tokens)}M tokens, up to "
          f"{millions(width * tokens)} MB to write to {plan.out}", flush=True)
    check_space(plan.out, width * tokens)
    failing = os_error_as_user_error(f"cannot write to {plan.out}")
    with made_folder(plan.out), _working_in(plan, work), failing:
        settings = {"val_share": plan.val_share, "report": plan.report}
        progress = Progress(plan, work)
        tokenizer, end_of_text = progress.tokenizer(settings)
        settings |= {"meta": tokenizer.meta(), "end_of_text": end_of_text}
        progress.open(dtype_for(tokenizer.vocab_size))
        _encode(plan, progress, settings)
        _check_splits(plan, progress)
        report = _report(plan, progress, settings)
        meta = {"name": plan.name, **tokenizer.meta(), "source": source}
        if end_of_text is not None:
            meta["end_of_text"] = end_of_text  # which a char tokenizer does not know
        _publish(plan, progress, meta, report, separated=end_of_text is not None)


@contextlib.contextmanager
def _working_in(plan: Plan, work: str):
    """Lock the folder. After an error delete its contents; after Ctrl-C the next run needs them."""
    try:
        os.makedirs(work, exist_ok=True)
        foreign = set(os.listdir(work)) - FILES
    except OSError as e:
        raise UserError(f"cannot write to {plan.out}: {e.strerror}") from None
    if foreign:
        raise UserError(f"{os.path.join(work, min(foreign))} is not of this script, which deletes the folder "
                        f"at its end: move it, or choose another folder with --out")
    lock = lock_folder(work, "out")
    try:
        yield
    except BaseException as e:
        if not (isinstance(e, KeyboardInterrupt) and plan.resumable):
            discard_leftovers(plan, work)
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def discard_leftovers(plan: Plan, work: str) -> None:
    """Delete what a run left in the folder, except its lock."""
    for name in os.listdir(work):
        if name != "LOCK":
            os.remove(os.path.join(work, name))
    for split in ("train", "val"):
        for name in (f"{split}.bin.tmp", f"{split}.idx.tmp", f"*_{split}_??????.bin.tmp"):
            for path in glob.glob(glob.escape(plan.out + os.sep) + name):
                os.remove(path)


def bar(jobs: Iterator[Job], what: str) -> Iterator[Job]:
    """Yield jobs, with a bar of the share that is done."""
    from tqdm import tqdm

    with tqdm(total=100, desc=what, unit="%", disable=None,
              bar_format="{l_bar}{bar}| [{elapsed}<{remaining}]") as shown:
        for job in jobs:
            yield job
            shown.update(max(0.0, 100 * job.done - shown.n))


def _encode(plan: Plan, progress: Progress, settings: dict) -> None:
    """Write the tokens of all jobs that are not done."""
    jobs = itertools.islice(bar(plan.jobs(), "encoding"), progress.jobs, None)
    saved = time.monotonic()
    with contextlib.closing(in_order(plan.workers, settings, encode_job, jobs)) as results:
        for _, encoded in results:
            progress.add(encoded)
            if time.monotonic() - saved >= SAVE_SECONDS:
                progress.save()
                saved = time.monotonic()
    progress.save()


def _check_splits(plan: Plan, progress: Progress) -> None:
    empty = [split for split, writer in progress.writers.items() if not writer.total]
    if empty:
        n = sum(int((entries["flags"] & (CONTINUED | REPEATED) == 0).sum())
                for entries in leakage.read_documents(progress.files["documents"].path))
        inputs = plan.source["inputs"] + plan.source.get("val_inputs", [])
        names = " and ".join(inputs) if len(inputs) < 3 else f"the {len(inputs)} inputs"
        advice = "give more text" if plan.val_inputs or plan.one_document else \
            "set --val_share, give more documents, or name those of val with --val_input"
        raise UserError(f"{empty[0]} would be empty, with {n:,} document{'s' * (n != 1)} in all in {names}: "
                        f"{advice}")


def _report(plan: Plan, progress: Progress, settings: dict) -> dict:
    """Return the contents of report.json."""
    documents = progress.files["documents"].path
    report = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    for entries in leakage.read_documents(documents):
        for split, counts in report.items():
            of_split = entries[(entries["flags"] & VAL > 0) == (split == "val")]
            counts["documents"] += int((of_split["flags"] & CONTINUED == 0).sum())
            for name in ("tokens", "bytes"):
                counts[name] += int(of_split[name].sum(dtype=np.int64))
    for counts in report.values():
        counts["tokens_per_byte"] = round(counts["tokens"] / counts["bytes"], 6)
    report["empty_documents"] = progress.counts.get("empty", 0)
    report["files_not_utf8"] = progress.counts.get("not_utf8", 0)
    if plan.report:
        report["copies"] = leakage.count_copies(documents, "exact")
        report["copies_but_for_case_and_white_space"] = leakage.count_copies(documents, "key")
        report["ngrams"] = _ngram_report(plan, progress, settings)
    return report


def _ngram_report(plan: Plan, progress: Progress, settings: dict) -> dict:
    ngrams, counts = (np.fromfile(progress.files[name].path, kind)
                      for name, kind in (("ngrams", np.uint64), ("ngram_counts", np.int64)))
    unique, path = leakage.sorted_unique(ngrams), os.path.join(progress.work, "ngrams.npy")
    np.save(path, unique)
    jobs = bar(plan.jobs(), "leakage") if len(unique) else ()
    leakage._table.clear()
    results = in_order(plan.workers, {**settings, "meta": None, "ngrams": path}, leakage.found_in_train, jobs)
    with contextlib.closing(results):
        return leakage.overlap(ngrams, counts, unique, results)


def _publish(plan: Plan, progress: Progress, meta: dict, report: dict, separated: bool) -> None:
    """Write the starts of the documents, report.json and meta.json, and give the token files their names.

    separated: an end-of-text token begins each document.
    """
    digests = {}
    for split, writer in progress.writers.items():
        path = os.path.join(plan.out, f"{split}.idx")
        digests[f"{split}.idx"] = _write_starts(path, progress.files["documents"].path, split == "val",
                                               separated)
        writer.close()
    ratios = {split: report[split]["bytes"] / max(1, report[split]["tokens"]) for split in ("train", "val")}
    meta |= {"bytes_per_token": ratios, "train_documents": report["train"]["documents"],
             "val_documents": report["val"]["documents"]}
    write_json(os.path.join(plan.out, "report.json"), report)
    publish_dataset(plan.out, meta, progress.writers["train"], progress.writers["val"], digests)
    shutil.rmtree(progress.work, ignore_errors=True)
    print_report(report)


def _write_starts(path: str, documents: str, val: bool, separated: bool) -> str:
    """Write the place of the first token of each document of a split, and the number of tokens, as uint64 to
    `path`.tmp. Return the file's SHA-256."""
    digest, total = hashlib.sha256(), 0
    with open(path + ".tmp", "wb") as f:
        for entries in itertools.chain(leakage.read_documents(documents), [None]):
            if entries is None:
                starts = np.array([total], "<u8")
            else:
                entries = entries[(entries["flags"] & VAL > 0) == val]
                begins = entries["flags"] & CONTINUED == 0
                ends = total + np.cumsum(entries["tokens"] + (begins & separated).astype(np.int64))
                starts = np.concatenate(([total], ends[:-1])).astype("<u8")[begins] if len(ends) else ends
                total = int(ends[-1]) if len(ends) else total
            digest.update(starts.tobytes())
            f.write(starts.tobytes())
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()


def millions(n: float) -> str:
    """Return a number in millions, as text; of a small number two digits."""
    return f"{n / 1e6:,.1f}" if n >= 1e6 else f"{n / 1e6:.2g}"


def print_report(report: dict) -> None:
    """Print the report, a few lines."""
    for split in ("train", "val"):
        counts = report[split]
        plural = "" if counts["documents"] == 1 else "s"
        print(f"{split}: {counts['documents']:,} document{plural}, {millions(counts['bytes'])} MB of text, "
              f"{counts['tokens_per_byte']:.4f} tokens a byte")
    if report["empty_documents"] or report["files_not_utf8"]:
        print(f"left out: {report['empty_documents']:,} empty documents, {report['files_not_utf8']:,} files "
              f"that are not UTF-8")
    if "ngrams" in report:
        exact, alike = report["copies"], report["copies_but_for_case_and_white_space"]
        print(f"copies: {exact['train']:,} in train, {exact['val']:,} in val; {exact['val_in_train']:,} "
              f"documents of val are in train (but for case and white space: {alike['train']:,}, "
              f"{alike['val']:,}, {alike['val_in_train']:,})")
        ngrams = report["ngrams"]
        print(f"{ngrams['n']}-grams: {ngrams['share_of_ngrams']:.2%} of {ngrams['ngrams']:,} of val are in "
              f"train; {ngrams['documents_with_half']:,} of {ngrams['documents']:,} documents have half of "
              f"theirs there, {ngrams['documents_with_any']:,} have any")
