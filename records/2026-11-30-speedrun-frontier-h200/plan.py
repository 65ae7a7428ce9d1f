"""Queues for run_queue.py of the frontier: times, a design of seven factors, the frontier itself.

    python plan.py times SMALL > queue_times.jsonl    # 200 steps alone, of a small data set
    python plan.py design > queue_design.jsonl        # 100 s a run
    python plan.py choose RUNS.jsonl CHOSEN.json      # the effects; CHOSEN gets the settings that are kept
    python plan.py frontier CHOSEN.json PEERS > queue_frontier.jsonl
    python plan.py compile PEERS SMALL > queue_compile.jsonl    # 30 steps of the newest record, on GPU 1

Run in the repository's root after triples.patch, with data/python_source. The queue, its fields and PEERS are
those of ../2026-11-29-speedrun-fast-h200. The time of a run of ours is the time of a step of a run of 200
steps alone, times its steps: all stages have the same shares of both.
"""

import json
import math
import os
import shlex
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../2026-11-29-speedrun-fast-h200"))

import factors

LAUNCHERS = "records/2026-11-29-speedrun-fast-h200"
OURS = ["python", "train_gpt_fast.py", "config/fast_python_source.py", "--save_checkpoint=False",
        "--val_loss_every=0", "--log_interval=25"]
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=1"]
BASE = {"n_layer": 9}
FACTORS = {
    "lazy": {"lazy_tables": True},
    "tables": {"triples": True, "value_tables": 5},
    "batches": {"batch_sizes": [1, 2, 3, 3], "stage_rates": [1.0, 1.52, 1.73, 1.73]},
    "eleven": {"n_layer": 11},
    "final": {"final_rate": 0.05},
    "short": {"short_windows": [128, 384, 640, 768]},
    "muon_rate": {"muon_learning_rate": 0.03}}
# techniques off that the table of the fast script's record has with one seed, in the version of that table
ABLATED = {"n_layer": 11, "suffix_match": False, "exclusive_layers": [], "muon_heads": 6,
           "gate_learning_rate": 0.04}
ABLATIONS = {"default": {}, "polar_express": {"polar_express": False},
             "windows": {"short_windows": 4 * [768], "long_windows": 4 * [1664]},
             "late_attention": {"late_attention": False}, "document_mask": {"document_mask": False},
             "muon_weight_decay": {"muon_weight_decay": 0}}
KEEP = -0.002  # effect at the same time, about one standard error
NEWEST, RECORD, GPT = 7.57, 5.55, 6.33  # steps a second of the peers and of train_gpt.py, alone on an H200
START = {"ours": 60, "newest": 300, "record": 240, "gpt": 60}  # seconds to the first step, and of the end
# script, seconds, seed: from 4 on, as the design has seed 1. Second in the queue are times of ours.
FRONTIER = [("newest", 240, 4), ("ours", 240, 4), ("ours", 120, 4), ("newest", 240, 5), ("ours", 240, 5),
            ("ours", 120, 5), ("ours", 120, 6), ("ours", 60, 4), ("ours", 60, 5), ("ours", 60, 6),
            ("newest", 120, 6), ("record", 240, 4), ("record", 60, 4), ("gpt", 60, 4), ("gpt", 240, 4)]


def milliseconds(given: dict) -> float:
    """Return about how long a step takes on an H200, on average over the stages. From alone runs of 7 and 9
    layers with matches; tables by their bytes, 28 a value or 5 if lazy."""
    layers, lazy = given["n_layer"], given.get("lazy_tables", False)
    batch_sizes = given.get("batch_sizes", [1, 1, 2, 2])
    micro_batches = sum(share * n for share, n in zip(factors.SHARES, batch_sizes))
    values = 38.6 * (given.get("value_tables", 3) + 5 + 5 * given.get("triples", False))  # millions
    update = 5.8 + 0.3 * layers + values * (0.005 if lazy else 0.028) / 4
    return update + micro_batches * (19 + 4.07 * layers) + 1.2 * (micro_batches - 1)


def ours(name: str, seconds: float, given: dict, seed: int, alone: bool = False, **more) -> dict:
    steps = more.pop("steps", None) or round(1e3 * seconds / milliseconds(given))
    settings = {"num_iterations": steps, "seed": seed, "out_dir": f"out-{name}", **given, **more}
    return {"name": name, "start": START["ours"], "train": seconds, "alone": alone,
            "command": [*OURS, *(f"--{key}={value}" for key, value in settings.items())]}


def times(small: str) -> list[dict]:
    """Return runs of 200 steps, in the order of what they are needed for."""
    arms = {"9": {}, "9-lazy": FACTORS["lazy"], "9-lazy-tables": FACTORS["lazy"] | FACTORS["tables"],
            "9-plain": {"suffix_match": False}}
    return [ours(f"time-{name}", 20, BASE | given, 1, alone=True, steps=200, dataset=small, val_tokens=32768)
            | {"start": 15} for name, given in arms.items()]


