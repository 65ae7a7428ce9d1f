"""Checkpoints: without executable content, independent of how the run was parallelised, never half-written.

    out_dir/ckpt/step-00001000/model.safetensors    parameters by name, fp32, whole
                               optim.safetensors    optimizer state as {parameter}.{entry}
                               rng.safetensors      random states as {rank}.{generator}
                               state.json           step, data cursor, configuration, versions, ...
                               MANIFEST.json        size and SHA-256 of each file above
    out_dir/latest                                  name of the newest, for users; loading does not read it
    out_dir/best.json                               step and val loss of the best

A checkpoint is written to a folder .tmp-step-..., its files are synced, the manifest comes last, and then the
folder is renamed. So a folder with its final name is complete. Loading takes the newest step whose files
match its manifest. Tensors are safetensors and the rest is JSON: loading never unpickles.
"""

import contextlib
import math
import os
import re
import time
import typing
from dataclasses import dataclass

import torch

from nanosync.distributed import env_rank, on_main
from nanosync.errors import UserError, shown
from nanosync.files import (
    MAX_JSON,
    json_text,
    os_error_as_user_error,
    parse_json,
    read_file,
    replace_file,
    sha256_of,
    write_json,
)
from nanosync.foreign_weights import advice
from nanosync.model_kind import ModelKind, model_config
from nanosync.sync_schedule import Sublayer, SyncSchedule
from nanosync.tensor_files import check_values, read_tensors
from nanosync.token_files import check_meta

FORMAT = 1
FILES = ("model.safetensors", "optim.safetensors", "rng.safetensors", "state.json")
STEP_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,14})")  # the names that step_name makes
MAX_COUNT = 2**53  # of steps, samples, processes
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# entries of state.json that a resumed run needs, and their types
STATE = {"step": int, "sample": int, "epoch": int, "seed": int, "world_size": int, "evaluated": bool,
         "val_loss": float | None, "best_val_loss": float | None, "scaler": dict, "model": dict,
         "data": dict, "meta": dict | None, "config": dict}
OTHER_STATE = {"tp_processes": int, "schedule": dict | None}  # entries that only some scripts write
LEAST = {"seed": -2**63, "world_size": 1, "tp_processes": 1}  # 0 for all other integers


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that matched its manifest."""

    path: str
    step: int
    state: dict  # contents of state.json

    def described(self) -> str:
        """Return a text with step and val loss."""
        val_loss = self.state["val_loss"]
        return f"step {self.step}, val loss {'not measured' if val_loss is None else f'{val_loss:.4f}'}"

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        """Load tensors by name on the CPU. Raises UserError, also if weights or moments are not finite.

        which: 'model', 'optim' or 'rng'.
        """
        path = os.path.join(self.path, f"{which}.safetensors")
        tensors = read_tensors(path)  # the folder may be missing on another machine of the run
        if which != "rng":
            check_values(tensors, path)
        return tensors


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folder(out_dir: str, step: int) -> str:
    """Return the path of a step's checkpoint."""
    return os.path.join(out_dir, "ckpt", step_name(step))


def write_latest(out_dir: str, step: int) -> None:
    replace_file(os.path.join(out_dir, "latest"), f"{step_name(step)}\n".encode())


def _read(path: str) -> bytes:
    """Read a JSON file of a checkpoint. Raises ValueError or OSError, also for a link."""
    if os.path.islink(path):
        raise ValueError(f"{path} is a link")
    return read_file(path, MAX_JSON)


def _read_json(path: str):
    return parse_json(_read(path))


def steps_in(out_dir: str) -> list[int]:
    """Return the steps that have a checkpoint folder, valid or not, in ascending order. Other names in ckpt/
    are ignored. Raises UserError if ckpt/ cannot be read."""
    folder = os.path.join(out_dir, "ckpt")
    with os_error_as_user_error(f"cannot read {folder}"):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(m[1]) for m in map(STEP_NAME.fullmatch, names) if m)


def write_best(out_dir: str, step: int, val_loss: float) -> None:
    os.makedirs(out_dir, exist_ok=True)
    write_json(os.path.join(out_dir, "best.json"), {"step": step, "val_loss": val_loss})


def best_step(out_dir: str) -> int | None:
    """Return the step that best.json names, None if best.json cannot be read."""
    try:
        step = _read_json(os.path.join(out_dir, "best.json"))["step"]
    except UNREADABLE:
        return None
    return step if type(step) is int else None


