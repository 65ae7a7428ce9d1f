"""train_gpt.py as a user starts it: what it prints and logs, its settings, exact resume of each variant. CPU.

    python -m pytest tests/scripts/test_train_gpt_runs.py
"""

import json
import re
import signal
import time

import pytest
import torch
from helpers import PATIENCE, ROOT, TINY, Forked, torchrun

import train_gpt
from nanosync import checkpoint
from nanosync.run_log import read_log

SETTINGS = ["--device=cpu", "--compile=False", "--n_layer=4", "--n_head=2", "--n_embd=32",
            "--sequence_length=32", "--batch_size=8", "--device_batch_size=4", "--num_iterations=24",
            "--warmdown_iters=8", "--val_loss_every=8", "--val_tokens=320"]
VARIANTS = list(train_gpt.VARIANTS)


@pytest.fixture
def train(run_script, tiny_data, tmp_path):
    """train(*args) runs train_gpt.py on the tiny data set, into tmp_path/out."""

    def run(*args, **kwargs):
        return run_script("train_gpt.py", *SETTINGS, f"--dataset={tiny_data}",
                          f"--out_dir={tmp_path / 'out'}", *args, **kwargs)

    return run


def status(out_dir) -> dict:
    return json.loads((out_dir / "status.json").read_text())


def of_kind(out_dir, kind: str) -> list[dict]:
    return [event for event in read_log(str(out_dir)) if event["event"] == kind]


def test_a_run(train, tmp_path):
    done = train()
    assert done.code == 0, done.err
    lines, out = done.out.splitlines(), tmp_path / "out"
    clock = r"train_time:\d+ms step_avg:(nan|\d+\.\d\d)ms"
    vals = [line for line in lines if re.fullmatch(rf"step:\d+/24 val_loss:\d\.\d{{4}} {clock}", line)]
    trains = [line for line in lines if re.fullmatch(rf"step:\d+/24 train_loss:\d\.\d{{4}} {clock}", line)]
    assert [line.split("/")[0] for line in vals] == [f"step:{step}" for step in (0, 8, 16, 24)]
    assert [line.split("/")[0] for line in trains] == [f"step:{step}" for step in range(1, 25)]
    assert [step for step, line in enumerate(trains, 1) if "nan" in line] == list(range(1, 11))
    log = (out / "log.txt").read_text()
    assert all(line in log for line in vals + trains)
    source = (ROOT / "train_gpt.py").read_text()
    assert source in log and of_kind(out, "source")[0]["text"] == source and "import torch" not in done.out
    assert of_kind(out, "start")[0]["environment"]["torch"] == torch.__version__
    iters, evals = of_kind(out, "iter"), of_kind(out, "eval")
    assert [e["step"] for e in iters] == [*range(24)] and [e["step"] for e in evals] == [0, 8, 16, 24]
    timed = 1e3 * sum(e["seconds"] for e in iters[10:])
    assert timed == pytest.approx(iters[-1]["train_time_ms"])
    assert iters[-1]["step_avg_ms"] == pytest.approx(iters[-1]["train_time_ms"] / 14)
    assert f"val_loss:{evals[-1]['val_loss']:.4f}" in vals[-1]
    assert evals[-1]["train_loss"] == iters[-1]["loss"]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 1
    end = status(out)
    assert (end["status"], end["step"], end["max_iters"], end["val_step"]) == ("finished", 24, 24, 24)
    assert end["val_loss"] == evals[-1]["val_loss"] and end["step_avg_ms"] == iters[-1]["step_avg_ms"]
    assert checkpoint.steps_in(str(out)) == [24] and of_kind(out, "end")[0]["status"] == "finished"
    assert [e["lr"] for e in iters[15:18]] == pytest.approx([0.0036, 0.0036, 0.0036 * 7 / 8])


