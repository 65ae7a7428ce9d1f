"""Helpers of all tests: small models, data sets and checkpoints, and scripts run as a user runs them."""

import ast
import atexit
import functools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import configurator
import kernels
import reduced_sync_model
import train_gpt
from kernels import fp8
from model import GPT, GPTConfig
from nanosync import checkpoint, checkpoint_writer, model_kind, random_states
from nanosync.errors import UserError
from nanosync.files import json_text
from nanosync.hellaswag_eval import Example
from nanosync.muon import build_muon
from nanosync.run_log import read_log
from nanosync.sync_schedule import Sublayer, SyncSchedule
from nanosync.tokenizers import GPT2Tokenizer
from nanosync.training_logger import TrainingLogger
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 1200.0  # seconds that a test waits for a process; a busy machine is many times slower
SHARED = ROOT.parent / "shared"

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
        """The losses of the `iter` lines, to four digits."""
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


FAST_SETTINGS = ["--device=cpu", "--compile=False", "--n_layer=4", "--n_head=2", "--n_embd=16",
                 "--sequence_length=32", "--stage_shares=[0.3,0.4,0.3]", "--batch_sizes=[2,4,4]",
                 "--short_windows=[4,8,16]", "--long_windows=[8,16,32]", "--stage_rates=[1.0,1.2,1.2]",
                 "--eval_windows=[16,32]", "--num_iterations=20", "--untie_at=0.5", "--val_loss_every=8",
                 "--val_tokens=320", "--cooldown_share=0.6", "--final_rate=0.15",
                 "--muon_learning_rate=0.023", "--muon_momentum=0.95", "--muon_momentum_warmup=10",
                 "--muon_beta2=0.9", "--muon_weight_decay=1.2", "--adam_learning_rate=0.008",
                 "--table_learning_rate=0.3", "--scalar_learning_rate=0.04"]  # of train_gpt_fast.py


def write_documents(folder: Path) -> Path:
    """A data set of 3000 train and 700 val tokens: noisy counters of letters, each after an end-of-text."""
    random = np.random.RandomState(5)
    tokens = (np.arange(3700) * 3 + random.randint(0, 2, 3700)) % 26
    tokens[random.rand(3700) < 0.05] = 26
    return write_dataset(folder, tokens[:3000], tokens[3000:], 27, end_of_text=26)


@functools.cache
def forking() -> multiprocessing.context.ForkServerContext:
    """Make processes within milliseconds; to import torch and this project takes about five seconds."""
    context, cwd = multiprocessing.get_context("forkserver"), os.getcwd()
    context.set_forkserver_preload(["preload"])
    os.chdir(ROOT / "tests")  # where the server finds the module
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(cwd)
    first = context.Process(target=_check_preload)  # the server itself ignores an ImportError
    first.start()
    first.join()
    assert first.exitcode == 0, "the fork server could not import tests/preload.py"
    return context


def _check_preload() -> None:
    os._exit("preload" not in sys.modules)


def _run_as_main(script: str, args: list[str], cwd: str, env: dict, out: str, err: str) -> int:
    """In a process that has imported the heavy modules, become `python script args`; the exit code."""
    _print_to(out, err)
    os.chdir(cwd)
    os.environ.update(env)
    sys.executable = env.get("TEST_PYTHON", sys.executable)
    sys.argv, sys.path[:0] = [script, *args], [os.path.dirname(script)]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        sys.stdout.flush()  # first what the script printed first
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


@functools.cache
def python_command() -> str:
    """Return an executable that stands for Python, and forks scripts from a process that has imported torch.

    python(script, TEST_PYTHON=python_command()) has the script start others by it.
    """
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    forking().Process(target=_serve_scripts, args=(str(folder / "socket"),), daemon=True).start()
    while not (folder / "socket").exists():
        time.sleep(0.01)
    stub = [sys.executable, "-IS", ROOT / "tests" / "forked_python.py", folder / "socket", sys.executable]
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.join(map(str, stub))} "$@"\n')
    (folder / "python").chmod(0o700)
    return str(folder / "python")


