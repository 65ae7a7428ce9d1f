"""What tests share: small data sets, and running the scripts as a user does, in processes of their own."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Models here are tiny, and threads that wait for each other on busy cores cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4", "--device=cpu",
        "--gradient_accumulation_steps=1", "--compile=False", "--eval_iters=2", "--eval_interval=1000",
        "--warmup_iters=2", "--lr_decay_iters=50"]

NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass
class Result:
    """How a script ended."""

    code: int
    out: str
    err: str

    @property
    def losses(self) -> list[float]:
        """Of the `iter` lines, to four digits."""
        return [float(line.split("loss ")[1].split(",")[0]) for line in self.out.splitlines()
                if line.startswith("iter ")]


def write_dataset(folder: Path, train: np.ndarray, val: np.ndarray, vocab_size: int, **meta) -> Path:
    """A flat data set with a meta.json that knows only its vocabulary."""
    folder.mkdir(parents=True)
    train.astype("<u2").tofile(folder / "train.bin")
    val.astype("<u2").tofile(folder / "val.bin")
    chars = "".join(map(chr, range(ord("A"), ord("A") + vocab_size)))
    description = {"vocab_size": vocab_size, "tokenizer": "char", "chars": chars, "dtype": "uint16", **meta}
    (folder / "meta.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """3000 train and 700 val tokens of 26 letters that are predictable in part: a noisy counter."""
    random = np.random.RandomState(7)
    tokens = (np.arange(3700) * 3 + random.randint(0, 2, 3700)) % 26
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", tokens[:3000], tokens[3000:], 26)


# Imported once, in the server that most processes of tests are forked from
PRELOAD = ["pytest", "torch", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp",
           "safetensors.torch", "models", "nanosync.training_setup", "nanosync.step_clock"]


def forking() -> multiprocessing.context.ForkServerContext:
    """Makes processes within milliseconds; to import torch and this project takes about five seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _run_as_main(script: str, args: list[str], cwd: str, env: dict, out: str, err: str) -> int:
    """In a process that has imported the heavy modules, become `python script args`; the exit code."""
    _print_to(out, err)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv, sys.path[:0] = [script, *args], [os.path.dirname(script)]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _print_to(out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _script_process(*command) -> None:
    os._exit(_run_as_main(*command))


class _Forked:
    """A worker, to its launcher, which knows how to handle a subprocess.Popen."""

    def __init__(self, *command):
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=command)
        self.process.start()
        self.pid = self.process.pid
        os.setpgid(self.pid, self.pid)  # to which the launcher sends its signals

    def run(self, *command) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # which are the launcher's so far
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(_run_as_main(*command))

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)


def _launcher_process(options: list[str], script: str, args: list[str], cwd: str, env: dict, out: str,
                      err: str) -> None:
    """torchrun, which forks itself where it would start a command."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    _print_to(out, err)
    os.environ.update(env)
    SubprocessHandler._popen = lambda _, command, environment: _Forked(
        script, args, cwd, environment, out, err)
    run.main([*options, "--", script])


def python(script: str, *args: str, cwd: Path, timeout: float = 300, **env: str) -> Result:
    """Run a script of this repository in one process, which is forked from one that has imported torch."""
    return _finished(_script_process, timeout, str(ROOT / script), list(map(str, args)), str(cwd), env)


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.py", *args, cwd=..., ENV=...) -> Result, as `python`; cwd is tmp_path by default."""

    def run(script: str, *args: str, cwd: Path = tmp_path, **options) -> Result:
        return python(script, *args, cwd=cwd, **options)

    return run


def _finished(body, timeout: float, *command) -> Result:
    """Of a process and those that it has forked."""
    with tempfile.TemporaryDirectory() as printed:
        out, err = Path(printed, "out"), Path(printed, "err")
        process = forking().Process(target=body, args=(*command, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.terminate()  # a launcher ends its workers
            process.join(60)
            process.kill()
            raise AssertionError(f"{command[:3]} still ran after {timeout} s: {err.read_text()}")
        return Result(process.exitcode, out.read_text(), err.read_text())


def torchrun(n: int, script: str, *args: str, cwd: Path, launcher: tuple[str, ...] = ("--standalone",),
             timeout: float = 300, **env: str) -> Result:
    """Run a script of this repository in n processes under PyTorch's launcher, all of them forked likewise.

    The command itself, which imports for seconds in each of them, is in tests/test_long_runs.py.
    """
    return _finished(_launcher_process, timeout, [*launcher, f"--nproc_per_node={n}"], str(ROOT / script),
                     list(map(str, args)), str(cwd), {**os.environ, "OMP_NUM_THREADS": "1", **env})


def save_checkpoint(out_dir: Path, step: int, weights, keep: int = 10, best: bool = False, **state) -> str:
    """A checkpoint with the weights of a model, dense if `state` does not say otherwise; its folder."""
    import torch

    from nanosync import checkpoint_writer, model_kind, random_states

    tensors = {"model": {name: p.detach().clone() for name, p in weights.named_parameters()},
               "optim": {"a.exp_avg": torch.arange(3.0)},
               "rng": {f"0.{name}": t for name, t in random_states.random_states(torch.device("cpu")).items()}}
    state = {"sample": 0, "epoch": 0, "seed": 1, "world_size": 1, "evaluated": True, "val_loss": None,
             "best_val_loss": None, "scaler": {}, "data": {}, "meta": None, "config": {},
             "model": model_kind.model_description("gpt", weights), **state}
    return checkpoint_writer.save(str(out_dir), step, tensors, state, keep, best=best)


def tinyshakespeare() -> Path:
    """The text, where it is there; else the test is skipped."""
    path = SHARED / "data" / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def needs_gpt2_tokenizer() -> None:
    from nanosync.errors import UserError
    from nanosync.tokenizers import GPT2Tokenizer

    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's tokenizer files are not here")
    try:
        GPT2Tokenizer()
    except UserError as e:
        pytest.skip(str(e))


def _group_process(function, rank: int, world: int, folder: str, args: tuple) -> None:
    """Body of one process of run_processes: join a gloo group, call the function, note what it raised."""
    import traceback

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    problem = ""
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        function(rank, world, *args)
        dist.barrier()
    except BaseException:
        problem = traceback.format_exc()
    Path(folder, f"rank{rank}.txt").write_text(problem)
    os._exit(1 if problem else 0)


def run_processes(world: int, function, folder: Path, *args, timeout: float = 300) -> None:
    """Call function(rank, world, *args) in real processes of a gloo group; fail with what any of them raised.

    They are forked from a server that has imported torch, which saves the seconds that a launch costs.
    """
    context = forking()
    processes = [context.Process(target=_group_process, args=(function, rank, world, str(folder), args))
                 for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    problems = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    problems = [f"rank {i}:\n{text}" for i, text in enumerate(problems) if text]
    assert not problems, "\n".join(problems)
    assert not hanging, f"{len(hanging)} of {world} processes still ran after {timeout} s"
