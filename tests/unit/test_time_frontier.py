"""Final losses against training time: frontiers, their intervals, and files of other programs' runs. CPU;
seconds.

    python -m pytest tests/unit/test_time_frontier.py
"""

import json
import math
import sys

import numpy as np
import pytest

from experiments import analyze_results, time_frontier
from experiments.experiment_config import DEFAULTS
from experiments.report import Experiment
from experiments.time_frontier import Estimate, Family, Point
from nanosync.errors import UserError


def family(name="a", speed=1.0, noise=0.0, seeds=3, seconds=(60, 120, 240), slope=-0.1, random=None):
    """Runs whose loss is 0.9 after 120 s / speed, and falls by 0.1 where the time grows e-fold."""
    random = random or np.random.RandomState(1)
    return Family(name, [[Point(seed, t / speed, 0.9 + slope * math.log(t / 120) + noise * random.randn())
                          for seed in range(seeds)] for t in seconds])


def test_frontier_is_linear_in_log_time():
    one = family()
    for seconds in (60, 75, 120, 200, 240, 56, 262):
        assert one.loss_at(seconds)[0].value == pytest.approx(0.9 - 0.1 * math.log(seconds / 120))
    assert math.exp(one.log_time_to(0.88).value) == pytest.approx(120 * math.exp(0.2))
    assert one.loss_at(54) is one.loss_at(265) is one.log_time_to(1.0) is one.log_time_to(0.8) is None
    assert one.why_not(0.8) == "not within 240" and one.why_not(1.0) == "below 60"
    assert one.noise is None and one.loss_at(75)[0].interval is None  # the seeds do not differ


def test_a_faster_family_has_the_ratio_of_its_times():
    fast, slow = family("fast", 1.6, 0.002), family("slow", 1.0, 0.002, random=np.random.RandomState(2))
    for targets in ([0.897], []):
        found = time_frontier.figures([slow, fast], slow, targets, [70.0, 140.0])
        ratios = {(one["name"], one["val_loss"]): one for one in found["time_to"]}
        reached = [one for (name, _), one in ratios.items() if name == "fast"]
        assert len(reached) == (1 if targets else 3)
        for one in reached:
            low, high = one["ratio_interval"]
            assert low < one["ratio"] < high and one["ratio"] == pytest.approx(1 / 1.6, rel=0.04)
        for one in found["loss_at"]:
            assert (one["difference"] is None) == (one["name"] == "slow")
            if one["name"] == "fast":
                assert one["difference"] == pytest.approx(-0.1 * math.log(1.6), abs=0.006)
                assert one["p"] < 1e-4 and one["p"] <= one["p_holm"]


def test_a_reference_of_one_length_has_ratios():
    peer, ours = family("peer", seconds=[118], noise=0.001), family("ours", 1.5, 0.001)
    (of_peer, of_ours) = time_frontier.figures([peer, ours], peer, [], [118])["time_to"]
    assert of_peer["seconds"] == pytest.approx(118) and of_peer["ratio"] is None
    assert of_ours["ratio"] == pytest.approx(1 / 1.5, rel=0.03) and of_ours["ratio_interval"][0] > 0.6
    assert peer.loss_at(100) is None and peer.log_time_to(0.9) is None


def test_a_plateau_and_a_single_seed_have_no_wrong_numbers():
    """A target that two segments cross is reached at the first; one run a length has no interval."""
    bumpy = Family("b", [[Point(1, t, loss)] for t, loss in ((10, 1.0), (20, 0.9), (40, 0.95), (80, 0.8))])
    assert math.exp(bumpy.log_time_to(0.92).value) == pytest.approx(10 * 2**0.8)
    estimate, p = time_frontier.difference(*(bumpy.loss_at(t)[0] for t in (10, 20)))
    assert estimate.value == pytest.approx(-0.1) and estimate.interval is p is None
    assert time_frontier.difference(Estimate(1.0, 0.0, 2), Estimate(2.0, 0.0, 2))[1] is None
    found = time_frontier.figures([bumpy], None, [0.92, 2.0, 0.1], [30])
    assert [one["instead"] for one in found["time_to"]] == [None, "below 10", "not within 80"]
    assert "nan" not in time_frontier.report(found, ["a note"], "x.png")


def test_intervals_cover_the_truth():
    """Of 300 families with noise in loss and time, 95% of the intervals hold the true loss and time."""
    random, covered = np.random.RandomState(3), np.zeros(2)
    for _ in range(300):
        lengths = []
        for t in (60, 120, 240):
            times = t * np.exp(0.02 * random.randn(3))
            losses = 0.9 - 0.1 * np.log(times / 120) + 0.004 * random.randn(3)
            lengths.append([Point(seed, *pair) for seed, pair in enumerate(zip(times, losses))])
        one = Family("a", lengths)
        found = one.loss_at(90)[0], one.log_time_to(0.87)
        truth = 0.9 - 0.1 * math.log(90 / 120), math.log(120) + 0.3
        covered += [low <= true <= high for (low, high), true in zip((x.interval for x in found), truth)]
    assert (covered >= 300 * 0.92).all() and (covered <= 300 * 0.99).all(), covered


RUNS = [{"name": "peer, 2025", "seed": seed, "seconds": seconds + seed / 10, "loss": 0.9 - seconds / 1e3}
        for seconds in (60, 118) for seed in (1, 2, 3)]


