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

import contextlib
import dataclasses
import glob
import importlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from configurator import Config, UserError, check_can_write
from data.files import json_text, replace_file, sha256_of, unused_path, write_json
from distributed import Sharding, gather_to_main, on_main, whole_tensor
from model import GPT, GPTConfig
from optim import gather_state, whole_on_cpu

FORMAT = 1
FILES = ("model.safetensors", "optim.safetensors", "rng.safetensors", "state.json")
SPEEDRUN = "speedrun_gpt"  # train_gpt.py's kind, which no other script uses
SCRIPTS = {"gpt": "train.py", "distributed_gpt": "train.py", "reduced_sync_gpt": "train_reduced_sync.py",
           SPEEDRUN: "train_gpt.py"}  # that train a kind
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
STEP_NAME = re.compile(r"step-(\d{8,})")
MAX_JSON = 64 * 2**20  # bytes
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
# what a run depends on in state.json, and its types
STATE = {"step": int, "sample": int, "epoch": int, "seed": int, "world_size": int, "evaluated": bool,
         "val_loss": (float, type(None)), "best_val_loss": (float, type(None)), "scaler": dict, "model": dict,
         "data": dict, "meta": (dict, type(None)), "config": dict}
# what a new run would overwrite, prune or mix with its own
OF_A_RUN = ("ckpt", "tensorboard", "latest", "best.json", "log.txt", "status.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that matched its manifest."""

    path: str
    step: int
    state: dict  # of state.json

    def described(self) -> str:
        """Step and val loss, for people."""
        val_loss = self.state["val_loss"]
        return f"step {self.step}, val loss {'not measured' if val_loss is None else f'{val_loss:.4f}'}"

    def tensors(self, which: str) -> dict[str, torch.Tensor]:
        """'model', 'optim' or 'rng' -> tensors by name, on the CPU, read when they are used. Raises
        UserError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = os.path.join(self.path, f"{which}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:  # another machine of the run may not see the folder
            raise UserError(f"cannot read {path}: {e}") from None


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folder(out_dir: str, step: int) -> str:
    """Where the checkpoint of a step is."""
    return os.path.join(out_dir, "ckpt", step_name(step))


def check_out_dir(out_dir: str) -> None:
    """Raise UserError unless a run can write into out_dir, which need not exist yet. Leaves nothing there."""
    if not out_dir:
        raise UserError("out_dir='' is no folder: name one with --out_dir=...")
    check_can_write(out_dir, "out_dir")
    for name in (*OF_A_RUN, "LOCK"):
        path = os.path.join(out_dir, name)
        if os.path.islink(path):
            raise UserError(f"{path} is a link, and a run writes nothing outside its out_dir: remove it, or "
                            f"name another out_dir")
        is_folder = name in ("ckpt", "tensorboard")
        if os.path.lexists(path) and os.path.isdir(path) != is_folder:
            kind = "folder" if is_folder else "file"
            raise UserError(f"{path} is in the way of the run's {kind} of that name: move it, or name "
                            f"another out_dir")
    check_can_write(os.path.join(out_dir, "ckpt"), "out_dir")


POINTS = ("begun", "model", "optim", "rng", "state", "synced", "manifest", "folder synced", "moved aside",
          "published", "latest", "best", "pruned")  # moments of a save, for tests


def _reach(point: str, step: int) -> None:
    """Kill this process if the environment's NANOSYNC_KILL_AT is this point, alone or as `point@step`."""
    if os.environ.get("NANOSYNC_KILL_AT") in (point, f"{point}@{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def save(out_dir: str, step: int, tensors: dict[str, dict], state: dict, keep: int,
         protect: tuple[int, ...] = (), best: bool = False, verified: dict | None = None) -> str:
    """Write the checkpoint of a step, then drop all but the last `keep` that verify, the best and the steps
    in `protect`.

    tensors: {"model": ..., "optim": ..., "rng": ...}, each tensors by name, on the CPU; state: JSON values;
    best: whether its state["val_loss"] is the lowest so far; verified: what is known of other steps, see
    _prune. Returns the folder. For one process, rank 0. Raises OSError or SafetensorError, and then leaves
    what was there before.
    """
    from safetensors.torch import save_file

    final, folder = step_folder(out_dir, step), os.path.join(out_dir, "ckpt")
    temporary = os.path.join(folder, f".tmp-{step_name(step)}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        os.makedirs(temporary)
        _reach("begun", step)
        for which in ("model", "optim", "rng"):
            save_file(tensors[which], os.path.join(temporary, f"{which}.safetensors"))
            _reach(which, step)
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in state.items()}  # JSON has no others
        write_json(os.path.join(temporary, "state.json"), {"format": FORMAT, "step": step, **finite})
        _reach("state", step)
        manifest = {}
        for name in FILES:
            path = os.path.join(temporary, name)
            _sync(path)
            manifest[name] = {"size": os.path.getsize(path), "sha256": sha256_of(path)}
        _reach("synced", step)
        write_json(os.path.join(temporary, "MANIFEST.json"), manifest)
        _reach("manifest", step)
        _sync(temporary)
        _reach("folder synced", step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if os.path.lexists(final):  # a step that was saved before and is saved again, or did not verify
        os.rename(final, os.path.join(folder, f".old-{step_name(step)}-{time.time_ns()}"))
        _reach("moved aside", step)
    os.rename(temporary, final)
    _sync(folder)
    _reach("published", step)
    write_latest(out_dir, step)
    _reach("latest", step)
    if best:  # before pruning, which must know what to spare
        write_best(out_dir, step, state["val_loss"])
    _reach("best", step)
    verified = {} if verified is None else verified
    verified[step] = True
    _prune(out_dir, keep, (step, *protect), verified)
    _reach("pruned", step)
    return final


def write_latest(out_dir: str, step: int) -> None:
    replace_file(os.path.join(out_dir, "latest"), f"{step_name(step)}\n".encode())


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(out_dir: str, keep: int, protect: tuple[int, ...], verified: dict[int, bool]) -> None:
    """verified: of steps, whether they do, as far as that is known; the others are verified here, once."""
    spared, best = 0, best_step(out_dir)
    for step in reversed(steps_in(out_dir)):
        path = step_folder(out_dir, step)
        if step not in verified:
            verified[step] = verify(path) is None
        if spared < keep and verified[step]:
            spared += 1
        elif step != best and step not in protect:
            shutil.rmtree(path, ignore_errors=True)
    for name in os.listdir(os.path.join(out_dir, "ckpt")):
        if name.startswith((".tmp-", ".old-")):
            shutil.rmtree(os.path.join(out_dir, "ckpt", name), ignore_errors=True)


def snapshot(model: nn.Module, optimizer, device: torch.device, shared: torch.Generator | None,
             group) -> dict:
    """What `save` takes as tensors, copied to the CPU, so that training can go on while they are written.
    One tensor at a time: what is on other GPUs never needs more room here than that.

    shared: see random_states. All processes take part; all but the first get an empty dict.
    """
    rng = gather_to_main(random_states(device, shared), group)
    main = rng is not None
    tensors = {"model": whole_on_cpu(model, dict(model.named_parameters()), keep=main),
               "optim": gather_state(optimizer, model, keep=main)}
    if not main:
        return {}
    tensors["rng"] = {f"{rank}.{name}": t for rank, states in enumerate(rng) for name, t in states.items()}
    return tensors


class Saver:
    """Writes the checkpoints of a run in the background, one at a time; for rank 0."""

    def __init__(self, out_dir: str, keep: int, protect: tuple[int, ...], log):
        """keep, protect: as of `save`; log: a TrainingLogger, told of every checkpoint."""
        self.out_dir, self.keep, self.protect, self.log = out_dir, keep, protect, log
        self._verified, self._thread = dict.fromkeys(protect, True), None

    def save(self, step: int, tensors: dict, state: dict, best: bool, since: float) -> None:
        """Begin to write, once the one before is written; since: time.perf_counter() when training began to
        stand still for it."""
        self.wait()
        self._state = {"step": step, "val_loss": state["val_loss"], "seconds": time.perf_counter() - since}
        self._bytes = sum(t.nbytes for named in tensors.values() for t in named.values())
        self._path = self._problem = None
        self._thread = threading.Thread(target=self._write, args=(step, tensors, state, best),
                                        name="checkpoint")
        self._thread.start()

    def _write(self, step, tensors, state, best) -> None:
        try:
            for name, tensor in tensors["model"].items():
                if not tensor.isfinite().all():
                    raise ValueError(f"{name} is not finite")
            self._path = save(self.out_dir, step, tensors, state, self.keep, self.protect, best,
                              self._verified)
        except Exception as e:  # whatever it is, training goes on, and the main thread says so
            self._problem = getattr(e, "strerror", None) or str(e) or type(e).__name__

    def poll(self) -> None:
        """Say what became of a checkpoint as soon as that is known."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, final: bool = False) -> None:
        """Wait until nothing is being written. A checkpoint that could not be written is warned of, or, if
        final, raises UserError.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._problem is None:
            self.log.checkpoint(path=self._path, **self._state)
            return
        where = step_folder(self.out_dir, self._state["step"])
        try:
            free = f"{shutil.disk_usage(self.out_dir).free:,}"
        except OSError:
            free = "an unknown number"
        what = f"cannot save checkpoint {where}: {self._problem} ({self._bytes:,} bytes, {free} are free)"
        if final:
            raise UserError(f"{what}: mend that, and go on with --resume=latest")
        self.log.line(f"warning: {what}; the run goes on")


def _read_json(path: str):
    """A JSON file of a checkpoint. Raises ValueError or OSError; no device, pipe or giant is read."""
    if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) > MAX_JSON:
        raise ValueError(f"{path} is no file, or too large")
    with open(path, encoding="utf-8") as f:
        return json.load(f)


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
        return int(_read_json(os.path.join(out_dir, "best.json"))["step"])
    except UNREADABLE:
        return None


def mend_best(out_dir: str) -> None:
    """Let best.json name the best checkpoint there is; a run cut off while saving can leave it behind."""
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
        os.unlink(os.path.join(out_dir, "best.json"))  # none is known


def verify(path: str) -> str | None:
    """What is wrong with a checkpoint folder, None if its files are those of its manifest."""
    if os.path.islink(path) or not os.path.isdir(path):
        return "it is not a folder"
    try:
        manifest = _read_json(os.path.join(path, "MANIFEST.json"))
        with open(os.path.join(path, "MANIFEST.json"), encoding="utf-8") as f:
            text = f.read()
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
        if text != json_text(manifest):  # nothing else in the folder vouches for the manifest
            raise ValueError
    except UNREADABLE:
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
    try:
        state = _read_json(os.path.join(path, "state.json"))
        if state.get("format") != FORMAT:
            raise UserError(f"checkpoint {path} has format {state.get('format')!r}; this program reads "
                            f"{FORMAT}")
        state.setdefault("evaluated", True)  # written since saving does not wait for an evaluation
        for name, kind in STATE.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} is {state[name]!r}")
        step = STEP_NAME.fullmatch(os.path.basename(os.path.abspath(path)))
        if step is None or int(step[1]) != state["step"]:
            raise ValueError(f"it is of step {state['step']}")
        if not 0 <= state["sample"] < 2**53:
            raise ValueError(f"sample is {state['sample']}")
        model_config(state["model"])
    except UserError as e:
        raise UserError(f"checkpoint {path} cannot be used: {e}") from None
    except UNREADABLE as e:
        raise UserError(f"checkpoint {path} cannot be used: its state.json is not what a run writes "
                        f"({type(e).__name__}: {e})") from None
    return Checkpoint(path, state["step"], state)


