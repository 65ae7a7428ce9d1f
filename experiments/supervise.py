"""Run a command and end all its processes with the process that started this one; for experiments/runner.py.

    python supervise.py REPORT SECONDS COMMAND...    # stdin: a pipe whose other end only the starter has

torchrun's workers run in separate sessions, and outlive a killed torchrun. So each command is a child of this
process, and this process a child of the runner. It ends the command and all descendants when the command
ends, after SECONDS (0: no limit), on SIGTERM, or when the pipe closes, as it also does when the starter is
killed. Then it writes REPORT: {"code", "seconds", "ended_by"}, where ended_by is 'itself', 'limit', 'signal'
or 'starter'. It imports only the standard library, to start quickly.

On Linux it is the subreaper of its descendants, so it also finds those whose parents have ended.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 1.5  # seconds between asking and killing
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Call prctl on Linux; do nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def parents() -> dict[int, int]:
    """Return the parent of each process that is not a zombie."""
    if sys.platform != "linux":
        lines = subprocess.run(["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
        rows = map(str.split, lines.splitlines())
        return {int(pid): int(parent) for pid, parent, state, *_ in rows if not state.startswith("Z")}
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:  # pid (name, of any characters) state parent ...
                state, parent = f.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state not in (b"Z", b"X"):
            found[int(pid)] = int(parent)
    return found


def descendants() -> list[int]:
    """Return all living descendants of this process."""
    parent_of, found = parents(), {os.getpid()}
    while more := {pid for pid, parent in parent_of.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def reap() -> dict[int, int]:
    """Return the exit codes of ended children, including adopted orphans."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            ended[result[0]] = os.waitstatus_to_exitcode(result[1])
    return ended


def end_all() -> dict[int, int]:
    """Send SIGTERM to all descendants, after GRACE SIGKILL; return the exit codes found meanwhile."""
    ended, number, until = reap(), signal.SIGTERM, time.monotonic() + GRACE
    asked = set()
    while left := descendants():
        if time.monotonic() > until:
            number, asked = signal.SIGKILL, set()
        for pid in set(left) - asked:  # SIGTERM once, SIGKILL until all have ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        asked |= set(left)
        time.sleep(0.02)
        ended |= reap()
    return ended | reap()


def supervise(command: list[str], limit: float) -> dict:
    """Run the command until it ends or must end; return the report."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    started, ended_by, ended = time.monotonic(), "itself", {}
    # if this process itself is killed, the kernel kills torchrun, and nanoSync's workers end after torchrun
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                             preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    while child.pid not in ended:
        if asked:
            ended_by = "signal"
        elif select.select([0], [], [], 0.05)[0] and not os.read(0, 1):
            ended_by = "starter"
        elif limit and time.monotonic() - started > limit:
            ended_by = "limit"
        if ended_by != "itself":
            break
        ended |= reap()
    ended |= end_all()
    return {"code": ended.get(child.pid), "seconds": time.monotonic() - started, "ended_by": ended_by}


def main() -> None:
    path, limit, *command = sys.argv[1:]
    report = supervise(command, float(limit))
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(report, f)
    os.replace(path + ".tmp", path)
    os._exit(0)  # skips Popen's clean-up, which does not know that the child was reaped


if __name__ == "__main__":
    main()
