"""The JSON file of an experiment: its keys and their checks, and the command of each run.

    {"experiment_name": "nanogpt_palm_screening", "description": "...", "script": "train_gpt.py",
     "stage": "stage_a_screening", "n_gpus": 1, "base_seed": 42, "target_val_loss": 3.28,
     "modification_type": "architecture", "modification_details": {"...": "for readers"},
     "stage_config": {"num_iterations": 1000, "batch_size": 128},
     "hyperparameters": {"variant": "palm", "notes": "for readers"},
     "baseline_val_loss": null, "baseline_std": null}

experiment_name and script are required; DEFAULTS has the rest. stage may be short, as in A_screening.
Settings of the script are in `hyperparameters`, which become --key=value arguments, and in `stage_config`,
common to all experiments of a stage, which becomes environment variables STAGE_<KEY>. For a script that does
not call configure(..., environment="STAGE_") both become arguments. Run i has the seed base_seed + i.
baseline_val_loss and baseline_std describe a baseline without logs. These two and target_val_loss belong to
the data set that the file names. They may be null, and become null if --dataset names another data set. The
code of the script is never executed here.
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
    literal_defaults,
    parse_argument,
    read_settings,
    unknown_key,
)
from nanosync.errors import UserError
from nanosync.files import MAX_JSON, ROOT, dataset_folder, first_line, is_utf8, nearest_file, read_file
from nanosync.token_files import split_files

STAGES = {"stage_a_screening": 2, "stage_b_validation": 3, "stage_c_full": 5}  # with the number of runs
SHORT_STAGES = {"A_screening": "stage_a_screening", "B_validation": "stage_b_validation",
                "C_full": "stage_c_full"}
NOTES = "notes"  # entry of hyperparameters for readers
LOSSES = "target_val_loss", "baseline_val_loss", "baseline_std"  # each belongs to a data set
RUNNER_SETTINGS = ("seed", "out_dir", "resume", "list_checkpoints")  # set by the runner
NUMBER = (int, float)
SCHEMA = {  # key: types, required
    "experiment_name": (str, True), "description": (str, False), "script": (str, True), "stage": (str, False),
    "n_gpus": (int, False), "base_seed": (int, False), "target_val_loss": ((*NUMBER, type(None)), False),
    "modification_type": (str, False), "modification_details": ((dict, str), False),
    "stage_config": (dict, False), "hyperparameters": (dict, False),
    "baseline_val_loss": ((*NUMBER, type(None)), False), "baseline_std": ((*NUMBER, type(None)), False),
}
DEFAULTS = {"description": "", "stage": "stage_a_screening", "n_gpus": 1, "base_seed": 42,
            "target_val_loss": None, "modification_type": "none", "modification_details": {},
            "stage_config": {}, "hyperparameters": {}, "baseline_val_loss": None, "baseline_std": None}
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
        text = read_file(path, MAX_JSON).decode()
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        check_strings(value, path)
        return value
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not JSON: {e.msg}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as e:  # also a number of thousands of digits
        raise UserError(f"{path} is not JSON: {first_line(e)}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}{nearest_file(path, '.json')}") from None


def check_strings(value, where: str) -> None:
    """Raise UserError for a string that no command, file name or terminal takes: one with a NUL or a lone
    surrogate."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and ("\0" in value or not is_utf8(value)):
            raise UserError(f"{where}: {value[:40]!a} has a NUL or a lone surrogate: remove it")
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


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
        raise UserError(f"{where}: stage={config['stage'][:40]!r} is unknown: use "
                        f"{', '.join([*STAGES, *SHORT_STAGES])}")
    if not 1 <= config["n_gpus"] <= 1024:
        raise UserError(f"{where}: n_gpus={config['n_gpus']} must be at least 1 (processes, on a CPU)")
    if not 0 <= config["base_seed"] < 2**31:  # the order of the data uses 32 bits of base_seed + run_id
        raise UserError(f"{where}: base_seed={config['base_seed']} must be at least 0 and below 2**31")
    for key in LOSSES:
        if config[key] is not None and (finite(config[key]) is None or config[key] < 0):
            raise UserError(f"{where}: {key}={str(config[key])[:20]} must be finite and not below 0")
    both = set(config["stage_config"]) & set(config["hyperparameters"])
    if both:
        raise UserError(f"{where} has {sorted(both)[0]!r} in stage_config and in hyperparameters: keep one")
    for key in (*config["stage_config"], *config["hyperparameters"]):
        if key in RUNNER_SETTINGS:
            raise UserError(f"{where}: {key!r} is set by the runner, the seed as base_seed + run_id")


