"""Data parallel on real processes (gloo): 1, 2, 4, 8, and two nodes on loopback. CPU; a minute.

    python -m pytest tests/processes/test_distributed.py
"""

import contextlib
import random
import socket
import threading

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, run_processes, torchrun
from helpers import losses_and_norms as losses
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.collectives import functional_all_gather
from nanosync import checkpoint
from nanosync.distributed import begin_all_gather, check_same_settings, finish_tensor
from nanosync.errors import UserError
from nanosync.sharding import whole_tensor

# 16 sequences an update, however they are divided; evaluation windows that no number of ranks divides
RUN = [*TINY, "--batch_size=2", "--gradient_accumulation_steps=8", "--max_iters=20", "--learning_rate=1e-2",
       "--eval_interval=10", "--eval_iters=13", "--bias=True"]


@pytest.fixture(scope="module")
def single(tiny_data, tmp_path_factory):
    """The run on one process."""
    folder = tmp_path_factory.mktemp("single")
    done = torchrun(1, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=out", cwd=folder)
    assert done.code == 0, done.err
    return losses(folder / "out")


def assert_equal_run(out_dir, single):
    """1e-6 relative: fp32 sums over 16 sequences in another order, through 20 updates."""
    for mine, expected in zip(losses(out_dir), single):
        assert mine == pytest.approx(expected, rel=1e-6) and len(mine) == len(expected) > 5


@pytest.mark.parametrize("n", [2, 4])
def test_same_losses_on_more_processes(n, single, tiny_data, tmp_path):
    done = torchrun(n, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"2 sequences x 16 tokens x {8 // n} accumulation x {n} DDP ranks = 256" in done.out
    assert done.out.count("step 10:") == 1  # one process prints
    assert_equal_run(tmp_path / "out", single)
    found = checkpoint.find(str(tmp_path / "out"))
    assert {name.split(".")[0] for name in found.tensors("rng")} == set(map(str, range(n)))


def free_port() -> int:
    """Return a port below those that the system gives to connections, which could take it before torchrun."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def test_two_nodes(single, tiny_data, tmp_path):
    """Two launchers of one process each, as on two machines, which meet at 127.0.0.1."""
    port = free_port()
    results = [None, None]

    def node(rank):
        launcher = ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}")
        results[rank] = torchrun(1, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=out", cwd=tmp_path,
                                 launcher=launcher)

    threads = [threading.Thread(target=node, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.code for r in results] == [0, 0], results
    assert "step 10:" in results[0].out and "step 10:" not in results[1].out
    assert_equal_run(tmp_path / "out", single)


def test_eight_processes_start_train_and_leave(tiny_data, tmp_path):
    done = torchrun(8, "train.py", *RUN, f"--dataset={tiny_data}", "--max_iters=2", "--out_dir=out",
                    cwd=tmp_path)
    assert done.code == 0 and "x 8 DDP ranks = 256" in done.out, done.err


def lines_with(words: str, err: str) -> int:
    """How many lines of a process say it; torchrun's report repeats one of them."""
    return sum(line.startswith("error") and words in line for line in err.splitlines())


@pytest.mark.parametrize("arg, words", [
    ("--gradient_accumulation_steps=3", "must be a multiple of their number, 2"),
    ("--out_dir=file", "out_dir='file': cannot write in file"),
    ("--init_from=resume", "no checkpoint in out"),
])
def test_a_users_error_is_said_once(tiny_data, tmp_path, arg, words):
    if arg == "--backend=mpi" and torch.distributed.is_mpi_available():
        pytest.skip("this PyTorch has MPI")
    (tmp_path / "file").touch()
    done = torchrun(2, "train.py", *RUN, f"--dataset={tiny_data}", "--out_dir=out", arg, cwd=tmp_path)
    assert done.code != 0 and lines_with(words, done.err) == 1, done.err
    assert "error on rank" not in done.err and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_settings_that_differ_between_processes_are_one_error(tiny_data, tmp_path):
    """As when the command is typed on two machines: here a config file asks for the rank."""
    (tmp_path / "rate.py").write_text("import os\nlearning_rate = 1e-3 * 10 ** int(os.environ['RANK'])\n")
    run = [arg for arg in RUN if not arg.startswith("--learning_rate")]
    done = torchrun(2, "train.py", *run, f"--dataset={tiny_data}", "--out_dir=out", "rate.py", cwd=tmp_path)
    words = "learning_rate is 0.001 on rank 0 and 0.01 on rank 1: use the same command"
    assert done.code != 0 and lines_with(words, done.err) == 1 and not (tmp_path / "out").exists(), done.err


SAME = dict(device="cuda", lr=1e-3, compile=True, names=None)
DIFFERENT = [(dict(SAME, lr=1e-2), "lr is 0.001 on rank 0 and 0.01 on rank 2"),
             (dict(SAME, compile=1), "compile is True on rank 0 and 1 on rank 2"),
             (dict(SAME, device="cpu:1"), "device is 'cuda' on rank 0 and 'cpu' on rank 2"),
             (dict(SAME, names=["a"], lr=2.0), "lr is 0.001 on rank 0 and 2.0 on rank 2"),
             (dict(SAME, more=1), "more is not a setting on rank 0 and 1 on rank 2"),
             ({"device": "cuda"}, "lr is 0.001 on rank 0 and not a setting on rank 2")]


def compare_settings(rank, world):
    check_same_settings(dict(SAME, device=f"cuda:{rank}"), dist.group.WORLD)
    for settings, words in DIFFERENT:
        with pytest.raises(UserError, match=f"^{words}: use the same"):
            check_same_settings(settings if rank == 2 else SAME, dist.group.WORLD)


def test_first_setting_that_differs_is_named_on_all_processes(tmp_path):
    run_processes(3, compare_settings, tmp_path)


class Issued(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


def gather(rank, world):
    x, group = torch.arange(4.0), dist.group.WORLD
    part, whole = x.chunk(world)[rank], x.view(world, -1)
    learned = torch.nn.Parameter(part)
    sharded = DTensor.from_local(part, DeviceMesh.from_group(group, "cpu"), [Shard(0)], run_check=False)
    with Issued() as issued:
        assert torch.equal(whole_tensor(sharded), x)
        assert torch.equal(functional_all_gather(learned, world, group.group_name), whole)
        assert torch.equal(finish_tensor(begin_all_gather(part, group)), x)
    gathers = {name for name in issued.names if "gather" in name}
    assert gathers == {"_c10d_functional.all_gather_into_tensor_out"}, gathers


def test_gathers_avoid_the_operator_that_corrupts_the_heap(tmp_path):
    """On gloo, all_gather_into_tensor does, see kernels/collectives.py."""
    run_processes(2, gather, tmp_path)


def test_rank_0_decides_what_is_resumed(tiny_data, tmp_path):
    """The newest checkpoint is damaged: one warning, and both processes go on from the one before."""
    args = [*RUN, f"--dataset={tiny_data}", "--out_dir=out", "--eval_interval=2"]
    assert torchrun(2, "train.py", *args, "--max_iters=4", cwd=tmp_path).code == 0
    model = tmp_path / "out" / "ckpt" / "step-00000004" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    done = torchrun(2, "train.py", *args, "--max_iters=6", "--init_from=resume", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count("warning: ") == 1 and "iter 2:" in done.out and "iter 1:" not in done.out
    assert "warning: checkpoint out/ckpt/step-00000004 cannot" in (tmp_path / "out" / "log.txt").read_text()
    assert checkpoint.verify(str(model.parent)) is None  # saved again, whole
