"""experiments/: the statistics against scipy and by simulation, the planner, configurations, the runner with
runs that go wrong, killed runners, and train_gpt.py through the whole pipeline. CPU, about a minute.

    python -m pytest tests/unit/test_experiments.py
"""

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runner_kills
from helpers import ROOT
from scipy import stats

from configurator import script_defaults
from experiments import (
    analyze_results,
    campaign_folder,
    campaign_plan,
    compare_experiments,
    experiment_config,
    report,
    results_summary,
    run_nanogpt_experiment,
    run_stages,
    runner,
    simulate,
)
from experiments import experiment_statistics as es
from experiments.campaign import Budget, Costs, Plan, Results, Run, decide
from experiments.experiment_config import STAGES, all_settings, command_line, load_config
from experiments.experiment_logger import ExperimentLogger, gpu_info, made_by, read_folder
from experiments.report import Experiment, curve, on_common_steps, time_to
from nanosync.errors import UserError

A, B, C = STAGES
CONFIGS = ROOT / "experiments" / "configs"


# statistics


def test_statistics_against_scipy():
    a, b = [3.281, 3.279, 3.2835, 3.2801], [3.2765, 3.2772, 3.2741]
    low, high = es.mean_interval(a)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(a), stats.sem(a)))
    by_hand = (np.mean(b) - 3.28) / (np.std(b, ddof=1) / math.sqrt(3))
    assert es.p_at_most(b, 3.28) == pytest.approx(stats.t.cdf(by_hand, 2))
    test, difference = stats.ttest_ind(b, a, equal_var=False), es.welch(a, b)
    assert (difference.p, difference.df) == pytest.approx((test.pvalue, test.df)) and difference.mean < 0
    assert es.paired(a[:3], b).p == pytest.approx(stats.ttest_rel(b, a[:3]).pvalue)
    assert es.paired(a[:3], b).interval == pytest.approx(stats.ttest_rel(b, a[:3]).confidence_interval())
    pooled = math.sqrt((3 * np.var(a, ddof=1) + 2 * np.var(b, ddof=1)) / 5)
    assert es.hedges_g(a, b) == pytest.approx(difference.mean / pooled * (1 - 3 / (4 * 5 - 1)), rel=1e-2)
    described = es.describe(a)
    assert described["median"] == np.median(a) and described["std"] == pytest.approx(np.std(a, ddof=1))
    assert es.describe([1.0])["ci_95"] is None and es.p_at_most([3.2, 3.2], 3.28) is None
    assert es.welch([1.0, 1.0], [2.0, 2.0]).p is None


def test_power_against_scipy_and_itself():
    for n in (2, 3, 5, 12):
        expected = stats.nct.sf(stats.t.ppf(0.99, n - 1), n - 1, 2.0 * math.sqrt(n))
        assert es.power_at_most(3.276, 0.002, n, 3.28, 0.01) == pytest.approx(expected, abs=1e-5)
    n = es.runs_needed(3.276, 0.002, 3.28)
    reached = [es.power_at_most(3.276, 0.002, runs, 3.28, 0.01) for runs in (n - 1, n)]
    assert reached[0] < 0.8 <= reached[1]
    assert es.runs_needed(3.29, 0.002, 3.28) is None


@pytest.mark.parametrize("n", [(2, 2), (3, 3), (5, 4), (2, 5)])
@pytest.mark.parametrize("alpha", [0.05, 0.0125])
def test_minimum_detectable_is_found_with_its_power(n, alpha):
    """By simulation; and where nothing is to be found, the power is what the test then claims by mistake."""
    rng = np.random.default_rng(0)
    samples = a, b = rng.normal(size=n[0]), 3 * rng.normal(size=n[1])
    std = [x.std(ddof=1) for x in samples]
    found, power = es.minimum_detectable(a, b, alpha), es.WelchPower(tuple(std), n, alpha)
    assert power(found) == pytest.approx(0.8, abs=1e-6)
    for difference, expected in ((found, 0.8), (0.0, power(0.0))):
        x, y = (s * rng.normal(size=(20_000, m)) for s, m in zip(std, n))
        claimed = stats.ttest_ind(x, y + difference, axis=1, equal_var=False).pvalue < alpha
        assert claimed.mean() == pytest.approx(expected, abs=0.012)  # 4 standard errors


def test_holm():
    """Against its definition: reject the smallest at alpha / m, the next at alpha / (m - 1), until one fails.
    """
    p = [0.012, 0.04, 0.0001, 0.03, None, 0.5]
    adjusted = es.holm(p)
    assert adjusted[4] is None
    for alpha in np.linspace(0.001, 0.999, 200):
        rejected, ordered = set(), sorted((q, i) for i, q in enumerate(p) if q is not None)
        for rank, (q, i) in enumerate(ordered):
            if q > alpha / (len(ordered) - rank):
                break
            rejected.add(i)
        assert {i for i, q in enumerate(adjusted) if q is not None and q <= alpha} == rejected


def test_intervals_and_false_positives_by_simulation():
    n = 800
    for row in simulate.intervals_and_tests(n, np.random.default_rng(1)):
        assert row["coverage"] == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / n))
        assert row["false_positives"] <= 0.01 + 4 * math.sqrt(0.01 * 0.99 / n)


# the planner


def plan_of(*variants: str, **changed) -> Plan:
    return Plan("baseline", variants, dict(STAGES), 3.28, **changed)


