"""data/prepare.py as a user runs it: processes, kill -9 and resume, memory, training on what it writes. CPU.

    python -m pytest tests/scripts/test_corpus_runs.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import FAST_SETTINGS, PATIENCE, ROOT, TINY

COMMAND = [sys.executable, str(ROOT / "data" / "prepare.py")]
WORDS = np.array("the a sync rank loss model token of to and in is layer head step".split())
SMALL_JOBS = """# jobs of some size, whose state is saved as often as said; workers wait after some of them
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from data import corpus, corpus_documents, corpus_encoding, corpus_inputs
corpus_documents.JOB_BYTES = corpus_inputs.JOB_BYTES = {size}
corpus.SAVE_SECONDS = {saving}
encode, done = corpus_encoding.encode_job, []
def encode_job(job):
    while len(done) >= {jobs} and not os.path.exists({until!r}):
        time.sleep(0.01)
    done.append(1)
    return encode(job)
corpus.encode_job = corpus_encoding.encode_job = encode_job
import data.prepare
data.prepare.main()
"""


def write_corpus(path, documents: int, seed: int = 1, words: int = 100):
    random = np.random.RandomState(seed)
    with open(path, "w") as f:
        for _ in range(documents):
            f.write(json.dumps({"text": " ".join(WORDS[random.randint(0, len(WORDS), words)])}) + "\n")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return list(map(int, f.read().split()))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(tmp_path, number):
    """The main process is killed while two workers encode: no worker stays, and the same command resumes."""
    write_corpus(tmp_path / "a.jsonl", 200)
    args = [f"--input={tmp_path / 'a.jsonl'}", "--tokenizer=char", "--workers=2", "--name=x"]
    scripts = []
    for jobs in (4, 1000):  # that a worker does before it waits for the kill; there are about 40
        scripts.append(tmp_path / f"jobs{jobs}.py")
        scripts[-1].write_text(SMALL_JOBS.format(root=str(ROOT), jobs=jobs, until=str(tmp_path / "killed"),
                                                 size=3000, saving=0.0))
    out, state = tmp_path / "out", tmp_path / "out" / ".prepare" / "state.json"
    process = subprocess.Popen([sys.executable, scripts[0], *args, f"--out={out}"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    until = time.monotonic() + PATIENCE
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.01)
    busy = subprocess.run([*COMMAND, *args, f"--out={out}"], capture_output=True, text=True, timeout=PATIENCE)
    assert busy.returncode == 2 and "is in use by process" in busy.stderr and busy.stderr.count("\n") == 1
    workers = children_of(process.pid)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    (tmp_path / "killed").touch()
    _, err = process.communicate(timeout=PATIENCE)
    assert len(workers) >= 2 and (err == "" if number == signal.SIGKILL else err == "interrupted\n"), err
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not (out / "meta.json").exists() and 0 < json.loads(state.read_text())["jobs"] < 30

    for folder in (out, tmp_path / "whole"):
        done = subprocess.run([sys.executable, scripts[1], *args, f"--out={folder}"], capture_output=True,
                              text=True, timeout=PATIENCE)
        assert done.returncode == 0 and ("resuming" in done.stdout) == (folder == out), done.stderr
    assert contents(out) == contents(tmp_path / "whole") and not state.parent.exists()


def peak_memory(script, *args) -> int:
    """Bytes of memory that a script had at its peak."""
    code = ("import os, sys; pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ); "
            "_, status, used = os.wait4(pid, 0); print(used.ru_maxrss); sys.exit(status != 0)")
    done = subprocess.run([sys.executable, "-c", code, sys.executable, str(script), *args],
                          capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """4 and 11 MB of documents that are all different, in jobs of 0.1 MB."""
    script = tmp_path / "script.py"
    script.write_text(SMALL_JOBS.format(root=str(ROOT), jobs=1000, until="", size=100_000, saving=1.0))
    peaks, sizes = [], []
    for documents in (1000, 2500):
        path = write_corpus(tmp_path / f"{documents}.jsonl", documents, words=1000)
        sizes.append(path.stat().st_size)
        peaks.append(peak_memory(script, f"--input={path}", f"--out={tmp_path / str(documents)}",
                                 "--tokenizer=byte", "--workers=1", "--val_share=0.01"))
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


@pytest.fixture
def train(tmp_path, run_script):
    """train(script, tokenizer, ...) prepares a data set and runs a training script on it, into `run`."""

    def run(script, tokenizer, *args):
        write_corpus(tmp_path / "a.jsonl", 60)
        kind = ["--format=shards", "--shard_tokens=9000"] if "gpt" in script else []
        done = subprocess.run([*COMMAND, f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'set'}",
                               f"--tokenizer={tokenizer}", *kind], capture_output=True, text=True,
                              timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        done = run_script(script, f"--dataset={tmp_path / 'set'}", f"--out_dir={tmp_path / 'run'}", *args)
        assert done.code == 0, done.err
        return done

    return run


@pytest.mark.parametrize("tokenizer", ["bpe:300", "byte"])
def test_train_and_sample(train, tmp_path, run_script, tokenizer):
    done = train("train.py", tokenizer, *TINY, "--max_iters=3", "--eval_interval=3")
    assert len(done.losses) == 3
    done = run_script("sample.py", f"--out_dir={tmp_path / 'run'}", "--start=the model", "--device=cpu",
                      "--num_samples=1", "--max_new_tokens=8")  # the checkpoint has the tokenizer
    assert done.code == 0 and "the model" in done.out and "token ids" not in done.out, done.err


def test_speedrun_on_shards(train):
    done = train("train_gpt.py", "byte", "--device=cpu", "--compile=False", "--n_layer=2", "--n_head=2",
                 "--n_embd=32", "--sequence_length=32", "--batch_size=4", "--device_batch_size=4",
                 "--num_iterations=3", "--warmdown_iters=1", "--val_tokens=320")
    assert "step:3/3 val_loss:" in done.out


def test_fast_speedrun_on_shards(train):
    done = train("train_gpt_fast.py", "bpe:300", *FAST_SETTINGS, "--num_iterations=4")
    assert "step:4/4 val_loss:" in done.out
