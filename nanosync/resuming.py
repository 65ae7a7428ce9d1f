"""Resuming: settings and state that a run takes from its checkpoint, and checks against it."""

import dataclasses
import math

import torch

from configurator import Config, check_type
from nanosync import run_dir
from nanosync.checkpoint import UNREADABLE, Checkpoint, find, find_resumed, steps_in
from nanosync.diagnose import check_steps
from nanosync.distributed import Job, Processes, all_values, on_main
from nanosync.errors import UserError, shown
from nanosync.foreign_weights import UNKNOWN_DATA, advice
from nanosync.model_kind import ModelKind, model_config


def resume_of(config: Config) -> str:
    """Return the checkpoint that a training script resumes, as find_resumed takes it, '' for a new run.

    It is the setting `resume`, or 'latest' for nanoGPT's init_from='resume'. An init_from in a config file
    applies to the first start only, so that the same command can resume the run. Raises UserError if
    init_from and `resume` are both on the command line, because they contradict each other. With
    resume='auto' they do not: without a checkpoint the run starts from init_from.
    """
    resume, init_from = config["resume"], config.get("init_from", "scratch")
    if init_from == "resume":
        return "latest" if resume in ("", "auto") else resume
    if resume == "auto":
        return resume
    if resume and "init_from" in config and config.origin["init_from"] == "command line":
        raise UserError(f"init_from={init_from!r} starts a new run and resume={resume!r} resumes one: "
                        f"leave one of them out")
    return resume


def start_from(config: Config, processes: Processes, say, kinds: dict[str, ModelKind], own: tuple[str, ...]
               ) -> tuple[Checkpoint | None, bool]:
    """Find the checkpoint that a run resumes, take its settings and print its progress.

    Return the same as find_checkpoint. Raises UserError. own: names of the kinds that the script trains.
    """
    resumed, restarted = find_checkpoint(config, processes, say, kinds)
    if config.get("diagnose"):
        check_steps(config, 0 if resumed is None else resumed.step)
    if resumed is not None:
        check_kind(resumed, kinds, own)
        take_settings(config, resumed, kinds)
        say(f"resuming from {resumed.path}: {progress_of(resumed)}")
    return resumed, restarted


def find_checkpoint(config: Config, processes: Processes, say, kinds: dict[str, ModelKind]
                    ) -> tuple[Checkpoint | None, bool]:
    """Find the checkpoint that a run resumes; return (checkpoint or None, True after a restart by torchrun).

    After a restart it is the newest valid checkpoint in out_dir, whatever the settings say. The settings
    apply if out_dir has no valid checkpoint. All processes must call this function. Raises UserError.

    say: function that prints a line. kinds: see open_checkpoint.
    """
    resume, out_dir, group = resume_of(config), config["out_dir"], processes.group
    restarted = not (config.get("eval_only") or config.get("diagnose")) and is_restart(out_dir, group)
    if restarted:
        say(f"restarted by torchrun: the run in {out_dir} continues")
    if restarted or resume == "auto":
        found = on_main(lambda: _newest(out_dir, say, kinds), group)
        if found is not None or resume in ("", "auto"):
            return found, restarted
    return find_resumed(resume, out_dir, say, group, kinds) if resume else None, restarted


def is_restart(out_dir: str, group) -> bool:
    """Return True if torchrun restarted this job after the job had begun to write into out_dir.

    A job that ended before that time may find files of an earlier run in out_dir, which it must not resume.
    The restarts that torchrun counts are not enough: a machine does not count a failure on another machine.
    All processes must call this function.
    """
    job = Job.of_process()
    restarts = all_values(0 if job is None else job.restarts, group)
    writer = on_main(lambda: run_dir.job_in(out_dir), group)
    job = on_main(lambda: job, group)  # of global rank 0, which wrote the name of the job
    if job is None or writer is None:
        return False
    same_name, same_launcher = job.name == writer[0], job.launcher == writer[1]
    return same_name and (same_launcher or (job.name != "none" and any(restarts)))


def _newest(out_dir: str, say, kinds: dict[str, ModelKind]) -> Checkpoint | None:
    """Return the newest valid checkpoint in out_dir, None if out_dir has no valid checkpoint."""
    if not steps_in(out_dir):
        unread = advice(out_dir)
        say(f"no checkpoint in {out_dir}{f' ({unread})' if unread else ''}: this is the start of the run")
        return None
    try:
        return find(out_dir, "latest", say, None, kinds)
    except UserError as e:
        say(f"warning: {e}: this is the start of the run")
        return None


def _scripts_own(kind: str | None, kinds: dict[str, ModelKind]) -> bool:
    """Return True if only the script that trains the kind can use its weights."""
    return kind in kinds and (kinds[kind].config is None or kinds[kind].settings_entry == "config")


def check_kind(resumed: Checkpoint, kinds: dict[str, ModelKind], own: tuple[str, ...]) -> None:
    """Raise UserError unless the model of a resumed run is of one of the script's own kinds."""
    kind = resumed.state["model"].get("kind")
    if kind not in own:
        weights = "" if any(_scripts_own(name, kinds) for name in (kind, *own)) else \
            f", or start a new run from its weights with --init_from={resumed.path}"
        script = kinds[kind].script if kind in kinds else "the script that wrote it"
        raise UserError(f"{resumed.path} holds a model of kind {kind!r}: resume it with {script}{weights}")


