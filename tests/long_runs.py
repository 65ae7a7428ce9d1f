"""Runs that are killed, asked to end, or find their checkpoints damaged, and go on: nothing may be lost.

    python tests/long_runs.py                     # the campaign: about half an hour on 2 cores
    python tests/long_runs.py --kills=2 --signals=2 --damages=20 --json=figures.json

Every run is compared with one that nothing happened to: the last checkpoint's tensors by SHA-256, every
loss to the last bit. tests/processes/test_long_runs.py does a part of it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import Forked, losses, newest, python, torchrun  # noqa: E402

from nanosync import checkpoint, checkpoint_writer  # noqa: E402
from nanosync.run_log import read_log  # noqa: E402

STEPS, SAVE_EVERY = 30, 5
TOKENS = 409  # of a shard
POINTS = [point for point in checkpoint_writer.POINTS if point != "moved aside"]  # needs a step saved twice
SETTINGS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=2", "--device=cpu",
            "--gradient_accumulation_steps=4", "--compile=False", "--eval_iters=4", "--eval_interval=10",
            "--warmup_iters=2", f"--lr_decay_iters={STEPS}", "--dropout=0.1", f"--max_iters={STEPS}",
            f"--checkpoint_interval={SAVE_EVERY}"]
KINDS = {"gpt": [], "spd": ["--model_type=distributed_gpt", "--tp_size=2", "--block_types=['spd']*2"]}
KINDS["tp"] = [*KINDS["spd"], "--tp_processes=2"]


def write_shards(folder: Path) -> Path:
    """Four shards, of which an epoch has 100 windows of 17 tokens: 30 steps of 8 are 2.4 epochs."""
    folder.mkdir(parents=True)
    numbers = np.random.RandomState(7)
    n = 4 * TOKENS + 600
    tokens = ((np.arange(n) * 3 + numbers.randint(0, 2, n)) % 26).astype("<u2")
    parts = {f"x_train_{i:06d}.bin": tokens[i * TOKENS:(i + 1) * TOKENS] for i in range(4)} | {
        "x_val_000000.bin": tokens[4 * TOKENS:]}
    for name, part in parts.items():
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / name).write_bytes(header.tobytes() + part.tobytes())
    chars = "".join(map(chr, range(ord("A"), ord("Z") + 1)))
    (folder / "meta.json").write_text(json.dumps(
        {"vocab_size": 26, "tokenizer": "char", "chars": chars, "dtype": "uint16"}))
    return folder


HOLDS = {  # config files: where a run waits until it is asked to stop, however busy the machine is
    "update": """import os, time
from nanosync.run import Run as _Run
_iteration = _Run.iteration


def _hold(run, *args, **fields):
    _iteration(run, *args, **fields)
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    while run.step == {step} and first_start and not run.signals.received:
        time.sleep(0.01)


_Run.iteration = _hold
""",
    "evaluation": """import math, time
from nanosync.run import Run as _Run
from nanosync.signals import StopSignal as _StopSignal
_stop_anywhere, _ask, _requests = _Run.stop_anywhere, _StopSignal.ask, []


def _hold(run):
    while run.step == {step} and len(_requests) < 2:
        time.sleep(0.01)
    return _stop_anywhere(run)


def _count(stop, number, *args):
    _ask(stop, number, *args)
    _requests.append(number)