def resume_of(config: Config) -> str:
    """What a training script is to go on with, '' for nothing: its `resume`, or for nanoGPT's
    init_from='resume' the latest.

    An init_from of a config file counts for the first start, and the same command goes on later; one beside
    `resume` on the command line asks for two things. Raises UserError for that.
    """
    resume, init_from = config["resume"], config["init_from"]
    if init_from == "resume":
        return resume or "latest"
    if resume and config.origin["init_from"] == "command line":
        raise UserError(f"init_from={init_from!r} starts a new run and resume={resume!r} goes on with one: "
                        f"leave one of them out")
    return resume


def find_resumed(resume: str, out_dir: str, warn=print, group=None) -> Checkpoint:
    """The checkpoint that --resume=... names: 'latest', 'best' or a step of out_dir, or the path of one or of
    another out_dir. Raises UserError.
    """
    if resume in ("latest", "best") or resume.isdecimal():
        return find(out_dir, resume, warn, group)
    found = find_weights(resume, warn=warn, group=group)
    if found is None:
        raise UserError(f"resume={resume!r} is no checkpoint: use latest, best, a step, or the path of a "
                        f"checkpoint or an out_dir (steps in {out_dir}: "
                        f"{', '.join(map(str, steps_in(out_dir))) or 'none'})")
    return found


