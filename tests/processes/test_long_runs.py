"""Runs that are killed, asked to end, hang, diverge or find no room, and go on. Real processes; a part of
tests/long_runs.py, which has the loops.

    python -m pytest tests/processes/test_long_runs.py
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import long_runs
import pytest
import torch
from long_runs import KINDS, SETTINGS, Run

from nanosync import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return long_runs.write_shards(tmp_path_factory.mktemp("shards") / "shards")


@pytest.fixture(scope="module")
def references(tmp_path_factory, data):
    """Finished runs that nothing happened to, made when they are first asked for."""
    made, folder = {}, tmp_path_factory.mktemp("references")

    def reference(kind, processes=1):
        if (kind, processes) not in made:
            made[kind, processes] = folder / f"{kind}{processes}"
            assert long_runs.finish(data, made[kind, processes], *KINDS[kind], processes=processes) == 0
        return made[kind, processes]
    return reference


@pytest.mark.parametrize("kind, n, point", [("gpt", 4, "manifest"), ("spd", 1, "published")])
def test_killed_while_saving(data, references, tmp_path, kind, n, point):
    """Across shards and the ends of two epochs, with dropout; 4 ranks, whose sums depend on their order."""
    case = long_runs.kill_and_resume(data, tmp_path / "out", references(kind, n), *KINDS[kind], point=point,
                                     processes=n)
    assert case["ok"], case
    text = (tmp_path / "out" / "log.txt").read_text()
    for epoch in (0, 1):
        assert f"Completed epoch {epoch}\nShuffled 4 training shards for epoch {epoch + 1}\n" in text


@pytest.mark.parametrize("kind, n, number", [("gpt", 2, signal.SIGINT), ("tp", 4, signal.SIGTERM)])
def test_asked_to_end(data, references, tmp_path, kind, n, number):
    """torchrun with 2 data-parallel ranks, as the command that users type, and with 2 models of 2 ranks each:
    masks of dropout included."""
    case = long_runs.signal_and_resume(data, tmp_path / "out", references(kind, n), number,
                                       random.randrange(1, 20), 0.1 * random.random(), *KINDS[kind],
                                       processes=n, command=kind == "gpt")
    assert case["ok"], case
    rng = checkpoint.find(str(tmp_path / "out")).tensors("rng")
    assert not torch.equal(rng["0.torch"], rng["1.torch"])
    if kind == "tp":
        assert torch.equal(rng["0.shared"], rng["1.shared"])
        assert not torch.equal(rng["0.shared"], rng["2.shared"])


def test_asked_to_end_while_evaluating(data, references, tmp_path):
    """One process, at evaluation 10: it is not lost, and not done twice. SIGTERM comes twice, as when a
    machine stops: that is one request."""
    run = Run(data, tmp_path / "out", long_runs.hold(tmp_path, "evaluation", 10))
    run.wait_for(10)
    run.process.send_signal(signal.SIGTERM)
    wait_until(lambda: has_answered(run), "a request has no answer")  # two at once could arrive as one
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "interrupted"
    assert long_runs.go_on(data, tmp_path / "out") == 0
    assert long_runs.same(tmp_path / "out", references("gpt"))


def test_damaged_checkpoints(references, tmp_path):
    numbers = random.Random(5)
    for _ in range(30):
        case = long_runs.damage_and_find(tmp_path / "damaged", references("gpt"), numbers)
        assert case["ok"], case


def test_other_processes(data, tmp_path):
    case = long_runs.other_world(data, tmp_path / "out", 2, 1)
    assert case["ok"], case
    assert "saved on 2 processes and resumed on 1: dropout masks differ" in (tmp_path / "out.txt").read_text()


def workers_of(run):
    return [pid for pid in long_runs.left_behind(run.out_dir) if pid != run.process.pid]


def wait_until(condition, otherwise: str, seconds: float = 300) -> None:
    """Fail if a condition does not come about. The limit is half of the processes' own timeout of 600 s."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.1)


def has_answered(run) -> bool:
    return "again to end at once" in Path(run.output.name).read_text()


@pytest.mark.parametrize("what", ["stopped", "killed"])
def test_a_peer_that_does_not_answer(data, tmp_path, what):
    """A hung or a dead process ends the job."""
    run = Run(data, tmp_path / "out", f"--timeout={30 if what == 'stopped' else 600}", "--max_iters=100000",
              processes=2)
    run.wait_for(3)
    victim = max(workers_of(run))
    os.kill(victim, signal.SIGSTOP if what == "stopped" else signal.SIGKILL)
    if what == "stopped":  # torchrun's own grace for a process that hears nothing is 30 s: it is not ours
        others = [pid for pid in workers_of(run) if pid != victim]
        wait_until(lambda: not set(others) & set(workers_of(run)), "a process waits for one that hangs")
        os.kill(victim, signal.SIGKILL)
    assert run.wait() != 0
    assert not long_runs.left_behind(run.out_dir)


def test_torchrun_killed(data, tmp_path):
    """Its workers notice, save and end."""
    run = Run(data, tmp_path / "out", "--max_iters=100000", processes=2)
    run.wait_for(3)
    run.process.kill()
    run.wait()
    wait_until(lambda: not long_runs.left_behind(run.out_dir), "workers are left behind")
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "interrupted"
    assert long_runs.newest(run.out_dir)["step"] == run.done()


def test_a_second_request_ends_at_once(data, tmp_path):
    """Also while a process waits for another that does not answer."""
    run = Run(data, tmp_path / "out", "--max_iters=100000", processes=2)
    run.wait_for(3)
    first, second = sorted(workers_of(run))
    os.kill(second, signal.SIGSTOP)
    time.sleep(1)
    os.kill(first, signal.SIGINT)
    wait_until(lambda: has_answered(run), "a request has no answer")  # two at once could arrive as one
    os.kill(first, signal.SIGINT)
    wait_until(lambda: first not in workers_of(run), "it waits for the other")
    os.kill(second, signal.SIGKILL)
    run.wait()


def test_two_runs_in_one_folder(data, run_script, tmp_path):
    first = Run(data, tmp_path / "out", "--max_iters=100000")
    first.wait_for(1)
    refused = run_script("train.py", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", *SETTINGS)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"is in use by process {first.process.pid} on" in refused.err
    first.process.kill()
    first.wait()
    again = run_script("train.py", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", *SETTINGS,
                       "--max_iters=2")
    assert again.code == 0, again.err


def test_no_room(data, run_script, tmp_path):
    """Files may have 100 kB, and weights have more: a periodic save warns, the last one fails, logs go on."""
    assert long_runs.finish(data, tmp_path / "out", "--max_iters=10") == 0
    (tmp_path / "limit.py").write_text("import resource as _resource\n"
                                       "_resource.setrlimit(_resource.RLIMIT_FSIZE, (100_000, 100_000))\n")
    done = run_script("train.py", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", *SETTINGS, "limit.py",
                      "--resume=latest", "--max_iters=20")
    assert done.code == 2, done.err
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: cannot save")]
    assert len(warnings) == 1 and "step-00000015: " in warnings[0] and "File too large" in warnings[0]
    assert "iter 19:" in done.out
    assert done.err.count("\n") == 1 and "step-00000020: " in done.err
    assert " bytes, " in done.err and "--resume=latest" in done.err
    assert long_runs.newest(tmp_path / "out")["step"] == 10
    assert not [name for name in os.listdir(tmp_path / "out" / "ckpt") if name.startswith(".")]
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"
    assert long_runs.go_on(data, tmp_path / "out", "--max_iters=20") == 0
    assert long_runs.newest(tmp_path / "out")["step"] == 20
