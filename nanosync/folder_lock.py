"""The lock of a folder that one process writes to, and its children if they inherit the lock: LOCK."""

import os
import platform
import time

from nanosync.errors import UserError

RETRY = 0.1  # seconds


def lock_folder(folder: str, setting: str, make: bool = True, patience: float = 0.0) -> int | None:
    """Lock a folder until this process ends, however it ends, and all processes that inherit the lock.

    setting: the option that names the folder, for error messages; make: whether to make the folder and its
    LOCK, else only an existing LOCK is taken; patience: seconds to wait for another process. Returns the file
    descriptor that holds the lock, None if there is no LOCK to take. Raises UserError if another process
    holds it.
    """
    path = os.path.join(folder, "LOCK")
    try:
        if make:
            os.makedirs(folder, exist_ok=True)
        flags = os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        try:
            descriptor, writable = os.open(path, os.O_RDWR | flags, 0o666), True
        except PermissionError:  # another user's file, but that user's process may have ended
            descriptor, writable = os.open(path, os.O_RDONLY | os.O_NOFOLLOW), False
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"cannot open {path}: {e.strerror}") from None
    try:
        _acquire(descriptor, patience)
        if writable:
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode().ljust(80), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 80, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for it or end it, or name another "
                        f"--{setting}=...") from None
    except OSError as e:
        raise UserError(f"cannot lock {path} ({e.strerror}): {setting} needs a file system that has locks "
                        f"and room") from None
    return descriptor


def _acquire(descriptor: int, patience: float) -> None:
    """Lock an open file. Raises BlockingIOError if another process still holds the lock after `patience`
    seconds."""
    import fcntl

    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY)
