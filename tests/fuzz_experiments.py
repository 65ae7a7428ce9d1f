"""Fuzz test of what experiments and analyses read: configurations, plans, folders, output of runs, logs.

As tests/fuzz.py: a mutated file must be read or refused with a UserError of one line. What a runner records
of a mutated run must be readable again.

    python tests/fuzz_experiments.py                          # 500 mutations of each kind
    python tests/fuzz_experiments.py --n=20 --kinds=plan,status --seed=3
    python tests/fuzz_experiments.py --keep=FOLDER            # keep the files of the findings
"""

import contextlib
import functools
import io
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import fuzz
import fuzzing
import matplotlib.pyplot  # noqa: F401  so that a forked child need not import it
import runner_kills
from fuzzing import mutate_bytes, mutate_json, mutate_lines

import visualize_training
from experiments import (
    analyze_results,
    compare_experiments,
    experiment_config,
    experiment_logger,
    report,
    results_summary,
    run_stages,
    runner,
)
from experiments.campaign import Plan, decide
from experiments.experiment_config import STAGES, load_config
from experiments.experiment_logger import ExperimentLogger, read_folder
from nanosync.errors import UserError
from nanosync.files import json_text, write_json

ARMS = "baseline", "good"
RUN = "logs/a/runs/run_2_seed_44/"  # ended, and not recorded
CAMPAIGN = "campaign/toy/"


def quiet(text: str) -> None:
    """Print nothing."""


def make_experiment(folder: Path, losses: tuple[float, ...]) -> None:
    """An experiment with a result and a curve of each loss, and one failed run."""
    config = load_config(str(runner_kills.write_experiment(folder.parent, folder.name, effect=0.1)))
    log = ExperimentLogger.create(config, str(folder.parent), 3, 1, quiet)
    for i, loss in enumerate((*losses, None)):
        rows = [{"step": step, "val_loss": 3.0 + (loss or 0.0) / (1 + step), "train_time_ms": 1.0 * step,
                 "step_avg_ms": 1.0} for step in (0, 10, 20)]
        result = {"run_id": i, "seed": 42 + i, "final_val_loss": loss, "final_train_loss": loss,
                  "time_seconds": 0.2, "wall_seconds": 1.0, "gpus": 1, "final_step": 20,
                  "success": loss is not None}
        if loss is None:
            result |= {"run_id": 3, "seed": 45, "error": "crashed", "ended_by": "itself",
                       "output_tail": ["x"]}
        log.record(result, rows)
    log.note("begun")
    os.rename(log.folder, folder)


