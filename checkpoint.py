"""Checkpoints: nothing executable, independent of how the run was parallelised, never half-written.

    out_dir/ckpt/step-00001000/model.safetensors    parameters by name, fp32, whole
                               optim.safetensors    optimizer state as {parameter}.{entry}
                               rng.safetensors      random states as {rank}.{generator}
                               state.json           step, data cursor, configuration, versions, ...
                               MANIFEST.json        size and SHA-256 of each of the above
    out_dir/latest                                  name of the newest, for people; loading does not trust it
    out_dir/best.json                               step and val loss of the best

Written under .tmp-step-..., synced, the manifest last, then renamed: what bears its final name is whole.
Loading takes the newest step whose files match its manifest. Tensors are safetensors and the rest is JSON, so
nothing is unpickled.
"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from configurator import UserError
from data.files import json_text, sha256_of, unused_path, write_json

FORMAT = 1
FILES = ("model.safetensors", "optim.safetensors", "rng.safetensors", "state.json")
MODELS = {  # the one table from model kind to module, class and configuration class
    "gpt": ("model", "GPT", "GPTConfig"),
}
STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that matched its manifest."""

    path: str
    step: int
    state: dict  # of state.json

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        """'model', 'optim' or 'rng' -> tensors by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(os.path.join(self.path, f"{which}.safetensors"))


def save(out_dir: str, step: int, model: dict, optim: dict, rng: dict, state: dict, keep: int,
         protect: tuple[int, ...] = ()) -> str:
    """Write the checkpoint of a step, then drop all but the last `keep`, the best and the steps in `protect`.

    model, optim, rng: tensors by name; state: JSON values. Returns the folder. For one process, rank 0.
    """
    from safetensors.torch import save_file

    folder = os.path.join(out_dir, "ckpt")
    final, temporary = (os.path.join(folder, f"{prefix}step-{step:08d}") for prefix in ("", ".tmp-"))
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for which, tensors in (("model", model), ("optim", optim), ("rng", rng)):
        tensors = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        save_file(tensors, os.path.join(temporary, f"{which}.safetensors"))
    write_json(os.path.join(temporary, "state.json"), {"format": FORMAT, "step": step, **state})
    manifest = {}
    for name in FILES:
        path = os.path.join(temporary, name)
        _sync(path)
        manifest[name] = {"size": os.path.getsize(path), "sha256": sha256_of(path)}
    write_json(os.path.join(temporary, "MANIFEST.json"), manifest)
    _sync(temporary)
    if os.path.exists(final):  # a step that was saved before and is saved again, or did not verify
        os.rename(final, os.path.join(folder, f".tmp-old-{step:08d}-{time.time_ns()}"))
    os.rename(temporary, final)
    _sync(folder)
    with open(os.path.join(out_dir, "latest.tmp"), "w") as f:
        f.write(f"step-{step:08d}\n")
    os.replace(os.path.join(out_dir, "latest.tmp"), os.path.join(out_dir, "latest"))
    _prune(out_dir, keep, protect)
    return final


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(out_dir: str, keep: int, protect: tuple[int, ...]) -> None:
    best = best_step(out_dir)
    steps = steps_in(out_dir)
    for step in steps[:-keep] if keep > 0 else []:
        if step != best and step not in protect:
            shutil.rmtree(os.path.join(out_dir, "ckpt", f"step-{step:08d}"))
    for name in os.listdir(os.path.join(out_dir, "ckpt")):
        if name.startswith(".tmp-"):
            shutil.rmtree(os.path.join(out_dir, "ckpt", name), ignore_errors=True)


def steps_in(out_dir: str) -> list[int]:
    """The steps that have a checkpoint folder, in order; whether they verify is another question."""
    folder = os.path.join(out_dir, "ckpt")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(m[1]) for m in map(STEP_NAME.fullmatch, names) if m)


def write_best(out_dir: str, step: int, val_loss: float) -> None:
    os.makedirs(out_dir, exist_ok=True)
    write_json(os.path.join(out_dir, "best.json"), {"step": step, "val_loss": val_loss})


def best_step(out_dir: str) -> int | None:
    """The step of the best val loss, None if none is known."""
    try:
        with open(os.path.join(out_dir, "best.json")) as f:
            return int(json.load(f)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(path: str) -> str | None:
    """What is wrong with a checkpoint folder, None if its files are those of its manifest."""
    if os.path.islink(path) or not os.path.isdir(path):
        return "it is not a folder"
    try:
        with open(os.path.join(path, "MANIFEST.json"), encoding="utf-8") as f:
            text = f.read()
        manifest = json.loads(text)
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
        if text != json_text(manifest):  # nothing else in the folder vouches for the manifest
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its MANIFEST.json is missing or unreadable"
    if set(entries) != set(FILES):
        return f"its MANIFEST.json lists {sorted(entries)}"
    for name, (size, digest) in entries.items():
        file = os.path.join(path, name)
        if os.path.islink(file) or not os.path.isfile(file):
            return f"{name} is missing"
        if os.path.getsize(file) != size:
            return f"{name} has {os.path.getsize(file)} bytes, not {size}"
        if sha256_of(file) != digest:
            return f"{name} does not match its SHA-256"
    return None


def open_checkpoint(path: str) -> Checkpoint:
    """Verify and open one folder. Raises UserError."""
    problem = verify(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} cannot be used: {problem}")
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        state = json.load(f)
    if state.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} has format {state.get('format')!r}; this program reads {FORMAT}")
    return Checkpoint(path, int(state["step"]), state)


def find(out_dir: str, which: str | int = "latest", warn=print) -> Checkpoint:
    """The checkpoint 'latest' (newest that verifies; one warning for each newer that does not), 'best' or a
    step.

    Raises UserError if there is none.
    """
    steps = steps_in(out_dir)
    if not steps:
        raise UserError(f"no checkpoint in {out_dir}: train with --out_dir={out_dir} first, or name another")
    if which != "latest":
        step = best_step(out_dir) if which == "best" else int(which) if str(which).isdecimal() else None
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{out_dir} has no checkpoint {which!r}; it has the steps {there}")
        return open_checkpoint(os.path.join(out_dir, "ckpt", f"step-{step:08d}"))
    for step in reversed(steps):
        try:
            return open_checkpoint(os.path.join(out_dir, "ckpt", f"step-{step:08d}"))
        except UserError as e:
            warn(f"warning: {e}; trying the one before")
    raise UserError(f"none of the {len(steps)} checkpoints in {out_dir} can be used")


def set_aside(out_dir: str) -> str | None:
    """Move what an earlier run left in out_dir to a folder of its own; its name, None if there was none."""
    if not steps_in(out_dir):
        return None
    folder = unused_path(os.path.join(out_dir, time.strftime("earlier-%Y%m%d-%H%M%S")))
    os.makedirs(folder)
    for name in ("ckpt", "latest", "best.json", "log.txt"):
        if os.path.exists(os.path.join(out_dir, name)):
            os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def model_description(kind: str, model: nn.Module) -> dict:
    """The `model` entry of state.json."""
    return {"kind": kind, "config": dataclasses.asdict(model.config)}


def build_model(description: dict, **overrides) -> nn.Module:
    """A model with the architecture of a `model` entry, freshly initialised. Raises UserError."""
    kind = description.get("kind")
    if kind not in MODELS:
        raise UserError(f"the checkpoint holds a model of kind {kind!r}; known are {', '.join(MODELS)}")
    module_name, class_name, config_name = MODELS[kind]
    module = importlib.import_module(module_name)
    config_class = getattr(module, config_name)
    try:
        config = config_class(**{**description["config"], **overrides})
    except TypeError as e:
        raise UserError(f"the checkpoint's model configuration does not fit {config_name}: {e}") from None
    return getattr(module, class_name)(config)


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors by name into all of the model's parameters. Raises UserError if names or shapes differ."""
    parameters = dict(model.named_parameters())
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))
        raise UserError(f"{where} does not fit the model: {len(odd)} parameters are in only one of them, "
                        f"such as {odd[0]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(f"{where} does not fit the model: {name} is {tuple(tensors[name].shape)} there "
                            f"and {tuple(parameter.shape)} here")
        parameter.copy_(tensors[name])


def load_model(checkpoint: Checkpoint, **overrides) -> nn.Module:
    """The model of a checkpoint, on the CPU; overrides are configuration fields that change no shape."""
    model = build_model(checkpoint.state["model"], **overrides)
    load_parameters(model, checkpoint.tensors("model"), checkpoint.path)
    return model


def seed_random_states(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The random states of this process: torch's on CPU and GPU, numpy's and Python's, as tensors."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_rest": torch.tensor([version, gauss is not None, gauss or 0.0], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, has_gauss, gauss = states["python_rest"].tolist()
    random.setstate((int(version), tuple(states["python"].tolist()), gauss if has_gauss else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
