"""Measure what only several GPUs show: torchrun jobs one after the other for each of four parts, and a table.

$ python benchmarks/many_gpus.py --part=speedrun --out=DIR --peer=RECORD.py    # both scripts beside a peer's
$ python benchmarks/many_gpus.py --part=decode --out=DIR     # µs a token at TP = 2, 4, 8 by number of syncs
$ python benchmarks/many_gpus.py --part=scaling --out=DIR    # DDP, ZeRO-1, FSDP: tokens/s, memory, largest
$ python benchmarks/many_gpus.py --part=resume --out=DIR     # bitwise resume; resume on fewer processes

Any setting of the part's scripts (see PARTS) is accepted, and goes to each of them that has it. So a try on
two CPU processes is --device=cpu --compile=False with small sizes.

DIR gets PART-JOB.json and PART-JOB.log of each job as it ends, and PART-table.md. Started again, this script
skips the jobs that DIR has. With --limit no job starts whose expected duration (on H200) does not fit, and a
job that reaches the limit is ended. The exit code is 1 if a job or a check has failed, or a job has not run.
"""

import contextlib
import functools
import glob
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

# before this folder, whose kernels.py would hide the package kernels
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from benchmarks import many_gpus_records as records
from configurator import Config, check_at_least, check_choice, configure, script_defaults
from nanosync import files
from nanosync.errors import UserError, shown
from nanosync.folder_lock import lock_folder

# -----------------------------------------------------------------------------
part = ""  # 'speedrun', 'decode', 'scaling' or 'resume'
out = "out-many-gpus"  # folder of the results
gpus = 0  # GPUs, with a process on each; 0: all, or 2 processes with device=cpu
limit = 0.0  # seconds after which no job runs, 0 for no limit
only = ""  # run only these jobs of the part, e.g. 'fast,peer'
peer = ""  # speedrun: a script to run unchanged by the same torchrun command; arguments may follow its path
peer_seconds = 0.0  # speedrun: expected duration of the peer's job; 0: 300 + 1350 / gpus
target = 3.28  # speedrun: val loss to which the table has the training time
device = "auto"  # 'auto' or 'cuda': GPUs; 'cpu': gloo processes
# -----------------------------------------------------------------------------
OWN = ("part", "out", "gpus", "limit", "only", "peer", "peer_seconds", "target", "device",
       "widths")  # settings that jobs do not get as they are
PARTS = {"speedrun": ("train_gpt_fast.py", "train_gpt.py"), "decode": ("bench.py",), "scaling": ("bench.py",),
         "resume": ("train.py",)}  # part -> its scripts
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
XL = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "warmup": 1}  # scaling: GPT-2 XL
settings_of = functools.cache(script_defaults)  # a script's path -> its settings
STEPS, SAVED = 40, 20  # resume: steps of a whole run, and the step from which the others resume


@dataclass(frozen=True)
class Job:
    """A script on a number of processes."""

    name: str
    processes: int
    script: str  # path
    arguments: tuple
    seconds: float  # expected duration
    needs: str = ""  # name of a job that must have succeeded before

    def command(self) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "--"]
        return [sys.executable, *launcher * (self.processes > 1), self.script, *self.arguments]

    def shown(self, config: dict) -> str:
        """Return the command as a user types it, with paths relative to `out`."""
        start = f"torchrun --standalone --nproc_per_node={self.processes}" if self.processes > 1 else "python"
        text = shlex.join([os.path.basename(self.script), *self.arguments])
        return f"{start} {text}".replace(f"={config['out']}{os.sep}", "=")


def value_of(config: Config, name: str, default):
    """Return a setting of the scripts, or this default if no argument and no config file has it."""
    return config[name] if config.origin[name] else default


def place(config: dict, name: str, ending: str = "") -> str:
    """Return the path of a job's file, or of the folder that its script writes, in `out`."""
    return os.path.join(config["out"], f"{config['part']}-{name}{ending}")


