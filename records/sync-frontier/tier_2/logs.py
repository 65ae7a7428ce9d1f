"""Write what ../README.md says of the logs of a sitting, and add `spikes` to lines of runs.jsonl.

    tar xzf run_logs.tgz && python records/sync-frontier/tier_2/logs.py second

`sitting.sh last` leaves the archive. Adds to logs.json, under the name of the sitting: of each run the spikes
(as frontier.py has them), the share of the updates after the warm-up that were clipped, and the number of the
first of them; ms an update of all runs together, for each 100 s in which all train. After the second sitting
frontier.py wrote `spikes` itself.
"""

import bisect
import glob
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))

from experiments.experiment_logger import lines_of, read_lines
from experiments.frontier_next import spikes_of
from nanosync.files import replace_file
from nanosync.run_log import RunLog

FOLDER = os.path.dirname(os.path.abspath(__file__))
PERIOD = 100  # s


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def clipping_of(log: RunLog) -> dict:
    later = [event for event in log.of("iter") if event["step"] >= log.config["warmup_iters"]]
    clipped = [event["step"] + 1 for event in later if event["norm"] > log.config["grad_clip"]]
    return {"clipped": round(len(clipped) / len(later), 6), "first_clipped": clipped[0] if clipped else None}


def updates_until(times: list[float], moment: float) -> float:
    """Return how many updates were done, between two of them in proportion."""
    i = bisect.bisect(times, moment)
    return i if i in (0, len(times)) else i + (moment - times[i - 1]) / (times[i] - times[i - 1])


def main() -> None:
    if len(sys.argv) != 2:
        stop("name the sitting, as in: logs.py second")
    logs = {}
    for path in sorted(glob.glob("experiment_logs/sync-frontier-tier-2/*/runs/run_*/out")):
        arm, seed = path.split("/")[2], int(path.split("/")[4].rpartition("_")[2])
        logs[arm, seed] = RunLog.read(path)
    if not logs:
        stop("no logs here: unpack run_logs.tgz in this folder")
    times = [[event["time"] for event in log.of("iter")] for log in logs.values()]
    begin, end = max(one[0] for one in times), min(one[-1] for one in times)
    found = {"runs": {f"{arm} {seed}": {"spikes": spikes_of(log)} | clipping_of(log)
                      for (arm, seed), log in logs.items()}, "ms_an_update": {}}
    for period in range(int((end - begin) // PERIOD)):
        a, b = begin + PERIOD * period, begin + PERIOD * (period + 1)
        done = sum(updates_until(one, b) - updates_until(one, a) for one in times)
        found["ms_an_update"][f"from {PERIOD * period} s"] = round(1e3 * PERIOD / done, 1)
    out, runs_path = os.path.join(FOLDER, "logs.json"), os.path.join(FOLDER, "runs.jsonl")
    sittings = {}
    if os.path.exists(out):
        with open(out) as f:
            sittings = json.load(f)
    replace_file(out, (json.dumps(sittings | {sys.argv[1]: found}, indent=1) + "\n").encode())
    runs = read_lines(runs_path)
    for run in runs:
        if "spikes" not in run and (run["arm"], run["seed"]) in logs:
            run["spikes"] = spikes_of(logs[run["arm"], run["seed"]])
    replace_file(runs_path, lines_of(runs).encode())


if __name__ == "__main__":
    main()
