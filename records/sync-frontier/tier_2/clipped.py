"""Add `clipped` to the lines of runs.jsonl that lack it: those of the first two sittings, from their logs.

    tar xzf run_logs.tgz && python records/sync-frontier/tier_2/clipped.py

`sitting.sh last` leaves the archive. frontier.py writes `clipped` since then.
"""

import glob
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))

from experiments.experiment_logger import lines_of, read_lines
from experiments.frontier_next import clipped_share
from nanosync.run_log import RunLog

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "runs.jsonl")
runs = read_lines(path)
for run in runs:
    logs = glob.glob(f"experiment_logs/sync-frontier-tier-2/{run['arm']}/runs/run_*_seed_{run['seed']}/out")
    if "clipped" not in run and logs:
        run["clipped"] = clipped_share(RunLog.read(logs[0]))
        print(run["arm"], run["seed"], run["clipped"])
with open(path, "w") as f:
    f.write(lines_of(runs))
