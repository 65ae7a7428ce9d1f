"""Fuzz test of what is read from files: mutate a good file at random, read it as the scripts do.

A mutated file must be read or refused with a UserError of one line. A traceback, a signal, a hang or a
message of several lines is a finding, and the script ends with exit code 1.

    python tests/fuzz.py                          # 500 mutations of each kind
    python tests/fuzz.py --n=20 --kinds=npy,state --seed=3
    python tests/fuzz.py --keep=FOLDER            # keep the files of the findings

Each mutation is read in a forked child with a time limit, so that a signal or a hang ends that child only.
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import fuzzing
import numpy as np
import torch
from fuzzing import mutate_bytes, mutate_json, mutate_lines
from helpers import random_model, save_checkpoint, write_dataset, write_log, write_shard

import models
import visualize_training
from experiments import results_summary
from models.weights import find_for_inference, load_for_inference
from nanosync import checkpoint, tokenizers
from nanosync.dataloader import DataLoader, open_dataset
from nanosync.distributed import Processes
from nanosync.errors import UserError
from nanosync.files import json_text
from nanosync.optim import build_adamw
from nanosync.optimizer_state import load_state_by_name, state_by_name
from nanosync.random_states import random_states, set_random_states
from nanosync.resuming import check_same_data, load_scaler
from nanosync.run_log import LogTail, RunLog

CPU = torch.device("cpu")


def mutate_tensors(content: bytes, draw: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, its values, or any bytes."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8:8 + size], content[8 + size:]
    how = draw.random()
    if how < 0.3:
        return mutate_bytes(content, draw, head=draw.choice((8, 8 + size, len(content))))
    if how < 0.4:
        value = draw.choice((b"\xff" * 4, b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xbf"))
        at = draw.randrange(len(data) // 4) * 4
        return content[:8 + size] + data[:at] + value + data[at + 4:]
    entries = json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    entry = entries[name]
    what = draw.randrange(8)
    if what == 0:
        entry["shape"] = draw.choice(([], [0], [1] * 9, [-1], [2**62, 4], entry["shape"][::-1],
                                      [int(np.prod(entry["shape"], dtype=np.int64))], "x", [1.5], [True]))
    elif what == 1:
        entry["dtype"] = draw.choice(("I64", "BOOL", "F64", "F16", "BF16", "U8", "F8_E4M3", "F4", "C64", "x",
                                      3))
    elif what == 2:
        entry["data_offsets"] = draw.choice(([0, 4], [4, 0], [-1, 3], [0, 2**62], [], "x",
                                             entries[other]["data_offsets"]))
    elif what == 3:
        del entries[name]
    elif what == 4:
        others = f"transformer.{name}", name.removeprefix("transformer."), name + "x", "", "\0"
        entries[draw.choice(others)] = entries.pop(name)
    elif what == 5:
        entries[name], entries[other] = entries[other], entries[name]
    elif what == 6:  # a scalar in place of a tensor, at the end of the data
        entries[name] = {"dtype": entry["dtype"], "shape": [], "data_offsets": [len(data), len(data) + 4]}
        data += b"\0" * 4
    else:
        return mutate_tensors_all(entries, data, draw)
    return packed(json.dumps(entries).encode(), data)


def mutate_tensors_all(entries: dict, data: bytes, draw: random.Random) -> bytes:
    """Write a well-formed file whose tensors differ: dtype, shape or names of one tensor."""
    from safetensors.torch import load, save

    tensors = load(packed(json.dumps(entries).encode(), data))
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    changed = draw.choice((
        lambda: tensor.long(), lambda: tensor > 0, lambda: tensor.double(), lambda: tensor.half(),
        lambda: tensor.flatten(), lambda: tensor.flatten()[:1].reshape(()), lambda: tensor[None],
        lambda: torch.cat((tensor.flatten(), tensor.flatten())), lambda: tensor.flatten()[:0],
        lambda: tensor.to(torch.complex64), lambda: tensor.to(torch.float8_e4m3fn),
        lambda: tensor * torch.nan, lambda: tensor * 1e30, lambda: -tensor.float() - 1))()
    return save(tensors | {name: changed.contiguous()})


def packed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


# Good files and their readers. A reader gets the folder of the kind, of which one file is mutated.


def make_run(folder: Path) -> None:
    """An out_dir with a checkpoint of step 5, a data set and a log."""
    model = random_model(torch.float32)
    optimizer = build_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    chars = "".join(map(chr, range(64, 124))) + "\n"
    path = Path(save_checkpoint(
        folder, 5, model, val_loss=1.0, best_val_loss=1.0, scaler=torch.amp.GradScaler("cpu").state_dict(),
        meta={"vocab_size": 61, "tokenizer": "char", "chars": chars}, schedule=None,
        data={"train_tokens": 400, "val_tokens": 400, "sha256": None}, config={"n_layer": 2, "seed": 1}))
    from safetensors.torch import save_file
    save_file({name: t.contiguous() for name, t in state_by_name(optimizer, model).items()},
              path / "optim.safetensors")


def read_run(folder: Path) -> None:
    """Find the checkpoint, load its weights, its moments and random states, make an update, sample."""
    path = folder / "ckpt" / "step-00000005"
    manifest = {name: {"size": (path / name).stat().st_size, "sha256": checkpoint.sha256_of(path / name)}
                for name in checkpoint.FILES}
    (path / "MANIFEST.json").write_text(json_text(manifest))
    config = {"init_from": "resume", "out_dir": str(folder), "checkpoint_step": "latest", "tp_size": None,
              "block_types": None, "sync_strategy": None, "tp_processes": 1}
    found = find_for_inference(config)
    model = load_for_inference(config, found, Processes(0, 1, 0, CPU, None), print)
    if found.state["meta"] is not None:
        tokenizers.from_meta(found.state["meta"])
    found.described()
    checkpoint.listing(str(folder), models.KINDS)
    checkpoint.repair_best(str(folder))
    optimizer = build_adamw(model, 1e-3, (0.9, 0.95), 0.1)
    state = found.state
    load_state_by_name(optimizer, model, found.tensors("optim"), state["step"] > 0 and not state["scaler"])
    load_scaler(torch.amp.GradScaler("cpu"), found)
    check_same_data(found, "data/x", {"train_tokens": 400, "val_tokens": 400, "sha256": None}, models.KINDS)
    states = {name[2:]: t for name, t in found.tensors("rng").items() if name.startswith("0.")}
    set_random_states(states, CPU)
    np.random.rand(700), torch.rand(700), random.random(), random.gauss(0, 1)
    random_states(CPU)
    x = torch.zeros(1, 4, dtype=torch.int64)
    model(x, x)[1].backward()
    optimizer.step()


def read_manifest(folder: Path) -> None:
    checkpoint.find(str(folder), kinds=models.KINDS)
    checkpoint.find(str(folder), "best", kinds=models.KINDS)


def make_hugging_face(folder: Path) -> None:
    random_model(torch.float32).save_pretrained(str(folder))


def make_data(folder: Path) -> None:
    """A data set in each format, with a meta.json each."""
    tokens = np.random.RandomState(0).randint(0, 61, 400)
    for name in ("bin", "shards", "npy"):
        write_dataset(folder / name, tokens, tokens, 61, train_tokens=400, val_tokens=400, name="x",
                      sha256={})
    for split in ("train", "val"):
        write_shard(folder / "shards" / f"x_{split}_0.bin", tokens)
        np.save(folder / "npy" / f"x_{split}_0.npy", tokens.astype("<u2"))
        for name in ("shards", "npy"):
            (folder / name / f"{split}.bin").unlink()


def read_data(folder: Path, kind: str) -> None:
    data = open_dataset(str(folder / kind), 16)
    data.check_tokens(61 if data.meta is None else data.meta["vocab_size"])
    loader = DataLoader(data.train, 2, 1, 61 if data.meta is None else data.meta["vocab_size"], 0, CPU)
    try:
        loader.next()
    finally:
        loader.close()
    if data.meta is not None and data.meta["tokenizer"] == "char":
        tokenizer = tokenizers.from_meta(data.meta)
        tokenizer.decode(tokenizer.encode(tokenizer.chars))


def make_log(folder: Path) -> None:
    config = {"n_layer": 2, "tp_size": 2, "batch_size": 4, "block_size": 16, "gradient_accumulation_steps": 1,
              "max_iters": 10, "eval_interval": 5, "checkpoint_interval": 5, "dataset": "x"}
    start = {"event": "start", "time": 1e9, "config": config, "environment": {"world_size": 1}}
    speed = {"seconds": 0.1, "tokens_per_second": 640.0, "mfu": None, "memory": None, "epoch": 0}
    steps = [{"event": "iter", "step": i, "time": 1e9 + i, "loss": 3.0, "lr": 0.1, "norm": 1.0} | speed
             for i in range(6)]
    evals = [{"event": "eval", "step": 5 * i, "time": 1e9 + 5 * i, "train_loss": 3.0, "val_loss": 3.1,
              "lr": 0.1} for i in range(2)]
    rest = [{"event": "checkpoint", "step": 5, "path": "x", "val_loss": 3.1, "seconds": 0.1, "time": 1e9 + 6},
            {"event": "hellaswag", "step": 5, "acc": 0.2, "acc_norm": 0.3, "n": 10, "time": 1e9 + 6},
            {"event": "sample", "step": 5, "text": "a\nb", "time": 1e9 + 6}]
    again = start | {"resumed": True, "resumed_step": 5, "evaluated": True, "reached": 5, "time": 1e9 + 9}
    schedule = {"event": "schedule", "syncs": 2, "sublayers": [{"sync": True}] * 4, "time": 1e9}
    end = {"event": "end", "status": "finished", "step": 10, "best_val_loss": 3.1, "time": 1e9 + 20}
    write_log(folder / "run_1.jsonl", start | {"resumed": False}, schedule, *steps, *evals, *rest, again,
              *steps[5:], end)


def read_log(folder: Path) -> None:
    """Read the log as its readers do: the picture's numbers, the summary, the time that is left."""
    RunLog.read(str(folder))
    LogTail(str(folder)).read()
    errors = []
    for read in (read_picture, read_summary, read_estimate):
        try:
            read(folder)
        except UserError as e:
            errors.append(e)
    if errors:
        raise errors[0]


