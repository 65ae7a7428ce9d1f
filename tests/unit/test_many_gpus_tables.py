"""Records and tables of benchmarks/many_gpus.py, and which jobs it starts. CPU; milliseconds.

    python -m pytest tests/unit/test_many_gpus_tables.py
"""

import json
import sys

import pytest

from benchmarks import many_gpus
from benchmarks import many_gpus_records as records
from configurator import configure
from nanosync.errors import UserError

SCRIPTS = [f"{many_gpus.ROOT}/{name}"
           for name in ("bench.py", "train.py", "train_gpt.py", "train_gpt_fast.py")]
ENDED = {"code": 0, "seconds": 7.0, "ended_by": "itself"}


@pytest.fixture
def settings(monkeypatch):
    """settings("--part=scaling", ...) -> resolved and checked settings of many_gpus.py."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def resolve(*argv: str):
        config = configure(dict(vars(many_gpus)), ["--device=cpu", *argv], others=tuple(SCRIPTS))
        many_gpus.check_settings(config)
        return config

    return resolve


def rows_of(lines: list[str]) -> list[list[str]]:
    """Return the cells of Markdown tables, without headings."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for i, row in enumerate(cells) if lines[i] and row[0] != "---"
            and not (i + 1 < len(lines) and cells[i + 1][0] == "---")]


def test_speedrun_lines_of_both_projects():
    ours = """compiling the model (about a minute)
step:0/20 val_loss:10.8251 train_time:0ms step_avg:nanms
step:20/20 train_loss:3.3000 train_time:1900ms step_avg:190.00ms
step:20/20 val_loss:3.2790 train_time:2000ms step_avg:200.00ms bits_per_byte:1.1000
peak memory: 17800 MiB
each process sent 1,234,567 bytes a step
"""
    theirs = """step:0/10 val_loss:10.8 train_time:0ms step_avg:0.01ms
step:10/10 val_loss:3.2812 train_time:4000ms step_avg:400.00ms
peak memory allocated: 31000 MiB reserved: 32000 MiB
"""
    lines, good = records.speedrun_table({"target": 3.28}, {
        "fast": {"figures": records.read_speedrun("", ours)},
        "peer": {"figures": records.read_speedrun("", theirs)}, "base": {"figures": None}})
    assert good and rows_of(lines) == [
        ["fast", "20", "3.2790", "200.00", "0.500", "2.0", "2.0", "1.2", "17800"],
        ["peer", "10", "3.2812", "400.00", "1.000", "4.0", "not reached", "n/a", "31000"]]
    with pytest.raises(IndexError):
        records.read_speedrun("", "no losses")


def decode_record(tp: int, full: float, half: float, alone: float) -> dict:
    rows = [("2 syncs", "oneshot", full), ("2 syncs", "nccl", 2 * full), ("1 syncs", "oneshot", half),
            ("1 syncs", "nccl", 2 * half), ("2 syncs, delay 1", "oneshot", half),
            ("2 syncs, delay 1", "nccl", 2 * half), ("0 syncs", None, 10.0), ("TP=1", None, alone)]
    rows = [{"n_embd": 768, "batch_size": 1, "processes": 1 if name == "TP=1" else tp, "name": name,
             "tp_allreduce": kind, "allreduce": kind or "none", "us": us} for name, kind, us in rows]
    return {"problem": None, "figures": {"config": {"syncs": [2, 1, [2, 1]]}, "rows": rows}}


def test_decode_ratio_is_to_the_best_smaller_tp_with_all_syncs():
    lines, _ = records.decode_table({}, {"768-tp2": decode_record(2, 80.0, 60.0, 100.0),
                                         "768-tp4": decode_record(4, 60.0, 40.0, 100.0)})
    assert "| C | B | TP | exchange | syncs | 2 | 1 | 0 |" in lines[0]
    rows = rows_of(lines)
    assert rows[0] == ["768", "1", "2", "oneshot", "dropped", "80.0 (0.800)", "60.0 (0.600)", "10.0 (0.100)",
                       "100.0 (TP=1)"]
    assert rows[4][5:] == ["60.0 (0.750)", "40.0 (0.500)", "10.0 (0.125)", "80.0 (TP=2)"]
    assert rows[7][3:7] == ["nccl", "delayed", "80.0 (1.000)", ""]


def scaling_records(ddp: float, held: int) -> dict:
    turns = {"world_size": 4, "contenders": {"DDP": {"tokens_per_second": ddp},
                                             "one GPU": {"tokens_per_second": 100.0}}}
    named = {"ddp": {"tokens_per_second": 200.0}, "zero1": {"tokens_per_second": 190.0}}
    row = {"bytes": {"held": held, "peak": 2 * held}, "predicted": 2**30}
    figures = {"124M-ddp": turns, "124M-strategies": {"contenders": named}, "XL-ddp": turns,
               "XL-strategies": {"rows": [row | {"name": name} | f for name, f in named.items()]},
               "largest-ddp": {"rows": [{"name": "ddp+block+eager", "largest": {
                   "layers": 249, "parameters": 7_700_000_000, "peak": 2**37, "limit": 2**37}}]},
               "largest-fsdp": None}
    return {name: {"problem": None, "figures": f} for name, f in figures.items()}


