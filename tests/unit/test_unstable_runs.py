"""Runs of a frontier whose gradient norm has spikes: what a line and what tables say of them. CPU; seconds.

    python -m pytest tests/unit/test_unstable_runs.py
"""

import json
import math

import pytest
from test_frontier_tiers import tier
from test_sync_frontier import protocol, run_of

from experiments.frontier_draw import Tables, rows_of, verdict, write_frontier
from experiments.frontier_fit import Fit
from experiments.frontier_next import spikes_of
from experiments.frontier_runs import add_run, append_runs, merge, read_runs, unstable
from experiments.frontier_tiers import Tier, write_tiers
from nanosync.errors import UserError
from nanosync.run_log import RunLog


def log_of(norms: list[float | None], **config) -> RunLog:
    return RunLog("out", [{"event": "start", "config": config}, *(
        {"event": "iter", "step": step, "norm": norm} for step, norm in enumerate(norms))])


def test_the_share_of_spikes():
    """Whatever the size of the norms, and whether most of them are clipped or none."""
    norms = [0.2, 0.1, 0.1, 0.1, 0.5, 0.51, 0.1, 30.0]  # the lower quartile is 0.1, and 0.5 is no spike
    for size in (1.0, 16.0, 2.0**-10):
        scaled = [size * norm for norm in norms]
        for grad_clip in (0.0, 0.3, 1.0):
            assert spikes_of(log_of(scaled, grad_clip=grad_clip)) == 0.25
        assert spikes_of(log_of([1e9, 1e9, *scaled], warmup_iters=2)) == 0.25
    assert spikes_of(log_of([None, 2.0, 2.0, 2.0, 2.1], warmup_iters=None)) == 0.0
    assert spikes_of(log_of([1.0, 1.0, 6.0])) == 0.333333


def test_a_norm_that_falls_is_no_spike():
    """As of a small model, which is clipped in most of its updates: from 4 to 1.3 while it trains."""
    norms = [1.3 + 2.7 * math.exp(-step / 200) for step in range(1000)]
    assert spikes_of(log_of(norms, grad_clip=1.0)) == 0.0


@pytest.mark.parametrize("log", [
    log_of([None]), log_of([]), log_of([9.0], warmup_iters=1), log_of([9.0], warmup_iters="0"),
    log_of([9.0], warmup_iters=[1])], ids=range(5))
def test_what_says_nothing_of_spikes(log):
    assert spikes_of(log) is None


@pytest.mark.parametrize("spikes", [0, 0.5, 1.0, None])
def test_a_line_with_its_share(tmp_path, spikes):
    plan, path = protocol(), str(tmp_path / "runs.jsonl")
    append_runs(path, [run_of(plan, "dense_12", 1, spikes=spikes)])
    assert read_runs(path, plan)["dense_12", 1]["spikes"] == spikes


@pytest.mark.parametrize("spikes", [-0.1, 1.0001, "0.1", True, float("nan")])
def test_a_line_with_a_wrong_share(tmp_path, spikes):
    run = run_of(protocol(), "dense_12", 1, spikes=spikes)
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n")
    with pytest.raises(UserError) as found:
        read_runs(str(tmp_path / "runs.jsonl"), protocol())
    assert "\n" not in str(found.value)


def test_two_shares_of_a_run_contradict():
    plan, runs = protocol(), {}
    add_run(runs, run_of(plan, "dense_12", 1, spikes=0.1), "a")
    for other in (0.2, None):
        with pytest.raises(UserError, match=rf"spikes=0\.1 and not {other}"):
            add_run(runs, run_of(plan, "dense_12", 1, spikes=other), "b")


@pytest.mark.parametrize("spikes", [0.1, None])
def test_an_older_line_of_the_same_run_does_not_contradict(tmp_path, spikes):
    """The lines of some runs were given their share later; what is there stays."""
    plan, names = protocol(), ("old", "new")
    lines = {"old": run_of(plan, "dense_12", 1), "new": run_of(plan, "dense_12", 1, spikes=spikes)}
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in names}
    for name in names:
        append_runs(paths[name], [lines[name]])
    for one, other in (names, names[::-1]):
        assert merge(paths[one], [paths[other]], plan) == (0, 1, 0)
        assert read_runs(paths[one], plan)["dense_12", 1] == lines[one]
    append_runs(str(tmp_path / "third.jsonl"), [lines["old"] | {"val_loss": 2.1, "curve": [[10, 2.1, 2.1]]}])
    with pytest.raises(UserError, match="with val_loss="):
        merge(paths["new"], [str(tmp_path / "third.jsonl")], plan)


def test_the_table_names_unstable_runs(tmp_path):
    """Above 1%, not at it; a run that diverged is counted as such; old lines tell nothing."""
    plan = protocol(arms={arm: protocol().arms[arm] for arm in ("dense_12", "dense_8", "drop_4_r2")})
    runs = {(arm, seed): run_of(plan, arm, seed, 2.0 + seed / 100) for arm, seed in plan.runs}
    runs["dense_8", 1]["spikes"], runs["dense_8", 2]["spikes"] = 0.01, None
    write_frontier(plan, runs, Tables(), str(tmp_path / "f"))
    assert "nstable" not in (tmp_path / "f.md").read_text()
    for seed, share in ((1, 0.0101), (2, 1.0), (3, 0.01)):
        runs["drop_4_r2", seed]["spikes"] = share
    runs["drop_4_r2", 4] = run_of(plan, "drop_4_r2", 4, None, spikes=1.0)
    assert [unstable(runs, arm) for arm in plan.arms] == [None, 0, 2]
    row = rows_of(plan, runs, Fit(runs))[2]
    assert verdict(row).endswith(", 1 diverged, 2 unstable")
    write_frontier(plan, runs, Tables(), str(tmp_path / "f"))
    text = (tmp_path / "f.md").read_text()
    assert text.count("2 unstable") == 1 and "Unstable: after the warm-up more than 1%" in text
    assert [one["unstable"] for one in json.loads((tmp_path / "f.json").read_text())["arms"]] == [None, 0, 2]


def test_tiers_name_unstable_runs(tmp_path):
    """Those of the arm, which then has no line, and those of the baseline, with which all are compared."""
    def text(**spikes) -> str:
        large = tier(2, 0.004)
        for arm, share in spikes.items():
            large.runs[arm, 1]["spikes"] = share
        large = Tier(large.protocol, large.runs)
        return write_tiers([tier(1, 0.004), large, tier(3, 0.004)], str(tmp_path / "tiers"))

    assert "nstable" not in text() and "nstable" not in text(drop_4_r2=0.01)
    assert (one := text(drop_4_r2=0.2)).count("; 4, 1 unstable)") == 1
    assert "Unstable: after the warm-up more than 1%" in one
    assert one.count("| unstable | - | unstable | - | - |\n") == 1 and one.count(" predicted |\n") == 1
    assert "in doubt" not in one
    of_base = text(dense_12=0.2, dense_8=0.0)
    assert "1 runs of dense_12 are unstable in tier 2: all differences in it are in doubt." in of_base
    assert "1 unstable)" not in of_base and of_base.count(" predicted |\n") == 2
    found = json.loads((tmp_path / "tiers.json").read_text())
    assert {row["arm"]: [one["unstable"] for one in row["ratios"]] for row in found["arms"]} == {
        "dense_8": [None, 0, None], "drop_4_r2": [None, None, None]}
    assert [one["baseline_unstable"] for one in found["tiers"]] == [None, 1, None]
