"""batch_size=auto: the search, the numbers that it sets, resuming, wrong settings. CPU; a second.

    python -m pytest tests/unit/test_batch_size.py

The memory is a function here; on a GPU it is measured.
"""

import contextlib
import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, settings_error

from configurator import Config
from nanosync import batch_size
from nanosync.batch_size import FILL, largest_fit, settle_batch_size, stored_size
from nanosync.distributed import Processes
from nanosync.errors import UserError
from nanosync.parallelism import Parallelism


def divisors(n):
    return [m for m in range(1, n + 1) if n % m == 0]


def search(sizes, need, fails_above=math.inf):
    """The size found, and the sizes that were measured."""
    measured = []

    def measure(size):
        measured.append(size)
        return need(size) if need(size) <= fails_above else math.inf

    return largest_fit(sizes, measure), measured


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_the_largest_size_that_fits_in_few_measurements(out_of_memory):
    for number in range(300):
        choose = random.Random(number)
        fixed, each = choose.uniform(0, 0.9), choose.uniform(0.0005, 0.3)
        sizes = divisors(choose.choice([1, 7, 60, 480, 512, 720]))
        needs = {size: fixed + each * size for size in sizes}
        found, measured = search(sizes, needs.get, 1 if out_of_memory else math.inf)
        assert found == max((size for size in sizes if needs[size] <= 1), default=None)
        assert len(measured) == len(set(measured)) <= 4


def test_memory_that_is_no_line():
    """Buffers of chunks grow to a bound, so small sizes predict too much memory."""
    found, measured = search(divisors(512), lambda size: 0.05 + 0.02 * size + min(0.03 * size, 0.1))
    assert found == 32 and len(measured) <= 6
    found, _ = search(divisors(512), lambda size: 0.001 * size**1.5)  # and too little
    assert found == 64


def test_nothing_fits():
    assert search([1, 2, 4], lambda size: 1.5) == (None, [1])
    assert search([1, 2, 4], lambda size: 0.8 * size) == (1, [1, 2])
    assert search([1], lambda size: 0.5) == (1, [1])


class ToyRun:
    """The parts of a Run that settle_batch_size uses."""

    def __init__(self, device="cpu", resumed=None, dp_size=1, **settings):
        values = dict(batch_size="auto", gradient_accumulation_steps=40, eval_iters=200, block_size=1024,
                      compile=False) | settings
        self.globals = {}
        self.config = Config(values, dict.fromkeys(values, ""), self.globals, replaced={"batch_size": 12})
        self.processes = SimpleNamespace(device=torch.device(device), dp_size=dp_size, group=None)
        self.resumed = None if resumed is None else SimpleNamespace(state={"config": resumed})
        self.lines = []
        self.line = self.lines.append

    @property
    def numbers(self):
        names = ("batch_size", "gradient_accumulation_steps", "eval_iters")
        return tuple(self.config[name] for name in names)