def test_scaling_is_relative_to_as_many_times_one_gpu():
    config = {"gpus": 4, "device": "auto"}
    lines, good = records.scaling_table(config, scaling_records(396.0, 2**30))
    rows = rows_of(lines)
    assert not good and rows[:3] == [["124M", "one GPU", "100", "", ""],
                                     ["124M", "ddp", "200", "0.990", ">= 0.98"],
                                     ["124M", "zero1", "190", "0.941", ">= 0.98: missed"]]
    assert rows[5] == ["XL", "zero1", "190", "0.941", ">= 0.95: missed"]
    assert rows[6:] == [["ddp", "1.00", "1.00", "1.000", "2.00"], ["zero1", "1.00", "1.00", "1.000", "2.00"],
                        ["ddp+block+eager", "249", "7.70B", "128.0 of 128.0"]]
    assert records.scaling_table(config, scaling_records(440.0, 0))[1]  # no bar is missed
    assert records.scaling_table(config | {"device": "cpu"}, scaling_records(1.0, 0))[1]


@pytest.mark.parametrize("kind, change, good", [
    ("again", {}, True), ("again", {"losses": {"20": 3.0, "21": 2.9000001}}, False),
    ("again", {"sha256": {"model": "a", "optim": "x", "rng": "c"}}, False),
    ("again", {"losses": {}}, False), ("again", {"checkpoint": "step-00000030"}, False),
    ("on-2", {"losses": {"20": 3.0, "21": 2.91}, "sha256": {"model": "x", "optim": "x", "rng": "x"}}, True),
    ("on-2", {"losses": {"20": 3.0, "21": 3.0}}, False), ("on-2", {"losses": {}}, False)])
def test_resumed_run_is_compared_with_the_whole_run(kind, change, good):
    whole = {"losses": {"19": 3.1, "20": 3.0, "21": 2.9}, "checkpoint": "step-00000040",
             "sha256": {"model": "a", "optim": "b", "rng": "c"}}
    resumed = whole | {"losses": {"20": 3.0, "21": 2.9}} | change
    lines, found = records.resume_table({}, {
        "fsdp-whole": {"figures": whole}, f"fsdp-{kind}": {"figures": resumed},
        "tp-again": {"figures": None}})
    assert found == good and [row[:2] + row[3:] for row in rows_of(lines)] == [
        ["fsdp", kind, "ok" if good else "FAILED"]]


def test_failed_jobs_say_why(tmp_path):
    stem = str(tmp_path / "scaling-a")
    (tmp_path / "scaling-a.log").write_text("W1129 elastic\nerror: no such data\nTraceback\n")
    for report, words in (({"code": 2}, "exit code 2: error: no such data"),
                          ({"code": -15, "ended_by": "limit"}, "ended after 7 s by limit"),
                          ({}, "no figures in scaling-a.log: FileNotFoundError")):
        record = records.record_of("scaling", stem, "command", ENDED | report)
        assert record["figures"] is None and record["problem"].startswith(words)
        (tmp_path / "scaling-a.json").write_text(json.dumps(record))
        assert records.finished(stem, "command") is None  # so it runs again


@pytest.mark.parametrize("line", ["[rank1]: AssertionError", "[rank0]: torch.OutOfMemoryError: none left",
                                  "ModuleNotFoundError: No module named 'triton'",
                                  "error on rank 1: no such data"])
def test_a_failed_job_has_the_error_of_a_rank_and_not_torchruns(tmp_path, line):
    (tmp_path / "a.log").write_text(
        f"[rank1]: Traceback (most recent call last):\n[rank1]:     raise KeyError('a')\n{line}\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n")
    record = records.record_of("speedrun", str(tmp_path / "a"), "command", ENDED | {"code": 1})
    assert record["problem"] == f"exit code 1: {line}"