def play(plan: Plan, truth: dict, affordable=lambda batch: True) -> tuple[list[dict], list[list[Run]], dict]:
    """A campaign with little noise; its decisions, its batches and its outcome. Asking again after each run
    must give the same decisions so far."""
    results, batches, rng = Results(), [], np.random.default_rng(0)
    while True:
        decisions, batch, outcome = decide(plan, results, affordable)
        if outcome is not None:
            return decisions, batches, outcome
        batches.append(batch)
        for i, one in enumerate(batch):
            results.losses[one] = truth[one.variant][list(STAGES).index(one.stage)] + 0.001 * rng.normal()
            if i + 1 < len(batch):
                assert decide(plan, results, affordable)[:2] == (decisions, batch[i + 1:])


def test_planner_proves_the_best():
    truth = {"baseline": (3.5, 3.3, 3.27), "good": (3.45, 3.25, 3.22), "bad": (3.6, 3.4, 3.4)}
    decisions, batches, outcome = play(plan_of("bad", "good"), truth)
    assert outcome["best"] == "good" and outcome["proved"] and outcome["target_reached"]
    assert re.search(r"better; its mean of 3\.2\d+ is at most 3\.28 \(one-sided", outcome["reason"])
    assert [(one["stage"], one["decision"]) for one in decisions] == [
        (A, "keep"), (A, "drop"), (A, "advance"), (B, "yes"), (C, "end")]
    assert [len(batch) for batch in batches] == [6, 6, 10]
    assert not any(one.variant == "bad" for batch in batches[1:] for one in batch)


def test_planner_pivots_and_keeps_the_baseline():
    """The winner of screening is worse in validation, and the next in the ranking is no better."""
    truth = {"baseline": (3.5, 3.3, 3.27), "first": (3.40, 3.35, 0.0), "second": (3.45, 3.4, 0.0)}
    decisions, batches, outcome = play(plan_of("first", "second"), truth)
    assert outcome["best"] == "baseline" and not outcome["proved"]
    kinds = [one["decision"] for one in decisions]
    assert "pivot" in kinds and kinds.count("no") == 2 and {one.stage for b in batches for one in b} == {A, B}


def test_planner_without_money_or_results():
    truth = {"baseline": (3.5, 3.3, 3.27), "good": (3.45, 3.25, 3.22)}
    outcome = play(plan_of("good"), truth, lambda batch: batch[0].stage == A)[2]
    assert outcome["best"] == "good" and outcome["stage"] == A and outcome["out_of_budget"]
    assert not outcome["proved"]
    failed = Results({Run(A, name, i): None for name in ("baseline", "good") for i in range(2)})
    assert decide(plan_of("good"), failed)[2]["best"] == "baseline"
    assert play(plan_of("good", until=A), truth)[2]["stage"] == A


@pytest.mark.parametrize("stage", STAGES)
def test_planner_without_a_baseline(stage):
    """Nobody is worse than what never ran."""
    results = Results()
    while (found := decide(plan_of("good"), results))[2] is None:
        for one in found[1]:
            failed = (one.stage, one.variant) == (stage, "baseline")
            results.losses[one] = None if failed else 3.3 - 0.1 * (one.variant == "good") + 1e-3 * one.run_id
    assert found[2]["stage"] == stage and found[2]["best"] == "baseline" and not found[2]["proved"]
    assert found[2]["reason"] == "no run of the baseline succeeded to compare with"


def test_planner_by_simulation():
    """The budget is never exceeded; with enough of it the best is found about as often as in full, for less.
    """
    found = simulate.campaigns(40, 8, 5.0, 60.0, seed=3)
    assert found["exceeded"] == 0 and found["cost_staged"] < 0.7 * found["cost_full"]
    assert found["found_staged"] > found["found_full"] - 4 * found["standard_error"]
    for budget in (3.0, 12.0):
        assert simulate.campaigns(20, 3, 5.0, budget, seed=3)["exceeded"] == 0


def test_budget_and_costs():
    budget, costs = Budget(100.0, per_run=60.0), Costs({A: 1.0, B: 10.0}.__getitem__)
    assert costs.expected(Run(A, "x", 0)) is None and costs.affordable([Run(A, "x", 0)], budget)
    costs.add(A, "baseline", 10.0)
    assert costs.expected(Run(A, "x", 0)) == 10.0 and costs.expected(Run(B, "x", 0)) == 100.0
    assert costs.affordable([Run(A, "x", i) for i in range(9)], budget)
    assert not costs.affordable([Run(A, "x", i) for i in range(10)], budget)
    assert not budget.reserve("b", 61.0) and budget.reserve("a", 60.0) and not budget.reserve("c", 41.0)
    budget.settle("a", 20.0)
    assert budget.left == 80.0


def test_a_crash_says_nothing_of_costs():
    """Else the next run would be ended when it has taken 1.5 times as long as the crash."""
    crash = {"success": False, "ended_by": "itself", "wall_seconds": 3.0, "gpus": 2}
    assert campaign_folder.cost_shown(crash) is None
    assert campaign_folder.cost_shown(crash | {"success": True}) == 6.0
    assert campaign_folder.cost_shown(crash | {"ended_by": "limit"}) == 6.0
    costs = Costs({A: 1.0}.__getitem__)
    for variant, cost in (("baseline", 100.0), ("baseline", 120.0), ("x", 5.0)):  # the first is the probe's
        costs.add(A, variant, cost)
    assert costs.expected(Run(A, "x", 1)) == 100.0 and costs.expected(Run(A, "baseline", 1)) == 120.0


