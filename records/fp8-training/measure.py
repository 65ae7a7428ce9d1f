"""Run the measurements of README.md.

$ python records/fp8-training/measure.py --out=DIR --peer=NANOGPT    # from the repository's root
$ python records/fp8-training/measure.py --out=DIR --parts=data,step,loss --gpus=1
$ python records/fp8-training/measure.py --out=DIR --device=cpu    # at toy size: does each part run?

Jobs without a time to measure run first: those of a lane one after the other, and all lanes side by side.
They also compile the contenders, so that the compiler's cache has them. Then jobs that measure run alone on
their GPU, the most important first: each GPU takes the next one as soon as it is free. A job that fails, or
reaches its limit, is ended and recorded, and the others continue. After `seconds` no job runs. Parts
gradients, loss and ranks read the text of part data, and wait for it. Without the package torchao, or without
nanoGPT's folder `peer`, their contenders are left out.

DIR gets jobs.json (command, duration and problem of each job, written as each ends), a log of each job, and
the JSON files and folders of the jobs. The end of each log is printed. A job that DIR has as done is not run
again, but for `data` if its text is not there.
"""

import glob
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

sys.path.insert(0, os.getcwd())

import torch

from configurator import check_at_least, check_choice, configure
from nanosync.errors import UserError
from nanosync.files import write_result
from nanosync.hardware import environment

# -----------------------------------------------------------------------------
out = "out-fp8-training"  # folder of the results
peer = ""  # folder of nanoGPT's model.py
parts = "data,gradients,tests,compile,loss,step,graphs,xl,ranks,tiles,biases,kernels,resume"  # of `jobs`
seconds = 1560.0  # after which no job runs
runs = 3  # seeds of each arm of part loss
gpus = 0  # GPUs, 0 for all; two are enough
device = "cuda"  # 'cpu': toy sizes
arms = "bf16,fp8,fp8_weights"  # of part loss, of experiments/configs/fp8
rates: list = [2.4e-2, 6e-3, 1.2e-2]  # learning rates of part loss beside 6e-4
# -----------------------------------------------------------------------------
config = configure(globals())
out, real = os.path.abspath(out), device == "cuda"
XL = "--n_layer=48 --n_head=25 --n_embd=1600"
TOY = "--device=cpu --compile=False --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2"
TOY_BENCH = f"{TOY} --vocab_size=128 --steps=1 --warmup=1 --rounds=2"
TOY_TRAINING = f"{TOY} --max_iters=6 --warmup_iters=2 --lr_decay_iters=6 --eval_interval=6 --eval_iters=2"
BF16 = ("nanogpt,base,qkv,gelu-derivative8+qkv,gelu+qkv,gelu-derivative+qkv,torch_adamw,"
        "gelu-derivative8")
WEIGHTS = "fp8+fp8_head+weight_gradients"
FP8 = (f"nanogpt,base,fp8+fp8_head,{WEIGHTS},{WEIGHTS}+torch_adamw,{WEIGHTS}+graphs,fp8+weight_gradients,fp8,"
       "torchao")
SMALL = (f"nanogpt,base,torch_adamw,graphs,torch_adamw+graphs,qkv+graphs,fp8+fp8_head+graphs,{WEIGHTS},"
         f"{WEIGHTS}+graphs,torchao")
XL_COMPARED = f"base,torch_adamw,fp8+fp8_head,{WEIGHTS},{WEIGHTS}+torch_adamw"
COMPILED = {  # job -> lane, batch size, contenders without those whose graph another job has
    "bf16": ("bf16", 64, "nanogpt,base"),
    "fp8": ("fp8", 64, f"fp8+fp8_head,{WEIGHTS},{WEIGHTS}+graphs,fp8+weight_gradients,fp8,torchao"),
    "small": ("small", 12, f"nanogpt,base,graphs,qkv+graphs,fp8+fp8_head+graphs,{WEIGHTS},{WEIGHTS}+graphs,"
                           "torchao"),
    "xl": ("xl", 8, f"base,fp8+fp8_head,{WEIGHTS}"),
}
BIASES = f"nanogpt,base,torch_adamw,gelu-derivative8+qkv,{WEIGHTS}"


