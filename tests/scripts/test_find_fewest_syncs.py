"""find_fewest_syncs.py as a command: a search that is killed in its middle and resumes, runs that are ended
early, and a model that trains. CPU.

    python -m pytest tests/scripts/test_find_fewest_syncs.py
"""

import json
import math
import re
import time
from pathlib import Path

import pytest
from helpers import PATIENCE, TINY, Forked, python, python_command, write_documents
from runner_kills import wait_for_the_end

from experiments import campaign_folder
from experiments.fewest_syncs import decide
from experiments.runner import judge_run
from experiments.search_evidence import SearchResults
from experiments.search_plan import read_search

SCRIPT = "experiments/find_fewest_syncs.py"
LOSS = '''
def true_loss(points, n_layer, seed):
    """A loss that depends on the syncs and, a little, on the seed and the schedule."""
    syncs = 2 * n_layer if points is None else len(points)
    effect = {8: 0.0, 4: 0.002, 2: 0.005, 1: 0.08, 6: 0.001, 3: 0.03}.get(syncs, 0.0)
    return 2.0 * math.exp(effect + 0.003 * random.Random(f"{points} {n_layer} {seed}").gauss(0, 1))
'''
FAKE = f'''"""Writes the log of train_reduced_sync.py, with a loss that is made up."""
import json, math, os, random, shutil, time

from configurator import configure

sync_strategy = "standard"
sync_points: list | None = None
tp_size = 2
n_layer = 4
batch_size = 8
block_size = 16
max_iters = 10
lr_decay_iters = 10
wait_after: int | None = None  # step after which runs of 3 syncs wait to be ended
save_checkpoint = False
dense = ""
seed = 1
out_dir = "out"
config = configure(globals())
{LOSS}
while seed >= 100 and os.path.exists("hold"):  # runs of the proof
    time.sleep(0.05)
os.makedirs(out_dir)
if save_checkpoint:
    shutil.copytree(dense, os.path.join(out_dir, "ckpt"))
log = open(os.path.join(out_dir, "run_1.jsonl"), "w", buffering=1)


def event(kind, **fields):
    log.write(json.dumps({{"event": kind, "time": time.time(), **fields}}) + "\\n")


event("start", config=config, environment={{}}, resumed=False)
loss = true_loss(sync_points, n_layer, seed)
for step in range(max_iters + 1):
    if step:
        event("iter", step=step - 1, loss=loss, lr=0.1, norm=None, seconds=1e-3,
              tokens_per_second=1.0, mfu=None)
        time.sleep(3600 if step - 1 == wait_after and len(sync_points or []) == 3 else 0)
    if step % 5 == 0:
        event("eval", step=step, train_loss=loss, val_loss=loss * (1 + 0.1 * (max_iters - step)), lr=0.1)
with open(os.path.join(out_dir, "status.json"), "w") as f:
    json.dump({{"status": "finished", "step": max_iters}}, f)
'''
exec("import math, random\n" + LOSS)


def write_plan(folder: Path, **changed) -> Path:
    (folder / "fake_train.py").write_text(FAKE)
    plan = {"campaign_name": "toy", "script": str(folder / "fake_train.py"), "settings": {},
            "counts": [8, 4, 2, 1], "placements": ["even", "ends"], "control_layers": [3], "control_runs": 2,
            "tokens": [1280], "search_seed": 10, "proof_seed": 100, "looks": [2, 3, 4],
            "budget": {"gpu_hours": 4, "gpu_hours_per_run": 0.2}}
    (folder / "plan.json").write_text(json.dumps(plan | changed))
    return folder / "plan.json"


def find(folder: Path, *args: str, code: int = 0, **env: str) -> str:
    done = python(SCRIPT, "--plan=plan.json", *args, cwd=folder, **env)
    assert done.code == code, done.out + done.err
    assert code != 2 or done.err.count("\n") == 1, done.err
    return done.out + done.err


def find_and_kill(folder: Path, *args: str, when) -> None:
    """Kill a search as soon as when(what it printed) is true, and before the first run of its proof ends."""
    printed, hold = folder / "printed", folder / "hold"
    printed.touch()
    hold.touch()
    first = Forked(1, SCRIPT, ["--plan=plan.json", *args], str(printed), {})
    while not (now := when(printed.read_text())) and first.poll() is None:
        time.sleep(0.05)
    assert now and first.poll() is None, "it ended before it was killed"
    first.kill()
    first.wait(PATIENCE)
    hold.unlink()
    wait_for_the_end(folder)


def results_of(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.glob("*/*/*/results.jsonl")}