def test_edited_experiments_do_not_go_on(tmp_path):
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    campaign_folder.check_unchanged("f", config, config | {"description": "in other words"})
    with pytest.raises(UserError, match="hyperparameters="):
        campaign_folder.check_unchanged("f", config, config | {"hyperparameters": {"effect": 1}})


def test_what_a_probe_says():
    step, evaluation = ({"event": name, "seconds": 2.0, "time": 7.0} for name in ("iter", "eval"))
    assert run_stages.extrapolated([step, step, evaluation | {"time": 10.0}], 2, 12, 5) == 10 * 2 + 3
    for events in ([evaluation, evaluation], [step], [step, step, evaluation | {"time": None}]):
        with pytest.raises(UserError, match="no times"):
            run_stages.extrapolated(events, 2, 12, 5)


def test_a_stage_is_judged_by_the_same(tmp_path):
    """A setting that the experiment leaves out has the script's default."""
    plan = {"baseline": "a", "variants": ["b"],
            "stages": [{"stage": A, "config": "{variant}_" + A + ".json"}]}
    for words, more, overrides in (
            (None, {"val_loss_every": 5, "effect": 1}, []),
            ("val_loss_every=6 and the stage's baseline 5", {"val_loss_every": 6}, []),
            ("has the settings of a: there is nothing to compare", {"effect": 1}, ["--effect=2"])):
        runner_kills.write_experiment(tmp_path, "a", A)
        runner_kills.write_experiment(tmp_path, "b", A, **more)
        if words is None:
            run_stages.read_configs(plan, str(tmp_path / "plan.json"), overrides)
        else:
            with pytest.raises(UserError, match=words):
                run_stages.read_configs(plan, str(tmp_path / "plan.json"), overrides)


# configurations


@pytest.mark.parametrize("change, words", [
    ({"campaign_name": "../../x"}, "campaign_name='../../x' names a folder"),
    ({"target_val_loss": 10**400}, "does not fit into 64 bits"),
    ({"target_val_loss": 1e200}, "must be finite"),
    ({"budget": {"gpu_hours": 1e308}}, "must be finite, above 0 and at most 1e+09"),
    ({"variants": ["../x"]}, "a variant='../x' names a folder"), ({"variants": [""]}, "a variant='' names a"),
    ({"variants": ["a/b"]}, "a variant='a/b' names a folder"), ({"variants": ["a\tb"]}, "names a folder"),
    ({"variants": ["a\n"]}, "names a folder"), ({"variants": ["x" * 300]}, "xx...xxx"),
    ({"variants": ["ok", ".."]}, "a variant='..' names"), ({"baseline": "~"}, "baseline='~' names a folder"),
    ({"variants": ["a\x1b[2J"]}, "has control characters"),
    ({"budget": {"gpu_hours_per_run": 1.0}}, "gpu_hours_per_run=1.0 is below the 1.144 that a probe on 8"),
    ({"budget": {"gpu_hours_per_run": 1.2}}, None)])
def test_plans(tmp_path, change, words):
    plan = json.loads((CONFIGS / "plan.json").read_text())
    path = str(tmp_path / "plan.json")
    Path(path).write_text(json.dumps(plan | change | {"budget": plan["budget"] | change.get("budget", {})}))

    def read():
        plan = run_stages.read_plan(path)
        run_stages.check_cap(plan, plan["stages"][2:], {(C, "baseline"): {"n_gpus": 8}}, path)

    if words is None:
        return read()
    with pytest.raises(UserError) as e:
        read()
    assert words in str(e.value) and "\n" not in str(e.value)


def test_shipped_configurations():
    """All are valid for train_gpt.py, and those of a stage do the same amount of work."""
    expected = {A: (1000, 128, 16, 25, 1), B: (3000, 512, 64, 125, 4), C: (5100, 512, 64, 125, 8)}
    names = set()
    for path in sorted(CONFIGS.glob("stage_*/*.json")):
        config = load_config(str(path))
        if config["script"] != "train_gpt.py":
            continue
        stage, settings = config["stage"], config["stage_config"]
        assert path.parent.name == stage and config["experiment_name"].startswith("nanogpt_")
        assert path.stem.startswith(config["hyperparameters"]["variant"])
        assert (settings["num_iterations"], settings["batch_size"], settings["device_batch_size"],
                settings["val_loss_every"], config["n_gpus"]) == expected[stage]
        names.add((stage, config["hyperparameters"]["variant"]))
    wanted = ("baseline", "palm", "curriculum", "depth_warm", "sync")
    assert {(stage, name) for stage in STAGES for name in wanted} <= names
    full = load_config(str(CONFIGS / "baseline.json"))
    assert full["stage_config"] == load_config(str(CONFIGS / C / "palm_parallel.json"))["stage_config"]


