"""The scripts of experiments/: a runner whose runs go wrong, killed runners, a campaign, and train_gpt.py
through the whole pipeline. CPU.

    python -m pytest tests/scripts/test_experiment_scripts.py
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runner_kills
from helpers import PATIENCE, ROOT, Forked, python, python_command, write_dataset

from experiments import runner
from experiments.experiment_config import STAGES
from nanosync.errors import UserError

A, B, C = STAGES
CONFIGS = ROOT / "experiments" / "configs"
TOY = ["--device=cpu", "--compile=False", "--n_layer=5", "--n_head=2", "--n_embd=32", "--sequence_length=32",
       "--batch_size=8", "--device_batch_size=8", "--num_iterations=40", "--warmdown_iters=10",
       "--val_loss_every=10", "--val_tokens=1024", "--learning_rate=0.01"]


def run(script: str, *args, cwd: Path, code: int = 0) -> str:
    """Run a script of experiments/ and return what it printed."""
    done = python(f"experiments/{script}", *args, cwd=cwd, TEST_PYTHON=python_command())
    assert done.code == code, done.out + done.err
    assert code != 2 or done.err.count("\n") == 1, done.err
    return done.out + done.err


def only(folder: Path, pattern: str = "*") -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def test_dry_run_prints_the_commands(tmp_path):
    path = runner_kills.write_experiment(tmp_path, n_gpus=2, effect=0.5)
    said = run("run_nanogpt_experiment.py", "--config", path, "--n_runs", 2, "--dry_run", cwd=tmp_path)
    commands = [line for line in said.splitlines() if "torch.distributed.run" in line]
    assert len(commands) == 2 and "--seed=42" in commands[0] and "--seed=43" in commands[1]
    assert all("--nproc_per_node=2" in line and "--effect=0.5" in line for line in commands)
    assert not (tmp_path / "experiment_logs").exists()


def test_runs_that_go_wrong(tmp_path):
    """Each is recorded as failed with its reason and the end of its output, and is in no statistic."""
    wrong = {43: "crash", 44: "other format", 45: "not finite", 46: "diverged", 47: "other settings",
             48: "stops early", 49: "refuse"}
    path = runner_kills.write_experiment(tmp_path, behaviours=wrong)
    run("run_nanogpt_experiment.py", "--config", path, "--n_runs", 9, "--parallel", 3, cwd=tmp_path)
    folder = only(tmp_path / "experiment_logs")
    results = runner_kills.results(tmp_path)
    errors = {wrong[row["seed"]]: row["error"] for row in results.values() if not row["success"]}
    for what, words in {
            "crash": "crashed at step 7 (exit code 1)", "other format": "no validation loss captured",
            "not finite": "the last validation loss is None", "diverged": "non_finite at step 20",
            "other settings": "asked for batch_size=8 and ran with 3",
            "stops early": "no validation loss captured at step 20: the last is of 15",
            "refuse": "left no status.json"}.items():
        assert words in errors.pop(what)
    assert not errors
    assert results[1]["output_tail"][-1] == "RuntimeError: the GPU has fallen off the bus"
    assert r"\x00\x1b[2J\xff" in results[1]["output_tail"]
    assert b"\x1b" not in (folder / "experiment.log").read_bytes()
    assert results[7]["output_tail"] == ["error: no data set"]
    before = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").unlink()  # as if the runner had been killed before it could record
    run("run_nanogpt_experiment.py", "--resume", folder.relative_to(tmp_path), cwd=tmp_path)
    assert (folder / "results.jsonl").read_text() == before and len(os.listdir(folder / "runs")) == 9
    summary = json.loads((folder / "summary.json").read_text())["statistics"]
    good = [results[i]["final_val_loss"] for i in (0, 8)]
    assert summary["val_loss"]["mean"] == pytest.approx(np.mean(good)) and summary["successful_runs"] == 2
    assert summary["n_runs"] == 9 and summary["time"]["total"] == pytest.approx(0.4)
    said = run("analyze_results.py", folder, cwd=tmp_path)
    assert "7 of 9 runs failed and are in no statistic" in said
    assert (folder / "loss_curves.png").stat().st_size > 1e4


def test_torchrun_says_nothing_of_its_own(tmp_path):
    """The end of the output is the script's, not the launcher's report."""
    path = runner_kills.write_experiment(tmp_path, n_gpus=2, behaviours={42: "crash"})  # 1: no torchrun
    run("run_nanogpt_experiment.py", "--config", path, "--n_runs", 1, cwd=tmp_path, code=2)
    found = runner_kills.results(tmp_path)[0]
    assert found["output_tail"][-1] == "RuntimeError: the GPU has fallen off the bus"
    assert "crashed at step 7 (exit code 1)" in found["error"]


def test_nothing_that_trains_is_loud(tmp_path):
    """The runner ends with an error, and without starting the rest, where nothing gets to a step."""
    path = runner_kills.write_experiment(tmp_path, behaviours={42: "refuse"})
    said = run("run_nanogpt_experiment.py", "--config", path, "--n_runs", 3, cwd=tmp_path, code=2)
    assert "no validation loss captured" in said and "run 1 (seed 43): not started" in said
    assert len(runner_kills.results(tmp_path)) == 1


def test_killed_runners(tmp_path):
    """KILL, TERM and INT at random moments; python tests/runner_kills.py does ten."""
    for case in runner_kills.campaign(tmp_path, kills=3, seed=1, longest=2.0, command=False):
        assert case["left"] == 0, case


def test_stages_go_on(tmp_path):
    """A campaign that is killed and goes on, with its budget kept over both; the plan may not change."""
    truth = {"baseline": 0.0, "good": -0.05}
    for stage, steps in zip(STAGES, (10, 12, 14)):
        for name, effect in truth.items():
            runner_kills.write_experiment(tmp_path, name, stage, steps=steps, effect=effect)
    stages = [{"stage": stage, "config": "{variant}_" + stage + ".json", "n_runs": 2} for stage in STAGES]
    plan = {"campaign_name": "toy", "baseline": "baseline", "variants": ["good", "bad"],
            "settings": {"bad": {"effect": 0.05}}, "target_val_loss": 3.7, "stages": stages,
            "most_advanced": 1, "most_proved": 1, "probe_steps": 5,
            "budget": {"gpu_hours": 1, "gpu_hours_per_run": 0.2, "probe_gpu_hours": 0.1,
                       "price_per_gpu_hour": 2.5}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    printed, hold = tmp_path / "printed", tmp_path / "hold_12"  # stage B: the first call does not end it
    printed.touch()
    hold.touch()
    first = Forked(1, "experiments/run_stages.py", ["--plan=plan.json", "--parallel=3"], str(printed), {})
    while not re.search("good run 0.*of training", printed.read_text()) and first.poll() is None:
        time.sleep(0.05)
    assert first.poll() is None, "it ended before it was killed"
    first.kill()
    first.wait(PATIENCE)
    hold.unlink()
    runner_kills.wait_for_the_end(tmp_path)
    folder = tmp_path / "experiment_logs" / "toy"
    before = {path: path.read_text() for path in folder.glob("*/*/*/results.jsonl")}
    assert before
    said = run("run_stages.py", "--plan", "plan.json", "--parallel=3", "--until", B, cwd=tmp_path)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["best"] == "good" and outcome["stage"] == B and f"{B}: yes: good" in said
    assert 0 < outcome["gpu_seconds_spent"] <= outcome["gpu_seconds_budget"] == 3600
    assert not (folder / B / "bad").exists() and "GPU-hours" in (folder / "report.md").read_text()
    assert all((folder / f"{stage}_comparison.{end}").exists() for stage in (A, B) for end in ("md", "png"))
    for path, rows in before.items():
        assert set(rows.splitlines()) <= set(path.read_text().splitlines()), "what was done was done again"
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert all((folder / entry["folder"]).is_dir() for entry in ledger if entry["what"] == "reserve")
    settled = {entry["key"]: entry["spent"] for entry in ledger if entry["what"] == "settle"}
    reserved = {entry["key"]: entry["reserved"] for entry in ledger if entry["what"] == "reserve"}
    assert settled.keys() == reserved.keys() and all(settled[key] <= reserved[key] for key in settled)
    assert outcome["gpu_seconds_spent"] == pytest.approx(sum(settled.values()))
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"target_val_loss": 3.0}))
    assert "only the budget may change" in run("run_stages.py", "--plan", "plan.json", cwd=tmp_path, code=2)


# train_gpt.py itself


def val_losses(folder: Path, run_id: int = 0) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["val_loss"] for row in rows if row["run_id"] == run_id and "val_loss" in row]


def test_pipeline(tmp_path):
    """run, analyse, stages, compare, with train_gpt.py itself, which improves."""
    random = np.random.RandomState(7)
    tokens = (np.arange(12000) * 3 + random.randint(0, 2, 12000)) % 26
    data = write_dataset(tmp_path / "letters", tokens[:10000], tokens[10000:], 26)
    run("run_nanogpt_experiment.py", "--config", "configs/stage_a_screening/palm_screening.json",
        "--n_runs", 2, "--parallel=2", "--log_dir", tmp_path / "logs", f"--dataset={data}", *TOY,
        cwd=ROOT / "experiments")
    palm = only(tmp_path / "logs")
    assert {path.name for path in palm.iterdir()} >= {
        "experiment.log", "config.json", "results.jsonl", "metrics.jsonl", "summary.json", "git_diff.patch"}
    assert (palm / "runs" / "run_0_seed_42" / "stdout.log").exists()
    assert (palm / "metrics.jsonl").read_text().count("train_loss") == 80
    summary = json.loads((palm / "summary.json").read_text())
    assert {"experiment_name", "end_time", "statistics", "git_info", "gpu_info"} <= summary.keys()
    assert {"mean", "std", "min", "max", "median", "ci_95"} <= summary["statistics"]["val_loss"].keys()
    assert "No target" in run("analyze_results.py", palm, cwd=tmp_path)  # for another data set
    assert "one-sided t-test, p = " in run("analyze_results.py", palm, "--target=3.28", cwd=tmp_path)
    plan = json.loads((CONFIGS / "plan.json").read_text()) | {"variants": ["depth_warm"]}
    for stage in plan["stages"]:
        if isinstance(stage["config"], str):
            stage["config"] = str(CONFIGS / stage["config"])
        else:
            stage["config"] = {arm: str(CONFIGS / name) for arm, name in stage["config"].items()}
    plan["stages"][0]["n_runs"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run("run_stages.py", "--plan", "plan.json", "--until", A, "--parallel=2", f"--dataset={data}", *TOY,
        cwd=tmp_path)
    screened = tmp_path / "experiment_logs" / "speedrun" / A
    folders = [palm, *(only(screened / name) for name in ("baseline", "depth_warm"))]
    for folder in folders:
        assert len(val_losses(folder)) == 5 and val_losses(folder)[-1] < val_losses(folder)[0] - 1
    compared = run("compare_experiments.py", folders[1], palm, f"--out={tmp_path / 'compared'}", cwd=tmp_path)
    assert "| nanogpt_palm_screening | variant | baseline | palm |" in compared
    assert (tmp_path / "compared.png").stat().st_size > 1e4


def test_the_fast_experiment_at_toy_size(tmp_path):
    """An experiment of the plan with a technique switched off, with train_gpt_fast.py itself."""
    tokens = (np.arange(9000) * 3 + np.random.RandomState(7).randint(0, 2, 9000)) % 26
    data = write_dataset(tmp_path / "letters", tokens[:8000], tokens[8000:], 26)
    run("run_nanogpt_experiment.py", "--config", CONFIGS / A / "fast_screening.json", "--n_runs=1",
        f"--dataset={data}", "--bigram=False", "--device=cpu", "--compile=False", "--n_layer=4", "--n_head=2",
        "--n_embd=32", "--sequence_length=64", "--num_iterations=20", "--val_loss_every=10",
        "--val_tokens=256", cwd=tmp_path)
    losses = val_losses(only(tmp_path / "experiment_logs"))
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5


def test_a_folder_is_locked_until_the_supervisors_have_ended(tmp_path, monkeypatch):
    """They inherit the lock of a runner, which may be killed; the next runner waits for them."""
    code = f"""
import subprocess, sys
from experiments.runner import lock
descriptor = lock({str(tmp_path)!r})
child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[descriptor])
print(child.pid, flush=True)
"""
    read, write = os.pipe()
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=read, stdout=subprocess.PIPE)
    assert first.stdout.readline() and first.wait(PATIENCE) == 0
    monkeypatch.setattr(runner, "PATIENCE", 0.2)
    with pytest.raises(UserError, match=rf"is in use by process {first.pid} on .*: wait for it or end it"):
        runner.lock(str(tmp_path))
    os.close(write)
    monkeypatch.setattr(runner, "PATIENCE", PATIENCE)
    os.close(runner.lock(str(tmp_path)))
    os.close(read)