def test_a_killed_search_decides_the_same(tmp_path):
    plan = write_plan(tmp_path)
    find_and_kill(tmp_path, "--within=2%", "--parallel=2",
                  when=lambda said: re.search("even_2 run 0.*of training", said))
    folder = tmp_path / "experiment_logs" / "toy"
    before = results_of(folder)
    assert before and not (folder / "verdict.txt").exists()
    said = find(tmp_path, "--within=2%", "--parallel=2")
    for path, rows in results_of(folder).items():
        assert set(before.get(path, "").splitlines()) <= set(rows.splitlines()), "a run was repeated"

    # the same decisions as those of a search that is not interrupted
    search, results, expected = read_search(str(plan), 0.02, {}), SearchResults(), None
    while expected is None:
        decisions, batch, expected = decide(search.rules, results)
        for run in batch:
            config = search.configs[run.stage, run.variant]
            settings = config["hyperparameters"]
            results.take(run, true_loss(settings.get("sync_points"), settings.get("n_layer", 4),  # noqa: F821
                                        config["base_seed"] + run.run_id))
    found = json.loads((folder / "outcome.json").read_text())
    assert found.pop("gpu_seconds_spent") <= found.pop("gpu_seconds_budget") == 4 * 3600
    assert found == json.loads(json.dumps(expected)) and found["fewest"] == 2 and found["verdict"] in said
    told = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert told == json.loads(json.dumps(decisions))
    assert (folder / "verdict.txt").read_text() == expected["verdict"] + "\n"
    assert (folder / "frontier.png").stat().st_size > 1e4 and "proved" in (folder / "frontier.md").read_text()
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    settled = {entry["key"]: entry["spent"] for entry in ledger if entry["what"] == "settle"}
    reserved = {entry["key"]: entry["reserved"] for entry in ledger if entry["what"] == "reserve"}
    assert settled.keys() == reserved.keys() and all(settled[key] <= reserved[key] for key in settled)

    # the same command again does nothing more; another margin is another search
    rows = results_of(folder)
    assert found["verdict"] in find(tmp_path, "--within=2%") and results_of(folder) == rows
    assert "was begun with within=0.02" in find(tmp_path, "--within=3%", code=2)


def test_a_dry_run_runs_nothing(tmp_path):
    write_plan(tmp_path, families=["palm", "mean:2"])
    said = find(tmp_path, "--within=2%", "--budget_gpu_hours=2", "--batch_size=4", "--dry_run")
    assert "| mean-2 | 2 | --sync_strategy=mean:2 |" in said and "Families: up to 8 runs" in said
    write_plan(tmp_path)
    assert "pays for 10 runs" in said and "| ends_2 | 2 | 0, 7 |" in said and "--batch_size=4" in said
    assert "--max_iters=20" in said and not (tmp_path / "experiment_logs").exists()
    for words, args in (("no margin", ["--within=x"]), ("gpu_hours=-1", ["--budget_gpu_hours=-1"]),
                        ("'batch_siz'", ["--batch_siz=4"]), ("cannot read", ["--latency=none.json"])):
        assert words in find(tmp_path, "--within=2%", *args, code=2)
    assert not (tmp_path / "experiment_logs").exists()