def test_the_fast_plan_switches_off_each_technique():
    """One experiment a stage is a file; each variant is the same with one or two other settings. The
    techniques that are off by default are switched on."""
    path = str(CONFIGS / "plan_fast.json")
    plan = run_stages.read_plan(path)
    configs = run_stages.read_configs(plan, path, [])
    run_stages.check_cap(plan, plan["stages"], configs, path)
    defaults = script_defaults(str(ROOT / "train_gpt_fast.py"))
    techniques = {key for key, value in defaults.items() if value is True
                  and key not in ("save_checkpoint", "compile")}
    techniques |= {"value_layers", "offset_layers", "exclusive_layers", "untie_at", "gate_learning_rate",
                   "muon_beta2", "muon_heads", "muon_weight_decay", "trigram", "suffix_match",
                   "lazy_tables"}
    for stage in STAGES:
        baseline = all_settings(configs[stage, "fast"])
        changed = {}
        for arm in plan["variants"]:
            settings = all_settings(configs[stage, arm])
            changed[arm] = {key for key, value in settings.items() if value != baseline[key]}
            assert configs[stage, arm]["experiment_name"].endswith(arm)
        assert set().union(*changed.values()) == techniques | {
            "batch_sizes", "stage_rates", "short_windows", "long_windows"}
        assert all(len(keys) == 1 for arm, keys in changed.items() if arm.startswith("no_"))
    for key in ("num_iterations", "sequence_length", "batch_sizes", "val_tokens"):  # stage C is the script's
        assert all_settings(configs[C, "fast"])[key] == defaults[key]
    tokens = [campaign_plan.tokens_of(configs[stage, "fast"]) for stage in STAGES]
    assert tokens == pytest.approx([430 * 1.35 * 32768, 860 * 1.35 * 32768, 1490 * 16.2 * 16384])


@pytest.mark.parametrize("settings, words", [
    ({"c": {"effect": 1}}, "settings has 'c', which is not in variants"),
    ({"b": {}}, "settings of 'b' must be an object"), ({"b": 1}, "settings of 'b' must be an object"),
    ({"b": {"efect": 1}}, "plan's settings of b: did you mean"), ({"b": {"effect": "big"}}, "effect='big'"),
    ({"b": {"num_iterations": 9}}, "settings of b has another stage_config than the stage's baseline"),
    ({"b": {"effect": 0.0}}, "settings of b has the settings of a"), ({"b": {"effect": 1}}, None)])
def test_settings_of_a_variant_in_the_plan(tmp_path, settings, words):
    runner_kills.write_experiment(tmp_path, "a", A)
    stages = [{"stage": stage, "config": "{variant}_" + A + ".json", "n_runs": 2} for stage in STAGES]
    plan = json.loads((CONFIGS / "plan.json").read_text()) | {
        "baseline": "a", "variants": ["b"], "stages": stages, "settings": settings}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))

    def read():
        plan = run_stages.read_plan(str(path))
        return run_stages.read_configs({**plan, "stages": plan["stages"][:1]}, str(path), [])

    if words is None:
        config = read()[A, "b"]
        assert config["hyperparameters"]["effect"] == 1 and config["modification_details"] == {"effect": 1}
        return
    with pytest.raises(UserError) as e:
        read()
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, words", [
    ({"n_gpu": 1}, "unknown key 'n_gpu' in"), ({"n_gpus": "1"}, 'n_gpus="1" must be an integer'),
    ({"n_gpus": True}, "n_gpus=true must be an integer"), ({"n_gpus": 0}, "n_gpus=0 must be at least 1"),
    ({"stage": "a"}, "stage='a' is unknown"), ({"experiment_name": "a/b"}, "names a folder"),
    ({"script": "none.py"}, "cannot read the script"), ({"base_seed": -1}, "base_seed=-1"),
    ({"base_seed": 2**32}, "below 2**31"), ({"target_val_loss": 1e200}, "must be finite"),
    ({"stage_config": {"num_iterations": 0}}, "stage_config needs num_iterations"),
    ({"description": "a\0b"}, "'description' has control characters: 'a\\x00b'"),
    ({"hyperparameters": {"text": "a\0b"}}, "'a\\x00b' has a NUL or a lone surrogate"),
    ({"hyperparameters": {"notes": "\ud800"}}, "'notes' is not valid Unicode"),
    ({"experiment_name": "x" * 300}, "names a folder: use up to 100 letters"),
    ({"hyperparameters": {"batch_size": 1}}, "'batch_size' in stage_config and in hyperparameters"),
    ({"hyperparameters": {"seed": 1}}, "'seed' is set by the runner"),
    ({"hyperparameters": {"efect": 1}}, "unknown key 'efect' in hyperparameters of"),
    ({"hyperparameters": {"effect": "big"}}, "effect='big'"), ({"target_val_loss": "3"}, "number or null"),
    (None, "has no 'experiment_name'")])
