"""The experiment runner, killed at random: nothing may go on without it, nothing that is done be done again.

    python tests/runner_kills.py --kills=10 [--seed=0]

Runs are a fake of train_gpt.py on two processes each, one of which ignores SIGTERM; two runs at a time under
torchrun. After each INT, TERM or KILL of the runner it counts the seconds until no process of theirs is left,
and resumes. tests/scripts/test_experiment_scripts.py does a part of it, with a launcher that imports nothing.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import Forked

ROOT = Path(__file__).resolve().parent.parent
RUNNER = str(ROOT / "experiments" / "run_nanogpt_experiment.py")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

FAKE = '''"""Says what train_gpt.py says, of a loss that is made up."""
import json, os, random, signal, sys, time

from configurator import configure  # which the runner has it find

num_iterations = 20  # steps
batch_size = 8  # not used
val_loss_every = 5
learning_rate: float = 0.1  # not used
effect = 0.0  # on the loss
step_seconds = 0.0
behaviours: dict | None = None  # what goes wrong, by seed
seed = 1
out_dir = "out"
config = configure(globals())

behaviour = (behaviours or {}).get(str(seed), "fine")
if behaviour == "refuse":
    sys.exit("error: no data set")
if int(os.environ.get("RANK", 0)):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(num_iterations * step_seconds)
    os._exit(0)
hold = os.path.join(os.path.dirname(__file__), f"hold_{num_iterations}")  # a file: these runs wait
while os.path.exists(hold):
    time.sleep(0.05)
os.makedirs(out_dir)
noise = 0.003 * random.Random(seed).gauss(0, 1)
log = open(os.path.join(out_dir, "run_1.jsonl"), "w", buffering=1)


def event(kind, **fields):
    log.write(json.dumps({"event": kind, "time": time.time(), **fields}) + "\\n")


def status(value, step):
    with open(os.path.join(out_dir, "status.json"), "w") as f:
        json.dump({"status": value, "step": step}, f)


event("start", config=config | ({"batch_size": 3} if behaviour == "other settings" else {}),
      environment={}, resumed=False)
status("running", 0)
last = 15 if behaviour == "stops early" else num_iterations
for step in range(last + 1):
    loss = 3.2 + 5 / (1 + step) + noise + effect
    clock = {"train_time_ms": 10.0 * step, "step_avg_ms": 10.0}
    if step:
        event("iter", step=step - 1, loss=loss, lr=0.1, norm=None, seconds=max(step_seconds, 1e-3),
              tokens_per_second=1.0, mfu=None, **clock)
    if step % val_loss_every == 0 or step == last:
        print(f"step:{step}/{num_iterations} val_loss:{loss:.4f}", flush=True)
        name = "valid_loss" if behaviour == "other format" else "val_loss"
        event("eval", step=step, train_loss=loss, lr=0.1, **clock,
              **{name: None if behaviour == "not finite" else loss})
    if behaviour == "crash" and step == 7:
        sys.stdout.buffer.write(b"\\x00\\x1b[2J\\xff\\n")
        raise RuntimeError("the GPU has fallen off the bus")
    time.sleep(step_seconds)
status("non_finite" if behaviour == "diverged" else "finished", last)
'''


def write_experiment(folder: Path, name: str = "fake", stage: str = "stage_a_screening", n_gpus: int = 1,
                     steps: int = 20, **hyperparameters) -> Path:
    """An experiment's JSON, and the script that it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fake_train.py").write_text(FAKE)
    config = {"experiment_name": name, "description": "", "script": str(folder / "fake_train.py"),
              "stage": stage, "n_gpus": n_gpus, "base_seed": 42, "target_val_loss": 3.46,
              "modification_type": "none", "modification_details": {},
              "stage_config": {"num_iterations": steps, "batch_size": 8}, "hyperparameters": hyperparameters,
              "baseline_val_loss": None, "baseline_std": None}
    path = folder / f"{name}_{stage}.json"
    path.write_text(json.dumps(config))
    return path


LAUNCHER = """import os, signal, subprocess, sys

count = int(next(arg for arg in sys.argv if arg.startswith("--nproc_per_node=")).split("=")[1])
command = [sys.executable, *sys.argv[sys.argv.index("--") + 1:]]
workers = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}, start_new_session=True)
           for rank in range(count)]
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [worker.send_signal(number) for worker in workers])
sys.exit(any([worker.wait() for worker in workers]))
"""