def _serve_scripts(path: str) -> None:
    """Run each script that forked_python.py asks for in a process of its own; answer with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                script, args, cwd, env, out, err = json.loads(connection.makefile().read())
                connection.sendall(str(_run_as_main(script, args, cwd, env, out, err)).encode())
                os._exit(0)
            connection.close()


class _Forked:
    """A worker, to its launcher, which knows how to handle a subprocess.Popen.

    No worker begins before all are forked. One that begins connects to the launcher's store, whose thread
    then takes locks of the C library, and a worker that is forked meanwhile would wait for them for ever.
    """

    gate = None  # pipe (read, write) that ends when the last worker is forked

    def __init__(self, script: str, args: list[str], cwd: str, env: dict, out: str, err: str):
        if env["LOCAL_RANK"] == "0":
            _Forked.gate = os.pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=self.run, args=(script, args, cwd, env, out, err))
        self.process.start()
        self.pid = self.process.pid
        os.setpgid(self.pid, self.pid)  # to which the launcher sends its signals
        if int(env["LOCAL_RANK"]) == int(env["LOCAL_WORLD_SIZE"]) - 1:
            for descriptor in _Forked.gate:
                os.close(descriptor)

    def run(self, *command) -> None:
        os.close(_Forked.gate[1])
        os.read(_Forked.gate[0], 1)
        os.close(_Forked.gate[0])
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


def python(script: str, *args: str, cwd: Path, timeout: float = PATIENCE, **env: str) -> Result:
    """Run a script of this repository in one process, which is forked from one that has imported torch."""
    return _finished(_script_process, timeout, str(ROOT / script), list(map(str, args)), str(cwd), env)


def _finished(body, timeout: float, *command) -> Result:
    """Run a function in a forked process, wait for it and its children, and return its Result."""
    with tempfile.TemporaryDirectory() as printed:
        out, err = Path(printed, "out"), Path(printed, "err")
        process = forking().Process(target=body, args=(*command, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.terminate()  # a launcher ends its workers
            process.join(PATIENCE)
            process.kill()
            raise AssertionError(f"{command[:3]} still ran after {timeout} s: {err.read_text()}")
        return Result(process.exitcode, out.read_text(), err.read_text())


def torchrun(n: int, script: str, *args: str, cwd: Path, launcher: tuple[str, ...] = ("--standalone",),
             timeout: float = PATIENCE, **env: str) -> Result:
    """Run a script of this repository in n processes under PyTorch's launcher, all of them forked likewise.

    The command itself, which imports for seconds in each of them, is in tests/processes/test_long_runs.py.
    """
    return _finished(_launcher_process, timeout, [*launcher, f"--nproc_per_node={n}"], str(ROOT / script),
                     list(map(str, args)), str(cwd), {**os.environ, "OMP_NUM_THREADS": "1", **env})


class Forked:
    """A script in one process, or in several under PyTorch's launcher, forked as by `python` and `torchrun`.

    The test can send signals to it. It has the methods of a subprocess.Popen that tests use.
    """

    def __init__(self, processes: int, script: str, args: list[str], output: str, env: dict[str, str],
                 launcher: tuple[str, ...] = ()):
        """Start. output: file to which stdout and stderr are appended; launcher: its further options."""
        command = (str(ROOT / script), list(map(str, args)), os.path.dirname(output))
        if processes == 1:
            self.process = forking().Process(target=_script_process, args=(*command, env, output, output))
        else:
            options = ["--standalone", f"--nproc_per_node={processes}", *launcher]
            env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
            self.process = forking().Process(target=_launcher_process,
                                             args=(options, *command, env, output, output))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode


def settings_error(script: str, *args: str) -> str | None:
    """Return what `configure` and a script's check_settings say of arguments, None if they accept them.

    Only the script's imports, its assignments before `configure` and its functions are executed, here.
    """
    path, kept, configured = ROOT / script, [], False
    for node in ast.parse(path.read_text()).body:
        configured |= any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node))
        definition = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        if definition or (not configured and isinstance(node, (ast.Assign, ast.AnnAssign))):
            kept.append(node)
    namespace, hook = {"__file__": str(path), "__name__": "settings"}, sys.excepthook
    try:
        exec(compile(ast.Module(kept, []), str(path), "exec"), namespace)
        config = configurator.configure(namespace, list(args))
        if "check_settings" in namespace:
            namespace["check_settings"](config)
    except UserError as error:
        return str(error)
    finally:
        sys.excepthook = hook
    return None


def reseal(folder: Path) -> None:
    """Write a checkpoint's manifest for the files as they are now."""
    manifest = {name: {"size": os.path.getsize(folder / name), "sha256": checkpoint.sha256_of(folder / name)}
                for name in checkpoint.FILES if (folder / name).is_file()}
    (folder / "MANIFEST.json").write_text(json_text(manifest))


