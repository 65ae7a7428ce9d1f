"""Inputs of a corpus: files, folders and data sets of the Hugging Face hub, cut into jobs for the workers.

A job is a piece of an input of about JOB_BYTES. The jobs of an input and their order are a function of the
input alone. So the tokens are the same for any number of workers, and a resumed run skips the jobs that are
done. Only one job is in memory at a time.

A job holds arguments of a reader, see corpus_documents.READERS.
"""

import codecs
import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data.compressed_files import open_decompressed
from data.corpus_documents import JOB_BYTES, key_of, read_job, safe_cut
from data.folder_files import files_of
from nanosync.errors import UserError, shown
from nanosync.files import decode_text, first_line, is_utf8, open_regular, os_error_as_user_error

STRUCTURED = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # endings of files that hold many documents
EXPANSION = 4.0  # bytes of text of a compressed byte, for the estimate
HUB = "hf:"  # begins the name of a data set of the Hugging Face hub


@dataclass(frozen=True)
class Job:
    """A piece of an input."""

    reader: str  # name of the reader
    what: tuple  # its arguments
    done: float  # share of the input's bytes up to the end of this job
    place: int | None = None  # 64 bits that decide on the split of all its documents; None: the documents do
    split: str | None = None  # 'train' or 'val' for all its documents; None: their places decide
    repetition: int = 0  # number of earlier passes over the input
    share: float = 1.0  # of the documents that this pass takes


class TextFile:
    """A text in UTF-8. A separator ends each document but the last; an empty one does not occur."""

    def __init__(self, path: str, separator: str):
        self.path, separator = path, separator.replace("\r\n", "\n")
        self.size, self.identity = _look_at(path)
        with _reading(path), open_regular(path) as f:
            start = f.read(1 << 16)
        decode_text(start, path, whole=len(start) == self.size)  # UTF-16, or a byte that is not UTF-8
        windows = b"\r\n" in start  # line ends, also those of the separator
        self.separator = (separator.replace("\n", "\r\n") if windows else separator).encode()

    def check(self) -> None:
        """Raise UserError unless the whole file is UTF-8."""
        decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
        with _reading(self.path), open_regular(self.path) as f:
            try:
                while window := f.read(JOB_BYTES):
                    decoder.decode(window)
                    at += len(window)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                raise UserError(f"cannot read {self.path}: a byte after byte {at} is not UTF-8") from None

    def has_separator(self) -> bool:
        """Return True if the text is more than one document."""
        with _reading(self.path), open_regular(self.path) as f:
            last = b""
            while self.separator and (window := f.read(JOB_BYTES)):
                if self.separator in last + window:
                    return True
                last = window[-len(self.separator):]
        return False

    def jobs(self) -> Iterator[Job]:
        """Yield ranges of whole documents, or of a part of a document longer than JOB_BYTES."""
        with _reading(self.path), open_regular(self.path) as f:
            start = 0
            while start < self.size:
                window = _read_at(f, start, JOB_BYTES)
                last = window.rfind(self.separator) if start + len(window) < self.size else len(window)
                if last >= 0:
                    end = min(start + last + len(self.separator), self.size)
                    yield self._range(start, end, self.separator)
                else:
                    end = self._end_of_document(f, start)
                    yield from self.parts(f, start, end, self.separator)
                start = end

    def jobs_of_one_document(self, val_share: float) -> Iterator[Job]:
        """Yield ranges of a text that is one document: its end is val."""
        with _reading(self.path), open_regular(self.path) as f:
            cut = int(self.size * (1 - val_share))
            while cut > 0 and _read_at(f, cut, 1)[:1] and 0x80 <= _read_at(f, cut, 1)[0] < 0xC0:
                cut -= 1  # inside a character
            if cut > 0 and _read_at(f, cut - 1, 2) == b"\r\n":
                cut -= 1  # inside a line end
            for split, start, end in (("train", 0, cut), ("val", cut, self.size)):
                for job in self.parts(f, start, end, b""):
                    yield replace(job, split=split, place=None)

    def _end_of_document(self, f, start: int) -> int:
        """Return the end of the document that begins at `start`, behind its separator."""
        last = b""
        for at in itertools.count(start, JOB_BYTES):
            window = _read_at(f, at, JOB_BYTES)
            found = (last + window).find(self.separator)
            if found >= 0:
                return at - len(last) + found + len(self.separator)
            if not window:
                return self.size
            last = window[-len(self.separator):]

    def parts(self, f, start: int, end: int, separator: bytes) -> Iterator[Job]:
        """Yield ranges of one document, all of which share its place."""
        place, begins = None, True
        while start < end:
            size = end - start
            if size > JOB_BYTES + len(separator):  # no cut inside the separator, which is at the end
                size = safe_cut(_read_at(f, start, JOB_BYTES))
            job = self._range(start, start + size, separator, begins)
            if begins:
                place = key_of(next(job_texts(job), ""))
            yield replace(job, place=place)
            start, begins = start + size, False

    def _range(self, start: int, end: int, separator: bytes, begins: bool = True) -> Job:
        return Job("range", (self.path, start, end, separator, begins), end / self.size)


