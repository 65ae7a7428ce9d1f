"""Resuming: settings and state that a run takes from its checkpoint, and checks against it."""

import math

import torch

from configurator import Config, check_type
from nanosync.checkpoint import UNREADABLE, Checkpoint
from nanosync.errors import UserError, shown
from nanosync.model_kind import ModelKind, model_config


def resume_of(config: Config) -> str:
    """Return the checkpoint that a training script resumes, as find_resumed takes it, '' for a new run.

    It is the setting `resume`, or 'latest' for nanoGPT's init_from='resume'. An init_from in a config file
    applies to the first start only, so that the same command can resume the run. Raises UserError if
    init_from and `resume` are both on the command line, because they contradict each other.
    """
    resume, init_from = config["resume"], config.get("init_from", "scratch")
    if init_from == "resume":
        return resume or "latest"
    if resume and "init_from" in config and config.origin["init_from"] == "command line":
        raise UserError(f"init_from={init_from!r} starts a new run and resume={resume!r} resumes one: "
                        f"leave one of them out")
    return resume


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
    """Set the settings that a checkpoint decides: kind of model, architecture, and seed.

    The seed decides the order of the data. Raises UserError if the user gave another value.
    """
    kind = resumed.state["model"]["kind"]
    if kinds[kind].settings_entry == "config":
        values = resumed.state["config"]
    else:
        described = vars(model_config(resumed.state["model"], kinds))
        values = {**described, "model_type": kind, "seed": resumed.state["seed"]}
    first = ("model_type",) if "model_type" in config else ()
    take_values(config, values, resumed.path, (*first, *kinds[kind].settings, "seed"))


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


def check_same_data(checkpoint: Checkpoint, folder: str, fingerprint: dict,
                    kinds: dict[str, ModelKind]) -> None:
    """Raise UserError if a data set is not the data set of a checkpoint, into which its cursor points.

    Digests are compared only if both are known, because a meta.json may have been written later.

    folder, fingerprint: of the data set.
    """
    then, tokens = checkpoint.state["data"], ("train_tokens", "val_tokens")
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
