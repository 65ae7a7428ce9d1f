"""Type each input in two checkouts, and write what each answers: exit code, and last line or error.

    python records/2026-11-29-user-inputs/inputs.py BEFORE AFTER answers.jsonl    # paths of two checkouts
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TRAIN = ("python train.py --dataset={data} --out_dir={out} --n_layer=1 --n_head=2 --n_embd=16 "
         "--block_size=16 "
         "--batch_size=2 --gradient_accumulation_steps=1 --eval_iters=1 --eval_interval=2 "
         "--max_iters=2 --log_interval=1 --compile=False --warmup_iters=0 --device=cpu")
SAMPLE = "--start=0 --num_samples=1 --max_new_tokens=2 --device=cpu --compile=False"
DIGITS, SUM = "9" * 8000, "1+" * 30000 + "1"
CASES = [  # item, bash command; TRAIN is the command above
    ("A1", "TRAIN --resume=auto"),
    ("A3", "SLURM_NTASKS=2 TRAIN"),
    ("A3", "WORLD_SIZE=2 TRAIN"),
    ("A5", "TRAIN; TRAIN --resume=latest --max_iters=3 | grep '^resuming'"),
    ("B1", "TRAIN; python {tmp}/scalar_moment.py {out}; TRAIN --resume=latest --max_iters=9"),
    ("B1", f"TRAIN; python {{tmp}}/nan_weight.py {{out}}; python sample.py --out_dir={{out}} {SAMPLE}"),
    ("B2", "TRAIN --seed=1180591620717411303424"),
    ("B2", "TRAIN; python {tmp}/big_seed.py {out}; TRAIN --resume=latest --max_iters=9"),
    ("B2", "TRAIN --n_layer=1.5"),
    ("B2", "TRAIN --dataset={tmp}/deep"),
    ("B3", "timeout 30 TRAIN --n_layer=10000000"),
    ("B4", "timeout 20 TRAIN --dataset={tmp}/fifo"),
    ("B4", "timeout 20 python sample.py --out_dir={out} --start=FILE:/dev/zero --device=cpu"),
    ("B5", "TRAIN --dataset={tmp}/npy"),
    ("B6", "TRAIN '--block_types=[0]*900000000'"),
    ("B6", f"TRAIN --max_iters={SUM}"),
    ("B6", f"TRAIN --max_iters={DIGITS}"),
    ("B7", "TRAIN --dataset={tmp}/wide"),
    ("B7", "TRAIN --dataset={tmp}/wide32"),
    ("B8", "mkdir -p {out}/ckpt/step-000000099; TRAIN"),
    ("B9", "TRAIN >&-; echo exit $?; ls {out}"),
    ("C1", "TRAIN --batch_size 4"),
    ("C1", "cd {tmp}; REPO=. TRAIN config/train_shakespeare_char.py"),
    ("C1", f"TRAIN; python sample.py {{out}} {SAMPLE}"),
    ("C1", "python train.py help | tail -1"),
    ("C2", "TRAIN --block_types=spd"),
    ("C2", "TRAIN --max_iters=1e0"),
    ("C2", "TRAIN --mini_batch_size=8"),
    ("C3", "TRAIN --tp_size=4"),
    ("C4", "python experiments/run_nanogpt_experiment.py --dry_run --config "
           "experiments/configs/stage_c_full/palm_parallel.json | grep experiment_name"),
    ("C6", "cd {tmp}/empty; python {repo}/estimate_training_time.py"),
    ("C7", "TRAIN --init_from={tmp}/nano/ckpt.pt"),
    ("C7", "TRAIN --init_from={tmp}/llama"),
    ("C7", "TRAIN --init_from={tmp}/bin"),
    ("C8", TRAIN.replace("python ", "python -m torch.distributed.run --standalone --nproc_per_node=2 ")
     + " --dataset=nowhere --gradient_accumulation_steps=2"),
]
CHANGE = """import glob, hashlib, json, os, sys
import numpy as np
from safetensors.numpy import load_file, save_file
folder = sorted(glob.glob(sys.argv[1] + "/ckpt/step-*"))[-1]
def change(name, end, value):
    tensors = load_file(folder + "/" + name)
    key = next(key for key in tensors if key.endswith(end))
    tensors[key] = value(tensors[key])
    save_file(tensors, folder + "/" + name)