class JsonLines:
    """A file with a JSON object a line, perhaps compressed. A document is one of the object's fields."""

    def __init__(self, path: str, field: str):
        self.path, self.field = path, field
        self.size, self.identity = _look_at(path)
        self.compressed = not path.endswith(".jsonl")
        if self.compressed:
            self.file_size, self.size = self.size, self.size * EXPANSION
        first = next(self.jobs(1 << 16), None)  # a wrong field is an error from the start
        if first is not None:
            next(job_texts(first), None)

    def jobs(self, window: int | None = None) -> Iterator[Job]:
        """Yield blocks of whole lines."""
        window = JOB_BYTES if window is None else window
        with _reading(self.path), open_decompressed(self.path) as (f, position):
            at, rest = 0, b""
            while block := f.read(window):
                end = block.rfind(b"\n") + 1
                if end:
                    lines, rest = rest + block[:end], block[end:]
                    yield self._block(at, lines, position)
                    at += len(lines)
                else:
                    rest += block
            if rest:
                yield self._block(at, rest, position)

    def _block(self, at: int, lines: bytes, position) -> Job:
        if self.compressed:
            return Job("lines", (self.path, at, None, self.field, lines), position() / self.file_size)
        end = at + len(lines)
        return Job("lines", (self.path, at, end, self.field, None), end / self.size)


class Parquet:
    """A parquet file. A document is a row of a column of strings."""

    def __init__(self, path: str, field: str):
        parquet, self.error = import_parquet(path)
        self.path, self.field = path, field
        _, self.identity = _look_at(path)
        from pyarrow import types
        try:
            with open_regular(path) as f:
                footer = parquet.read_metadata(f)
        except (OSError, self.error) as e:
            raise UserError(f"{path} is no whole parquet file ({first_line(e)}): get it again") from None
        schema = footer.schema.to_arrow_schema()
        column = schema.get_field_index(field)
        if column < 0 or not (types.is_string(schema.types[column])
                              or types.is_large_string(schema.types[column])):
            raise UserError(f"{path} has columns {shown(schema.names)}, and no {field!r} of strings among "
                            f"them: name the column with --field")
        self.rows, groups = footer.num_rows, map(footer.row_group, range(footer.num_row_groups))
        self.size = sum(column.total_uncompressed_size for group in groups
                        for column in map(group.column, range(group.num_columns))
                        if column.path_in_schema == field)

    def jobs(self) -> Iterator[Job]:
        """Yield the texts of some rows."""
        parquet, _ = import_parquet(self.path)
        try:
            with open_regular(self.path) as f:
                batches = parquet.ParquetFile(f).iter_batches(
                    batch_size=128, columns=[self.field], use_threads=False)
                yield from text_jobs((batch.column(0).to_pylist() for batch in batches), self.rows, self.path)
        except (OSError, self.error) as e:
            raise UserError(f"cannot read {self.path} ({first_line(e)}): get it again") from None


