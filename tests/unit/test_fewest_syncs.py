"""The search for the fewest syncs: its decisions, statistics, plans and reports. CPU; seconds.

    python -m pytest tests/unit/test_fewest_syncs.py
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from helpers import ROOT

from experiments import find_fewest_syncs, search_greedy, search_plan, simulate_search
from experiments.campaign import Run
from experiments.early_ending import pairs_at, predicted_least
from experiments.experiment_config import all_settings, check_settings
from experiments.fewest_syncs import LEAST_PROOF, decide, least_difference, slope
from experiments.runner import with_clock
from experiments.search_evidence import (
    ABOVE,
    DROPS,
    OPEN,
    PILOT,
    PROOF,
    SEARCH,
    SECOND,
    SENSITIVITY,
    SPARE,
    WITHIN,
    Ratio,
    SearchPlan,
    SearchResults,
    Story,
)
from experiments.search_plan import read_latencies, read_search
from experiments.search_report import control_text, rows_of, write_frontier
from nanosync.errors import UserError

COUNTS = 24, 12, 6, 3, 1
EFFECTS = {24: 0.0, 12: 0.001, 6: 0.004, 3: 0.05, 1: 0.1}
PLAN = SearchPlan(COUNTS, 0.02)


def loss_of(run: Run, effects: dict, spread: float = 0.004) -> float:
    rng = np.random.default_rng([*f"{run.stage}/{run.variant}".encode(), run.run_id])
    arm = run.variant
    effect = effects[arm] if arm in effects else effects[int(arm.rpartition("_")[2])]
    return 2.0 * math.exp(effect + spread * rng.standard_normal())


def play(plan: SearchPlan, loss, affordable=lambda batch: True) -> tuple[list[dict], dict, SearchResults]:
    """Do a search to its end; loss(run) is None for a failed run."""
    results = SearchResults()
    while True:
        decisions, batch, outcome = decide(plan, results, affordable)
        if outcome is not None:
            return decisions, outcome, results
        for run in batch:
            assert run not in results.losses
            results.take(run, loss(run))


def play_within(total: int, plan: SearchPlan, effects: dict) -> tuple[list[dict], dict, int]:
    """Do a search that has a budget for so many runs; return decisions, outcome and the number of runs."""
    results = SearchResults()
    while True:
        decisions, batch, outcome = decide(
            plan, results, lambda batch: len(results.losses) + len(batch) <= total)
        if outcome is not None:
            return decisions, outcome, len(results.losses)
        for run in batch:
            results.take(run, loss_of(run, effects))


def test_search_proves_the_fewest_count():
    decisions, outcome, _ = play(PLAN, lambda run: loss_of(run, EFFECTS))
    assert outcome["proved"] and outcome["fewest"] == 6 and outcome["count_interval"] == [6, 6]
    assert outcome["verdict"].startswith("fewest syncs within 2%: 6, proved +")
    assert "95% CI" in outcome["verdict"]
    assert decisions[0]["decision"] == "pilot" and decisions[-1]["decision"] == "end"
    verdicts = {arm["arm"]: arm["verdict"] for arm in outcome["arms"]}
    assert verdicts["even_3"] == verdicts["even_1"] == ABOVE and verdicts["even_6"] == WITHIN


def test_decisions_are_a_function_of_the_results():
    """A search whose results arrive one by one, in any order of a batch, decides the same."""
    _, outcome, whole = play(PLAN, lambda run: loss_of(run, EFFECTS))
    results = SearchResults()
    while True:
        _, batch, again = decide(PLAN, results)
        if again is not None:
            break
        results.take(batch[-1], loss_of(batch[-1], EFFECTS))
    assert again == outcome and results.losses == whole.losses
    decisions = decide(PLAN, whole)[0]
    fewer = SearchResults()
    for run in [run for run in whole.losses if run.stage == SEARCH]:
        fewer.take(run, whole.losses[run])
    searched = decide(PLAN, fewer)[0]
    assert searched == decisions[:len(searched)]


def test_levels_add_up_to_alpha():
    halvings = math.ceil(math.log2(len(COUNTS)))
    assert sum(map(PLAN.level_at, range(len(PLAN.looks)))) == pytest.approx(0.05 / halvings)
    assert all(PLAN.level_at(i) > 0 for i in range(len(PLAN.looks)))


def test_pilot_stops_a_search_that_can_decide_nothing():
    for words, spread, affordable in (
            ("train longer, or raise --within", 0.05, lambda batch: True),
            ("do not differ: do they use their seeds", 0.0, lambda batch: True),
            ("does not pay for the pilot", 0.004, lambda batch: False),
            ("decide one count, and a proof", 0.004, lambda batch: len(batch) <= 6)):
        _, outcome, results = play(PLAN, lambda run, spread=spread: loss_of(run, EFFECTS, spread), affordable)
        assert words in outcome["reason"] and not outcome["proved"] and len(results.losses) <= 6
        assert outcome["count_interval"] == [1, 24] and "not found" in outcome["verdict"]
    assert least_difference(PLAN, 0.01, 8) == pytest.approx(0.5 * least_difference(PLAN, 0.02, 8))


def test_a_search_that_spent_its_budget_keeps_what_it_found():
    """After the pilot the budget shrinks. What is left of it does not decide again whether to begin."""
    needed = play_within(1000, PLAN, EFFECTS)[2]
    for total in range(needed, needed + 3):
        _, outcome, n = play_within(total, PLAN, EFFECTS)
        assert outcome["proved"] and outcome["fewest"] == 6 and n == needed
    for total in range(needed):
        _, outcome, n = play_within(total, PLAN, EFFECTS)
        stopped = "does not pay for" in (outcome["reason"] or "")
        assert n <= 6 if stopped else n <= total, "it stopped after it had begun"


def test_undecided_counts_stay_in_the_interval():
    effects = EFFECTS | {3: PLAN.margin}  # at the margin itself
    _, outcome, _ = play(PLAN, lambda run: loss_of(run, effects))
    low, high = outcome["count_interval"]
    assert low <= 3 <= high and outcome["fewest"] in (None, 6, 12)
    assert {"arm": "even_3", "runs": 8} in outcome["undecided"]
    assert "3 undecided after 8" in outcome["verdict"]


def test_proof_has_fresh_seeds_and_at_most_two_attempts():
    """Search runs that were lucky are not in the proof, which fails twice."""
    bad = EFFECTS | {6: 0.03, 12: 0.03}
    decisions, outcome, results = play(
        PLAN, lambda run: loss_of(run, EFFECTS if run.stage == SEARCH else bad))
    proofs = [one for one in decisions if one["stage"] == PROOF and one["decision"] == "not proved"]
    assert [one["arm"] for one in proofs] == ["even_6", "even_12"] and not outcome["proved"]
    assert all(one["p"] > PLAN.alpha / 2 for one in proofs) and outcome["fewest"] is None
    assert "6 by the search, not proved" in outcome["verdict"]
    assert sum(run.stage == PROOF for run in results.losses) >= 3 * LEAST_PROOF
    bad[12] = 0.0  # the second attempt succeeds
    _, outcome, _ = play(PLAN, lambda run: loss_of(run, EFFECTS if run.stage == SEARCH else bad))
    assert outcome["fewest"] == 12 and outcome["count_interval"] == [6, 12]


def play_on(results: SearchResults, total: int, loss) -> tuple[list[dict], dict]:
    """Do a search with these results to its end, on a budget for so many runs in all."""
    while True:
        decisions, batch, outcome = decide(PLAN, results,
                                           lambda batch: len(results.losses) + len(batch) <= total)
        if outcome is not None:
            return decisions, outcome
        for run in batch:
            results.take(run, loss(run))


def reopened(results: SearchResults, decisions: list[dict]) -> SearchResults:
    """Read the results of a search from its folder."""
    again, arms = SearchResults(), {(PROOF, f"even_{n}") for n in COUNTS}
    again.proofs = find_fewest_syncs.proofs_in(json.loads(json.dumps(decisions)), arms, PLAN.looks[-1])
    for run, loss in results.losses.items():
        again.take(run, loss)
    return again


def test_a_larger_budget_does_not_enlarge_a_failed_proof():
    """Whatever budget a search had, its failed proofs keep their arms and sizes, and further runs that would
    be good do not change them."""
    bad, good, failed = EFFECTS | {6: 0.028, 12: 0.028}, dict.fromkeys(COUNTS, 0.0), set()
    for total in range(20, 60):
        results = SearchResults()
        decisions, outcome = play_on(results, total, lambda run: loss_of(
            run, EFFECTS if run.stage == SEARCH else bad, 0.012))
        proofs = [one for one in decisions if one["decision"] == "not proved"]
        again = reopened(results, decisions)
        more, other = play_on(again, 1000, lambda run: loss_of(run, good))
        tried = [one for one in more if one["decision"] in ("proved", "not proved")]
        assert tried[:len(proofs)] == proofs and len(tried) <= 2
        failed |= {one["runs"] for one in proofs}
        if proofs:
            assert all(run.stage != SEARCH for run in again.losses.keys() - results.losses.keys())
        if len(proofs) == 2:
            assert again.losses == results.losses and other["proved"] == outcome["proved"] is False
    assert len(failed) > 1  # proofs of several sizes failed, by the budget


def test_a_proof_keeps_its_size_from_its_first_run_on():
    """The size is decided before the results. A budget that falls short makes it smaller, for good."""
    results, decisions = SearchResults(), []
    while not results.proofs:
        decisions, batch, _ = decide(PLAN, results)
        for run in batch if not results.proofs else ():
            results.take(run, loss_of(run, EFFECTS, 0.01))
    (arm, n), = results.proofs.items()
    assert n > LEAST_PROOF and {run.variant for run in batch} == {arm, "even_24"} and len(batch) == 2 * n
    size, = (one for one in decisions if one["decision"] == "size")
    assert (size["arm"], size["runs"]) == (arm, n) and decisions[-1] == size
    for run in batch[:2]:
        results.take(run, loss_of(run, EFFECTS))
    short = len(results.losses) + 2 * (n - 2)
    assert decide(PLAN, results, lambda batch: len(results.losses) + len(batch) <= short)[1]
    assert results.proofs == {arm: n - 1}
    assert len(decide(PLAN, results)[1]) == 2 * (n - 1) - 2


def test_failed_runs_are_replaced():
    lost = {Run(SEARCH, "even_24", 1), Run(SEARCH, "even_6", 0), Run(PROOF, "even_6", 1)}
    _, outcome, results = play(PLAN, lambda run: None if run in lost else loss_of(run, EFFECTS))
    assert outcome["fewest"] == 6 and Run(SEARCH, "even_24", PILOT) in results.losses
    _, outcome, results = play(PLAN, lambda run: None if run.variant == "even_6" else loss_of(run, EFFECTS))
    assert outcome["fewest"] == 12 and {"arm": "even_6", "runs": 2} in outcome["undecided"]
    assert sum(run.variant == "even_6" for run in results.losses) == 2 + SPARE
    _, outcome, _ = play(PLAN, lambda run: None if run.variant == "even_24" else 2.0)
    assert "runs of the baseline failed" in outcome["reason"]


def test_bounds_enter_means_and_no_spread():
    story = Story(PLAN, SearchResults(), lambda batch: True)
    for i, loss in enumerate((2.0, 2.1, 9.0)):
        story.results.take(Run(SEARCH, "even_3", i), loss, bound=loss == 9.0)
    story.asked[SEARCH, "even_3"] = 3
    sample = story.sample("even_3")
    assert sample.mean == pytest.approx(np.log([2.0, 2.1, 9.0]).mean())
    assert story.spread()[0] == pytest.approx(np.std(np.log([2.0, 2.1]), ddof=1)) and story.spread()[1] == 1


def test_a_better_placement_can_win():
    plan = SearchPlan(COUNTS, 0.02, placements=(("ends", 3), ("ends", 6)))
    effects = EFFECTS | {"ends_3": 0.0, "ends_6": 0.05}
    _, outcome, _ = play(plan, lambda run: loss_of(run, effects))
    assert outcome["arm"] == "ends_3" and "3 (ends), proved" in outcome["verdict"]
    assert outcome["count_interval"] == [6, 6] and "95% interval of even placement 6" in outcome["verdict"]


GREEDY_PLAN = SearchPlan(COUNTS, 0.02, placements=(("ends", 3), ("greedy", 3), ("greedy", 6)))


def play_greedy(effects: dict, found: dict | None, total: int = 1000
                ) -> tuple[list[dict], dict, SearchResults]:
    """Do a search whose run of drop_syncs.py finds these arms, None for a run that fails."""
    results = SearchResults()
    while True:
        decisions, batch, outcome = decide(GREEDY_PLAN, results, lambda batch:
                                           len(results.losses) + len(batch) <= total)
        if outcome is not None:
            return decisions, outcome, results
        for run in batch:
            drops = run.stage == SENSITIVITY
            results.greedy = found if drops else results.greedy
            results.take(run, (2.1 if found else None) if drops else loss_of(run, effects))


def test_the_greedy_placement_can_win():
    found = {3: "greedy_3", 6: "even_6"}
    decisions, outcome, results = play_greedy(EFFECTS | {"ends_3": 0.05, "greedy_3": 0.0}, found)
    assert outcome["arm"] == "greedy_3" and "3 (greedy), proved" in outcome["verdict"]
    assert outcome["count_interval"] == [6, 6]  # of even placements
    assert [run for run in results.losses if run.stage == SENSITIVITY] == [Run(SENSITIVITY, DROPS, 0)]
    same = [one["text"] for one in decisions if one["decision"] == "same"]
    assert same == ["greedy_6 has the syncs of even_6"]
    assert not any(arm == "greedy_6" for arm in {run.variant for run in results.losses})


def test_a_search_without_greedy_placement_goes_on():
    """The run that finds it fails, or the budget does not pay for it and for a proof."""
    effects = EFFECTS | {"ends_3": 0.05}
    decisions, outcome, results = play_greedy(effects, None)
    assert outcome["arm"] == "even_6" and outcome["proved"]
    assert sum(run.stage == SENSITIVITY for run in results.losses) == 1 + SPARE
    assert any(one["stage"] == SENSITIVITY and one["decision"] == "fails" for one in decisions)
    needed = len(results.losses) - 1 - SPARE
    decisions, outcome, results = play_greedy(effects, {3: "greedy_3", 6: "greedy_6"}, needed)
    assert outcome["arm"] == "even_6" and outcome["proved"] and len(results.losses) == needed
    assert any(one["stage"] == SENSITIVITY and one["decision"] == "budget" for one in decisions)


def test_evaluations_and_arms_of_the_greedy_placement():
    assert search_greedy.evaluations(24, 1) == 277  # all syncs, then 23 + 22 + ... + 1
    assert search_greedy.evaluations(24, 24) == 1
    points = {"even_4": [1, 3, 5, 7], "even_2": [3, 7]}
    names, added = search_greedy.arms_of([8, 4, 2, 1], [0, 2, 4, 6, 5, 1, 3], points | {"even_1": [7]})
    assert names == {4: "even_4", 2: "even_2", 1: "even_1"} and added == {}
    names, added = search_greedy.arms_of([8, 4, 2, 1], [0, 2, 4, 5, 1, 3, 6], points | {"even_1": [7]})
    assert names == {4: "greedy_4", 2: "greedy_2", 1: "even_1"}
    assert added == {"greedy_4": [1, 3, 6, 7], "greedy_2": [6, 7]}


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"dropped": [1, 2]}', '{"dropped": [1, 1, 2]}', '{"dropped": [0, 1, 3]}',
    '{"dropped": [0, 1, 2.0]}', '{"dropped": "012"}'])
def test_an_order_that_is_not_valid_is_not_used(tmp_path, content):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "order.json"
    path.write_text('{"dropped": [2, 0, 1]}')
    assert search_greedy.read_order(str(tmp_path), 4, 1) == [2, 0, 1]
    path.write_text(content)
    assert search_greedy.read_order(str(tmp_path), 4, 1) is None
    path.unlink()
    assert search_greedy.read_order(str(tmp_path), 4, 1) is None


def test_a_plan_with_greedy_placement(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(shipped() | {"placements": ["greedy"]}))
    search = read_search(str(path), 0.02, {"device": "cpu"})
    assert search.rules.placements == tuple(("greedy", n) for n in (12, 8, 6, 4, 3, 2))
    drops = search.configs[SENSITIVITY, DROPS]
    assert drops["hyperparameters"] == {  # 277 x 3 x 32,768 tokens are fewer than 32,768,000
        "max_iters": 23, "eval_iters": 3, "dataset": "python_source", "tp_size": 2, "batch_size": 128,
        "device": "cpu", "dtype": "auto"}
    check_settings(drops, "the run of drop_syncs.py")
    kept = [key for key, config in search.configs.items() if all_settings(config).get("save_checkpoint")]
    assert kept == [(SEARCH, "even_24")]
    search.add_points("greedy_3", [7, 20, 23])
    for stage in (SEARCH, PROOF, SECOND):
        assert all_settings(search.configs[stage, "greedy_3"])["sync_points"] == [7, 20, 23]
    said = find_fewest_syncs.described(search, "plan.json")
    assert "| greedy_12 | 12 | by sensitivity |" in said and "277 evaluations of a dense model" in said
    assert read_search(str(path), 0.02, {}, "even").plan["placements"] == ["even", "mlp", "ends"]
    assert "greedy" in read_search(str(path), 0.02, {}, "both").plan["placements"]
    speedrun = {"placements": ["greedy"], "script": "train_gpt.py", "settings": {"batch_size": 128}}
    path.write_text(json.dumps(shipped() | speedrun))
    with pytest.raises(UserError, match="has no greedy placement"):
        read_search(str(path), 0.02, {})


FAMILIES = ("ladder", 23), ("palm", 12), ("mean-3", 4), ("caat-0.5", 24)


def test_families_are_judged_and_may_win():
    """A family is proved if it has fewer syncs than the best arm that drops syncs."""
    plan = SearchPlan(COUNTS, 0.02, families=FAMILIES, second_multiple=4.0)
    effects = EFFECTS | {"ladder": 0.001, "palm": 0.001, "mean-3": 0.05, "caat-0.5": -0.01}
    _, alone, _ = play(PLAN, lambda run: loss_of(run, effects))
    _, outcome, _ = play(plan, lambda run: loss_of(run, effects))
    assert outcome["arm"] == "even_6" and outcome["count_interval"] == alone["count_interval"]
    verdicts = {arm["arm"]: arm["verdict"] for arm in outcome["arms"]}
    assert [verdicts[arm] for arm, _ in FAMILIES] == [WITHIN, WITHIN, ABOVE, WITHIN]
    effects["mean-3"] = 0.001
    _, outcome, _ = play(plan, lambda run: loss_of(run, effects))
    assert outcome["arm"] == "mean-3" and outcome["fewest"] == 4 and outcome["count_interval"] == [6, 6]
    assert "2%: 4 (mean-3), proved" in outcome["verdict"]
    assert "95% interval of even placement 6" in outcome["verdict"]
    assert [row["arm"] for row in outcome["second_budget"]] == ["mean-3", "even_6", "even_3"]
    # its proof fails; the second and last attempt is that of the search without families
    decisions, outcome, _ = play(plan, lambda run: loss_of(
        run, effects | {"mean-3": 0.03} if run.stage == PROOF else effects))
    proofs = [(one["arm"], one["decision"]) for one in decisions if one["stage"] == PROOF and "p" in one]
    assert proofs == [("mean-3", "not proved"), ("even_6", "proved")] and outcome["fewest"] == 6


def test_a_family_wins_where_no_count_is_within():
    plan = SearchPlan((24, 12), 0.02, families=(("ladder", 23), ("caat-0.5", 24)))
    effects = {24: 0.0, 12: 0.08, "ladder": 0.0, "caat-0.5": 0.0}
    _, outcome, _ = play(plan, lambda run: loss_of(run, effects))
    assert outcome["arm"] == "ladder" and outcome["fewest"] == 23 and outcome["count_interval"] == [24, 24]


def test_families_leave_budget_for_the_proof():
    """They are tested only while the budget pays for the best arm's proof, too."""
    plan, total = SearchPlan(COUNTS, 0.02, families=FAMILIES), 40
    effects = EFFECTS | {arm: PLAN.margin for arm, _ in FAMILIES}
    decisions, outcome, n = play_within(total, plan, effects)
    assert outcome["fewest"] == 6 and n <= total
    assert any(one["decision"] == "budget" for one in decisions)