def listing(out_dir: str) -> str:
    """A table of the checkpoints in out_dir: step, epoch, val loss, size, date, and whether they verify."""
    if not steps_in(out_dir):
        return f"no checkpoint in {out_dir}"
    best = best_step(out_dir)
    lines = [f"{'step':>9}  {'epoch':>5}  {'val loss':>8}  {'size':>9}  {'saved':19}"]
    for step in steps_in(out_dir):
        path = step_folder(out_dir, step)
        problem = None
        try:
            state = open_checkpoint(path).state
        except UserError as e:
            state, problem = {}, str(e).partition("cannot be used: ")[2] or str(e)
        size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path)) \
            if os.path.isdir(path) else 0
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.lstat(path).st_mtime))
        val_loss = state.get("val_loss")
        val_loss = "-" if val_loss is None else f"{val_loss:.4f}"
        note = f"not valid: {problem}" if problem else "valid, the best" if step == best else "valid"
        lines.append(f"{step:9}  {state.get('epoch', '-'):>5}  {val_loss:>8}  {size / 1e6:6.1f} MB  {saved}  "
                     f"{note}")
    return "\n".join(lines)


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
    if which == "best" and best_step(out_dir) is None:
        warn(f"{out_dir} has no best.json, so no checkpoint of it is known to be the best: taking the latest")
        which = "latest"
    if which != "latest":
        step = best_step(out_dir) if which == "best" else int(which) if str(which).isdecimal() else None
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{out_dir} has no checkpoint {which!r}; it has the steps {there}")
        return open_checkpoint(step_folder(out_dir, step))
    reason = None
    for step in reversed(steps):
        try:
            return open_checkpoint(step_folder(out_dir, step))
        except UserError as e:
            reason = reason or e
            warn(f"warning: {e}; trying the one before")
    raise UserError(f"none of the {len(steps)} checkpoints in {out_dir} can be used; the newest: {reason}")


