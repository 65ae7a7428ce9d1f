"""The folder of a run: its layout, its lock, and the archive of an earlier run's files."""

import contextlib
import glob
import json
import os
import re
import time

from nanosync.checkpoint import Checkpoint, repair_best, step_name, steps_in, write_latest
from nanosync.errors import UserError
from nanosync.files import check_can_write, unused_path
from nanosync.folder_lock import lock_folder

# files that a new run would overwrite, prune or mix with its own
RUN_FILES = ("ckpt", "tensorboard", "latest", "best.json", "log.txt", "status.json")


def check_out_dir(out_dir: str) -> None:
    """Raise UserError if a run cannot write into out_dir, which need not exist yet. Makes no files."""
    if not out_dir:
        raise UserError("out_dir='' is not a folder: name a folder with --out_dir=...")
    if os.path.isfile(os.path.join(out_dir, "MANIFEST.json")):
        raise UserError(f"out_dir={out_dir!r} is a checkpoint of a run: name another folder")
    check_can_write(out_dir, "out_dir")
    for name in (*RUN_FILES, "LOCK"):
        path = os.path.join(out_dir, name)
        if os.path.islink(path):
            raise UserError(f"{path} is a link, and a run writes only inside its out_dir: remove the link, "
                            f"or name another out_dir")
        is_folder = name in ("ckpt", "tensorboard")
        if os.path.lexists(path) and not (os.path.isdir(path) if is_folder else os.path.isfile(path)):
            kind = "folder" if is_folder else "file"
            raise UserError(f"{path} must be a {kind} of the run: move it, or name another out_dir")
    check_can_write(os.path.join(out_dir, "ckpt"), "out_dir")


def lock(out_dir: str, make: bool) -> int | None:
    """Lock out_dir for this process, and restore a checkpoint that a killed run was about to replace.

    make: whether to make the folder and its LOCK; else only an existing LOCK is taken. Returns the file
    descriptor that holds the lock, None if there was nothing to take. Raises UserError if another process
    holds it.
    """
    descriptor = lock_folder(out_dir, "out_dir", make)
    if descriptor is not None:
        _restore(out_dir)
    return descriptor


def _restore(out_dir: str) -> None:
    """Move back each old checkpoint whose new copy was not completed; see checkpoint_writer.save."""
    folder = os.path.join(out_dir, "ckpt")
    for name in sorted(os.listdir(folder) if os.path.isdir(folder) else [], reverse=True):  # newest first
        moved = re.fullmatch(r"\.old-(step-\d{8})-\d+", name)
        if moved and not os.path.lexists(os.path.join(folder, moved[1])):
            os.rename(os.path.join(folder, name), os.path.join(folder, moved[1]))


def job_in(out_dir: str) -> tuple[str, str] | None:
    """Return name and launcher of the torchrun job that wrote status.json last, None if it has no job."""
    path = os.path.join(out_dir, "status.json")
    try:
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as f:
            name, launcher = json.loads(f.read(2**20))["job"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name, launcher


def make_room(out_dir: str, resumed: Checkpoint | None, say, restarted: bool = False) -> None:
    """Archive files in out_dir that a new or resumed run would overwrite, and print their new place.

    resumed: checkpoint of a resumed run, None for a new run. say: function that prints a line.
    restarted: True if torchrun restarted the run. Its files are those of this run and stay.
    """
    mine = resumed is not None and belongs_to(resumed, out_dir)
    if restarted and not mine:
        return
    earlier = archive(out_dir, after=resumed.step if mine else None)
    if earlier is not None:
        whose = f"of later steps than {resumed.step}" if mine else "of an earlier run"
        say(f"moved the {'checkpoints' if mine or steps_in(earlier) else 'log'} {whose} to {earlier}")
    if mine:
        repair_best(out_dir)
        write_latest(out_dir, resumed.step)


def unlock(out_dir: str, out_dir_lock: int) -> None:
    """Release the lock of an out_dir to which the run wrote nothing; remove the folder if it is empty.

    out_dir_lock: file descriptor that `lock` returned.
    """
    os.close(out_dir_lock)
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(out_dir, "LOCK"))
        os.rmdir(out_dir)


@contextlib.contextmanager
def unlocked_on_error(out_dir: str, out_dir_lock: int):
    """Unlock out_dir if the body raises a UserError."""
    try:
        yield
    except UserError:
        unlock(out_dir, out_dir_lock)
        raise


def belongs_to(checkpoint: Checkpoint, out_dir: str) -> bool:
    """Return True if a checkpoint is in out_dir."""
    return os.path.realpath(checkpoint.path).startswith(os.path.join(os.path.realpath(out_dir), "ckpt", ""))


def archive(out_dir: str, after: int | None = None) -> str | None:
    """Move files of an earlier run to a new folder in out_dir; return its path, None if no file was moved.

    after: step of a resumed run's checkpoint. Only checkpoints of later steps are moved, because the run will
        save these steps again. None for a new run: all files are moved.
    """
    if after is None:
        logs = glob.glob(os.path.join(glob.escape(out_dir), "run_*.jsonl"))
        names = (*RUN_FILES, *map(os.path.basename, logs))
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


def open_out_dir(run, held: int | None, source: str | None) -> int:
    """Lock the out_dir of a Run, archive what is in its way, open its logs. Return the lock. Raises
    UserError.

    held: the lock, if the run has it already; source: path of a script that the log keeps.
    """
    config, out_dir = run.config, run.config["out_dir"]
    if held is None:
        held = lock(out_dir, make=True)
    if config.get("wandb_log"):
        with unlocked_on_error(out_dir, held):
            run.log.start_wandb(config["wandb_project"], config["wandb_run_name"], config, out_dir,
                                config["wandb_mode"], run.continues or run.restarted)
    make_room(out_dir, run.resumed, run.line, run.restarted)
    run.log.open_files(out_dir, config, run.environment,
                       run.first_step if run.continues or run.restarted else None, run.was_evaluated,
                       config.get("use_tensorboard", False),
                       epoch=0 if run.resumed is None else run.resumed.state["epoch"])
    run.write_status("running")  # names the job from here on
    if source is not None:
        run.log.source(source)
    return held