_Run.stop_anywhere, _StopSignal.ask, _StopSignal.TOGETHER = _hold, _count, math.inf
"""}


def hold(folder: Path, where: str, step: int) -> str:
    """Write a config file; return its path. where: "update", after update `step` of the first start, until
    the first request to stop; "evaluation", in that of `step`, until the second."""
    path = folder / f"hold_{where}.py"
    path.write_text(HOLDS[where].format(step=step))
    return str(path)


class Run:
    """A training run in a process, or under torchrun in several, to which signals can be sent."""

    def __init__(self, data: Path, out_dir: Path, *args: str, processes: int = 1, command: bool = False,
                 **env: str):
        """Start. command: start the command as a user types it. Otherwise fork the processes, for time: each
        process of the command imports for seconds."""
        args = [f"--dataset={data}", f"--out_dir={out_dir}", *SETTINGS, *args]
        self.out_dir, self.output = out_dir, open(f"{out_dir}.txt", "ab")
        if command:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
            self.process = subprocess.Popen(
                [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "train.py"), *args],
                stdout=self.output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
        else:
            self.process = Forked(processes, "train.py", args, self.output.name, env)

    def wait(self, timeout: float = 1200) -> int:
        code = self.process.wait(timeout)
        self.output.close()
        return code

    def done(self) -> int:
        """Updates that the log tells of so far."""
        return len(losses(self.out_dir))

    def wait_for(self, n: int, timeout: float = 600) -> None:
        """Until so many updates are done."""
        end = time.monotonic() + timeout
        while self.done() < n and self.process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.out_dir}: {self.done()} updates after {timeout} s")
            time.sleep(0.02)


def evaluations(out_dir: Path) -> list[tuple]:
    events = read_log(str(out_dir))
    return [(e["step"], e["train_loss"], e["val_loss"]) for e in events if e["event"] == "eval"]


def left_behind(out_dir: Path) -> list[int]:
    """Processes of a run that are still there: those that print into the file beside its out_dir."""
    found, output = [], os.path.realpath(f"{out_dir}.txt")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/fd/1") == output:
                found.append(int(pid))
        except OSError:
            continue
    return found


def same(out_dir: Path, reference: Path) -> bool:
    """Return True if two finished runs are the same, bit for bit."""
    return (newest(out_dir) == newest(reference) and losses(out_dir) == losses(reference)
            and evaluations(out_dir) == evaluations(reference))


def finish(data: Path, out_dir: Path, *args: str, processes: int = 1, **env: str) -> int:
    """A run to which nothing is done from outside, in processes that are forked, for time; the exit code."""
    command = ["train.py", f"--dataset={data}", f"--out_dir={out_dir}", *SETTINGS, *args]
    if processes > 1:
        done = torchrun(processes, *command, cwd=out_dir.parent, **env)
    else:
        done = python(*command, cwd=out_dir.parent, **env)
    with open(f"{out_dir}.txt", "a") as f:
        f.write(done.out + done.err)
    return done.code


def go_on(data: Path, out_dir: Path, *args: str, **options) -> int:
    """Resume to the end; the exit code."""
    return finish(data, out_dir, "--resume=latest", *args, **options)


def kill_and_resume(data: Path, out_dir: Path, reference: Path, *args: str, point: str | None = None,
                    after: float = 0.0, **options) -> dict:
    """kill -9 at a named point of saving step 20, or so many seconds after the first update; then resume."""
    if point is None:
        run = Run(data, out_dir, *args, command=True, **options)
        run.wait_for(SAVE_EVERY + 1)  # before there is a checkpoint, nothing can be resumed
        time.sleep(after)
        run.process.kill()
        run.wait()
    else:
        finish(data, out_dir, *args, **options, NANOSYNC_KILL_AT=f"{point}@20")
    reached = max(losses(out_dir), default=-1) + 1
    saved = newest(out_dir)["step"]
    code = go_on(data, out_dir, *args, **options)
    return {"what": point or f"{after:.2f} s after the first updates", "updates_done": reached,
            "saved": saved, "lost": reached - saved, "ok": code == 0 and reached - saved <= 2 * SAVE_EVERY
            and same(out_dir, reference)}


def signal_and_resume(data: Path, out_dir: Path, reference: Path, number: int, after: int, delay: float,
                      *args: str, processes: int = 2, command: bool = True) -> dict:
    """SIGINT or SIGTERM to the launcher after so many updates and some seconds; then resume."""
    run = Run(data, out_dir, *args, processes=processes, command=command)
    run.wait_for(after)
    time.sleep(delay)
    started = time.monotonic()
    run.process.send_signal(number)
    run.wait()
    seconds = time.monotonic() - started
    status = json.loads((out_dir / "status.json").read_text())
    reached, saved, left = max(losses(out_dir)) + 1, newest(out_dir)["step"], left_behind(out_dir)
    code = go_on(data, out_dir, *args, processes=processes)
    return {"what": signal.Signals(number).name, "after": after, "seconds": seconds,
            "status": status["status"], "updates_done": reached, "saved": saved, "left_behind": len(left),
            "ok": code == 0 and status["status"] in ("interrupted", "finished") and reached == saved
            and not left and same(out_dir, reference)}


def damage_and_find(folder: Path, reference: Path, numbers: random.Random) -> dict:
    """A random truncation or flipped bit in a file of the newest checkpoint: seen, with one warning."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reference, folder)
    last, before = checkpoint.steps_in(str(folder))[:-3:-1]
    name = numbers.choice([*checkpoint.FILES, "MANIFEST.json"])
    path = folder / "ckpt" / f"step-{last:08d}" / name
    content = bytearray(path.read_bytes())
    if numbers.random() < 0.5:
        what, content = "truncated", content[:numbers.randrange(len(content))]
    else:
        what, at = "bit flipped", numbers.randrange(len(content))
        content[at] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)
    warnings = []
    found = checkpoint.find(str(folder), warn=warnings.append)
    return {"what": f"{name} {what}", "ok": found.step == before and len(warnings) == 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="at random moments, besides the named points")
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--damages", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="write every case to this file")
    args = parser.parse_args()
    numbers = random.Random(args.seed)
    cases = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_shards(folder / "shards")
        references = {}
        for kind, processes in (("gpt", 1), ("gpt", 2), ("gpt", 4), ("spd", 1), ("tp", 2)):
            references[kind, processes] = folder / f"{kind}{processes}"
            assert finish(data, references[kind, processes], *KINDS[kind], processes=processes) == 0

        def report(group: str, case: dict) -> None:
            cases.setdefault(group, []).append(case)
            print(f"{group}: {case}", flush=True)

        for i, point in enumerate(POINTS):
            report("kill -9 at a named point", kill_and_resume(
                data, folder / f"point{i}", references["gpt", 1], point=point))
        for i in range(args.kills):
            kind = numbers.choice(["gpt", "spd"])
            report("kill -9 at a random moment", kill_and_resume(
                data, folder / f"kill{i}", references[kind, 1], *KINDS[kind], after=numbers.uniform(0, 2)))
        for i in range(args.signals):
            number = (signal.SIGTERM, signal.SIGINT)[i % 2]
            kind = numbers.choice(["gpt", "tp"])
            report("signal to torchrun", signal_and_resume(
                data, folder / f"signal{i}", references[kind, 2], number, numbers.randrange(1, 25),
                numbers.uniform(0, 0.2), *KINDS[kind]))
        for kind, processes in (("gpt", 2), ("gpt", 4), ("tp", 2)):
            report("kill -9 of all ranks", kill_and_resume(
                data, folder / f"all-{kind}{processes}", references[kind, processes], *KINDS[kind],
                point="latest", processes=processes))
        for _ in range(args.damages):
            report("damaged checkpoint", damage_and_find(folder / "damaged", references["gpt", 1], numbers))
        for then in (1, 2, 4):
            for now in (1, 2, 4):
                report("saved on, resumed on", other_world(data, folder / f"from{then}to{now}", then, now))
    for group, of_group in cases.items():
        print(f"{group}: {sum(case['ok'] for case in of_group)} of {len(of_group)}")
    if args.json:
        Path(args.json).write_text(json.dumps(cases, indent=1))
    sys.exit(not all(case["ok"] for of_group in cases.values() for case in of_group))


