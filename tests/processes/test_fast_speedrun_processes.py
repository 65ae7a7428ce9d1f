"""train_gpt_fast.py on 1, 2 and 4 processes with the same tokens a step: losses, weights, replicas, resume on
another number of processes. CPU, real gloo processes.

    python -m pytest tests/processes/test_fast_speedrun_processes.py
"""

import pytest
from helpers import FAST_SETTINGS, losses, torchrun, write_documents
from safetensors.torch import load_file

# A run in fp64, because in fp32 NorMuon and Adam enlarge the rounding of sums in another order. The state of
# embedding, head and tables is sharded by rows, as for a real vocabulary, unless tables are lazy. At the end
# each process notes a digest of its weights, and of the steps of lazy rows.
EXACT = """import hashlib

import torch

from nanosync.muon import Muon
from nanosync.run import Run

torch.set_default_dtype(torch.float64)
_init, _end = Muon.__init__, Run.end


def _sharded(optimizer, *args, **options):
    _init(optimizer, *args, **options | {"shard_rows_from": 100})


def _note(run, *notes):
    model, optimizer = run.model, run.optimizer
    sharded = {name for name, p in model.named_parameters() if optimizer.rows_of(p) is not None}
    if run.processes.world_size > 1:
        assert "lm_head.weight" in sharded
        assert ({"values.0", "pairs", "triples"} <= sharded) != run.config["lazy_tables"]
    state = [optimizer.state[model.pairs]["last_step"]] if run.config["lazy_tables"] else []
    digest = hashlib.sha256()
    for p in [*model.parameters(), *state]:
        digest.update(p.detach().numpy().tobytes())
    with open(f"{run.config['out_dir']}/weights{run.processes.rank}", "w") as f:
        f.write(digest.hexdigest())
    _end(run, *notes)


Muon.__init__, Run.end = _sharded, _note
"""


def end_of(out_dir, which: str) -> dict:
    return load_file(out_dir / "ckpt" / "step-00000020" / f"{which}.safetensors")


def difference(first, second) -> float:
    """Return the largest relative difference of the losses, and of weights and moments of the last step."""
    a, b = losses(first), losses(second)
    found = [abs(a[step] - b[step]) / a[step] for step in a.keys() & b.keys()]
    for which in ("model", "optim"):
        x, y = end_of(first, which), end_of(second, which)
        assert sorted(x) == sorted(y)
        found += [((x[name] - y[name]).abs().max() / x[name].abs().max().clamp(min=1e-12)).item()
                  for name in x]
    return max(found)


@pytest.mark.parametrize("lazy", [False, True])
def test_any_number_of_processes(lazy, run_script, tmp_path):
    """1 and 2 from the start; 4 and again 1 from checkpoints of another number, before the head is untied.
    With lazy tables, 1 and 4 from the start, 1 from a checkpoint of 4; test_row_sum.py has sums of 2."""
    (tmp_path / "exact.py").write_text(EXACT)
    args = ["exact.py", *FAST_SETTINGS, f"--dataset={write_documents(tmp_path / 'data')}",
            "--batch_sizes=[4,8,8]", "--checkpoint_interval=8", "--keep_checkpoints=9",
            "--suffix_match=True", "--trigram=True", f"--lazy_tables={lazy}"]
    one = tmp_path / "one"
    assert (done := run_script("train_gpt_fast.py", *args, f"--out_dir={one}")).code == 0, done.err
    arms = ((4, "four", ""), (1, "again", "four/ckpt/step-00000008")) if lazy else \
        ((2, "two", ""), (4, "four", "one/ckpt/step-00000008"), (1, "again", "two/ckpt/step-00000008"))
    for n, name, resume in arms:
        out = tmp_path / name
        command = ["train_gpt_fast.py", *args, f"--out_dir={out}", f"--resume={resume}"]
        done = run_script(*command) if n == 1 else torchrun(n, *command, cwd=tmp_path)
        assert done.code == 0, (name, done.err)
        assert sorted(losses(out)) == list(range(8 if resume else 0, 20)), name
        assert len({(out / f"weights{rank}").read_text() for rank in range(n)}) == 1, name
        # found: 1e-14; some 1000 terms of size 1 in another order
        assert difference(one, out) < 1e-11, name
