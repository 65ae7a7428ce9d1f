"""The frontier of sync schedules: errors of protocols and runs, the order of runs, merging, the table and the
picture. CPU; seconds.

    python -m pytest tests/unit/test_sync_frontier.py
"""

import json
import math
import random
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT

from experiments import frontier, frontier_draw, frontier_next, frontier_picture
from experiments.experiment_config import command
from experiments.frontier_fit import Fit
from experiments.frontier_protocol import REST, Protocol, check_strategies, digest_of
from experiments.frontier_runs import append_runs, merge, read_runs
from experiments.runner import Job, ready_places
from nanosync import distributed
from nanosync.errors import UserError

SETTINGS = {"n_layer": 12, "n_head": 4, "n_embd": 32, "block_size": 32, "batch_size": 4,
            "gradient_accumulation_steps": 1, "device": "cpu", "compile": False}
ARMS = {"dense_12": {"sync_strategy": "standard"},
        "dense_10": {"sync_strategy": "standard", "n_layer": 10},
        "dense_8": {"sync_strategy": "standard", "n_layer": 8},
        "drop_12_r2": {"sync_strategy": "spd", "tp_size": 2},
        "drop_12_r4": {"sync_strategy": "spd", "tp_size": 4},
        "drop_4_r2": {"sync_strategy": "grouped", "layers_per_group": 3, "tp_size": 2},
        "drop_4_r4": {"sync_strategy": "grouped", "layers_per_group": 3, "tp_size": 4},
        "drop_1_r4": {"sync_strategy": "custom", "sync_points": [23], "tp_size": 4}}
SYNCS = {"dense_12": 24, "dense_10": 20, "dense_8": 16, "drop_12_r2": 12, "drop_12_r4": 12, "drop_4_r2": 4,
         "drop_4_r4": 4, "drop_1_r4": 1}
VALUES = {"name": "toy", "dataset": "letters", "data_sha256": None, "tokens": 1280, "seeds": [1, 2, 3, 4],
          "settings": SETTINGS, "baseline": "dense_12", "arms": ARMS, "seconds_per_run": 60}


def protocol(**changed) -> Protocol:
    return Protocol(VALUES | changed, "protocol.json")


def run_of(plan: Protocol, arm: str, seed: int, loss: float | None = 2.0, **changed) -> dict:
    curve = [[0, 4.0, 4.0], [10, loss, loss]]
    return {"protocol": plan.digest, "data": "0123456789abcdef", "arm": arm, "seed": seed,
            "status": "finished" if loss else "non_finite", "val_loss": loss, "curve": curve,
            "syncs": SYNCS.get(arm), "seconds": {"wall": 50.0, "start": 10.0, "training": 39.0,
                                                 "evaluation": 1.0},
            "parallel": 1, "card": "cpu", "torch": "2.13.0", "commit": None, "time": 1.0} | changed


def synthetic(plan: Protocol, seeds: dict[str, int], spread: float = 0.004) -> dict:
    """Runs whose loss grows as syncs and layers fall. seeds: arm -> runs that it has, without entry all."""
    runs = {}
    for arm, seed in plan.runs:
        if plan.seeds.index(seed) < seeds.get(arm, len(plan.seeds)):
            effect = 0.02 * math.log(24 / SYNCS[arm]) * (1.5 if arm.startswith("dense") else 0.5)
            noise = random.Random(f"{arm} {seed}").gauss(0, spread)
            runs[arm, seed] = run_of(plan, arm, seed, 2.0 * math.exp(effect + noise))
    return runs


def rows_of(plan: Protocol, runs: dict) -> list[dict]:
    return frontier_draw.rows_of(plan, runs, Fit(runs))


def latency_table(path, allreduce: str, per_sync: float) -> str:
    rows = [{"n_embd": width, "batch_size": batch, "processes": n, "name": f"{syncs} syncs",
             "allreduce": allreduce, "us": 300.0 + per_sync * syncs * n / 2 + width / 10 + batch}
            for width in (768, 2048) for batch in (1, 16) for n in (2, 4) for syncs in (24, 12, 6, 3, 1)]
    rows += [{"n_embd": 768, "batch_size": 1, "processes": 1, "name": "TP=1", "allreduce": None, "us": 372.0}]
    path.write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "rows": rows}))
    return str(path)


# the protocol

WRONG_PROTOCOLS = [
    ({"tokenz": 3}, "unknown key 'tokenz'"), ({"tokens": "many"}, "must be an integer"),
    ({"tokens": 1281}, "no multiple of the 128 tokens of an update"), ({"tokens": 0}, "tokens=0 must be"),
    ({"seeds": []}, "1 to 1000 different integers"), ({"seeds": [1, 1]}, "different integers"),
    ({"seeds": [1, -1]}, "seeds has -1"), ({"seeds": [1, True]}, "seeds has True"),
    ({"seeds": [1.5]}, "seeds has 1.5"), ({"seeds": [[1], {}]}, r"seeds has \[1\]"),
    ({"name": "a/b"}, "names a folder"), ({"baseline": "dense"}, "baseline='dense' is not in arms"),
    ({"arms": {"dense_12": {}}}, "must be 2 to"), ({"arms": ARMS | {"x": 3}}, "an object of settings"),
    ({"arms": ARMS | {"../x": {}}}, "names a folder"),
    ({"arms": ARMS | {"x": {"n_layr": 3}}}, "unknown setting|n_layer"),
    ({"arms": ARMS | {"x": {"seed": 3}}}, "arm x has 'seed'"),
    ({"arms": ARMS | {"x": {"n_layer": "three"}}}, "n_layer='three'"),
    ({"arms": ARMS | {"x": {"sync_strategy": "standard"}}}, "dense_12 and x have the same settings"),
    ({"settings": SETTINGS | {"max_iters": 5}}, "settings has 'max_iters'"),
    ({"settings": SETTINGS | {"out_dir": "x"}}, "settings has 'out_dir'"),
    ({"settings": SETTINGS | {"save_checkpoint": True}}, "settings has 'save_checkpoint'"),
    ({"settings": []}, "must be an object"), ({"script": "no_script.py"}, "cannot read the script"),
    ({"data_sha256": {}}, "data_sha256 is empty"), ({"data_sha256": {"train.bin": "12"}}, "64 hexadecimal"),
    ({"data_sha256": {"../train.bin": "0" * 64}}, "no name of a file"), ({"data_sha256": "0"}, "data_sha256"),
    ({"spread_groups": {"few": "drop_1_r4"}}, "spread_groups has 'few'"),
    ({"spread_groups": {"few": []}}, "it needs names"),
    ({"spread_groups": {REST: ["drop_1_r4", "drop_4_r4"]}}, "spread_groups has 'the rest'"),
    ({"spread_groups": {"a\nb": ["drop_1_r4", "drop_4_r4"]}}, "it needs names"),
    ({"spread_groups": {"few": ["drop_1_r4", "x"]}}, "'x' is no arm, or is there twice"),
    ({"spread_groups": {"a": ["drop_1_r4", "drop_4_r4"], "b": ["dense_8", "drop_1_r4"]}}, "is there twice"),
    ({"spread_groups": {"a": [["drop_1_r4"], "dense_8"]}}, "is no arm"),
    ({"seconds_per_run": 0}, "seconds_per_run=0"), ({"seconds_per_run": True}, "must be a number"),
    ({"latency_rows": {"y": "6 syncs"}}, "latency_rows has 'y'"),
    ({"latency_rows": {"dense_12": 6}}, "name of a row")]