def test_wrong_configurations(tmp_path, change, words):
    path = runner_kills.write_experiment(tmp_path)
    config = json.loads(path.read_text())
    if change is None:
        del config["experiment_name"]
    path.write_text(json.dumps(config | (change or {})))
    with pytest.raises(UserError) as e:
        load_config(str(path))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_configuration_needs_a_name_and_a_script(tmp_path):
    """Everything else has a default; stages have short names, and readers find notes."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"experiment_name": "mine", "script": "experiments/train_gpt.py"}))
    config = load_config(str(path))
    assert experiment_config.script_path(config) == str(ROOT / "train_gpt.py")
    assert config["stage"] == A and experiment_config.num_iterations(config) == 5100
    path.write_text(json.dumps({
        "experiment_name": "mine", "script": "train_gpt.py", "stage": "C_full", "modification_type": "magic",
        "stage_config": {"num_iterations": 7}, "hyperparameters": {"variant": "palm", "notes": "of PaLM"}}))
    config = load_config(str(path))
    assert config["stage"] == C and config["hyperparameters"]["notes"] == "of PaLM"
    command = experiment_config.command(config, 1, "out")
    assert command[-3:] == ["--variant=palm", "--seed=43", "--out_dir=out"]
    assert experiment_config.variables(config) == {"STAGE_NUM_ITERATIONS": "7"}


def test_the_script_is_never_executed(tmp_path, capsys):
    """Neither its assignments nor its annotations."""
    script = tmp_path / "mine.py"
    script.write_text("print('run')\nout_dir: print('run') = 'out'\nseed = print('run') or 1\n"
                      "num_iterations = 2 * 3\nlayers: list[int] | None = None\n"
                      "config = configure(globals())\n")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"experiment_name": "mine", "script": str(script)}))
    config = load_config(str(path), ["--layers=[1]"])
    assert experiment_config.num_iterations(config) == 6 and not capsys.readouterr().out
    assert "--layers=[1]" in experiment_config.command(config, 0, "out")
    with pytest.raises(UserError, match="layers=1"):
        load_config(str(path), ["--layers=1"])


@pytest.mark.parametrize("name, change, words", [
    ("metrics", {"step": "6"}, "step='6', which must be a number"),
    ("metrics", {"val_loss": [1]}, "val_loss=\\[1\\], which must be a number"),
    ("metrics", {"step": -1}, "step=-1, which is out of range"),
    ("metrics", {"run_id": None}, "run_id=None, which must"),
    ("results", {"run_id": True}, "must be a number"),
    ("results", {"run_id": -1}, "out of range"), ("results", {"final_step": "x"}, "final_step='x'"),
    ("results", {"final_val_loss": float("inf")}, "has inf, and its numbers must be finite"),
    ("results", {"final_val_loss": None}, "succeeded without a val loss"),
    ("results", {"final_val_loss": 1e200}, "out of range"), ("results", {"final_train_loss": "x"}, "='x'"),
    ("results", {"error": "\ud800"}, "lone surrogate"), ("results", {"seed": "many"}, "seed='many'"),
    ("results", {"output_tail": 10**30}, "does not fit into 64 bits"),
    ("config", {"n_runs": "many"}, "n_runs='many' must be an integer"),
    ("config", {"n_runs": 10**9}, "must be an integer from 1 to"), ("config", {"git_info": [1]}, "an object"),
    ("config", {"gpu_info": {"gpus": [{}]}}, "a GPU without a name"),
    ("config", {"parallel": "x"}, "'x' must"),
    ("config", {"script": {"sha256": 1}}, "script has sha256=1")])
def test_damaged_experiment_folders(tmp_path, name, change, words):
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path), 1, 1, lambda text: None)
    log.record({"run_id": 0, "seed": 42, "final_val_loss": 3.0, "final_train_loss": 3.0, "time_seconds": 1.0,
                "wall_seconds": 2.0, "final_step": 1, "success": True}, [{"step": 1, "val_loss": 3.0}])
    path = next(path for path in Path(log.folder).iterdir() if path.stem == name)
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(UserError, match=words) as e:
        read_folder(log.folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("losses, threshold, baseline, said", [
    ({24: [2.0, 2.02], 6: [2.0, 2.04], 2: [2.2]}, 2, None,
     "6 syncs, 75% fewer than 24: within 2% of the baseline's 24 syncs (2 runs)."),
    ({24: [2.0], 6: [2.0, 2.2]}, 2, None, "No schedule is within 2% of the baseline's 24 syncs."),
    ({6: [3.3]}, 1, 3.28, "6 syncs, 75% fewer than 24: within 1% of a val loss of 3.28 (1 run)."),
    ({24: [2.0], 6: [None]}, 2, None,
     "No run can be judged: let the runs finish, with the same settings but for the schedule.")])
def test_conclusions_about_syncs(losses, threshold, baseline, said):
    """A run that stopped early, None here, is not judged."""
    runs = [dict(syncs=n, dense_syncs=24, val_loss=loss or 2.0, step=9, config={}, run="r",
                 status="finished" if loss else "stopped") for n, values in losses.items() for loss in values]
    results_summary.compare(runs, baseline, threshold)
    assert results_summary.conclusion(runs, threshold, baseline) == said
    stopped = any(None in values for values in losses.values())
    assert ("not judged" in results_summary.runs_table(runs, threshold)) == stopped


def test_a_target_is_for_a_data_set(tmp_path):
    """With another one there is none: neither the analysis nor a campaign may claim that it was reached. A
    baseline's loss likewise."""
    path = tmp_path / "palm.json"
    config = json.loads((CONFIGS / A / "palm_screening.json").read_text())
    path.write_text(json.dumps(config | {"baseline_val_loss": 3.3, "baseline_std": 0.01}))
    for same in ("fineweb10B", ROOT / "data" / "fineweb10B", f"{ROOT}/data/fineweb10B/"):
        assert load_config(str(path), [f"--dataset={same}", "--val_tokens=1024"])["target_val_loss"] == 3.28
    other = load_config(str(path), ["--dataset=python_source"])
    assert [other[key] for key in ("target_val_loss", "baseline_val_loss", "baseline_std")] == [None] * 3
    assert es.p_at_most([1.0, 1.1], None) is None and es.runs_needed(1.0, 0.1, None) is None
    truth = {"baseline": (3.5, 3.3, 3.27), "good": (3.45, 3.25, 3.22)}
    _, _, outcome = play(replace(plan_of("good"), target=None), truth)
    assert outcome["best"] == "good" and outcome["target_reached"] is None
    assert outcome["reason"].endswith("and there is no target")