def test_a_run_that_cannot_be_good_enough_is_ended_early(tmp_path):
    """3 syncs are 1% above the margin. Their runs wait in their middle, until they are ended there.
    A family is trained as well."""
    write_plan(tmp_path, counts=[8, 4, 3, 1], looks=[3, 4], placements=[], control_layers=[],
               families=["palm"], settings={"wait_after": 5})
    find(tmp_path, "--within=2%", "--parallel=4")
    folder = tmp_path / "experiment_logs" / "toy"
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["fewest"] == 4 and outcome["count_interval"] == [4, 4]
    assert "| palm | 4 | 4 | 3 |" in (folder / "frontier.md").read_text()
    (path,) = folder.glob("search/palm/*/config.json")
    assert '"sync_strategy": "palm"' in path.read_text()
    (path,) = folder.glob("search/even_3/*/results.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 and all(row["ended_by"] == "early" and not row["success"] for row in rows)
    assert all(row["at_least"] > 2.04 and "ended early: at step 5" in row["error"] for row in rows)


def test_greedy_placement(tmp_path, tiny_data, run_script):
    """The checkpoint of a run of the baseline gives the order in which syncs are dropped. The search is
    killed while drop_syncs.py runs."""
    dense = tmp_path / "dense"
    done = run_script("train_reduced_sync.py", *TINY, "--n_layer=4", f"--dataset={tiny_data}",
                      "--max_iters=4", f"--out_dir={dense}")
    assert done.code == 0, done.err
    write_plan(tmp_path, placements=["even"], control_layers=[], counts=[8, 2, 1],
               settings={"dense": str(dense / "ckpt")})
    folder = tmp_path / "experiment_logs" / "toy"
    find_and_kill(tmp_path, "--within=2%", "--placement=greedy",
                  when=lambda said: list(folder.glob("sensitivity/*/*/runs/run_0*/stdout.log")))
    said = find(tmp_path, "--within=2%", "--placement=greedy", TEST_PYTHON=python_command())
    (path,) = folder.glob("sensitivity/*/*/runs/run_0_seed_10/out/order.json")
    order = json.loads(path.read_text())
    (baseline,) = folder.glob("search/even_8/*/runs/run_0_seed_10/out")
    assert order["weights"] == str(baseline / "ckpt" / "step-00000004") and order["losses"][0] > 0
    assert [min(row, key=row.get) for row in order["sensitivities"]] == list(map(str, order["dropped"]))
    (path,) = folder.glob("search/greedy_2/*/config.json")
    points = json.loads(path.read_text())["config"]["hyperparameters"]["sync_points"]
    assert points == sorted(set(range(8)) - set(order["dropped"][:6])) and points[-1] == 7
    assert "greedy_2: " in said and "| greedy_2 | 2 | 4 |" in (folder / "frontier.md").read_text()
    rows = results_of(folder)
    find(tmp_path, "--within=2%", "--placement=greedy")
    assert results_of(folder) == rows
    assert "was begun with placements" in find(tmp_path, "--within=2%", code=2)


def test_drop_syncs_alone(tmp_path, run_script):
    """Each wrong input is an error before the first evaluation, and nothing is written. The loss with all
    syncs is that of the training, of documents too."""
    data = f"--dataset={write_documents(tmp_path / 'documents')}"
    for name, setting in (("dense", "--document_mask"), ("late", "--sync_strategy=ladder")):
        done = run_script("train_reduced_sync.py", *TINY, setting, data, "--max_iters=1", f"--out_dir={name}")
        assert done.code == 0, done.err
    files = sorted(tmp_path.rglob("*"))
    for words, *args in (("init_from is empty", "--init_from="),
                         ("was trained with 3 syncs", "--init_from=late"),
                         ("has checkpoints of a training run", "--init_from=dense", "--out_dir=dense"),
                         ("tp_size=1 must be at least 2", "--init_from=dense", "--tp_size=1"),
                         ("max_iters=4 syncs cannot be dropped", "--init_from=dense", "--max_iters=4"),
                         ("no data set", "--init_from=dense", "--dataset=none")):
        done = run_script("experiments/drop_syncs.py", "--device=cpu", *args)
        assert done.code == 2 and words in done.err, done.err
        assert sorted(tmp_path.rglob("*")) == files, args
    done = run_script("experiments/drop_syncs.py", "--device=cpu", "--init_from=dense", "--batch_size=4",
                      "--eval_iters=2")
    assert done.code == 0, done.err
    order = json.loads((tmp_path / "out-drop-syncs" / "order.json").read_text())
    (state,) = (tmp_path / "dense" / "ckpt").glob("*/state.json")
    assert order["losses"][0] == pytest.approx(json.loads(state.read_text())["val_loss"], abs=1e-5)


def test_a_trained_model_is_judged(tmp_path, tiny_data, run_script):
    """train_reduced_sync.py counts its updates as max_iters, and its log has no clock."""
    out = tmp_path / "out"
    done = run_script("train_reduced_sync.py", *TINY, f"--dataset={tiny_data}", "--max_iters=6",
                      "--eval_interval=3", "--sync_strategy=custom", "--sync_points=[3]", f"--out_dir={out}")
    assert done.code == 0, done.err
    asked = {"max_iters": 6, "sync_points": [3], "n_layer": 2}
    report = {"code": 0, "seconds": 1.0, "ended_by": "itself"}
    result, metrics = judge_run(str(out), asked, report)
    assert result["success"] and result["time_seconds"] > 0 and math.isfinite(result["final_val_loss"])
    assert [row["step"] for row in metrics if "val_loss" in row] == [0, 3, 6]
    assert "captured at step 7" in judge_run(str(out), asked | {"max_iters": 7}, report)[0]["error"]
    assert campaign_folder.cost_shown(result | {"wall_seconds": 2.0, "gpus": 1}) == 2.0
