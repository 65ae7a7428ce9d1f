"""Tiers of a frontier: lines through the log ratios of two, predictions of a third. CPU; seconds.

    python -m pytest tests/unit/test_frontier_tiers.py
"""

import functools
import json
import math
import random
import sys

import numpy as np
import pytest
from test_sync_frontier import SETTINGS, VALUES, run_of

from experiments import frontier
from experiments.frontier_protocol import Protocol
from experiments.frontier_runs import append_runs
from experiments.frontier_tiers import Tier, check_tiers, combined, compare, interval, verdict
from experiments.search_evidence import Ratio
from nanosync.errors import UserError

ARMS = {arm: VALUES["arms"][arm] for arm in ("dense_12", "dense_8", "drop_4_r2")}
SLOPES = {"dense_12": 0.0, "dense_8": 0.01, "drop_4_r2": -0.004}  # of the log ratio in log FLOPs


@functools.cache
def usual(number: int) -> Protocol:
    return protocol_of(number, name="toy")


def protocol_of(number: int, **changed) -> Protocol:
    settings = SETTINGS | ({"n_embd": 64} if number == 3 else {})
    values = VALUES | {"arms": ARMS, "tokens": 1280 * 4**(number - 1), "settings": settings} | changed
    return Protocol(values, f"protocol_{number}.json")


def tier(number: int, spread: float, seed: str = "", bend: float = 0.0) -> Tier:
    """The arms on lines in log FLOPs, but for `bend` in tier 3."""
    plan, runs = usual(number), {}
    x = Tier(plan, {}).log_flops
    for arm, number_of_seed in plan.runs:
        noise = random.Random(f"{seed} {number} {arm} {number_of_seed}").gauss(0, spread)
        loss = 2.0 * math.exp(SLOPES[arm] * (x - 15) + bend * (number == 3 and arm != "dense_12") + noise)
        run = run_of(plan, arm, number_of_seed, loss)
        run["curve"][-1][0] = plan.steps(arm)
        runs[arm, number_of_seed] = run
    return Tier(plan, runs)


def test_lines_are_found_and_a_bend_is_seen():
    tiers = [tier(n, 1e-7) for n in (1, 2, 3)]
    assert tiers[2].log_flops == pytest.approx(math.log(6 * 12 * 12 * 64**2 * 1280 * 16))
    check_tiers(tiers)
    for row in compare(tiers):
        assert row["slope"] == pytest.approx(SLOPES[row["arm"]], abs=1e-5)
        assert row["predicted"] == pytest.approx(row["ratios"][2]["ratio"], abs=1e-5)
    bent = compare([*tiers[:2], tier(3, 1e-7, bend=0.02)])
    assert {verdict(row) for row in bent} == {"higher than predicted"}
    before = compare([*tiers[:2], Tier(protocol_of(3), {})])  # the prediction does not need its runs
    assert [row["predicted"] for row in before] == [row["predicted"] for row in bent]
    assert {verdict(row) for row in before} == {"not run"} and before[0]["ratios"][2] is None


def test_intervals_cover_the_truth():
    """95% of 300 intervals: the bounds are a binomial's percentiles 0.1 and 99.9."""
    inside = {"slope": [], "difference": []}
    for n in range(300):
        row = compare([tier(number, 0.004, f"draw {n}") for number in (1, 2, 3)])[1]
        for name, truth in (("slope", SLOPES[row["arm"]]), ("difference", 0.0)):
            low, high = row[f"{name}_interval"]
            inside[name].append(low <= truth <= high)
    assert all(0.908 <= np.mean(found) <= 0.984 for found in inside.values()), {
        name: np.mean(found) for name, found in inside.items()}


def test_combined():
    one, other = Ratio(1.0, 3.0, 4, 5), Ratio(2.0, 4.0, 8, 3)
    both = combined(1.0, one, -2.0, other)
    assert both.mean == -3 and both.error == pytest.approx(math.hypot(3, 8))
    assert both.df == pytest.approx(73**2 / (9**2 / 4 + 64**2 / 8))
    unknown = combined(1.0, one, 1.0, Ratio(1.0, math.nan, math.nan, 1))
    assert interval(unknown) is None and unknown.mean == 2 and unknown.runs == 1


@pytest.mark.parametrize("tiers, said", [
    (lambda: [tier(2, 0.01), tier(1, 0.01)], "no larger tier"),
    (lambda: [Tier(protocol_of(1), {}), tier(2, 0.01)], "has no run of another arm with a seed of its base"),
    (lambda: [tier(1, 0.01), Tier(protocol_of(2, arms={"dense_12": {}, "other": {"n_layer": 6}}), {})],
     "no arm in common"),
    (lambda: [tier(1, 0.01), Tier(protocol_of(2, baseline="dense_8"), {})],
     "has the baseline dense_12, and protocol_2.json dense_8"),
    (lambda: [tier(1, 0.01), Tier(protocol_of(2, settings=SETTINGS | {"n_embd": 0}), {})],
     "n_embd=0 of the baseline must be an integer of at least 1")])
def test_what_cannot_be_compared(tiers, said):
    with pytest.raises(UserError, match=said):
        check_tiers(tiers())


def test_the_command(tmp_path, monkeypatch, capsys):
    """Three files of runs, the last of them empty; tiers.md and tiers.json beside the first."""
    monkeypatch.chdir(tmp_path)
    for n in (1, 2, 3):
        one = tier(n, 0.004)
        (tmp_path / one.protocol.path).write_text(json.dumps(one.protocol.values))
        if n < 3:
            append_runs(one.protocol.runs_path, one.runs.values())
    call = ["frontier.py", "tiers", "--protocol=protocol_1.json", "--larger=protocol_2.json"]
    monkeypatch.setattr(sys, "argv", [*call, "--larger=protocol_3.json"])
    frontier.main()
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "tiers.json").read_text())
    assert (tmp_path / "tiers.md").read_text() in printed and printed.count("not run") == 2
    assert [one["runs"] for one in found["tiers"]] == [12, 12, 0] and "predicted" in found["arms"][0]
    monkeypatch.setattr(sys, "argv", call[:3])
    with pytest.raises(UserError, match="give --larger=FILE"):
        frontier.main()
    monkeypatch.setattr(sys, "argv", [*call, "--width=8"])
    with pytest.raises(UserError, match="--width is for draw"):
        frontier.main()
