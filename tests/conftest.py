"""Fixtures and settings of the tests; the folder of a test is also its marker."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

# Models here are tiny, and threads that wait for each other on busy cores cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from helpers import SHARED, Result, python, write_dataset

# A killed process can leave half a file in Inductor's cache, on which later runs would fail.
COMPILED = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
# Kernels without vector instructions, and no pool of processes that import PyTorch: for time
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


FOLDERS = ("unit", "scripts", "processes", "kernels", "compile")


def pytest_unconfigure() -> None:
    shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(items) -> None:
    """Mark each test with its folder, so that `-m kernels` selects all tests of tests/kernels."""
    for item in items:
        folder = item.path.parent.name
        if folder in FOLDERS:
            item.add_marker(folder)


def pytest_collection_finish() -> None:
    """Collect garbage rarely and not among imported objects, which is a third of the time of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """3000 train and 700 val tokens of 26 letters that are predictable in part: a noisy counter."""
    random = np.random.RandomState(7)
    tokens = (np.arange(3700) * 3 + random.randint(0, 2, 3700)) % 26
    return write_dataset(tmp_path_factory.mktemp("data") / "letters", tokens[:3000], tokens[3000:], 26)


@pytest.fixture
def run_script(tmp_path):
    """run_script("train.py", *args, cwd=..., ENV=...) -> Result, as `python`; cwd is tmp_path by default."""

    def run(script: str, *args: str, cwd: Path = tmp_path, **options) -> Result:
        return python(script, *args, cwd=cwd, **options)

    return run