@dataclass(frozen=True)
class Job:
    """A command of a part, for a shell. It is ended after `limit` seconds. It has so many GPUs for itself, or
    shares a GPU with other lanes."""

    part: str
    name: str
    expected: int  # seconds on H200
    command: str
    gpus: int = 1
    lane: str = ""

    @property
    def limit(self) -> float:
        return 1.6 * self.expected + 30 if real else 900.0


def jobs() -> list[Job]:
    """Return all jobs, the most important first."""
    found = []

    def add(part: str, name: str, expected: int, command: str, on_gpu: str, on_cpu: str, n: int = 1,
            lane: str = "") -> None:
        command = f"{command} {on_gpu if real else on_cpu}"
        found.append(Job(part, name, expected if real else 20, command, n, lane))

    def fused(part: str, name: str, expected: int, phases: str, B: int, contenders: str, more: str,
              lane: str = "") -> None:
        add(part, name, expected, f"python -m benchmarks.fused_step --out={out}/{name} --phases={phases} "
            f"--batch_sizes=[{B}] --peer={peer} --contenders={known(contenders)} "
            f"--seconds={1.3 * expected:.0f}", more, f"{more} --rounds=2 --steps=1", lane=lane)

    add("data", "data", 20, f"python data/python_source/prepare.py --tokenizer=gpt2 --format=shards "
        f"--out={out}/text", "--roots=stdlib,site-packages", "--roots=nanosync,tests", lane="data")
    workers = "-n 4" if importlib.util.find_spec("xdist") else ""
    add("tests", "tests", 260, f"TRITON_INTERPRET=0 nice {shlex.quote(sys.executable)} -m pytest -q "
        f"-p no:cacheprovider --junitxml={out}/tests.xml", f"{workers} tests/kernels",
        "tests/kernels/test_split_sums.py", lane="tests")
    add("tests", "tests-graphs", 300, f"{shlex.quote(sys.executable)} -m pytest -q -p no:cacheprovider",
        f"{workers} tests/scripts/test_cuda_graphs.py", "tests/kernels/test_split_sums.py",
        lane="tests-graphs")
    for name, (lane, B, contenders) in COMPILED.items():
        fused("compile", f"compile-{name}", 350, "compile", B, contenders, XL if name == "xl" else "", lane)
    add("loss", "loss-0.0006", 50 * runs * len(arms.split(",")), *losses(6e-4, runs), lane="loss")
    add("gradients", "gradients", 100, f"python records/fp8-training/gradients.py --out={out}/gradients.json "
        f"--data={out}/text", "", "--steps=20", lane="gradients")
    for rate in rates:
        add("loss", f"loss-{rate:g}", 60 * len(arms.split(",")), *losses(rate, 1), lane="loss")
    fused("step", "fp8-64", 190, "step,profile", 64, FP8, "")
    fused("step", "small-12", 140, "step,profile", 12, SMALL, "")
    add("graphs", "small-model", 70, f"python bench.py --compare=ddp,{'graphs' if real else 'eager'} "
        f"--json={out}/small-model.json", "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 "
        "--batch_size=64 --vocab_size=65 --rounds=7 --seconds=110", TOY_BENCH)
    fused("xl", "xl", 230, "step,profile", 8, XL_COMPARED, XL)
    fused("tiles", "bf16-64", 330, "check,tune,step", 64, BF16, "")
    for R in (2, 4):
        add("ranks", f"ranks-{R}", 185, f"python bench.py --model_type=distributed_gpt --tp_size={R} "
            f"--seconds=280 --json={out}/ranks-{R}.json", "--batch_size=64 --rounds=5 --steps=6 "
            "--syncs=[24,12,6,3,1]", f"{TOY_BENCH} --n_head=4 --n_embd=64 --syncs=[4,1]")
    for name, on_gpu, on_cpu in (("spd-bf16", "", ""), ("spd-fp8", "--fp8 --fp8_head", "--fp8=emulated")):
        add("ranks", name, 50, f"python train_reduced_sync.py --dataset={out}/text --sync_strategy=spd "
            f"--out_dir={out}/{name} --gradient_accumulation_steps=1 --save_checkpoint=False",
            "--batch_size=64 --max_iters=60 --eval_interval=1000 --eval_iters=2 --log_interval=10 "
            f"--warmup_iters=10 {on_gpu}", f"{TOY_TRAINING} {on_cpu}")
    fused("biases", "biases", 150, "step", 64, BIASES, "--bias=True")
    add("kernels", "kernels", 90, f"TRITON_INTERPRET={int(not real)} python bench.py --mode=kernels "
        f"--seconds=150 --json={out}/kernels.json",
        "--rows=[65536] --widths=[768] --rounds=5", f"{TOY_BENCH} --rows=[32] --widths=[32]")
    add("resume", "resume", 480, "python benchmarks/many_gpus.py --part=resume --limit=700 "
        f"--out={out}/resume", "--fp8 --fp8_head --fp8_weight_gradients",
        f"{TOY} --fp8=emulated --eval_iters=2", n=2)
    return found


