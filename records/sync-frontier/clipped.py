"""Add to clipped.json: the share of updates after step 400 whose gradient was clipped (norm above 1), by run.

    tar xzf run_logs.tgz && python records/sync-frontier/clipped.py    # `sitting.sh last` leaves the archive
"""

import glob
import json
import os
import sys

FROM = 400  # steps
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "clipped.json")

with open(OUT) as f:
    shares = json.load(f)
logs = sorted(glob.glob("experiment_logs/sync-frontier/*/runs/*/out/run_*.jsonl"))
if not logs:
    print("error: no logs here: unpack run_logs.tgz in this folder", file=sys.stderr)
    sys.exit(2)
for path in logs:
    arm, run = path.split("/")[2], path.split("/")[4]
    with open(path) as f:
        events = [json.loads(line) for line in f]
    norms = [event["norm"] for event in events if event["event"] == "iter" and event["step"] > FROM]
    shares[f"{arm} {run}"] = round(sum(norm > 1 for norm in norms) / len(norms), 4)
with open(OUT, "w") as f:
    json.dump(shares, f, indent=1, sort_keys=True)
