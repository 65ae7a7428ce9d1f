"""Freezing the protocol of a frontier: what made-up runs of a pilot choose, errors of templates and pilots.
CPU; seconds.

    python -m pytest tests/unit/test_frontier_freeze.py
"""

import json
import math
import shutil

import pytest
from helpers import ROOT
from test_sync_frontier import SETTINGS, run_of

from experiments import frontier, frontier_freeze
from experiments.frontier_background import FIRST
from experiments.frontier_background import PILOT as PILOT_FILE
from experiments.frontier_protocol import Protocol, check_strategies, data_digests, digest_of
from experiments.frontier_runs import append_runs
from nanosync.errors import UserError

RATES = {"mid": {"learning_rate": 0.001, "warmup_iters": 4},
         "low": {"learning_rate": 0.0005, "warmup_iters": 2},
         "high": {"learning_rate": 0.002, "warmup_iters": 8}}
KINDS = {"dense_12": {"sync_strategy": "standard"}, "dense_8": {"sync_strategy": "standard", "n_layer": 8},
         "drop_1": {"sync_strategy": "custom", "sync_points": [23]}}
PILOT = {"name": "pilot", "dataset": "letters", "data_sha256": None, "tokens": 1280, "seeds": [1, 2, 3],
         "settings": SETTINGS, "baseline": "dense_12_mid", "seconds_per_run": 60,
         "arms": {f"{kind}_{rate}": settings | own for rate, own in RATES.items()
                  for kind, settings in KINDS.items()}}
TEMPLATE = {"name": "toy", "description": "A toy.", "seeds": [11, 12],
            "settings": {"n_layer": 12, "eval_iters": 3}, "baseline": "dense_12",
            "arms": KINDS | {"ladder": {"sync_strategy": "ladder"}},
            "shallow": "dense_8", "depth": 3, "spread": 0.0025}
LOSSES = {"low": 2.1, "mid": 2.0, "high": 2.05}  # of the dense model of 12 layers
EFFECTS = {"dense_12": 0.0, "dense_8": 0.02, "drop_1": 0.05}


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_data):
    monkeypatch.chdir(tmp_path)
    return tmp_path, str(shutil.copytree(tiny_data, tmp_path / "letters"))


def write_pilot(folder, losses=LOSSES, effects=EFFECTS, noise=0.001, seeds=(1, 2), leave_out=(), name="pilot",
                **changed) -> None:
    """Write protocol_NAME.json and made-up runs of it. losses: by rate, None for runs that diverge."""
    path, data = folder
    (path / f"protocol_{name}.json").write_text(json.dumps(PILOT | {"dataset": data} | changed))
    plan = Protocol.read(f"protocol_{name}.json")
    digest = digest_of(data_digests(plan))
    runs = []
    for arm, seed in plan.runs:
        kind, rate = arm.rsplit("_", 1)
        if seed in seeds and arm not in leave_out:
            loss = losses[rate] and losses[rate] * math.exp(effects[kind] + noise * (-1)**seed)
            runs.append(run_of(plan, arm, seed, loss, data=digest))
            runs[-1]["curve"] = [[plan.steps(arm), loss, loss]]
    append_runs(f"runs_{name}.jsonl", runs)


def write_template(**changed) -> None:
    left_out = [key for key, value in changed.items() if value is None]
    with open("template.json", "w") as f:
        json.dump({key: value for key, value in (TEMPLATE | changed).items() if key not in left_out}, f)


def command(monkeypatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["frontier.py", "freeze", "--protocol=protocol.json",
                                     "--template=template.json", *(args or ["--pilot=protocol_pilot.json"])])
    frontier.main()


def test_a_pilot_chooses_learning_rate_and_warm_up(folder, monkeypatch, capsys):
    """The protocol has the pilot's model, tokens and data, and the settings with the lowest mean loss."""
    write_template()
    write_pilot(folder)
    command(monkeypatch)
    said = capsys.readouterr().out
    assert "dense_8 is +2.02% of dense_12, +14.1 standard deviations" in said and "chosen" in said
    plan = Protocol.read("protocol.json")
    check_strategies(plan)
    assert plan.seeds == [11, 12] and list(plan.arms) == list(TEMPLATE["arms"])
    assert plan.values["tokens"] == 1280 and set(plan.values["data_sha256"]) == {"train.bin", "val.bin"}
    ladder = plan.settings["ladder"]
    assert (ladder["learning_rate"], ladder["warmup_iters"], ladder["n_embd"]) == (0.001, 4, 32)
    assert ladder["eval_iters"] == 3 and plan.values["seconds_per_run"] == 50
    before = open("protocol.json").read()
    command(monkeypatch)
    assert open("protocol.json").read() == before, "not the same protocol twice"
    append_runs("runs.jsonl", [run_of(plan, "dense_12", 11, data=digest_of(plan.values["data_sha256"]))])
    with pytest.raises(UserError, match=r"protocol\.json has runs, so it does not change"):
        command(monkeypatch)


