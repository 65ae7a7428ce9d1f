"""Analyse the runs of an experiment: their spread, and a test that the mean is below the target.

    python experiments/analyze_results.py experiment_logs/nanogpt_baseline_20261121_120000 [DIR ...]

    python experiments/analyze_results.py experiment_logs/fast_* --frontier=frontier --points=peer.csv \
        --reference=peer --at=60,120,240

For each folder prints a report and writes analysis.md, analysis.json and loss_curves.png into it. The test is
Student's, one-sided: if the mean over seeds were not below the target, p < 0.01 would occur in fewer than one
of a hundred such experiments. A target belongs to a data set: runs on another data set than their
configuration's have no target, unless --target names one. Failed runs are counted but are in no statistic. If
the cause of a failure depends on the loss, as that of a divergence does, the statistics are too good.

--frontier=STEM does another analysis: final val loss against training time of experiments of several lengths,
see time_frontier.py. Experiments of one name are a family. Prints a report and writes STEM.md, STEM.json and
the picture STEM.png. --target names a loss to reach.
"""

import os

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments import time_frontier
from experiments.experiment_config import MAX_NUMBER, in_range
from experiments.experiment_statistics import describe, differ, p_at_most, runs_needed
from experiments.report import (
    Experiment,
    check_levels,
    draw,
    interval,
    number,
    p_value,
    read_experiment,
    table,
    without_nan,
    write,
)
from nanosync.errors import UserError, shortened, shown
from nanosync.files import check_can_write, json_text


def analyze(experiment: Experiment, target: float | None, alpha: float, power: float) -> dict:
    """Return all figures of the report."""
    loss, p = describe(experiment.losses), p_at_most(experiment.losses, target)
    baseline, std = experiment.config["baseline_val_loss"], experiment.config["baseline_std"]
    against = None
    if baseline is not None:
        difference = loss["mean"] - baseline
        against = {"baseline_val_loss": baseline, "difference": difference,
                   "in_baseline_stds": difference / std if std else None}
    return {"experiment_name": experiment.name, "n_runs": len(experiment.results),
            "successful_runs": len(experiment.good), "val_loss": loss, "time": describe(experiment.times),
            "target": {"val_loss": target, "alpha": alpha, "p_value": p,
                       "reached": None if p is None else p < alpha, "power": power,
                       "runs_needed": runs_needed(loss["mean"], loss["std"], target, alpha, power)},
            "baseline": against}


def verdict(figures: dict) -> str:
    """Describe the test in a sentence."""
    target, loss = figures["target"], figures["val_loss"]
    if target["val_loss"] is None:
        return "No target to test against: the configuration has none for this data set; --target names one."
    against = f"{target['val_loss']:g} at p < {target['alpha']:g}"
    if target["p_value"] is None:
        why = "one run has no spread" if figures["successful_runs"] == 1 else "the runs do not differ"
        return f"Cannot test if the mean is at most {against}: {why}."
    shown = "" if target["reached"] else "not shown to be "
    text = f"The mean is {shown}at most {against}: one-sided t-test, p = {p_value(target['p_value'])}."
    if target["runs_needed"] is not None:
        text += f" If mean and std are as measured, {target['runs_needed']} runs show it with a " \
                f"probability of {target['power']:g}."
    elif loss["mean"] >= target["val_loss"]:
        above = loss["mean"] - target["val_loss"]
        text += f" The measured mean is {above:.4f} above it: more runs will not show it."
    return text


def report(experiment: Experiment, figures: dict) -> str:
    """Return the report as Markdown."""
    rows = []
    for result in experiment.results:
        state = "" if result["success"] else f"failed, not counted: {result.get('error', '')}"
        rows.append([str(result["run_id"]), str(result["seed"]), number(result["final_val_loss"]),
                     number(result.get("final_train_loss")), number(result["time_seconds"], ".1f"),
                     str(result.get("final_step", "-")), state])
    loss, time = figures["val_loss"], figures["time"]
    statistics = table(
        ["", "mean", "std", "95% CI of the mean", "median", "min", "max"],
        [[name, *(number(x[key], form) for key in ("mean", "std")), interval(x["ci_95"], form),
          *(number(x[key], form) for key in ("median", "min", "max"))]
         for name, x, form in (("val loss", loss, ".4f"), ("training time, s", time, ".1f"))])
    notes = [verdict(figures)]
    if experiment.failed:
        notes.append(f"{experiment.failed} of {len(experiment.results)} runs failed and are in no statistic.")
    if len(experiment.losses) > 1 and not differ(experiment.losses):
        notes.append("All runs have the same loss: check that the seed changes the run.")
    if figures["baseline"] is not None:
        against = figures["baseline"]
        stds = against["in_baseline_stds"]
        notes.append(f"Against the baseline_val_loss {against['baseline_val_loss']:g} of its configuration, "
                     f"as if that were exact: {against['difference']:+.4f}"
                     + ("." if stds is None else f", {stds:+.1f} of its std."))
    what = experiment.config
    about = f"{what['description']}\n\n" if what["description"] else ""
    return f"# {experiment.name}\n\n{about}{what['stage']}, {what['n_gpus']} GPU(s), `{what['script']}`\n\n" \
        + table(["run", "seed", "val loss", "train loss", "time, s", "step", ""], rows) + "\n" \
        + statistics + "\n" + "\n".join(f"- {note}" for note in notes) + "\n\n![Val loss](loss_curves.png)\n"