def test_wrong_files_and_arguments(tmp_path, monkeypatch):
    path = runner_kills.write_experiment(tmp_path)
    good = path.read_text()
    for text, words in (("{", "line 1: not JSON"), ('{"a": 1, "a": 2}', "'a' twice"), ('{"a": NaN}', "NaN"),
                        ("[]", "must be a JSON object"), (None, "cannot read")):
        path.write_text(text) if text else path.unlink()
        with pytest.raises(UserError, match=words):
            load_config(str(path))
    path.write_text(good)
    assert load_config(str(path), ["--effect=0.5"])["hyperparameters"] == {"effect": 0.5}
    assert load_config(str(path), ["--batch_size=2*2"])["stage_config"]["batch_size"] == 4
    with pytest.raises(UserError, match="--batch_size needs a value"):
        load_config(str(path), ["--batch_size"])
    with pytest.raises(UserError, match="--key=value goes to the script"):
        load_config(str(path), ["effect"])
    script = tmp_path / "fake_train.py"
    script.write_text("import time\n" + runner_kills.FAKE.replace("seed = 1\n", "seed = int(time.time())\n"))
    load_config(str(path))  # a default that is no literal is not known, and not computed
    script.write_text(runner_kills.FAKE)
    monkeypatch.setenv("STAGE_EFFECT", "1")
    with pytest.raises(UserError, match="the environment has STAGE_EFFECT"):
        load_config(str(path))


# the runner


def test_odd_events():
    """A value that is not a number raises an error; one that is not finite is null; steps count updates."""
    clock = {"train_time_ms": 5.0, "step_avg_ms": math.nan}
    rows = [runner.metric({"event": name, "step": step, key: loss, **clock})
            for name, step, key, loss in (("iter", 4, "loss", 10**400), ("eval", 5, "val_loss", math.inf))]
    assert rows == [{"step": 5, name: None, "train_time_ms": 5.0, "step_avg_ms": None}
                    for name in ("train_loss", "val_loss")]
    fine = {"event": "eval", "step": 5, "val_loss": 3.2, **clock}
    for odd in ({"val_loss": "3.2"}, {"train_time_ms": "10ms"}, {"step": "5"}, {"step": None}):
        with pytest.raises(UserError, match="an event 'eval' of its log has"):
            runner.metric(fine | odd)
    with pytest.raises(UserError, match="has no val_loss"):
        runner.metric({"event": "eval", "step": 5, **clock})
    assert runner.metric({"event": "checkpoint"}) is None


def test_odd_output_is_a_failed_run(tmp_path, monkeypatch):
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 1, say=lambda text: None)
    report = {"code": 0, "seconds": 1.0, "ended_by": "itself"}
    out = Path(log.run_folder(0), "out")
    out.mkdir(parents=True)
    (out.parent / "stdout.log").write_text("said\n")
    (out / "status.json").write_text('{"status": "diverged", "step": "many"}')
    start = {"event": "start", "time": 1.0, "config": {}, "resumed": False}
    ends = {"event": "eval", "step": 20, "val_loss": 3.2, "train_loss": 3.2, "lr": 0.1,
            "train_time_ms": "10ms", "step_avg_ms": 1e999}
    (out / "run_1.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (start, ends)))
    (out.parent / "report.json").write_text(json.dumps(report))
    runner.recover(log, 1)
    assert not log.results[0]["success"] and log.results[0]["error"].startswith("diverged at step 0")
    (out / "status.json").write_text('{"status": "finished", "step": 20}')
    result, metrics = runner.result_of(runner.Job(log, 0), log.run_folder(0), report)
    assert "no validation loss captured" in result["error"] and "'10ms'" in result["error"]
    monkeypatch.setattr(runner, "judge_run", lambda *args: 1 / 0)
    result, metrics = runner.result_of(runner.Job(log, 0), log.run_folder(0), report)
    assert "cannot be read: ZeroDivisionError" in result["error"] and metrics == []
    log.record(result, metrics)
    progress = runner.RunProgress(str(out))
    progress.update()
    assert progress.val_loss == 3.2 and progress.val_step == 20


def test_failed_runs_are_tried_again(tmp_path, monkeypatch):
    """Also if they failed before their first step."""
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 3, say=lambda text: None)
    failed = {"success": False, "final_val_loss": None, "time_seconds": 0.0, "wall_seconds": 1.0}
    for i in range(3):
        log.record(failed | {"run_id": i, "seed": 42 + i, "final_step": 0}, [])
    started = []

    def run_jobs(jobs, places, may_start, ended):
        for job in jobs:
            if may_start(job):
                started.append((job.run_id, job.limit))
                ended(job, {"final_step": 7 * (job.run_id == 0)})

    monkeypatch.setattr(run_nanogpt_experiment, "run_jobs", run_jobs)
    with pytest.raises(UserError, match="no run of"):
        run_nanogpt_experiment.execute(log, 3, True, [None], 90.0)
    assert started == [(0, 90.0), (1, 90.0), (2, 90.0)]


def test_a_run_that_fails_first_does_not_end_its_neighbours(tmp_path, monkeypatch):
    """With three runs at a time, the others do not start only if three ended before their first step."""
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 5, 3, say=lambda text: None)
    answers = []

    def run_jobs(jobs, places, may_start, ended):
        assert all(map(may_start, jobs[:3]))
        for job in jobs[:3]:
            ended(job, {"final_step": 0})
            answers.append(may_start(jobs[3]))
        ended(jobs[3], {"final_step": 7})
        answers.append(may_start(jobs[4]))

    monkeypatch.setattr(run_nanogpt_experiment, "run_jobs", run_jobs)
    with pytest.raises(UserError, match="no run of"):
        run_nanogpt_experiment.execute(log, 5, False, [None] * 3)
    assert answers == [True, True, False, True]


