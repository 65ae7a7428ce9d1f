"""Compare experiments with the first one, the baseline A, and test if so few runs show a difference.

    python experiments/compare_experiments.py experiment_logs/baseline_* experiment_logs/palm_* [--out=STEM]

Prints a report and writes STEM.md, STEM.json and the picture STEM.png, by default beside A's folder. Welch's
t-test compares the final val losses, and the paired t-test those of the seeds that both have. Holm's method
adjusts for several comparisons, for each test separately. Conclusions follow Welch's test, because the test
must not be chosen by its result. The minimum detectable effect is the difference that these runs would have
found 4 times of 5 (--power) at p < 0.05 (--alpha) divided by the number of comparisons, as in Holm's first
step. "No difference found" says nothing about smaller differences.
"""

import os
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

import numpy as np

from configurator import Parser
from experiments.experiment_config import judged_by
from experiments.experiment_logger import differences
from experiments.experiment_statistics import (
    describe,
    hedges_g,
    holm,
    minimum_detectable,
    paired,
    welch,
)
from experiments.report import (
    Experiment,
    check_levels,
    draw,
    interval,
    number,
    p_value,
    read_experiment,
    table,
    time_to,
    without_nan,
    write,
)
from nanosync.errors import UserError
from nanosync.files import check_can_write, json_text, unused_path