def test_jobs_start_only_if_they_fit_and_are_kept(settings, tmp_path, monkeypatch, capsys):
    started = []

    def supervise(config, job, seconds):
        started.append((job.name, seconds > 0))
        open(many_gpus.place(config, job.name, ".log"), "w").close()
        with open(many_gpus.place(config, job.name, ".bench.json"), "w") as f:
            json.dump({"rows": []}, f)
        return ENDED

    monkeypatch.setattr(many_gpus, "supervise", supervise)
    args = ["--part=scaling", f"--out={tmp_path}", "--only=124M-strategies,XL-strategies"]
    assert many_gpus.main(settings(*args, "--limit=110")) == 1
    assert started == [("124M-strategies", True)]  # takes 100 s, the other one 130 s
    assert "XL-strategies: not run: takes 130 s, 1" in capsys.readouterr().out
    assert many_gpus.main(settings(*args)) == 1 and started[1:] == [("XL-strategies", False)]
    assert many_gpus.main(settings(*args)) == 1 and len(started) == 2
    assert "124M-ddp, XL-ddp: not run\n" in (tmp_path / "scaling-table.md").read_text()
    with pytest.raises(UserError, match=r"scaling-124M-strategies\.json is the result of other settings"):
        many_gpus.main(settings(*args, "--batch_size=3"))


def test_jobs_fit_the_machine(settings, tmp_path):
    def jobs(part, *args):
        config = settings(f"--part={part}", f"--out={tmp_path}", *args)
        return {job.name: (job.processes, job.needs, " ".join(job.arguments))
                for job in many_gpus.JOBS[part](config)}

    decode = jobs("decode", "--gpus=8")
    assert list(decode) == ["768-tp2", "768-tp4", *(f"{C}-tp{n}" for C in (2048, 4096) for n in (2, 4, 8))]
    assert "--widths=[2048]" in decode["2048-tp8"][2] and decode["2048-tp8"][0] == 8
    assert "--syncs=[24, 12, 6, 2, 1, [24, 1], [12, 1], [6, 1], [2, 1]]" in decode["2048-tp8"][2]
    resume = jobs("resume", "--gpus=8")
    assert resume["tp-on-2"][:2] == (2, "tp-whole") and "tp_size=4 " in resume["tp-on-2"][2]
    assert "--max_iters=30 " in resume["tp-on-2"][2]
    assert resume["fsdp-on-1"][:2] == (1, "fsdp-on-2") and "step-00000030" in resume["fsdp-on-1"][2]
    assert "fsdp" not in resume["fsdp-on-1"][2].replace(str(tmp_path), "").replace("resume-fsdp", "")
    speedrun = jobs("speedrun", "--gpus=4", "--num_iterations=20", "--batch_size=64")
    assert "batch_size=64" in speedrun["base"][2] and " --batch_size" not in speedrun["fast"][2]


def test_command_is_shown_with_paths_relative_to_out(settings, monkeypatch, tmp_path):
    """And with other paths as they are: records of other settings differ from it."""
    monkeypatch.chdir(tmp_path)
    config = settings("--part=speedrun", "--out=a", "--dataset=data/b")
    shown = many_gpus.speedrun_jobs(config)[0].shown(config)
    assert "--dataset=data/b" in shown and "--out_dir=speedrun-fast" in shown


@pytest.mark.parametrize("args, says", [
    (["--part=bogus"], "part='bogus' is unknown: use speedrun, decode, scaling, resume"),
    (["--part=decode", "--gpus=1"], "gpus=1, and .* this script measures two or more"),
    (["--part=decode", "--widths=['a']"], r"widths=\['a'\] must be multiples of 128"),
    (["--part=decode", "--widths=[2048,100]"], r"widths=\[2048, 100\] must be multiples of 128"),
    (["--part=decode", "--widths=[0]"], "must be multiples of 128"),
    (["--part=decode", "--widths=[]"], "must be multiples of 128"),
    (["--part=speedrun", "--peer=nothing.py --seed=1"], "peer='nothing.py' is no file: give the path"),
    (["--part=speedrun", "--peer='nothing.py"], "peer=\"'nothing.py\" cannot be split into words"),
    (["--part=decode", "--max_iters=3"], "max_iters is no setting of bench.py: leave it out"),
    (["--part=decode", "--mode=train"], "mode is fixed in part decode: leave it out"),
    (["--part=resume", "--only=ddp"], "only='ddp' has 'ddp', and the jobs are ddp-whole, ddp-again"),
    (["--part=speedrun", f"--peer={__file__}", "--dataset=/nowhere"], "/nowhere has no shards")])
def test_errors_of_the_user(settings, tmp_path, args, says):
    with pytest.raises(UserError, match=says):
        many_gpus.main(settings(*args, f"--out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_no_gpu_is_an_error(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(many_gpus.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU is visible"):
        settings("--part=decode", "--device=auto", f"--out={tmp_path}")
    monkeypatch.setattr(many_gpus.torch.cuda, "device_count", lambda: 4)
    assert settings("--part=decode", "--device=auto", f"--out={tmp_path}")["gpus"] == 4
    with pytest.raises(UserError, match="gpus=8, and 4 are visible"):
        settings("--part=decode", "--device=auto", "--gpus=8", f"--out={tmp_path}")