def make_job(config: Config, name: str, processes: int, script: str, seconds: float, sizes: dict, fixed: dict,
             needs: str = "") -> Job:
    """Make a job of a script of this repository. Raises UserError for an argument that the job fixes.

    sizes: settings that arguments and config files may replace. fixed: further settings.
    """
    given = {key: config[key] for key, origin in config.origin.items()
             if origin and key in settings_of(os.path.join(ROOT, script)) and key not in OWN}
    if wrong := [key for key in given if key in fixed and config.origin[key] == "command line"]:
        raise UserError(f"{wrong[0]} is fixed in part {config['part']}: leave it out")
    settings = sizes | given | fixed | ({"device": "cpu"} if config["device"] == "cpu" else {})
    arguments = tuple(f"--{key}={value}" for key, value in settings.items())
    return Job(name, processes, os.path.join(ROOT, script), arguments, seconds, needs)


def speedrun_jobs(config: Config) -> list[Job]:
    """Make the jobs of full runs on FineWeb: the fast script, the peer, the baseline."""
    N, jobs = config["gpus"], []
    for name, script, steps, ms in (("fast", "train_gpt_fast.py", 1490, 600),
                                    ("base", "train_gpt.py", 5100, 950)):  # ms: of a step on one GPU
        seconds = 100 + value_of(config, "num_iterations", steps) * ms / 1e3 / N
        jobs.append(make_job(config, name, N, script, seconds, {"dataset": "fineweb10B"},
                             {"out_dir": place(config, name), "save_checkpoint": False}))
    try:
        path, *arguments = shlex.split(config["peer"]) or [""]
    except ValueError as e:
        raise UserError(f"peer={config['peer']!r} cannot be split into words: {e}") from None
    if config["peer"] and not os.path.isfile(path):
        raise UserError(f"peer={path!r} is no file: give the path of a training script")
    if config["peer"] and shards_of(config, "train") and shards_of(config, "val"):
        seconds = config["peer_seconds"] or 300 + 1350 / N
        jobs.insert(1, Job("peer", N, os.path.abspath(path), tuple(arguments), seconds))
    return jobs


def shards_of(config: Config, split: str) -> list[str]:
    """Return the paths of the data set's shards of a split. Raises UserError if there are none."""
    folder = files.dataset_folder(value_of(config, "dataset", "fineweb10B"))
    shards = sorted(glob.glob(os.path.join(glob.escape(folder), f"*_{split}_*.bin")))
    if not shards:
        raise UserError(f"{folder} has no shards *_{split}_*.bin, which a peer reads: prepare the data with "
                        f"--format=shards, or name another data set with --dataset=...")
    return shards


