"""Print the figures of README.md from the runs beside it.

    python records/sync-frontier/figures.py
"""

import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from experiments.experiment_statistics import pooled_std
from experiments.frontier_fit import Fit
from experiments.frontier_freeze import Pilot
from experiments.frontier_protocol import Protocol
from experiments.frontier_runs import read_runs
from experiments.report import table

FOLDER = os.path.dirname(os.path.abspath(__file__))
RATES = {"low": "0.0006", "mid": "0.0012", "high": "0.0024", "top": "0.0048"}
MODELS = {"dense_12": "24 syncs", "dense_8": "8 layers", "drop_4": "4 syncs", "drop_1": "1 sync"}


def read(name: str) -> dict:
    protocol = Protocol.read(os.path.join(FOLDER, f"protocol{name}.json"))
    return read_runs(protocol.runs_path, protocol)


def main() -> None:
    pilot = Pilot(os.path.join(FOLDER, "protocol_regime.json"))
    spread, freedom = pilot.spread()
    print("\n".join(pilot.described()), f"\nspread {spread:.2%}, {freedom} degrees of freedom")
    print("without what runs of one seed have in common {:.2%}, {} degrees of freedom\n".format(
        *Fit(pilot.runs).spread))
    first_ten = {(arm.removesuffix("_r2"), seed): run for (arm, seed), run in read("").items()}
    runs = pilot.runs | {(f"{arm}_top", seed): run for (arm, seed), run in first_ten.items()}

    def losses(model: str, rate: str) -> dict[int, float]:
        return {seed: run["val_loss"] for (arm, seed), run in runs.items() if arm == f"{model}_{rate}"}

    rows = []
    for rate, value in RATES.items():
        dense, row = losses("dense_12", rate), [value]
        for model in MODELS:
            own = losses(model, rate)
            ratios = [math.log(own[seed] / dense[seed]) for seed in own]
            error = spread * math.sqrt(2 / len(ratios))  # of a mean of differences between two runs
            text = " / ".join(f"{loss:.4f}" for loss in own.values())
            if model != "dense_12":
                text += f" ({math.expm1(sum(ratios) / len(ratios)):+.2%} ± {error:.2%})"
            row.append(text)
        rows.append(row)
    print(table(["learning rate", *MODELS.values()], rows))
    for rate, value in RATES.items():
        pairs = [[math.log(loss) for loss in losses(model, rate).values()] for model in MODELS]
        if any(len(pair) > 1 for pair in pairs):
            own, degrees = pooled_std(*pairs)
            print(f"spread between the seeds at {value}: {own:.2%}, {degrees} degrees of freedom")

    for name in ("cold", "warm"):
        with open(os.path.join(FOLDER, "start", f"runs_{name}.jsonl")) as f:
            for run in map(json.loads, f):
                print(name, run["arm"], run["seconds"])
    ended = [run["time"] for run in first_ten.values()]
    began = [run["time"] - run["seconds"]["wall"] for run in first_ten.values()]
    print(f"{len(ended)} runs of the frozen protocol in {max(ended) - min(began):.0f} s on two GPUs")
    with open(os.path.join(FOLDER, "sharing.json")) as f:
        shared = [part["updates"] for part in json.load(f)["bins"] if 100 <= part["from_s"] < 280]
    print(f"{2 * 20 * len(shared) / sum(shared) * 1e3:.1f} ms of a GPU for an update, shared")


if __name__ == "__main__":
    main()
