"""Check this machine: GPU, driver, PyTorch, Triton, compiler, collectives, tokenizer files, disk, memory.

    make doctor                      # or: python -m nanosync.doctor

Prints a line for each part: OK, NOTE for a part that only some commands need, or FAIL, the last two with the
command that mends it. Exits with code 1 if a part fails, else 0. PyTorch is imported inside functions, so the
doctor also runs where PyTorch is missing.
"""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass

from configurator import Parser
from nanosync.files import ROOT

OK, NOTE, FAIL = "OK", "NOTE", "FAIL"
GB = 10**9
SECONDS = 120  # longest time of a check that starts a process
LEAST_DISK, ENOUGH_DISK = 2 * GB, 20 * GB  # a checkpoint of GPT-2 124M has 1.5 GB, and a run keeps ten
LEAST_SHARED = 2**28  # bytes of /dev/shm; containers often have 2**26

# A process of the loop-back: an all-reduce over all processes on 127.0.0.1
LOOP_BACK = """
import torch, torch.distributed as dist, os, sys
rank, size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
x = torch.full((1024,), float(rank + 1), device=device)
dist.all_reduce(x)
assert x.tolist() == [size * (size + 1) / 2] * 1024
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""
COMPILER = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # of torch.compile
# what torch.compile's C++ needs: name, code, flags, command that mends it
COMPILED = (("C++", "#include <cmath>\nextern \"C\" double f(double x) { return std::sqrt(x); }", [],
             "apt install g++"),
            ("Python's headers", "#include <Python.h>", [f"-I{sysconfig.get_path('include')}"],
             "apt install python3-dev"),
            ("OpenMP", "#include <omp.h>", ["-fopenmp"],
             "apt install g++, or libomp-dev for clang++"))


@dataclass(frozen=True)
class Finding:
    """Result of a check. mend: command, or advice, for a part that is not OK."""

    status: str
    text: str
    mend: str = ""


def run(command: list[str], **options) -> tuple[bool, str]:
    """Run a command; return True if it succeeded, and its output, or the reason in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **options)
    except subprocess.TimeoutExpired:
        return False, f"no answer after {SECONDS} s"
    except OSError as e:
        return False, e.strerror
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]  # of a compiler, whose last line says less
    return False, (*errors[:1], *lines[-1:], f"exit code {done.returncode}")[0]


def python() -> Finding:
    """Check the version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info < (3, 15):
        return Finding(OK, version)
    return Finding(FAIL, f"{version}, and 3.10 to 3.14 are supported",
                   "make clean; make PYTHON=python3.12 .venv")


def pytorch() -> Finding:
    """Check that PyTorch can be imported."""
    try:
        import torch
    except Exception as e:  # a library that is missing or broken raises OSError, and others
        return Finding(FAIL, f"cannot be imported: {type(e).__name__}: {e}".splitlines()[0], "make .venv")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else \
        f"ROCm {torch.version.hip}" if torch.version.hip else "CPU build"
    return Finding(OK, f"{torch.__version__}, {build}")


def gpus() -> int:
    """Return the number of GPUs that PyTorch can use, 0 without PyTorch."""
    try:
        import torch
    except Exception:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def driver_version() -> str | None:
    """Return names and driver of the GPUs as nvidia-smi prints them, None without NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    done, text = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0] if done and text else None


def driver() -> Finding:
    """Check that the driver answers wherever there is an NVIDIA GPU."""
    version = driver_version()
    if version is not None:
        return Finding(OK, f"NVIDIA {version}")
    if os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia"):
        return Finding(FAIL, "this machine has an NVIDIA driver, but nvidia-smi does not answer",
                       "nvidia-smi; in a container: docker run --gpus=all")
    return Finding(OK, "no NVIDIA driver is needed: no NVIDIA GPU")