def test_claims_of_families_are_seldom_false():
    """All families are just above the margin, and many, so that one of them is lucky in the search."""
    families = tuple((f"mean-{i}", 2) for i in range(6))
    plan, false = SearchPlan((24, 12, 6), 0.02, looks=(2, 4), families=families), 0
    for i in range(60):
        effects = {24: 0.0, 12: 0.0, 6: 0.06} | {arm: plan.margin + 1e-6 for arm, _ in families}

        def loss(run, i=i, effects=effects):
            rng = np.random.default_rng([i, *f"{run.stage}/{run.variant}".encode(), run.run_id])
            arm = run.variant
            effect = effects[arm] if arm in effects else effects[int(arm.rpartition("_")[2])]
            return 2.0 * math.exp(effect + 0.006 * rng.standard_normal())

        outcome = play(plan, loss)[1]
        assert outcome["count_interval"][0] <= 12
        false += outcome["proved"] and outcome["arm"].startswith("mean")
    assert false <= 5  # 1.5 expected: half of alpha


def test_controls_and_second_budget():
    plan = SearchPlan(COUNTS, 0.02, control_layers=(10, 8), second_multiple=4.0)
    effects = EFFECTS | {"dense_10layers": 0.001, "dense_8layers": 0.06}
    _, outcome, results = play(plan, lambda run: loss_of(run, effects))
    assert [row["arm"] for row in outcome["second_budget"]] == ["even_6", "even_12", "even_3"]
    assert {run.variant for run in results.losses if run.stage == SECOND} == {
        "even_24", "even_12", "even_6", "even_3"}
    rows = rows_of(plan, outcome, {"even_24": 400.0, "even_6": 340.0})
    control = next(row for row in rows if row["arm"] == "dense_10layers")
    assert control["us_estimated"] and control["us"] == pytest.approx(400 * 10 / 12)
    assert next(row for row in rows if row["syncs"] == 12 and not row["control"])["us"] == pytest.approx(360)
    said = control_text(plan, rows)
    assert "dense model of 10 layers is within the margin as well" in said and "cannot be told from" in said
    assert "nothing is known about depth" in control_text(plan, [])