def design() -> list[dict]:
    return [ours(name, 100, BASE | settings, 1) for name, _, settings in factors.runs({"factors": FACTORS})]


def choose(results: str, out: str) -> None:
    losses = {}
    with open(results, encoding="utf-8") as f:
        for run in map(json.loads, f):
            if run["step_val_ms"] and math.isfinite(run["step_val_ms"][-1][1]):
                losses[run["name"]] = run["step_val_ms"][-1][1]
    kept, designed = {}, {name: settings for name, _, settings in factors.runs({"factors": FACTORS})}
    if designed.keys() <= losses.keys():
        found = factors.effects({"factors": FACTORS}, losses)
        for name, effect in sorted(found.items(), key=lambda item: item[1]):
            kept |= FACTORS[name] if effect <= KEEP else {}
            print(f"{name:16} {effect:+.4f} {'kept' if effect <= KEEP else ''}")
    elif ended := designed.keys() & losses.keys():
        best = min(ended, key=losses.__getitem__)
        kept = designed[best]
        print(f"only {len(ended)} of {len(designed)} runs ended, so effects cannot be told apart: as {best}")
    with open(out, "w", encoding="utf-8") as f:
        f.write(json.dumps(kept) + "\n")


def peer(script: str, seconds: float, seed: int, peers: str) -> dict:
    name, data = f"{script}-{seconds}-{seed}", "data/python_source"
    files = [f"--train_files={data}/*_train_*.bin", f"--val_files={data}/*_val_*.bin", "--val_tokens=524288",
             "--val_loss_every=0", f"--seed={seed}"]
    if script == "newest":
        command = [*TORCHRUN, f"{LAUNCHERS}/run_record_newest.py", f"{peers}/newest", "--batch_factor=0.25",
                   f"--num_scheduled_iterations={round(NEWEST * seconds)}", *files]
    elif script == "record":
        command = [*TORCHRUN, f"{LAUNCHERS}/run_record_2025_07.py", f"{peers}/record_2025_07.txt",
                   "--grad_accum_steps=2", "--align_to_bos=False", "--val_seq_len=65536",
                   f"--num_iterations={round(RECORD * seconds)}", *files]
    else:
        steps = round(GPT * seconds)
        command = ["python", "train_gpt.py", "--dataset=python_source", "--batch_size=96",
                   "--device_batch_size=48", "--val_tokens=524288", f"--num_iterations={steps}",
                   f"--warmdown_iters={round(steps * 0.283)}", f"--seed={seed}", f"--out_dir=out-{name}",
                   *OURS[3:]]
    return {"name": name, "start": START[script], "train": seconds, "alone": False, "command": command}


def compilation(peers: str, small: str) -> list[dict]:
    run = peer("newest", 30 / NEWEST, 1, peers)
    command = [part.replace("data/python_source", small) for part in run["command"]]
    return [run | {"name": "newest-compile", "command": ["env", "CUDA_VISIBLE_DEVICES=1", *command]}]


def frontier(chosen: str, peers: str) -> list[dict]:
    """Return the frontier's runs, and after the first one a job with 200 steps of each of ours, alone; at the
    end ablations, which are short, and the times of the head."""
    with open(chosen, encoding="utf-8") as f:
        given = BASE | json.load(f)
    lengths = {60: given | {"n_layer": 7}, 120: given, 240: given | {"n_layer": given["n_layer"] + 2}}
    runs = [ours(f"ours-{seconds}-{seed}", seconds, lengths[seconds], seed) if script == "ours"
            else peer(script, seconds, seed, peers) for script, seconds, seed in FRONTIER]
    alone = [ours(f"time-ours-{seconds}", 20, settings, 1, steps=200)["command"]
             for seconds, settings in lengths.items()]
    timed = {"name": "time-ours", "start": 90, "train": 60, "alone": True,
             "command": ["bash", "-c", "; ".join(map(shlex.join, alone))]}
    head = {"name": "time-head", "start": 20, "train": 10, "alone": True,
            "command": ["python", "records/speedrun-frontier/time_head.py"]}
    ablations = [ours(f"off-{name}-2", 20, ABLATED | settings, 2, steps=200)
                 for name, settings in ABLATIONS.items()]
    return [runs[0], timed, *runs[1:], *ablations, head]


def main() -> None:
    what, *more = sys.argv[1:]
    if what == "choose":
        return choose(*more)
    queues = {"times": times, "design": design, "frontier": frontier, "compile": compilation}
    for run in queues[what](*more):
        print(json.dumps(run))


if __name__ == "__main__":
    main()
