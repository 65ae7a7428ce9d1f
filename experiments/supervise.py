"""Run a command so that nothing it started outlives who started it; for experiments/runner.py.

    python supervise.py REPORT SECONDS COMMAND...    # stdin: a pipe whose other end only the starter has

torchrun's workers run in sessions of their own, and a torchrun that is killed leaves them behind. So between
the runner and each torchrun there is this process. It ends the command and all its descendants when the
command ends, when it has run for SECONDS (0: no limit), when it gets SIGTERM, or when the pipe closes, which
the kernel does for a starter that was killed, too. Then it writes REPORT: {"code", "seconds", "ended_by"},
ended_by being 'itself', 'limit', 'signal' or 'starter'. Only the standard library: it starts in a moment.

On Linux it is the subreaper of its descendants, so those that lost their parent are still found.
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
    """Linux's prctl; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    if sys.platform != "linux":
        lines = subprocess.run(["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True).stdout
        rows = map(str.split, lines.splitlines())
        return {int(pid): int(parent) for pid, parent, state, *_ in rows if not state.startswith("Z")}
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:  # pid (name, in which all may be) state parent ...
                state, parent = f.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state not in (b"Z", b"X"):
            found[int(pid)] = int(parent)
    return found


def descendants() -> list[int]:
    """All that live of this process's children, their children and so on."""
    parent_of, found = parents(), {os.getpid()}
    while more := {pid for pid, parent in parent_of.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def reap() -> dict[int, int]:
    """Exit codes of the children that have ended, orphans that came to this process among them."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (result := os.waitpid(-1, os.WNOHANG))[0]:
            ended[result[0]] = os.waitstatus_to_exitcode(result[1])
    return ended


def end_all() -> dict[int, int]:
    """Ask all descendants to end, kill them after GRACE; what `reap` found meanwhile."""
    ended, number, until = reap(), signal.SIGTERM, time.monotonic() + GRACE
    asked = set()
    while left := descendants():
        if time.monotonic() > until:
            number, asked = signal.SIGKILL, set()
        for pid in set(left) - asked:  # asked once, killed until they are gone
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        asked |= set(left)
        time.sleep(0.02)
        ended |= reap()
    return ended | reap()


def supervise(command: list[str], limit: float) -> dict:
    """Run the command to its end, or to another; the report."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    started, ended_by, ended = time.monotonic(), "itself", {}
    # should even this process be killed, torchrun goes with it, and with torchrun nanoSync's workers
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
    os._exit(0)  # without the Popen that does not know that its process was reaped


if __name__ == "__main__":
    main()
