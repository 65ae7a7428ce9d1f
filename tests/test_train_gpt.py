"""train_gpt.py: a run as a user starts it, its settings, exact resume, and what each variant claims. CPU; a
minute.

    python -m pytest tests/test_train_gpt.py
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, torchrun
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from configurator import read_settings
from nanosync import checkpoint
from nanosync.dataloader import evaluation_batches, open_dataset
from nanosync.errors import UserError
from nanosync.optim import trapezoidal_learning_rate
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


def config(**changes) -> dict:
    """The script's settings, smaller, for schedules."""
    settings = {setting.name: vars(train_gpt)[setting.name] for setting in read_settings(vars(train_gpt))}
    return settings | dict(n_layer=4, sequence_length=32, num_iterations=100) | changes


def random_model(variant="baseline", dtype=torch.float64, **changes):
    """A model of which no parameter is zero."""
    shape = dict(sequence_length=32, vocab_size=61, n_layer=3, n_head=2, n_embd=16, variant=variant) | changes
    torch.manual_seed(0)
    model = train_gpt.VARIANTS[variant][0](train_gpt.GPTConfig(**shape)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokens(*shape, seed=1):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


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
    (["--n_layer=100000", "--n_embd=20000"], "choose a smaller model"),
    (["--variant=curriculum", "--sequence_length=3"], "sequence_length=3 has no quarters"),
])
def test_errors_are_one_line(train, tmp_path, args, message):
    done = train(*args)
    assert done.code == 2 and message in done.err and len(done.err.splitlines()) == 1, done.err
    assert not (tmp_path / "out").exists()


def same_run(first, second, step: int) -> bool:
    """Whether two out_dirs have the same checkpoint of a step, to the last bit."""
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


@pytest.mark.slow
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
    for script in ("train.py", "sample.py"):
        option = "--resume" if script == "train.py" else "--out_dir"
        done = run_script(script, *(TINY if script == "train.py" else ["--device=cpu"]),
                          f"{option}={tmp_path / 'out'}")
        assert done.code == 2 and "only train_gpt.py can use it" in done.err, done.err
        assert len(done.err.splitlines()) == 1