def lock(out_dir: str, make: bool) -> int | None:
    """Take out_dir for this process as long as it lives; a process that dies lets go of it, however it does.

    make: whether to make the folder and its LOCK; else only one that is there is taken. Returns what keeps
    it, None if there was nothing to take. Raises UserError if another process has it.
    """
    import fcntl

    path = os.path.join(out_dir, "LOCK")
    try:
        if make:
            os.makedirs(out_dir, exist_ok=True)
        flags = os.O_NOFOLLOW | (os.O_CREAT if make else 0)
        try:
            descriptor, writable = os.open(path, os.O_RDWR | flags, 0o666), True
        except PermissionError:  # another user's, who may have left long ago
            descriptor, writable = os.open(path, os.O_RDONLY | os.O_NOFOLLOW), False
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"cannot open {path}: {e.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if writable:
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode().ljust(80), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 80, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{out_dir} is in use by {holder}: wait for it or end it, or name another "
                        f"--out_dir=...") from None
    except OSError as e:
        raise UserError(f"cannot lock {path} ({e.strerror}): name an out_dir on a file system that has locks "
                        f"and room") from None
    _restore(out_dir)
    return descriptor


def _restore(out_dir: str) -> None:
    """Bring back a step that was moved aside for a new copy of it that did not come."""
    folder = os.path.join(out_dir, "ckpt")
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else [], reverse=True):  # newest first
        moved = re.fullmatch(r"\.old-(step-\d{8})-\d+", name)
        if moved and not os.path.lexists(os.path.join(folder, moved[1])):
            os.rename(os.path.join(folder, name), os.path.join(folder, moved[1]))


