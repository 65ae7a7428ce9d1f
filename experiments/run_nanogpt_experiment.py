"""Train the same configuration several times with different seeds, and record the results.

    cd experiments
    python run_nanogpt_experiment.py --config configs/stage_a_screening/palm_screening.json --n_runs 2
    python run_nanogpt_experiment.py --config configs/baseline.json --n_runs 5 --n_gpus 4 --dry_run
    python run_nanogpt_experiment.py --resume experiment_logs/nanogpt_palm_screening_20261121_120000

--key=value for any key of the script replaces the JSON's value, as in --dataset=python_source_gpt2. The files
that it writes are described in experiment_logger.py. The runs are done one after the other; --parallel=4 does
four at a time on separate GPUs, whose timings then share the host. Ctrl-C or a kill ends all running runs.
--resume does the missing runs, each from its beginning, so that no measured time has a gap.
"""

import argparse
import math
import os

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.experiment_config import (
    MAX_RUNS,
    STAGES,
    check_data,
    check_settings,
    check_values,
    command,
    command_line,
    load_config,
    variables,
)
from experiments.experiment_logger import ExperimentLogger, read_folder, statistics_of
from experiments.runner import Job, end_on_signals, lock, recover, run_jobs, slots
from nanosync.errors import UserError
from nanosync.files import check_can_write, json_text


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the runner's options, and the arguments for the script. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="the experiment's JSON")
    parser.add_argument("--n_runs", type=int, help="default: 2 for stage A, 3 for B, 5 for C")
    parser.add_argument("--n_gpus", type=int, help="GPUs a run; on a CPU, processes (default: the JSON's)")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--limit_minutes", type=float, help="a run that takes longer is ended and has failed "
                        "(default: no limit)")
    parser.add_argument("--log_dir", default="experiment_logs", help="parent of the experiment's folder")
    parser.add_argument("--resume", metavar="DIR", help="resume the experiment in this folder")
    parser.add_argument("--retry_failed", action="store_true", help="with --resume: repeat failed runs, too")
    parser.add_argument("--dry_run", action="store_true", help="check, print the commands, and run nothing")
    args, overrides = parser.parse_known_args()
    if bool(args.config) == bool(args.resume):
        raise UserError("give --config=FILE for a new experiment or --resume=DIR to resume one")
    if args.resume and (overrides or args.n_gpus is not None):
        raise UserError(f"{[*overrides, '--n_gpus'][0]} would change the experiment in {args.resume}: "
                        f"its runs would not be comparable")
    if args.n_runs is not None and not 1 <= args.n_runs <= MAX_RUNS:
        raise UserError(f"--n_runs={args.n_runs} must be from 1 to {MAX_RUNS}")
    if args.limit_minutes is not None and not (math.isfinite(args.limit_minutes) and args.limit_minutes > 0):
        raise UserError(f"--limit_minutes={args.limit_minutes} must be finite and above 0")
    return args, overrides


def dry_run(config: dict, folder: str, run_ids: list[int], places: list) -> None:
    """Print the configuration and the commands."""
    print(json_text(config), end="")
    print(f"# {len(run_ids)} runs, {len(places)} at a time, into {folder}")
    for i, run_id in enumerate(run_ids):
        name = f"run_{run_id}_seed_{config['base_seed'] + run_id}"
        out_dir = os.path.join(os.path.abspath(folder), "runs", name, "out")
        print(command_line(command(config, run_id, out_dir), variables(config, places[i % len(places)])))


def main() -> None:
    args, overrides = arguments()
    if args.resume:
        described, results, _ = read_folder(args.resume)
        config, n_runs = described["config"], max(args.n_runs or 0, described.get("n_runs", 1))
        check_values(config, args.resume)
        check_settings(config, args.resume)
    else:
        config = load_config(args.config, overrides, args.n_gpus)
        results, n_runs = {}, args.n_runs or STAGES[config["stage"]]
    places = slots(config, args.parallel)
    if args.dry_run:
        missing = [i for i in range(n_runs) if i not in results
                   or (args.retry_failed and not results[i]["success"])]
        folder = args.resume or os.path.join(args.log_dir, f"{config['experiment_name']}_TIMESTAMP")
        return dry_run(config, folder, missing, places)
    if not args.resume:
        check_data(config)
        check_can_write(args.log_dir, "--log_dir")
    end_on_signals()
    if args.resume:
        descriptor = lock(args.resume)  # before its results are read, which another runner may be writing
        log = ExperimentLogger.reopen(args.resume, args.parallel)
    else:
        log = ExperimentLogger.create(config, args.log_dir, n_runs, args.parallel)
        descriptor = lock(log.folder)
    log.lock = descriptor
    if config["target_val_loss"] is None:
        log.line(f"{log.folder}: no target_val_loss: the configuration has it for its own data set only")
    n_runs = log.raise_n_runs(n_runs)
    recover(log, n_runs)
    execute(log, n_runs, args.retry_failed, places, 60 * (args.limit_minutes or 0.0))


def execute(log: ExperimentLogger, n_runs: int, retry_failed: bool, places: list, limit: float = 0.0) -> None:
    """Do the missing runs, and print how many succeeded.

    limit: seconds of a run, 0 for no limit. Raises UserError if no run succeeded.
    """
    missing = log.missing(n_runs, retry_failed)
    log.line(f"{log.folder}: {len(missing)} of {n_runs} runs to do, {len(places)} at a time on "
             f"{log.config['n_gpus']} GPU(s) each")

    tried = []  # results of this call only: the cause of an earlier failure may be fixed

    def may_start(job: Job) -> bool:
        """Return False if all of the first runs, which started together, failed before their first step: the
        others would fail as well. A run that fails before its neighbours end proves nothing about them."""
        if len(tried) < len(places) or any(result["final_step"] > 0 for result in tried):
            return True
        log.line(f"{job.name}: not started, because no run reached its first step")
        return False

    try:
        run_jobs([Job(log, i, limit) for i in missing], places, may_start,
                 lambda job, result: tried.append(result))
    except KeyboardInterrupt:
        log.say = print
        log.line(f"interrupted: resume with --resume {log.folder}")
        raise
    log.say = print
    good = [result for result in log.results.values() if result["success"]]
    script = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "analyze_results.py"))
    log.line(f"{len(good)} of {len(log.results)} runs succeeded; python {script} {log.folder}")
    log.line(summary_line(log))
    if not good:
        raise UserError(f"no run of {log.folder} succeeded: no validation loss captured (see results.jsonl "
                        f"and runs/*/stdout.log there)")


def summary_line(log: ExperimentLogger) -> str:
    """Return the statistics of the successful runs as a line."""
    found = statistics_of(list(log.results.values()), None)
    loss, n = found["val_loss"], found["successful_runs"]
    parts = [f"Runs: {n}/{found['n_runs']}"]
    if n:
        parts.append(f"val loss {loss['mean']:.4f}" + (f" ± {loss['std']:.4f}" if n > 1 else ""))
    if loss["ci_95"] is not None:
        parts.append(f"95% CI {loss['ci_95'][0]:.4f} to {loss['ci_95'][1]:.4f}")
    return ", ".join([*parts, f"best {loss['min']:.4f}"] if n else parts)


if __name__ == "__main__":
    main()
