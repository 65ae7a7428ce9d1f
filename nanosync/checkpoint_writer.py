"""Saving checkpoints: copied to the CPU, written in the background, never half-written."""

import math
import os
import shutil
import signal
import threading
import time

import torch
import torch.nn as nn

from nanosync.checkpoint import (
    FILES,
    FORMAT,
    best_step,
    step_folder,
    step_name,
    steps_in,
    verify,
    write_best,
    write_latest,
)
from nanosync.distributed import gather_to_main
from nanosync.errors import UserError
from nanosync.files import sha256_of, write_json
from nanosync.model_kind import model_description, schedule_description
from nanosync.optimizer_state import gather_state, whole_on_cpu
from nanosync.random_states import random_states
from nanosync.tensor_files import write_tensors

POINTS = ("begun", "model", "optim", "rng", "state", "synced", "manifest", "folder synced", "moved aside",
          "published", "latest", "best", "pruned")  # moments of a save, for tests


def _reach(point: str, step: int) -> None:
    """Kill this process if NANOSYNC_KILL_AT in the environment is `point` or `point@step`, for tests."""
    if os.environ.get("NANOSYNC_KILL_AT") in (point, f"{point}@{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def save(out_dir: str, step: int, tensors: dict[str, dict], state: dict, keep: int,
         protect: tuple[int, ...] = (), best: bool = False, verified: dict | None = None) -> str:
    """Write the checkpoint of a step, then prune the older checkpoints; return the new folder.

    Only global rank 0 calls this function. Raises OSError or SafetensorError, and then leaves the earlier
    checkpoints as they were.

    tensors: {"model": ..., "optim": ..., "rng": ...}, each a dict of tensors by name, on the CPU.
    state: JSON values for state.json.
    keep: number of valid checkpoints to keep, the newest.
    protect: steps to keep besides them and the best.
    best: True if state["val_loss"] is the lowest so far.
    verified: see _prune.
    """
    final, folder = step_folder(out_dir, step), os.path.join(out_dir, "ckpt")
    temporary = os.path.join(folder, f".tmp-{step_name(step)}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        os.makedirs(temporary)
        _reach("begun", step)
        for which in ("model", "optim", "rng"):
            write_tensors(tensors[which], os.path.join(temporary, f"{which}.safetensors"))
            _reach(which, step)
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in state.items()}  # JSON has no NaN and no infinity
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
    if os.path.lexists(final):  # the step was saved before, or its checkpoint did not verify
        os.rename(final, os.path.join(folder, f".old-{step_name(step)}-{time.time_ns()}"))
        _reach("moved aside", step)
    os.rename(temporary, final)
    _sync(folder)
    _reach("published", step)
    write_latest(out_dir, step)
    _reach("latest", step)
    if best:  # before pruning, which keeps the best
        write_best(out_dir, step, state["val_loss"])
    _reach("best", step)
    verified = {} if verified is None else verified
    verified[step] = True
    _prune(out_dir, keep, (step, *protect), verified)
    _reach("pruned", step)
    return final


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(out_dir: str, keep: int, protect: tuple[int, ...], verified: dict[int, bool]) -> None:
    """Delete old checkpoints and the rest of interrupted saves.

    keep, protect: see save.
    verified: step -> True if its checkpoint is valid. Steps that are missing here are verified and added.
    """
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
    """Copy all tensors of a checkpoint to the CPU, so that training can continue while they are written.

    Return the `tensors` of `save` on global rank 0, {} on the other processes. All processes must call this
    function. Sharded tensors are gathered one at a time, so GPU memory holds at most one whole tensor more.

    shared: generator that the processes of one model share, see random_states.
    """
    rng = gather_to_main(random_states(device, shared), group)
    main = rng is not None
    tensors = {"model": whole_on_cpu(model, dict(model.named_parameters()), keep=main),
               "optim": gather_state(optimizer, model, keep=main)}
    if not main:
        return {}
    tensors["rng"] = {f"{rank}.{name}": t for rank, states in enumerate(rng) for name, t in states.items()}
    return tensors


def state_of(run, evaluated: bool) -> dict:
    """Make the entries of state.json for a Run's current step.

    evaluated: False if the evaluation due at this step was skipped.
    """
    return {"sample": run.loader.sample, "epoch": run.loader.epoch, "seed": run.config["seed"],
            "evaluated": evaluated, "val_loss": run.val_loss, "best_val_loss": run.best_val_loss,
            "world_size": run.processes.world_size, **run.tp,
            "scaler": {} if run.scaler is None else run.scaler.state_dict(),
            "model": model_description(run.kind, run.model), "schedule": schedule_description(run.model),
            **run.extra_state(), "config": run.config, "data": run.data.fingerprint, "meta": run.data.meta,
            "environment": run.environment}


class Saver:
    """Background writer of a run's checkpoints, one at a time, for global rank 0."""

    def __init__(self, out_dir: str, keep: int, protect: tuple[int, ...], log):
        """Store what every save needs. keep, protect: see `save`; log: TrainingLogger of the run."""
        self.out_dir, self.keep, self.protect, self.log = out_dir, keep, protect, log
        self._verified, self._thread = dict.fromkeys(protect, True), None

    def save(self, step: int, tensors: dict, state: dict, best: bool, since: float) -> None:
        """Wait for the previous checkpoint, then start to write this checkpoint in the background.

        step, tensors, state, best: see the function `save`.
        since: time.perf_counter() when training stopped for this checkpoint.
        """
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
        except Exception as e:  # training continues after any error, and `wait` logs the error
            self._problem = getattr(e, "strerror", None) or str(e) or type(e).__name__

    def poll(self) -> None:
        """Log the result of a checkpoint if it is complete."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self, final: bool = False) -> None:
        """Wait until no checkpoint is pending, and log the result.

        final: raise UserError if the checkpoint could not be written, instead of a warning.
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
            raise UserError(f"{what}: fix this, then resume with --resume=latest")
        self.log.line(f"warning: {what}; training continues")
