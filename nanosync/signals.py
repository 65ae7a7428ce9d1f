"""Signals as requests to stop."""

import os
import signal
import threading
import time


class StopSignal:
    """Handler that takes SIGINT, SIGTERM and SIGHUP as a request to stop at the next step.

    A second signal ends the process at once. A signal that is ignored, e.g. under nohup, stays ignored. A
    thread receives the signals, because the main thread may wait for processes that no longer respond.
    """

    installed = None
    # seconds; a system that shuts down sends SIGTERM to this process and to torchrun, which forwards it
    TOGETHER = 2.0

    def __init__(self):
        self.received, self._since = 0, 0.0
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._read, args=(reads,), name="signals", daemon=True).start()
        StopSignal.installed = self

    def _read(self, reads: int) -> None:
        while number := os.read(reads, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self.ask(number[0])

    def ask(self, number: int, again: bool = True) -> None:
        """Record a request. again: True if it ends the process when an earlier request exists."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif again and not (number == signal.SIGTERM and time.monotonic() - self._since < self.TOGETHER):
            os._exit(128 + number)
