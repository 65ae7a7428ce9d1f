"""The output of a script that fails, or that writes into a closed pipe. No torch; seconds.

    python -m pytest tests/scripts/test_error_output.py
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPT = '''
"""A script."""
# ----------------
# I/O
out_dir = "out"  # where results go
steps = 5 * 8  # how many
lr = 6e-4
compile = True  # faster
# model
block_types: list | None = None  # one a layer
top_p: float | None = None
dtype = "a" if steps else "b"
# ----------------
config = configure(globals())
after = 1
'''


@pytest.mark.parametrize("what, code, said", [("print('x' * 100_000)", 141, b""), ("", 0, b""),
                                              ("raise UserError('wrong')", 2, b"error: wrong\n")])
def test_output_that_nobody_reads(what, code, said):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", f"from configurator import *\ninstall_error_hook()\n"
                           f"print('read')\n{what}"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": ""})
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, said)


def test_help_into_a_pipe_that_is_closed(tmp_path):
    (tmp_path / "script.py").write_text(f"from configurator import configure\n{SCRIPT}")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), "--help"], stdout=writing,
                          stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(writing)
    assert done.returncode == -signal.SIGPIPE and not done.stderr


@pytest.mark.parametrize("raised, words", [
    ("UserError('one line')", "error: one line"),
    (r"UserError('not UTF-8: \udcff')", r"error: not UTF-8: \udcff"),
    ("RuntimeError('DefaultCPUAllocator: no\\nmore')", "error: out of memory: use a smaller model (Default"),
    ("type('OutOfMemoryError', (RuntimeError,), {})('GPU')", "error: out of memory: use a smaller model (G"),
    ("RuntimeError('DefaultCPUAllocator')  # batch_size block_size use_fsdp activation_checkpointing",
     "error: out of memory: use a smaller batch_size or block_size or model, or "
     "--activation_checkpointing=block or --use_fsdp ("),
    ("RuntimeError('DefaultCPUAllocator')  # batch_size device_batch_size",
     "error: out of memory: use a smaller device_batch_size or model ("),
])
def test_errors_that_are_one_line(raised, words):
    """The hint at smaller settings names only settings that the script has."""
    settings = raised.partition("  # ")[2].split()
    code = f"from configurator import *\ninstall_error_hook(0, {settings})\nraise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(words) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("raised, rank, text", [
    ("UserError('wrong')", 0, "error: wrong"), ("UserError('wrong')", 1, "error on rank 1: wrong"),
    ("UserError('odd: \\udcff')", 0, "error: odd: \udcff"),
    ("KeyError('a fault')", 0, "Traceback (most recent"),
])
def test_the_launcher_gets_the_error(tmp_path, raised, rank, text):
    """In the format of torchrun, which prints it at the end of its report."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    code = f"from configurator import *\ninstall_error_hook({rank})\nraise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    failure = ProcessFailure(0, 1, done.returncode, str(tmp_path / "error.json"))
    report = str(ChildFailedError("train.py", {rank: failure}))
    *_, last, border = report.rpartition("traceback : ")[2].splitlines()
    assert report.rpartition("traceback : ")[2].startswith(text) and set(border) == {"="}
    assert last.strip() == (text if "Traceback" not in text else "KeyError: 'a fault'")


def test_paths_that_the_locale_cannot_print(tmp_path):
    code = "from configurator import *\ninstall_error_hook()\nprint('out-é-\u4e2d')"
    for encoding, printed in (("ascii", b"out-\\xe9-\\u4e2d\n"), ("latin-1", b"out-\xe9-\\u4e2d\n"),
                              ("utf-8", "out-é-\u4e2d\n".encode())):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT,
                              env=os.environ | {"PYTHONIOENCODING": encoding})
        assert (done.stdout, done.returncode) == (printed, 0), done.stderr


def test_arguments_that_the_locale_cannot_read(tmp_path):
    (tmp_path / "script.py").write_text(f"from configurator import configure\n{SCRIPT}")
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = os.environ | locale | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), "--out_dir=é"], capture_output=True,
                          text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "out_dir='\\udcc3\\udca9' (the command line) cannot be read in a locale of" in done.stderr


WITHOUT_EXTRAS = """
import runpy, sys
from nanosync.errors import EXTRAS
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command, package", [
    ("visualize_training.py run", "matplotlib"),
    ("experiments/run_stages.py --plan=experiments/configs/plan.json --dry_run", "scipy"),
    ("experiments/draw_schedules.py", "matplotlib"),
    ("data/shakespeare/prepare.py --input=README.md", "tiktoken"),
    ("data/prepare.py --input=README.md --out=new", "tiktoken"),
    ("data/openwebtext/prepare.py", "tiktoken"),
    ("data/cached_fineweb10B.py 1", "huggingface_hub"),
    ("train.py --init_from=gpt2 --block_size=16 --dataset=letters", "huggingface_hub"),
])
def test_an_extra_that_is_not_installed(command, package, tiny_data, tmp_path):
    """The core suffices for training; other scripts name the package that they miss and what installs it."""
    (tmp_path / "run").mkdir()
    start = {"event": "start", "time": 1.0, "config": {"max_iters": 2}, "environment": {}, "resumed": False}
    steps = [{"event": "iter", "time": 2.0, "step": i, "loss": 2.0, "lr": 0.1, "norm": 1.0, "seconds": 1.0,
              "tokens_per_second": 1.0, "mfu": None} for i in range(2)]
    (tmp_path / "run" / "run_1.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (start, *steps)))
    script, *args = command.split()
    args = [arg.replace("README.md", str(ROOT / "README.md")).replace("experiments/", f"{ROOT}/experiments/")
            .replace("letters", str(tiny_data)) for arg in args]
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, str(ROOT / script), *args], text=True,
                          capture_output=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {package} is not installed: pip install -r requirements-extras.txt\n"