def decode_jobs(config: Config) -> list[Job]:
    """Make a job for each width and number of TP ranks that divides its heads of 64."""
    L, jobs = value_of(config, "n_layer", 12), []
    counts = sorted({2 * L, L, L // 2, 2, 1} - {0}, reverse=True)
    sizes = {"batch_sizes": [1], "max_new_tokens": 130, "rounds": 5}
    widths = value_of(config, "widths", [768, 2048, 4096])
    if not widths or not all(type(C) is int and C > 0 and C % 128 == 0 for C in widths):
        raise UserError(f"widths={shown(widths)} must be multiples of 128, heads of 64 on two GPUs or more")
    for C in widths:
        for tp in (n for n in (2, 4, 8) if n <= config["gpus"] and C % (64 * n) == 0):
            name = f"{C}-tp{tp}"
            fixed = {"mode": "decode", "tp_allreduce": "oneshot,nccl", "widths": [C],
                     "syncs": [*counts, *([n, 1] for n in counts if n > 1)],
                     "json": place(config, name, ".bench.json")}
            jobs.append(make_job(config, name, tp, "bench.py", 50 + C / 100, sizes, fixed))
    return jobs


def scaling_jobs(config: Config) -> list[Job]:
    """Make the jobs of both sizes: DDP and one GPU by turns, the strategies, on GPUs the largest models."""
    N, jobs = config["gpus"], []

    def add(name: str, seconds: float, sizes: dict, mode: str, **fixed) -> None:
        fixed |= {"mode": mode, "json": place(config, name, ".bench.json")}
        jobs.append(make_job(config, name, N, "bench.py", seconds, sizes, fixed))

    small = {"batch_size": 64, "rounds": 5, "steps": 6}
    large = XL | {"batch_size": 8, "rounds": 5, "steps": 3}
    add("124M-ddp", 90, small, "train")
    add("124M-strategies", 100, small, "train", compare="ddp,zero1,fsdp+40M")
    add("XL-ddp", 120, large, "train")
    add("XL-strategies", 130, large, "memory", compare="ddp,zero1,fsdp+120M")
    for strategy in ("ddp", "zero1", "fsdp") if config["device"] != "cpu" else ():
        add(f"largest-{strategy}", 100 + 25 * N * (strategy == "fsdp"),
            XL | {"batch_size": 1, "rounds": 1, "steps": 1}, "memory", compare=f"{strategy}+block+eager",
            largest=True)
    return jobs


def resume_jobs(config: Config) -> list[Job]:
    """Make the jobs of each strategy: a whole run, one resumed on as many processes, then on fewer."""
    P, L, jobs = min(4, config["gpus"]), value_of(config, "n_layer", 4), []
    fewer = [P >> i for i in range(1, P.bit_length())]
    sizes = {"n_layer": L, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 8, "eval_iters": 8,
             "learning_rate": 1e-3}
    common = {"dataset": place(config, "tokens"), "deterministic": True, "gradient_accumulation_steps": P,
              "warmup_iters": 2, "lr_decay_iters": STEPS, "eval_interval": 1000,
              "checkpoint_interval": SAVED // len(fewer)}
    strategies = {"ddp": {}, "zero1": {"use_zero1": True},
                  "fsdp": {"use_fsdp": True, "fsdp_min_num_params": 1},
                  "tp": {"model_type": "distributed_gpt", "tp_size": P, "block_types": ["spd"] * L}}

    def add(strategy: str, kind: str, n: int, last: int, source: str = "", step: int = 0) -> None:
        name, fixed = f"{strategy}-{kind}", common | strategies[strategy] | {"max_iters": last}
        if n == 1:  # nothing is sharded
            fixed = {key: value for key, value in fixed.items() if not key.startswith(("use_", "fsdp"))}
        fixed |= {"out_dir": place(config, name)} | ({"tp_processes": n} if strategy == "tp" else {})
        if source:
            fixed["resume"] = os.path.join(place(config, source), "ckpt", f"step-{step:08}")
        jobs.append(make_job(config, name, n, "train.py", 60, sizes, fixed, source))

    for strategy in strategies:
        add(strategy, "whole", P, STEPS)
        add(strategy, "again", P, STEPS, f"{strategy}-whole", SAVED)
    for strategy in strategies:
        source, step = f"{strategy}-whole", SAVED
        for i, n in enumerate(fewer, start=1):
            last = SAVED + (STEPS - SAVED) * i // len(fewer)
            add(strategy, f"on-{n}", n, last, source, step)
            source, step = f"{strategy}-on-{n}", last
    return jobs


JOBS = {"speedrun": speedrun_jobs, "decode": decode_jobs, "scaling": scaling_jobs, "resume": resume_jobs}


def prepare(config: Config, job: Job) -> None:
    """Empty a job's folder, and write what the job reads."""
    shutil.rmtree(place(config, job.name), ignore_errors=True)
    if job.name == "peer":  # modded-nanogpt's scripts read shards of these names in their working directory
        links = os.path.join(place(config, "peer"), "data", "fineweb10B")
        os.makedirs(links)
        for split in ("train", "val"):
            for i, shard in enumerate(shards_of(config, split), start=split == "train"):
                os.symlink(os.path.abspath(shard), os.path.join(links, f"fineweb_{split}_{i:06d}.bin"))
    tokens = place(config, "tokens")
    if config["part"] == "resume" and not os.path.exists(os.path.join(tokens, "meta.json")):
        os.makedirs(tokens, exist_ok=True)
        random, n = np.random.default_rng(1), 2**21
        noise = np.repeat(random.random(n // 256), 256)  # so that batches in another order have other losses
        values = np.where(random.random(n) < noise, random.integers(4096, size=n), np.arange(n) % 64)
        for name in ("train.bin", "val.bin"):
            values.astype("<u2").tofile(os.path.join(tokens, name))
        files.write_result(os.path.join(tokens, "meta.json"), {"vocab_size": 4096, "tokenizer": "none"})


def supervise(config: Config, job: Job, seconds: float) -> dict:
    """Run a job, for at most so many seconds (0: no limit); return the report of supervise.py."""
    report = os.path.abspath(place(config, job.name, ".report"))
    command = [sys.executable, os.path.join(ROOT, "experiments", "supervise.py"), report, str(seconds)]
    cwd = place(config, "peer") if job.name == "peer" else None
    remove(report)
    with open(place(config, job.name, ".log"), "wb") as output:
        # the supervisor ends all processes of the job when the pipe closes, which happens when this one ends
        started, supervisor = time.monotonic(), subprocess.Popen(
            command + job.command(), stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=cwd)
        try:
            supervisor.wait()
        finally:  # after Ctrl-C, a job that still ends would disturb the next start of this script
            supervisor.stdin.close()
            supervisor.wait()
    try:
        return files.read_json(report)
    except OSError:
        return {"code": None, "seconds": time.monotonic() - started, "ended_by": "a kill of its supervisor"}
    finally:
        remove(report)


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def check_settings(config: Config) -> None:
    """Raise UserError for wrong settings, before anything is written. Settle the number of GPUs."""
    check_choice(config, "part", tuple(PARTS))
    check_choice(config, "device", ("auto", "cuda", "cpu"))
    check_at_least(config, 0, "gpus", "limit", "peer_seconds")
    on_gpus, there = config["device"] != "cpu", torch.cuda.device_count()
    if on_gpus and not there:
        raise UserError("no GPU is visible: use a machine with GPUs, or try this script on gloo processes "
                        "with --device=cpu and small sizes")
    n = config["gpus"] = config["gpus"] or (there if on_gpus else 2)
    if n < 2 or (on_gpus and n > there):
        raise UserError(f"gpus={n}, and {there} are visible: this script measures two or more")
    known = set(OWN).union(*(settings_of(os.path.join(ROOT, name)) for name in PARTS[config["part"]]))
    if wrong := [key for key, origin in config.origin.items() if origin and key not in known]:
        raise UserError(f"{wrong[0]} is no setting of {' or '.join(PARTS[config['part']])}: leave it out")
    config["out"] = os.path.normpath(files.expand_path(config["out"]))
    files.check_can_write(config["out"], "out")


def main(config: Config) -> int:
    """Run the jobs of a part that `out` does not have; print the table and return the exit code."""
    jobs, started = JOBS[config["part"]](config), time.monotonic()
    found = {job.name: records.finished(place(config, job.name), job.shown(config)) for job in jobs}
    chosen = config["only"].split(",") if config["only"] else list(found)
    if unknown := set(chosen) - set(found):
        raise UserError(f"only={config['only']!r} has {min(unknown)!r}, and the jobs are {', '.join(found)}")
    lock = lock_folder(config["out"], "out")
    for job in (job for job in jobs if found[job.name] is None):
        left = max(0.0, config["limit"] - (time.monotonic() - started))
        if job.name not in chosen:
            found[job.name] = records.missing("not run")
        elif job.needs and found[job.needs]["problem"]:
            found[job.name] = records.missing(f"not run: needs {job.needs}")
        elif config["limit"] and job.seconds > left:
            found[job.name] = records.missing(f"not run: takes {job.seconds:.0f} s, {left:.0f} s were left")
        else:
            print(f"{job.name}, about {job.seconds:.0f} s: {job.shown(config)}", flush=True)
            prepare(config, job)
            report, stem = supervise(config, job, left if config["limit"] else 0), place(config, job.name)
            found[job.name] = records.record_of(config["part"], stem, job.shown(config), report)
            files.write_result(f"{stem}.json", found[job.name])
            print(f"    {report['seconds']:.0f} s, {found[job.name]['problem'] or 'done'}", flush=True)
    text, good = records.summary(config, found)
    files.replace_file(place(config, "table", ".md"), text.encode())
    print(f"\n{text}", end="")
    os.close(lock)
    return 0 if good else 1


if __name__ == "__main__":
    config = configure(globals(), others=tuple(os.path.join(ROOT, script) for script in (
        "bench.py", "train.py", "train_gpt.py", "train_gpt_fast.py")))
    check_settings(config)
    sys.exit(main(config))