def same_seeds(a: Experiment, b: Experiment) -> tuple[list[float], list[float]]:
    """Return the val losses of the seeds that succeeded in both, in the same order."""
    of_a, of_b = ({result["seed"]: result["final_val_loss"] for result in x.good} for x in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    return [of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds]


def compare(a: Experiment, b: Experiment, alpha: float, power: float) -> dict:
    """Return all figures of a comparison but the adjusted p-values.

    alpha: level for the minimum detectable effect.
    """
    pairs = same_seeds(a, b)
    both = paired(*pairs) if len(pairs[0]) > 1 else None
    loss = float(np.mean(a.losses))
    reached = [seconds for curve in b.curves if (seconds := time_to(curve, loss)) is not None]
    reached = {"runs": len(reached), "mean": float(np.mean(reached)) if reached else None}
    settings = {key: [x.settings.get(key, x.defaults.get(key)) for x in (a, b)]
                for key in sorted(a.settings.keys() | b.settings.keys())}
    return {"name": b.name, "folder": b.folder, "n_runs": len(b.results), "successful_runs": len(b.good),
            "val_loss": describe(b.losses), "time": describe(b.times),
            "welch": vars(welch(a.losses, b.losses)), "paired": None if both is None else vars(both),
            "hedges_g": hedges_g(a.losses, b.losses),
            "minimum_detectable": minimum_detectable(a.losses, b.losses, alpha, power),
            "time_ratio": float(np.mean(b.times) / np.mean(a.times)) if np.mean(a.times) else None,
            "time_to_baseline_loss": reached,
            "stage_settings": sorted(a.config["stage_config"].keys() | b.config["stage_config"].keys()),
            "made_otherwise": differences(a.made_by, b.made_by),
            "judged_otherwise": judged_otherwise(a, b),
            "differs_in": {key: [x, y] for key, (x, y) in settings.items() if x != y}}


def judged_otherwise(a: Experiment, b: Experiment) -> list[str]:
    """Return the settings in which the val tokens differ, so that losses are not comparable."""
    return sorted(differences(*(judged_by(x.defaults | x.settings) for x in (a, b))))


def n_tests(a: Experiment, others: list[Experiment]) -> int:
    """Count the comparisons over which Holm's method spreads alpha."""
    comparable = [b for b in others if not judged_otherwise(a, b)]
    return max(1, sum(welch(a.losses, b.losses).p is not None for b in comparable))


def adjust(comparisons: list[dict]) -> None:
    """Add p_holm to each test of each comparison; None where losses cannot be compared."""
    for test in ("welch", "paired"):
        tested = [c for c in comparisons if c[test] is not None]
        adjusted = holm([None if c["judged_otherwise"] else c[test]["p"] for c in tested])
        for one, p in zip(tested, adjusted):
            one[test]["p_holm"] = p


def conclusion(one: dict, baseline: str, alpha: float) -> str:
    """Describe the result of a comparison in a sentence."""
    test, name = one["welch"], one["name"]
    if one["judged_otherwise"]:
        return f"{name}: its losses are not comparable with {baseline}'s, whatever the tests say."
    if test["p"] is None:
        few = min(test["n"]) < 2
        reason = "a test needs two runs of each" if few else "the runs of neither differ"
        return f"{name}: cannot be tested: of {test['n'][0]} and {test['n'][1]} runs, {reason}."
    detectable = f"the minimum detectable effect is {number(one['minimum_detectable'])}"
    if test["p_holm"] >= alpha:
        return f"{name}: no difference from {baseline} found (p = {p_value(test['p_holm'])}); {detectable}."
    lower = "lower" if test["mean"] < 0 else "higher"
    return f"{name}: its loss is {lower} than {baseline}'s by {abs(test['mean']):.4f} " \
           f"(p = {p_value(test['p_holm'])}); {detectable}."


def warnings(a: Experiment, comparisons: list[dict]) -> list[str]:
    """Return the reasons why the numbers may mislead."""
    found = []
    for one in comparisons:
        differs = one["differs_in"]
        work = [key for key in differs if key in one["stage_settings"]
                and key not in (*one["judged_otherwise"], "device_batch_size", "val_loss_every")]
        gpus = [key for key in differs if key == "n_gpus"]
        for keys, what in ((one["judged_otherwise"], "their losses are not of the same tokens"),
                           (work, "that is another amount of work, not only another method"),
                           (gpus, "their times are of other hardware")):
            if keys:
                found.append(f"{one['name']} differs from {a.name} in {', '.join(keys)}: {what}.")
        for what, (ours, its) in one["made_otherwise"].items():
            found.append(f"{one['name']} was run with another {what} than {a.name} ({its}, not {ours}): "
                         f"differences may come from that.")
    for name, n, good in [(a.name, len(a.results), len(a.good)),
                          *((one["name"], one["n_runs"], one["successful_runs"]) for one in comparisons)]:
        if good < n:
            found.append(f"{n - good} of {n} runs of {name} failed and are in no statistic.")
    return found


def losses_table(a: Experiment, comparisons: list[dict]) -> str:
    """Return the table of losses and times, the baseline first."""
    ours = {"name": a.name, "successful_runs": len(a.good), "val_loss": describe(a.losses),
            "time": describe(a.times), "time_ratio": 1.0}
    rows = []
    for one in (ours, *comparisons):
        loss, seconds, reached = one["val_loss"], one["time"], one.get("time_to_baseline_loss")
        good = one["successful_runs"]
        rows.append([one["name"], str(good), number(loss["mean"]), number(loss["std"]),
                     interval(loss["ci_95"]),
                     f"{number(seconds['mean'], '.1f')} ± {number(seconds['std'], '.1f')}",
                     number(one["time_ratio"], ".3f"), "-" if reached is None else
                     f"{number(reached['mean'], '.1f')} ({reached['runs']} of {good} runs)"])
    return table(["experiment", "runs", "val loss", "std", "95% CI", "training time, s", "time / baseline's",
                  "s to the baseline's val loss"], rows)


def tests_table(comparisons: list[dict]) -> str:
    """Return the table of tests."""
    rows = []
    for one in comparisons:
        welch_, both = one["welch"], one["paired"] or dict.fromkeys(("interval", "p", "p_holm"))
        rows.append([one["name"], number(welch_["mean"], "+.4f"), interval(welch_["interval"], "+.4f"),
                     p_value(welch_["p"]), p_value(welch_["p_holm"]), interval(both["interval"], "+.4f"),
                     p_value(both["p"]), p_value(both["p_holm"]), number(one["hedges_g"], "+.2f"),
                     number(one["minimum_detectable"])])
    return table(["against the baseline", "difference", "95% CI", "p (Welch)", "p (Holm)", "95% CI, paired",
                  "p (paired)", "p (Holm)", "Hedges' g", "minimum detectable"], rows)


def report(a: Experiment, comparisons: list[dict], alpha: float, alpha_each: float, power: float,
           picture: str) -> str:
    """Return the report as Markdown."""
    settings = [[one["name"], key, str(x), str(y)] for one in comparisons
                for key, (x, y) in one["differs_in"].items()]
    notes = [*(conclusion(one, a.name, alpha) for one in comparisons), *warnings(a, comparisons)]
    return "\n".join([
        f"# {', '.join(one['name'] for one in comparisons)} against {a.name}\n",
        losses_table(a, comparisons), tests_table(comparisons),
        f"Two-sided at p < {alpha:g}; detectable with probability {power:g} at p < "
        f"{alpha_each:.3g}, as {round(alpha / alpha_each)} comparison(s) need; negative differences are "
        f"lower losses.\n",
        *(f"- {note}" for note in notes), f"\n![Val loss against step and time]({picture})\n",
        table(["experiment", "setting", a.name, "its own"], settings or [["-"] * 4])])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="A, the baseline, then the others")
    parser.add_argument("--out", metavar="STEM", help="path of the files, without ending")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the tests (default: 0.05)")
    parser.add_argument("--power", type=float, default=0.8, help="power to reach (default: 0.8)")
    args = parser.parse_args()
    check_levels(args)
    if args.power <= args.alpha:
        raise UserError(f"--power={args.power} must be above --alpha={args.alpha}: any test has at least the "
                        f"power alpha")
    folders = list(dict.fromkeys(map(os.path.normpath, args.folders)))
    if len(folders) < 2:
        raise UserError("give two folders or more: the baseline's, then those to be compared with it")
    if args.out is not None and (not os.path.basename(args.out) or os.path.isdir(args.out)):
        raise UserError(f"--out={args.out} names no file: give a path without ending")
    stem = args.out or unused_path(os.path.join(os.path.dirname(folders[0]),
                                                f"comparison_{time.strftime('%Y%m%d-%H%M%S')}"), ".md")
    stem = stem.removesuffix(".md")
    check_can_write(os.path.dirname(stem) or ".", "--out")
    experiments = [read_experiment(folder) for folder in folders]
    names = [experiment.name for experiment in experiments]
    for experiment in experiments:
        if names.count(experiment.name) > 1:
            experiment.name = os.path.basename(experiment.folder)
    write_comparison(experiments, stem, args.alpha, args.power)


def write_comparison(experiments: list[Experiment], stem: str, alpha: float, power: float) -> None:
    """Print the report; write it with its figures and its picture."""
    baseline, *others = experiments
    alpha_each = alpha / n_tests(baseline, others)
    comparisons = [compare(baseline, other, alpha_each, power) for other in others]
    adjust(comparisons)
    text = report(baseline, comparisons, alpha, alpha_each, power,
                  os.path.basename(stem) + ".png")
    target = baseline.config["target_val_loss"]
    figures = {"baseline": baseline.name, "alpha": alpha, "alpha_each": alpha_each, "power": power,
               "comparisons": comparisons}
    write(stem + ".json", json_text(without_nan(figures)))
    draw(experiments, target, stem + ".png")
    write(stem + ".md", text)
    print(text)
    print(f"written: {stem}.md, {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
