"""Conversion between this repository's checkpoints and the files of other programs: the table of formats.

A format is read into a `Converted`, and a `Converted` is written in a format. So a new format is one entry of
FORMATS.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.converted import Converted, Options
from models.exported import find_huggingface, read_huggingface, write_huggingface
from models.registry import INFERENCE_KINDS, KINDS
from nanosync import checkpoint, nanogpt_files
from nanosync.checkpoint_writer import save
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write, first_line, made_folder, replace_file
from nanosync.hardware import environment
from nanosync.model_kind import check_size, model_config, model_description, schedule_description
from nanosync.random_states import random_states, seed_random_states
from nanosync.tensor_files import check_values

SEED = 1337  # of nanoGPT, whose checkpoints do not have it, and the default of the training scripts
SETTINGS = "settings.py"  # in a converted out_dir: config file with the settings of another program's run
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Format:
    """A format of models. `find` tells from the path alone and reads no content."""

    title: str
    find: Callable[[str], bool]  # path -> True if it has this format
    read: Callable[[str, Options], Converted]  # raises UserError
    takes: tuple[str, ...]  # fields of Options that `read` uses
    write: Callable[[Converted, str], None] | None = None  # (model, new folder); raises UserError, OSError


def read_nanogpt(path: str, options: Options) -> Converted:
    """Read nanoGPT's ckpt.pt: weights, AdamW's moments, step, settings, best loss."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    found = nanogpt_files.read_checkpoint(path)
    try:
        description = {"kind": "gpt", "config": found.arguments}
        config = model_config(description, KINDS)
    except UserError as e:
        raise UserError(f"{path} cannot be used: {str(e).removeprefix('the checkpoint')}") from None
    _check_shapes(config, found.weights, path)
    converted = Converted(description, {n: w.float().contiguous() for n, w in found.weights.items()}, path,
                          found.step)
    new = options.moments == "new" or not found.optimizer
    converted.optimizer = nanogpt_files.moments({} if new else found.optimizer, found.weights, path)
    converted.state = {"val_loss": found.val_loss, "best_val_loss": found.val_loss,
                       "config": found.config | {"optimizer": "adamw"}}
    converted.take_data(options, found.config.get("dataset"))
    converted.settings = nanogpt_files.settings_text(converted.state["config"])
    converted.notes.append(
        f"step {found.step}, val loss {'unknown' if found.val_loss is None else f'{found.val_loss:.4f}'}")
    converted.resume_notes += [
        "AdamW begins anew" if new else "AdamW's moments are kept",
        "not in the file, so not known: the position in the data and the random states. A resumed run begins "
        "with the first window of epoch 0 and a new seed of dropout"]
    return converted


def _check_shapes(config, weights: dict[str, torch.Tensor], path: str) -> None:
    """Raise UserError unless weights have names and shapes of the model, before memory is used for them."""
    check_size(config)
    with torch.device("meta"):
        expected = {name: p.shape for name, p in KINDS["gpt"].build(config).named_parameters()}
    if unmatched := sorted(set(expected) ^ set(weights)):
        raise UserError(f"{path} cannot be used: its weights are not those of its model_args; "
                        f"{shown(unmatched[0])} is {'missing' if unmatched[0] in expected else 'too many'}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(f"{path} cannot be used: {name} has the shape {tuple(weights[name].shape)}, and "
                            f"by its model_args {tuple(shape)}")
    check_values(weights, path)


def read_checkpoint(path: str, options: Options) -> Converted:
    """Read a checkpoint of this repository, of any kind."""
    found = checkpoint.find_weights(path, options.step, kinds=INFERENCE_KINDS)
    description = found.state["model"]
    if "dropout" in description["config"]:
        description = description | {"config": description["config"] | {"dropout": 0.0}}
    return Converted(description, found.tensors("model"), found.path, found.step, state=found.state,
                     notes=[f"{found.path}: {found.described()}"])