@pytest.mark.parametrize(("changed", "words"), [
    ({"effects": EFFECTS | {"dense_8": 0.002}}, "dense_8 is .0.20% of dense_12, .1.4 standard deviations"),
    ({"noise": 0.004}, "each of 0.57% .at most 0.25%; 3 degrees"),
    ({"seeds": (1,)}, "the spread between seeds is unknown, as no arm has two seeds")])
def test_a_pilot_that_shows_too_little_makes_no_protocol(folder, monkeypatch, capsys, changed, words):
    """Unless this is accepted. Then the description says what was found."""
    write_template()
    write_pilot(folder, **changed)
    with pytest.raises(UserError, match=words) as found:
        command(monkeypatch)
    assert "\n" not in str(found.value) and not (folder[0] / "protocol.json").exists()
    command(monkeypatch, "--pilot=protocol_pilot.json", "--accept")
    assert "accepted although" in capsys.readouterr().out
    assert "dense_8 is" in json.loads(open("protocol.json").read())["description"]


def test_of_several_pilots_the_first_that_shows_enough_decides(folder, monkeypatch):
    write_template()
    write_pilot(folder, effects=EFFECTS | {"dense_8": 0.0})
    write_pilot(folder, name="long", tokens=2560)
    command(monkeypatch, "--pilot=protocol_pilot.json", "--pilot=protocol_long.json")
    assert Protocol.read("protocol.json").values["tokens"] == 2560


def test_the_estimate_is_of_runs_with_as_many_at_a_time(folder):
    write_pilot(folder)
    runs = [json.loads(line) for line in open("runs_pilot.jsonl")]
    for i, run in enumerate(runs):
        run |= {"parallel": 6 if i % 2 else 4, "time": 100.0 - i,
                "seconds": run["seconds"] | {"wall": 50.0 + i}}
    with open("runs_pilot.jsonl", "w") as f:
        f.writelines(json.dumps(run) + "\n" for run in runs)
    assert frontier_freeze.Pilot("protocol_pilot.json").seconds() == 50 + max(range(0, len(runs), 2))


def test_a_template_for_a_further_pilot_asks_for_nothing(folder, monkeypatch):
    write_template(shallow=None, depth=None, spread=None, tokens=2560)
    write_pilot(folder, seeds=(1,))
    command(monkeypatch)
    plan = Protocol.read("protocol.json")
    assert plan.values["tokens"] == 2560 and plan.values["seconds_per_run"] == 100
    assert plan.settings["dense_8"]["learning_rate"] == 0.001


def test_a_learning_rate_at_which_an_arm_diverges_is_not_chosen(folder, monkeypatch, capsys):
    """Nor does a missing second seed of other rates change what is compared: the seeds that all have."""
    write_template()
    write_pilot(folder, losses=LOSSES | {"mid": None, "high": 2.2})
    command(monkeypatch)
    said = capsys.readouterr().out
    assert "diverged" in said and "lowest or highest of the pilot" in said
    assert Protocol.read("protocol.json").settings["dense_12"]["learning_rate"] == 0.0005