def save_checkpoint(out_dir: Path, step: int, weights, keep: int = 10, best: bool = False, **state) -> str:
    """A checkpoint with the weights of a model, dense if `state` does not say otherwise; its folder."""
    numbers = random_states.random_states(torch.device("cpu"))
    tensors = {"model": {name: p.detach().clone() for name, p in weights.named_parameters()},
               "optim": {"a.exp_avg": torch.arange(3.0)},
               "rng": {f"0.{name}": t for name, t in numbers.items()}}
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
    """Skip the test where the files of GPT-2's tokenizer are not there."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's tokenizer files are not here")
    try:
        GPT2Tokenizer()
    except UserError as e:
        pytest.skip(str(e))


def _group_process(function, rank: int, world: int, folder: str, args: tuple) -> None:
    """Body of one process of run_processes: join a gloo group, call the function, note what it raised."""
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


def run_processes(world: int, function, folder: Path, *args, timeout: float = PATIENCE) -> None:
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
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes of the processes: {codes}"  # -11: ended by signal 11


def save_random_model(out_dir, step, keep=10, model=None, best=False, **state):
    model = random_model(torch.float32) if model is None else model
    return save_checkpoint(out_dir, step, model, keep, best, **state)


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    with open(path, "wb") as f:
        header.tofile(f)
        np.asarray(tokens, "<u2").tofile(f)


def losses_and_norms(out_dir):
    """Read the loss of each iteration, and (train, val) of each evaluation, in full precision."""
    events = [json.loads(line) for line in sorted(out_dir.glob("run_*.jsonl"))[-1].read_text().splitlines()]
    return ([e["loss"] for e in events if e["event"] == "iter"],
            [loss for e in events if e["event"] == "eval" for loss in (e["train_loss"], e["val_loss"])],
            [e["norm"] for e in events if e["event"] == "iter"])


def compare_with_uncached(model, decoder, idx, steps, slide=1):
    """The largest difference between the decoder's logits and the model's on the same window, at any step."""
    T, block_size = idx.shape[1], model.config.block_size
    worst, length = 0.0, min(T, block_size)
    for all_tokens, n in decoder.run(idx, steps):
        window = all_tokens[:, n - length:n]
        expected = model(window)[0][:, -1]
        worst = max(worst, (decoder.logits - expected).abs().max().item())
        length = length + 1 if length < block_size else block_size - slide + 1
    return worst


MODEL_KINDS = [None, dict(block_types=["tp", "spd", "parallel", "parallel"]),
               dict(sync_strategy="grouped", layers_per_group=2)]

HELLASWAG_RECORDS = [
    {"ind": 24, "ctx": "A man is sitting on a roof. he", "label": 3, "split": "val",
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."]},
    {"ctx": "Zwölf Boxkämpfer\u2028jagen", "label": 0, "endings": ["Viktor.", "", "<|endoftext|>", "\ud800"]},
    {"ctx": "x " * 40, "label": 1, "endings": ["a b c d e f", "y", "x x", "12 34 56 78"]},
    {"ctx": "[header] How to knit [title] Buy needles.", "label": 2,
     "endings": ["Sit.", "Go.", "Knit!", "Eat"]},
]


def random_hellaswag(n: int, vocab_size: int = 61, longest: int = 40) -> list[Example]:
    """Contexts of 1 to `longest` tokens and endings of 1 to 12."""
    random = np.random.RandomState(3)

    def draw(high):
        return random.randint(0, vocab_size, random.randint(1, high + 1)).astype(np.uint16)

    return [Example(draw(longest), tuple(draw(12) for _ in range(4)), random.randint(4)) for _ in range(n)]


def write_lines(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    kernels.triton is None or (KERNEL_DEVICE == "cpu" and not kernels.INTERPRETED),
    reason="no Triton, or neither a CUDA GPU nor TRITON_INTERPRET=1")


@functools.cache
def runs_fp8_products() -> bool:
    """Return True if torch._scaled_mm takes scales of rows: a GPU since Hopper, a CPU after PyTorch 2.11."""
    if KERNEL_DEVICE == "cuda":
        return torch.cuda.get_device_capability()[0] >= 9
    a = fp8.cast(torch.ones(16, 16), fp8.E4M3)
    try:
        fp8.product(a, a, None, torch.bfloat16, False, False)
    except RuntimeError:
        return False
    return True


SMALL = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32)


def reference_cross_entropy(x, weight, targets, softcap=None, target_weights=None, ignore_index=-1):
    """Return linear_cross_entropy in plain PyTorch, a term at a time. targets: (B, T)."""
    z = x @ weight.T
    if softcap is not None:
        cap, scale, shift = softcap
        z = cap * torch.sigmoid((z + shift) / scale)
    logs = z.log_softmax(dim=1).view(*targets.shape, -1)
    total, rows = 0.0, 0
    for log, sequence in zip(logs, targets.tolist()):
        for i in range(len(sequence)):
            if sequence[i] == ignore_index:
                continue
            rows += 1
            for w, target in zip([1.0] if target_weights is None else target_weights.tolist(), sequence[i:]):
                total -= 0 if target == ignore_index else w * log[i, target]
    return total / rows


def random_model(dtype=torch.float64, **changes) -> GPT:
    """A model none of whose parameters is zero or one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(SMALL | changes))).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape, vocab_size=61, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