@pytest.mark.parametrize(("changed", "words"), WRONG_PROTOCOLS, ids=range(len(WRONG_PROTOCOLS)))
def test_errors_of_a_protocol_are_one_line(changed, words):
    with pytest.raises(UserError, match=words) as found:
        protocol(**changed)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("key", [key for key in VALUES if key != "seconds_per_run"])
def test_a_protocol_needs_its_keys(key):
    with pytest.raises(UserError, match=f"has no '{key}'"):
        Protocol({name: value for name, value in VALUES.items() if name != key}, "protocol.json")


def test_any_prefix_of_the_runs_is_balanced():
    plan = protocol()
    for n in range(len(plan.runs)):
        counts = [sum(arm == name for name, _ in plan.runs[:n]) for arm in plan.arms]
        assert max(counts) - min(counts) <= 1
    assert len(set(plan.runs)) == len(plan.runs) == 32


def test_a_digest_changes_with_what_losses_depend_on():
    digest = protocol().digest
    assert digest == protocol(seconds_per_run=7, description="other", latency_rows={"dense_8": "x"}).digest
    for changed in ({"tokens": 2560}, {"seeds": [1, 2]}, {"settings": SETTINGS | {"beta2": 0.9}},
                    {"arms": dict(list(ARMS.items())[:3])}, {"data_sha256": {"train.bin": "0" * 64}}):
        assert protocol(**changed).digest != digest
    config = protocol().configs["drop_1_r4"]["hyperparameters"]
    assert config["max_iters"] == config["lr_decay_iters"] == 10 and config["save_checkpoint"] is False


def test_one_process_starts_without_torchrun():
    """It imports PyTorch once, and wraps no model in DDP, also under torchrun."""
    config = protocol().configs["drop_1_r4"]
    assert command(config, 3, "out")[1].endswith("train_reduced_sync.py")
    assert "--seed=3" in command(config, 3, "out") and "--save_checkpoint=False" in command(config, 3, "out")
    assert "torch.distributed.run" in command(config | {"n_gpus": 2}, 3, "out")
    assert distributed._mesh(0, 1, 1) == (0, 1, None, None)


def test_the_protocols_of_the_record_are_valid():
    for path in (ROOT / "records" / "sync-frontier").rglob("protocol*.json"):
        plan = Protocol.read(str(path))
        assert plan.runs_path.endswith(path.name.replace("protocol", "runs") + "l")
        check_strategies(plan)
    with pytest.raises(UserError, match="not named protocol"):
        _ = Protocol(VALUES, "plan.json").runs_path
    with pytest.raises(UserError, match="arm x: sync_strategy='palmm' is unknown"):
        check_strategies(protocol(arms=ARMS | {"x": {"sync_strategy": "palmm"}}))
    check_strategies(protocol())


# runs

