"""Write runs.json from the folder that sitting.sh wrote, or points.csv from runs.json.

    python points.py runs FOLDER
    python points.py points    # then experiments/analyze_results.py --frontier draws them, see README.md

Runs shared a GPU, so their training times are those of other runs alone, in proportion to the steps: of 200
steps for ours, as in ../2026-11-30-speedrun-frontier-h200/points.py, of 600 for the record of 2025-07-18. The
other points are of that folder's points.csv, without those of 11 layers.
"""

import csv
import json
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
FRONTIER = os.path.join(HERE, "../2026-11-30-speedrun-frontier-h200")
LINE = re.compile(r"step:(\d+)/200 train_loss:[\d.]+ train_time:(\d+)ms")
RECORD = 108.05 / 600  # seconds a step of the record of 2025-07-18
NAMES = {"ours": "train_gpt_fast.py", "record": "record of 2025-07-18"}

sys.path.insert(0, FRONTIER)


def write_runs(folder: str) -> None:
    runs, alone = [], {}
    for part in ("times", "runs"):
        with open(os.path.join(folder, f"runs_{part}.jsonl"), encoding="utf-8") as f:
            runs += [{"part": part} | json.loads(line) for line in f]
    for run in runs:
        with open(os.path.join(folder, f"logs_{run['part']}", run["name"] + ".txt"), encoding="utf-8") as f:
            text = f.read()
        if " chosen " in run["command"]:
            run["became"] = text.splitlines()[0]
        if run["part"] == "times":
            alone[run["name"].removeprefix("time-")] = {int(step): int(ms) for step, ms in LINE.findall(text)}
    with open(os.path.join(HERE, "runs.json"), "w", encoding="utf-8") as f:
        json.dump({"machine": "two NVIDIA H200 of one host, torch 2.11.0+cu130, bf16, compiled",
                   "commit": "47c3d2e, and this folder", "runs": runs, "ours_alone_ms_after_step": alone}, f, indent=1)


def write_points() -> None:
    from points import seconds_of  # of FRONTIER

    with open(os.path.join(HERE, "runs.json"), encoding="utf-8") as f:
        found = json.load(f)
    with open(os.path.join(FRONTIER, "points.csv"), encoding="utf-8") as f:
        rows = [[row["name"], int(row["seed"]), float(row["seconds"]), float(row["loss"]), int(row["steps"])]
                for row in csv.DictReader(f) if row["steps"] != "1712"]
    for run in found["runs"]:
        script, *rest = run["name"].split("-")
        if script not in NAMES or not run["step_val_ms"]:
            continue
        steps, loss, _ = run["step_val_ms"][-1]
        seconds = RECORD * steps if script == "record" else \
            seconds_of(found["ours_alone_ms_after_step"]["base"], steps)
        rows.append([NAMES[script], int(rest[1]), round(seconds, 2), loss, steps])
    with open(os.path.join(HERE, "points.csv"), "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["name", "seed", "seconds", "loss", "steps"])
        writer.writerows(sorted(rows, key=lambda row: (row[0], row[4], row[1])))


if __name__ == "__main__":
    write_runs(sys.argv[2]) if sys.argv[1] == "runs" else write_points()