def test_slope_of_two_budgets():
    found = slope("even_6", Ratio(0.01, 0.001, 20, 8), Ratio(0.006, 0.001, 20, 8),
                  SearchPlan(COUNTS, 0.02, second_multiple=4.0))
    assert found["slope"] == pytest.approx(-0.004 / math.log(4))
    assert found["predicted"] == pytest.approx(0.002)
    assert found["tokens"] == 16 and found["supported"] and "conjecture beyond" in found["text"]
    low, high = found["predicted_interval"]
    assert high - 0.002 > 2 * math.hypot(0.001, 2 * 0.001) and low + high == pytest.approx(0.004)


def test_the_statistics_hold_by_simulation():
    """A small part of simulate_search.py."""
    families = dataclasses.replace(simulate_search.PLAN, families=simulate_search.FAMILIES)
    for kind, plan in itertools.product(simulate_search.WORLDS, (simulate_search.PLAN, families)):
        found = simulate_search.campaigns(8, kind, 0.01, 3, plan)
        assert found["covered"] >= 0.8 and found["false"] <= 0.1
        assert found["exceeded"] == 0 and found["other"] == 0


def test_prediction_intervals_hold():
    rng, below = np.random.default_rng(0), 0
    for _ in range(400):
        x = rng.normal(0.8, 0.05, 9)
        y = 0.1 + 0.7 * x + 0.003 * rng.standard_normal(9)
        pairs = list(zip(np.exp(x[:8]), np.exp(y[:8])))
        below += math.exp(y[8]) < predicted_least(pairs, math.exp(x[8]))
    assert below <= 8  # 0.5% expected
    assert predicted_least(pairs[:5], 2.0) is None and predicted_least([(2.0, 1.9)] * 8, 2.0) is None
    assert predicted_least(pairs, math.nan) is None
    rows = [{"step": 5, "val_loss": 2.0}, {"step": 7, "train_loss": 1.0}, {"step": 10, "val_loss": 1.5}]
    assert pairs_at(5, 10, [rows, rows[:2]]) == [(2.0, 1.5)] and pairs_at(7, 10, [rows]) == []