def test_json_and_csv_are_the_same_runs(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RUNS))
    rows = [f'"{run["name"]}",{run["seed"]},{run["seconds"]},{run["loss"]}' for run in RUNS]
    (tmp_path / "a.csv").write_text("\n".join(["name,seed,seconds,loss", *rows]) + "\n")
    read = [time_frontier.read_points(str(tmp_path / name)) for name in ("a.json", "a.csv")]
    assert read[0][0].lengths == read[1][0].lengths and len(read[0]) == 1
    assert [len(runs) for runs in read[0][0].lengths] == [3, 3]
    close = [run | {"seconds": 60 + i, "steps": 600 + i % 2, "seed": i} for i, run in enumerate(RUNS)]
    (tmp_path / "b.json").write_text(json.dumps(close))
    (family_of_b,) = time_frontier.read_points(str(tmp_path / "b.json"))
    assert [runs[0].steps for runs in family_of_b.lengths] == [600, 601]


@pytest.mark.parametrize("text, words", [
    ("{}", "must be a list of 1 to 100,000 runs"), ("[]", "must be a list"), ("[1]", "run 1 has no name"),
    (json.dumps([RUNS[0] | {"seconds": 0}]), "run 1: seconds=0 must be a number above 0"),
    (json.dumps([RUNS[0] | {"loss": "low"}]), "loss='low' must be a number not below 0"),
    (json.dumps([RUNS[0] | {"seed": True}]), "seed=True must be an integer"),
    (json.dumps([RUNS[0] | {"name": "x" * 200}]), "at most 100 characters"),
    (json.dumps([RUNS[0], RUNS[0]]), "two runs of seed 1 and one length"),
    (json.dumps([RUNS[0] | {"steps": steps} for steps in (5, 6)]), "two lengths with the same mean time"),
    ("[NaN]", "NaN"), ("[", "not JSON"),
    ("name,seed,seconds\na,1,2\n", "run 1 has no loss"), ("name,seed,seconds,loss\na,1,x,2\n", "seconds='x'"),
    ("name,seed,seconds,loss\na,1,nan,2\n", "seconds=nan must be"), ("name\n\"a", "is not CSV"),
    ("\xff", "is not CSV"), (None, "cannot read")])
def test_wrong_points_are_one_line(tmp_path, text, words):
    path = tmp_path / ("x.json" if text is not None and text[0] in "[{" else "x.csv")
    if text is not None:
        path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError) as e:
        time_frontier.read_points(str(path))
    assert words in str(e.value) and "\n" not in str(e.value)


def experiment(name: str, steps: int, losses: list[float], **settings) -> Experiment:
    results = [{"run_id": i, "seed": 42 + i, "success": True, "final_val_loss": loss,
                "time_seconds": steps / 10 + i / 100} for i, loss in enumerate(losses)]
    return Experiment(f"{name}_{steps}", name, DEFAULTS | {"experiment_name": name}, results, [],
                      settings | {"num_iterations": steps})


def test_experiments_of_one_name_are_a_family():
    families, notes = time_frontier.families_of([
        experiment("a", 400, [0.9, 0.91], val_tokens=8), experiment("a", 200, [1.0, 1.01], val_tokens=8),
        experiment("b", 400, [0.8, 0.81], val_tokens=7)])
    assert [family.name for family in families] == ["a", "b"] and families[0].z[0] < families[0].z[1]
    assert [runs[0].steps for runs in families[0].lengths] == [200, 400]
    assert len(notes) == 1 and "differs from a in val_tokens" in notes[0]
    _, notes = time_frontier.families_of([experiment("a", 400, [0.9]),
                                          experiment("a", 200, [1.0], dataset="x")])
    assert any("a: its experiments also differ in dataset" in note for note in notes)
    with pytest.raises(UserError, match="two runs of seed 42"):
        time_frontier.families_of([experiment("a", 400, [0.9]), experiment("a", 400, [0.9])])


@pytest.mark.parametrize("arguments, words", [
    ([], "give the folder of an experiment"), (["--frontier=x"], "--frontier needs experiments"),
    (["--points=a.json"], "add --frontier=STEM"), (["--at=60", "x"], "add --frontier=STEM"),
    (["--frontier=x", "--at=60,-1", "--points=a.json"], "--at='60,-1' must be seconds"),
    (["--frontier=x", "--points=a.json", "--reference=b"], "--reference='b' is no family: use one of peer"),
    (["--frontier=x", "--points=a.json", "--points=b.json"], "is the name of two families"),
    (["--frontier=x/", "--points=a.json"], "names no file"),
    (["--frontier=x", "--points=a.json", "--reference=peer, 2025", "--target=0.85", "--at=70"], None)])
def test_analyse_by_time_from_the_command_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(RUNS))
    monkeypatch.setattr(sys, "argv", ["analyze_results.py", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    if words is not None:
        with pytest.raises(UserError) as e:
            analyze_results.main()
        assert words in str(e.value) and not list(tmp_path.glob("x*"))
        return
    analyze_results.main()
    assert "| 0.8500 | peer, 2025 |" in capsys.readouterr().out and (tmp_path / "x.png").stat().st_size > 1e4
    assert json.loads((tmp_path / "x.json").read_text())["reference"] == "peer, 2025"
