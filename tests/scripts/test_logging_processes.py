"""Logging in a process of its own: a console that goes away, and wandb itself. CPU; seconds.

    python -m pytest tests/scripts/test_logging_processes.py
"""

import os
import signal

from helpers import PATIENCE, Forked, python
from helpers import event_steps as steps
from helpers import logged_events as said

from nanosync.wandb_files import records

SAY_MUCH = """
import sys
from helpers import log_a_run
log_a_run("out", 0, 3000)
print("what others print", flush=True)
open("said", "w").write("said")
"""


def test_a_console_that_goes_away(tmp_path):
    """As with `| head -n1`, and with more to say than a pipe holds."""
    (tmp_path / "say_much.py").write_text(SAY_MUCH)
    os.mkfifo(tmp_path / "console")
    process = Forked(1, str(tmp_path / "say_much.py"), [], str(tmp_path / "console"), {})
    with open(tmp_path / "console") as console:
        assert console.readline().startswith("step 0: train loss")
    assert process.wait(PATIENCE) == 0 and (tmp_path / "said").read_text() == "said"
    assert steps(said(tmp_path / "out"))[-1] == ("end", 3000)


WITH_WANDB = """
import os, signal, sys
from pathlib import Path
for name in [name for name in os.environ if "WANDB" in name]:
    del os.environ[name]
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
    script, folder = tmp_path / "with_wandb.py", tmp_path / "run"
    script.write_text(WITH_WANDB)
    folder.mkdir()
    for what, code in (("killed", -signal.SIGKILL), ("resumed", 0)):
        done = python(str(script), what, cwd=folder)
        assert done.code == code and "warning" not in done.out, done.err
        assert "Steps must be monotonically increasing" not in done.err
    name = (folder / "out" / "wandb_id").read_text().strip()
    assert os.listdir(folder) == ["out"]
    assert len(list((folder / "out" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2
    assert sorted(wandb_steps(folder / "out")) == list(range(50))
