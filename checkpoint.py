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
import math
import os
import random
import re
import shutil
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from configurator import Config, UserError, check_can_write
from data.files import json_text, sha256_of, unused_path, write_json
from distributed import on_main
from model import GPT, GPTConfig

FORMAT = 1
FILES = ("model.safetensors", "optim.safetensors", "rng.safetensors", "state.json")
MODELS = {  # the one table from model kind to module, class and configuration class
    "gpt": ("model", "GPT", "GPTConfig"),
    "distributed_gpt": ("tensor_parallel_model", "DistributedGPT", "DistributedGPTConfig"),
    "reduced_sync_gpt": ("reduced_sync_model", "GPT", "GPTConfig"),
}
# fields of their configurations besides those of the dense GPT; a checkpoint decides these settings, too
VARIANT = {
    "gpt": (),
    "distributed_gpt": ("tp_size", "block_types"),
    "reduced_sync_gpt": ("tp_size", "sync_strategy", "attn_sync_layers", "layers_per_group", "sync_points"),
}
ARCHITECTURE = ("block_size", "n_layer", "n_head", "n_embd", "bias")  # the settings that a checkpoint decides
STEP_NAME = re.compile(r"step-(\d{8})")
OF_A_RUN = ("ckpt", "latest", "best.json", "log.txt")  # what a new run would overwrite or prune


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that matched its manifest."""

    path: str
    step: int
    state: dict  # of state.json

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        """'model', 'optim' or 'rng' -> tensors by name, on the CPU. Raises UserError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = os.path.join(self.path, f"{which}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:  # another machine of the run may not see the folder
            raise UserError(f"cannot read {path}: {e}") from None


def check_out_dir(out_dir: str) -> None:
    """Raise UserError unless a run can write into out_dir, which need not exist yet. Leaves nothing there."""
    if not out_dir:
        raise UserError("out_dir='' is no folder: name one with --out_dir=...")
    check_can_write(out_dir, "out_dir")
    for name in OF_A_RUN:
        path = os.path.join(out_dir, name)
        if os.path.lexists(path) and os.path.isdir(path) != (name == "ckpt"):
            kind = "folder" if name == "ckpt" else "file"
            raise UserError(f"{path} is in the way of the run's {kind} of that name: move it, or name "
                            f"another out_dir")
    check_can_write(os.path.join(out_dir, "ckpt"), "out_dir")


def save(out_dir: str, step: int, model: dict, optim: dict, rng: dict, state: dict, keep: int,
         protect: tuple[int, ...] = (), best: bool = False) -> str:
    """Write the checkpoint of a step, then drop all but the last `keep`, the best and the steps in `protect`.

    model, optim, rng: tensors by name; state: JSON values; best: whether its state["val_loss"] is the lowest
    so far. Returns the folder. For one process, rank 0.
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
    if best:  # before pruning, which must know what to spare
        write_best(out_dir, step, state["val_loss"])
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


def mend_best(out_dir: str) -> None:
    """Let best.json name the best checkpoint there is; a run cut off while saving can leave it behind."""
    losses = {}
    for step in steps_in(out_dir):
        try:
            with open(os.path.join(out_dir, "ckpt", f"step-{step:08d}", "state.json"), encoding="utf-8") as f:
                losses[step] = float(json.load(f)["val_loss"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    for step in sorted((s for s in losses if math.isfinite(losses[s])), key=losses.get):
        if step == best_step(out_dir):
            return
        if verify(os.path.join(out_dir, "ckpt", f"step-{step:08d}")) is None:
            return write_best(out_dir, step, losses[step])


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


def find(out_dir: str, which: str | int = "latest", warn=print, group=None) -> Checkpoint:
    """The checkpoint 'latest' (newest that verifies; one warning for each newer that does not), 'best' or a
    step.

    With a group, rank 0 decides for all. Raises UserError if there is none.
    """
    return on_main(lambda: _find(out_dir, which, warn), group)


def find_weights(name: str, which: str | int = "latest", warn=print, group=None) -> Checkpoint | None:
    """The checkpoint that `name` holds: a folder step-XXXXXXXX itself, of an out_dir what `find` chooses.

    None if it is neither, but what GPT.from_pretrained takes. Raises UserError.
    """
    if STEP_NAME.fullmatch(os.path.basename(os.path.normpath(name))):
        return on_main(lambda: open_checkpoint(name), group)
    return on_main(lambda: _find(name, which, warn) if steps_in(name) else None, group)


def _find(out_dir: str, which: str | int, warn) -> Checkpoint:
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
    there = [name for name in OF_A_RUN if os.path.lexists(os.path.join(out_dir, name))]
    if not there:
        return None
    folder = unused_path(os.path.join(out_dir, time.strftime("earlier-%Y%m%d-%H%M%S")))
    os.makedirs(folder)
    for name in there:
        os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def take_model(config: Config, resumed: Checkpoint, kinds: tuple[str, ...]) -> None:
    """take_architecture of a run that is resumed: its kind of model, one of `kinds`, and all of its shape."""
    kind = resumed.state["model"]["kind"]
    if kind not in kinds:
        script = "train_reduced_sync.py" if kind == "reduced_sync_gpt" else "train.py"
        raise UserError(f"{resumed.path} holds a model of kind {kind!r}: resume it with {script}, or start a "
                        f"new run from its weights with --init_from={resumed.path}")
    kind_of_model = ("model_type",) if "model_type" in config else ()
    take_architecture(config, {"model_type": kind, **resumed.state["model"]["config"]}, resumed.path,
                      (*kind_of_model, *ARCHITECTURE, *VARIANT[kind]))


def take_architecture(config: Config, model_config: dict, path: str,
                      names: tuple[str, ...] = ARCHITECTURE) -> None:
    """Give the settings of the architecture the values of weights that are there already, so that what is
    used, printed and recorded is the same.

    model_config: of those weights; path: where they are. Raises UserError for a setting that the user gave
    and that differs.
    """
    for name in names:
        value = model_config[name]
        if config.origin[name] and config[name] != value:
            hint = f"leave {name} out to go on with that"
            if name == "block_size" and config[name] < value:
                hint += f", or start a new run from its weights with --init_from={path}"
            raise UserError(f"{name}={config[name]} ({config.origin[name]}), but {path} has {name}={value}: "
                            f"{hint}")
        if not config.origin[name]:
            config[name], config.origin[name] = value, "checkpoint"


def check_same_data(checkpoint: Checkpoint, folder: str, fingerprint: dict) -> None:
    """Raise UserError if a data set is not the one that the checkpoint's data cursor points into.

    Digests count only where both were known: a meta.json may have been written later.
    """
    then, tokens = checkpoint.state["data"], ("train_tokens", "val_tokens")
    differ = [f"{then[key]:,} {key.replace('_', ' ')} then, {fingerprint[key]:,} now"
              for key in tokens if then[key] != fingerprint[key]]
    if not differ and then["sha256"] and fingerprint["sha256"] and then["sha256"] != fingerprint["sha256"]:
        differ = ["its tokens have changed"]
    if differ:
        raise UserError(f"{folder} is not the data set that {checkpoint.path} was trained on "
                        f"({', '.join(differ)}): name that one with --dataset=..., or start a new run from "
                        f"its weights with --init_from={checkpoint.path}")


def model_description(kind: str, model: nn.Module) -> dict:
    """The `model` entry of state.json."""
    return {"kind": kind, "config": dataclasses.asdict(model.config)}


def schedule_description(model: nn.Module) -> dict | None:
    """The `schedule` entry of state.json; None for the dense model."""
    schedule = getattr(model, "schedule", None)
    return None if schedule is None else {"syncs": model.syncs, **dataclasses.asdict(schedule)}


def as_kind(model: nn.Module, kind: str, **fields) -> nn.Module:
    """The same weights in a model of another kind, on the CPU. fields: those of VARIANT[kind]."""
    shared = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(GPTConfig)}
    other = build_model({"kind": kind, "config": shared | fields})
    load_parameters(other, dict(model.named_parameters()), "the model")
    return other


def check_size(config: GPTConfig) -> None:
    """Raise UserError for a model that this machine's memory cannot hold, where each is built, in fp32.

    Without this, Linux grants the memory and kills the process that uses it.
    """
    c = config
    n_bytes = 4 * (12 * c.n_layer * c.n_embd**2 + (c.vocab_size + c.block_size) * c.n_embd)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return
    if n_bytes > memory:
        raise UserError(f"n_layer={c.n_layer}, n_embd={c.n_embd}, vocab_size={c.vocab_size} and block_size="
                        f"{c.block_size} make {n_bytes // 2**30:,} GB of parameters, and this machine has "
                        f"{memory // 2**30:,} GB of memory: choose a smaller model")


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
    check_size(config)
    return getattr(module, class_name)(config)


def with_ranks(model: nn.Module, tp_size: int | None, block_types: list | None) -> nn.Module:
    """The same weights on another number of ranks, by their own schedule or by block types; the dense model
    gets ranks (2 if tp_size is None) that synchronise everywhere. Raises UserError."""
    config = model.config
    ranks = tp_size or getattr(config, "tp_size", 2)
    if block_types is None and hasattr(config, "sync_strategy"):
        fields = {name: getattr(config, name) for name in VARIANT["reduced_sync_gpt"]}
        return as_kind(model, "reduced_sync_gpt", **fields | {"tp_size": ranks})
    if block_types is None:
        block_types = getattr(config, "block_types", None)
    return as_kind(model, "distributed_gpt", tp_size=ranks, block_types=block_types)


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


def load_weights(name: str, kind: str = "gpt", variant: dict | None = None, warn=print, group=None,
                 **overrides) -> nn.Module:
    """A model for a new run to begin with, on the CPU: of an out_dir or a checkpoint folder of this
    repository, of a Hugging Face folder, or of a name on its hub.

    kind, variant: what to make of the weights, and its fields of VARIANT; overrides: as of load_model. Says
    so if they were trained with another schedule. Raises UserError.
    """
    variant = variant or {}
    found = find_weights(name, warn=warn, group=group)
    if found is None:
        model = GPT.from_pretrained(name, **overrides)
        return model if kind == "gpt" else as_kind(model, kind, **variant)
    fields = {f.name for f in dataclasses.fields(GPTConfig)}
    shared = {field: value for field, value in found.state["model"]["config"].items() if field in fields}
    model = build_model({"kind": kind, "config": shared | variant}, **overrides)
    load_parameters(model, found.tensors("model"), found.path)
    note_other_schedule(found, model, warn)
    return model


def note_other_schedule(source: Checkpoint, model: nn.Module, say) -> None:
    """Say so if a model computes another function of a checkpoint's weights than they were trained with."""

    def function(schedule: dict | None, tp_size: int) -> tuple:
        drops = schedule is not None and tp_size > 1 and not all(s["sync"] for s in schedule["sublayers"])
        return (tp_size, str(schedule)) if drops else ()

    def words(schedule: dict | None, tp_size: int) -> str:
        return "the dense function" if not function(schedule, tp_size) else \
            f"{schedule['syncs']} syncs on {tp_size} ranks"

    then = source.state.get("schedule"), source.state["model"]["config"].get("tp_size", 1)
    now = schedule_description(model), getattr(model.config, "tp_size", 1)
    if function(*then) != function(*now):
        say(f"{source.path} was trained as {words(*then)} and is run as {words(*now)}")


def seed_random_states(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states(device: torch.device, shared: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """The random states of this process: torch's on CPU and GPU, numpy's and Python's, as tensors.

    shared: the generator that the processes of one model have in common, if there is one.
    """
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
    if shared is not None:
        states["shared"] = shared.get_state()
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device,
                      shared: torch.Generator | None = None) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    version, has_gauss, gauss = states["python_rest"].tolist()
    random.setstate((int(version), tuple(states["python"].tolist()), gauss if has_gauss else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if shared is not None and "shared" in states:
        shared.set_state(states["shared"])
