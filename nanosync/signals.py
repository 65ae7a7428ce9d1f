"""Signals as requests to stop."""

import contextlib
import os
import select
import signal
import sys
import threading
import time


class StopSignal:
    """Handler that takes a signal as a request to stop at the next step, and answers it on stderr at once.

    A second signal ends the process at once. A signal that is ignored, e.g. under nohup, stays ignored. A
    thread receives the signals, because the main thread may wait for processes that no longer respond.

    All other threads that start from now on block the signals, and so do the child processes of these
    threads, because a child inherits the mask. `timeout`, Ctrl-C, torchrun and Slurm signal all processes of
    a run. A compile worker or a compiler that ended then would fail the run, or make it wait forever. SIGKILL
    ends such a child, SIGTERM does not.
    """

    # a scheduler sends a warning some time before the signal that ends a job, so a warning never ends it
    WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
    installed = None
    # A system that shuts down sends SIGTERM to this process and to torchrun, which forwards it. When a
    # terminal closes, its shell and then the kernel send SIGHUP.
    REPEATED, TOGETHER = (signal.SIGTERM, signal.SIGHUP), 2.0  # seconds

    def __init__(self, answer: str = ""):
        """Install the handlers. answer: line to print at the first request, '' to print nothing."""
        self.received, self._since, self._answer = 0, 0.0, answer
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        handled = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        for number in handled:
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._read, args=(reads, handled), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        end_compile_workers()  # those started before do not block the signals
        StopSignal.installed = self

    def _read(self, reads: int, handled: list[int]) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        while number := os.read(reads, 1):
            if number[0] in self.SIGNALS:
                self.ask(number[0])

    def ask(self, number: int, again: bool = True) -> None:
        """Record a request. again: True if it ends the process when an earlier request exists."""
        if number in self.WARNINGS and self.received:
            return
        if not self.received or self.received in self.WARNINGS:
            first, self.received, self._since = not self.received, number, time.monotonic()
            if first:
                self._print_answer()
        elif again and not (number in self.REPEATED and time.monotonic() - self._since < self.TOGETHER):
            os._exit(128 + number)

    def end(self) -> None:
        """Ignore further signals except SIGINT: nothing is left to save, and Python restores the signals'
        default actions, which end the process with an error, before it exits."""
        for number in self.SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _print_answer(self) -> None:
        """Print the answer, unless stderr is closed or does not take it now: a signal must not wait."""
        with contextlib.suppress(OSError, ValueError):
            if self._answer and select.select([], [2], [], 0)[1]:
                bar = b"\n" if os.isatty(2) else b""  # a bar may end in the middle of a line
                os.write(2, bar + self._answer.encode() + b"\n")


def answer_of(saves: bool) -> str:
    """Return the answer to the first request. saves: True if the run saves a checkpoint then."""
    return f"finishing this step, then {'saving' if saves else 'ending'}; again to end at once"


def end_compile_workers() -> None:
    """End the processes and threads in which PyTorch compiles; the next compilation starts new ones."""
    compiling = sys.modules.get("torch._inductor.async_compile")
    if compiling is not None:
        with contextlib.suppress(AttributeError):  # private names of PyTorch 2.11 to 2.13
            compiling.shutdown_compile_workers()
            compiling.AsyncCompile.pool.cache_clear()  # threads, which start C++ compilers


def status_after(error: BaseException, status: str) -> str:
    """Return the final status of a run that an error ends. status: the run's status before the error."""
    if status == "non_finite":
        return status
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
