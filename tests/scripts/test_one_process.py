"""Sharding and Triton where there is one process and no GPU: a plain run that says so. CPU; seconds.

    python -m pytest tests/scripts/test_one_process.py
"""

import pytest
from helpers import TINY


@pytest.mark.parametrize("script", ["train.py", "train_reduced_sync.py"])
def test_one_process_is_plain(script, run_script, tiny_data, tmp_path):
    args = [*TINY, f"--dataset={tiny_data}", "--max_iters=1"]
    plain = run_script(script, *args, "--out_dir=plain")
    for option, says in (("--use_zero1", "Using ZeRO-1 optimizer state sharding"),
                         ("--use_fsdp", "Wrapping model with FSDP...")):
        done = run_script(script, *args, option, "--out_dir=out")
        assert done.code == 0 and f"{says}: one data-parallel process keeps it all" in done.out, done.err
        assert done.losses == plain.losses
    assert "riton" not in plain.out.replace("use_triton ", "")  # auto: off, and silent
    done = run_script(script, *args, "--use_triton", "auto", "--out_dir=out")
    assert done.code == 0 and done.losses == plain.losses
    assert run_script(script, *args, "--use_triton=maybe").code == 2
    done = run_script(script, *args, "--use_triton", "--out_dir=out")
    assert "use_triton: no Triton kernels on cpu here, using PyTorch's LayerNorm\n" in done.out
    assert done.losses == plain.losses
    assert run_script(script, *args, "--use_zero1=2").code == 2