def make_room(out_dir: str, resumed: Checkpoint | None, say) -> None:
    """Move aside what is in the way of a run that begins or goes on in out_dir, and say so."""
    mine = resumed is not None and belongs_to(resumed, out_dir)
    earlier = set_aside(out_dir, after=resumed.step if mine else None)
    if earlier is not None:
        whose = f"of later steps than {resumed.step}" if mine else "of an earlier run"
        say(f"moved the {'checkpoints' if mine or steps_in(earlier) else 'log'} {whose} to {earlier}")
    if mine:
        mend_best(out_dir)
        write_latest(out_dir, resumed.step)


def unlock(out_dir: str, held: int) -> None:
    """Let go of an out_dir that nothing was written to; one that is empty then goes."""
    os.close(held)
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(out_dir, "LOCK"))
        os.rmdir(out_dir)


def belongs_to(checkpoint: Checkpoint, out_dir: str) -> bool:
    """Whether a checkpoint lies in out_dir."""
    return os.path.realpath(checkpoint.path).startswith(os.path.join(os.path.realpath(out_dir), "ckpt", ""))


def set_aside(out_dir: str, after: int | None = None) -> str | None:
    """Move what an earlier run left in out_dir to a folder of its own; its name, None if there was none.

    after: only the checkpoints of later steps, which a run that goes on from that step will make anew.
    """
    if after is None:
        logs = glob.glob(os.path.join(glob.escape(out_dir), "run_*.jsonl"))
        names = (*OF_A_RUN, *map(os.path.basename, logs))
        there = [name for name in names if os.path.lexists(os.path.join(out_dir, name))]
    else:
        there = [os.path.join("ckpt", step_name(step)) for step in steps_in(out_dir) if step > after]
    if not there:
        return None
    folder = unused_path(os.path.join(out_dir, time.strftime("earlier-%Y%m%d-%H%M%S")))
    for name in there:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def check_kind(resumed: Checkpoint, kinds: tuple[str, ...]) -> None:
    """Raise UserError unless the model of a run that is resumed is of one of the script's kinds."""
    kind = resumed.state["model"].get("kind")
    if kind not in kinds:
        weights = "" if SPEEDRUN in (kind, *kinds) else \
            f", or start a new run from its weights with --init_from={resumed.path}"
        script = SCRIPTS.get(kind, "the script that wrote it")
        raise UserError(f"{resumed.path} holds a model of kind {kind!r}: resume it with {script}{weights}")


def take_model(config: Config, resumed: Checkpoint, kinds: tuple[str, ...]) -> None:
    """take_architecture of a run that is resumed: its kind of model, one of `kinds`, all of its shape, and
    the seed, which decides the order of the data."""
    check_kind(resumed, kinds)
    kind = resumed.state["model"]["kind"]
    kind_of_model = ("model_type",) if "model_type" in config else ()
    described = vars(model_config(resumed.state["model"])[1])
    settings = {"model_type": kind, "seed": resumed.state["seed"], **described}
    take_architecture(config, settings, resumed.path,
                      (*kind_of_model, *ARCHITECTURE, *VARIANT[kind], "seed"))