def test_what_else_may_lie_in_a_campaigns_folder(tmp_path):
    """A comparison that a user made there, and what a killed runner was about to make."""
    config = load_config(str(runner_kills.write_experiment(tmp_path, "zz")))
    parent = tmp_path / "logs"
    log = ExperimentLogger.create(config, str(parent), 1, say=lambda text: None)
    (parent / "comparison_1.json").write_text("{}")
    (parent / ".new-1" / "runs").mkdir(parents=True)
    assert campaign_folder.experiments_in(str(parent)) == [log.folder]
    assert not campaign_folder.experiments_in(str(tmp_path / "none"))


def test_superseded_decisions_are_kept_and_new_ones_said(tmp_path, capsys):
    """As when a budget that ended a campaign was raised."""
    campaign = object.__new__(run_stages.Campaign)
    campaign.folder, campaign._told, campaign.report = str(tmp_path), [], lambda decisions: ""
    keep, end, advance = ({"stage": A, "decision": name, "text": name, "interval": (0, 1)}
                          for name in ("keep", "end", "advance"))
    campaign.tell([keep, end])
    campaign.tell([keep])
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 2
    campaign.tell([keep, advance])
    said = capsys.readouterr().out.splitlines()
    assert [text.split(": ")[1] for text in said] == ["keep", "end", "advance"]
    superseded = json.loads((tmp_path / "superseded.jsonl").read_text())
    assert superseded["decision"] == "end" and superseded["until"] > 0
    assert "advance" in (tmp_path / "decisions.jsonl").read_text()


def test_a_torn_line_of_the_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    campaign_folder.cut_torn_line(str(path))
    for text, left in (('{"a": 1}\n{"b', '{"a": 1}\n'), ('{"a', ""), ('{"a": 1}\n', '{"a": 1}\n')):
        path.write_text(text)
        campaign_folder.cut_torn_line(str(path))
        assert path.read_text() == left
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot write"):
        campaign_folder.cut_torn_line(str(path))


@pytest.mark.parametrize("script, arguments, words", [
    (compare_experiments, ["--power=0.04"], "--power=0.04 must be above --alpha=0.05"),
    (analyze_results, ["--target=nan"], "--target=nan must be finite"),
    (analyze_results, [], "metrics.jsonl has no step")])
def test_wrong_analyses(tmp_path, monkeypatch, script, arguments, words):
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 1, say=lambda text: None)
    log.record({"run_id": 0, "seed": 42, "success": True, "final_val_loss": 3.2, "time_seconds": 1.0,
                "wall_seconds": 1.0, "final_step": 20}, [])
    monkeypatch.setattr(sys, "argv", ["script", log.folder, *arguments])
    with pytest.raises(UserError, match=re.escape(words)):
        script.main()


def test_time_to():
    one = np.array([[0, 5.0, 0.0], [10, 4.0, 10.0], [20, 3.0, 20.0]])
    assert time_to(one, 3.5) == 15.0 and time_to(one, 4.0) == 10.0 and time_to(one, 2.0) is None


def experiment_of(name: str, losses: list[float], **fields) -> Experiment:
    results = [{"run_id": i, "seed": 42 + i, "success": True, "final_val_loss": loss, "time_seconds": 1.0}
               for i, loss in enumerate(losses)]
    curves = [np.array([[0, 5.0, 0.0], [10, loss, 1.0]]) for loss in losses]
    config = {"stage_config": {}, "target_val_loss": 3.28}
    return Experiment(name, name, config, results, curves, {}, **fields)


def test_minimum_detectable_effect_of_several_comparisons(tmp_path, capsys):
    """Conclusions are by Holm's p, so what is detectable is, too."""
    a, *others = [experiment_of(name, losses) for name, losses in (
        ("a", [3.28, 3.29, 3.27]), ("b", [3.26, 3.28, 3.27]), ("c", [3.2, 3.23, 3.21]), ("one run", [3.3]))]
    compare_experiments.write_comparison([a, *others], str(tmp_path / "x"), 0.05, 0.8)
    found = json.loads((tmp_path / "x.json").read_text())["comparisons"]
    assert found[0]["minimum_detectable"] == es.minimum_detectable(a.losses, others[0].losses, 0.025)
    assert found[2]["minimum_detectable"] is None
    assert "detectable with probability 0.8 at p < 0.025, as 2 comparison(s) need" in capsys.readouterr().out


