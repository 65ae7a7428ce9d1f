"""The output of a script that fails, or that writes into a closed pipe. No torch; seconds.

    python -m pytest tests/scripts/test_error_output.py
"""

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