def repair_best(out_dir: str) -> None:
    """Make best.json name the valid checkpoint with the lowest val loss.

    A run that was killed while it saved can leave best.json out of date.
    """
    losses = {}
    for step in steps_in(out_dir):
        try:
            state = _read_json(os.path.join(step_folder(out_dir, step), "state.json"))
            losses[step] = float(state["val_loss"])
        except UNREADABLE:
            continue
    for step in sorted((s for s in losses if math.isfinite(losses[s])), key=losses.get):
        if step == best_step(out_dir):
            return
        if verify(step_folder(out_dir, step)) is None:
            return write_best(out_dir, step, losses[step])
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(out_dir, "best.json"))  # no valid checkpoint has a val loss


def verify(path: str) -> str | None:
    """Return the problem of a checkpoint folder, None if its files match its manifest."""
    if os.path.islink(path) or not os.path.isdir(path):
        return "it is not a folder"
    try:
        text = _read(os.path.join(path, "MANIFEST.json"))
        manifest = parse_json(text)
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
        if text != json_text(manifest).encode():  # it has no checksum, so its text is canonical
            raise ValueError
    except UNREADABLE:
        return "its MANIFEST.json is missing or unreadable"
    if set(entries) != set(FILES):
        return f"its MANIFEST.json lists {shown(sorted(entries))}"
    for name, (size, digest) in entries.items():
        file = os.path.join(path, name)
        if os.path.islink(file) or not os.path.isfile(file):
            return f"{name} is missing"
        if os.path.getsize(file) != size:
            return f"{name} has {os.path.getsize(file)} bytes, not {size}"
        try:
            if sha256_of(file) != digest:
                return f"{name} does not match its SHA-256"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return None


def open_checkpoint(path: str, kinds: dict[str, ModelKind] | None = None) -> Checkpoint:
    """Verify and open a checkpoint folder. Raises UserError.

    kinds: the model kinds that the caller accepts. None accepts all, without a check of the model's
        configuration.
    """
    problem = verify(path)
    if problem is not None:
        raise UserError(f"checkpoint {path} cannot be used: {problem}")
    try:
        state = _read_json(os.path.join(path, "state.json"))
        if state.get("format") != FORMAT:
            raise UserError(f"it has format {shown(state.get('format'))}; this program reads {FORMAT}")
        state.setdefault("evaluated", True)  # older checkpoints lack it, and were saved after evaluations
        _check_state(state, kinds)
        if os.path.basename(os.path.abspath(path)) != step_name(state["step"]):
            raise ValueError(f"it is of step {state['step']}")
    except UserError as e:
        raise UserError(f"checkpoint {path} cannot be used: {e}") from None
    except UNREADABLE as e:
        raise UserError(f"checkpoint {path} cannot be used: its state.json is malformed "
                        f"({type(e).__name__}: {e})") from None
    return Checkpoint(path, state["step"], state)


def _check_state(state: dict, kinds: dict[str, ModelKind] | None) -> None:
    """Check types and ranges of the contents of state.json. Raises UNREADABLE or UserError."""
    kind = state["model"]["kind"]
    own = {} if kinds is None or type(kind) is not str or kind not in kinds else kinds[kind].state
    for name, wanted in (STATE | OTHER_STATE | own).items():
        if name not in state and name in OTHER_STATE:
            continue
        value, types = state[name], typing.get_args(wanted) or (wanted,)
        if type(value) not in types:
            raise ValueError(f"{name} is {shown(value)}")
        if type(value) is int and not LEAST.get(name, 0) <= value < (2**63 if name == "seed" else MAX_COUNT):
            raise ValueError(f"{name} is {value}")
    if state["meta"] is not None:
        check_meta(state["meta"], "its data set's meta.json")
    schedule = state.get("schedule")
    if schedule is not None:
        if type(schedule["syncs"]) is not int:
            raise ValueError(f"its schedule has syncs={shown(schedule['syncs'])}")
        SyncSchedule(tuple(Sublayer(**sublayer) for sublayer in schedule["sublayers"]),
                     schedule.get("channels", 1.0))
    if kinds is not None:
        model_config(state["model"], kinds)


def find_resumed(resume: str, out_dir: str, warn=print, group=None,
                 kinds: dict[str, ModelKind] | None = None) -> Checkpoint:
    """Find the checkpoint that --resume=... names. Raises UserError.

    resume: 'latest', 'best' or a step of out_dir, or the path of a checkpoint or of another out_dir.
    warn, group: see find. kinds: see open_checkpoint.
    """
    if resume in ("latest", "best") or _is_step(resume):
        return find(out_dir, resume, warn, group, kinds)
    found = find_weights(resume, warn=warn, group=group, kinds=kinds)
    if found is None:
        raise UserError(advice(resume) or f"resume={resume!r} is not a checkpoint: use latest, best, a step, "
                        f"or the path of a checkpoint or an out_dir (steps in {out_dir}: "
                        f"{', '.join(map(str, steps_in(out_dir))) or 'none'})")
    return found