MUON_MODEL = dict(n_layer=3, n_head=4, n_embd=32)
MUON_LAYERS = 3


def muon_model(group=None, sum_gradients=False, dtype=torch.float32, **options):
    model = random_model(dtype, **MUON_MODEL)
    settings = dict(learning_rate=1e-2, muon_learning_rate=2e-2, betas=(0.9, 0.95), weight_decay=0.1,
                    momentum=0.95) | options
    return model, build_muon(model, **settings, group=group, sum_gradients=sum_gradients)


def muon_gradients(model, it, rank=0, processes=1) -> None:
    """This process's share of the gradient of 4 sequences' mean loss."""
    for i in range(rank, 4, processes):
        loss = model(tokens(1, 16, seed=4 * it + i), tokens(1, 16, seed=1000 + 4 * it + i))[1]
        (loss / 4).backward()


def muon_step(model, optimizer, it) -> None:
    muon_gradients(model, it)
    optimizer.step()
    optimizer.zero_grad()


def largest_distance(model, other) -> float:
    pairs = zip(model.parameters(), other.parameters())
    return max((p - q).abs().max().item() for p, q in pairs)


MODEL_VARIANTS = {"gpt": None, "distributed_gpt": dict(block_types=["tp", "spd", "parallel", "parallel"]),
                  "reduced_sync_gpt": dict(sync_strategy="grouped", layers_per_group=2)}


N_LAYER = 4
ARCHITECTURE = dict(block_size=16, vocab_size=61, n_layer=N_LAYER, n_head=12, n_embd=48, bias=True)
EXACT = 1e-12  # fp64 sums of at most some thousand terms of size one, in another order

BLOCKS = [["tp"] * N_LAYER, ["spd"] * N_LAYER, ["parallel"] * N_LAYER, ["tp", "spd", "parallel", "parallel"],
          ["spd", "parallel", "spd", "parallel"], ["parallel", "tp", "parallel", "spd"]]
STRATEGIES = [dict(sync_strategy="standard"), dict(sync_strategy="spd"),
              dict(sync_strategy="selective", attn_sync_layers=[0]),
              dict(sync_strategy="selective", attn_sync_layers=[1, 3]),
              dict(sync_strategy="grouped", layers_per_group=2),
              dict(sync_strategy="grouped", layers_per_group=4),
              dict(sync_strategy="custom", sync_points=[]), dict(sync_strategy="custom", sync_points=[0]),
              dict(sync_strategy="custom", sync_points=[1, 4]),
              dict(sync_strategy="custom", sync_points=[2, 3, 6, 7])]
SCHEDULES = [dict(block_types=b) for b in BLOCKS] + STRATEGIES
SYNCS = [8, 4, 1, 4, 4, 5, 8, 4, 5, 6, 2, 1, 1, 2, 3, 4]  # of SCHEDULES, counted by hand
FAMILY = {"palm": 4, "ladder": 7, "kraken": 4, "dtp:1": 7, "dtp:2": 6, "dtp:3": 5, "mean:1": 4, "mean:2": 2,
          "caat:0.5": 8, "caat:0.25": 8}  # strategies whose schedules are not plain, with their syncs


def random_schedule(number: int, sublayers: int = 2 * N_LAYER) -> SyncSchedule:
    """A schedule of the whole family."""
    choose = random.Random(number)
    return SyncSchedule(tuple(Sublayer(choose.random() < 0.6, choose.choice([0, 0, 1, 2, 5]),
                                       choose.choice([0.0, 1.0, 1.0, 2.5])) for _ in range(sublayers)),
                        channels=choose.choice([1.0, 1.0, 0.5, 0.01]))


