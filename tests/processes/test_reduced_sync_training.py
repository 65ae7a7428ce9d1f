"""Training sync schedules: train.py and train_reduced_sync.py on simulated and real ranks, checkpoints from
every variant into every other, the summary of runs. CPU, gloo; a minute.

    python -m pytest tests/processes/test_reduced_sync_training.py
"""

import json

import pytest
import torch
from helpers import MODEL_VARIANTS as VARIANTS
from helpers import ROOT, TINY, build, run_processes, tokens, torchrun
from helpers import losses_and_norms as losses

from models.weights import load_parameters
from nanosync import checkpoint
from nanosync.ranks import Ranks

RUN = [*TINY, "--n_head=4", "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=10",
       "--bias=True", "--learning_rate=1e-3", "--eval_interval=5", "--eval_iters=5"]
BLOCKS = ["--model_type=distributed_gpt", "--tp_size=4", "--block_types=['spd','parallel']"]


def state_of(out_dir):
    found = checkpoint.find(str(out_dir))
    return found.tensors("model"), found.tensors("optim")


@pytest.fixture(scope="module")
def simulated(tiny_data, tmp_path_factory):
    """The run with all ranks in one process."""
    folder = tmp_path_factory.mktemp("simulated")
    done = torchrun(1, "train.py", *RUN, *BLOCKS, f"--dataset={tiny_data}", "--out_dir=out", cwd=folder)
    assert done.code == 0, done.err
    assert "synchronization points per forward pass: 2 (baseline 4), 4 ranks on 1 process" in done.out
    return folder / "out"


