"""The JSON file of an experiment: its keys and their checks, and the command of each run.

    {"experiment_name": "palm_screening", "description": "...", "script": "train_gpt.py",
     "stage": "stage_a_screening", "n_gpus": 1, "base_seed": 42, "target_val_loss": 3.28,
     "modification_type": "architecture", "modification_details": {"...": "for readers"},
     "stage_config": {"num_iterations": 1000, "batch_size": 128}, "hyperparameters": {"variant": "palm"},
     "baseline_val_loss": null, "baseline_std": null}

`stage_config` (common to all experiments of a stage) and `hyperparameters` (of this experiment) both become
--key=value arguments of the script. Run i has the seed base_seed + i. baseline_val_loss and baseline_std
describe a baseline without logs. These two and target_val_loss belong to the data set that the file names.
They may be null, and become null if --dataset names another data set.
"""

import ast
import contextlib
import difflib
import json
import math
import os
import re
import shlex
import sys

from configurator import (
    Setting,
    check_type,
    join_values,
    parse_argument,
    read_settings,
    script_defaults,
    unknown_key,
)
from nanosync.errors import UserError
from nanosync.files import ROOT, dataset_folder, first_line, nearest_file

STAGES = {"stage_a_screening": 2, "stage_b_validation": 3, "stage_c_full": 5}  # with the number of runs
MODIFICATIONS = ("none", "architecture", "schedule", "optimizer", "data", "hyperparameters", "other")
LOSSES = "target_val_loss", "baseline_val_loss", "baseline_std"  # each belongs to a data set
RUNNER_SETTINGS = ("seed", "out_dir", "resume", "list_checkpoints")  # set by the runner
NUMBER = (int, float)
SCHEMA = {  # key: types, required
    "experiment_name": (str, True), "description": (str, False), "script": (str, True), "stage": (str, True),
    "n_gpus": (int, True), "base_seed": (int, True), "target_val_loss": ((*NUMBER, type(None)), True),
    "modification_type": (str, True), "modification_details": ((dict, str), False),
    "stage_config": (dict, True), "hyperparameters": (dict, True),
    "baseline_val_loss": ((*NUMBER, type(None)), False), "baseline_std": ((*NUMBER, type(None)), False),
}
DEFAULTS = {"description": "", "modification_details": {}, "baseline_val_loss": None, "baseline_std": None}
KINDS = {str: "a string", int: "an integer", float: "a number", dict: "an object", type(None): "null",
         list: "a list", bool: "true or false"}


def read_json(path: str):
    """Read a JSON file. Raises UserError, also for a key that an object has twice, and for NaN."""

    def pairs(items: list) -> dict:
        keys = [key for key, _ in items]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise UserError(f"{path} has {twice.pop()!r} twice in one object")
        return dict(items)

    def constant(name: str):
        raise UserError(f"{path} has the number {name}, which JSON does not: write one that is finite")

    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not JSON: {e.msg}") from None
    except (UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {first_line(e)}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}{nearest_file(path, '.json')}") from None


def finite(value) -> float | int | None:
    """Return a value that is a finite number; None for any other."""
    if isinstance(value, NUMBER) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return value if math.isfinite(value) else None
    return None


def check_keys(value, schema: dict, where: str) -> None:
    """Raise UserError unless a value is an object that matches a schema and has no other keys."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not {KINDS.get(type(value), type(value).__name__)}")
    for key in value:
        if key not in schema:
            near = difflib.get_close_matches(key, schema, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": it may have {', '.join(schema)}"
            raise UserError(f"unknown key {key!r} in {where}{hint}")
    for key, (kinds, needed) in schema.items():
        if key not in value and needed:
            raise UserError(f"{where} has no {key!r}: add it (configs/baseline.json shows all keys)")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key in value and (not isinstance(value[key], kinds)
                             or (isinstance(value[key], bool) and bool not in kinds)):
            names = [KINDS[kind] for kind in kinds if kind is not int or float not in kinds]
            expected = " or ".join(names)
            raise UserError(f"{where}: {key}={json.dumps(value[key])} must be {expected}")


def check_name(name: str, key: str, where: str) -> None:
    """Raise UserError unless a name is portable as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{where}: {key}={name!r} names a folder: use letters, digits, '.', '_' and '-'")


def check_values(config: dict, where: str) -> None:
    """Raise UserError for values outside their ranges."""
    check_name(config["experiment_name"], "experiment_name", where)
    if config["stage"] not in STAGES:
        raise UserError(f"{where}: stage={config['stage']!r} is unknown: use {', '.join(STAGES)}")
    if config["modification_type"] not in MODIFICATIONS:
        raise UserError(f"{where}: modification_type={config['modification_type']!r} is unknown: use "
                        f"{', '.join(MODIFICATIONS)}")
    if not 1 <= config["n_gpus"] <= 1024:
        raise UserError(f"{where}: n_gpus={config['n_gpus']} must be at least 1 (processes, on a CPU)")
    if not 0 <= config["base_seed"] < 2**31:  # the order of the data uses 32 bits of base_seed + run_id
        raise UserError(f"{where}: base_seed={config['base_seed']} must be at least 0 and below 2**31")
    for key in LOSSES:
        if config[key] is not None and (finite(config[key]) is None or config[key] < 0):
            raise UserError(f"{where}: {key}={str(config[key])[:20]} must be finite and not below 0")
    steps = config["stage_config"].get("num_iterations", config["hyperparameters"].get("num_iterations"))
    if type(steps) is not int or steps < 1:
        raise UserError(f"{where}: stage_config needs num_iterations, an integer of at least 1, and has "
                        f"{json.dumps(steps)}")
    both = set(config["stage_config"]) & set(config["hyperparameters"])
    if both:
        raise UserError(f"{where} has {sorted(both)[0]!r} in stage_config and in hyperparameters: keep one")
    for key in (*config["stage_config"], *config["hyperparameters"]):
        if key in RUNNER_SETTINGS:
            raise UserError(f"{where}: {key!r} is set by the runner, the seed as base_seed + run_id")