%s
manifest = {name: {"size": os.path.getsize(folder + "/" + name),
                   "sha256": hashlib.sha256(open(folder + "/" + name, "rb").read()).hexdigest()}
            for name in json.load(open(folder + "/MANIFEST.json"))}
open(folder + "/MANIFEST.json", "w").write(json.dumps(manifest, indent=1, ensure_ascii=False) + chr(10))
"""
CHANGES = {  # the manifest is made to fit
    "scalar_moment": 'change("optim.safetensors", "exp_avg", lambda x: np.zeros((), x.dtype))',
    "nan_weight": 'change("model.safetensors", "wte.weight", lambda x: x * np.float32("nan"))',
    "big_seed": 'text = open(folder + "/state.json").read().replace("1337", "1180591620717411303424")\n'
                'open(folder + "/state.json", "w").write(text)',
}


def make_files(tmp: Path) -> None:
    """Write the files that the commands name."""
    for name, change in CHANGES.items():
        (tmp / f"{name}.py").write_text(CHANGE % change)
    tokens = np.random.RandomState(0).randint(0, 60, 4000)
    char = {"tokenizer": "char", "vocab_size": 60, "chars": "".join(chr(48 + i) for i in range(60))}
    wide = {"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint32"}
    for name, dtype, meta in (("data", "<u2", char), ("wide", "<u4", None), ("wide32", "<u4", wide),
                              ("deep", "<u2", None), ("fifo", "<u2", None)):
        (tmp / name).mkdir()
        for split in ("train", "val"):
            tokens.astype(dtype).tofile(tmp / name / f"{split}.bin")
        if meta:
            (tmp / name / "meta.json").write_text(json.dumps(meta))
    (tmp / "deep" / "meta.json").write_text("[" * 100_000)
    os.mkfifo(tmp / "fifo" / "meta.json")
    for name in ("npy", "empty", "nano", "llama", "bin"):
        (tmp / name).mkdir()
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (True,), }".ljust(117) + b"\n"
    for split in ("train", "val"):
        npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(4000)
        (tmp / "npy" / f"x_{split}_0.npy").write_bytes(npy)
    (tmp / "nano" / "ckpt.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp / "llama" / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (tmp / "llama" / "model.safetensors").write_bytes(b"")
    (tmp / "bin" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, '
                                             '"vocab_size": 5, "n_positions": 8}')
    (tmp / "bin" / "pytorch_model.bin").write_bytes(b"x")


def answer(repo: str, typed: str) -> tuple:
    """Return the exit code and the line that counts: the last error, or the last line."""
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        make_files(tmp)
        train = TRAIN.replace("train.py", f"{repo}/train.py") if "REPO=" in typed else TRAIN
        command = typed.replace("TRAIN", train).format(repo=repo, data=tmp / "data", out=tmp / "out", tmp=tmp)
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        try:
            ended = subprocess.run(["bash", "-c", command], cwd=repo, capture_output=True, text=True,
                                   errors="replace", timeout=100,
                                   env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path})
        except subprocess.TimeoutExpired:
            return "none", "no end within 100 s"
    lines = [line for line in (ended.stdout + "\n" + ended.stderr).splitlines() if line.strip(" =-")]
    errors = [line for line in lines if "error" in line.lower()] if ended.returncode else []
    line = (errors or lines or [""])[-1]
    return ended.returncode, line.replace(folder, "TMP").replace(repo, "REPO").strip()[:240]


if __name__ == "__main__":
    before, after, out = sys.argv[1:4]
    with open(out, "w") as f:
        for item, typed in CASES:
            short = typed.replace(SUM, "1+1+... (30,000 times)").replace(DIGITS, "9... (8,000 digits)")
            row = {"item": item, "typed": short.replace(TRAIN, "TRAIN"), "before": answer(before, typed),
                   "after": answer(after, typed)}
            f.write(json.dumps(row) + "\n")
            f.flush()
