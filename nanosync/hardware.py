"""The machine: device, compute dtype, compiler, memory, peak FLOP/s, versions."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

from nanosync.errors import UserError
from nanosync.files import ROOT

PEAK_TFLOPS = {  # dense, with fp32 sums; shortened name, see named_peak_flops -> (bf16 and fp16, tf32)
    "B200": (2250.0, 1125.0),  # NVIDIA HGX B200 data sheet: half of the figures with sparsity
    "H200": (989.5, 494.7), "H100": (989.5, 494.7), "H100 PCIE": (756.0, 378.0), "GH200": (989.5, 494.7),
    "A100": (312.0, 156.0), "A100 PCIE": (312.0, 156.0), "A800": (312.0, 156.0), "A800 PCIE": (312.0, 156.0),
    "A10": (125.0, 62.5), "A10G": (70.0, 35.0), "L40S": (362.0, 183.0), "L4": (121.0, 60.0),
    "RTX 5090": (209.5, 104.8),  # NVIDIA RTX Blackwell architecture white paper
    "RTX 4090": (165.2, 82.6),  # NVIDIA Ada architecture white paper
    "RTX A6000": (154.8, 77.4), "RTX 3090": (71.0, 35.6),  # NVIDIA GA102 architecture white paper
    "V100": (125.0, None), "V100 PCIE": (112.0, None), "T4": (65.0, None),
    "MI300X": (1307.4, 653.7),  # AMD Instinct MI300X data sheet
}  # Apple publishes no figure for matrix products of its M series, and mps has no entry
NO_BF16 = ("V100", "V100 PCIE", "T4")
# words of a name that do not change the peak: maker and family, memory, module of the fastest version
IGNORED_NAME_WORDS = re.compile(r"NVIDIA|GEFORCE|TESLA|AMD|INSTINCT|\d+GB?|HBM3E?|SXM\d|OAM")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device for matrix products of a dtype, None if unknown."""
    return None if device.type != "cuda" else named_peak_flops(torch.cuda.get_device_name(device), dtype)


def named_peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return peak_flops of a device's name.

    The whole name must match, apart from IGNORED_NAME_WORDS: an H100 NVL, a MIG slice and a laptop's RTX 4090
    have other peaks than an H100 and an RTX 4090. Source: the vendors' data sheets and white papers of the
    architectures, tensor cores, without sparsity. Data sheets that list figures with sparsity count twice the
    operations.
    """
    words = re.split(r"[ -]+", name.strip().upper())
    bare = " ".join(word for word in words if not IGNORED_NAME_WORDS.fullmatch(word))
    half, tf32 = PEAK_TFLOPS.get(bare, (None, None))
    tflops = half if dtype in (torch.bfloat16, torch.float16) else tf32
    if tflops is None or (dtype == torch.bfloat16 and bare in NO_BF16):
        return None
    return tflops * 1e12


def environment(device: torch.device) -> dict:
    """Return versions, machine and git commit, for the log and the checkpoint."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT,
                                timeout=10, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "python": platform.python_version(), "torch": torch.__version__, "git_commit": commit,
        "machine": platform.machine(), "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str, local_rank: int | None = None) -> torch.device:
    """Return the device of a name, after a check that it exists. Raises UserError.

    local_rank: of this process, whose GPU 'cuda' names; None without torchrun.
    """
    if device == "auto":
        mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else mps_or_cpu
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown: use auto, cpu, cuda, cuda:0, mps") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r} is not supported: use auto, cpu, cuda, cuda:0, mps")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={device!r}, but this machine has no MPS device: use --device=cpu")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"device={device!r}, but PyTorch sees no CUDA GPU here: use --device=cpu")
        if local_rank is not None:
            if local_rank >= count:
                raise UserError(f"local rank {local_rank} needs its own GPU and {count} are visible: start "
                                f"at most {count} processes on this machine (--nproc_per_node={count})")
            return torch.device("cuda", local_rank)
        if chosen.index is not None and chosen.index >= count:
            raise UserError(f"device={device!r}, but the GPUs here are cuda:0 to cuda:{count - 1}: use one "
                            f"of them")
        return torch.device("cuda", chosen.index or 0)
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype of a name. Raises UserError.

    'auto' is bfloat16 on CUDA (float16 on older GPUs), else float32.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_compile(device: torch.device) -> None:
    """Raise UserError if torch.compile cannot work here."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("compile=True needs Triton on a GPU and it is not installed: use --compile=False")
    compilers = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if device.type == "cuda":  # Triton's, which takes others, too
        compilers += ["c++", "clang++", "gcc", "clang", "cc"]
    if not any(map(shutil.which, compilers)):
        raise UserError(f"compile=True needs the C++ compiler {compilers[0]}, which was not found: install "
                        f"g++, set the environment variable CXX to another compiler, or use --compile=False")


def make_deterministic() -> None:
    """Make every run on one machine compute the same bits; slower. Call it before any work on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def peak_memory(device: torch.device) -> int | None:
    """Return the peak bytes of a GPU's memory that tensors took so far, None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
