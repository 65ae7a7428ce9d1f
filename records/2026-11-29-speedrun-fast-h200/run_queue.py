"""Run commands on GPUs, some at a time on each, and append what each run printed of steps and losses.

    python run_queue.py QUEUE.jsonl RUNS.jsonl --gpus=2 --at_once=4 --seconds=560 --logs=logs

A line of the queue: {"name": "r00", "start": 60, "train": 60, "alone": false, "command": ["python", "..."]}.
`start` and `train` are the seconds to the first step and from there, of a run that has the GPU to itself. A
run with `alone` (false without it) waits for an empty GPU and keeps it. At most half of the runs on a GPU are
before their first step, so that some train while others compile. A run starts if it should end in time: after
its start and all that is then left to train on its GPU. When the time is over, runs are ended.

A line of the results: name, command, exit code (null if the run was ended), peak memory, [step, val loss,
training ms] of each evaluation, seconds from start to end, GPU, and `alone`.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

EVALUATION = re.compile(r"step:(\d+)/\d+ val_loss:([\d.]+|nan) train_time:(\d+)ms")
STEP = re.compile(r"step:(\d+)/(\d+) ")
PEAK = re.compile(r"peak memory[^\n]*")
ENDING = 8  # seconds for a run that is asked to end


class Running:
    def __init__(self, job: dict, gpu: int, logs: str):
        self.job, self.gpu, self.began = job, gpu, time.monotonic()
        self.path = os.path.join(logs, job["name"] + ".txt")
        env = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1"}
        with open(self.path, "w") as log:
            self.process = subprocess.Popen(job["command"], stdout=log, stderr=subprocess.STDOUT, env=env,
                                            start_new_session=True)

    @property
    def text(self) -> str:
        with open(self.path, errors="replace") as f:
            return f.read()

    @property
    def starting(self) -> bool:
        return "step:" not in self.text

    @property
    def left(self) -> float:
        """Seconds of training that are left, on a GPU of its own."""
        steps = STEP.findall(self.text)
        return self.job["train"] * (1 - int(steps[-1][0]) / int(steps[-1][1]) if steps else 1)

    def end(self) -> None:
        """End the run and all of its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(ENDING)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def result(self, ended: bool) -> dict:
        text = self.text
        return {"name": self.job["name"], "command": " ".join(self.job["command"]),
                "exit_code": None if ended else self.process.returncode, "peak": PEAK.findall(text)[-1:],
                "step_val_ms": [[int(a), float(b), int(c)] for a, b, c in EVALUATION.findall(text)],
                "wall_seconds": round(time.monotonic() - self.began, 1), "gpu": self.gpu,
                "alone": self.job.get("alone", False)}


def place(job: dict, running: list[Running], gpus: int, at_once: int) -> int | None:
    """Return a GPU on which the job can start now, None if it has to wait."""
    for gpu in sorted(range(gpus), key=lambda gpu: sum(run.left for run in running if run.gpu == gpu)):
        there = [run for run in running if run.gpu == gpu]
        if job.get("alone") or any(run.job.get("alone") for run in there):
            if not there:
                return gpu
        elif len(there) < at_once and sum(run.starting for run in there) < max(1, at_once // 2):
            return gpu
    return None


def needed(job: dict, there: list[Running]) -> float:
    """Return the seconds until a job that starts now beside others should end."""
    return job["start"] + job["train"] + sum(run.left for run in there)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("queue")
    parser.add_argument("results")
    for name, value in (("gpus", 1), ("at_once", 1), ("seconds", 560)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--logs", default="logs")
    options = parser.parse_args()
    os.makedirs(options.logs, exist_ok=True)
    with open(options.queue, encoding="utf-8") as f:
        waiting = [json.loads(line) for line in f if line.strip()]
    running, until = [], time.monotonic() + options.seconds - 2 * ENDING
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the runs, too

    def settle(run: Running, ended: bool = False) -> None:
        running.remove(run)
        result = run.result(ended)
        with open(options.results, "a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")
        last = result["step_val_ms"][-1:] or run.text.splitlines()[-1:]
        print(f"{result['name']}: exit {result['exit_code']}, {last}, {result['wall_seconds']} s", flush=True)

    try:
        while waiting or running:
            left = until - time.monotonic()
            if left <= 0:
                break
            for job in list(waiting):
                if needed(job, []) > left:
                    waiting.remove(job)
                    print(f"{job['name']}: not started, {left:.0f} s are left", flush=True)
                    continue
                gpu = place(job, running, options.gpus, options.at_once)
                if gpu is None or needed(job, [run for run in running if run.gpu == gpu]) > left:
                    break  # the queue's order counts
                waiting.remove(job)
                running.append(Running(job, gpu, options.logs))
            time.sleep(0.5)
            for run in [run for run in running if run.process.poll() is not None]:
                settle(run)
    finally:
        for run in list(running):
            run.end()
            settle(run, ended=True)


if __name__ == "__main__":
    main()
