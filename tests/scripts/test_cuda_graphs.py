"""Training with --cuda_graphs, on a GPU; minutes, most of them torch.compile's.

    python -m pytest tests/scripts/test_cuda_graphs.py

tests/scripts/test_errors.py has the refusals.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import PATIENCE, ROOT, TINY, losses_and_norms, runs_fp8_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("script, options", [
    ("train.py", ["--gradient_accumulation_steps=3", "--optimizer=muon"]),
    pytest.param("train.py", ["--fp8"], marks=pytest.mark.skipif(
        not runs_fp8_products(), reason="FP8 needs a Hopper GPU")),
    ("train_reduced_sync.py", ["--gradient_accumulation_steps=2", "--activation_checkpointing=block"]),
])
def test_losses_and_resume(tiny_data, tmp_path, script, options):
    """Losses are those without graphs, as exactly as two compilations compute. There are evaluations in
    between, and several micro-steps. A resumed run repeats the losses to the bit. PyTorch says where it
    leaves graphs out."""

    def train(out: str, *more: str) -> tuple:
        done = subprocess.run(  # a process that forks, as run_script's, cannot use CUDA
            [sys.executable, ROOT / script, *TINY, "--device=cuda", "--compile=True",
             f"--dataset={tiny_data}", f"--out_dir={tmp_path / out}", "--eval_interval=4", "--log_interval=1",
             "--deterministic", *options, *more], cwd=tmp_path, capture_output=True, text=True,
            timeout=PATIENCE, env=os.environ | {"TORCH_LOGS": "perf_hints"})
        assert done.returncode == 0 and "skipping cudagraphs" not in done.stderr, done.stderr
        return losses_and_norms(tmp_path / out)

    plain = train("plain", "--max_iters=12")
    graphs = train("graphs", "--max_iters=12", "--cuda_graphs")
    assert [len(found) for found in graphs] == [12, 8, 12]
    for found, expected in zip(graphs[:2], plain):
        assert found == pytest.approx(expected, rel=0.01)
    train("resumed", "--max_iters=8", "--cuda_graphs")
    losses, _, norms = train("resumed", "--max_iters=12", "--cuda_graphs", "--init_from=resume")
    assert (losses, norms) == (graphs[0], graphs[2])
