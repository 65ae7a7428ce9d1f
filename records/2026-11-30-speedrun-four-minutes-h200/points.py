"""Write runs.json from the folder that sitting.sh wrote, or points.csv from runs.json.

    python points.py runs FOLDER
    python points.py points    # then experiments/analyze_results.py --frontier draws them, see README.md

Ours had a GPU to itself with seed 6, and all seeds have the time of that run. The peers shared a GPU, so they
have the time of other lengths alone, in proportion to the steps: 600 of the record of 2025-07-18, 462 of the
newest. The other points are of ../2026-11-30-speedrun-frontier-h200/points.csv, without those of 11 layers.
train_gpt.py is not drawn: its losses are so much higher that the other lines would coincide.
"""

import csv
import json
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../2026-11-29-speedrun-fast-h200"))

import points_file

HERE = os.path.dirname(os.path.abspath(__file__))
FRONTIER = os.path.join(HERE, "../2026-11-30-speedrun-frontier-h200")
LINE = re.compile(r"step:(\d+)/200 train_loss:[\d.]+ train_time:(\d+)ms")
NAMES = {"ours": "train_gpt_fast.py", "record": "record of 2025-07-18", "newest": "record of 2026-07-17"}
STEP = {"record": 108.05 / 600, "newest": 61.07 / 462}  # seconds
ALONE = "ours-240-6"
FOLDERS = {"small": "SMALL", "peers": "PEERS"}


def write_runs(folder: str) -> None:
    runs, alone = [], {}
    for part in ("times", "runs"):
        with open(os.path.join(folder, f"runs_{part}.jsonl"), encoding="utf-8") as f:
            runs += [{"part": part} | json.loads(line) for line in f]
    for run in runs:
        with open(os.path.join(folder, f"logs_{run['part']}", run["name"] + ".txt"), encoding="utf-8") as f:
            text = f.read()
        if " chosen " in run["command"]:
            run["became"] = text.partition("\n")[0]
        run["command"] = re.sub(r"/[\w/]*/(records/)", r"\1", run["command"])
        run["command"] = re.sub(r"/[\w/]*/(small|peers)\b", lambda m: FOLDERS[m[1]], run["command"])
        run["command"] = re.sub(r"/[\w/]*/(runs_runs.jsonl|logs_runs/)", r"OUT/\1", run["command"])
        if run["part"] == "times":
            alone[run["name"].removeprefix("time-")] = {int(step): int(ms) for step, ms in LINE.findall(text)}
    with open(os.path.join(HERE, "runs.json"), "w", encoding="utf-8") as f:
        json.dump({"machine": "two NVIDIA H200 of one host, torch 2.11.0+cu130, bf16, compiled",
                   "commit": "47c3d2e, and this folder", "runs": runs, "ours_alone_ms_after_step": alone},
                  f, indent=1)


def write_points() -> None:
    with open(os.path.join(HERE, "runs.json"), encoding="utf-8") as f:
        found = json.load(f)
    with open(os.path.join(FRONTIER, "points.csv"), encoding="utf-8") as f:
        rows = [[row["name"], int(row["seed"]), float(row["seconds"]), float(row["loss"]), int(row["steps"])]
                for row in csv.DictReader(f) if row["steps"] != "1712"]
    alone = next(run["step_val_ms"][-1][2] for run in found["runs"] if run["name"] == ALONE) / 1e3
    for run in found["runs"]:
        script, *rest = run["name"].split("-")
        if script not in NAMES or not run["step_val_ms"]:
            continue
        steps, loss, _ = run["step_val_ms"][-1]
        seconds = alone if script == "ours" else STEP[script] * steps
        rows.append([NAMES[script], int(rest[1]), round(seconds, 2), loss, steps])
    points_file.write_points(os.path.join(HERE, "points.csv"), rows)


if __name__ == "__main__":
    write_runs(sys.argv[2]) if sys.argv[1] == "runs" else write_points()