def known(contenders: str) -> str:
    """Leave out contenders whose code is not here."""
    here = {"nanogpt": bool(peer), "torchao": importlib.util.find_spec("torchao") is not None}
    return ",".join(c for c in contenders.split(",") if here.get(c.partition("_")[0], True))


def losses(rate: float, runs: int) -> tuple[str, str, str]:
    """Return the command of all arms at the same time, and how it ends on a GPU and on a CPU.

    rate: highest learning rate. runs: seeds of each.
    """
    runner = ("run() { python experiments/run_nanogpt_experiment.py --config=experiments/configs/fp8/$1.json "
              f"--n_runs={runs} --dataset={out}/text --log_dir={out}/loss-{rate:g} --learning_rate={rate:g} "
              f"--min_lr={rate / 10:g} $2; }}; code=0;")

    def all_arms(options: str) -> str:
        emulated = {arm: " --fp8=emulated" * (not real and arm.startswith("fp8")) for arm in arms.split(",")}
        started = [f"run {arm} '{options}{more}' & pids=\"$pids $!\";" for arm, more in emulated.items()]
        return " ".join(started) + " for pid in $pids; do wait $pid || code=$?; done; exit $code"

    return runner, all_arms(""), all_arms(TOY_TRAINING)


# ---- run

started, lock, records = time.monotonic(), threading.Lock(), {}
text_made = threading.Event()  # the job `data` has ended, if it is wanted


def left() -> float:
    return seconds - (time.monotonic() - started)


def run(job: Job, on: str) -> None:
    """Run a job on the GPUs of CUDA_VISIBLE_DEVICES=`on`, and record it."""
    record = {"part": job.part, "command": job.command, "expected_seconds": job.expected, "seconds": 0.0,
              "gpus": on, "started": time.monotonic() - started}
    if left() < max(20, 0.5 * job.expected):
        record["problem"] = f"not run: takes {job.expected} s, {left():.0f} s were left"
    else:
        print(f"{record['started']:6.0f} s: {job.name}, GPU {on or '-'}, about {job.expected} s", flush=True)
        record |= supervise(job, on)
    with lock:
        records[job.name] = record
        write_result(f"{out}/jobs.json", {"environment": machine, "jobs": records})
    print(f"{time.monotonic() - started:6.0f} s: {job.name}: {record['problem'] or 'done'}", flush=True)