def test_placements_have_their_count():
    for name, points in search_plan.PLACEMENTS.items():
        for n in COUNTS:
            found = points(12, n)
            assert found[-1] == 23 and found == sorted(found)
            assert len(found) == n or name != "even"


def shipped() -> dict:
    return json.loads((ROOT / "experiments/configs/fewest_syncs.json").read_text())


def test_shipped_plan_and_the_speedrun(tmp_path):
    search = read_search(str(ROOT / "experiments/configs/fewest_syncs.json"), 0.02, {})
    first, second = (all_settings(search.configs[stage, "even_3"]) for stage in (SEARCH, SECOND))
    assert first["sync_points"] == [7, 15, 23] and first["max_iters"] == first["lr_decay_iters"] == 1000
    assert second["max_iters"] == second["lr_decay_iters"] == 4000
    assert all_settings(search.configs[SEARCH, "dense_8layers"])["n_layer"] == 8
    assert "18, 19" in find_fewest_syncs.described(search, "plan.json")
    plan = shipped() | {"script": "train_gpt.py", "settings": {"batch_size": 128, "warmdown_iters": 70}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    search = read_search(str(tmp_path / "plan.json"), 0.02, {})
    for stage, steps, down in ((SEARCH, 250, 70), (SECOND, 1000, 280)):
        settings = all_settings(search.configs[stage, "even_6"])
        assert settings["variant"] == "sync" and settings["sync_points"] == [3, 7, 11, 15, 19, 23]
        assert settings["num_iterations"] == steps and settings["warmdown_iters"] == down


def test_families_of_a_plan(tmp_path):
    names = ["palm", "ladder", "kraken", "dtp:02", "mean:3", "caat:0.50"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(shipped() | {"families": names}))
    search = read_search(str(path), 0.02, {})
    assert search.rules.families == (("palm", 12), ("ladder", 23), ("kraken", 12), ("dtp-2", 22),
                                     ("mean-3", 4), ("caat-0.5", 24))
    for stage in (SEARCH, PROOF, SECOND):
        settings = all_settings(search.configs[stage, "dtp-2"])
        assert settings["sync_strategy"] == "dtp:2" and settings["sync_points"] is None
    said = find_fewest_syncs.described(search, "plan.json")
    assert "| caat-0.5 | 24 | --sync_strategy=caat:0.5 |" in said
    assert "Families: up to 48 runs, which take up to 9.6." in said
    path.write_text(json.dumps({"rows": [{"name": "dtp:2", "us": 7.0}, {"name": "palm", "us": 5.0},
                                         {"name": "24 syncs", "us": 9.0}]}))
    assert read_latencies(str(path), 512, search.families) == {"dtp-2": 7.0, "palm": 5.0, "even_24": 9.0}
    assert read_latencies(str(path), 512) == {"even_24": 9.0}


def test_a_search_begun_before_plans_had_families_resumes():
    plan = search_plan.OPTIONAL | shipped()
    before = {key: value for key, value in plan.items() if key != "families"}
    assert search_plan.parts_that_stay(before) == search_plan.parts_that_stay(plan)
    assert search_plan.parts_that_stay(before) != search_plan.parts_that_stay(plan | {"families": ["palm"]})


@pytest.mark.parametrize("change, words", [
    ({"families": ["palms"]}, "families has 'palms': use palm, ladder"),
    ({"families": ["spd"]}, "families has 'spd': use palm, ladder"),
    ({"families": [3]}, "must be up to 20 strategies"),
    ({"families": "palm"}, "families"),
    ({"families": ["dtp:24"]}, "a delay from 1 to 23"),
    ({"families": ["mean"]}, "a divisor of n_layer=12"),
    ({"families": ["mean:5"]}, "a divisor of n_layer=12"),
    ({"families": ["caat:1.5"]}, "a share of the channels"),
    ({"families": ["caat:x"]}, "a share of the channels"),
    ({"families": ["dtp:2", "dtp:02"]}, "are the same"),
    ({"families": ["palm"], "script": "train_gpt.py", "settings": {"batch_size": 128}}, "has no families"),
    ({"counts": [24, 24, 1]}, "must fall from all syncs"),
    ({"counts": [24, "a"]}, "counts has 'a'"),
    ({"counts": [22, 1], "control_layers": []}, "22 syncs are those of 11 layers"),
    ({"looks": [3, 2]}, "rising numbers of runs"),
    ({"looks": [1, 2]}, "looks has 1"),
    ({"tokens": [5, 4]}, "tokens=[5, 4]"),
    ({"tokens": [100]}, "less than an update"),
    ({"placements": ["middle"]}, "use even, mlp, ends, greedy"),
    ({"placements": [["even"]]}, "use even, mlp, ends"),
    ({"alpha": 0.9}, "alpha=0.9"),
    ({"control_layers": [12]}, "1 to 11 layers"),
    ({"proof_seed": 105}, "fresh seeds"),
    ({"settings": {"sync_points": [1]}}, "sync_points is set for each arm"),
    ({"settings": {"n_layers": 12}}, "n_layer"),
    ({"budget": {"gpu_hours": 0, "gpu_hours_per_run": 1}}, "gpu_hours=0"),
    ({"budget": {"gpu_hours": 1, "gpu_hours_per_run": 0.01}}, "starting and ending"),
    ({"script": "no.py"}, "cannot read the script"),
    ({"count": [1]}, "did you mean 'counts'"),
])
def test_wrong_plans(tmp_path, change, words):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(shipped() | change))
    with pytest.raises(UserError) as e:
        read_search(str(path), 0.02, {})
    assert words in str(e.value) and "\n" not in str(e.value)


