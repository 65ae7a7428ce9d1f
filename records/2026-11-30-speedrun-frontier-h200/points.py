"""Write runs.json from the folder that sitting.sh wrote, or points.csv from runs.json.

    python points.py runs FOLDER
    python points.py points    # then experiments/analyze_results.py --frontier draws them, see README.md

Runs of ours shared a GPU. Their training time is that of a run of 200 steps with the same settings, alone on
its GPU: all stages have the same shares of both, and the clock leaves out the first ten steps, which are of
the first stage. The newest record's 1,838 steps have their share of the time of 462 steps alone on a GPU
(../2026-11-30-speedrun-matches-h200), as its 926 steps there. The other peers' points are of that record.
"""

import csv
import json
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../2026-11-29-speedrun-fast-h200"))

import points_file

HERE = os.path.dirname(os.path.abspath(__file__))
EARLIER = os.path.join(HERE, "../2026-11-30-speedrun-matches-h200/points.csv")
PARTS = ("times", "compile", "design", "frontier")
LENGTHS = "60", "120", "240"  # seconds, as in the names of the runs
LINE = re.compile(r"step:(\d+)/200 train_loss:[\d.]+ train_time:(\d+)ms")


def write_runs(folder: str) -> None:
    runs, alone = [], {}
    for part in PARTS:
        with open(os.path.join(folder, f"runs_{part}.jsonl"), encoding="utf-8") as f:
            runs += [{"part": part} | json.loads(line) for line in f]
    with open(os.path.join(folder, "logs_times/time-9.txt"), encoding="utf-8") as f:
        alone["time-9"] = {int(step): int(ms) for step, ms in LINE.findall(f.read())}  # without the factors
    with open(os.path.join(folder, "logs_frontier/time-ours.txt"), encoding="utf-8") as f:
        for seconds, log in zip(LENGTHS, f.read().split("compiling the model")[1:]):
            alone[seconds] = {int(step): int(ms) for step, ms in LINE.findall(log)}
    two = {}
    for name in ("two-lazy", "two-dense"):
        with open(os.path.join(folder, f"two/{name}.txt"), encoding="utf-8") as f:
            text = f.read()
        times = re.findall(r"step:(\d+)/36 train_loss:[\d.]+ train_time:(\d+)ms", text)
        two[name] = {"ms_after_step": dict(times),
                     "bytes_a_step": int(re.search(r"sent ([\d,]+) bytes", text)[1].replace(",", ""))}
    with open(os.path.join(HERE, "runs.json"), "w", encoding="utf-8") as f:
        json.dump({"machine": "two NVIDIA H200 of one host, driver 580.159.04, torch 2.11.0+cu130, bf16, "
                              "compiled",
                   "commit": "f9c10f2 with triples.patch", "runs": runs, "ours_alone_ms_after_step": alone,
                   "two_gpus": two}, f, indent=1)


def seconds_of(alone: dict, steps: int) -> float:
    """Return the training time of a run of ours from that of 200 steps, whose first 50 are of one stage."""
    first, whole = alone["50"] / 40, alone["200"]  # ms of a step of the first stage; of 190 steps
    return ((whole + 10 * first) * steps / 200 - 10 * first) / 1e3


def write_points() -> None:
    with open(os.path.join(HERE, "runs.json"), encoding="utf-8") as f:
        found = json.load(f)
    with open(EARLIER, encoding="utf-8") as f:
        earlier = [row for row in csv.DictReader(f) if not row["name"].startswith("train_gpt")]
    newest = next(float(row["seconds"]) for row in earlier if row["steps"] == "462")
    rows = [[row["name"], row["seed"], row["seconds"], row["loss"], int(row["steps"])] for row in earlier]
    for run in found["runs"]:
        script, *rest = run["name"].split("-")
        if script not in ("ours", "newest") or len(rest) < 2 or not run["step_val_ms"]:
            continue
        steps, loss, _ = run["step_val_ms"][-1]
        seconds = newest * steps / 462 if script == "newest" else \
            seconds_of(found["ours_alone_ms_after_step"][rest[0]], steps)
        name = {"ours": "train_gpt_fast.py", "newest": "record of 2026-07-17"}[script]
        rows.append([name, rest[1], round(seconds, 2), loss, steps])
    points_file.write_points(os.path.join(HERE, "points.csv"), rows)


if __name__ == "__main__":
    write_runs(sys.argv[2]) if sys.argv[1] == "runs" else write_points()