def test_each_run_has_gpus_of_its_own(tmp_path, monkeypatch):
    """As nvidia-smi and CUDA_VISIBLE_DEVICES tell of them."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 0 1 2 3; do echo 'NVIDIA H200, 143771 MiB, 580.159.04'; done\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_info()["count"] == 4
    assert gpu_info()["gpus"][3] == {"name": "NVIDIA H200", "memory": "143771 MiB", "driver": "580.159.04"}
    config = {"n_gpus": 1, "stage_config": {}, "hyperparameters": {}}
    assert runner.slots(config, 4) == ["0", "1", "2", "3"] and runner.slots(config, 1) == [None]
    assert runner.slots(config | {"n_gpus": 2}, 2) == ["0,1", "2,3"]
    with pytest.raises(UserError, match="needs 6 GPUs and 4 are visible"):
        runner.slots(config | {"n_gpus": 2}, 3)
    assert runner.slots(config | {"hyperparameters": {"device": "cpu"}}, 8) == [None] * 8
    for named, gpus in (("2, 3", ["2", "3"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("GPU-a", ["GPU-a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert runner.visible_gpus() == gpus
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert gpu_info() == {"count": 0, "gpus": []}


def test_what_losses_and_times_are_of_is_seen():
    """Whichever of two has a setting in its file; what is the default in both is no difference."""
    defaults = {"batch_size": 512, "val_tokens": 100, "dataset": "x"}
    a = experiment_of("a", [3.28, 3.29], defaults=defaults)
    for settings, of_stage, words in (
            ({"batch_size": 512}, ["batch_size"], []), ({"n_gpus": 4}, [], ["in n_gpus: their times"]),
            ({"batch_size": 64, "device_batch_size": 8}, ["batch_size", "device_batch_size"],
             ["in batch_size: that is another amount of work"]),
            ({"dataset": str(ROOT / "data" / "x")}, [], []),  # the same folder
            ({"val_tokens": 50, "dataset": "y"}, ["val_tokens"], ["in dataset, val_tokens: their losses"])):
        b = experiment_of("b", [3.18, 3.19], defaults=defaults)
        b.settings, b.config["stage_config"] = settings, dict.fromkeys(of_stage)
        for pair in ((a, b), (b, a)):
            one = compare_experiments.compare(*pair, 0.05, 0.8)
            said = compare_experiments.warnings(pair[0], [one])
            assert len(said) == len(words) and all(word in text for word, text in zip(words, said)), said
            compare_experiments.adjust([one])
            conclusion = compare_experiments.conclusion(one, pair[0].name, 0.05)
            assert ("whatever the tests say" in conclusion) == ("val_tokens" in settings)
            assert (one["welch"]["p_holm"] is None) == ("val_tokens" in settings)
    other_default = experiment_of("b", [3.18, 3.19], defaults=defaults | {"val_tokens": 50})
    assert compare_experiments.judged_otherwise(a, other_default) == ["val_tokens"]


def test_defaults_of_a_script_in_a_folder_are_read_and_not_run(tmp_path):
    (tmp_path / "x.py").write_text("a = 8 * 64\nb: list | None = None\nc = open('ran', 'w')\n"
                                   "configure()\nd = 1\n")
    assert report.defaults_of(str(tmp_path / "x.py")) == {"a": 512, "b": None}
    assert report.defaults_of(str(tmp_path / "y.py")) == {} and not Path("ran").exists()


def test_the_last_of_two_evaluations_of_a_step_counts():
    rows = [{"step": step, "val_loss": loss, "train_time_ms": 0.0}
            for step, loss in ((0, 5.0), (10, 4.0), (20, 3.0), (20, 2.9))]
    steps, losses, _ = on_common_steps([curve(rows), curve(rows[:3])])
    assert steps.tolist() == [0, 10, 20] and losses.tolist() == [[5.0, 4.0, 2.9], [5.0, 4.0, 3.0]]


def test_a_script_elsewhere_finds_the_project(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    def variables(config, gpus=None):
        return experiment_config.variables(config | {"stage_config": {}}, gpus)

    assert variables({"script": "train_gpt.py"}) == {}
    assert variables({"script": "train_gpt.py"}, "2,3") == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert variables({"script": str(tmp_path / "mine.py")}) == {"PYTHONPATH": str(ROOT)}
    monkeypatch.setenv("PYTHONPATH", "lib of mine")
    assert command_line(["python", "a b"], variables({"script": "experiments/mine.py"})) == \
        f"PYTHONPATH='{ROOT}{os.pathsep}lib of mine' python 'a b'"


def test_other_machines_and_code_are_seen(tmp_path):
    config = load_config(str(runner_kills.write_experiment(tmp_path)))
    said = []
    log = ExperimentLogger.create(config, str(tmp_path / "logs"), 2, 1, say=said.append)
    for n_runs in (5, 3):
        ExperimentLogger.reopen(log.folder, 1, said.append).raise_n_runs(n_runs)
    path = Path(log.folder, "config.json")
    described = json.loads(path.read_text())
    assert not said and described["n_runs"] == 5 and described["parallel"] == 1
    described |= {"gpu_info": {"count": 1, "gpus": [{"name": "X1"}]},
                  "git_info": described["git_info"] | {"commit": "abc", "diff_sha256": "def"}}
    path.write_text(json.dumps(described))
    ExperimentLogger.reopen(log.folder, 2, said.append)
    log.record({"run_id": 1, "seed": 101, "success": False, "final_val_loss": None, "time_seconds": 0.0,
                "wall_seconds": 1.0}, [])
    with pytest.raises(UserError, match=r"run 1 had the seed 101, and .* has base_seed=42 now"):
        ExperimentLogger.reopen(log.folder, 2)
    for what, one in zip(("commit", "git diff", "GPU", "--parallel"), said, strict=True):
        assert one.startswith(f"warning: {what} is ")
    a, b = (experiment_of(name, [3.28, 3.29], made_by=made_by(described) | {"--parallel": n})
            for name, n in (("a", 1), ("b", 4)))
    said = compare_experiments.warnings(a, [compare_experiments.compare(a, b, 0.05, 0.8)])
    assert said == ["b was run with another --parallel than a (4, not 1): differences may come from that."]