def take_architecture(config: Config, model_config: dict, path: str,
                      names: tuple[str, ...] = ARCHITECTURE) -> None:
    """Give the settings of the architecture the values of weights that are there already, so that what is
    used, printed and recorded is the same.

    model_config: of those weights; path: where they are. Raises UserError for a setting that the user gave
    and that differs.
    """
    for name in names:
        if name not in model_config:
            raise UserError(f"{path} has no {name}: it is of another version of this script; go on with that")
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
    weights = "" if checkpoint.state.get("model", {}).get("kind") == SPEEDRUN else \
        f" from its weights with --init_from={checkpoint.path}"
    if not all(isinstance(then.get(key), int) for key in tokens):
        raise UserError(f"{checkpoint.path} does not say what data it was trained on: start a new "
                        f"run{weights}")
    differ = [f"{then[key]:,} {key.replace('_', ' ')} then, {fingerprint[key]:,} now"
              for key in tokens if then[key] != fingerprint[key]]
    digests = then.get("sha256"), fingerprint["sha256"]
    if not differ and all(digests) and digests[0] != digests[1]:
        differ = ["its tokens have changed"]
    if differ:
        raise UserError(f"{folder} is not the data set that {checkpoint.path} was trained on "
                        f"({', '.join(differ)}): name that one with --dataset=..., or start a new "
                        f"run{weights}")


def load_scaler(scaler: torch.amp.GradScaler, resumed: Checkpoint) -> None:
    """Give a GradScaler the state that it had; there is none unless the dtype was float16 then. Raises
    UserError."""
    if not resumed.state["scaler"]:
        return
    try:
        scaler.load_state_dict(resumed.state["scaler"])
        float(scaler.get_scale())
    except (RuntimeError, *UNREADABLE) as e:
        raise UserError(f"the scaler's state in {resumed.path} is none ({type(e).__name__}: {e})") from None


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


def check_size(config) -> None:
    """Raise UserError for a model whose parameters this machine's memory cannot hold, in fp32. config: a
    GPTConfig, also one without block_size, whose model learns no positions.

    Without this, Linux grants the memory and kills the process that uses it.
    """
    shape = {name: getattr(config, name) for name in ("n_layer", "n_embd", "vocab_size", "block_size")
             if hasattr(config, name)}
    rows = shape["vocab_size"] + shape.get("block_size", 0)
    n_bytes = 4 * (12 * shape["n_layer"] * shape["n_embd"]**2 + rows * shape["n_embd"])
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return
    if n_bytes > memory:
        named = ", ".join(f"{name}={value}" for name, value in shape.items())
        raise UserError(f"{named} make {n_bytes // 2**30:,} GB of parameters, and this machine has "
                        f"{memory // 2**30:,} GB of memory: choose a smaller model")


def model_config(description: dict, **overrides) -> tuple[type, object]:
    """The class and the configuration of a `model` entry. Raises UserError."""
    kind = description.get("kind")
    if kind not in MODELS:
        hint = f"only {SCRIPTS[kind]} can use it" if kind in SCRIPTS else f"known are {', '.join(MODELS)}"
        raise UserError(f"the checkpoint holds a model of kind {kind!r}: {hint}")
    module_name, class_name, config_name = MODELS[kind]
    module = importlib.import_module(module_name)
    try:
        config = getattr(module, config_name)(**{**description["config"], **overrides})
    except (TypeError, KeyError) as e:
        raise UserError(f"the checkpoint's model configuration does not fit {config_name}: {e}") from None
    return getattr(module, class_name), config


def build_model(description: dict, **overrides) -> nn.Module:
    """A model with the architecture of a `model` entry, freshly initialised, or without values if PyTorch's
    default device is 'meta'. Raises UserError."""
    model_class, config = model_config(description, **overrides)
    if torch.get_default_device().type != "meta":
        check_size(config)
    return model_class(config)


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


