"""Documents of a corpus: how a job is read, and in which split a document is.

A document's *key* is a hash of its text without differences of case and white space. The key decides on the
split. So a text and its copies are in one split, and the split of a document does not depend on the others.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from nanosync.errors import UserError, shown
from nanosync.files import decode_text, is_utf8, open_regular, os_error_as_user_error

JOB_BYTES = 4 << 20  # of text in a job; a longer document is cut at the end of a line
PIECE = 1 << 20  # bytes that a tokenizer gets at a time
TRIES = 10_000  # line ends before a cut that are looked at
WORD_BITS = 64
LOWER, SPACE = bytes(range(256)).lower(), b" \t\n\r\v\f"


@dataclass
class Document:
    """A text of a corpus, or a part of a text longer than JOB_BYTES."""

    text: str | None  # None: a file of a folder that is not UTF-8
    begins: bool = True  # False: it continues the document before it
    kept: bool = False  # True: it is a document even without text


def read_job(job) -> Iterator[Document]:
    """Yield the documents of a job. Raises UserError if it cannot be read."""
    return READERS[job.reader](*((job.what,) if job.reader in ("files", "texts") else job.what))


def _read_range(path: str, start: int, end: int, separator: bytes, begins: bool) -> Iterator[Document]:
    with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
        f.seek(start)
        content = f.read(end - start)
    text = _decode(content, path, start)
    parts = text.split(separator.decode().replace("\r\n", "\n")) if separator else [text]
    for n, part in enumerate(parts[:-1]):  # line ends beside a separator belong to the separator
        yield Document(part.strip("\n") if n or begins else part.rstrip("\n"), begins or n > 0)
    if parts[-1].strip("\n") or len(parts) == 1:
        yield Document(parts[-1].lstrip("\n") if len(parts) > 1 or (begins and separator) else parts[-1],
                       begins or len(parts) > 1)


def _read_files(paths: tuple[str, ...]) -> Iterator[Document]:
    for path in paths:
        with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
            content = f.read()
        try:
            yield Document(decode_text(content, path))
        except UserError:
            yield Document(None)


def _read_texts(texts: tuple[str | None, ...]) -> Iterator[Document]:
    for text in texts:
        yield Document(None if text is None else _valid(text))


def _read_lines(path: str, start: int, end: int | None, field: str, lines: bytes | None
                ) -> Iterator[Document]:
    if lines is None:
        with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
            f.seek(start)
            lines = f.read(end - start)
    at = start
    for line in lines.split(b"\n"):
        if line.strip(b"\xef\xbb\xbf \t\r" if at == 0 else b" \t\r"):
            yield Document(_field_of(line, field, f"{path}, byte {at}"))
        at += len(line) + 1


def _field_of(line: bytes, field: str, where: str) -> str:
    """Return a field of a JSON object; a missing text is empty if it is null. Raises UserError."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        reason = "it is not UTF-8" if isinstance(e, UnicodeDecodeError) else shown(str(e))
        raise UserError(f"{where}: the line is no JSON ({reason}): correct it or leave it out") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: the line is no JSON object: each line must be one, such as "
                        f'{{"{field}": "..."}}')
    if field not in value:
        raise UserError(f"{where}: the object has no field {field!r}, but {shown(list(value))}: name the "
                        f"field of the text with --field")
    text = value[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is {shown(text)}, and a document is a string: name "
                        f"another one with --field")
    return _valid(text or "")


def _decode(content: bytes, path: str, start: int) -> str:
    """Decode a part of a text file, see decode_text. start: its place in the file."""
    if start == 0:
        return decode_text(content, path)
    try:
        return content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path}: byte {start + e.start} is not UTF-8") from None


def _valid(text: str) -> str:
    """Return a text with U+FFFD in place of halves of characters, which JSON can hold."""
    return text if is_utf8(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


READERS = {"range": _read_range, "files": _read_files, "lines": _read_lines, "texts": _read_texts}


def hash_of(content: bytes) -> int:
    """Return 64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def key_of(text: str) -> int:
    """Return the key of a document."""
    content = (text if text.isascii() else text.lower()).encode()
    return hash_of(content.translate(LOWER, SPACE))


def split_of(job, key: int, val_share: float) -> str:
    """Return the split of a document of a job."""
    return job.split or ("val" if (key if job.place is None else job.place) < val_share * 2**WORD_BITS
                         else "train")


def is_taken(job, key: int, split: str) -> bool:
    """Return True if this pass over the job's input takes the document. Val has each document once."""
    if job.repetition and split == "val":
        return False
    place = key if job.place is None else job.place
    mixed = place * 0x9E3779B97F4A7C15 % 2**WORD_BITS  # not the bits that decide on the split
    return mixed < job.share * 2**WORD_BITS


def safe_cut(content: bytes) -> int:
    """Return where to cut a text that continues: before the last line end that follows no white space.

    GPT-2's tokenizer never joins what is on the two sides of such a place. Without such a line end the cut is
    at any other, else at the end of a character. Never between the two characters of a Windows line end,
    which would become two lines.
    """
    end, line_end = len(content), -1
    for _ in range(TRIES):
        end = content.rfind(b"\n", 1, end)
        if end < 0:
            break
        end -= content[end - 1:end] == b"\r"
        line_end = max(line_end, end)
        before = content[max(0, end - 4):end].decode(errors="ignore")
        if before and not before[-1].isspace():
            return end
    if line_end > 0:
        return line_end
    end = len(content)
    while end > max(1, len(content) - 4) and 0x80 <= content[end - 1] < 0xC0:
        end -= 1
    inside = content[end - 1] >= 0xC0 or (end == len(content) and content[end - 1:] == b"\r")
    return end - 1 if end > 1 and inside else len(content)


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about PIECE characters, cut as by safe_cut."""
    at = 0
    while len(text) - at > PIECE:
        content = text[at:at + PIECE].encode()
        piece = content[:safe_cut(content)].decode()
        yield piece
        at += len(piece)
    yield text[at:]