def script_settings(config: dict, where: str) -> dict[str, Setting]:
    """Return the settings of the script; only their assignments are executed. Raises UserError."""
    path = script_path(config)
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError) as e:
        reason = getattr(e, "strerror", None) or getattr(e, "msg", None) or first_line(e)
        raise UserError(f"{where}: cannot read the script {path}: {reason}") from None
    if not any(isinstance(node, ast.Name) and node.id == "configure" for node in ast.walk(tree)):
        raise UserError(f"{where}: {path} never calls configurator.configure, so its keys are not known: "
                        f"take them by it, as train_gpt.py does")
    return {setting.name: setting for setting in read_settings(script_defaults(path))}


def check_settings(config: dict, where: str) -> None:
    """Raise UserError for a setting that the script lacks or that has another type there."""
    settings = script_settings(config, where)
    for key in ("seed", "out_dir"):
        if key not in settings:
            raise UserError(f"{where}: {config['script']} has no setting {key!r}, which the runner gives it")
    for part in ("stage_config", "hyperparameters"):
        for key, value in config[part].items():
            if key not in settings:
                raise unknown_key(key, settings, f"{part} of {where}")
            check_type(settings[key], value, f"{part} of {where}")
    for name in os.environ:
        if name.startswith("STAGE_") and name[6:].lower() in settings:
            raise UserError(f"the environment has {name}, which would change the runs unseen: unset it, and "
                            f"put {name[6:].lower()!r} into hyperparameters or give it as --key=value")


def load_config(path: str, overrides: list[str] = (), n_gpus: int | None = None) -> dict:
    """Load and check an experiment's JSON, and add defaults.

    overrides: --key=value arguments for the script; a key of stage_config is replaced there, any other key is
    set in hyperparameters, another dataset sets LOSSES to null. Raises UserError.
    """
    config = read_json(path)
    check_keys(config, SCHEMA, path)
    config = DEFAULTS | config
    if n_gpus is not None:
        config["n_gpus"] = n_gpus
    settings = script_settings(config, path) if overrides else {}
    dataset = dataset_of(config) if overrides else None
    for argument in join_values(overrides, settings):
        if not argument.startswith("--"):
            raise UserError(f"cannot read argument {argument!r}: --key=value goes to the script, and --help "
                            f"lists the runner's own options")
        key, value = parse_argument(argument, settings)
        part = "stage_config" if key in config["stage_config"] else "hyperparameters"
        config[part] = config[part] | {key: value}
    if overrides and dataset_of(config) != dataset:
        config |= dict.fromkeys(LOSSES)
    check_values(config, path)
    check_settings(config, path)
    return config


def script_path(config: dict) -> str:
    """Return the path of the script; a relative path starts at the root of the repository."""
    return os.path.join(ROOT, os.path.expanduser(config["script"]))


def all_settings(config: dict) -> dict:
    """Return all settings of the script: its defaults, replaced by the experiment's values."""
    values = script_defaults(script_path(config))
    names = {setting.name for setting in read_settings(values)}
    return {name: values[name] for name in names} | config["stage_config"] | config["hyperparameters"]


def dataset_of(config: dict) -> str | None:
    """Return the data folder of the runs; None if none is set."""
    return judged_by(all_settings(config))["dataset"]


def judged_by(settings: dict) -> dict:
    """Return the settings that define the val tokens of a script, None for unknown ones.

    Losses are comparable only if these are equal. The dataset is the folder that open_dataset would open.
    """
    found = {key: settings.get(key) for key in ("dataset", "sequence_length")}
    found |= {key: settings[key] for key in settings if key.startswith("val_") and key != "val_loss_every"}
    name = found["dataset"]
    if isinstance(name, str):
        found["dataset"] = os.path.realpath(dataset_folder(name))
    return found


def num_iterations(config: dict) -> int:
    """Return the updates of a run."""
    return (config["stage_config"] | config["hyperparameters"])["num_iterations"]


def command(config: dict, run_id: int, out_dir: str, **changed) -> list[str]:
    """Return the command of run `run_id`; changed: settings that differ from the experiment's."""
    settings = config["stage_config"] | config["hyperparameters"] | {
        "seed": config["base_seed"] + run_id, "out_dir": out_dir} | changed
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",  # torchrun, of this Python
            f"--nproc_per_node={config['n_gpus']}", "--", script_path(config),
            *(f"--{key}={value}" for key, value in settings.items())]


def variables(config: dict, gpus: str | None = None) -> dict[str, str]:
    """Return the environment variables that a run needs: its GPUs, and the path of its imports for a script
    that is not in the root."""
    found = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    if os.path.dirname(os.path.realpath(script_path(config))) != os.path.realpath(ROOT):
        paths = ROOT, os.environ.get("PYTHONPATH")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


def shown(arguments: list[str], environment: dict[str, str]) -> str:
    """Return a command as a user types it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
                     shlex.join(arguments)])