def other_world(data: Path, out_dir: Path, then: int, now: int) -> dict:
    """Five updates, without dropout, after a checkpoint of `then` processes, on `now` and on one that went
    on: relative difference of losses; and whether weights come back with the same bits (with a learning rate
    of 0 an update leaves them)."""
    plain = ["--dropout=0.0", "--lr_decay_iters=60"]
    through, first = Path(f"{out_dir}-through"), ["--max_iters=15", *plain]
    assert finish(data, through, *first, processes=then) == 0
    assert finish(data, out_dir, "--max_iters=10", *plain, processes=then) == 0
    before = newest(out_dir)
    again = Path(f"{out_dir}-again")
    still = ["--max_iters=11", "--learning_rate=0", "--min_lr=0", "--decay_lr=False"]
    code = finish(data, again, f"--resume={out_dir}", *plain, *still, processes=now)
    code |= go_on(data, out_dir, *first, processes=now)
    kept = newest(again)["model"] == before["model"]
    a, b = losses(through), losses(out_dir)
    worst = max(abs(a[step] - b[step]) / a[step] for step in range(10, 15))
    return {"what": f"{then} -> {now}", "worst_of_5_losses": worst, "weights_same": kept,
            "ok": code == 0 and kept and len(b) == 15 and worst <= 1e-6}


if __name__ == "__main__":
    main()
