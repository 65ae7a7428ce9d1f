"""A factorial design of runs of train_gpt_fast.py, and the effects that its results show.

    python factors.py queue factors_6.json > queue.jsonl  # commands for run_queue.py
    python factors.py effects factors_6.json runs_6.jsonl chosen.json  # a table; the settings that are kept

A run has half of the factors, by a Hadamard matrix of 8 or 16 rows, so an effect is the difference of the
means of both halves. In the file, `factors` is {name: {setting: value}}, and `besides` has further runs of
the same form. Their number of steps is "steps", or follows from the tokens and a run's batch sizes. A factor
is kept if its effect is at most `keep`; without results none is. A run whose last loss is NaN has no result.
"""

import json
import math
import sys

import numpy as np
from scipy.linalg import hadamard

SHARES = [0.325, 0.325, 0.325, 0.025]  # of the steps, in stages


def steps_for(tokens: int, batch_sizes: list[int], sequence_length: int) -> int:
    """Return the steps that take about so many tokens."""
    return round(tokens / (sequence_length * np.dot(SHARES, batch_sizes)))


def command(plan: dict, name: str, settings: dict) -> list[str]:
    """Return the command of a run. settings: besides those of plan["command"]."""
    settings = {"seed": plan["seed"], "out_dir": f"out-{name}"} | settings
    steps = settings.pop("steps", None) or steps_for(
        plan["tokens"], settings.get("batch_sizes", plan["batch_sizes"]), plan["sequence_length"])
    given = {"num_iterations": steps} | settings
    return [*plan["command"], *(f"--{key}={value}" for key, value in given.items())]


def runs(plan: dict) -> list[tuple[str, list[str], dict]]:
    """Return (name, names of its factors, settings) of each run of the design."""
    names, found = list(plan["factors"]), []
    assert len(names) <= 15, "more than 15 factors"
    # (runs, factors): True where a run has a factor
    columns = hadamard(8 if len(names) <= 7 else 16)[:, 1:] < 0
    for i, row in enumerate(columns):
        chosen = [name for name, has in zip(names, row) if has]
        settings = {}
        for name in chosen:
            assert not settings.keys() & plan["factors"][name].keys(), f"{name}: a setting of two factors"
            settings |= plan["factors"][name]
        found.append((f"r{i:02}", chosen, settings))
    return found


def effects(plan: dict, results: dict[str, float]) -> dict[str, float]:
    """Return the effect of each factor, by least squares around the mean. results: name of a run -> final val
    loss. Of effects that the runs cannot tell apart, it takes those with the least sum of squares."""
    names, rows, losses = list(plan["factors"]), [], []
    for run, chosen, _ in runs(plan):
        if run in results:
            rows.append([0.5 if name in chosen else -0.5 for name in names])
            losses.append(results[run])
    if len(rows) < 2:
        print("no results of the design", file=sys.stderr)
        return {}
    # without the mean, which is larger than all effects, and becomes a part of them if a run is missing
    found, _, rank, _ = np.linalg.lstsq(rows - np.mean(rows, axis=0), losses - np.mean(losses), rcond=None)
    if rank < len(names):
        print(f"only {rank} of {len(names)} effects can be told apart: runs are missing", file=sys.stderr)
    return dict(zip(names, found))


def main() -> None:
    what, path, *more = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        plan = json.load(f)
    if what == "queue":
        besides = [(name, [], settings) for name, settings in plan.get("besides", {}).items()]
        for name, _, settings in [*besides, *runs(plan)]:
            print(json.dumps({"name": name, "start": plan["start"], "train": plan["train"],
                              "command": command(plan, name, settings)}))
        return
    results = {}
    with open(more[0], encoding="utf-8") as f:
        for run in map(json.loads, f):
            if run["step_val_ms"] and math.isfinite(run["step_val_ms"][-1][1]):
                results[run["name"]] = run["step_val_ms"][-1][1]
    found, settings = effects(plan, results), {}
    for name, effect in sorted(found.items(), key=lambda item: item[1]):
        kept = effect <= plan["keep"]
        settings |= plan["factors"][name] if kept else {}
        print(f"{name:16} {effect:+.4f} {'kept' if kept else ''}")
    for name in plan.get("besides", {}):
        print(f"{name:16} {results.get(name)}")
    with open(more[1], "w", encoding="utf-8") as f:
        f.write(json.dumps(settings) + "\n")


if __name__ == "__main__":
    main()
