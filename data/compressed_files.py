"""Compressed files as streams: gzip by the standard library, Zstandard by `zstandard` or `pyarrow`."""

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from nanosync.errors import UserError
from nanosync.files import first_line, open_regular


@contextlib.contextmanager
def open_decompressed(path: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a file, decompressed if its name ends in .gz or .zst, and a function that returns the bytes of the
    file that are read. Raises UserError, also from a read, if the file is damaged."""
    with open_regular(path) as f:
        if not path.endswith((".gz", ".zst")):
            yield f, f.tell
            return
        kind = "gzip" if path.endswith(".gz") else "zstd"
        stream = gzip.GzipFile(fileobj=f) if kind == "gzip" else _zstd(f, path)
        try:
            yield stream, f.tell
        except (OSError, EOFError, zlib.error, *_zstd_errors()) as e:
            raise UserError(f"{path} is no whole {kind} file ({first_line(e)}): get it again") from None


def _zstd(f: BinaryIO, path: str):
    """Return a stream that decompresses all frames of a file. Raises UserError if no package can."""
    with contextlib.suppress(ModuleNotFoundError):
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True)
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UserError(f"{path} needs the package zstandard: pip install zstandard") from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(f, "r"), "zstd")


def _zstd_errors() -> tuple:
    with contextlib.suppress(ModuleNotFoundError):
        import zstandard

        return (zstandard.ZstdError,)
    return ()
