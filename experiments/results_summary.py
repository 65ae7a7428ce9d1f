"""Compare runs of different sync schedules: final val loss against all-reduces a forward pass.

    python experiments/results_summary.py out-python-24sync out-python-12sync out-python-6sync
    python experiments/results_summary.py out-*sync --out=records/my-study/results

    python experiments/results_summary.py out-python-6sync --baseline=3.28 --threshold=1

Reads the logs of each out_dir, prints a table and a conclusion, and writes OUT.json, OUT.md and the
picture OUT.png. The baseline is the run with the most syncs, or the mean of all runs with so many, or the val
loss that --baseline names. Runs that differ in more than schedule and seed are not comparable; the table
names the settings in which they differ. These and runs that did not finish are not judged.
"""

import io
import math
import os
import statistics

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.report import number, table, without_nan, write
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write, json_text
from nanosync.run_log import RunLog

MOST_SYNCS = 10**6
SCHEDULE_SETTINGS = {"tp_size", "sync_strategy", "attn_sync_layers", "layers_per_group", "sync_points",
                     "block_types", "model_type", "tp_processes"}
IGNORED_SETTINGS = SCHEDULE_SETTINGS | {
    "out_dir", "seed", "wandb_log", "wandb_mode", "wandb_project", "wandb_run_name", "use_tensorboard",
    "log_interval", "device", "compile", "stop_if", "resume", "list_checkpoints", "checkpoint_interval",
    "sample_interval", "sample_prompt", "sample_tokens", "hellaswag_interval", "hellaswag_input", "timeout",
    "deterministic"}


def summary_of(out_dir: str) -> dict:
    """Summarise the run of an out_dir. Raises UserError."""
    log = RunLog.read(out_dir)
    losses = {event["step"]: math.nan if event["val_loss"] is None else event["val_loss"]
              for event in log.of("eval")}
    if not losses:
        raise UserError(f"{out_dir} has no evaluation in its logs: let the run get to its first")
    config = log.config if log.starts[0]["resumed"] else log.starts[0]["config"]
    for name in ("n_layer", "tp_size"):
        if type(config.get(name, 1)) is not int or config.get(name, 1) < 1:
            raise UserError(f"{out_dir} has {name}={shown(config[name])} in its log: it must be at least 1")
    if "n_layer" not in config:
        raise UserError(f"{out_dir} has no n_layer in its log: it is not the run of a model with layers")
    final, dense = max(losses), 2 * config["n_layer"]  # a dense model on ranks synchronises everywhere
    syncs = log.last("schedule").get("syncs", dense)
    if not 0 <= syncs <= MOST_SYNCS or dense > MOST_SYNCS:
        raise UserError(f"{out_dir} has {shown(syncs)} syncs and {config['n_layer']} layers in its log")
    return {"run": os.path.basename(os.path.normpath(out_dir)), "config": config,
            "syncs": syncs, "dense_syncs": dense, "step": final,
            "val_loss": losses[final],
            "best_val_loss": min(losses.values(), key=lambda loss: (math.isnan(loss), loss)),
            "status": "diverged" if math.isnan(losses[final]) else log.last("end").get("status", "not ended")}


def compare(runs: list[dict], baseline_loss: float | None, threshold: float) -> None:
    """Add to each run its percent above the baseline, the settings that make it not comparable, and `within`:
    whether it is at most threshold percent above; None if it is not judged.

    baseline_loss: val loss of the baseline, None to take that of the runs with the most syncs. A run that
        diverged has no percent, and is in no mean.
    """
    most = max(run["syncs"] for run in runs)
    baseline = [run for run in runs if run["syncs"] == most]
    losses = [run["val_loss"] for run in baseline if math.isfinite(run["val_loss"])]
    loss = (statistics.mean(losses) if losses else math.nan) if baseline_loss is None else baseline_loss
    reference = baseline[0]["config"]
    for run in runs:
        percent = 100 * (run["val_loss"] / loss - 1) if loss > 0 else math.nan
        run["percent"] = percent if math.isfinite(percent) else None
        keys = (set(run["config"]) | set(reference)) - IGNORED_SETTINGS
        run["differs"] = sorted(k for k in keys if run["config"].get(k) != reference.get(k))
        if run["step"] != baseline[0]["step"]:
            run["differs"].append("step")
        judged = run["status"] == "finished" and not run["differs"] and run["percent"] is not None
        run["within"] = run["percent"] <= threshold if judged else None


