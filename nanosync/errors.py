"""Errors that a user can fix, and the hooks that end a script on them with one line and an exit code."""

import atexit
import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Collection
from traceback import format_exception

before_exit = []  # functions of the error, to call when an error ends the process
memory_owners = []  # at most one function that returns owner -> bytes, see memory.py
ACTIVATIONS = "activations and temporary tensors"  # the owner of what no other owner has

# Modules of the packages in requirements-extras.txt that scripts import
EXTRAS = ("datasets", "huggingface_hub", "matplotlib", "pyarrow", "requests", "scipy", "tensorboard",
          "tiktoken", "tokenizers", "transformers", "wandb")


MAX_MESSAGE = 2000  # characters of an error's line


class UserError(ValueError):
    """An error that the user can fix. Scripts print it as one line and exit with code 2."""


def shown(value, limit: int = 80) -> str:
    """Return the repr of a value for an error message, shortened to about `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or a deeply nested value
        text = f"<{type(value).__name__}>"
    return shortened(text, limit)


def shortened(text: str, limit: int) -> str:
    """Return a text without its middle if it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit * 2 // 3]}...{text[-limit // 4:]}"


def one_line(text: str) -> str:
    """Return an error message as one printable line of at most about MAX_MESSAGE characters."""
    text = "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)
    return shortened(text, MAX_MESSAGE)


def install_error_hook(rank: int = 0, settings: Collection[str] = (), forks: bool = False) -> None:
    """Install the hook that ends the process on an error that the user can fix.

    On a UserError, when one of the extras is not installed and when memory runs out, the process prints one
    line on stderr and exits with code 2. On Ctrl-C it prints one line and exits with 130. If `| head` closed
    stdout it exits silently. Other errors keep their traceback.

    Most errors occur on every process. Rank 0 prints at once. The other processes wait, and the launcher ends
    them when rank 0 has exited. So they print only an error that rank 0 does not have. torchrun repeats the
    error at the end of its report.

    From here on stdout escapes characters that its encoding lacks, e.g. those of a path.

    rank: global rank of this process.
    settings: names of the script's settings, for hints.
    forks: True for a script that has arguments in place of settings. It forks workers, or a library does, and
    all of them get Ctrl-C as well.
    """
    previous = sys.excepthook
    _open_closed_streams()
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(_flush_stdout)
    if forks:
        _interrupt_main_process_only()

    def hook(kind, error, traceback):
        for function in before_exit:
            with contextlib.suppress(Exception):
                function(error)
        if forks and _follows_interrupt(error):
            _flush_stdout()
            os.write(2, b"interrupted\n")
            os._exit(130)  # threads of libraries must not delay the exit
        if issubclass(kind, BrokenPipeError) and _stdout_is_closed():
            os._exit(128 + 13)  # the exit code of SIGPIPE
        text = _message_for_user(kind, error, settings)
        if text is None:
            _tell_launcher("".join(format_exception(kind, error, traceback)).rstrip())
            return previous(kind, error, traceback)
        if rank != 0:
            time.sleep(3)
        label = "error" if rank == 0 else f"error on rank {rank}"
        _flush_stdout()
        # not sys.stderr, which torch.distributed's hook delays; a file name need not be UTF-8
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"{label}: {one_line(text)}\n".encode(errors="backslashreplace"))
        _tell_launcher(f"{label}: {one_line(text)}")
        # running threads and process groups must not delay the exit
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 2)

    sys.excepthook = hook


def _tell_launcher(text: str) -> None:
    """Write an error to the file that torchrun prints at the end of its report, if torchrun started us."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # the format of torch.distributed.elastic, whose import takes seconds
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as f:
            json.dump({"message": {"message": text, "extraInfo": details}}, f)


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


def _open_closed_streams() -> None:
    """Open /dev/null in place of each standard stream that was closed when the process started, as by `>&-`.

    Python has None in place of such a stream. The next file that the process opens would get the stream's
    descriptor, and with it the output of libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, the stream's
            os.set_inheritable(nowhere, True)
            setattr(sys, name, os.fdopen(nowhere, mode))


def _flush_stdout() -> None:
    """Flush stdout. If its reader is gone, discard all later output."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def exit_now() -> None:
    """Exit with code 0 and without the interpreter's teardown, which takes seconds after a compilation."""
    _flush_stdout()
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        sys.stderr.flush()
    os._exit(0)


def _stdout_is_closed() -> bool:
    """Return True if the reader of stdout is gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _message_for_user(kind: type, error: BaseException, settings: Collection[str]) -> str | None:
    """Return the message of an error that the user can fix, None for any other error."""
    if issubclass(kind, UserError):
        return str(error)
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in EXTRAS:
        return f"{error.name} is not installed: pip install -r requirements-extras.txt"
    # by name, because PyTorch is not imported here; on a CPU PyTorch raises a RuntimeError
    if issubclass(kind, MemoryError) or kind.__name__ == "OutOfMemoryError" \
            or "DefaultCPUAllocator" in str(error):
        return _out_of_memory((str(error).splitlines() or [kind.__name__])[0], settings)
    return None


def _out_of_memory(reason: str, settings: Collection[str]) -> str:
    """Return the message for an error without memory: what to set, first what helps the largest owner."""
    owners = {}
    with contextlib.suppress(Exception):  # a report must not hide the error
        owners = {name: size for name, size in memory_owners[0]().items() if size}
    # a script with device_batch_size has only so many sequences in memory at a time
    smaller = ["device_batch_size", "sequence_length"] if "device_batch_size" in settings else \
        ["batch_size", "block_size"]
    smaller, switches = [*smaller, "model"], ["activation_checkpointing=block", "use_fsdp"]
    if ACTIVATIONS in owners and next(iter(owners)) != ACTIVATIONS:  # the model and its state are largest
        smaller, switches = ["model", *smaller[:-1]], ["use_fsdp", "use_zero1", *switches[:1]]
    smaller = [name for name in smaller if name in settings or name == "model"]
    switches = [f"--{name}" for name in switches if name.partition("=")[0] in settings]
    others = f", or {' or '.join(switches)}" if switches else ""
    held = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in owners.items())
    return f"out of memory: use a smaller {' or '.join(smaller)}{others} ({reason})" + \
        f"; {'at the peak' if ACTIVATIONS in owners else 'in memory'}: {held}" * bool(held)
