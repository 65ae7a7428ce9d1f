"""Files and folders: written whole or not at all, checked before use, read within bounds."""

import contextlib
import difflib
import glob
import hashlib
import json
import os
import tempfile

from nanosync.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the repository


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


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


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


def is_utf8(text: str) -> bool:
    """False for a file name or argument with bytes that are not, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest_file(path: str, ending: str, *folders: str) -> str:
    """A hint, if there is one, at the file of a similar name in the same folder or in others."""
    there = {os.path.basename(found): found for folder in (os.path.dirname(path), *folders)
             for found in sorted(glob.glob(os.path.join(glob.escape(folder), "*" + ending)))}
    near = difflib.get_close_matches(os.path.basename(path), there, 1)
    return f"; did you mean {there[near[0]]}?" if near else ""


def check_can_write(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, unless files can be made in a folder, which need not exist yet."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is no path"
        raise UserError(f"{setting}={path!r} cannot be a folder: {reason}") from None
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or os.curdir
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell
            pass
    except OSError as e:
        raise UserError(f"{setting}={path!r}: cannot write in {folder}: {e.strerror}; name another "
                        f"folder") from None


def check_output_file(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, unless a file can be written there; its folder must exist."""
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UserError(f"{setting}={path!r} names no file in a folder that is there: make the folder first")
    check_can_write(folder, setting)