def build(schedule: dict | None, tp_size: int = 1, dtype=torch.float64, seed=1, **changes):
    """A model whose parameters, biases and LayerNorms too, are random and the same for every schedule."""
    torch.manual_seed(seed)
    architecture = ARCHITECTURE | changes
    if schedule is None:
        model = GPT(GPTConfig(**architecture))
    elif "block_types" in schedule:
        model = DistributedGPT(DistributedGPTConfig(**architecture, tp_size=tp_size, **schedule))
    else:
        model = reduced_sync_model.GPT(reduced_sync_model.GPTConfig(**architecture, tp_size=tp_size,
                                                                    **schedule))
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


# Generation: each rank's cache, step by step, against the model without one


def compare_decoder(model, decoder, prompt, n: int) -> float:
    """The largest difference of the decoder's logits from those of the model on all that came before."""
    worst, V = 0.0, model.config.used_vocab_size
    for all_tokens, at in decoder.run(prompt, n):
        window = all_tokens[:, :at][:, -model.config.block_size:]
        with torch.no_grad():
            expected = model(window)[0][:, 0]
        worst = max(worst, (decoder.logits[:, :V] - expected[:, :V]).abs().max().item())
    return worst


def events(out_dir, kind):
    """Read the events of a kind from the newest JSON Lines file."""
    file = sorted(out_dir.glob("run_*.jsonl"))[-1]
    return [e for e in map(json.loads, file.read_text().splitlines()) if e["event"] == kind]


def random_speedrun_model(variant="baseline", dtype=torch.float64, **changes):
    """A model of which no parameter is zero."""
    shape = dict(sequence_length=32, vocab_size=61, n_layer=3, n_head=2, n_embd=16, variant=variant) | changes
    torch.manual_seed(0)
    model = train_gpt.VARIANTS[variant][0](train_gpt.GPTConfig(**shape)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def logged_events(folder):
    """The events of the only log in a folder."""
    log, = folder.glob("run_*.jsonl")
    text = log.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def event_steps(events, *kinds):
    return [(e["event"], e["step"]) for e in events if e["event"] in (kinds or ("iter", "eval", "checkpoint",
            "hellaswag", "sample", "end"))]


def log_a_run(folder, first, last, resumed=None, evaluated=True, closed=True, config=(), **options):
    """Log a run that evaluates and then saves every 4 steps; return its log if it is not closed."""
    log = TrainingLogger()
    log.open_files(str(folder), dict(config), {}, resumed_step=resumed, evaluated=evaluated, **options)
    for step in range(first, last + 1):
        if step % 4 == 0 and not (step == resumed and evaluated):
            log.evaluation(step, 3.0, 4.0 - step / 10, 1e-3)
            log.hellaswag(step, 0.25, 0.3, 10)
            log.sample(step, f"text of\nstep {step}")
            log.checkpoint(step, f"step-{step}", 4.0 - step / 10, 0.5)
        if step < last:
            log.iteration(step, 4.0 - step / 10, 1e-3, 0.5, 0.25, 1000, None, 0, memory=2**31)
    if not closed:
        return log
    log.close(status="finished", step=last, best_val_loss=4.0 - last / 10)


def wandb_run(folder, first, last, resumed=None, mode="online"):
    log = TrainingLogger()
    log.start_wandb("project", "name", {"lr": 1.0}, str(folder), mode, resumed=resumed is not None)
    log.open_files(str(folder), {}, {}, resumed_step=resumed, evaluated=False)
    for step in range(first, last):
        log.evaluation(step, 3.0, 4.0, 1e-3)
        log.iteration(step, math.nan, 1e-3, 0.5, 0.25, 1000, None, 0)
    log.close(status="finished", step=last, best_val_loss=4.0)


def write_log(path, *events: dict, rest: str = ""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events) + rest)
    return path


def losses(out_dir: Path) -> dict[int, float]:
    """Loss of each update, to the last bit; a step that is there twice would be an error."""
    try:
        events = [e for e in read_log(str(out_dir)) if e["event"] == "iter"]
    except ValueError:
        return {}
    found = {e["step"]: e["loss"] for e in events}
    assert len(found) == len(events), "a step is in the log twice"
    return found


def newest(out_dir: Path) -> dict:
    """Step and digests of weights, moments and random states of the newest checkpoint that verifies."""
    found = checkpoint.find(str(out_dir), warn=lambda text: None)
    manifest = json.loads(Path(found.path, "MANIFEST.json").read_text())
    digests = {name: manifest[f"{name}.safetensors"]["sha256"] for name in ("model", "optim", "rng")}
    return {"step": found.step} | digests
