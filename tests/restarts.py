"""Kill one of two ranks under `torchrun --max-restarts=3` at a random moment: the run must end as without.

    python tests/restarts.py --kills=10 [--seed=0]

A run is killed once, or as often as --per_run says, and compared with an unbroken run: weights, moments and
random states of its last checkpoint bit for bit, every loss to the last bit, and each step once in log.txt.
tests/processes/test_killed_ranks.py does a part of it.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from long_runs import ROOT, SETTINGS, STEPS, Forked, finish, left_behind, losses, same, write_shards

RESTARTS = "--max-restarts=3"


def start(data: Path, out_dir: Path, *args: str, command: bool) -> Forked | subprocess.Popen:
    """Start a new run on two processes under torchrun, which restarts them up to three times.

    command: start the command as a user types it; otherwise fork the processes, for time.
    """
    args, output = [f"--dataset={data}", f"--out_dir={out_dir}", *SETTINGS, *args], f"{out_dir}.txt"
    if not command:
        return Forked(2, "train.py", args, output, {}, launcher=(RESTARTS,))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", RESTARTS]
    with open(output, "ab") as file:
        return subprocess.Popen([*launcher, "--", str(ROOT / "train.py"), *args], stdout=file,
                                stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def kill_a_rank(launcher: Forked | subprocess.Popen, out_dir: Path, rank: int, after: int,
                saved: bool = False) -> int | None:
    """kill -9 a rank once so many updates are done; return the updates then done, None if the run ended.

    saved: also wait for a checkpoint, which is written beside the training.
    """
    end = time.monotonic() + 600
    while launcher.poll() is None and time.monotonic() < end:
        done = len(losses(out_dir))
        workers = sorted(pid for pid in left_behind(out_dir) if pid != launcher.pid)
        if done >= after and len(workers) == 2 and (not saved or list(out_dir.glob("ckpt/step-*"))):
            os.kill(workers[rank], signal.SIGKILL)
            return done
        time.sleep(0.01)
    return None


def repeated_lines(out_dir: Path) -> list[str]:
    """Return the beginnings of lines of steps and epochs that log.txt has more than once."""
    text = (out_dir / "log.txt").read_text()
    pattern = r"^(?:iter \d+:|step \d+: [a-z]+|(?:Completed|Starting) epoch \d+)"
    found = re.findall(pattern, text, re.MULTILINE)
    return sorted({line for line in found if found.count(line) > 1})


def kill_and_compare(data: Path, out_dir: Path, reference: Path, kills: list[tuple[int, int]],
                     *args: str, command: bool = False, saved: bool = False) -> dict:
    """Kill ranks of a run, (rank, updates done before) each; return what happened. saved: see kill_a_rank."""
    launcher = start(data, out_dir, *args, command=command)
    reached = [kill_a_rank(launcher, out_dir, *kill, saved=saved) for kill in kills]
    code = launcher.wait(1200)
    archived = [entry.name for entry in out_dir.glob("earlier-*")]
    repeated = repeated_lines(out_dir)
    ok = code == 0 and None not in reached and not archived and not repeated and same(out_dir, reference)
    return {"ranks": [rank for rank, _ in kills], "killed_at": reached, "code": code, "archived": archived,
            "repeated": repeated, "same": code == 0 and same(out_dir, reference), "ok": ok}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="runs that are killed")
    parser.add_argument("--per_run", type=int, default=1, help="kills of a run, at most 3")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    numbers = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, failed = write_shards(Path(folder, "data")), 0
        reference = Path(folder, "reference")
        assert finish(data, reference, processes=2) == 0
        for i in range(args.kills):
            moments = sorted(numbers.randrange(STEPS - 2) for _ in range(args.per_run))
            kills = [(numbers.randrange(2), moment) for moment in moments]
            case = kill_and_compare(data, Path(folder, f"run{i}"), reference, kills, command=True)
            failed += not case["ok"]
            print(json.dumps(case), flush=True)
            if not case["ok"]:
                print(Path(folder, f"run{i}.txt").read_text()[-3000:])
    print(f"{args.kills} runs, {failed} that differ from the unbroken run")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