def conclusion(runs: list[dict], threshold: float, baseline_loss: float | None) -> str:
    """Return a sentence about the fewest syncs all of whose judged runs are within the threshold."""
    judged = [run for run in runs if run["within"] is not None]
    most = max(run["syncs"] for run in runs)
    if baseline_loss is None and all(run["percent"] is None for run in runs if run["syncs"] == most):
        return f"No run can be judged: no run with the most syncs, {most}, has a val loss above 0."
    against = f"the baseline's {most} syncs" if baseline_loss is None else f"a val loss of {baseline_loss:g}"
    counts = {run["syncs"] for run in judged if baseline_loss is not None or run["syncs"] < most}
    close = [n for n in counts if all(run["within"] for run in judged if run["syncs"] == n)]
    if not counts:
        return "No run can be judged: let the runs finish, with the same settings but for the schedule."
    if not close:
        return f"No schedule is within {threshold:g}% of {against}."
    n = min(close)
    dense = next(run["dense_syncs"] for run in judged if run["syncs"] == n)
    seeds = sum(run["syncs"] == n for run in judged)
    return (f"{n} syncs, {1 - n / dense:.0%} fewer than {dense}: within {threshold:g}% of {against} "
            f"({seeds} run{'s' * (seeds > 1)}).")


def runs_table(runs: list[dict], threshold: float) -> str:
    """Return the runs as a Markdown table."""
    judgement = {True: "yes", False: "no", None: "not judged"}
    return table(
        ["run", "ranks", "syncs", "step", "val loss", "vs. baseline", f"within {threshold:g}%", "status",
         "not comparable in"],
        [[run["run"], str(run["config"].get("tp_size", 1)), str(run["syncs"]), str(run["step"]),
          "-" if math.isnan(run["val_loss"]) else number(run["val_loss"]),
          "-" if run["percent"] is None else f"{run['percent']:+.2f}%", judgement[run["within"]],
          run["status"], ", ".join(run["differs"]) or "-"] for run in runs])


def draw(runs: list[dict], path: str) -> None:
    """Draw val loss against syncs: a colour for each tp_size, a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for ranks in sorted({run["config"].get("tp_size", 1) for run in runs}):
        points = [(r["syncs"], r["val_loss"]) for r in runs if r["config"].get("tp_size", 1) == ranks]
        points = [point for point in points if math.isfinite(point[1])]
        if not points:
            continue
        axes.plot(*zip(*points), "o", markersize=5, label=f"{ranks} ranks")
        counts = sorted({syncs for syncs, _ in points})
        means = [statistics.mean(loss for syncs, loss in points if syncs == count) for count in counts]
        axes.plot(counts, means, "-", color=axes.lines[-1].get_color(), linewidth=1)
    axes.set_xscale("log", base=2)
    counts = sorted({run["syncs"] for run in runs})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("all-reduces of a forward pass")
    axes.set_ylabel("val loss")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    write(path, picture.getvalue())


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out_dirs", nargs="+", metavar="OUT_DIR")
    parser.add_argument("--out", default="results_summary", help="path of the files, without ending")
    parser.add_argument("--baseline", type=float, metavar="LOSS", help="val loss to compare with")
    parser.add_argument("--threshold", type=float, default=2.0, metavar="PERCENT",
                        help="how far above the baseline's val loss a run may be (default: 2)")
    args = parser.parse_args()
    for name in ("baseline", "threshold"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name}={value} must be finite and above 0")
    if not os.path.basename(args.out) or os.path.isdir(args.out):
        raise UserError(f"--out={args.out} names no file: give a path without ending")
    check_can_write(os.path.dirname(args.out) or ".", "--out")
    runs = [summary_of(out_dir) for out_dir in args.out_dirs]
    compare(runs, args.baseline, args.threshold)
    runs.sort(key=lambda run: (-run["syncs"], run["config"].get("tp_size", 1), math.isnan(run["val_loss"]),
                               run["val_loss"]))
    text = runs_table(runs, args.threshold) + "\n" + conclusion(runs, args.threshold, args.baseline) + "\n"
    print(text, end="")
    write(args.out + ".json", json_text(without_nan(runs)))
    draw(runs, args.out + ".png")
    write(args.out + ".md", text)
    print(f"written: {args.out}.md, {args.out}.json, {args.out}.png")


if __name__ == "__main__":
    main()
