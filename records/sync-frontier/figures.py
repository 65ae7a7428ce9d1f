"""Print the figures of README.md from the runs beside it, and write intervals.md.

    python records/sync-frontier/figures.py
"""

import json
import math
import os
import sys

import numpy as np
from scipy.special import chdtri, stdtr, stdtrit

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from experiments.experiment_statistics import pooled_std
from experiments.frontier_fit import Fit
from experiments.frontier_freeze import Pilot
from experiments.frontier_protocol import REST, Protocol
from experiments.frontier_runs import read_runs
from experiments.report import table
from experiments.search_evidence import percent

FOLDER = os.path.dirname(os.path.abspath(__file__))
GROUP, FEW = "1 and 2 syncs", ("drop_1_", "drop_2_")  # of protocol.json's spread_groups; its arms
UNSTABLE = "drop_2_r4", 12  # see clipped.json
ONE_GPU = "7d2ab59"  # commit of the runs on one GPU; the others were on two
RATES = {"low": "0.0006", "mid": "0.0012", "high": "0.0024", "top": "0.0048"}
MODELS = {"dense_12": "24 syncs", "dense_8": "8 layers", "drop_4": "4 syncs", "drop_1": "1 sync"}


def read() -> tuple[dict, dict]:
    """Return the runs of the frozen protocol and its groups of a spread."""
    protocol = Protocol.read(os.path.join(FOLDER, "protocol.json"))
    return read_runs(protocol.runs_path, protocol), protocol.values["spread_groups"]


def frozen_mean(runs: dict, arm: str) -> float:
    """Return the geometric mean of the losses of an arm."""
    return math.exp(np.mean([math.log(run["val_loss"]) for (name, _), run in runs.items() if name == arm]))


def main() -> None:
    runs, groups = read()
    fit, one = Fit(runs, groups), Fit(runs)
    print_rates(runs, groups, fit)
    print_times(runs)
    print_spreads(fit, one)
    print_two_seeds(runs)
    print_third_seed(runs, groups)
    print_unstable(runs, groups)
    print_chance()
    print_second_tier(fit)
    write_intervals(fit, one)


def print_rates(frozen: dict, groups: dict, fit: Fit) -> None:
    """Print what the pilot says, and the losses at each of its learning rates, with those of the frontier."""
    pilot = Pilot(os.path.join(FOLDER, "protocol_regime.json"))
    spread, freedom = pilot.spread()
    print("\n".join(pilot.described()), f"\nspread {spread:.2%}, {freedom} degrees of freedom")
    print("after the effect of the seed is removed {:.2%}, {:.0f} degrees of freedom\n".format(
        *Fit(pilot.runs).spreads[REST]))
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
            pair = [fit.spreads[name][0] if rate == "top" else spread
                    for name in (REST, GROUP if f"{model}_r2" in groups[GROUP] else REST)]
            error = math.hypot(*pair) / math.sqrt(len(ratios))  # of a mean of differences between two runs
            text = " / ".join(f"{loss:.4f}" for loss in own.values())
            if model != "dense_12":
                text += f" ({math.expm1(sum(ratios) / len(ratios)):+.2%} ± {error:.2%})"
            row.append(text)
        rows.append(row)
    print(table(["learning rate", *MODELS.values()], rows))
    depth = math.log(frozen_mean(frozen, "dense_8") / frozen_mean(frozen, "dense_12"))
    print(f"8 layers {depth / fit.spreads[REST][0]:.1f} standard deviations above 12")
    for rate, value in RATES.items():
        pairs = [[math.log(loss) for loss in losses(model, rate).values()] for model in MODELS]
        if any(len(pair) > 1 for pair in pairs):
            own, degrees = pooled_std(*pairs)
            three, fewer = pooled_std(*pairs[:-1])
            print(f"spread between the seeds at {value}: {own:.2%}, {degrees} degrees of freedom; without 1 "
                  f"sync {three:.2%}, {fewer}")