def listing(out_dir: str, kinds: dict[str, ModelKind] | None = None) -> str:
    """Return a table of the checkpoints in out_dir: step, epoch, val loss, size, date, validity."""
    if not steps_in(out_dir):
        return f"no checkpoint in {out_dir}"
    best = best_step(out_dir)
    lines = [f"{'step':>9}  {'epoch':>5}  {'val loss':>8}  {'size':>9}  {'saved':19}"]
    for step in steps_in(out_dir):
        path = step_folder(out_dir, step)
        problem = None
        try:
            state = open_checkpoint(path, kinds).state
        except UserError as e:
            state, problem = {}, str(e).partition("cannot be used: ")[2] or str(e)
        size = 0
        with contextlib.suppress(OSError):  # not a folder, or not readable
            size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path))
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.lstat(path).st_mtime))
        val_loss = state.get("val_loss")
        val_loss = "-" if val_loss is None else f"{val_loss:.4f}"
        note = f"not valid: {problem}" if problem else "valid, the best" if step == best else "valid"
        lines.append(f"{step:9}  {state.get('epoch', '-'):>5}  {val_loss:>8}  {size / 1e6:6.1f} MB  {saved}  "
                     f"{note}")
    return "\n".join(lines)


def find(out_dir: str, which: str | int = "latest", warn=print, group=None,
         kinds: dict[str, ModelKind] | None = None) -> Checkpoint:
    """Find a checkpoint of out_dir. Raises UserError if out_dir has no checkpoint that can be used.

    which: 'latest', 'best' or a step. 'latest' is the newest checkpoint that verifies.
    warn: function that prints a line, called for each newer checkpoint that does not verify.
    group: the group's first process decides for all processes.
    kinds: see open_checkpoint.
    """
    return on_main(lambda: _find(out_dir, which, warn, kinds), group)


def find_weights(name: str, which: str | int = "latest", warn=print, group=None,
                 kinds: dict[str, ModelKind] | None = None) -> Checkpoint | None:
    """Return the checkpoint of a path, None if the path has none. Raises UserError.

    None means that `name` is for GPT.from_pretrained.

    name: path of a checkpoint folder step-XXXXXXXX, or of an out_dir.
    which, warn, group: see find, for an out_dir. kinds: see open_checkpoint.
    """
    if STEP_NAME.fullmatch(os.path.basename(os.path.normpath(name))):
        return on_main(lambda: open_checkpoint(name, kinds), group)
    return on_main(lambda: _find(name, which, warn, kinds) if steps_in(name) else None, group)


def is_checkpoint(path: str) -> bool:
    """Return True for a checkpoint folder by its name, or an out_dir with checkpoints, valid or not."""
    step = STEP_NAME.fullmatch(os.path.basename(os.path.normpath(path)))
    return (step is not None and os.path.isdir(path)) or bool(steps_in(path))


def _is_step(text: str) -> bool:
    return text.isdecimal() and len(text) < 16


def _find(out_dir: str, which: str | int, warn, kinds) -> Checkpoint:
    steps = steps_in(out_dir)
    if not steps:
        raise UserError(advice(out_dir) or f"no checkpoint in {out_dir}: train with --out_dir={out_dir} "
                        f"first, or name another out_dir")
    if which == "best" and best_step(out_dir) is None:
        warn(f"{out_dir} has no readable best.json, so its best checkpoint is unknown: using the latest")
        which = "latest"
    if which != "latest":
        step = best_step(out_dir) if which == "best" else int(which) if _is_step(str(which)) else None
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{out_dir} has no checkpoint {which!r}; it has the steps {there}")
        return open_checkpoint(step_folder(out_dir, step), kinds)
    reason = None
    for step in reversed(steps):
        try:
            return open_checkpoint(step_folder(out_dir, step), kinds)
        except UserError as e:
            reason = reason or e
            warn(f"warning: {e}; trying the previous checkpoint")
    raise UserError(f"none of the {len(steps)} checkpoints in {out_dir} can be used; the newest: {reason}")


def exit_with_listing(config: dict, kinds: dict[str, ModelKind]) -> None:
    """Print the checkpoints in out_dir and exit, if list_checkpoints is set."""
    if config["list_checkpoints"]:
        if env_rank() == 0:
            print(listing(config["out_dir"], kinds))
        raise SystemExit(0)