def script_settings(config: dict, where: str) -> dict[str, Setting]:
    """Return the settings of the script, which is not executed. Raises UserError."""
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
    return {setting.name: setting for setting in read_settings(literal_defaults(path) | {"__file__": path})}


def check_settings(config: dict, where: str) -> None:
    """Raise UserError for a setting that the script lacks or that has another type there."""
    settings = script_settings(config, where)
    for key in ("seed", "out_dir"):
        if key not in settings:
            raise UserError(f"{where}: {config['script']} has no setting {key!r}, which the runner gives it")
    for part in ("stage_config", "hyperparameters"):
        for key, value in config[part].items():
            if key == NOTES and key not in settings:
                continue
            if key not in settings:
                raise unknown_key(key, settings, f"{part} of {where}")
            check_type(settings[key], value, f"{part} of {where}")
    steps = num_iterations(config)
    if type(steps) is not int or not 1 <= steps < 2**53:
        raise UserError(f"{where}: stage_config needs num_iterations, an integer of at least 1, and has "
                        f"{json.dumps(steps)[:40]}")
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
    config["stage"] = SHORT_STAGES.get(config["stage"], config["stage"])
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
    """Return the path of the script; a relative path starts at the root of the repository, with or without
    experiments/."""
    path = os.path.join(ROOT, os.path.expanduser(config["script"]))
    at_root = os.path.join(ROOT, config["script"].removeprefix("experiments/"))
    return at_root if os.path.isfile(at_root) and not os.path.exists(path) else path


def reads_stage_variables(config: dict) -> bool:
    """Return True if the script takes settings from variables STAGE_<KEY>."""
    with open(script_path(config), encoding="utf-8") as f:
        calls = [node for node in ast.walk(ast.parse(f.read())) if isinstance(node, ast.Call)]
    keywords = [keyword for call in calls if isinstance(call.func, ast.Name) and call.func.id == "configure"
                for keyword in call.keywords if keyword.arg == "environment"]
    return any(isinstance(k.value, ast.Constant) and k.value.value == "STAGE_" for k in keywords)


def all_settings(config: dict) -> dict:
    """Return all settings of the script: its defaults, replaced by the experiment's values."""
    return literal_defaults(script_path(config)) | config["stage_config"] | arguments_of(config)


def arguments_of(config: dict) -> dict:
    """Return the hyperparameters without the notes for readers."""
    return {key: value for key, value in config["hyperparameters"].items() if key != NOTES}


def dataset_of(config: dict) -> str | None:
    """Return the data folder of the runs; None if none is set."""
    return judged_by(all_settings(config))["dataset"]


def check_data(config: dict) -> None:
    """Raise UserError if the runs would find no tokens."""
    folder = dataset_of(config)
    if isinstance(folder, str):
        for split in ("train", "val"):
            split_files(folder, split)


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
    return all_settings(config).get("num_iterations")


def command(config: dict, run_id: int, out_dir: str, **changed) -> list[str]:
    """Return the command of run `run_id`; changed: settings that differ from the experiment's."""
    stage = {} if reads_stage_variables(config) else config["stage_config"]
    settings = stage | arguments_of(config) | {
        "seed": config["base_seed"] + run_id, "out_dir": out_dir} | changed
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",  # torchrun, of this Python
            f"--nproc_per_node={config['n_gpus']}", "--", script_path(config),
            *(f"--{key}={value}" for key, value in settings.items())]


def variables(config: dict, gpus: str | None = None) -> dict[str, str]:
    """Return the environment variables that a run needs: its GPUs, stage_config, and the path of its imports
    for a script that is not in the root."""
    found = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    if config["stage_config"] and reads_stage_variables(config):
        found |= {f"STAGE_{key.upper()}": str(value) for key, value in config["stage_config"].items()}
    if os.path.dirname(os.path.realpath(script_path(config))) != os.path.realpath(ROOT):
        paths = ROOT, os.environ.get("PYTHONPATH")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


def shown(arguments: list[str], environment: dict[str, str]) -> str:
    """Return a command as a user types it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
                     shlex.join(arguments)])
