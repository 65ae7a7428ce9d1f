"""Logging in a process of its own: a console that goes away, and wandb itself. CPU; seconds.

    python -m pytest tests/scripts/test_logging_processes.py
"""

import os
import signal
import subprocess
import sys

from helpers import PATIENCE, ROOT
from helpers import event_steps as steps
from helpers import logged_events as said

from nanosync.wandb_files import records

PATHS = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}

SAY_MUCH = """
import sys
from helpers import log_a_run
log_a_run("out", 0, 3000)
print("what others print", flush=True)
print("said", file=sys.stderr)
"""


def test_a_console_that_goes_away(tmp_path):
    """As with `| head -n1`, and with more to say than a pipe holds."""
    with subprocess.Popen([sys.executable, "-c", SAY_MUCH], cwd=tmp_path, env=os.environ | PATHS,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("step 0: train loss")
        process.stdout.close()
        assert process.stderr.read() == "said\n"
    assert process.returncode == 0
    assert steps(said(tmp_path / "out"))[-1] == ("end", 3000)


WITH_WANDB = """
import os, signal, sys
from pathlib import Path
from helpers import wandb_run
from nanosync.training_logger import TrainingLogger
if sys.argv[1] == "killed":
    TrainingLogger.close = lambda log, **summary: os.kill(os.getpid(), signal.SIGKILL)
    wandb_run(Path("out"), 0, 40, mode="offline")
wandb_run(Path("out"), 30, 50, resumed=30, mode="offline")
"""


def wandb_steps(out):
    """Return the steps in all .wandb files of an out_dir."""
    from wandb.proto.wandb_internal_pb2 import Record

    read = [Record.FromString(data) for path in sorted(out.glob("wandb/offline-run-*/*.wandb"))
            for data in records(str(path))]
    return [record.history.step.num for record in read if record.HasField("history")]


def test_wandb_itself_offline(tmp_path):
    """A run is killed with steps that wandb has not written. The resumed run writes them."""
    env = {name: value for name, value in os.environ.items() if "WANDB" not in name} | PATHS
    for what, code in (("killed", -signal.SIGKILL), ("resumed", 0)):
        done = subprocess.run([sys.executable, "-c", WITH_WANDB, what], cwd=tmp_path, env=env, text=True,
                              capture_output=True, timeout=PATIENCE)
        assert done.returncode == code and "warning" not in done.stdout, done.stderr
        assert "Steps must be monotonically increasing" not in done.stderr
    name = (tmp_path / "out" / "wandb_id").read_text().strip()
    assert os.listdir(tmp_path) == ["out"]
    assert len(list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2
    assert sorted(wandb_steps(tmp_path / "out")) == list(range(50))