def test_settings_of_file_environment_and_command_line(train, tmp_path):
    """The later of them wins; what does not exist is an error in each."""
    file = tmp_path / "stage.py"
    file.write_text("seed = 1\nbeta1 = 0.7\nbeta2 = 0.8\n")
    args = (file, "--num_iterations=0", "--save_checkpoint=False", "--beta2=0.96")
    done = train(*args, STAGE_BETA1="0.75", STAGE_BETA2="0.85")
    assert done.code == 0, done.err
    found = of_kind(tmp_path / "out", "start")[0]["config"]
    assert [found[name] for name in ("seed", "beta1", "beta2")] == [1, 0.75, 0.96]
    assert f"seed                     = 1  ({file})" in done.out and "= 0.75  (STAGE_BETA1)" in done.out
    wrong = train(*args, STAGE_LERNING_RATE="0.1")
    assert wrong.code == 2 and len(wrong.err.splitlines()) == 1
    assert "STAGE_LERNING_RATE: did you mean 'learning_rate'?" in wrong.err
    wrong = train(*args, STAGE_SEED="x")
    assert wrong.code == 2 and "seed='x' (the environment's STAGE_SEED) is of type str" in wrong.err


@pytest.mark.parametrize("args, message", [
    (["--batch_size=6"], "batch_size=6 is the total over all processes and must be a multiple of 4, "
                         "device_batch_size=4 times the number of processes, 1"),
    (["--variant=plam"], "variant='plam' is unknown: use baseline, palm"),
    (["--tp_size=2"], "tp_size is for --variant=sync"),
    (["--variant=sync", "--sync_points=[3]"], "sync_points=[3] is for sync_strategy='custom'"),
    *((["--variant=sync", f"--sync_strategy={name}"], f"sync_strategy='{name}' has sums that land late")
      for name in ("palm", "ladder", "dtp:1", "mean:1", "caat:0.5")),
    (["--variant=curriculum", "--curriculum_lengths=[8,16]"],
     "must be positive and rising, and end with sequence_length=32"),
    (["--variant=curriculum", "--curriculum_shares=[0.5]"], "must be 3 numbers"),
    (["--variant=curriculum", "--curriculum_shares=['a',0.1,0.2]"], "must be 3 numbers"),
    (["--variant=curriculum", "--curriculum_lengths=[]"],
     "must be positive and rising, and end with sequence_length=32"),
    (["--variant=depth_warm", "--depth_warm_layers=5"], "between 1 and n_layer=4"),
    (["--n_head=3"], "and n_head=3 do not give heads of even width"),
    (["--dtype=float16"], "dtype='float16' needs scaled losses"),
    (["--muon_momentum=1"], "muon_momentum=1.0 must be at least 0 and below 1"),
    (["--resume=latest"], "no checkpoint in"),
    (["--sequence_length=5000"], "sequence_length=5000 needs 5001 tokens"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must be above 0"),
    (["--muon_lr_ratio=-1"], "muon_lr_ratio=-1.0 must be at least 0"),
    (["--n_layer=9000", "--n_embd=20000"], "choose a smaller model"),
    (["--n_layer=10000000", "--n_embd=2"], "n_layer=10000000 must be at most 10000"),
    (["--variant=curriculum", "--sequence_length=3"], "sequence_length=3 has no quarters"),
])
def test_errors_are_one_line(train, tmp_path, args, message):
    done = train(*args)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "out").exists()


def same_run(first, second, step: int) -> bool:
    """Return True if two out_dirs have the same checkpoint of a step, to the last bit."""
    return all((checkpoint_file(first, step, which)) == (checkpoint_file(second, step, which))
               for which in ("model", "optim"))


def checkpoint_file(out_dir, step: int, which: str) -> bytes:
    return (out_dir / "ckpt" / f"step-{step:08d}" / f"{which}.safetensors").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_resume_exactly(train, variant, tmp_path):
    """Each improves; resumed in the middle it does, to the last bit, what it did without."""
    args = [f"--variant={variant}", "--checkpoint_interval=9", "--keep_checkpoints=9"]
    if variant == "curriculum":
        args += ["--curriculum_plateau_steps=2", "--curriculum_plateau_gain=0.3",
                 "--curriculum_shares=[0.2,0.6,0.9]"]
    if variant == "depth_warm":
        args += ["--depth_warm_layers=1", "--depth_warm_share=0.7"]
    assert (done := train(*args)).code == 0, done.err
    out, again = tmp_path / "out", tmp_path / "again"
    evals = of_kind(out, "eval")
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] - 0.8
    done = train(*args, f"--resume={out / 'ckpt' / 'step-00000009'}", f"--out_dir={again}")
    assert done.code == 0 and same_run(out, again, 24), done.err
    kept = ("step", "loss", "crop", "layers")
    through = [[e[name] for name in kept] for e in of_kind(out, "iter")]
    assert [[e[name] for name in kept] for e in of_kind(again, "iter")] == through[9:]
    assert status(again)["val_loss"] == status(out)["val_loss"]
    crops, layers = [row[2] for row in through], [row[3] for row in through]
    if variant == "curriculum":
        assert crops[0] == 8 and crops[-1] == 32 and crops == sorted(crops) and set(crops) == {8, 16, 24, 32}
        state = json.loads((out / "ckpt" / "step-00000024" / "state.json").read_text())
        assert state["sample"] == 24 * 8  # the tokens of a step stay
    if variant == "depth_warm":
        assert layers[0] == 1 and min(layers[17:]) == 4 and len(set(layers)) > 2
    wrong = train(*args, "--resume=9", "--n_layer=2")
    assert wrong.code == 2 and "n_layer=2 (command line), but" in wrong.err