def fill(model: nn.Module, weights, where: str, device: torch.device,
         sharding: Sharding | None = None) -> None:
    """Give a model on any device, which may be in parts on several processes, its parameters on `device`, one
    at a time, and shard it on the way.

    weights: (name, value) of each, as the dense model has them, or a dict of them, which is taken in the
    model's order; where: they are from. Raises UserError if names or shapes differ.
    """
    names = fill_each(model, weights, where, device)
    if sharding is None:
        deque(names, maxlen=0)
    else:
        sharding.shard_as_filled(model, names)


@torch.no_grad()
def fill_each(model: nn.Module, weights, where: str, device: torch.device):
    """`fill` as an iterator that yields the name of each parameter when it has its value."""
    places = {}  # (module, attribute) of each parameter; a tied one has two
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False):
            places.setdefault(id(p), []).append((module, attribute))
    parameters, given = dict(model.named_parameters()), set()
    if isinstance(weights, dict):
        order = {name: i for i, name in enumerate(parameters)}
        weights = sorted(weights.items(), key=lambda item: order.get(item[0], -1))
    problem = "{} does not fit the model: {} is {} there and {} here"
    for name, value in weights:
        if name not in parameters:
            raise UserError(problem.format(where, name, tuple(value.shape), "not"))
        try:
            part = model.own_part({name: value})[name]
        except (IndexError, RuntimeError):  # it has too few dimensions for that
            part = value
        p = parameters[name]
        if part.shape != p.shape:
            raise UserError(problem.format(where, name, tuple(part.shape), tuple(p.shape)))
        filled = nn.Parameter(part.to(device, p.dtype, copy=True))
        for module, attribute in places[id(p)]:
            setattr(module, attribute, filled)
        given.add(name)
        yield name
    if missing := sorted(set(parameters) - given):
        raise UserError(problem.format(where, missing[0], "not", tuple(parameters[missing[0]].shape)))


def unsharded(model: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of a model that FSDP sharded, whole but for its tensor-parallel parts, for what does not go
    through its forward pass; a model that is not sharded, itself. All processes take part."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"), contextlib.redirect_stdout(None):  # what it says of itself is known
        copy = build_model(model_description(kind, model)).to(dtype)
    ranks = getattr(model, "ranks", None)
    if ranks is not None and ranks.group is not None:
        copy.place(ranks)
    weights = ((name, model.whole({name: whole_tensor(p)})[name]) for name, p in model.named_parameters())
    fill(copy, weights, "the sharded model", device)
    return copy


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
    """The inverse of `random_states`. Raises UserError if they are no such states."""
    try:
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
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as e:
        raise UserError(f"the checkpoint's rng.safetensors holds no random states ({type(e).__name__}: {e})"
                        ) from None


def resume_random_states(resumed: Checkpoint, processes, tp_processes: int,
                         shared: torch.Generator | None, say) -> None:
    """Give this process the random states that its rank had; on other processes than then, new ones, a pure
    function of (seed, step, rank)."""
    then = resumed.state["world_size"], resumed.state.get("tp_processes", 1)
    if then == (processes.world_size, tp_processes):
        states = {name.partition(".")[2]: t for name, t in resumed.tensors("rng").items()
                  if name.startswith(f"{processes.rank}.")}
        return set_random_states(states, processes.device, shared)
    of_a_model = f" (tp_processes={then[1]} and {tp_processes})" if then[1] != tp_processes else ""
    say(f"saved on {then[0]} processes and resumed on {processes.world_size}{of_a_model}: dropout masks "
        f"differ from here on, the order of the data does not")
    key = resumed.state["seed"] % 2**64, resumed.step
    seed_random_states(_seed_of(*key, processes.rank))
    if shared is not None:
        shared.manual_seed(_seed_of(*key, 2**40 + processes.dp_rank))


def _seed_of(*key: int) -> int:
    """63 bits that are a pure function of a key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