class HubDataset:
    """A data set of the Hugging Face hub, hf:NAME, hf:NAME:CONFIGURATION or hf:NAME:CONFIGURATION:SPLIT."""

    def __init__(self, spec: str, field: str):
        name, config, split = [*spec[len(HUB):].split(":"), "", ""][:3]
        if not name or spec.count(":") > 3:
            raise UserError(f"--input={spec}: write hf:NAME, hf:NAME:CONFIGURATION or "
                            f"hf:NAME:CONFIGURATION:SPLIT")
        try:
            import datasets
        except ModuleNotFoundError:
            raise UserError(f"--input={spec} needs the package datasets: pip install datasets") from None
        _silence(datasets)
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train")
        except Exception as e:  # of datasets, fsspec or the HTTP library
            raise UserError(f"could not load {spec} ({type(e).__name__}: {first_line(e)[:120]}): see that "
                            f"the name is right; without a network, give files as --input=FOLDER") from None
        if field not in rows.column_names:
            raise UserError(f"{spec} has columns {shown(rows.column_names)}, and no {field!r} among them: "
                            f"name the column with --field")
        self.spec, self.field, self.rows = spec, field, rows.select_columns([field])
        self.size = rows.info.size_in_bytes or len(rows) * 2000
        self.identity = f"{spec} {len(rows)} {rows.info.dataset_size}"

    def jobs(self) -> Iterator[Job]:
        """Yield the texts of some rows."""
        batches = (self.rows[at:at + 128][self.field] for at in range(0, len(self.rows), 128))
        yield from text_jobs(batches, len(self.rows), self.spec)


class Files:
    """The files of a folder, a document each, in the order of hashes of their paths inside the folder."""

    def __init__(self, folder: str, paths: list[str]):
        def place(path: str) -> bytes:
            return hashlib.sha256(os.path.relpath(path, folder).encode("utf-8", "surrogateescape")).digest()

        self.paths = sorted(paths, key=place)
        sizes, digest = [], hashlib.sha256()
        for path in self.paths:
            size, identity = _look_at(path)
            sizes.append(size)
            digest.update(f"{os.path.relpath(path, folder)} {identity}\n".encode("utf-8", "surrogateescape"))
        self.sizes, self.size, self.identity = sizes, sum(sizes), f"{len(paths)} files {digest.hexdigest()}"

    def jobs(self) -> Iterator[Job]:
        """Yield some files each. A file longer than JOB_BYTES is cut as TextFile cuts a document."""
        some, size, done = [], 0, 0
        for path, n in zip(self.paths, self.sizes):
            if some and size + n > JOB_BYTES:
                done += size
                yield Job("files", tuple(some), done / self.size)
                some, size = [], 0
            if n > JOB_BYTES:
                for job in _jobs_of_long_file(path):
                    yield replace(job, done=(done + job.done * n) / self.size)
                done += n
            else:
                some.append(path)
                size += n
        if some:
            yield Job("files", tuple(some), 1.0)


def _jobs_of_long_file(path: str) -> Iterator[Job]:
    """Yield ranges of a file of a folder, which is one document; none of a file that is no text."""
    try:
        text = TextFile(path, "")
        text.check()
    except UserError:
        yield Job("texts", (None,), 1.0)  # counted as left out, and not read into memory
        return
    with _reading(path), open_regular(path) as f:
        yield from text.parts(f, 0, text.size, b"")


def open_input(spec: str, field: str, separator: str, pattern: str | None) -> list:
    """Return the sources of one --input. Raises UserError for each input that cannot be read.

    field: of JSON lines, parquet files and data sets of the hub.
    separator: of texts.
    pattern: of the files of a folder, None for all that are no hidden files.
    """
    if spec.startswith(HUB):
        sources = [HubDataset(spec, field)]
    elif os.path.isdir(spec):
        sources = _open_folder(spec, field, pattern)
    elif pattern is not None:
        raise UserError(f"--files={pattern} chooses among the files of a folder, and {spec} is no folder")
    else:
        sources = [_open_file(spec, field, separator)]
    if not any(source.size for source in sources):
        raise UserError(f"--input={spec} is empty: name a file, a folder or a data set with text")
    return sources


