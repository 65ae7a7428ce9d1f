"""Files that experiments read: of odd kinds, with odd content, and of earlier versions. CPU, seconds.

    python -m pytest tests/unit/test_experiment_files.py
"""

import json
import math
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import runner_kills
from helpers import ROOT, write_log
from scipy import stats

from experiments import (
    analyze_results,
    campaign_folder,
    compare_experiments,
    experiment_config,
    report,
    results_summary,
    run_stages,
    runner,
)
from experiments import experiment_statistics as es
from experiments.experiment_config import STAGES, load_config
from experiments.experiment_logger import ExperimentLogger, check_result, read_folder
from nanosync.errors import UserError
from nanosync.files import write_json

A, B, C = STAGES
RECORD = ROOT / "records" / "2026-11-25-speedrun-h100"
REPORT = {"code": 1, "seconds": 2.0, "ended_by": "itself"}


def make_odd(path: Path, kind: str) -> None:
    """Put something there that is not the file that a reader expects."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with open(path, "wb") as f:
            f.truncate(2**40)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"nested": b"[" * 10**5, "twice": b'{"a": 1, "a": 1}', "no text": b"\xff\xfe\0",
                          "no number": b'{"status": NaN}', "list": b"[1]"}[kind])


KINDS = ("pipe", "device", "huge", "folder", "nested", "twice", "no text", "no number", "list")


@pytest.fixture
def log(tmp_path) -> ExperimentLogger:
    """An experiment with a run that has ended, and is not recorded."""
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 2, 1, lambda text: None)
    folder = Path(log.run_folder(0))
    (folder / "out").mkdir(parents=True)
    write_json(str(folder / "report.json"), REPORT)
    write_json(str(folder / "out" / "status.json"), {"status": "running", "step": 3})
    (folder / "stdout.log").write_text("said\n")
    write_log(folder / "out" / "run_1.jsonl", {"event": "start", "time": 1.0, "config": {},
                                               "environment": {}, "resumed": False})
    return log


def result(log: ExperimentLogger) -> dict:
    """Record the run, read the record again, and return it."""
    log.record(*runner.result_of(runner.Job(log, 0), log.run_folder(0), REPORT))
    return read_folder(log.folder)[1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_run_that_is_none_fails_the_run(log, kind):
    """In one line; the other runs go on."""
    folder = Path(log.run_folder(0))
    for name, words in (("out/status.json", "its status.json"), ("out/run_1.jsonl", "crashed at step 3"),
                        ("stdout.log", "crashed at step 3"), ("report.json", "crashed at step 3")):
        kept = (folder / name).read_bytes()
        make_odd(folder / name, kind)
        if name == "report.json":
            runner.recover(log, 2)  # does not know how it ended
            assert not log.results
        found = result(log)
        log.results.clear()
        assert words in found["error"] and "\n" not in found["error"] and not found["success"]
        runner.RunProgress(str(folder / "out")).update()
        if (folder / name).is_dir():
            (folder / name).rmdir()
        else:
            (folder / name).unlink()
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_none_is_one_line(log, tmp_path, kind):
    for path, read in (
            (tmp_path / "fake_stage_a_screening.json",
             lambda: load_config(str(tmp_path / "fake_stage_a_screening.json"))),
            (tmp_path / "plan.json", lambda: run_stages.read_plan(str(tmp_path / "plan.json"))),
            (Path(log.folder, "config.json"), lambda: read_folder(log.folder)),
            (Path(log.folder, "results.jsonl"), lambda: read_folder(log.folder)),
            (Path(log.folder, "metrics.jsonl"), lambda: read_folder(log.folder)),
            (tmp_path / "fake_train.py", lambda: experiment_config.check_settings(log.config, "x"))):
        kept = path.read_bytes() if path.exists() else None
        make_odd(path, kind)
        with pytest.raises(UserError) as e:
            read()
        assert "\n" not in str(e.value) and len(str(e.value)) < 500
        path.rmdir() if path.is_dir() else path.unlink()
        if kept is not None:
            path.write_bytes(kept)
    for name in ("experiment.log", "superseded.jsonl"):  # which are only written
        make_odd(Path(log.folder, name), "pipe")
    log.note("said")
    campaign = object.__new__(run_stages.Campaign)
    campaign.folder, campaign._told = log.folder, [{"stage": A}]
    with pytest.raises(UserError, match=r"cannot write .*superseded\.jsonl"):
        campaign.tell([{"stage": B, "decision": "keep", "text": "x"}])
    make_odd(tmp_path / "ledger.jsonl", kind)
    with pytest.raises(UserError):
        campaign_folder.cut_torn_line(str(tmp_path / "ledger.jsonl"))
        for entry in campaign_folder.read_lines(str(tmp_path / "ledger.jsonl")):
            campaign_folder.check_entry(entry, "ledger.jsonl")
        raise UserError("a whole line is none of a ledger")


@pytest.mark.parametrize("output, tail", [
    (b"\x00\x1b[2J\n", [r"\x00\x1b[2J"]), (b"\xff\xfe\xed\xa0\x80\n", [r"\xff\xfe\xed\xa0\x80"]),
    (b"a\tb\r50%\r100%\n", ["a\tb", "50%", "100%"]), ("\u202eabc\x07 ü".encode(), [r"\u202eabc\x07 ü"]),
    (b"x" * 300_000, ["x" * 666 + "..." + "x" * 250]), (b"", [])])
def test_what_is_recorded_can_be_read(log, output, tail, capsys):
    Path(log.run_folder(0), "stdout.log").write_bytes(output)
    log.say = print
    runner.settle(runner.Job(log, 0), *runner.result_of(runner.Job(log, 0), log.run_folder(0), REPORT))
    found = read_folder(log.folder)[1][0]
    assert found["output_tail"] == tail
    shown = capsys.readouterr().out + Path(log.folder, "experiment.log").read_text()
    assert all(line.isprintable() for line in shown.replace("\t", "").splitlines())


@pytest.mark.parametrize("status", [{"status": "\ud800"}, {"status": ["x"]}, {"step": 3}, {"status": "a\x1b"},
                                    {"status": "x" * 10**5}, {"status": "stopped", "step": 10**400}])
def test_an_odd_status_can_be_recorded(log, status):
    Path(log.run_folder(0), "out", "status.json").write_text(json.dumps(status))
    assert len(result(log)["error"]) < 300


def test_notes_and_converted_settings_are_not_asked_of_a_run(tmp_path):
    path = runner_kills.write_experiment(tmp_path, notes="for readers", effect=1)
    written = json.loads(path.read_text())
    written["stage_config"]["num_iterations"] = 2e1
    path.write_text(json.dumps(written))
    config = load_config(str(path))
    assert type(config["stage_config"]["num_iterations"]) is int
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 1, 1, lambda text: None)
    out = Path(log.run_folder(0), "out")
    out.mkdir(parents=True)
    write_json(str(out / "status.json"), {"status": "finished", "step": 20})
    clock = {"train_time_ms": 1.0, "step_avg_ms": 1.0}
    write_log(out / "run_1.jsonl",
              {"event": "start", "time": 1.0, "environment": {}, "resumed": False,
               "config": {"num_iterations": 20, "batch_size": 8, "effect": 1.0, "seed": 42}},
              {"event": "eval", "step": 20, "time": 2.0, "train_loss": 3.0, "val_loss": 3.1, "lr": 0.1,
               **clock})
    (out.parent / "stdout.log").touch()
    found, _ = runner.result_of(runner.Job(log, 0), log.run_folder(0), REPORT | {"code": 0})
    assert found["success"], found


def test_entries_that_lack_a_field_are_refused():
    """Also a field that may be null."""
    run = {"run_id": 0, "seed": 42, "success": True, "final_val_loss": 3.0, "time_seconds": 1.0,
           "wall_seconds": 1.0}
    settle = {"what": "settle", "key": "x", "stage": A, "variant": "x", "spent": 1.0, "measured": None}
    reserve = {"what": "reserve", "key": "x", "stage": A, "variant": "x", "reserved": 1.0, "n_gpus": 1,
               "folder": "x"}
    for whole, check in ((run, check_result), (settle, campaign_folder.check_entry),
                         (reserve, campaign_folder.check_entry)):
        check(whole, "file")
        for key in whole:
            with pytest.raises(UserError, match=r"^file"):
                check({name: value for name, value in whole.items() if name != key}, "file")


@pytest.mark.parametrize("n_runs", [0, 10**9, 2**62])
def test_a_number_of_runs_is_bounded(tmp_path, monkeypatch, n_runs):
    from experiments import run_nanogpt_experiment

    path = runner_kills.write_experiment(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", f"--config={path}", f"--n_runs={n_runs}", "--dry_run"])
    with pytest.raises(UserError, match="must be from 1 to 10000"):
        run_nanogpt_experiment.main()
    with pytest.raises(UserError, match=r"parallel=.* must be from 1 to"):
        runner.slots({"n_gpus": 1}, n_runs)


# statistics


@pytest.mark.parametrize("a, b", [
    ([3.2], [3.1]), ([3.2], [3.1, 3.2]), ([3.2, 3.2], [3.1, 3.1]), ([3.2] * 3, [3.2] * 3),
    ([0.0, 0.0], [0.0] * 2),
    ([3.2, 3.2 + 4e-16], [3.1, 3.1]), ([1e-200, 2e-200], [3e-200, 1e-200])])
def test_what_cannot_be_tested_has_no_p(tmp_path, monkeypatch, capsys, a, b):
    """Where scipy has NaN, or is certain without a spread, there is a sentence instead."""
    monkeypatch.setattr(compare_experiments, "draw", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert es.welch(a, b).p is es.welch(a, b).interval is es.hedges_g(a, b) is None
        assert es.minimum_detectable(a, b) is None and es.p_at_most(a, 3.0) is None
        assert len(a) != len(b) or es.paired(a, b).p is None
        assert es.runs_needed(3.0, es.describe(a)["std"], 3.28) is None
    experiments = [experiment_of(name, losses) for name, losses in (("a", a), ("b", b))]
    compare_experiments.write_comparison(experiments, str(tmp_path / "x"), 0.05, 0.8)
    said = capsys.readouterr().out
    assert "b: cannot be tested" in said and not re.search(r"\bnan\b|\binf\b", said)
    json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_one_sample_without_spread_is_tested_as_scipy_does():
    """Which warns of it."""
    for a, b in (([3.2, 3.2], [3.1, 3.15]), ([3.2, 3.3, 3.25], [3.1] * 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = es.welch(a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test = stats.ttest_ind(b, a, equal_var=False)
            assert (found.p, found.df) == pytest.approx((test.pvalue, test.df))
            assert found.interval == pytest.approx(tuple(test.confidence_interval()))


def test_shared_seeds_that_differ_by_rounding_are_not_tested():
    a = [1000.1, 1000.2, 1000.3]
    assert es.paired(a, [x - 1e-3 for x in a]).p is None
    assert es.paired(a, [999.0, 1001.0, 1000.0]).p == pytest.approx(
        stats.ttest_rel([999.0, 1001.0, 1000.0], a).pvalue)


@pytest.mark.parametrize("alpha, power", [(1e-300, 0.8), (0.05, 0.9999999999999999), (0, 0.8),
                                          (0.05, math.nan)])
def test_levels_that_no_test_reaches(alpha, power):
    with pytest.raises(UserError, match=r"must be from 1e-06 to 0\.9999"):
        report.check_levels(type("", (), {"alpha": alpha, "power": power}))
    if alpha > 0 and math.isfinite(power):
        es.minimum_detectable([3.2, 3.3], [3.1, 3.15], alpha, power)  # ends


def experiment_of(name: str, losses: list[float]) -> report.Experiment:
    results = [{"run_id": i, "seed": 42 + i, "success": True, "final_val_loss": loss, "time_seconds": 1.0,
                "final_step": 1} for i, loss in enumerate(losses)]
    curves = [report.curve([{"step": 0, "val_loss": 5.0}, {"step": 10, "val_loss": loss}]) for loss in losses]
    config = {"stage_config": {}, "target_val_loss": 3.28, "baseline_val_loss": 3.3, "baseline_std": 0.0}
    return report.Experiment(name, name, config, results, curves, {})


def test_tables_hold_what_a_file_says():
    text = report.table(["a"], [["x|y\nz\x1b[2J"], ["v" * 1000]])
    assert r"| x\|y\nz\x1b[2J |" in text and text.count("\n") == 4 and len(text) < 500
    assert report.p_value(0.0) == "<1e-99" and report.p_value(1e-7) == "1e-07"


@pytest.mark.parametrize("losses, said", [
    ({24: [math.nan], 6: [2.0]}, "no run with the most syncs, 24, has a val loss above 0"),
    ({24: [0.0], 6: [2.0]}, "no run with the most syncs, 24, has a val loss above 0"),
    ({24: [math.nan, 2.0], 6: [2.0]},
     "6 syncs, 75% fewer than 24: within 2% of the baseline's 24 syncs (1 run)")])
def test_a_baseline_that_diverged(losses, said):
    runs = [dict(syncs=n, dense_syncs=24, val_loss=loss, step=9, config={}, run="r",
                 status="diverged" if math.isnan(loss) else "finished") for n in losses for loss in losses[n]]
    results_summary.compare(runs, None, 2.0)
    assert said in results_summary.conclusion(runs, 2.0, None)
    assert "nan" not in results_summary.runs_table(runs, 2.0)
    assert "NaN" not in json.dumps(report.without_nan(runs))


# earlier versions


def copy_of_record(folder: Path) -> list[str]:
    """Copy the experiments of a record, under names as they had then."""
    names = [f"{variant}_screening" for variant in ("baseline", "palm", "curriculum", "depth_warm")]
    return [shutil.copytree(RECORD / name, folder / f"{name}_20261125-12000{i}")
            for i, name in enumerate(names)]


def test_a_record_of_an_earlier_version_is_compared_as_it_was(tmp_path, monkeypatch, capsys):
    folders = copy_of_record(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, folders), f"--out={tmp_path / 'x'}"])
    monkeypatch.setattr(compare_experiments, "draw", lambda *args: None)
    compare_experiments.main()
    tables = [line for line in (RECORD / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len(tables) > 10 and set(tables) <= set(capsys.readouterr().out.splitlines())


def test_a_record_of_an_earlier_version_is_analysed(tmp_path, monkeypatch, capsys):
    """Its stage may be short, and what has a default now may be missing."""
    folder = copy_of_record(tmp_path)[0]
    path = Path(folder, "config.json")
    described = json.loads(path.read_text())
    described["config"]["stage"] = "A"
    for key in ("description", "modification_type", "modification_details", "baseline_val_loss"):
        del described["config"][key]
    path.write_text(json.dumps({"config": described["config"], "script": described["script"]}))
    monkeypatch.setattr(sys, "argv", ["script", str(folder), "--target=1.05"])
    analyze_results.main()
    said = capsys.readouterr().out
    assert "| val loss | 1.0094 | 0.0035 | 0.9782 to 1.0406 |" in said and f"{A}, 1 GPU(s)" in said


@pytest.mark.parametrize("short", [("A", "B", "C"), ("A_screening", "B_validation", "C_full")])
def test_a_campaign_with_short_names_of_stages(tmp_path, short):
    plan = plan_of(tmp_path, dict(zip(STAGES, short)))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    plan = run_stages.read_plan(str(path))
    assert [stage["stage"] for stage in plan["stages"]] == list(STAGES)
    configs = run_stages.read_configs(plan, str(path), [])
    assert configs[A, "good"]["stage"] == A
    assert [stage["stage"] for stage in run_stages.stages_until(plan, B)] == [A, B]


def plan_of(folder: Path, names: dict[str, str]) -> dict:
    """Write the experiments of a campaign, and return its plan."""
    for stage, short in names.items():
        for effect, arm in enumerate(("baseline", "good")):
            path = runner_kills.write_experiment(folder, arm, stage, effect=effect)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": short}))
    stages = [{"stage": short, "config": "{variant}_" + stage + ".json", "n_runs": 2}
              for stage, short in names.items()]
    return {"campaign_name": "toy", "baseline": "baseline", "variants": ["good"], "target_val_loss": 3.7,
            "stages": stages, "most_advanced": 1, "most_proved": 1, "probe_steps": 5,
            "budget": {"gpu_hours": 1, "gpu_hours_per_run": 0.2, "probe_gpu_hours": 0.1}}


def test_a_campaign_goes_on_after_its_experiments_were_renamed(tmp_path):
    """Names of experiments and files are labels; a changed setting is not."""
    plan, path = plan_of(tmp_path, dict(zip(STAGES, STAGES))), tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    first = run_stages.Campaign(str(tmp_path / "toy"), run_stages.read_plan(str(path)), [],
                                run_stages.read_configs(plan, str(path), []), 1)
    log = first.log_of(A, "good")
    log.record({"run_id": 0, "seed": 42, "success": True, "final_val_loss": 3.2, "time_seconds": 1.0,
                "wall_seconds": 1.0, "gpus": 1, "final_step": 20}, [])
    os.rename(log.folder, Path(log.folder).parent / "good_20261125-120000")
    for descriptor in (first.lock, log.lock):
        os.close(descriptor)
    for stage in STAGES:  # renamed experiments, in renamed files
        for arm in ("baseline", "good"):
            file = tmp_path / f"{arm}_{stage}.json"
            config = json.loads(file.read_text()) | {"experiment_name": f"nanogpt_{arm}"}
            (tmp_path / f"{arm}-{stage}.json").write_text(json.dumps(config))
            file.unlink()
    plan["stages"] = [stage | {"stage": short, "config": "{variant}-" + stage["stage"] + ".json"}
                      for stage, short in zip(plan["stages"], "ABC")]
    path.write_text(json.dumps(plan))
    plan = run_stages.read_plan(str(path))
    configs = run_stages.read_configs(plan, str(path), [])
    again = run_stages.Campaign(str(tmp_path / "toy"), plan, [], configs, 1)
    assert list(again.results.losses.values()) == [3.2]
    for descriptor in (again.lock, again.logs[A, "good"].lock):
        os.close(descriptor)
    configs[A, "good"]["base_seed"] = 7
    with pytest.raises(UserError, match="was begun with base_seed=42 and not 7"):
        run_stages.Campaign(str(tmp_path / "toy"), plan, [], configs, 1)
