"""The doctor on this machine: its lines and its exit code. CPU; ten seconds.

    python -m pytest tests/scripts/test_doctor_run.py
"""

import subprocess
import sys

from helpers import ROOT

from nanosync import doctor


def test_doctor_on_this_machine():
    done = subprocess.run([sys.executable, "-m", "nanosync.doctor"], cwd=ROOT, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == bool(failed) and done.stderr == ""
    assert [name for name in doctor.CHECKS if f"  {name:13}  " not in done.stdout] == []


def test_an_unknown_argument(run_script):
    done = run_script("nanosync/doctor.py", "now")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