def settled(run):
    model = torch.nn.Linear(4, 4)
    settle_batch_size(run, model, torch.optim.AdamW(model.parameters()), None)
    return run.numbers


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 100 GiB free on which a sequence takes 2 GiB, and everything else 3 GiB."""
    for name, result in (("empty_cache", None), ("mem_get_info", (100 * 2**30, 0)), ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, result=result: result)
    shapes = []

    def peak(model, parallel, shape, compiled):
        shapes.append(shape)
        return 2**30 * (3.0 + 2 * shape[0])

    monkeypatch.setattr(batch_size, "_peak", peak)
    return shapes


def test_a_gpu_is_filled_and_the_tokens_stay(gpu):
    run = ToyRun("cuda:0")
    fit = max(n for n in divisors(480) if 3 + 2 * n < 100 * FILL)
    assert settled(run) == (fit, 480 // fit, 60) == (40, 12, 60)
    assert run.globals["batch_size"] == 40 and run.config.origin["batch_size"] == "batch_size=auto"
    assert all(length == 1024 for _, length in gpu)
    assert "batch_size=auto: 40 sequences, which take 83% of the free memory" in run.lines[-1]
    assert "gradient_accumulation_steps=12 keeps 480 sequences an update" in run.lines[-1]


def test_each_of_several_processes_has_its_share(gpu):
    run = ToyRun("cuda:0", dp_size=8)  # 60 sequences a process
    assert settled(run)[:2] == (30, 16) and run.numbers[1] % 8 == 0
    assert settled(ToyRun("cuda:0", dp_size=40))[:2] == (12, 40)  # no more than the share


def test_one_sequence_that_is_too_large(gpu, monkeypatch):
    monkeypatch.setattr(batch_size, "_peak", lambda *arguments: math.inf)
    with pytest.raises(UserError, match=r"one sequence of 1024 tokens needs more than 92\.0 GiB"):
        settled(ToyRun("cuda:0"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_leaves_the_model_as_it_is(monkeypatch, fails):
    """The passes of a measurement, with a CPU in place of the GPU."""
    for name, result in (("empty_cache", None), ("reset_peak_memory_stats", None), ("synchronize", None),
                         ("max_memory_allocated", 123)):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, result=result: result)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    model, seen = random_model(torch.float32), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallel = Parallelism(Processes(0, 1, 0, torch.device("cpu"), None), torch.float32)

    def look(module, arguments):
        seen.append((arguments[0].shape, any(p.grad is not None for p in model.parameters())))
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(look)
    peak = batch_size._peak(model, parallel, (3, 16), compiled=False)
    assert peak == (math.inf if fails else 123)
    assert seen == ([((3, 16), False)] if fails else [((3, 16), False), ((3, 16), True)])
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_cpu_keeps_the_number_that_auto_replaced():
    run = ToyRun()
    assert settled(run) == (12, 40, 200)
    assert "12 sequences, the memory of the device cpu is not measured" in run.lines[0]
    run = ToyRun(batch_size=16)
    assert settled(run) == (16, 40, 200) and run.lines == []


def test_a_resumed_run_takes_its_checkpoints_number(gpu):
    run = ToyRun("cuda:0", resumed=dict(batch_size=24, gradient_accumulation_steps=20))
    assert settled(run) == (24, 20, 100) and gpu == [] and "as in the checkpoint" in run.lines[0]
    # of updates with other sequences, or for another number of processes
    other, same = dict(batch_size=8, gradient_accumulation_steps=20), run.resumed.state["config"]
    assert settled(ToyRun("cuda:0", resumed=other))[0] == 40
    assert settled(ToyRun("cuda:0", resumed=same, dp_size=8))[0] == 30
    for config in ({}, {"batch_size": "auto", "gradient_accumulation_steps": 40},
                   {"batch_size": 0, "gradient_accumulation_steps": 40}):
        assert stored_size(config, 480, 1) is None


@pytest.mark.parametrize("script", ["train.py", "train_reduced_sync.py"])
def test_wrong_settings_are_one_line(script, tmp_path):
    assert settings_error(script, "--batch_size=auto") is None
    assert settings_error(script, "--batch_size=1e1") is None
    for arguments, words in [
            (["--batch_size=all"], "batch_size='all' (the command line) is of type str; it must be int or "),
            (["--batch_size=64k"], "write --batch_size=64_000"),
            (["--batch_size=2.5"], "batch_size=2.5"),
            (["--batch_size=0"], "batch_size=0 must be at least 1"),
            (["--batch_size=0", "--batch_size=auto"], "replaces batch_size=0"),
            (["--batch_size=auto", "--batch_size=auto"], "replaces batch_size='auto'"),
            (["--batch_size=auto", "--eval_only"], "eval_only trains none"),
            (["--batch_size=auto", "--use_fsdp"], "with use_fsdp"),
            (["--batch_size=auto", "--tp_processes=2"], "tp_processes=2")]:
        problem = settings_error(script, *arguments)
        assert problem is not None and words in problem and "\n" not in problem, (arguments, problem)


@pytest.mark.parametrize("script, args, words", [
    ("train.py", ["--batch_size=2147483647"], "batch_size=2147483647 and block_size=1024"),
    ("train.py", ["--block_size=1e12"], "lower batch_size or block_size"),
    ("train_reduced_sync.py", ["--batch_size=1e9"], "GB of memory: lower batch_size")])
def test_micro_batches_larger_than_the_memory_are_refused(script, args, words):
    """Linux would grant the memory and kill the process."""
    assert words in settings_error(script, *args)


def test_micro_batches_of_a_speedrun_larger_than_the_memory_are_refused():
    config = {"device_batch_size": 2**31 - 1, "sequence_length": 32}
    with pytest.raises(UserError, match="device_batch_size=2147483647 and sequence_length=32 make micro-"):
        batch_size.check_micro_batch(config, "device_batch_size", "sequence_length")
    batch_size.check_micro_batch({"device_batch_size": 64, "sequence_length": 1024}, *config)