def read_picture(folder: Path) -> None:
    run = visualize_training.read_run(str(folder))
    visualize_training.summary(run)
    visualize_training.smoothed(run.iterations["loss"])


def read_summary(folder: Path) -> None:
    runs = [results_summary.summary_of(str(folder)) for _ in range(2)]
    results_summary.compare(runs, None, 2.0)
    results_summary.runs_table(runs, 2.0)
    json.dumps(runs)


def read_estimate(folder: Path) -> None:
    script = Path(visualize_training.__file__).parent / "estimate_training_time.py"
    sys.argv = [str(script), str(folder)]
    hook = sys.excepthook
    try:
        exec(ESTIMATE, {"__file__": str(script), "__name__": "__main__"})
    finally:
        sys.excepthook = hook


ESTIMATE = compile((Path(visualize_training.__file__).parent / "estimate_training_time.py").read_text(),
                   "estimate_training_time.py", "exec")
STEP = "run/ckpt/step-00000005/"
KINDS = {  # name -> file that is mutated, how, function that reads
    "state": (STEP + "state.json", mutate_json, lambda folder: read_run(folder / "run")),
    "model": (STEP + "model.safetensors", mutate_tensors, lambda folder: read_run(folder / "run")),
    "optim": (STEP + "optim.safetensors", mutate_tensors, lambda folder: read_run(folder / "run")),
    "rng": (STEP + "rng.safetensors", mutate_tensors, lambda folder: read_run(folder / "run")),
    "manifest": (STEP + "MANIFEST.json", mutate_json, lambda folder: read_manifest(folder / "run")),
    "best": ("run/best.json", mutate_json, lambda folder: read_manifest(folder / "run")),
    "hf_config": ("hf/config.json", mutate_json, lambda folder: models.load_weights(str(folder / "hf"))),
    "hf_model": ("hf/model.safetensors", mutate_tensors,
                 lambda folder: models.load_weights(str(folder / "hf"))),
    "meta": ("data/bin/meta.json", mutate_json, lambda folder: read_data(folder / "data", "bin")),
    "bin": ("data/bin/train.bin", mutate_bytes, lambda folder: read_data(folder / "data", "bin")),
    "shards": ("data/shards/x_train_0.bin", lambda content, draw: mutate_bytes(content, draw, head=16),
               lambda folder: read_data(folder / "data", "shards")),
    "npy": ("data/npy/x_train_0.npy", lambda content, draw: mutate_bytes(content, draw, head=128),
            lambda folder: read_data(folder / "data", "npy")),
    "log": ("log/run_1.jsonl", mutate_lines, lambda folder: read_log(folder / "log")),
}


def make_good_files(folder: Path) -> None:
    make_run(folder / "run")
    checkpoint.write_best(str(folder / "run"), 5, 1.0)
    make_hugging_face(folder / "hf")
    make_data(folder / "data")
    make_log(folder / "log")
    read_run(folder / "run")  # also writes the manifest that fits


def fuzz(kinds: list[str], n: int, seed: int, folder: Path, keep: Path | None = None) -> list[str]:
    """Try n mutations of each kind; return the findings."""
    torch.set_num_threads(1)  # a forked child has no other threads
    with contextlib.redirect_stdout(io.StringIO()):
        make_good_files(folder)
    return fuzzing.fuzz(KINDS, kinds, n, seed, folder, keep, also=(STEP + "MANIFEST.json", "run/best.json"))


if __name__ == "__main__":
    fuzzing.main(__doc__, KINDS, fuzz)
