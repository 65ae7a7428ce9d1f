"""The doctor: its checks on machines that tests make up, its lines. CPU; seconds.

    python -m pytest tests/unit/test_doctor.py
"""

import collections
import importlib.metadata
import shutil
import sys

import pytest

from nanosync import doctor
from nanosync.doctor import FAIL, GB, NOTE, OK, Finding


def test_a_line_has_ok_or_what_mends_the_part():
    def broken():
        raise OSError("no such device")

    lines, healthy = doctor.examine({"good": lambda: Finding(OK, "is here"),
                                     "wanted": lambda: Finding(NOTE, "is missing", "make it")})
    assert healthy and [line.split() for line in lines] == [
        ["OK", "good", "is", "here"], ["NOTE", "wanted", "is", "missing"], ["->", "make", "it"]]
    lines, healthy = doctor.examine({"bad": lambda: Finding(FAIL, "is broken", "mend it"), "worse": broken})
    assert not healthy and lines[1].endswith("-> mend it")
    assert lines[2].startswith("FAIL  worse") and lines[2].endswith("OSError: no such device")


def usage(free):
    return lambda path: collections.namedtuple("Usage", "total used free")(free, 0, free)


@pytest.mark.parametrize("free, status", [(GB, FAIL), (5 * GB, NOTE), (100 * GB, OK)])
def test_disk(monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage(free))
    assert doctor.disk().status == status and "--out_dir" in doctor.disk().mend


@pytest.mark.parametrize("free, gpus, status", [(2**26, 0, NOTE), (2**26, 1, NOTE), (2**26, 2, FAIL),
                                                (2**30, 8, OK)])
def test_shared_memory_is_needed_by_several_gpus(monkeypatch, tmp_path, free, gpus, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", usage(free))
    monkeypatch.setattr(doctor, "gpus", lambda: gpus)
    assert doctor.shared_memory(str(tmp_path)).status == status
    assert doctor.shared_memory(str(tmp_path / "missing")).status == OK


@pytest.mark.parametrize("gpus, driver, installed, gpu_status, triton_status", [
    (0, None, False, OK, OK),  # a machine without a GPU needs neither
    (0, "570.1", True, FAIL, OK),  # a CPU build of PyTorch on a machine with a GPU
    (0, "570.1", False, FAIL, OK)])
def test_gpus_that_pytorch_does_not_see(monkeypatch, gpus, driver, installed, gpu_status, triton_status):
    def version(name):
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.5"

    monkeypatch.setattr(doctor, "gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.gpu().status == gpu_status and doctor.triton().status == triton_status


def test_triton_is_needed_on_a_gpu(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "gpus", lambda: 1)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.triton() == Finding(FAIL, "not installed", "make .venv; until then --compile=False")


def test_a_compiler_that_is_missing_or_broken(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler().status == FAIL and "apt install g++" in doctor.compiler().mend
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/false")
    assert doctor.compiler().status == FAIL and "/bin/false does not compile" in doctor.compiler().text


@pytest.mark.skipif(shutil.which(doctor.COMPILER) is None, reason="no C++ compiler")
def test_a_compiler_without_a_header_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(doctor, "COMPILED", (*doctor.COMPILED[:1], ("Python's headers",
                                             "#include <no_python.h>", [], "apt install python3-dev")))
    found = doctor.compiler()
    assert found.status == FAIL and found.mend.startswith("apt install python3-dev")
    assert "does not compile Python's headers" in found.text and "no_python.h" in found.text


def test_tokenizer_files_that_are_not_here(monkeypatch):
    for message, mend in (("ModuleNotFoundError: No module named 'tiktoken'", "make .venv"),
                          ("nanosync.errors.UserError: GPT-2's tokenizer files", "TIKTOKEN_CACHE_DIR")):
        monkeypatch.setattr(doctor, "run", lambda *args, message=message, **options: (False, message))
        assert doctor.tokenizer().status == NOTE and mend in doctor.tokenizer().mend


def test_a_loop_back_that_fails(monkeypatch):
    monkeypatch.setattr(doctor, "LOOP_BACK", "import sys; sys.exit('the network is down')")
    assert doctor.loop_back().status == FAIL and doctor.loop_back().text.endswith("the network is down")


def test_the_process_of_a_loop_back_that_failed_is_named_though_others_wait(monkeypatch):
    monkeypatch.setattr(doctor, "LOOP_BACK", "import os, sys, time\n"
                        "sys.exit('rank 1 is lost') if os.environ['RANK'] == '1' else time.sleep(600)")
    assert doctor.loop_back().text.endswith("rank 1 is lost")


def test_a_command_that_fails_or_does_not_answer(monkeypatch):
    assert doctor.run([sys.executable, "-c", "print(1)"]) == (True, "1")
    assert doctor.run([sys.executable, "-c", "import sys; sys.exit('no')"]) == (False, "no")
    assert doctor.run(["/no/such/program"]) == (False, "No such file or directory")
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    assert doctor.run(["sleep", "20"]) == (False, "no answer after 0.2 s")
