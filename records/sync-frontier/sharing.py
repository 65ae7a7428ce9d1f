"""Write sharing.json: the updates of all runs in each 20 s, and what the start of each run took.

    tar xzf run_logs.tgz && python sharing.py    # run_logs.tgz is what sitting.sh last leaves
"""

import glob
import json
import os

BIN = 20  # s


def read_logs() -> dict[str, dict[str, list[float]]]:
    """Return arm -> kind of event -> times, of the logs below experiment_logs/sync-frontier."""
    logs = {}
    for path in sorted(glob.glob("experiment_logs/sync-frontier/*/runs/*/out/run_*.jsonl")):
        times = logs.setdefault(path.split("/")[2], {})
        with open(path) as f:
            for event in map(json.loads, f):
                times.setdefault(event["event"], []).append(event["time"])
    return logs


def main() -> None:
    logs = read_logs()
    began = min(times["start"][0] for times in logs.values())
    updates = {arm: [time - began for time in times["iter"]] for arm, times in logs.items()}
    starts, bins = {}, []
    for arm, times in logs.items():
        start = times["start"][0]
        starts[arm] = {"log_begins": round(start - began, 1),
                       "first_evaluation_after": round(times["eval"][0] - start, 1),
                       "first_update_after": round(times["iter"][0] - start, 1),
                       "last_update": round(updates[arm][-1], 1)}
    for left in range(0, int(max(own[-1] for own in updates.values())) + 1, BIN):
        bins.append({"from_s": left,
                     "updates": sum(left <= time < left + BIN for own in updates.values() for time in own),
                     "training_throughout": [arm for arm, own in updates.items()
                                             if own[0] <= left and own[-1] >= left + BIN]})
    what = f"updates of all runs on both GPUs in each {BIN} s, from the time stamps of the runs' logs; " \
           f"at most four runs on a GPU"
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "sharing.json"), "w") as f:
        parts = ",\n".join("  " + json.dumps(part) for part in bins)
        own = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(start)}" for arm, start in starts.items())
        f.write(f'{{"what": {json.dumps(what)},\n "start_s": {{\n{own}\n }},\n "bins": [\n{parts}\n ]}}\n')


if __name__ == "__main__":
    main()
