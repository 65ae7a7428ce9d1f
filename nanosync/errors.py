"""Errors that a user can fix, and the hook that ends a script on one with a line and exit code 2."""

import atexit
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Collection

before_exit = []  # functions to call when an error ends the process


class UserError(ValueError):
    """An error that the user can mend. Scripts print it as one line and exit with code 2."""


def install_error_hook(rank: int = 0, settings: Collection[str] = (), forks: bool = False) -> None:
    """End the process on a UserError, or when memory runs out, with one line on stderr and exit code 2, on
    Ctrl-C with one line and 130, silently where `| head` has closed the pipe; other errors keep their
    traceback.

    Most of these errors meet every rank. Rank 0 prints at once. The other ranks wait; the launcher, which
    sees rank 0 end, ends them meanwhile, unless the error was theirs alone.

    settings: names of the script's settings, to say which ones to change; forks: the script has arguments in
    place of settings, and forks workers itself or in a library, all of which get Ctrl-C as well.
    """
    previous = sys.excepthook
    atexit.register(_flush_stdout)
    if forks:
        _interrupt_main_process_only()

    def hook(kind, error, traceback):
        for function in before_exit:
            with contextlib.suppress(Exception):
                function()
        if forks and _follows_interrupt(error):
            _flush_stdout()
            os.write(2, b"interrupted\n")
            os._exit(130)  # threads of libraries must not delay the exit
        if issubclass(kind, BrokenPipeError) and _stdout_is_closed():
            os._exit(128 + 13)  # as SIGPIPE would have it
        text = _for_users(kind, error, settings)
        if text is None:
            return previous(kind, error, traceback)
        if rank != 0:
            time.sleep(3)
        who = "error" if rank == 0 else f"error on rank {rank}"
        _flush_stdout()
        # torch.distributed's own hook holds sys.stderr back; a file name need not be UTF-8
        os.write(2, f"{who}: {text}\n".encode(errors="backslashreplace"))
        # threads and process groups that still run must not delay the exit
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 2)

    sys.excepthook = hook


def _interrupt_main_process_only() -> None:
    """Ignore Ctrl-C in workers forked from here on: their parent ends them, and each would print a
    traceback."""
    process = os.getpid()

    def on_interrupt(signum, frame):
        if os.getpid() == process:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not in a background job
        signal.signal(signal.SIGINT, on_interrupt)


def _follows_interrupt(error: BaseException | None) -> bool:
    """Return True for Ctrl-C, and for an error that a library raised while it handled Ctrl-C, as `datasets`
    does with a time-out."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _flush_stdout() -> None:
    """What is still to be printed; where nobody reads it, nothing more is said."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _stdout_is_closed() -> bool:
    """Whether nobody reads any more what is printed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _for_users(kind: type, error: BaseException, settings: Collection[str]) -> str | None:
    """What to say of an error that the user can mend, None for any other."""
    if issubclass(kind, UserError):
        return str(error)
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted"
    # PyTorch's, known by name because it is not imported here: on a GPU, and on the CPU a RuntimeError
    if kind.__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        # of a step's sequences, device_batch_size are held at a time where there is such a setting
        sizes = ("device_batch_size", "sequence_length") if "device_batch_size" in settings else \
            ("batch_size", "block_size")
        smaller = " or ".join([*(name for name in sizes if name in settings), "model"])
        switches = [f"--{name}" for name in ("activation_checkpointing=block", "use_fsdp")
                    if name.partition("=")[0] in settings]
        others = f", or {' or '.join(switches)}" if switches else ""
        return f"out of memory: use a smaller {smaller}{others} ({str(error).splitlines()[0]})"
    return None