def test_margins():
    assert find_fewest_syncs.fraction("2%") == find_fewest_syncs.fraction("2") == 0.02
    for text in ("0", "two", "-1%", "60%", "nan"):
        with pytest.raises(UserError, match="--within=2%"):
            find_fewest_syncs.fraction(text)


def test_latency_tables(tmp_path):
    record = ROOT / "records/2026-11-21-sync-schedules-h200/decode4_oneshot.json"
    assert 380 < read_latencies(str(record), 768)["even_24"] < 400
    path = tmp_path / "t.json"
    for content in ([], {"rows": 5}, {"rows": [{"name": "x", "us": 1}]}, {"rows": [{"us": "a"}]}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="times by syncs"):
            read_latencies(str(path), 768)
    rows = [("24 syncs", "oneshot", 9.0), ("24 syncs", "fused", 8.0), ("24 syncs, delay 1", "fused", 7.0),
            ("6 syncs", "oneshot", 6.0)]
    path.write_text(json.dumps({"rows": [dict(zip(("name", "tp_allreduce", "us"), row)) for row in rows]}))
    assert read_latencies(str(path), 768) == {"even_24": 9.0, "even_6": 6.0}  # of the first kind of sum


def test_frontier_files(tmp_path):
    effects = EFFECTS | {3: PLAN.margin}
    _, outcome, _ = play(PLAN, lambda run: loss_of(run, effects))
    for times in ({}, {"even_24": 400.0, "even_1": 300.0}):
        said = write_frontier(str(tmp_path), PLAN, outcome, times)
        assert (tmp_path / "verdict.txt").read_text().strip() in said
        found = json.loads((tmp_path / "frontier.json").read_text())
        assert {row["verdict"] for row in found["arms"]} >= {WITHIN, ABOVE, OPEN}
        assert "| even_24 | 24 | 12 |" in (tmp_path / "frontier.md").read_text()
        assert (tmp_path / "frontier.png").stat().st_size > 1e4


