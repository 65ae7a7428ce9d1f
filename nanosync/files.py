"""Files and folders: bounded reading, atomic writing, checks of paths, downloads."""

import codecs
import contextlib
import difflib
import errno
import glob
import hashlib
import json
import math
import os
import stat
import tempfile
import unicodedata

from nanosync.errors import UserError, shown

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the repository
MAX_JSON = 64 * 2**20  # bytes
MAX_DEPTH = 50  # values inside each other in JSON
FREE_TEXT = ("chars", "sample_prompt", "start", "stop_token", "text", "tokenizer_json")  # may have control
# characters


def open_regular(path: str, mode: str = "rb", **options):
    """Open a regular file. Raises OSError, also for a pipe or a device, without waiting for it.

    mode, options: of the function open.
    """
    try:
        return open(path, mode, opener=_open_regular, **options)
    except OSError:
        raise
    except ValueError as e:  # a NUL in the path
        raise OSError(errno.EINVAL, first_line(e), path) from None


def _open_regular(path: str, flags: int) -> int:
    # without O_NONBLOCK a pipe blocks until it is written, or read
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def read_file(path: str, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises OSError."""
    with open_regular(path) as f:
        fits = os.fstat(f.fileno()).st_size <= limit
        content = f.read(limit + 1) if fits else b""
    if not fits or len(content) > limit:  # also of a file that grows, or whose size is not known
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", path)
    return content


def read_json(path: str):
    """Read a JSON file that any program may have written. Raises OSError or ValueError, see parse_json."""
    return parse_json(read_file(path, MAX_JSON))


def parse_json(content: bytes):
    """Parse JSON in UTF-8. Raises ValueError whose message is the problem.

    Besides malformed JSON it refuses NaN and Infinity, numbers beyond 64 bits or fp64, an object with a key
    twice, values nested deeper than MAX_DEPTH, and strings that are not Unicode or have control characters,
    except under the keys FREE_TEXT.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    check_json(value)
    return value


def _object(pairs: list) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {shown(max(keys, key=keys.count))} twice in one object")
    return value


def _constant(name: str):
    raise ValueError(f"it has the number {name}, which JSON does not have")


def check_json(value, name: str = "its value", depth: int = 0) -> None:
    """Raise ValueError for a value of JSON that `parse_json` refuses. name: key of the value."""
    if depth > MAX_DEPTH:
        raise ValueError("its values are nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            check_json(key, "a key", depth)
            check_json(item, key, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_json(item, name, depth + 1)
    elif isinstance(value, str):
        if not is_utf8(value):
            raise ValueError(f"{shown(name)} is not valid Unicode")
        if not value.isprintable() and name not in FREE_TEXT and _has_control(value):
            raise ValueError(f"{shown(name)} has control characters: {shown(value)}")
    elif type(value) is int and not -2**63 <= value < 2**63:
        raise ValueError(f"{shown(name)} is {shown(value)}, which does not fit into 64 bits")
    elif type(value) is float and not math.isfinite(value):
        raise ValueError(f"{shown(name)} is not a finite number")


def _has_control(text: str) -> bool:
    return any(unicodedata.category(c) == "Cc" and c not in "\n\t\r" for c in text)


@contextlib.contextmanager
def os_error_as_user_error(what: str):
    """Turn an OSError of the body into a UserError "what: reason"."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what}: {e.strerror or first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def made_folder(folder: str):
    """Make a folder and its parents. If the body fails, remove the new folders that are still empty."""
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
    """Return the folder if it exists, else its nearest parent that exists."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def decode_text(content: bytes, path: str, whole: bool = True) -> str:
    """Decode a user's text: UTF-8, without its byte-order mark, lines ended by newlines. Raises UserError.

    path: where the text is from, for error messages.
    whole: the text ends here. Otherwise its last character may be incomplete, and is left out.
    """
    start = content[:4096]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4 > 0:
        raise UserError(f"{path} is UTF-16, or no text at all, and texts are read as UTF-8: convert it with "
                        f"iconv -f UTF-16 -t UTF-8 {path} > utf8.txt")
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole)
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read {path}: byte {e.start} is not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def expand_path(path: str) -> str:
    """Return a path with the user's home in place of ~ at its beginning."""
    return os.path.expanduser(path)


def expand_paths(values: dict) -> dict:
    """Apply expand_path to strings and to those in lists."""
    return {name: [expand_path(v) if isinstance(v, str) else v for v in value] if isinstance(value, list)
            else expand_path(value) if isinstance(value, str) else value for name, value in values.items()}


def dataset_folder(name: str) -> str:
    """Return the folder of a data set: data/<name>, or the folder `name` if it is a path.

    A relative path starts in the current folder or, if there is no such folder, at the repository's root. The
    folder need not exist.
    """
    name = expand_path(name)
    name = name.rstrip(os.sep) or name
    folder = name if os.sep in name else os.path.join("data", name)
    in_root = os.path.join(ROOT, folder)
    return in_root if os.path.isdir(in_root) and not os.path.isdir(folder) else folder


def unused_path(stem: str, ending: str = "") -> str:
    """Return the first path that does not exist of stem + ending, stem_1 + ending, stem_2 + ending, ..."""
    path, n = stem + ending, 0
    while os.path.exists(path):
        n += 1
        path = f"{stem}_{n}{ending}"
    return path


def json_text(value) -> str:
    """Return the exact text that write_json writes."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: str, value) -> None:
    replace_file(path, json_text(value).encode())


def write_result(path: str, value) -> None:
    """Write a JSON file that the user asked for. Raises UserError."""
    try:
        write_json(path, value)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}: free space, or name another file") from None


def replace_file(path: str, content: bytes) -> None:
    """Replace a file atomically. Raises OSError, and then leaves the old file."""
    temporary = path + ".tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # never write through a link of that name
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
    """Download a URL. Raises UserError. otherwise: what to do without a network, for the error message."""
    import requests

    try:
        response = requests.get(url, timeout=60)
        response.raise_for_status()
    except requests.RequestException as e:
        raise UserError(f"could not download {url} ({type(e).__name__}): without a network, "
                        f"{otherwise}") from None
    return response.content


def is_utf8(text: str) -> bool:
    """Return True if a file name or argument is valid UTF-8.

    Python keeps bytes that are not valid as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest_file(path: str, ending: str, *folders: str) -> str:
    """Return a hint that names a file with a similar name, '' if none exists.

    path: file that was not found; its folder is searched.
    ending: of the names that count.
    folders: further folders to search.
    """
    there = {os.path.basename(found): found for folder in (os.path.dirname(path), *folders)
             for found in sorted(glob.glob(os.path.join(glob.escape(folder), "*" + ending)))}
    near = difflib.get_close_matches(os.path.basename(path), there, 1)
    return f"; did you mean {there[near[0]]}?" if near else ""


def check_can_write(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, if no file can be made in a folder. It need not exist yet."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is not a path"
        raise UserError(f"{setting}={path!r} cannot be a folder: {reason}; name another folder") from None
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or os.curdir
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone are not conclusive
            pass
    except OSError as e:
        raise UserError(f"{setting}={path!r}: cannot write in {folder}: {e.strerror}; name another "
                        f"folder") from None


def check_output_file(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, if a file cannot be written. Its folder must exist."""
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path):
        raise UserError(f"{setting}={path!r} is a folder: give the path of a file")
    if not os.path.isdir(folder):
        raise UserError(f"{setting}={path!r} is not the path of a file in an existing folder: make the "
                        f"folder first")
    check_can_write(folder, setting)