def write_frontier(args, experiments: list[Experiment]) -> None:
    """Analyse final losses against time: print and write the report. Raises UserError."""
    families, notes = time_frontier.families_of(experiments)
    for path in dict.fromkeys(args.points):
        families += time_frontier.read_points(path)
    names = [family.name for family in families]
    if not names:
        raise UserError("--frontier needs experiments: give their folders, or --points=FILE")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{shown(twice[0])} is the name of two families: rename one in its file of --points")
    if args.reference is not None and args.reference not in names:
        raise UserError(f"--reference={shown(args.reference)} is no family: use one of "
                        f"{shortened(', '.join(names), 300)}")
    reference = next((family for family in families if family.name == args.reference), None)
    targets = [] if args.target is None else [args.target]
    at = args.at or (reference or families[0]).seconds()
    found = time_frontier.figures(families, reference, targets, at)
    stem = args.frontier
    text = time_frontier.report(found, notes, os.path.basename(stem) + ".png")
    time_frontier.draw(families, targets, stem + ".png")
    write(stem + ".json", json_text(without_nan(found)))
    write(stem + ".md", text)
    print(text)
    print(f"written: {stem}.md, {stem}.json, {stem}.png")


def seconds_of(text: str) -> list[float]:
    """Parse --at. Raises UserError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(in_range(value) and value > 0 for value in values):
        raise UserError(f"--at={shown(text)} must be seconds, separated by commas: --at=60,120,240")
    return values


def check_frontier(args) -> None:
    """Raise UserError for options that do not belong together. Parses --at."""
    if args.frontier is None:
        for name in ("points", "reference", "at"):
            if getattr(args, name):
                raise UserError(f"--{name} is for the analysis by time: add --frontier=STEM")
        if not args.folders:
            raise UserError("give the folder of an experiment or more (--help lists the options)")
        return
    args.frontier = args.frontier.removesuffix(".png")
    if not os.path.basename(args.frontier) or os.path.isdir(args.frontier):
        raise UserError(f"--frontier={args.frontier} names no file: give a path without ending")
    check_can_write(os.path.dirname(args.frontier) or ".", "--frontier")
    args.at = seconds_of(args.at) if args.at is not None else None


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", metavar="DIR")
    parser.add_argument("--target", type=float, help="val loss (default: the experiment's target_val_loss)")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the test (default: 0.01)")
    parser.add_argument("--power", type=float, default=0.8, help="power to reach (default: 0.8)")
    parser.add_argument("--frontier", metavar="STEM", help="analyse final losses against time; path of the "
                        "files, without ending")
    parser.add_argument("--points", action="append", default=[], metavar="FILE", help="with --frontier: runs "
                        "of other programs, JSON or CSV of name, seed, seconds, loss and, if known, steps")
    parser.add_argument("--reference", metavar="NAME", help="with --frontier: the family to compare with")
    parser.add_argument("--at", metavar="SECONDS", help="with --frontier: times at which to compare, as in "
                        "60,120,240 (default: those of the reference)")
    args = parser.parse_args()
    check_levels(args)
    check_frontier(args)
    if args.target is not None and not in_range(args.target, -MAX_NUMBER):
        raise UserError(f"--target={args.target} must be finite")
    experiments = [read_experiment(folder) for folder in dict.fromkeys(args.folders)]
    if args.frontier is not None:
        return write_frontier(args, experiments)
    for experiment in experiments:
        check_can_write(experiment.folder, "DIR")
    for experiment in experiments:
        target = experiment.config["target_val_loss"] if args.target is None else args.target
        figures = analyze(experiment, target, args.alpha, args.power)
        text = report(experiment, figures)
        names = [os.path.join(experiment.folder, name)
                 for name in ("loss_curves.png", "analysis.json", "analysis.md")]
        draw([experiment], target, names[0])
        write(names[1], json_text(without_nan(figures)))
        write(names[2], text)
        print(text)
        print(f"written: {', '.join(names)}\n")


if __name__ == "__main__":
    main()