def make_run(folder: Path) -> None:
    """The folder of a run that has ended."""
    (folder / "out").mkdir(parents=True)
    write_json(str(folder / "report.json"), {"code": 0, "seconds": 2.0, "ended_by": "itself"})
    write_json(str(folder / "out" / "status.json"), {"status": "finished", "step": 20})
    (folder / "stdout.log").write_text("".join(f"step:{i}/20 val_loss:3.1\n" for i in range(30)))
    config = {"num_iterations": 20, "batch_size": 8, "effect": 0.1, "seed": 44}
    clock = {"train_time_ms": 1.0, "step_avg_ms": 1.0}
    events = [{"event": "start", "time": 1e9, "config": config, "environment": {}, "resumed": False}]
    events += [{"event": "iter", "step": i, "time": 1e9 + i, "loss": 3.0, "lr": 0.1, "norm": None,
                "seconds": 0.1, "tokens_per_second": 1.0, "mfu": None, **clock} for i in range(20)]
    events += [{"event": "eval", "step": i, "time": 1e9 + i, "train_loss": 3.0, "val_loss": 3.1, "lr": 0.1,
                **clock} for i in (0, 20)]
    (folder / "out" / "run_1.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def make_campaign(folder: Path) -> None:
    """A plan with its configurations, and a campaign with a reservation that was never settled."""
    for stage in STAGES:
        for i, arm in enumerate(ARMS):
            runner_kills.write_experiment(folder, arm, stage, effect=0.1 * i)
    stages = [{"stage": stage, "config": "{variant}_" + stage + ".json", "n_runs": 2} for stage in STAGES]
    plan = {"campaign_name": "toy", "baseline": ARMS[0], "variants": [*ARMS[1:]], "target_val_loss": 3.7,
            "settings": {ARMS[1]: {"effect": 0.1}}, "stages": stages, "most_advanced": 1,
            "most_proved": 1, "probe_steps": 5,
            "budget": {"gpu_hours": 1, "gpu_hours_per_run": 0.2, "probe_gpu_hours": 0.1,
                       "price_per_gpu_hour": 2.5}}
    write_json(str(folder / "plan.json"), plan)
    os.chdir(folder)
    campaign = open_campaign(folder)
    for run, what in enumerate(("probe", "run", "run")):
        key = {"key": f"{what} {run}", "stage": next(iter(STAGES)), "variant": ARMS[0]}
        campaign._enter(what="reserve", reserved=100.0, n_gpus=1, folder="nowhere", **key)
        if run < 2:
            campaign._enter(what="settle", spent=10.0, measured=20.0 if run else None, **key)
    campaign.tell(decide(Plan(ARMS[0], ARMS[1:], dict.fromkeys(STAGES, 2), 3.7), campaign.results,
                         lambda batch: False)[0])
    os.close(campaign.lock)


def open_campaign(folder: Path) -> run_stages.Campaign:
    """Read a plan and its configurations, and open the campaign, as run_stages.py does."""
    path = str(folder / "plan.json")
    plan = run_stages.read_plan(path)
    configs = run_stages.read_configs(plan, path, [])
    run_stages.check_cap(plan, plan["stages"], configs, path)
    run_stages.target_of(plan, configs)
    return run_stages.Campaign(str(folder / plan["campaign_name"]), plan, [], configs, 1)


def make_good_files(folder: Path) -> None:
    logs = folder / "logs"
    make_experiment(logs / "a", (3.2, 3.3))
    make_experiment(logs / "b", (3.0, 3.1))
    make_run(folder / RUN)
    make_campaign(folder / "campaign")
    fuzz.make_log(folder / "out")
    fuzz.make_log(folder / "other")
    runs = [{"name": name, "seed": seed, "seconds": seconds + seed / 10, "loss": seed / 100 + 50 / seconds}
            for name in ("peer", "ours") for seconds in (60, 120) for seed in (1, 2)]
    write_json(str(folder / "runs.json"), runs)
    lines = ["name,seed,seconds,loss", *(",".join(map(str, run.values())) for run in runs)]
    text = "\n".join(lines).replace("peer", "third").replace("ours", "fourth")
    (folder / "runs.csv").write_text(text + "\n")


def read_configuration(folder: Path) -> None:
    """Read an experiment's JSON and its script as the runner does, up to the commands."""
    config = load_config(str(folder / "logs" / "a_stage_a_screening.json"), ["--effect=0.5"])
    text = experiment_config.command_line(experiment_config.command(config, 1, "out"),
                                          experiment_config.variables(config, "0"))
    experiment_config.check_data(config)
    assert text.isprintable() or "\n" in text
    json_text(config).encode()


def read_campaign(folder: Path) -> None:
    """Open a campaign, decide and write the report."""
    campaign = open_campaign(folder / "campaign")
    decisions = decide(Plan(ARMS[0], ARMS[1:], dict.fromkeys(STAGES, 2), 3.7), campaign.results,
                       lambda batch: False)[0]
    campaign.tell(decisions)
    json_text(campaign.budget.spent)


def read_plan(folder: Path) -> None:
    """Do what --dry_run does, and open the campaign."""
    plan = run_stages.read_plan(str(folder / "campaign" / "plan.json"))
    configs = run_stages.read_configs(plan, str(folder / "campaign" / "plan.json"), [])
    run_stages.dry_run(plan, run_stages.stages_until(plan, None), configs)
    read_campaign(folder)


def read_experiments(folder: Path) -> None:
    """Analyse an experiment and compare it with another, as the scripts do; resume it."""
    for name in ("a", "b"):
        one = report.read_experiment(str(folder / "logs" / name))
        figures = analyze_results.analyze(one, one.config["target_val_loss"], 0.01, 0.8)
        check_report(analyze_results.report(one, figures), figures)
    read = [report.read_experiment(str(folder / "logs" / name)) for name in ("a", "b")]
    compare_experiments.write_comparison(read, str(folder / "comparison"), 0.05, 0.8)
    written = (folder / "comparison.json").read_text()
    check_report((folder / "comparison.md").read_text(), json.loads(written))
    log = ExperimentLogger.reopen(str(folder / "logs" / "a"), 1, quiet)
    log.write_summary()


def read_points(folder: Path) -> None:
    """Analyse runs of other programs by their time."""
    run_main(analyze_results, f"--points={folder / 'runs.json'}", f"--points={folder / 'runs.csv'}",
             f"--frontier={folder / 'frontier'}", "--target=0.5", "--at=80")
    written = (folder / "frontier.json").read_text()
    check_report((folder / "frontier.md").read_text(), json.loads(written))


def check_report(text: str, figures: dict) -> None:
    """Raise AssertionError for nan in a report."""
    assert "nan" not in text.replace("variant", "").split(), "a report has nan"
    json.dumps(figures, allow_nan=False)


def read_run(folder: Path) -> None:
    """Record an ended run, and read the record again."""
    log = ExperimentLogger.reopen(str(folder / "logs" / "a"), 1, quiet)
    progress = runner.RunProgress(str(folder / RUN / "out"))
    progress.update()
    progress.seconds_left(20)
    job, where = runner.Job(log, 2), str(folder / RUN)
    runner.settle(job, *runner.result_of(job, where, runner.read_report(where) or {
        "code": None, "seconds": 1.0, "ended_by": "unknown"}))
    written = (folder / "logs" / "a" / "experiment.log").read_text()
    assert all(text.isprintable() for text in written.replace("\t", "").splitlines()), "a log to be printed"
    try:
        read_folder(log.folder)
    except UserError as e:
        raise AssertionError(f"what is recorded cannot be read: {e}") from None
    runner.recover(log, 5)


def read_summary(folder: Path) -> None:
    """Compare the runs of two out_dirs by their syncs, as results_summary.py does."""
    run_main(results_summary, str(folder / "out"), str(folder / "other"), f"--out={folder / 'summary'}")
    json.loads((folder / "summary.json").read_text(), parse_constant=lambda name: 1 / 0)


def read_picture(folder: Path) -> None:
    run_main(visualize_training, str(folder / "out"), f"--out={folder / 'picture.png'}")


def run_main(script, *arguments: str) -> None:
    """Run the main function of a script."""
    sys.argv = [script.__file__, *arguments]
    script.main()


def read_estimate(folder: Path, *arguments: str) -> None:
    """Run estimate_training_time.py."""
    hook, sys.argv = sys.excepthook, ["estimate_training_time.py", *(arguments or [str(folder / "out")])]
    path = str(Path(visualize_training.__file__).parent / "estimate_training_time.py")
    try:
        exec(fuzz.ESTIMATE, {"__file__": path, "__name__": "__main__"})
    finally:
        sys.excepthook = hook


KINDS = {  # name -> file that is mutated, how, function that reads
    "configuration": ("logs/a_stage_a_screening.json", mutate_json, read_configuration),
    "script": ("logs/fake_train.py", mutate_bytes, read_configuration),
    "plan": ("campaign/plan.json", mutate_json, read_plan),
    "campaign_plan": (CAMPAIGN + "plan.json", mutate_json, read_campaign),
    "ledger": (CAMPAIGN + "ledger.jsonl", mutate_lines, read_campaign),
    "decisions": (CAMPAIGN + "decisions.jsonl", mutate_lines, read_campaign),
    "experiment": ("logs/a/config.json", mutate_json, read_experiments),
    "results": ("logs/a/results.jsonl", mutate_lines, read_experiments),
    "metrics": ("logs/a/metrics.jsonl", mutate_lines, read_experiments),
    "points": ("runs.json", mutate_json, read_points),
    "points_csv": ("runs.csv", mutate_bytes, read_points),
    "status": (RUN + "out/status.json", mutate_json, read_run),
    "report": (RUN + "report.json", mutate_json, read_run),
    "output": (RUN + "stdout.log", mutate_bytes, read_run),
    "run_log": (RUN + "out/run_1.jsonl", mutate_lines, read_run),
    "summary": ("out/run_1.jsonl", mutate_lines, read_summary),
    "estimate": ("out/run_1.jsonl", mutate_lines, read_estimate),
    "picture": ("out/run_1.jsonl", mutate_lines, read_picture),
}
CHANGED = tuple(f"logs/a/{name}" for name in ("results.jsonl", "metrics.jsonl", "summary.json", "config.json",
                                              "experiment.log")) \
    + tuple(CAMPAIGN + name for name in ("plan.json", "ledger.jsonl", "decisions.jsonl", "report.md"))


def fuzz_kinds(names: list[str], n: int, seed: int, folder: Path, keep: Path | None = None) -> list[str]:
    """Try n mutations of each kind; return the findings."""
    here = os.getcwd()
    experiment_logger.git_info = functools.cache(experiment_logger.git_info)
    experiment_logger.gpu_info = runner.gpu_info = functools.cache(experiment_logger.gpu_info)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make_good_files(folder)
        return fuzzing.fuzz(KINDS, names, n, seed, folder, keep and keep.absolute(), also=CHANGED)
    finally:
        os.chdir(here)


if __name__ == "__main__":
    fuzzing.main(__doc__, KINDS, fuzz_kinds)