def test_asked_to_end(tiny_data, tmp_path):
    """SIGTERM: the step is finished, a checkpoint saved, and status.json says so."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train_gpt.py"), *SETTINGS, f"--dataset={tiny_data}",
               f"--out_dir={out}", "--num_iterations=100000", "--val_loss_every=0"]
    with open(tmp_path / "text", "w") as text:
        process = subprocess.Popen(command, stdout=text, stderr=text,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 60
        while "step:5/" not in (tmp_path / "text").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert status(out)["status"] == "running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "text").read_text()
    reached = status(out)
    assert reached["status"] == "interrupted" and checkpoint.steps_in(str(out)) == [reached["step"]]


def test_a_loss_that_is_not_finite(train, tmp_path):
    done = train("--learning_rate=1e30", "--num_iterations=50")
    assert done.code == 2 and "no checkpoint has the weights after it" in done.err
    assert status(tmp_path / "out")["status"] == "non_finite"
    assert checkpoint.steps_in(str(tmp_path / "out")) == []


def test_val_tokens_are_the_first(tiny_data):
    """Those that other scripts for the same record look at."""
    val = open_dataset(str(tiny_data), 32).val
    x = torch.cat([x for x, _ in evaluation_batches(val, 10, 4, torch.device("cpu"), spread=False)])
    assert x[:10].flatten().tolist() == val.files[0][:320].tolist()


def test_trapezoidal_schedule():
    rates = [trapezoidal_learning_rate(step, 2.0, 4, 10, 100) for step in range(101)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[90] == 2.0 and rates[91] == pytest.approx(1.8)
    assert rates[100] == 0.0 and trapezoidal_learning_rate(0, 2.0, 0, 0, 5) == 2.0
    overlapping = [trapezoidal_learning_rate(step, 12.0, 8, 6, 10) for step in range(11)]
    assert overlapping == [1.5, 3.0, 4.5, 6.0, 7.5, 9.0, 8.0, 6.0, 4.0, 2.0, 0.0]  # never the peak, no jump


def test_initialisation_and_groups():
    torch.manual_seed(0)
    model = train_gpt.GPT(train_gpt.GPTConfig(sequence_length=8, vocab_size=50304, n_layer=12, n_head=6,
                                              n_embd=768))
    assert model.n_parameters() == 12 * 12 * 768**2 + 50304 * 768
    for name, p in model.named_parameters():
        std = 0 if "c_proj" in name else (3 * 768)**-0.5
        assert p.std().item() == pytest.approx(std, rel=0.01), name


def test_baseline_by_the_formulas():
    """Rotary embedding, QK-norm, RMSNorm, ReLU^2 and the tied head, written out; loss and logits agree."""
    model, idx = random_model(), tokens(2, 20)
    C, H, D, T = 16, 2, 8, 20
    angle = torch.outer(torch.arange(T), 10000 ** -(torch.arange(0, D, 2) / D)).double()

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x):  # (B, H, T, D)
        y = torch.complex(*norm(x).chunk(2, -1)) * torch.polar(torch.ones_like(angle), -angle)
        return torch.cat((y.real, y.imag), -1)

    x = model.transformer.wte.weight[idx]
    for block in model.transformer.h:
        q, k, v = (part.view(2, T, H, D).transpose(1, 2)
                   for part in (norm(x) @ block.attn.c_attn.weight.T).chunk(3, -1))
        future = torch.ones(T, T).triu(1).bool()
        scores = (turned(q) @ turned(k).mT / math.sqrt(D)).masked_fill(future, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, T, C) @ block.attn.c_proj.weight.T
        x = x + F.relu(norm(x) @ block.mlp.c_fc.weight.T)**2 @ block.mlp.c_proj.weight.T
    logits = norm(x) @ model.transformer.wte.weight.T
    assert torch.allclose(model(idx)[0], logits, atol=1e-6)  # the tables of angles are fp32
    loss = F.cross_entropy(logits.flatten(0, 1), tokens(2, 20, seed=2).flatten())
    assert model(idx, tokens(2, 20, seed=2))[1].item() == pytest.approx(loss.item(), abs=1e-6)


def test_palm_has_one_norm_and_scales(monkeypatch):
    model, norms = random_model("palm"), []
    rms_norm = train_gpt.rms_norm
    monkeypatch.setattr(train_gpt, "rms_norm", lambda x: norms.append(x) or rms_norm(x))
    block, x = model.transformer.h[0], torch.randn(2, 8, 16, dtype=torch.float64)
    cos, sin = model.rotations(8, 8)
    out = block(x, cos, sin, 8)
    assert len(norms) == 1 and norms[0] is x
    y = rms_norm(x)
    assert torch.allclose(out, x + (block.attn(y, cos, sin, 8) + block.mlp(y)) / math.sqrt(2))


@pytest.mark.parametrize("crop", [8, 16, 24, 32])
def test_crops_are_sequences_of_their_own(crop):
    """Losses of pieces are those of the same tokens as short sequences, also where crop does not divide T."""
    model, x, y = random_model(), tokens(3, 32), tokens(3, 32, seed=2)
    pieces = [slice(start, min(start + crop, 32)) for start in range(0, 32, crop)]
    apart = sum(model(x[:, p], y[:, p])[1] * (p.stop - p.start) for p in pieces) / 32
    assert model(x, y, crop)[1].item() == pytest.approx(apart.item(), rel=1e-9)
    assert (crop == 32) == (model(x, y)[1].item() == pytest.approx(apart.item(), rel=1e-9))


def test_plateau_rule():
    """A length gives way when n losses are less than `gain` below the n before, by what is known two steps
    later, or at its share; and starts counting anew."""
    def run(losses, **options):
        schedule = train_gpt.Curriculum(config(curriculum_plateau_steps=5, curriculum_plateau_gain=0.1,
                                               curriculum_shares=[0.4, 0.8, 0.9], **options))
        crops = []
        for step, loss in enumerate(losses):
            crops.append(schedule.plan(step).crop)
            schedule.observe(step, loss)
        return [crops.index(length) for length in sorted(set(crops))], sorted(set(crops))

    falling = [10 - 0.1 * step for step in range(100)]
    assert run(falling) == ([0, 40, 80, 90], [8, 16, 24, 32])  # by the shares alone
    flat = falling[:20] + [8.0] * 80
    gains = {s: np.mean(flat[s - 11:s - 6]) - np.mean(flat[s - 6:s - 1]) for s in range(11, 100)}
    first = next(s for s in gains if gains[s] < 0.1)
    assert run(flat)[0][1] == first and 20 < first < 30
    assert run(flat)[0][2] == first + 11  # 2 x 5 losses of its own, and the one that is late
    assert run(flat, curriculum_lengths=[4, 8, 16, 32])[1] == [4, 8, 16, 32]
    schedule = train_gpt.Curriculum(config(curriculum_plateau_steps=0))
    assert [schedule.plan(step).crop for step in (0, 9, 10, 19, 20, 30, 99)] == [8, 8, 16, 16, 24, 32, 32]


def test_a_report_read_early_changes_no_plan():
    """A checkpoint reads the last loss before its step would have: no plateau may come sooner for it."""
    def plans(early):
        schedule, crops, late = train_gpt.Curriculum(config(curriculum_plateau_steps=3)), [], None
        for step in range(60):
            if step % early == 0 and late is not None:
                schedule.observe(*late)
                late = None
            crops.append(schedule.plan(step).crop)
            if late is not None:
                schedule.observe(*late)
            late = step, 5 - 0.02 * min(step, 7)
        return crops
    assert plans(1) == plans(4) == plans(1000)


def test_depth_warm_plan():
    schedule = train_gpt.DepthWarm(config(n_layer=12, depth_warm_layers=4, depth_warm_share=0.5,
                                          num_iterations=1000))
    plans = [schedule.plan(step).layers for step in range(1000)]
    assert plans[0] == (0, 1, 2, 3) and set(plans[500:]) == {tuple(range(12))}
    assert all(set(range(4)) <= set(plan) and list(plan) == sorted(plan) for plan in plans)
    counts = [np.mean([len(plan) for plan in plans[start:start + 100]]) for start in range(0, 500, 100)]
    assert counts == sorted(counts) and 4 <= counts[0] < 5.5 and 10 < counts[-1] < 12
    takes_part = np.mean([8 in plan for plan in plans[300:400]])
    expected = np.mean([schedule.survival(8, step) for step in range(300, 400)])
    assert takes_part == pytest.approx(expected, abs=0.15)
    assert schedule.survival(11, 400) == 0.0 and schedule.survival(0, 0) == schedule.survival(11, 500) == 1.0
    again = train_gpt.DepthWarm(config(n_layer=12, depth_warm_share=0.5, num_iterations=1000))
    assert [again.plan(step).layers for step in (250, 120)] == [plans[250], plans[120]]  # no state


def test_inactive_layers_take_no_time():
    """Arithmetic is counted, and time measured, against the active depth; they get no gradient."""
    model = random_model(dtype=torch.float32, n_layer=8, n_embd=128, n_head=2)
    x, y = tokens(16, 32), tokens(16, 32, seed=2)

    def cost(layers) -> tuple[int, float]:
        with FlopCounterMode(display=False) as flops:
            model(x, y, None, layers)[1].backward()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            model(x, y, None, layers)[1].backward()
            times.append(time.perf_counter() - start)
        return flops.get_total_flops(), min(times)

    costs = {n: cost(tuple(range(n))) for n in (1, 2, 8)}
    layer = costs[2][0] - costs[1][0]
    assert costs[8][0] == costs[1][0] + 7 * layer and layer > 0
    assert costs[2][1] < 0.6 * costs[8][1]
    model.zero_grad()
    model(x, y, None, (0, 3))[1].backward()
    reached = [block.mlp.c_fc.weight.grad is not None for block in model.transformer.h]
    assert [i for i in range(8) if reached[i]] == [0, 3]


def test_a_layer_that_joins_changes_nothing():
    model = train_gpt.GPT(train_gpt.GPTConfig(sequence_length=32, vocab_size=61, n_layer=4, n_head=2,
                                              n_embd=16))
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    assert torch.equal(model(x, y, None, (0,))[1], model(x, y)[1])


def test_sync_everywhere_is_the_baseline():
    dense, sync = random_model(), random_model("sync", tp_size=2, sync_points=list(range(6)))
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    losses = [model(x, y)[1] for model in (dense, sync)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12) and sync.syncs == 6
    for p, q in zip(dense.parameters(), sync.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("points, syncs", [([1, 3, 5], 3), ([3], 2), ([0, 4], 3), ([], 1)])
def test_sync_by_its_definition(points, syncs):
    """Each rank works on the shared base and its own pending part, with its own part of each matrix."""
    model, idx, R = random_model("sync", tp_size=2, sync_points=points), tokens(2, 20), 2
    rms_norm, cos_sin = train_gpt.rms_norm, model.rotations(20, 20)
    base = model.transformer.wte.weight[idx]
    pending = [torch.zeros_like(base) for _ in range(R)]
    for j in range(6):
        block = model.transformer.h[j // 2]
        for r in range(R):
            x = rms_norm(base + pending[r])
            if j % 2 == 0:
                rows = block.attn.c_attn.weight.view(3, R, 8, 16)[:, r].reshape(24, 16)
                y = train_gpt.attend((x @ rows.T).view(2, 20, 3, 1, 8), *cos_sin, 20)
                out = y @ block.attn.c_proj.weight.chunk(R, 1)[r].T
            else:
                y = F.relu(x @ block.mlp.c_fc.weight.chunk(R)[r].T)**2
                out = y @ block.mlp.c_proj.weight.chunk(R, 1)[r].T
            pending[r] = pending[r] + out
        if j in points:
            base, pending = base + sum(pending), [torch.zeros_like(base) for _ in range(R)]
    logits = rms_norm(base + sum(pending)) @ model.transformer.wte.weight.T
    assert torch.allclose(model(idx)[0], logits, rtol=1e-9, atol=1e-11) and model.syncs == syncs


class SumsInFp32(TorchFunctionMode):
    """What CUDA's autocast does, and the CPU's does not: a sum is in fp32 unless it is told otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.float() if func is torch.Tensor.sum and "dtype" not in (kwargs or {}) else out