def write_checkpoint(converted: Converted, out_dir: str) -> None:
    """Write a step folder into a new out_dir. Raises UserError or OSError."""
    model = converted.model()
    seed_random_states(SEED)
    states = {f"0.{name}": t for name, t in random_states(CPU).items()}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    state = {"sample": 0, "epoch": 0, "seed": SEED, "evaluated": False, "val_loss": None,
             "best_val_loss": None, "world_size": 1, "scaler": {}, "config": {}, **converted.state,
             "model": model_description(converted.description["kind"], model),
             "schedule": schedule_description(model),
             "environment": environment(CPU) | {"world_size": 1}}
    tensors = {"model": weights, "optim": converted.optimizer, "rng": states}
    if converted.settings:
        replace_file(os.path.join(out_dir, SETTINGS), converted.settings.encode())
    folder = save(out_dir, converted.step, tensors, state, keep=1, best=state["val_loss"] is not None)
    checkpoint.open_checkpoint(folder, INFERENCE_KINDS)  # a wrong entry shows here, not in a run


FORMATS = {
    "checkpoint": Format("a checkpoint of this repository", checkpoint.is_checkpoint, read_checkpoint,
                         ("step",), write_checkpoint),
    "huggingface": Format("a Hugging Face folder", find_huggingface, read_huggingface,
                          ("dataset",), write_huggingface),
    "nanogpt": Format("nanoGPT's ckpt.pt", nanogpt_files.is_checkpoint, read_nanogpt,
                      ("dataset", "moments")),
}


def format_of(path: str) -> str:
    """Return the name of the format of a path. Raises UserError."""
    for name, known in FORMATS.items():
        if known.find(path):
            return name
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: give one of {titles()}")
    raise UserError(f"{path} is none of {titles()}")


def titles() -> str:
    return ", ".join(known.title for known in FORMATS.values())


def convert(path: str, out: str, to: str | None, options: Options) -> tuple[str, list[str]]:
    """Convert a model to a new folder; return the name of its format and lines for the user.

    Raises UserError, and then leaves nothing behind.

    to: name of the format to write; None: Hugging Face for a checkpoint of this repository, a checkpoint for
        everything else.
    """
    source = format_of(path)
    to = to or ("huggingface" if source == "checkpoint" else "checkpoint")
    if source == to:
        raise UserError(f"{path} is {FORMATS[source].title} already: choose another format with --to=...")
    for name in options.given():
        if name not in FORMATS[source].takes:
            takers = " and ".join(known.title for known in FORMATS.values() if name in known.takes)
            raise UserError(f"--{name} is for {takers}, and {path} is {FORMATS[source].title}: leave "
                            f"--{name} out")
    check_new_folder(out)
    converted = FORMATS[source].read(path, options)
    with made_folder(os.path.dirname(os.path.abspath(out))), new_folder(out) as folder:
        FORMATS[to].write(converted, folder)
    if to == "checkpoint":
        converted.notes += converted.resume_notes
    if converted.settings and to == "checkpoint":
        converted.notes.append(f"resume: python train.py {os.path.join(out, SETTINGS)} --out_dir={out} "
                               f"--resume=latest")
    return to, converted.notes


@contextlib.contextmanager
def new_folder(path: str):
    """Make a folder under another name, and give it its name if the body succeeds; else remove it.

    Raises UserError for an error of the disk.
    """
    folder = tempfile.mkdtemp(prefix=".tmp-convert-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        os.chmod(folder, 0o777 & ~_umask())  # mkdtemp's folders are the user's alone
        yield folder
        os.rename(folder, path)
    except BaseException as e:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, OSError) or type(e).__name__ == "SafetensorError":
            raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or first_line(e)}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_new_folder(path: str) -> None:
    """Raise UserError unless a path is free for a new folder, or an empty folder."""
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.path.islink(path)):
        raise UserError(f"{path} exists and is not a folder: name a new folder")
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"{path} is not empty: name a new folder")
    check_can_write(path, "OUT")
