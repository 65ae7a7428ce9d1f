"""Print the figures of README.md from the runs beside it.

    python records/sync-frontier/figures.py
"""

import json
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from experiments.experiment_statistics import pooled_std
from experiments.frontier_fit import Fit
from experiments.frontier_freeze import Pilot
from experiments.frontier_protocol import REST, Protocol
from experiments.frontier_runs import read_runs
from experiments.report import table

FOLDER = os.path.dirname(os.path.abspath(__file__))
RATES = {"low": "0.0006", "mid": "0.0012", "high": "0.0024", "top": "0.0048"}
MODELS = {"dense_12": "24 syncs", "dense_8": "8 layers", "drop_4": "4 syncs", "drop_1": "1 sync"}


def read(name: str) -> dict:
    protocol = Protocol.read(os.path.join(FOLDER, f"protocol{name}.json"))
    return read_runs(protocol.runs_path, protocol)


def frozen_mean(runs: dict, arm: str) -> float:
    """Return the geometric mean of the losses of an arm."""
    return math.exp(np.mean([math.log(run["val_loss"]) for (name, _), run in runs.items() if name == arm]))


def main() -> None:
    pilot = Pilot(os.path.join(FOLDER, "protocol_regime.json"))
    spread, freedom = pilot.spread()
    print("\n".join(pilot.described()), f"\nspread {spread:.2%}, {freedom} degrees of freedom")
    print("after the effect of the seed is removed {:.2%}, {:.0f} degrees of freedom\n".format(
        *Fit(pilot.runs).spreads[REST]))
    frozen = read("")
    top = {(arm.removesuffix("_r2"), seed): run for (arm, seed), run in frozen.items()}
    runs = pilot.runs | {(f"{arm}_top", seed): run for (arm, seed), run in top.items()}

    def losses(model: str, rate: str) -> dict[int, float]:
        return {seed: run["val_loss"] for (arm, seed), run in runs.items() if arm == f"{model}_{rate}"}

    rows = []
    for rate, value in RATES.items():
        dense, row = losses("dense_12", rate), [value]
        for model in MODELS:
            own = losses(model, rate)
            ratios = [math.log(own[seed] / dense[seed]) for seed in own]
            of_rate = Fit(frozen).spreads[REST][0] if rate == "top" else spread
            error = of_rate * math.sqrt(2 / len(ratios))  # of a mean of differences between two runs
            text = " / ".join(f"{loss:.4f}" for loss in own.values())
            if model != "dense_12":
                text += f" ({math.expm1(sum(ratios) / len(ratios)):+.2%} ± {error:.2%})"
            row.append(text)
        rows.append(row)
    print(table(["learning rate", *MODELS.values()], rows))
    depth = math.log(frozen_mean(frozen, "dense_8") / frozen_mean(frozen, "dense_12"))
    print(f"8 layers {depth / Fit(frozen).spreads[REST][0]:.1f} standard deviations above 12")
    for rate, value in RATES.items():
        pairs = [[math.log(loss) for loss in losses(model, rate).values()] for model in MODELS]
        if any(len(pair) > 1 for pair in pairs):
            own, degrees = pooled_std(*pairs)
            three, fewer = pooled_std(*pairs[:-1])
            print(f"spread between the seeds at {value}: {own:.2%}, {degrees} degrees of freedom; without 1 "
                  f"sync {three:.2%}, {fewer}")

    for name in ("cold", "warm"):
        with open(os.path.join(FOLDER, "start", f"runs_{name}.jsonl")) as f:
            for run in map(json.loads, f):
                print(name, run["arm"], run["seconds"])
    for commit in dict.fromkeys(run["commit"] for run in frozen.values()):
        own = [run for run in frozen.values() if run["commit"] == commit]
        seconds = max(run["time"] for run in own) - min(run["time"] - run["seconds"]["wall"] for run in own)
        print(f"{len(own)} runs of the frozen protocol in {seconds:.0f} s on two GPUs, "
              f"{2 * seconds / len(own):.1f} s of a GPU each")
    with open(os.path.join(FOLDER, "sharing.json")) as f:
        shared = [part["updates"] for part in json.load(f)["bins"] if 100 <= part["from_s"] < 280]
    print(f"{2 * 20 * len(shared) / sum(shared) * 1e3:.1f} ms of a GPU for an update, shared")
    print_spread(frozen)
    print_intervals(frozen)


def print_intervals(runs: dict) -> None:
    """Print simultaneous intervals of all arms against the baseline, and how often intervals of the rest hold
    the truth if the four arms that vary most in the first two of three seeds are a group by chance."""
    spread, freedom = Fit(runs).spreads[REST]
    draw, arms = np.random.default_rng(0), len({arm for arm, _ in runs})
    means = draw.standard_normal((100_000, arms))
    largest = np.abs(means[:, 1:] - means[:, :1]).max(1) / math.sqrt(2)
    t = np.quantile(largest / np.sqrt(draw.chisquare(freedom, 100_000) / freedom), 0.95)
    print(f"simultaneous 95% intervals of {arms - 1} arms with two runs: t = {t:.2f}, ±{t * spread:.2%}")
    held = []
    for _ in range(2000):
        values = draw.standard_normal((arms, 3))
        wild = np.argsort(np.abs(values[1:, 0] - values[1:, 1]))[-4:] + 1
        found = {(f"{arm}", seed): {"status": "finished", "val_loss": math.exp(values[arm, seed])}
                 for arm in range(arms) for seed in range(3)}
        other = next(arm for arm in range(1, arms) if arm not in wild)
        low, high = Fit(found, {"wild": [f"{arm}" for arm in wild]}).contrast(
            {f"{other}": 1.0, "0": -1.0}).interval()
        held.append(low < 0 < high)
    print(f"a group chosen by chance: intervals of the rest cover {np.mean(held):.1%}")


def print_spread(runs: dict) -> None:
    """Print how the first two seeds of the frozen protocol differ, in groups of arms."""
    arms = {arm for arm, _ in runs}
    pairs = {arm: [runs[arm, seed] for seed in (11, 12)] for arm in sorted(arms)}
    val = {arm: math.log(b["val_loss"] / a["val_loss"]) for arm, (a, b) in pairs.items()}
    train = {arm: math.log(b["curve"][-1][2] / a["curve"][-1][2]) for arm, (a, b) in pairs.items()}
    correlation = np.corrcoef([*val.values()], [*train.values()])[0, 1]
    apart = np.std([val[arm] - train[arm] for arm in arms]) / math.sqrt(2)
    print(f"seed 12 against 11: correlation of val and train {correlation:.3f}, spread of their difference "
          f"{apart:.2%}")
    squares = {arm: change**2 for arm, change in val.items()}
    for arm in sorted(arms, key=squares.get)[-3:]:
        share = squares[arm] / sum(squares.values())
        print(f"{arm}: {math.expm1(val[arm]):+.2%}, {share:.0%} of the squares")
    few = {arm for arm in arms if arm.startswith(("drop_1_", "drop_2_"))}
    of_pilot = {"dense_12", "dense_8", "drop_4_r2", "drop_1_r2"}
    for name, group in (("all", arms), ("1 and 2 syncs", few), ("the others", arms - few),
                        ("dense", {arm for arm in arms if arm.startswith("dense")}),
                        ("the pilot's arms", of_pilot), ("without 1 sync", of_pilot - few)):
        print(f"spread, {name}: {math.sqrt(sum(squares[arm] for arm in group) / len(group) / 2):.2%}, "
              f"{len(group)} degrees of freedom")


if __name__ == "__main__":
    main()
