"""Compare runs of different sync schedules: final val loss against all-reduces a forward pass.

    python experiments/results_summary.py out-python-24sync out-python-12sync out-python-6sync
    python experiments/results_summary.py out-*sync --out=records/my-study/results

Reads the logs of each out_dir, prints a table, and writes OUT.json, OUT.md and the picture OUT.png. The
baseline is the run with the most syncs, or the mean of all runs with so many. Runs that differ in more than
schedule and seed are not comparable; the table names the settings in which they differ.
"""

import json
import math
import os
import statistics

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write
from nanosync.run_log import RunLog

CLOSE = 2.0  # percent above the baseline's val loss
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
    return {"run": os.path.basename(os.path.normpath(out_dir)), "config": config,
            "syncs": log.last("schedule").get("syncs", dense), "step": final, "val_loss": losses[final],
            "best_val_loss": min(losses.values(), key=lambda loss: (math.isnan(loss), loss)),
            "status": "diverged" if math.isnan(losses[final]) else log.last("end").get("status", "not ended")}


def compare(runs: list[dict]) -> None:
    """Add to each run its percent above the baseline, and the settings that make it not comparable."""
    most = max(run["syncs"] for run in runs)
    baseline = [run for run in runs if run["syncs"] == most]
    loss = statistics.mean(run["val_loss"] for run in baseline)
    reference = baseline[0]["config"]
    for run in runs:
        run["percent"] = 100 * (run["val_loss"] / loss - 1)
        run["within"] = run["percent"] <= CLOSE
        keys = (set(run["config"]) | set(reference)) - IGNORED_SETTINGS
        run["differs"] = sorted(k for k in keys if run["config"].get(k) != reference.get(k))
        if run["step"] != baseline[0]["step"]:
            run["differs"].append("step")


def table(runs: list[dict]) -> str:
    """Return the runs as a Markdown table."""
    lines = [f"| run | ranks | syncs | step | val loss | vs. baseline | within {CLOSE:g}% | status | not "
             "comparable in |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        lines.append(f"| {run['run']} | {run['config'].get('tp_size', 1)} | {run['syncs']} | {run['step']} | "
                     f"{run['val_loss']:.4f} | {run['percent']:+.2f}% | {'yes' if run['within'] else 'no'} | "
                     f"{run['status']} | {', '.join(run['differs']) or '-'} |")
    return "\n".join(lines) + "\n"


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
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("out_dirs", nargs="+", metavar="OUT_DIR")
    parser.add_argument("--out", default="results_summary", help="path of the files, without ending")
    args = parser.parse_args()
    if not os.path.basename(args.out) or os.path.isdir(args.out):
        raise UserError(f"--out={args.out} names no file: give a path without ending")
    check_can_write(os.path.dirname(args.out) or ".", "--out")
    runs = [summary_of(out_dir) for out_dir in args.out_dirs]
    compare(runs)
    runs.sort(key=lambda run: (-run["syncs"], run["config"].get("tp_size", 1), run["val_loss"]))
    print(table(runs), end="")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".md", "w", encoding="utf-8") as f:
        f.write(table(runs))
    with open(args.out + ".json", "w", encoding="utf-8") as f:
        json.dump(runs, f, indent=1)
    draw(runs, args.out + ".png")
    print(f"written: {args.out}.md, {args.out}.json, {args.out}.png")


if __name__ == "__main__":
    main()
