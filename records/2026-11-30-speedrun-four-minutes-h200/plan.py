"""Queues for run_queue.py: four minutes of training of ours and of its peers, and ablations with seed 2.

    python plan.py times SMALL > queue_times.jsonl    # 200 steps alone, of a small data set
    python plan.py runs TIMES.jsonl PEERS LOGS RUNS.jsonl > queue_runs.jsonl    # TIMES: results of the first
    python plan.py chosen RUNS.jsonl SEED    # waits for the arms' results, then starts the chosen run

Run in the repository's root, with data/python_source. The queue, its fields and PEERS are those of
../2026-11-29-speedrun-fast-h200. Each arm has the steps that take as long as 1,950 steps of the first one.
"""

import json
import math
import os
import shlex
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../2026-11-30-speedrun-frontier-h200"))

from plan import ABLATED, ABLATIONS, ours, peer

HERE = os.path.dirname(os.path.relpath(__file__))

SEED, SEEDS = 1, (4, 5, 6)  # of the arms, of the frontier
SECONDS, STEPS = 233, 1950
BASE = {"n_layer": 9}
ARMS = {"base": {},
        "lower_rate": {"muon_learning_rate": 0.017},
        "batches": {"batch_sizes": [2, 3, 4, 4], "stage_rates": [1.2, 1.5, 1.73, 1.73]}}
KEEP = -0.002  # effect on the loss at the same time
LENGTH = {"base": 120.0, "batches": 175.3}  # ms a step, if it is not measured
# config/fast_python_source.py of the ablations before
EARLIER = {"batch_sizes": [1, 1, 2, 2], "stage_rates": [1.0, 1.0, 1.3, 1.3], "trigram": False,
           "short_windows": [384, 640, 768, 768], "value_tables": 3, "lazy_tables": False}


def times(small: str) -> list[dict]:
    return [ours(f"time-{name}", 24, BASE | ARMS[name], 1, alone=True, steps=200, dataset=small,
                 val_tokens=32768) | {"start": 20} for name in ("batches", "base")]


def steps_of(name: str, measured: dict) -> int:
    """Return the number of steps that takes an arm about as long as STEPS steps take the base.

    measured: ms on the clock after 200 steps, of each arm. The clock leaves out the first ten.
    """
    if name != "batches":
        return STEPS
    length = measured if len(measured) == 2 else LENGTH
    return round(STEPS * length["base"] / length["batches"])


def after(name: str, logs: str, results: str, command: list[str]) -> list[str]:
    """Return a command that begins after the first step of an earlier run, or fails if that has ended."""
    log, results = shlex.quote(os.path.join(logs, name + ".txt")), shlex.quote(results)
    wait = f"until grep -qs step: {log}; do ! grep -qs '\"{name}\"' {results} || exit 1; sleep 1; done"
    return ["bash", "-c", f"{wait}; exec {shlex.join(command)}"]


def runs(times_file: str, peers: str, logs: str, results: str) -> list[dict]:
    measured = {}
    with open(times_file, encoding="utf-8") as f:
        for run in map(json.loads, f):
            if run["step_val_ms"]:
                measured[run["name"].removeprefix("time-")] = run["step_val_ms"][-1][2]
    arms = [ours(f"arm-{name}", SECONDS, BASE | settings, SEED, steps=steps_of(name, measured))
            for name, settings in ARMS.items()]
    chosen = [{"name": f"ours-240-{seed}", "start": 60, "train": SECONDS, "alone": False,
               "command": ["python", os.path.join(HERE, "plan.py"), "chosen", results, str(seed)]}
              for seed in SEEDS]
    newest = peer("newest", 240, 5, peers) | {"start": 650, "train": 100}  # compiles beside the arms
    second = peer("newest", 240, 6, peers)
    second["command"] = after(newest["name"], logs, results, second["command"])
    ablations = [ours(f"off-{name}-2", 24, ABLATED | EARLIER | settings, 2, steps=200)
                 for name, settings in ABLATIONS.items() if name not in ("default", "polar_express")]
    gathers = {"name": "gathers", "start": 30, "train": 30, "alone": False,
               "command": ["env", "CUDA_VISIBLE_DEVICES=0,1", "bash", os.path.join(HERE, "two_processes.sh")]}
    return [newest, *arms, peer("record", 240, 4, peers), *ablations, gathers, peer("record", 60, 4, peers),
            *chosen[:2], second, chosen[2], peer("gpt", 240, 4, peers)]


def choose(losses: dict[str, float]) -> dict:
    """Return the settings of the arms whose loss is lower than the base's by at least -KEEP."""
    if not math.isfinite(losses["base"]):
        sys.exit("the first arm has no loss, so none can be compared with it")
    kept = dict(BASE)
    for name, settings in ARMS.items():
        if losses[name] - losses["base"] <= KEEP:
            kept |= settings
    return kept


def become_chosen(results: str, seed: str) -> None:
    """Wait for the results of all arms, then run what they choose. An arm that failed is not kept. One that
    was not started has no result, and then this waits until it is ended."""
    losses = {}
    while losses.keys() != ARMS.keys():
        time.sleep(1)
        with open(results, encoding="utf-8") as f:
            for run in map(json.loads, f.read().splitlines()):
                name = run["name"].removeprefix("arm-")
                if name in ARMS:
                    loss = run["step_val_ms"][-1][1] if run["step_val_ms"] else math.inf
                    losses[name] = (loss if math.isfinite(loss) else math.inf, run["command"])
    kept = choose({name: loss for name, (loss, _) in losses.items()})
    steps = STEPS
    if "batch_sizes" in kept:
        steps = int(losses["batches"][1].split("--num_iterations=")[1].split()[0])
    command = ours(f"ours-240-{seed}", SECONDS, kept, int(seed), steps=steps)["command"]
    print(shlex.join(command), flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    what, *more = sys.argv[1:]
    if what == "chosen":
        become_chosen(*more)
    for run in {"times": times, "runs": runs}[what](*more):
        print(json.dumps(run))
