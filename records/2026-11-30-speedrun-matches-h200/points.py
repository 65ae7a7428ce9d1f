"""Write runs.json from the folder that two_phases.sh wrote, or points.csv from runs.json.

    python points.py runs FOLDER
    python points.py points    # then experiments/analyze_results.py --frontier draws them, see README.md

A run that shared its GPU has the training time of the run of its length that did not; the newest record's at
two minutes is in proportion to its steps. The points of the record of 2025-07-18 are of runs_3.json of
../2026-11-29-speedrun-fast-h200, alone on their GPU.
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../2026-11-29-speedrun-fast-h200"))

import points_file

HERE = os.path.dirname(os.path.abspath(__file__))
PARTS = {"factors": "runs_7.jsonl", "frontier": "runs_8.jsonl", "frontier, last call": "runs_9.jsonl"}
NAMES = {"ours": "train_gpt_fast.py", "newest": "record of 2026-07-17"}


def write_runs(folder: str) -> None:
    runs = []
    for part, name in PARTS.items():
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            runs += [{"part": part} | json.loads(line) for line in f]
    with open(os.path.join(HERE, "runs.json"), "w", encoding="utf-8") as f:
        json.dump({"machine": "two NVIDIA H200 of one host, driver 580.159.04, torch 2.11.0+cu130, bf16, "
                              "compiled",
                   "commit": "533436a with candidates_3.patch", "runs": runs}, f, indent=1)


def write_points() -> None:
    with open(os.path.join(HERE, "runs.json"), encoding="utf-8") as f:
        runs = [run for run in json.load(f)["runs"]
                if run["name"].split("-")[0] in NAMES and run["step_val_ms"]]
    alone, rows = {}, []
    for run in runs:
        steps, _, ms = run["step_val_ms"][-1]
        if run["alone"]:
            alone.setdefault(run["name"].split("-")[0], {})[steps] = ms / 1e3
    for run in runs:
        script, _, seed = run["name"].split("-")
        steps, loss, ms = run["step_val_ms"][-1]
        known = alone[script]
        nearest = min(known, key=lambda n: abs(n - steps))
        seconds = ms / 1e3 if run["alone"] else known[nearest] * steps / nearest
        rows.append([NAMES[script], seed, round(seconds, 2), loss, steps])
    with open(os.path.join(HERE, "../2026-11-29-speedrun-fast-h200/runs_3.json"), encoding="utf-8") as f:
        for run in json.load(f)["runs"]:
            if run["name"].startswith("peer") and "alone" in run["call"]:
                steps, loss, ms = run["step_val_ms"][-1]
                rows.append(["record of 2025-07-18", run["name"].split("-")[1], ms / 1e3, loss, steps])
    points_file.write_points(os.path.join(HERE, "points.csv"), rows)


if __name__ == "__main__":
    write_runs(sys.argv[2]) if sys.argv[1] == "runs" else write_points()
