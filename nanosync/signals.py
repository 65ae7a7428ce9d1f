"""Signals as requests to end in order."""

import os
import signal
import threading
import time


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP as a request to end in order, at the next step; a second one ends the
    process at once. What is ignored, as by nohup, stays so.

    A thread receives them: the main one may be waiting for processes that no longer answer.
    """

    installed = None
    TOGETHER = 2.0  # seconds; who ends a machine sends SIGTERM to us and to torchrun, which passes it on

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
        """Note a request; again: whether it counts as a second one if there is a first."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif again and not (number == signal.SIGTERM and time.monotonic() - self._since < self.TOGETHER):
            os._exit(128 + number)