def test_any_number_of_processes(train, tiny_data, tmp_path):
    """The losses of two processes are those of one; two of them resume to the last bit; bytes are said."""
    assert train("--checkpoint_interval=12").code == 0
    args = [*SETTINGS, f"--dataset={tiny_data}", "--checkpoint_interval=12", "--device_batch_size=2"]
    done = torchrun(2, "train_gpt.py", *args, "--out_dir=two", cwd=tmp_path)
    assert done.code == 0, done.err
    one, two = ([e["loss"] for e in of_kind(tmp_path / name, "iter")] for name in ("out", "two"))
    assert two == pytest.approx(one, abs=1e-3)
    one, two = (status(tmp_path / name)["val_loss"] for name in ("out", "two"))
    assert two == pytest.approx(one, abs=1e-3)
    done = torchrun(2, "train_gpt.py", *args, "--out_dir=again", "--resume=two/ckpt/step-00000012",
                    cwd=tmp_path)
    assert done.code == 0 and same_run(tmp_path / "two", tmp_path / "again", 24), done.err
    matrices, embedding = 4 * 12 * 32 * 32, 26 * 32  # all but one part in two; fp32 on the CPU
    assert f"each process sent {4 * matrices // 2 * 2 + 4 * embedding:,} bytes a step" in done.out


def test_checkpoints_of_other_scripts(train, run_script, tiny_data, tmp_path):
    """Each names the script that can go on with it."""
    dense = tmp_path / "dense"
    done = run_script("train.py", *TINY, f"--dataset={tiny_data}", f"--out_dir={dense}", "--max_iters=2",
                      "--always_save_checkpoint=True")
    assert done.code == 0, done.err
    done = train(f"--resume={dense}")
    assert done.code == 2 and "kind 'gpt': resume it with train.py" in done.err, done.err
    done = train("--num_iterations=2", "--warmdown_iters=0", "--val_tokens=100000")
    assert done.code == 0 and "val_tokens=100000, but evaluations use 672 tokens" in done.out, done.out
    for option in ("--resume", "--init_from"):
        done = run_script("train.py", *TINY, f"--dataset={tiny_data}", "--out_dir=other",
                          f"{option}={tmp_path / 'out'}")
        assert done.code == 2 and "only train_gpt.py can use it" in done.err, done.err
        assert len(done.err.splitlines()) == 1


def test_asked_to_end(tiny_data, tmp_path):
    """SIGTERM: the step is finished, a checkpoint saved, and status.json says so."""
    out = tmp_path / "out"
    printed, end = tmp_path / "text", time.monotonic() + PATIENCE
    printed.touch()
    process = Forked(1, "train_gpt.py", [*SETTINGS, f"--dataset={tiny_data}", f"--out_dir={out}",
                                         "--num_iterations=100000", "--val_loss_every=0"], str(printed), {})
    while "step:5/" not in printed.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert status(out)["status"] == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0, printed.read_text()
    reached = status(out)
    assert reached["status"] == "interrupted" and checkpoint.steps_in(str(out)) == [reached["step"]]


def test_a_loss_that_is_not_finite(train, tmp_path):
    done = train("--learning_rate=1e30", "--num_iterations=50")
    assert done.code == 2 and "no checkpoint has the weights after it" in done.err
    assert status(tmp_path / "out")["status"] == "non_finite"
    assert checkpoint.steps_in(str(tmp_path / "out")) == []