def test_merging_is_idempotent_and_refuses_contradictions(tmp_path):
    plan, ours, theirs = protocol(), str(tmp_path / "runs.jsonl"), str(tmp_path / "other.jsonl")
    append_runs(ours, [run_of(plan, "dense_12", 1), run_of(plan, "drop_4_r2", 1)])
    append_runs(theirs, [run_of(plan, "drop_4_r2", 1), run_of(plan, "dense_12", 2, 2.1),
                         run_of(plan, "drop_1_r4", 1, None)])
    with open(theirs, "a") as f:
        f.write('{"protocol": "' + plan.digest)  # of a killed process
    before = open(ours).read()
    assert merge(ours, [theirs], plan) == (2, 1, 0)
    assert open(ours).read().startswith(before) and len(read_runs(ours, plan)) == 4
    after = open(ours).read()
    assert merge(ours, [theirs, ours], plan) == (0, 7, 0) and open(ours).read() == after
    for wrong, words in ((run_of(plan, "dense_12", 1, 2.2), "is there already with val_loss=2.0 and not 2.2"),
                         (run_of(plan, "dense_12", 3, data="f" * 16), "is of the data"),
                         (run_of(protocol(tokens=2560), "dense_12", 3), "a changed protocol is a new file"),
                         (run_of(plan, "dense_12", 9), "no arm 'dense_12' with seed 9"),
                         (run_of(plan, "dense_9", 1), "no arm 'dense_9'"),
                         (run_of(plan, "dense_12", 3, curve=[[9, 2.0, 2.0]]), "its curve ends with"),
                         (run_of(plan, "dense_12", 3, curve=[]), "its curve ends with"),
                         (run_of(plan, "dense_12", 3, curve=[3]), "needs .step, val_loss"),
                         (run_of(plan, "dense_12", 3, status="failed"), "only a finished run has a loss"),
                         (run_of(plan, "dense_12", 3, val_loss=-1.0), "must be above 0"),
                         (run_of(plan, "dense_12", 3, parallel=0), "parallel=0"),
                         (run_of(plan, "dense_12", 3, seconds={}), "seconds of .* has no 'wall'"),
                         (run_of(plan, "dense_12", 3, more=1), "unknown key 'more'"),
                         (run_of(plan, "dense_12", 3, card=None), "card=null must be a string")):
        other = tmp_path / "wrong.jsonl"
        other.write_text(json.dumps(run_of(plan, "dense_12", 4)) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(UserError, match=words) as found:
            merge(ours, [str(other)], plan)
        assert "\n" not in str(found.value) and open(ours).read() == after, "written in part"
    with pytest.raises(UserError, match="no such file"):
        merge(ours, [str(tmp_path / "none.jsonl")], plan)


def test_runs_of_another_protocol_count_with_the_same_settings(tmp_path, monkeypatch, capsys):
    """A protocol that has more arms, one of them under another name, takes the runs of the one before."""
    before, ours, theirs = protocol(), str(tmp_path / "runs.jsonl"), str(tmp_path / "runs_before.jsonl")
    arms = dict(reversed(ARMS.items())) | {"more": {"n_layer": 7}}
    arms["all_syncs"] = arms.pop("dense_12")
    plan = protocol(name="more", arms=arms, baseline="all_syncs", seeds=[1, 2, 3])
    append_runs(theirs, [run_of(before, "dense_12", 1, 2.5), run_of(before, "dense_12", 4),
                         run_of(before, "drop_4_r2", 2, None)])
    assert merge(ours, [theirs], plan, before) == (2, 0, 1)
    assert merge(ours, [theirs], plan, before) == (0, 2, 1), "not idempotent"
    runs = read_runs(ours, plan)
    assert runs["all_syncs", 1]["val_loss"] == 2.5 and runs["drop_4_r2", 2]["status"] == "non_finite"
    assert {run["ran_as"] for run in runs.values()} == {before.digest}
    assert merge(str(tmp_path / "same.jsonl"), [theirs], before, before) == (3, 0, 0)
    assert not any("ran_as" in run for run in read_runs(str(tmp_path / "same.jsonl"), before).values())
    third = protocol(name="third", arms=arms | {"last": {"n_layer": 6}}, baseline="all_syncs")
    path = str(tmp_path / "third.jsonl")
    assert merge(path, [ours], third, plan) == (2, 0, 0)
    assert {run["ran_as"] for run in read_runs(path, third).values()} == {before.digest}
    for other in (protocol(tokens=2560), protocol(settings=SETTINGS | {"learning_rate": 0.5})):
        assert merge(str(tmp_path / "none.jsonl"), [theirs], other, before) == (0, 0, 3)
    with pytest.raises(UserError, match="is there already with val_loss=2"):
        append_runs(contradicts := str(tmp_path / "wrong.jsonl"), [run_of(before, "dense_12", 1)])
        merge(ours, [contradicts], plan, before)
    with pytest.raises(UserError, match="a changed protocol is a new file"):
        merge(ours, [theirs], plan, plan)
    frozen = protocol(data_sha256={"train.bin": "0" * 64})
    with pytest.raises(UserError, match="is of the data 0123456789abcdef, and protocol"):
        merge(str(tmp_path / "frozen.jsonl"), [theirs], frozen, before)
    assert not (tmp_path / "frozen.jsonl").exists()
    data = digest_of(frozen.values["data_sha256"])
    append_runs(right := str(tmp_path / "right.jsonl"), [run_of(before, "dense_12", 1, data=data)])
    assert merge(str(tmp_path / "frozen.jsonl"), [right], frozen, before) == (1, 0, 0)

    for name, one in (("protocol.json", plan), ("protocol_before.json", before)):
        (tmp_path / name).write_text(json.dumps(one.values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["frontier.py", "merge", theirs, "--protocol=protocol.json",
                                     "--of=protocol_before.json"])
    frontier.main()
    said = capsys.readouterr().out
    assert "0 runs added, 2 were there already" in said and "; 1 are not of this protocol" in said


def test_nothing_starts_that_does_not_fit(monkeypatch):
    plan, now = protocol(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(frontier_next, "gpu_info", lambda: {"gpus": []})
    runs = {("dense_12", 1): run_of(plan, "dense_12", 1),
            ("dense_10", 1): run_of(plan, "dense_10", 1, card="NVIDIA H200")}

    def session(seconds, runs=runs):
        return frontier_next.Session(plan, runs, "runs.jsonl", "folder", "0" * 16, seconds)

    def may_start(one, arm, parallel=1):
        job = Job(SimpleNamespace(config=plan.configs[arm]), 2)
        return one.may_start(job, parallel) and job.limit

    one = session(100)
    assert one.missing[0] == ("dense_8", 1) and len(one.missing) == 30
    assert one.expected("dense_12", 1) == 50.0 and one.expected("drop_4_r2", 1) == 50.0
    assert one.expected("dense_12", 2) == 60 and session(100, {}).expected("dense_8", 1) == 60
    assert may_start(one, "dense_12") == pytest.approx(95)  # its limit: what is left
    now[0] = 41.0
    assert not may_start(one, "dense_12") and "needs 55 s, and 54 s are left" in one.first_unfit
    now[0] = 0.0
    assert not may_start(one, "dense_12"), "a run was started after one that did not fit"


def test_broken_arms_do_not_end_those_that_work(monkeypatch):
    """Two runs that fail before their first step end the call only if no run can show that others work."""
    monkeypatch.setattr(frontier_next, "gpu_info", lambda: {"gpus": []})
    plan, failed = protocol(), [("dense_12 with seed 1", 0), ("dense_10 with seed 1", 0)]

    def hopeless(failed, seen=(), **runs):
        one = frontier_next.Session(plan, runs, "runs.jsonl", "folder", "0" * 16, 1000)
        one.failed, one.seen = failed, list(seen)
        started = one.may_start(Job(SimpleNamespace(config=plan.configs["dense_8"]), 2), 1)
        assert started != one.hopeless
        return one.hopeless

    assert hopeless(failed) and hopeless(failed, [running(None, ended=True)])
    assert not hopeless(failed[:1]) and not hopeless([failed[0], ("dense_8 with seed 1", 3)])
    assert not hopeless(failed, [running(1)]), "a run trains"
    assert not hopeless(failed, [running(None)]) and hopeless([*failed, *failed], [running(None)])
    assert not hopeless(failed, run=run_of(plan, "dense_12", 1)), "an earlier call trained here"
    assert hopeless(failed, run=run_of(plan, "dense_12", 1, card="NVIDIA H200"))


def running(steps: int, gpus: str | None = "0", ended: bool = False):
    """A run after so many of 10 steps; None: before its first."""
    job = SimpleNamespace(steps=10, run_id=1)
    progress = SimpleNamespace(step=steps or 0, first=None if steps is None else (100.0, 1))
    return SimpleNamespace(job=job, gpus=gpus, started=70.0, progress=progress,
                           supervisor=SimpleNamespace(poll=lambda: 0 if ended else None))


def test_runs_that_share_a_gpu_start_one_after_the_other():
    """Else all compile at the same time, while the GPU waits."""
    two = [running(None), running(3)]
    assert ready_places(["0", "0"], two, 1) == [] and ready_places(["0", "1"], two, 1) == ["1"]
    assert ready_places(["0", "0"], two, 2) == ["0", "0"] and ready_places(["0"], two, None) == ["0"]
    assert [frontier_next.most_starting(["0"], n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert frontier_next.most_starting([None, None], 2) == 2, "no GPU waits for runs on a CPU"


def test_a_run_fits_by_the_work_that_is_left(monkeypatch):
    """Four runs share a GPU and take 200 s each. The last of them ends long before 200 s after its start, as
    the others end."""
    plan = protocol()
    monkeypatch.setattr(time, "monotonic", lambda: 250.0)
    monkeypatch.setattr(frontier_next, "gpu_info", lambda: {"gpus": []})
    one = frontier_next.Session(plan, {}, "runs.jsonl", "folder", "0" * 16, 1000, estimate=200)
    for run in (running(10, ended=True), running(10, ended=True), running(10),
                running(None)):
        one.watch(run)
    # three runs' work in 150 s, 50 s a run; left are the one that starts and the new one
    assert one.until_all_end() == pytest.approx(50 * 2)
    one.until = 250 + 150
    assert one.may_start(Job(SimpleNamespace(config=plan.configs["dense_12"]), 1), 4)
    one.watch(running(5))
    assert one.until_all_end() == pytest.approx(150 / 3.5 * 2.5)
    one.watch(running(5, gpus="1"))
    assert one.until_all_end() == pytest.approx(2 * 150 / 4 * 2.5), "each of two GPUs does its own half"
    one.watch(running(5, ended=True))
    assert one.until_all_end() == pytest.approx(2 * 150 / 4.5 * 2.5), "an ended run has nothing left"
    one.seen = [running(10)]
    assert one.until_all_end() == pytest.approx(30 + 150), "alone, after a start of 30"
    one.seen = [running(9)]
    assert one.until_all_end() == math.inf, "less than a run's worth of work says nothing"


def test_the_first_runs_of_a_protocol(monkeypatch):
    monkeypatch.setattr(frontier_next, "gpu_info", lambda: {"gpus": []})
    one = frontier_next.Session(protocol(), {}, "runs.jsonl", "folder", "0" * 16, 100, first=10)
    assert one.missing == protocol().runs[:10]


def test_each_file_of_runs_has_its_own_picture():
    """A pilot's picture must not replace that of the protocol."""
    assert frontier.stem_beside("a/runs.jsonl") == frontier.stem_beside("a/other.jsonl") == "a/frontier"
    assert frontier.stem_beside("runs_regime.jsonl") == "frontier_regime"


def test_labels_of_arms():
    for arm, dense, label in (("drop_6_r2", False, "6"), ("drop_4_ends_r2", False, "4 ends"),
                              ("caat_0.5_r4", False, "caat 0.5"), ("dense_8", True, "8 layers"),
                              ("dense_8_low", True, "8 layers low"), ("ladder", False, "ladder")):
        assert frontier_picture.name_of({"arm": arm, "dense": dense, "layers": 8}) == label


def test_places_of_runs(monkeypatch):
    monkeypatch.setattr(frontier_next, "visible_gpus", lambda: ["0", "1"])
    assert frontier_next.places_for(None, False) == (["0", "1"], 1)
    assert frontier_next.places_for(4, False) == (["0", "1", "0", "1"], 2)
    assert frontier_next.places_for(2, True) == ([None, None], 2)
    monkeypatch.setattr(frontier_next, "visible_gpus", lambda: ["0"])
    assert frontier_next.places_for(2, False) == (["0", "0"], 2)


# table and picture

def test_table_and_picture(tmp_path):
    plan = protocol()
    runs = synthetic(plan, {"drop_1_r4": 2, "drop_4_r2": 1, "dense_10": 3})
    runs["drop_1_r4", 3] = run_of(plan, "drop_1_r4", 3, None)
    paths = [latency_table(tmp_path / "oneshot.json", "oneshot", 2.6),
             latency_table(tmp_path / "nccl.json", "nccl", 11.6)]
    tables = frontier_draw.read_tables(paths, plan, None)
    assert tables.width == 768 and len(tables.us) == 4
    said = frontier_draw.write_frontier(plan, runs, tables, str(tmp_path / "frontier"))
    assert "27 of 32 runs" in said and (tmp_path / "frontier.png").stat().st_size > 2e4
    rows = {row["arm"]: row for row in json.loads((tmp_path / "frontier.json").read_text())["arms"]}
    assert rows["dense_12"]["ratio"] == 0 and rows["dense_12"]["interval"] is None
    low, high = rows["drop_12_r2"]["interval"]
    assert low < rows["drop_12_r2"]["ratio"] < high
    only = frontier_draw.read_tables(paths, plan, None, ["nccl"])
    assert set(only.us) == {("nccl", 2), ("nccl", 4)}
    with pytest.raises(UserError, match="no times of fused: give other --exchanges"):
        frontier_draw.read_tables(paths, plan, None, ["fused"])
    one, four = (rows[arm]["interval"] for arm in ("drop_4_r2", "drop_4_r4"))
    assert one[1] - one[0] > four[1] - four[0], "one run is not as certain as four"
    assert {arm for arm, row in rows.items() if row["preliminary"]} == {"drop_1_r4", "drop_4_r2"}
    assert rows["dense_8"]["dense"] and not rows["drop_12_r2"]["dense"]
    times = {arm: [(t["exchange"], t["processes"], t["estimated"]) for t in row["times"]]
             for arm, row in rows.items()}
    assert times["drop_12_r2"] == [("nccl", 2, False), ("oneshot", 2, False)]
    assert len(times["dense_12"]) == 4 and all(estimated for *_, estimated in times["dense_8"])
    assert times["drop_4_r4"][0][2], "4 syncs are between measured counts"
    text = (tmp_path / "frontier.md").read_text()
    assert "higher, preliminary, 1 diverged" in text and "(draft)" in text
    assert 0.002 < json.loads((tmp_path / "frontier.json").read_text())["spreads"][REST]["spread"] < 0.006
    assert "not the quotient" in text and "No chain" not in text

    frontier_draw.write_frontier(plan, runs, frontier_draw.read_tables([], plan, None), str(tmp_path / "b"))
    assert (tmp_path / "b.png").stat().st_size > 1e4, "without a table, over the syncs"
    with pytest.raises(UserError, match="--width=5: the latency tables have 768, 2048"):
        frontier_draw.read_tables(paths, plan, 5)
    (tmp_path / "x.json").write_text('{"rows": [{"us": 3}]}')
    with pytest.raises(UserError, match="no times of exchanges"):
        frontier_draw.read_tables([str(tmp_path / "x.json")], plan, None)


def test_panels_without_a_table_are_hidden(tmp_path, monkeypatch):
    """A row or column that begins or ends with one has its labels beside the panels that are shown."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", (figures := []).append)
    rows = rows_of(plan := protocol(), synthetic(plan, {}))
    paths = [latency_table(tmp_path / "oneshot.json", "oneshot", 2.6),
             latency_table(tmp_path / "nccl.json", "nccl", 11.6)]
    frontier_draw.add_times(rows, frontier_draw.read_tables(paths, plan, None))
    frontier_picture.draw(rows, [("oneshot", 2), ("nccl", 4)], "a GPU", str(tmp_path / "frontier.png"))
    axes = figures[0].axes
    assert [ax.get_visible() for ax in axes] == [True, False, False, True]
    for ax in (axes[0], axes[3]):
        assert ax.get_ylabel() and ax.get_xlabel()
        assert ax.yaxis.get_tick_params()["labelleft"] and ax.xaxis.get_tick_params()["labelbottom"]


@pytest.mark.parametrize("runs_missing", [0, 5])
def test_intervals_cover_the_true_ratio(runs_missing):
    """1,000 simulated frontiers: the 95% interval of an arm holds its true log ratio in 93 to 97%, however
    much the seeds differ, and whichever runs are missing."""
    plan = protocol(arms={arm: ARMS[arm] for arm in ("dense_12", "dense_8", "drop_4_r2")})
    covered = known = 0
    for i in range(1000):
        draw = random.Random(i)
        of_seed = {seed: draw.gauss(0, 0.05) for seed in plan.seeds}
        missing = draw.sample(plan.runs, runs_missing)
        runs = {(arm, seed): run_of(plan, arm, seed, math.exp(
            0.01 * (arm == "drop_4_r2") + of_seed[seed] + draw.gauss(0, 0.01)))
            for arm, seed in plan.runs if (arm, seed) not in missing}
        row = next((row for row in rows_of(plan, runs) if row["arm"] == "drop_4_r2"), None)
        if row and row["interval"]:
            known += 1
            covered += row["interval"][0] < 0.01 < row["interval"][1]
    assert known >= (950 if runs_missing else 1000) and 0.93 <= covered / known <= 0.97


def test_the_effect_of_a_seed_is_no_difference_of_arms(tmp_path):
    """A second run of the baseline alone, on a seed 5% easier, changes no ratio. Arms that no common seed
    connects do not compare."""
    plan = protocol()
    runs = {(arm, 1): run_of(plan, arm, 1, loss) for arm, loss in (("dense_12", 2.0), ("drop_4_r2", 2.1))}
    runs["dense_12", 2] = run_of(plan, "dense_12", 2, 1.9)
    assert rows_of(plan, runs)[1]["ratio"] == pytest.approx(math.log(2.1 / 2.0))
    fit = Fit(runs)
    assert fit.spreads == {REST: None} and fit.compared == {"dense_12": 1, "drop_4_r2": 1}

    def texts() -> tuple[str, dict]:
        frontier_draw.write_frontier(plan, runs, frontier_draw.Tables(), str(tmp_path / "f"))
        return (tmp_path / "f.md").read_text(), json.loads((tmp_path / "f.json").read_text())

    text, found = texts()
    assert "No intervals: they need two arms with two common seeds." in text and found["spreads"] == {}
    assert f"{found['spread_between_seeds']:.2%} between the seeds of an arm (1 deg" in text
    runs["drop_12_r2", 3] = run_of(plan, "drop_12_r2", 3, 2.0)
    apart = {row["arm"]: row for row in rows_of(plan, runs)}["drop_12_r2"]
    assert apart["ratio"] is None and frontier_draw.verdict(apart) == "unknown, preliminary"
    assert "No chain of common seeds connects these with dense_12: drop_12_r2." in texts()[0]
    runs["dense_8", 1] = run_of(plan, "dense_8", 1, 2.2)
    runs["dense_8", 3] = run_of(plan, "dense_8", 3, 2.3)
    joined = {row["arm"]: row for row in rows_of(plan, runs)}["drop_12_r2"]
    assert joined["ratio"] == pytest.approx(math.log(2.0 / 2.3) + math.log(2.2 / 2.0)), "by dense_8"
    runs["drop_12_r2", 1] = run_of(plan, "drop_12_r2", 1, 1.93)
    text, found = texts()
    spread = found["spreads"][REST]["spread"]
    assert spread != found["spread_between_seeds"] and "No chain" not in text
    assert f"After the effect of the seed is removed: {spread:.2%} (1)." in text


def test_the_error_of_a_ratio_is_that_of_the_seeds_in_common():
    """The third run of the baseline is the only one of its seed, so it makes no ratio more certain."""
    plan, losses = protocol(), iter((2.0, 2.02, 2.01, 2.1, 2.2, 2.31, 2.3))
    runs = {(arm, seed): run_of(plan, arm, seed, next(losses))
            for arm, n in (("dense_12", 3), ("drop_4_r2", 2), ("dense_8", 2)) for seed in plan.seeds[:n]}
    fit = Fit(runs)
    ratio = fit.contrast({"drop_4_r2": 1.0, "dense_12": -1.0})
    spread, freedom = fit.spreads[REST]
    assert freedom == pytest.approx(2) and ratio.df == pytest.approx(2)
    assert ratio.error / spread == pytest.approx(math.sqrt(1 / 2 + 1 / 2))
    assert ratio.runs == 2 and fit.contrast({"drop_4_r2": 1.0, "dense_12": -1.0, "dense_8": 0.0}).runs == 2
    lone = Fit(runs | {("drop_12_r2", 4): run_of(plan, "drop_12_r2", 4)})
    assert lone.compared["drop_12_r2"] == 0 and lone.spreads[REST] == pytest.approx(fit.spreads[REST])


def test_groups_of_arms_have_spreads_of_their_own(tmp_path):
    """1,000 frontiers of which two arms vary four times as much: both kinds of intervals cover 93 to 97%. A
    group without a second seed has no interval."""
    wild = ["drop_4_r4", "drop_1_r4"]
    arms = {arm: ARMS[arm] for arm in ("dense_12", "dense_8", "drop_4_r2", "drop_12_r2", *wild)}
    plan = protocol(arms=arms, spread_groups={"wild": wild})
    assert plan.digest == protocol(arms=arms).digest, "spread_groups may change"
    inside, widths = {"drop_4_r2": 0, "drop_1_r4": 0}, {"drop_4_r2": 0.0, "drop_1_r4": 0.0}
    spreads = dict.fromkeys(arms, 0.01) | dict.fromkeys(wild, 0.04)
    for i in range(1000):
        draw = random.Random(i)
        runs = {(arm, seed): run_of(plan, arm, seed, math.exp(draw.gauss(0, spreads[arm])))
                for arm, seed in plan.runs}
        fit = Fit(runs, plan.values["spread_groups"])
        for arm in inside:
            low, high = fit.contrast({arm: 1.0, "dense_12": -1.0}).interval()
            inside[arm] += low < 0 < high
            widths[arm] += high - low
    assert all(930 <= n <= 970 for n in inside.values()), inside
    assert widths["drop_1_r4"] > 2.5 * widths["drop_4_r2"]
    fewer = Fit({key: run for key, run in runs.items() if key != ("drop_4_r2", plan.seeds[-1])},
                plan.values["spread_groups"])
    freedom = fewer.contrast({"drop_4_r2": 1.0, "dense_12": -1.0}).df
    assert freedom > 0.9 * fewer.spreads[REST][1] > fewer.spreads["wild"][1], "little of the wild arms"
    frontier_draw.write_frontier(plan, runs, frontier_draw.Tables(), str(tmp_path / "f"))
    text = (tmp_path / "f.md").read_text()
    assert "over the arms of each group" in text and ", wild " in text and "removed: the rest " in text
    runs = {key: run for key, run in runs.items() if key[0] not in wild or key[1] == 1}
    rows = {row["arm"]: row for row in frontier_draw.rows_of(plan, runs, Fit(
        runs, plan.values["spread_groups"]))}
    assert rows["drop_1_r4"]["interval"] is None and rows["drop_4_r2"]["interval"] is not None
    frontier_draw.write_frontier(plan, runs, frontier_draw.Tables(), str(tmp_path / "f"))
    assert ", wild unknown." in (tmp_path / "f.md").read_text()


@pytest.mark.parametrize("arms, seeds", [(22, 18), (36, 16), (55, 16)])
def test_ratios_of_many_runs_are_differences_of_means(arms, seeds):
    """Arms and seeds add up to the same, so one singular value is 0 but for rounding."""
    draw, runs = random.Random(3), {}
    for arm in range(arms):
        for seed in range(seeds):
            runs[f"a{arm}", seed] = {"status": "finished", "val_loss": math.exp(draw.gauss(1, 0.1))}
    fit = Fit(runs)
    means = {arm: sum(sample) / seeds for arm, sample in fit.logs.items()}
    assert fit.spreads[REST][1] == pytest.approx((arms - 1) * (seeds - 1))
    for arm in list(fit.logs)[1:]:
        assert fit.contrast({arm: 1.0, "a0": -1.0}).mean == pytest.approx(means[arm] - means["a0"])


def test_a_baseline_that_diverged_has_no_ratio(tmp_path):
    plan = protocol()
    runs = {("dense_12", 1): run_of(plan, "dense_12", 1, None),
            ("drop_4_r2", 1): run_of(plan, "drop_4_r2", 1)}
    rows = rows_of(plan, runs)
    assert [row["ratio"] for row in rows] == [None, None]
    assert [frontier_draw.verdict(row) for row in rows] == ["baseline, preliminary, 1 diverged",
                                                           "unknown, preliminary"]
    frontier_draw.write_frontier(plan, runs, frontier_draw.Tables(), str(tmp_path / "f"))
    assert "Standard deviation" not in (tmp_path / "f.md").read_text()


def test_few_runs_have_no_interval():
    plan = protocol()
    rows = rows_of(plan, {("dense_12", 1): run_of(plan, "dense_12", 1),
                          ("drop_4_r2", 1): run_of(plan, "drop_4_r2", 1, 2.1)})
    assert [frontier_draw.verdict(row) for row in rows] == ["baseline, preliminary", "unknown, preliminary"]
    frontier_draw.add_times(rows, frontier_draw.Tables())
    assert len(frontier_draw.rows_table(rows, frontier_draw.Tables()).splitlines()) == 4
    rows = rows_of(plan, {("drop_4_r2", 1): run_of(plan, "drop_4_r2", 1, None, syncs=None)})
    frontier_draw.add_times(rows, frontier_draw.Tables({("nccl", 2): {"24 syncs": 600.0, "1 syncs": 400.0}}))
    assert rows[0]["times"] == []  # a script that does not count its syncs
    assert rows[0]["ratio"] is None and frontier_draw.verdict(rows[0]) == "unknown, preliminary, 1 diverged"


def test_an_arm_that_hides_its_sums_has_no_time_of_a_dropped_one():
    """bench.py's rows have the names of ladder and palm. Neither has the time of as many syncs."""
    arms = {"dense_12": {}, "ladder": {"sync_strategy": "ladder"}, "palm": {"sync_strategy": "palm"}}
    measured = {"24 syncs": 600.0, "12 syncs": 500.0, "6 syncs": 450.0}
    for more, named, ladder, palm in (({}, {}, [], []), ({"ladder": 400.0}, {}, [400.0], []),
                                      ({"palm": 480.0}, {"ladder": "palm"}, [480.0], [480.0])):
        plan = protocol(arms=arms, latency_rows=named)
        syncs = {"dense_12": 24, "ladder": 23, "palm": 12}
        rows = rows_of(plan, {(arm, 1): run_of(plan, arm, 1, syncs=n) for arm, n in syncs.items()})
        for n in (2, 4):  # the loss of all three does not depend on the ranks
            frontier_draw.add_times(rows, frontier_draw.Tables({("nccl", n): measured | more}, 768))
            assert [row["dense"] for row in rows] == [True, False, False]
            assert [[t["us"] for t in row["times"]] for row in rows] == [[600.0], ladder, palm]


def test_a_dense_model_of_fewer_layers_has_its_own_measured_time(tmp_path):
    """A table of bench.py --n_layer=8 has the row "16 syncs", which is no schedule of 12 layers."""
    path = tmp_path / "shallow.json"
    row = {"n_embd": 32, "batch_size": 1, "processes": 2, "allreduce": "nccl"}
    path.write_text(json.dumps({"config": {"n_layer": 8}, "rows": [
        row | {"name": "16 syncs", "us": 410.0}, row | {"name": "8 syncs", "us": 350.0}]}))
    assert frontier_draw.read_tables([str(path)], protocol(), None).us == {("nccl", 2): {"8 layers": 410.0}}


def test_a_shallow_model_is_estimated_from_other_numbers_of_processes():
    """From their share of the dense model's time if they have it, else from the layers."""
    plan = protocol()
    rows = rows_of(plan, {(arm, 1): run_of(plan, arm, 1) for arm in ("dense_12", "dense_8")})
    tables = frontier_draw.Tables({("nccl", 16): {"24 syncs": 600.0, "8 layers": 1.0},
                                   ("nccl", 2): {"24 syncs": 600.0, "8 layers": 450.0},
                                   ("nccl", 4): {"24 syncs": 800.0}, ("oneshot", 4): {"24 syncs": 300.0}})
    frontier_draw.add_times(rows, tables)
    assert [(t["us"], t["estimated"]) for t in rows[1]["times"]] == [
        (450, False), (600, True), (1, False), (200, True)]


def test_a_dense_model_on_one_gpu_is_a_control(tmp_path):
    """Tables have it as TP=1. All layers on one GPU take 420 µs, so 12 syncs at 450 compare with them."""
    row, paths = {"n_embd": 32, "batch_size": 1}, []
    for layers, several, alone in ((12, {"24 syncs": 600.0, "12 syncs": 450.0}, 420.0),
                                   (8, {"16 syncs": 400.0, "² syncs": 1.0}, 300.0)):
        paths.append(str(tmp_path / f"{layers}.json"))
        (tmp_path / f"{layers}.json").write_text(json.dumps({"config": {"n_layer": layers}, "rows": [
            *(row | {"name": name, "us": us, "processes": 2, "allreduce": "nccl"}
              for name, us in several.items()),
            row | {"name": "TP=1", "us": alone, "processes": 1, "allreduce": None},
            row | {"name": "TP=1", "us": 2.0, "processes": 2, "allreduce": None},
            row | {"name": "TP=1", "us": 2.0, "processes": 1, "allreduce": None, "batch_size": 16},
            row | {"name": "TP=1", "us": 2.0, "processes": 1, "allreduce": []}]}))
    plan, losses = protocol(), {"dense_12": 2.0, "dense_8": 2.2, "drop_12_r2": 2.05}
    tables = frontier_draw.read_tables(paths, plan, None)
    assert tables.one_gpu == {"24 syncs": 420.0, "8 layers": 300.0} and set(tables.us) == {("nccl", 2)}
    runs = {(arm, seed): run_of(plan, arm, seed, loss) for arm, loss in losses.items() for seed in plan.seeds}
    rows = rows_of(plan, runs)
    frontier_draw.add_times(rows, tables)
    for one_gpu, log_dense in ((False, (math.log(2.2) * 3 + math.log(2.0)) / 4), (True, math.log(2.0))):
        found = frontier_draw.against_shallow(plan, rows, Fit(runs), one_gpu)
        assert [one["ratio"] for one in found] == [pytest.approx(math.log(2.05) - log_dense)]
    frontier_draw.write_frontier(plan, runs, tables, str(tmp_path / "f"))
    text = (tmp_path / "f.md").read_text()
    assert "of the same time on as many GPUs or on one" in text and "µs, one GPU" in text


def test_each_arm_is_compared_with_the_dense_model_of_its_time():
    """Between 8 layers at 400 µs and 12 at 600 the dense log loss at 500 is the mean of both."""
    plan, losses = protocol(), {"dense_12": 2.0, "dense_8": 2.2, "drop_12_r2": 2.05, "drop_4_r2": 2.05}
    errors = {"dense_12": 0.001, "dense_8": -0.001, "drop_12_r2": 0.001, "drop_4_r2": -0.001}
    runs = {(arm, seed): run_of(plan, arm, seed, loss * math.exp(
        0.02 * seed + errors[arm] * (-1)**seed)) for arm, loss in losses.items() for seed in plan.seeds}
    fit, rows = Fit(runs), rows_of(plan, runs)
    assert fit.spreads == {REST: (pytest.approx(0.001 * math.sqrt(16 / 9)), pytest.approx(9))}
    for more, syncs in (({"12 syncs": 500.0, "4 syncs": 399.0}, ["drop_12_r2"]),
                        ({"12 syncs": 700.0, "4 syncs": 410.0}, ["drop_12_r2", "drop_4_r2"])):
        frontier_draw.add_times(rows, frontier_draw.Tables({
            ("nccl", 2): {"24 syncs": 600.0, "8 layers": 400.0} | more}))
        found = frontier_draw.against_shallow(plan, rows, fit)
        assert [one["arm"] for one in found] == syncs, "faster than all dense models"
        log_dense = (math.log(2.0) + math.log(2.2)) / 2 if more["12 syncs"] == 500 else math.log(2.0)
        assert found[0]["ratio"] == pytest.approx(math.log(2.05) - log_dense)
        low, high = found[0]["interval"]
        parts = 1 / 4 + (2 * 0.25 / 4 if more["12 syncs"] == 500 else 1 / 4)
        assert (high - low) / 2 == pytest.approx(2.2622 * fit.spreads[REST][0] * math.sqrt(parts), rel=1e-3)
    assert "better" in frontier_draw.shallow_table([found[0] | {"interval": [-0.02, -0.01]}])
    same = {key: run | {"val_loss": losses[key[0]]} for key, run in runs.items()}
    assert frontier_draw.against_shallow(plan, rows, Fit(same))[0]["interval"] is None


def test_dense_models_of_other_settings_are_no_control():
    """The arms of a pilot have several learning rates."""
    at_rate = {"low": {"learning_rate": 1e-4}, "high": {"learning_rate": 1e-3}}
    arms = {f"{arm}_{rate}": ARMS[arm] | changed for rate, changed in at_rate.items()
            for arm in ("dense_12", "dense_8", "drop_12_r2")}
    plan, losses = protocol(arms=arms, baseline="dense_12_low"), {"low": 3.0, "high": 2.0}
    runs = {(arm, seed): run_of(plan, arm, seed, losses[arm.split("_")[-1]],
                                syncs=SYNCS[arm.rpartition("_")[0]]) for arm, seed in plan.runs}
    rows = rows_of(plan, runs)
    frontier_draw.add_times(rows, frontier_draw.Tables({
        ("nccl", 2): {"24 syncs": 600.0, "8 layers": 400.0, "12 syncs": 700.0}}))
    found = frontier_draw.against_shallow(plan, rows, Fit(runs))
    assert [one["ratio"] for one in found] == [pytest.approx(0, abs=1e-12)] * 2
    text = frontier_draw.shallow_table(found)
    assert "+0.00%" in text and "-0.00" not in text


# the command

@pytest.mark.parametrize(("args", "words"), [
    (["next"], "give --minutes=28"), (["next", "--minutes=0"], "--minutes=0.0 must be above 0"),
    (["next", "--minutes=1", "--parallel=0"], "--parallel=0"), (["next", "--minutes=nan"], "--minutes=nan"),
    (["next", "x.jsonl", "--minutes=1"], "next takes none"), (["merge"], "name them"),
    (["merge", "x.jsonl", "--minutes=1"], "--minutes is for next"), (["draw", "--cache=x"], "is for next"),
    (["next", "--minutes=1", "--latency=x"], "--latency is for draw"), (["draw", "--width=0"], "--width=0"),
    (["draw", "--protocol=none.json"], "cannot read none.json"),
    (["next", "--minutes=1", "--first=0"], "--first=0"), (["draw", "--first=3"], "--first is for next"),
    (["next", "--minutes=1", "--accept"], "--accept is for freeze"),
    (["freeze"], "give --template=FILE --pilot=FILE"), (["freeze", "--template=x"], "give --template"),
    (["freeze", "--template=none.json", "--pilot=none.json", "--protocol=new.json"], "cannot read none.json"),
    (["freeze", "--template=none.json", "--pilot=none.json"], "has runs, so it does not change"),
    (["merge", "x.jsonl", "--of=none.json"], "cannot read none.json"),
    (["draw", "--of=x"], "--of is for merge"), (["merge", "x.jsonl", "--of="], "cannot read"),
    (["draw", "--exchanges=nvlink", "--latency=x"], "--exchanges='nvlink': use some of oneshot"),
    (["draw", "--exchanges=nccl"], "give --latency=FILE"),
    (["draw", "--runs=none.jsonl", "--protocol=records/sync-frontier/protocol_regime.json"], "no runs yet")])
def test_errors_of_the_command_are_one_line(args, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["frontier.py", *args])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(UserError, match=words) as found:
        frontier.main()
    assert "\n" not in str(found.value)