@pytest.mark.parametrize("variant, changes", [
    *((variant, {}) for variant in VARIANTS if variant != "sync"),
    ("sync", dict(tp_size=2, sync_points=[1, 3, 5])), ("sync", dict(tp_size=2, sync_points=[]))])
def test_the_residual_stream_is_in_the_compute_dtype(variant, changes, monkeypatch):
    """In and after every block; fp32 would double what most of a step's memory traffic moves."""
    model, seen = random_model(variant, torch.float32, **changes), []
    rms_norm = train_gpt.rms_norm
    monkeypatch.setattr(train_gpt, "rms_norm", lambda x: seen.append(x.dtype) or rms_norm(x))
    with torch.autocast("cpu", torch.bfloat16), SumsInFp32():
        x = model.hidden(tokens(2, 8), 8, (0, 1, 2))
    assert x.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16} and len(seen) >= 4


@pytest.mark.parametrize("variant, crop", [("baseline", 32), ("baseline", 12), ("palm", 32), ("sync", 32)])
def test_compiles_without_breaks(variant, crop):
    """One graph, of which every gradient is eager's; what Inductor makes of it is its own affair."""
    changes = dict(tp_size=2, sync_points=[3]) if variant == "sync" else {}
    eager, compiled = random_model(variant, **changes), random_model(variant, **changes)
    compiled.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    for model in (eager, compiled):
        model(x, y, crop, (0, 2))[1].backward()
    for p, q in zip(eager.parameters(), compiled.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad))


def test_variant_of_another_name_is_refused():
    with pytest.raises(UserError, match="variant='x' is unknown"):
        train_gpt.GPTConfig(sequence_length=8, vocab_size=61, n_layer=1, n_head=1, n_embd=8, variant="x")