def write_launcher(folder: Path) -> dict[str, str]:
    """Write a package that stands for torchrun, whose import takes seconds; return the environment with it.

    As under torchrun, workers have sessions of their own and get the launcher's signals.
    """
    package = folder / "launcher" / "torch" / "distributed"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").write_text(  # for python -m; all others get PyTorch
        "import sys\n"
        "if sys.argv[0] != '-m':\n"
        f"    sys.path.remove({str(folder / 'launcher')!r})\n"
        "    del sys.modules['torch']\n"
        "    import torch\n")
    (package / "run.py").write_text(LAUNCHER)
    return {"PYTHONPATH": str(folder / "launcher"), "OMP_NUM_THREADS": "1"}


def processes_of(folder: Path) -> list[int]:
    """Those that have the folder in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{folder}/".encode() in Path("/proc", pid, "cmdline").read_bytes():
                found.append(int(pid))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_for_the_end(folder: Path, seconds: float = 600) -> None:
    """Wait until no process of the runs in a folder is left. A runner waits for a few seconds only."""
    logs, end = folder.resolve() / "experiment_logs", time.monotonic() + seconds
    while left := processes_of(logs):
        assert time.monotonic() < end, f"{len(left)} processes are left"
        time.sleep(0.02)


def start(folder: Path, *args: str, env: dict[str, str], command: bool) -> Forked | subprocess.Popen:
    """Start the runner in `folder`, as the command that users type or, for time, as a forked process."""
    if not command:
        return Forked(1, RUNNER, [*args, "--parallel=2"], str(folder / "printed"), env)
    return subprocess.Popen([sys.executable, RUNNER, *args, "--parallel=2"], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def results(folder: Path) -> dict[int, dict]:
    """Read the results of the only experiment in a folder, by run_id."""
    lines = next((folder / "experiment_logs").iterdir()) / "results.jsonl"
    rows = map(json.loads, lines.read_text().splitlines() if lines.exists() else [])
    return {row["run_id"]: row for row in rows}


def kill_once(folder: Path, args: tuple[str, ...], number: int, after: float, **options) -> dict:
    """Start, wait for both runs to have workers, kill some seconds later, wait for all to be gone."""
    runner = start(folder, *args, **options)
    logs = folder.resolve() / "experiment_logs"
    while len(processes_of(logs)) < 4 and runner.poll() is None:  # supervisors and torchruns at least
        time.sleep(0.05)
    time.sleep(after)
    at_most = len(processes_of(logs))
    runner.send_signal(number)
    killed = time.monotonic()
    while (left := processes_of(logs) or runner.poll() is None) and time.monotonic() < killed + 600:
        time.sleep(0.02)
    code = runner.wait(600)
    return {"signal": signal.Signals(number).name, "after": round(after, 2), "processes": at_most,
            "seconds": round(time.monotonic() - killed, 2), "left": len(processes_of(logs)) if left else 0,
            "code": code}


def campaign(folder: Path, kills: int, seed: int, longest: float = 8.0, command: bool = True) -> list[dict]:
    """As many kills of one experiment, then its end; what happened. Raises AssertionError.

    command: start the runner and torchrun as users do; otherwise fork the runner and use the launcher of
    write_launcher, for time.
    """
    numbers = random.Random(seed)
    options = {"command": command, "env": {} if command else write_launcher(folder)}
    config = write_experiment(folder, n_gpus=2, steps=20, step_seconds=0.1)
    n_runs, cases, done = kills + 1, [], {}
    args = ("--config", str(config), f"--n_runs={n_runs}")
    for i in range(kills):
        cases.append(kill_once(folder, args, SIGNALS[i % 3], numbers.uniform(0, longest), **options))
        args = ("--resume", str(next((folder / "experiment_logs").iterdir())))
        now = results(folder)
        assert all(now[run_id] == row for run_id, row in done.items()), "what was done was done again"
        done = now
        cases[-1]["done"] = len(done)
    assert start(folder, *args, **options).wait(1200) == 0
    now = results(folder)
    assert sorted(now) == list(range(n_runs)) and all(row["success"] for row in now.values()), now
    assert all(now[run_id] == row for run_id, row in done.items()), "what was done was done again"
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = campaign(Path(folder), args.kills, args.seed)
    for case in cases:
        print(json.dumps(case))
    late = [case for case in cases if case["left"] or case["seconds"] > 5]
    print(f"{len(cases)} kills: {len(late)} left a process for more than 5 s; the slowest took "
          f"{max(case['seconds'] for case in cases):.2f} s; re-running did only what was missing")
    sys.exit(bool(late))


if __name__ == "__main__":
    main()