def supervise(job: Job, on: str) -> dict:
    """Run a job with all its processes ended at its limit; return its duration and its problem."""
    report, limit = f"{out}/{job.name}.report", min(job.limit, left())
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": on, "PYTHONUNBUFFERED": "1",
                              "TORCHINDUCTOR_CACHE_DIR": f"{out}/compiled"}
    if job.lane:
        variables |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
    command = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {job.command}'
    begun = time.monotonic()
    with open(f"{out}/{job.name}.log", "wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "experiments/supervise.py", report, f"{limit:.0f}", "bash", "-c", command],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables)
        supervisor.wait()
        supervisor.stdin.close()
    try:
        with open(report) as f:
            found = json.load(f)
        os.remove(report)
    except (OSError, ValueError):
        found = {"code": None, "ended_by": "a kill of its supervisor"}
    with open(f"{out}/{job.name}.log", encoding="utf-8", errors="replace") as f:
        lines = [line.rstrip()[:200] for line in f.read().splitlines() if line.strip()] or ["no output"]
    print("\n".join(f"    {line}" for line in lines[-14:]), flush=True)
    problem = None
    if found["ended_by"] != "itself":
        problem = f"ended by {found['ended_by']}"
    elif found["code"] != 0:
        problem = f"exit code {found['code']}: {lines[-1]}"
    elif job.part == "loss" and any("FAILED, not counted" in line for line in lines):
        problem = "a run failed, and others have results"
    return {"seconds": time.monotonic() - begun, "problem": problem}


def work(queue: list[Job], on: str) -> None:
    """Run the jobs of a queue that several threads share, until none is left."""
    while True:
        with lock:
            if not queue:
                return
            job = queue.pop(0)
        if f"={out}/text" in job.command and job.part != "data":
            text_made.wait()
        run(job, on)


def work_side_by_side(jobs: list[Job], places: list[str]) -> None:
    """Run each lane on a GPU that it shares with others. What the compiler then chose by timing kernels is
    forgotten, since other lanes disturbed it."""
    lanes = list(dict.fromkeys(job.lane for job in jobs))

    def work_lane(lane: str, on: str) -> None:
        try:
            work([job for job in jobs if job.lane == lane], on)
        finally:
            if lane == "data":
                text_made.set()

    run_threads([threading.Thread(target=work_lane, args=(lane, places[i % len(places)]))
                 for i, lane in enumerate(lanes)])
    for path in glob.glob(f"{out}/compiled/**/*.best_config", recursive=True):
        os.remove(path)


def run_threads(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    wanted = jobs()
    for part in parts.split(","):
        check_choice({"parts": part}, "parts", tuple(dict.fromkeys(job.part for job in wanted)))
    wanted = [job for job in wanted if job.part in parts.split(",")
              and not (job.name in records and records[job.name]["problem"] is None)]
    places = [str(i) for i in range(there)] or [""]
    if not any(job.name == "data" for job in wanted):
        text_made.set()
    work_side_by_side([job for job in wanted if job.lane], places)
    queues = {n: [job for job in wanted if job.gpus == n and not job.lane] for n in (1, 2)}
    run_threads([threading.Thread(target=work, args=(queues[1], place)) for place in places])
    if there != 1:
        work(queues[2], ",".join(places[:2]))
    for job in queues[2]:
        print(f"{job.name}: not run, it takes {job.gpus} GPUs")
    failed = {name: record["problem"] for name, record in records.items() if record["problem"]}
    print(f"{len(records) - len(failed)} of {len(records)} jobs done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    check_choice(config, "device", ("cuda", "cpu"))
    check_at_least(config, 0, "gpus")
    check_at_least(config, 1, "runs")
    os.makedirs(out, exist_ok=True)
    peer = os.path.abspath(peer) if peer else ""
    there = gpus or torch.cuda.device_count() if real else 0
    if real and not torch.cuda.is_available():
        raise UserError("no GPU is visible: try the script with --device=cpu")
    machine = environment(torch.device(device))
    if os.path.exists(f"{out}/jobs.json"):
        with open(f"{out}/jobs.json") as f:
            records = json.load(f)["jobs"]
    if "data" in parts.split(",") and not os.path.isdir(f"{out}/text"):  # results of another machine
        records.pop("data", None)
    if not os.path.isdir(f"{out}/compiled"):
        records = {name: record for name, record in records.items() if record["part"] != "compile"}
    main()
