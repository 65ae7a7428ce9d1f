"""--diagnose on several processes: collectives in the table, one trace. CPU, gloo; seconds.

    python -m pytest tests/processes/test_diagnose_processes.py
"""

import gzip
import json

from helpers import torchrun

from nanosync.step_profile import EXPOSED, profile_of

SLOW_RANK = """
import itertools, os, time
from nanosync.parallelism import Parallelism
_clip, _calls = Parallelism.clip, itertools.count()
def _slow(self, *arguments):
    if next(_calls) >= 9 and os.environ["RANK"] == "1":
        time.sleep(0.5)  # rank 0, which is profiled, waits
    return _clip(self, *arguments)
Parallelism.clip = _slow
"""


def test_collectives_of_two_tp_ranks(tiny_data, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_RANK)
    done = torchrun(2, "train_reduced_sync.py", "slow.py", "--device=cpu", "--compile=False", "--n_layer=2",
                    "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2",
                    "--gradient_accumulation_steps=1", "--tp_processes=2", f"--dataset={tiny_data}",
                    "--out_dir=out", "--diagnose=3", cwd=tmp_path)
    assert done.code == 0, done.err
    path, = (tmp_path / "out").iterdir()
    found = profile_of(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
    assert found.steps == 3 and found.seconds[EXPOSED] > 0
    assert done.out.count("where a step's time goes") == 1
    assert "a --sync_strategy with fewer syncs" in done.out