def gpu() -> Finding:
    """Check that PyTorch sees the GPUs, and that each can multiply matrices."""
    if gpus() == 0:
        version = driver_version()
        if version is None:
            return Finding(OK, "none: training runs on the CPU")
        return Finding(FAIL, f"nvidia-smi shows driver {version}, but PyTorch sees no GPU",
                       "make clean; make .venv (not TORCH=cpu); for a CUDA build: a newer driver")
    import torch

    from nanosync.hardware import peak_flops

    names = []
    for i in range(gpus()):
        device = torch.device("cuda", i)
        name = torch.cuda.get_device_name(device)
        try:
            x = torch.ones(64, 64, device=device)
            works = (x @ x)[0, 0].item() == 64
            memory = torch.cuda.get_device_properties(device).total_memory / GB
        except RuntimeError as e:
            return Finding(FAIL, f"cuda:{i} ({name}): {str(e).splitlines()[0]}", f"nvidia-smi -i {i}")
        if not works:
            return Finding(FAIL, f"cuda:{i} ({name}) multiplies matrices wrongly", f"nvidia-smi -q -i {i}")
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        peak = peak_flops(device, dtype)
        shown = "peak n/a" if peak is None else f"peak {peak / 1e12:g} TFLOP/s"
        names.append(f"{name}, {memory:.0f} GB, {shown}")
    return Finding(OK, "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))


def triton() -> Finding:
    """Check that Triton is there for GPUs, and that it compiles and runs a kernel."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        if gpus() == 0:
            return Finding(OK, "not installed, and not needed without a GPU")
        return Finding(FAIL, "not installed", "make .venv; until then --compile=False")
    if gpus() == 0:
        return Finding(OK, f"{version}, not used without a GPU")
    code = "import torch; from kernels.layer_norm import layer_norm; " \
           "x = torch.randn(4, 64, device='cuda'); y = layer_norm(x, torch.ones(64, device='cuda'), None); " \
           "assert (y - torch.nn.functional.layer_norm(x, (64,))).abs().max() < 1e-4"
    done, text = run([sys.executable, "-c", code], cwd=ROOT)
    if done:
        return Finding(OK, f"{version}, a kernel runs")
    return Finding(FAIL, f"{version}, but a kernel does not run: {text}",
                   "rm -r ~/.triton/cache, and Python's headers: apt install python3-dev")


def compiler() -> Finding:
    """Check that the C++ compiler of torch.compile makes libraries, with what its code includes."""
    found, last = shutil.which(COMPILER), "; until then --compile=False"
    if found is None:
        return Finding(FAIL, f"{COMPILER} was not found, and torch.compile uses no other",
                       "apt install g++, or export CXX=COMPILER" + last)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "a.cpp")
        for name, code, flags, mend in COMPILED:
            if name == "OpenMP" and sys.platform == "darwin":
                continue  # torch.compile works without
            with open(source, "w") as f:
                f.write(code + "\n")
            done, text = run([found, "-shared", "-fPIC", *flags, source, "-o", os.path.join(folder, "a.so")])
            if not done:
                return Finding(FAIL, f"{found} does not compile {name}: {text}", mend + last)
    return Finding(OK, found)


def loop_back() -> Finding:
    """Check an all-reduce of processes on this machine: NCCL on all GPUs, or gloo on two processes."""
    backend, size = ("nccl", gpus()) if gpus() else ("gloo", 2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes, errors = [], [tempfile.TemporaryFile() for _ in range(size)]
    for rank in range(size):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen([sys.executable, "-c", LOOP_BACK, backend], env=env,
                                          stdout=None if "NCCL_DEBUG" in os.environ else subprocess.DEVNULL,
                                          stderr=errors[rank]))
    problem = first_problem(processes, errors)
    for process in processes:
        process.kill()
        process.wait()
    what = f"{backend}, {size} process{'es' * (size > 1)}"
    if not problem:
        return Finding(OK, what)
    mend = "NCCL_DEBUG=INFO make doctor; NCCL_P2P_DISABLE=1 if GPUs cannot reach each other" \
        if backend == "nccl" else "GLOO_SOCKET_IFNAME=lo make doctor"
    return Finding(FAIL, f"{what}: {problem}", mend)


def first_problem(processes: list[subprocess.Popen], errors: list) -> str:
    """Wait until all processes have succeeded or one has failed; return the problem, '' if there is none.

    The other processes wait for a failed one, so the first that fails has the cause.

    errors: binary files with the stderr of each process.
    """
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        codes = [process.poll() for process in processes]
        for code, file in zip(codes, errors):
            if code:
                file.seek(0)
                text = file.read().decode(errors="replace").strip()
                return (text.splitlines() or [f"exit code {code}"])[-1]
        if None not in codes:
            return ""
        time.sleep(0.05)
    return f"no answer after {SECONDS} s"


def tokenizer() -> Finding:
    """Check that GPT-2's tokenizer loads. tiktoken downloads its files at first use."""
    done, text = run([sys.executable, "-c", "from nanosync.tokenizers import GPT2Tokenizer; GPT2Tokenizer()"],
                     cwd=ROOT)
    if done:
        return Finding(OK, "GPT-2's files are here")
    if "tiktoken" in text and "ModuleNotFoundError" in text:
        return Finding(NOTE, "tiktoken is not installed: data with GPT-2's tokens needs it", "make .venv")
    return Finding(NOTE, "GPT-2's files are not here and cannot be downloaded: needed for GPT-2's tokens",
                   "export TIKTOKEN_CACHE_DIR=FOLDER (a folder that has them)")


def disk() -> Finding:
    """Check the free space of the current folder, in which runs make their out_dir."""
    free = shutil.disk_usage(os.curdir).free
    text, mend = f"{free / GB:.0f} GB free in {os.getcwd()}", "--out_dir=FOLDER on another disk, " \
        "or --keep_checkpoints=2"
    return Finding(FAIL if free < LEAST_DISK else NOTE if free < ENOUGH_DISK else OK, text, mend)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """Check /dev/shm, through which NCCL's processes on one machine communicate."""
    if not os.path.isdir(path):
        return Finding(OK, "this system has no /dev/shm")
    free = shutil.disk_usage(path).free
    status = OK if free >= LEAST_SHARED else FAIL if gpus() > 1 else NOTE
    return Finding(status, f"{free / 2**20:,.0f} MiB free in {path}",
                   f"mount -o remount,size=1g {path}; in a container: docker run --shm-size=1g")


CHECKS = {"Python": python, "PyTorch": pytorch, "GPU driver": driver, "GPU": gpu, "Triton": triton,
          "C++ compiler": compiler, "loop-back": loop_back, "tokenizer": tokenizer, "disk": disk,
          "shared memory": shared_memory}


def examine(checks: dict) -> tuple[list[str], bool]:
    """Run checks, name -> function; return the lines, and True if no part fails. A check that raises has
    failed."""
    lines, healthy = [], True
    for name, check in checks.items():
        try:
            found = check()
        except Exception as e:
            found = Finding(FAIL, f"{type(e).__name__}: {e}".splitlines()[0], "see the message")
        healthy &= found.status != FAIL
        lines.append(f"{found.status:4}  {name:13}  {found.text}")
        if found.status != OK:
            lines.append(f"{'':4}  {'':13}  -> {found.mend}")
    return lines, healthy


def main() -> None:
    Parser(__doc__).parse_args()
    healthy = True
    for name, check in CHECKS.items():  # some take seconds: print each as it is done
        lines, passed = examine({name: check})
        print("\n".join(lines), flush=True)
        healthy &= passed
    sys.exit(0 if healthy else 1)


if __name__ == "__main__":
    main()