def test_frontier_files_with_families(tmp_path):
    plan = SearchPlan(COUNTS, 0.02, placements=(("ends", 6), ("mlp", 6)), families=FAMILIES,
                      control_layers=(10,))
    effects = EFFECTS | {"dense_10layers": 0.01} | {arm: 0.001 for arm, _ in FAMILIES}
    _, outcome, _ = play(plan, lambda run: loss_of(run, effects))
    write_frontier(str(tmp_path), plan, outcome, {})
    assert "| mean-3 | 4 | 12 |" in (tmp_path / "frontier.md").read_text()
    said = write_frontier(str(tmp_path), plan, outcome, {"even_24": 400.0, "even_1": 300.0, "palm": 350.0})
    rows = {row["arm"]: row for row in json.loads((tmp_path / "frontier.json").read_text())["arms"]}
    assert rows["palm"]["us"] == 350 and rows["ladder"]["us"] is None and rows["ladder"]["syncs"] == 23
    assert not rows["palm"]["us_estimated"] and rows["even_6"]["us_estimated"]
    assert "Without the µs of mean-3" in said and rows["mean-3"]["answer"]


def test_logs_without_a_clock_get_one():
    events = [{"event": "start"}, {"event": "iter", "seconds": None}, {"event": "iter", "seconds": 0.5},
              {"event": "eval"}]
    assert with_clock(events)[-1]["train_time_ms"] == 500 == with_clock(events)[-1]["step_avg_ms"]
    events[1]["train_time_ms"] = 7.0
    assert with_clock(events) is events