@pytest.mark.parametrize(("pilot", "template", "words"), [
    ({"leave_out": ("drop_1_high", "dense_8_low")}, {}, "no run of dense_8_low, drop_1_high with its first"),
    ({"seeds": ()}, {}, "no run of dense_12_mid"),
    ({"losses": dict.fromkeys(LOSSES)}, {}, "a run diverged in each group"),
    ({}, {"seeds": [2, 11]}, "seeds has 2, and protocol_pilot.json chose by"),
    ({}, {"settings": {"n_layer": 6}}, "template.json has n_layer=6 and protocol_pilot.json 12"),
    ({}, {"settings": {"learning_rate": 0.1}}, "has learning_rate=0.1 and protocol_pilot.json 0.001"),
    ({}, {"shallow": "dense_6"}, "shallow='dense_6' is not in arms"),
    ({}, {"depth": None}, "has 'shallow' and no 'depth'"), ({}, {"spread": 0}, "spread=0 must be above 0"),
    ({}, {"depth": True}, "depth=true must be a number"), ({}, {"arms": {}}, "is not in arms|must be 2"),
    ({}, {"shallow": "ladder"}, "no arm in .* with the settings of ladder"),
    ({}, {"dataset": "x"}, "unknown key 'dataset'"), ({}, {"seeds": ["a"]}, "seeds has 'a'"),
    ({}, {"baseline": "x"}, "baseline='x' is not in arms"), ({}, {"tokens": 77}, "no multiple of the 128"),
    ({}, {"arms": KINDS | {"x": {"sync_strategy": "dtp:99"}}}, "arm x: sync_strategy='dtp:99'"),
    ({}, {"settings": {"n_layr": 3}}, "n_layr"), ({}, {"settings": []}, "must be an object")])
def test_errors_of_templates_and_pilots_are_one_line(folder, monkeypatch, pilot, template, words):
    write_template(**template)
    write_pilot(folder, **pilot)
    with pytest.raises(UserError, match=words) as found:
        command(monkeypatch)
    assert "\n" not in str(found.value) and not (folder[0] / "protocol.json").exists()


@pytest.mark.parametrize("line", [
    "{}", "[]", "nonsense", '{"protocol": 3}', '{"val_loss": NaN}'])
def test_malformed_runs_of_a_pilot_are_an_error(folder, monkeypatch, line):
    write_template()
    write_pilot(folder)
    with open("runs_pilot.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(UserError) as found:
        command(monkeypatch)
    assert "\n" not in str(found.value) and not (folder[0] / "protocol.json").exists()


def test_a_protocol_is_frozen_where_its_data_are(folder, monkeypatch):
    """The SHA-256 of a draft's data are read here. They must be those of the pilot's runs."""
    write_template()
    write_pilot(folder)
    with open(f"{folder[1]}/val.bin", "r+b") as f:
        first = f.read(1)
        f.seek(0)
        f.write(bytes([first[0] ^ 1]))
    with pytest.raises(UserError, match="freeze where its data are"):
        command(monkeypatch)


def test_the_templates_of_the_record_are_valid(folder, monkeypatch):
    """With made-up runs of the record's own pilot."""
    record = ROOT / "records" / "sync-frontier"
    pilot = json.loads((record / "protocol_regime.json").read_text()) | {"dataset": folder[1]}
    (folder[0] / "protocol_regime.json").write_text(json.dumps(pilot))
    plan = Protocol.read("protocol_regime.json")
    data = digest_of(data_digests(plan))
    effects, losses = EFFECTS | {"drop_4": 0.01}, LOSSES | {"top": 2.2}
    runs = []
    for arm, seed in plan.runs[:FIRST[PILOT_FILE]]:
        kind, rate = arm.rsplit("_", 1)
        loss = losses[rate] * math.exp(effects[kind] + 0.001 * (-1)**seed)
        runs.append(run_of(plan, arm, seed, loss, data=data, curve=[[plan.steps(arm), loss, loss]]))
    append_runs("runs_regime.jsonl", runs)
    for name, n_arms in (("template.json", 28), ("template_long.json", 2)):
        (folder[0] / "template.json").write_text((record / name).read_text())
        command(monkeypatch, "--pilot=protocol_regime.json")
        frozen = Protocol.read("protocol.json")
        assert len(frozen.arms) == n_arms and frozen.settings["dense_12"]["warmup_iters"] == 400
    arms = json.loads((record / "template.json").read_text())["arms"]
    assert all(len(own["sync_points"]) == int(arm.split("_")[1]) for arm, own in arms.items()
               if arm.startswith("drop"))
    for points in (arms[f"drop_{n}_r2"]["sync_points"] for n in (12, 6, 4, 3, 2, 1)):
        assert len({b - a for a, b in zip([-1, *points], points)}) == 1, "not even"


def test_the_text_of_a_protocol_has_an_arm_a_line():
    text = frontier_freeze.text_of({"arms": {"a": {"sync_points": [1, 2]}, "b": {}}, "seeds": [1]})
    assert json.loads(text)["arms"] == {"a": {"sync_points": [1, 2]}, "b": {}}
    assert '  "a": {"sync_points": [1, 2]},\n' in text