@pytest.mark.parametrize("processes, tp_processes", [(2, 2), (4, 2), (4, 4)])
def test_real_ranks_train_as_simulated_ones(simulated, tiny_data, tmp_path, processes, tp_processes):
    """Losses, norms and the checkpoint, which knows nothing of processes; 4 processes of 2: a (2, 2) mesh."""
    done = torchrun(processes, "train.py", *RUN, *BLOCKS, f"--tp_processes={tp_processes}",
                    f"--dataset={tiny_data}", "--out_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    for mine, expected in zip(losses(tmp_path / "out"), losses(simulated)):
        # fp32 sums in another order through 10 updates
        assert mine == pytest.approx(expected, rel=2e-6) and len(mine) == len(expected) > 3
    for mine, expected in zip(state_of(tmp_path / "out"), state_of(simulated)):
        assert set(mine) == set(expected)
        for name in mine:
            assert mine[name].shape == expected[name].shape
            # Adam divides small gradients by their size, which leaves 1e-7 of a sum as 1e-3 of an update
            assert torch.allclose(mine[name], expected[name], atol=1e-4), name


def test_resume_from_real_to_simulated_ranks_and_back(simulated, tiny_data, tmp_path):
    args = [*RUN, *BLOCKS, f"--dataset={tiny_data}", "--out_dir=out"]
    assert torchrun(2, "train.py", *args, "--tp_processes=2", "--max_iters=5", cwd=tmp_path).code == 0
    assert torchrun(1, "train.py", *args, "--init_from=resume", cwd=tmp_path).code == 0
    assert losses(tmp_path / "out")[0] == pytest.approx(losses(simulated)[0], rel=2e-6)
    assert torchrun(2, "train.py", *args, "--tp_processes=2", "--init_from=resume", "--max_iters=12",
                    cwd=tmp_path).code == 0


def check_checkpoints(rank: int, world: int, folder: str) -> None:
    """Every variant at every tp_size on every number of processes gives the same checkpoint, and takes it."""
    pairs = [torch.distributed.new_group(pair) for pair in ([0, 1], [2, 3])]
    groups = {1: None, 2: pairs[rank // 2], 4: torch.distributed.group.WORLD}
    idx = tokens(2, 16)
    dense = dict(build(None, dtype=torch.float32).named_parameters())
    for kind, fields in VARIANTS.items():
        for R in (1,) if kind == "gpt" else (1, 2, 4):
            simulated = build(fields, R, torch.float32)
            expected = simulated(idx)[0]
            for P in (1, 2, 4):
                if R % P:
                    continue
                model = build(fields, R, torch.float32, seed=2)  # other weights
                load_parameters(model, dense, "the dense model")
                if P > 1:
                    model.place(Ranks(R // P, groups[P]))
                case = kind, R, P
                assert (model(idx)[0] - expected).abs().max() < 1e-5, case
                tensors = model.whole({name: p.detach() for name, p in model.named_parameters()})
                assert all(torch.equal(t, dense[name]) for name, t in tensors.items()), case
                assert len(tensors) == len(dense)


def test_checkpoints_fit_every_number_of_processes(tmp_path):
    run_processes(4, check_checkpoints, tmp_path, str(tmp_path))


def test_dropping_syncs_of_trained_weights(simulated, run_script, tiny_data, tmp_path):
    """Any run's weights, evaluated by each strategy: one line each with its val loss."""
    found = {}
    for strategy in ("standard", "spd", "grouped"):
        done = run_script("train_reduced_sync.py", *RUN, "--eval_only", f"--init_from={simulated}",
                          f"--sync_strategy={strategy}", "--tp_size=4", f"--dataset={tiny_data}")
        assert done.code == 0, done.err
        found[strategy] = float(done.out.splitlines()[-1].split("val loss ")[1])
    assert len(set(found.values())) == 3 and not (tmp_path / "out-reduced-sync").exists()


def test_sample_on_ranks(simulated, run_script, tmp_path):
    options = (f"--out_dir={simulated}", "--num_samples=1", "--max_new_tokens=30", "--device=cpu",
               "--temperature=0")
    plain = run_script("sample.py", *options, "--start=AD")
    real = torchrun(2, "sample.py", *options, "--start=AD", "--tp_processes=2", cwd=tmp_path)
    dropped = run_script("sample.py", *options, "--start=AD", "--tp_size=2", "--block_types=['parallel']*2")
    both = ("--sync_strategy=ladder", "--block_types=['spd']*2")
    refused = run_script("sample.py", *options, "--start=AD", *both)
    assert refused.code == 2 and "sync_strategy and block_types both name a schedule" in refused.err
    ladder = run_script("sample.py", *options, "--start=AD", *both[:1])
    assert ladder.code == 0 and "is run as 3 syncs on 4 ranks" in ladder.out, ladder.err
    assert plain.code == real.code == dropped.code == 0, plain.err + real.err + dropped.err
    assert plain.out.count("---------------") == real.out.count("---------------") == 1
    assert plain.out == real.out and "was trained as" not in plain.out
    assert "was trained as 2 syncs on 4 ranks and is run as 1 syncs on 2 ranks" in dropped.out


def test_bench_of_schedules(run_script, tmp_path):
    size = ["--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16",
            "--vocab_size=64", "--batch_size=2", "--steps=1", "--warmup=1", "--rounds=1"]
    done = run_script("bench.py", *size, "--model_type=distributed_gpt",
                      "--syncs=[4,2,1,'palm','caat:0.5']",
                      f"--json={tmp_path / 'b.json'}")
    assert done.code == 0, done.err
    names = ["ours", "4 syncs", "2 syncs", "1 syncs", "palm", "caat:0.5"]
    assert list(json.loads((tmp_path / "b.json").read_text())["contenders"]) == names
    done = run_script("bench.py", *size, "--mode=generate", "--prompt_tokens=2", "--max_new_tokens=4",
                      "--block_types=['spd']*2")
    assert done.code == 0 and "2 ranks, spd*2, 2 syncs / ours = " in done.out, done.err
    latency = ["--block_size=64", "--prompt_tokens=4", "--max_new_tokens=6", "--widths=[128]",
               "--batch_sizes=[1]"]
    for mode in ("decode", "prefill"):
        done = torchrun(2, "bench.py", *size, *latency, f"--mode={mode}", f"--json={tmp_path / 'l.json'}",
                        cwd=ROOT)
        assert done.code == 0, done.err
        rows = json.loads((tmp_path / "l.json").read_text())["rows"]
        assert [r["name"] for r in rows] == ["4 syncs", "2 syncs", "1 syncs", "0 syncs", "TP=1"]
        assert all(r["us"] > 0 for r in rows)


@pytest.mark.parametrize("args, words", [
    (["--tp_processes=2", "--model_type=gpt"],
     "tp_processes=2 cannot divide the dense model: use --model_type=distributed_gpt"),
    (["--tp_processes=2", *BLOCKS, "--tp_size=1"], "tp_processes=2 does not divide tp_size=1"),
    (["--tp_processes=3", *BLOCKS], "tp_processes=3 does not divide the number of processes, 2"),
    (["--tp_processes=2", *BLOCKS, "--dtype=float16"], "with use_fsdp or tp_processes use --dtype=bfloat16")],
    ids=lambda a: a if isinstance(a, str) else "")
def test_wrong_ranks(args, words, tiny_data, tmp_path):
    done = torchrun(2, "train.py", *RUN, *args, f"--dataset={tiny_data}", "--out_dir=out", cwd=tmp_path)
    lines = [line for line in done.err.splitlines() if line.startswith("error")]
    assert done.code != 0 and len(lines) == 1 and words in lines[0], done.err
    assert not (tmp_path / "out").exists()
