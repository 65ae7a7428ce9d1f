"""The JSON file of an experiment: what it may say, and the command of each of its runs.

    {"experiment_name": "palm_screening", "description": "...", "script": "train_gpt.py",
     "stage": "stage_a_screening", "n_gpus": 1, "base_seed": 42, "target_val_loss": 3.28,
     "modification_type": "architecture", "modification_details": {"...": "for readers"},
     "stage_config": {"num_iterations": 1000, "batch_size": 128}, "hyperparameters": {"variant": "palm"},
     "baseline_val_loss": null, "baseline_std": null}

`stage_config` (what all experiments of a stage have in common) and `hyperparameters` (what is this one's own)
both become --key=value arguments of the script. Run i has the seed base_seed + i. baseline_val_loss and
baseline_std are for a baseline that there are no logs of. They and target_val_loss are for the data set that
the file names: they may be null, and are where --dataset names another.
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

from configurator import Setting, check_type, parse_argument, read_settings, script_defaults, unknown_key
from nanosync.errors import UserError
from nanosync.files import first_line, nearest_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = {"stage_a_screening": 2, "stage_b_validation": 3, "stage_c_full": 5}  # with how many runs
MODIFICATIONS = ("none", "architecture", "schedule", "optimizer", "data", "hyperparameters", "other")
LOSSES = "target_val_loss", "baseline_val_loss", "baseline_std"  # which are of a data set
OF_THE_RUNNER = ("seed", "out_dir", "resume", "list_checkpoints")
NUMBER = (int, float)
SCHEMA = {  # key: types, whether it must be there
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
    """What is in a JSON file, in which no key is there twice and no number is NaN. Raises UserError."""

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
    """The value if it is a number that floats have, else None."""
    if isinstance(value, NUMBER) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return value if math.isfinite(value) else None
    return None


def check_keys(value, schema: dict, where: str) -> None:
    """Raise UserError unless it is an object with the schema's keys, of their types, and no others."""
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
    """Raise UserError unless it can be the name of a folder everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{where}: {key}={name!r} names a folder: use letters, digits, '.', '_' and '-'")


def check_values(config: dict, where: str) -> None:
    """Raise UserError for what no run could be made of."""
    check_name(config["experiment_name"], "experiment_name", where)
    if config["stage"] not in STAGES:
        raise UserError(f"{where}: stage={config['stage']!r} is unknown: use {', '.join(STAGES)}")
    if config["modification_type"] not in MODIFICATIONS:
        raise UserError(f"{where}: modification_type={config['modification_type']!r} is unknown: use "
                        f"{', '.join(MODIFICATIONS)}")
    if not 1 <= config["n_gpus"] <= 1024:
        raise UserError(f"{where}: n_gpus={config['n_gpus']} must be at least 1 (processes, on a CPU)")
    if not 0 <= config["base_seed"] < 2**31:  # the order of the data takes 32 bits of base_seed + run_id
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
        if key in OF_THE_RUNNER:
            raise UserError(f"{where}: {key!r} is set by the runner, the seed as base_seed + run_id")


def script_settings(config: dict, where: str) -> dict[str, Setting]:
    """The settings that the script has, without running more of it than these. Raises UserError."""
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
    """Raise UserError for a setting that the script does not have, or not of that type."""
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
    """An experiment's JSON, complete and checked. overrides: --key=value for the script; a key of
    stage_config is replaced there, any other in hyperparameters; another dataset makes LOSSES null. Raises
    UserError."""
    config = read_json(path)
    check_keys(config, SCHEMA, path)
    config = DEFAULTS | config
    if n_gpus is not None:
        config["n_gpus"] = n_gpus
    settings = script_settings(config, path) if overrides else {}
    dataset = dataset_of(config) if overrides else None
    for argument in overrides:
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
    """Of a relative path: from the root of the repository."""
    return os.path.join(ROOT, os.path.expanduser(config["script"]))


def all_settings(config: dict) -> dict:
    """Of the script: its defaults, and what the experiment says."""
    values = script_defaults(script_path(config))
    names = {setting.name for setting in read_settings(values)}
    return {name: values[name] for name in names} | config["stage_config"] | config["hyperparameters"]


def dataset_of(config: dict) -> str | None:
    """The folder that the runs read; None if none is set."""
    return judged_by(all_settings(config))["dataset"]


def judged_by(settings: dict) -> dict:
    """What a val loss depends on without being better or worse, None if not known: settings of a script, its
    dataset as the folder that dataloader.open_dataset finds."""
    found = {key: settings.get(key) for key in ("dataset", "sequence_length")}
    found |= {key: settings[key] for key in settings if key.startswith("val_") and key != "val_loss_every"}
    name = found["dataset"]
    if isinstance(name, str):
        folder = name if os.sep in name else os.path.join("data", name)
        there = os.sep in name or os.path.isdir(folder)
        found["dataset"] = os.path.realpath(folder if there else os.path.join(ROOT, folder))
    return found


def num_iterations(config: dict) -> int:
    return (config["stage_config"] | config["hyperparameters"])["num_iterations"]


def command(config: dict, run_id: int, out_dir: str, **changed) -> list[str]:
    """What starts run `run_id`; changed: settings of the script that are other than the experiment's."""
    settings = config["stage_config"] | config["hyperparameters"] | {
        "seed": config["base_seed"] + run_id, "out_dir": out_dir} | changed
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",  # torchrun, of this Python
            f"--nproc_per_node={config['n_gpus']}", "--", script_path(config),
            *(f"--{key}={value}" for key, value in settings.items())]


def variables(config: dict, gpus: str | None = None) -> dict[str, str]:
    """Of the environment, what a run needs beside what it finds: its GPUs, and, for a script that is not in
    the root, where its imports are."""
    found = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    if os.path.dirname(os.path.realpath(script_path(config))) != os.path.realpath(ROOT):
        paths = ROOT, os.environ.get("PYTHONPATH")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


def shown(arguments: list[str], environment: dict[str, str]) -> str:
    """A command as one types it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
                     shlex.join(arguments)])
