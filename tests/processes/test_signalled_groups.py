"""A signal to all processes of a run, as `timeout`, Ctrl-C and Slurm send it: children that the run needs go
on, and end with it. Real processes; about ten seconds.

    python -m pytest tests/processes/test_signalled_groups.py
"""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import PATIENCE, ROOT

SCRIPT = """
import os, signal, subprocess, sys, time
from nanosync.signals import StopSignal
from torch._inductor.async_compile import AsyncCompile

early, number = sys.argv[1] == "early", int(sys.argv[2])
signal.signal(number, signal.SIG_DFL)  # also in tests under nohup, which ignores SIGHUP
if early:  # a pool and a thread that do not block the signals
    AsyncCompile.process_pool().submit(abs, -1).result()
    AsyncCompile.pool().submit(abs, -1).result()
stop = StopSignal()
pool, threads = AsyncCompile.process_pool(), AsyncCompile.pool()
assert pool.submit(abs, -1).result() == 1  # the workers have started
work = pool.submit(time.sleep, 0.5)
compilers = [subprocess.Popen(["sleep", "0.5"]), threads.submit(subprocess.Popen, ["sleep", "0.5"]).result()]
os.killpg(0, number)
assert work.result() is None and pool.submit(abs, -2).result() == 2
assert [compiler.wait() for compiler in compilers] == [0, 0] and stop.received == number
print("done", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def group_of(leader: int) -> list[str]:
    """Processes of a group that are not zombies."""
    lines = subprocess.run(["ps", "-Ao", "pgid=,stat=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()]
    return [row[-1] for row in rows if int(row[0]) == leader and not row[1].startswith("Z")]


@pytest.mark.parametrize("start_method, when, number", [
    ("subprocess", "early", signal.SIGTERM), ("fork", "late", signal.SIGHUP)])
def test_compile_workers_survive_a_signal_to_the_group_and_end_with_the_run(start_method, when, number):
    """Workers of torch.compile, and compilers that it starts; their parent is killed at the end."""
    env = os.environ | {"TORCHINDUCTOR_WORKER_START": start_method, "TORCHINDUCTOR_COMPILE_THREADS": "2",
                        "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, when, str(int(number))], cwd=ROOT, env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = run.communicate(timeout=PATIENCE) if start_method == "subprocess" else \
            (run.stdout.readline(), "")  # workers that are forked hold the pipe until they notice
        assert out == "done\n", err
        end = time.monotonic() + PATIENCE
        while start_method == "subprocess" and group_of(run.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert start_method == "fork" or group_of(run.pid) == []  # a forked worker looks once a minute
    finally:
        if group_of(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


LAUNCHER = """
import os, subprocess, sys
ranks = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
child = "from nanosync.distributed import start; start('cpu', timeout_seconds=600)"
subprocess.run([sys.executable, "-c", child], env=os.environ | ranks)
"""


def test_a_launcher_that_is_killed_before_the_processes_met():
    """Rank 1 waits for rank 0, which never starts."""
    with socket.create_server(("127.0.0.1", 0)) as rank_0:  # answers nothing
        rank_0.settimeout(PATIENCE)
        launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(rank_0.getsockname()[1])], cwd=ROOT,
                                    start_new_session=True)
        try:
            connection, _ = rank_0.accept()
            assert len(group_of(launcher.pid)) == 2
            launcher.kill()
            launcher.wait()
            end = time.monotonic() + PATIENCE
            while group_of(launcher.pid) and time.monotonic() < end:
                time.sleep(0.05)
            assert group_of(launcher.pid) == []
            connection.close()
        finally:
            if group_of(launcher.pid):
                os.killpg(launcher.pid, signal.SIGKILL)