def _open_file(path: str, field: str, separator: str):
    if path.endswith(".parquet"):
        return Parquet(path, field)
    if path.endswith(STRUCTURED):
        return JsonLines(path, field)
    if path.endswith((".gz", ".zst", ".zip", ".xz", ".bz2", ".tar")):
        raise UserError(f"{path}: of compressed files only .jsonl.gz and .jsonl.zst can be read: unpack it")
    return TextFile(path, separator)


def _open_folder(folder: str, field: str, pattern: str | None) -> list:
    paths = files_of(folder, pattern or "*")
    structured = [path for path in paths if path.endswith(STRUCTURED)]
    if not paths:
        like = f" like {pattern}" if pattern else ""
        raise UserError(f"--input={folder}: the folder has no files{like}")
    if len(structured) == len(paths) or (pattern is not None and structured):
        unusable = [path for path in structured if not is_utf8(path)]
        if unusable:
            raise UserError(f"--input: the name of {unusable[0]!r} is not valid UTF-8: rename it")
        return [_open_file(path, field, "") for path in structured]
    if structured:
        print(f"{folder}: {len(structured)} files such as {structured[0]} are left out; for them alone, add "
              f"--files='*{next(end for end in reversed(STRUCTURED) if structured[0].endswith(end))}'")
    return [Files(folder, [path for path in paths if not path.endswith(STRUCTURED)])]


def merged_jobs(inputs: list[Iterator[Job]]) -> Iterator[tuple[int, Job]]:
    """Yield (input, job) of all inputs: each time of the input of which the smallest share is done.

    So the end of an input comes at the end of the others, whatever their sizes.
    """
    heap = [(0.0, number) for number in range(len(inputs))]
    while heap:
        _, number = heapq.heappop(heap)
        job = next(inputs[number], None)
        if job is not None:
            yield number, job
            heapq.heappush(heap, (job.done, number))


def weighted_jobs(sources: list, weight: float) -> Iterator[Job]:
    """Yield the jobs of an input's sources, all of them `weight` times; the last time a share of the
    documents."""
    passes = -(-weight // 1)
    total = sum(source.size for source in sources) or 1
    for repetition in range(int(passes)):
        before = 0
        for source in sources:
            for job in source.jobs():
                done = (before + job.done * source.size) / total
                yield replace(job, done=(repetition + done) / passes, repetition=repetition,
                              share=min(1.0, weight - repetition))
            before += source.size


def text_jobs(batches: Iterator[list], rows: int, where: str) -> Iterator[Job]:
    """Yield the texts of some rows. batches: lists of texts or None. rows: their number. where: for
    messages."""
    some, size, row = [], 0, 0
    for texts in batches:
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise UserError(f"{where}: row {row} holds {shown(text)}, and a document is a string: name "
                                f"another column with --field")
            some.append(text or "")
            size, row = size + len(some[-1]), row + 1
            if size >= JOB_BYTES:
                yield Job("texts", tuple(some), row / rows)
                some, size = [], 0
    if some:
        yield Job("texts", tuple(some), 1.0)


def import_parquet(where: str):
    """Return pyarrow.parquet and the class of its errors. Raises UserError if pyarrow is not installed."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{where} needs the package pyarrow: pip install pyarrow") from None
    return parquet, ArrowException


def _silence(datasets) -> None:
    """Leave failures to one line of this script."""
    import huggingface_hub

    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)


def _look_at(path: str) -> tuple[int, str]:
    """Return the size of a file, and a text that changes with the file. Raises UserError."""
    with _reading(path), open_regular(path) as f:
        found = os.fstat(f.fileno())
    return found.st_size, f"{found.st_size} {found.st_mtime_ns}"


def _reading(path: str):
    return os_error_as_user_error(f"cannot read {path}")


def _read_at(f, start: int, size: int) -> bytes:
    f.seek(start)
    return f.read(size)


def job_texts(job: Job) -> Iterator[str | None]:
    """Return the texts of a job, here in this process."""
    return (document.text for document in read_job(job))


def fingerprint(value) -> str:
    """Return the SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