def print_times(frozen: dict) -> None:
    """Print the times of runs."""
    for name in ("cold", "warm"):
        with open(os.path.join(FOLDER, "start", f"runs_{name}.jsonl")) as f:
            for run in map(json.loads, f):
                print(name, run["arm"], run["seconds"])
    for commit in dict.fromkeys(run["commit"] for run in frozen.values()):
        own, gpus = [run for run in frozen.values() if run["commit"] == commit], 1 + (commit != ONE_GPU)
        seconds = max(run["time"] for run in own) - min(run["time"] - run["seconds"]["wall"] for run in own)
        print(f"{len(own)} runs of the frozen protocol in {seconds:.0f} s, GPUs: {gpus}, "
              f"{gpus * seconds / len(own):.1f} s of a GPU each")
    with open(os.path.join(FOLDER, "sharing.json")) as f:
        shared = [part["updates"] for part in json.load(f)["bins"] if 100 <= part["from_s"] < 280]
    print(f"{2 * 20 * len(shared) / sum(shared) * 1e3:.1f} ms of a GPU for an update, shared")


def print_spreads(fit: Fit, one: Fit) -> None:
    """Print the spreads of the fits, with groups and with one spread for all, and their 95% intervals."""
    raw = {"the rest": [logs for arm, logs in fit.logs.items() if not arm.startswith(FEW)],
           GROUP: [logs for arm, logs in fit.logs.items() if arm.startswith(FEW)],
           "all": [*fit.logs.values()]}
    for name, (own, degrees) in (fit.spreads | {"all": one.spreads[REST]}).items():
        low, high = (own * math.sqrt(degrees / chdtri(degrees, tail)) for tail in (0.025, 0.975))
        print(f"spread of {name}: {own:.2%} ({low:.2%} to {high:.2%}), {degrees:.0f} degrees of freedom; "
              "with the effect of the seed {:.2%}, {}".format(*pooled_std(*raw[name])))


def print_two_seeds(runs: dict) -> None:
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
    few = {arm for arm in arms if arm.startswith(FEW)}
    for name, group in (("all", arms), (GROUP, few), ("the others", arms - few),
                        ("dense", {arm for arm in arms if arm.startswith("dense")})):
        spread = math.sqrt(sum(squares[arm] for arm in group) / len(group) / 2)
        print(f"spread of seeds 11 and 12, {name}: {spread:.2%}, {len(group)} degrees of freedom")


def print_third_seed(runs: dict, groups: dict) -> None:
    """Print how seed 13, which was not there when the groups were chosen, differs from the two before."""
    logs = {key: math.log(run["val_loss"]) for key, run in runs.items()}
    arms = [arm for arm, seed in runs if seed == 13]
    before = {arm: (logs[arm, 11] + logs[arm, 12]) / 2 for arm in arms}
    for name in (REST, GROUP):
        own = [arm for arm in arms if (arm in groups[GROUP]) == (name == GROUP)]
        change = [logs[arm, 13] - before[arm] for arm in own]
        print(f"spread of seed 13 against 11 and 12, {name}: {np.std(change, ddof=1) / math.sqrt(1.5):.2%}, "
              f"{len(own) - 1} degrees of freedom")
    old, new = ([values[arm] - values["dense_12"] for arm in arms if arm != "dense_12"]
                for values in (before, {arm: logs[arm, 13] for arm in arms}))
    print(f"differences of {len(old)} arms from 24 syncs, seed 13 and the mean of 11 and 12: correlation "
          f"{np.corrcoef(old, new)[0, 1]:.2f}")


def print_unstable(runs: dict, groups: dict) -> None:
    """Print what changes without the run that was unstable."""
    others = {key: run for key, run in runs.items() if key != UNSTABLE}
    for name, (own, degrees) in (Fit(others, groups).spreads | {"all": Fit(others).spreads[REST]}).items():
        print(f"without {UNSTABLE}: spread of {name} {own:.2%}, {degrees:.0f} degrees of freedom")
    print(f"without {UNSTABLE}:", Fit(others, groups).contrast({UNSTABLE[0]: 1.0, "dense_12": -1.0}).text())


