"""Logging in a process of its own: a console that goes away, and wandb itself. CPU; seconds.

    python -m pytest tests/scripts/test_logging_processes.py
"""

import os
import subprocess
import sys

from helpers import PATIENCE, ROOT
from helpers import event_steps as steps
from helpers import logged_events as said

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
import time
from pathlib import Path
from helpers import wandb_run
wandb_run(Path("out"), 0, 4, mode="offline")
time.sleep(1.1)  # wandb names its folder by the second
wandb_run(Path("out"), 2, 6, resumed=2, mode="offline")
"""


def test_wandb_itself_offline(tmp_path):
    env = {name: value for name, value in os.environ.items() if "WANDB" not in name} | PATHS
    done = subprocess.run([sys.executable, "-c", WITH_WANDB], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stderr
    assert "Steps must be monotonically increasing" not in done.stderr
    name = (tmp_path / "out" / "wandb_id").read_text().strip()
    assert os.listdir(tmp_path) == ["out"]
    assert len(list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2