def take_settings(config: Config, resumed: Checkpoint, kinds: dict[str, ModelKind]) -> None:
    """Set the settings that a checkpoint decides: kind of model, architecture, document mask, and seed.

    The seed decides the order of the data. Raises UserError if the user gave another value.
    """
    kind = resumed.state["model"]["kind"]
    if kinds[kind].settings_entry == "config":
        values = resumed.state["config"]
        if not values:
            raise UserError(f"{resumed.path} was converted from a folder of weights and has no settings of "
                            f"{kinds[kind].script}: sample and evaluate it; it cannot be resumed")
        # a switch that the script has since then was off
        values = {f.name: f.default for f in dataclasses.fields(kinds[kind].config) if f.default is False} \
            | values
    else:
        described = vars(model_config(resumed.state["model"], kinds))
        mask = resumed.state["config"].get("document_mask", False)
        values = {**described, "model_type": kind, "seed": resumed.state["seed"], "document_mask": mask}
    own = tuple(name for name in ("model_type", "document_mask") if name in config)
    take_values(config, values, resumed.path, (*own, *kinds[kind].settings, "seed"))


def take_values(config: Config, values: dict, path: str, names: tuple[str, ...]) -> None:
    """Set settings to the values of existing weights, so that the log shows the values that are used.

    Raises UserError if the user gave another value.

    values: values of the weights, by name of the setting.
    path: path of the weights, for error messages.
    names: names of the settings.
    """
    for name in names:
        if name not in values:
            raise UserError(f"{path} has no {name}: another version of this script wrote it; resume with "
                            f"that version")
        value = values[name]
        if name in config.settings:
            value = check_type(config.settings[name], value, path)
        if config.origin[name] and config[name] != value:
            hint = f"leave {name} out to keep the checkpoint's value"
            if name == "block_size" and config[name] < value:
                hint += f", or start a new run from its weights with --init_from={path}"
            raise UserError(f"{name}={config[name]} ({config.origin[name]}), but {path} has {name}={value}: "
                            f"{hint}")
        if not config.origin[name]:
            config[name], config.origin[name] = value, "checkpoint"


def progress_of(resumed: Checkpoint) -> str:
    """Return a text with the step, the epoch and the val loss of a checkpoint."""
    state = resumed.state
    name, loss = "val loss", state["val_loss"]
    if loss is None:  # no evaluation at this step
        name, loss = "best val loss", state["best_val_loss"]
    return f"step {resumed.step}, epoch {state['epoch']}, {name} {'n/a' if loss is None else f'{loss:.4f}'}"


def check_same_data(checkpoint: Checkpoint, folder: str, fingerprint: dict,
                    kinds: dict[str, ModelKind]) -> None:
    """Raise UserError if a data set is not the data set of a checkpoint, into which its cursor points.

    Digests are compared only if both are known, because a meta.json may have been written later. A converted
    checkpoint of another program may have UNKNOWN_DATA; it has no cursor.

    folder, fingerprint: of the data set.
    """
    then, tokens = checkpoint.state["data"], ("train_tokens", "val_tokens")
    if then == UNKNOWN_DATA:
        return
    weights = "" if _scripts_own(checkpoint.state.get("model", {}).get("kind"), kinds) else \
        f" from its weights with --init_from={checkpoint.path}"
    if not all(type(then.get(key)) is int for key in tokens):
        raise UserError(f"{checkpoint.path} does not say on which data it was trained: start a new "
                        f"run{weights}")
    differ = [f"{then[key]:,} {key.replace('_', ' ')} then, {fingerprint[key]:,} now"
              for key in tokens if then[key] != fingerprint[key]]
    digests = then.get("sha256"), fingerprint["sha256"]
    if not differ and all(digests) and digests[0] != digests[1]:
        differ = ["its tokens have changed"]
    if differ:
        raise UserError(f"{folder} is not the data set that {checkpoint.path} was trained on "
                        f"({', '.join(differ)}): name that data set with --dataset=..., or start a new "
                        f"run{weights}")


def load_scaler(scaler: torch.amp.GradScaler | None, resumed: Checkpoint) -> None:
    """Load a GradScaler's state, if the checkpoint has a state, as with float16. Raises UserError."""
    state = resumed.state["scaler"]
    if scaler is None or not state:
        return
    try:
        for name in scaler.state_dict():
            least = 0 if name == "_growth_tracker" else 1e-30
            if type(state[name]) not in (int, float) or not least <= state[name] < math.inf:
                raise ValueError(f"{name} is {shown(state[name])}")
        scaler.load_state_dict(state)
        float(scaler.get_scale())
    except (RuntimeError, *UNREADABLE) as e:
        raise UserError(f"{resumed.path} has an invalid state of the loss scaler ({type(e).__name__}: {e})"
                        ) from None