def print_chance() -> None:
    """Print how often intervals of the rest hold the truth if all arms vary alike, and the four that vary
    most in the first two of three seeds are made a group."""
    draw, arms, held = np.random.default_rng(0), 28, []
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


def print_second_tier(fit: Fit) -> None:
    """Print how the stable arms of tier_2 differ from 12 layers there and here, by the spread found here."""
    protocol = Protocol.read(os.path.join(FOLDER, "tier_2", "protocol.json"))
    runs, groups = read_runs(protocol.runs_path, protocol), protocol.values["spread_groups"]
    second, (spread, freedom) = Fit(runs, groups), fit.spreads[REST]
    arms = [arm for arm in second.arms if arm not in ("dense_12", *groups["unstable"])]
    for name, some in [*((arm, [arm]) for arm in arms), ("their mean", arms)]:
        weights = {arm: 1 / len(some) for arm in some} | {"dense_12": -1.0}
        here, there = fit.contrast(weights), second.contrast(weights)
        change, error = there.mean - here.mean, math.hypot(
            here.error, there.error * spread / second.spreads[REST][0])
        print(f"{name}: {math.expm1(here.mean):+.2%} here, {math.expm1(there.mean):+.2%} there, change "
              f"{change:+.2%} ± {error:.2%}, p = {2 * stdtr(freedom, -abs(change) / error):.3f}")
    told, df = second.spreads[REST]
    low, high = (told * math.sqrt(df / chdtri(df, tail)) for tail in (0.025, 0.975))
    print(f"spread there {told:.2%} ({df:.0f}), 95% interval {low:.2%} to {high:.2%}")
    for n in (1, 2):
        print(f"12 layers alone, {n} runs there: {spread * math.hypot(3**-0.5, n**-0.5):.2%}")


def write_intervals(fit: Fit, one: Fit) -> None:
    """Write intervals.md: each arm's difference from the baseline, its 95% interval, that with one spread for
    all, the simultaneous interval of all arms, and about which difference would be found with 80%."""
    draw, n = np.random.default_rng(0), 100_000
    first, arms = fit.arms.index("dense_12"), [arm for arm in fit.arms if arm != "dense_12"]
    errors, estimates = np.zeros((len(fit.design), n)), {}
    for name, runs_of in fit.members.items():
        spread, freedom = fit.spreads[name]
        errors[runs_of] = spread * draw.standard_normal((runs_of.sum(), n))
        estimates[name] = spread**2 * draw.chisquare(freedom, n) / freedom
    by_run = np.array([fit.inverse[fit.arms.index(arm)] - fit.inverse[first] for arm in arms])
    variances = sum(np.outer((by_run[:, runs_of]**2).sum(1), estimates[name])
                    for name, runs_of in fit.members.items())
    ratios = [fit.contrast({arm: 1.0, "dense_12": -1.0}) for arm in arms]
    freedom = np.array([[ratio.df] for ratio in ratios])
    p = 2 * stdtr(freedom, -np.abs(by_run @ errors / np.sqrt(variances)))
    level = np.quantile(p.min(0), 0.05)  # 5% of experiments without differences have a smaller p
    rows = []
    for arm, ratio in zip(arms, ratios, strict=True):
        alike, simultaneous = one.contrast({arm: 1.0, "dense_12": -1.0}), ratio.interval(1 - level)
        found = ratio.error * (stdtrit(ratio.df, 0.975) + stdtrit(ratio.df, 0.8))
        rows.append([arm, percent(ratio.mean), *(f"{percent(low)} to {percent(high)}" for low, high in (
            ratio.interval(), alike.interval(), simultaneous)), f"{found:.2%}"])
    with open(os.path.join(FOLDER, "intervals.md"), "w") as f:
        f.write(table(["arm", "against 24 syncs", "95% CI", "one spread for all",
                       f"simultaneous ({1 - level:.2%})", "found with 80%"], rows) + "\n")


if __name__ == "__main__":
    main()
