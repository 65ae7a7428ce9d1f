"""The JSON file of an experiment: its keys and their checks, and the command of each run.

    {"experiment_name": "nanogpt_palm_screening", "description": "...", "script": "train_gpt.py",
     "stage": "stage_a_screening", "n_gpus": 1, "base_seed": 42, "target_val_loss": 3.28,
     "modification_type": "architecture", "modification_details": {"...": "for readers"},
     "stage_config": {"num_iterations": 1000, "batch_size": 128},
     "hyperparameters": {"variant": "palm", "notes": "for readers"},
     "baseline_val_loss": null, "baseline_std": null}

experiment_name and script are required; DEFAULTS has the rest. stage may be short, as in A_screening or A.
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
import functools
import json
import math
import os
import re
import shlex
import sys

from configurator import (
    MAX_CONFIG_FILE,
    Setting,
    check_type,
    join_values,
    literal_defaults,
    parse_argument,
    read_settings,
    unknown_key,
)
from nanosync import files
from nanosync.errors import UserError, shortened, shown
from nanosync.files import MAX_DEPTH, ROOT, dataset_folder, first_line, is_utf8, nearest_file, read_file

STAGES = {"stage_a_screening": 2, "stage_b_validation": 3, "stage_c_full": 5}  # with the number of runs
SHORT_STAGES = {"A_screening": "stage_a_screening", "B_validation": "stage_b_validation",
                "C_full": "stage_c_full"} | {stage[6].upper(): stage for stage in STAGES}
MAX_RUNS = 10_000  # of an experiment
MAX_NUMBER = 1e100  # size of a loss or time; its square is still finite
MAX_VALUE = 100_000  # characters of a setting; Linux takes 131,072 in one argument or variable
STEPS = "num_iterations", "max_iters"  # settings that are the updates of a run, of scripts that have them
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
    try:
        value = files.read_json(path)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}, line {e.lineno}: not JSON: {e.msg}") from None
    except ValueError as e:  # also a number of thousands of digits
        raise UserError(f"{path}: {first_line(e)}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}{nearest_file(path, '.json')}") from None
    check_stored(value, path)
    return value


def check_stored(value, where: str) -> None:
    """Raise UserError for a value that cannot be written again or used: a string with a NUL or a lone
    surrogate, a number beyond 64 bits or fp64, values nested deeper than MAX_DEPTH."""
    pending = [(value, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: its values are nested too deeply")
        if isinstance(value, str) and ("\0" in value or not is_utf8(value)):
            raise UserError(f"{where}: {value[:40]!a} has a NUL or a lone surrogate: remove it")
        if type(value) is int and not -2**63 <= value < 2**63:
            raise UserError(f"{where}: {shown(value)} does not fit into 64 bits")
        if type(value) is float and not math.isfinite(value):
            raise UserError(f"{where} has {value}, and its numbers must be finite")
        if isinstance(value, dict):
            pending += [(item, depth + 1) for item in (*value, *value.values())]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]


def printable(text: str) -> str:
    """Return a text with escapes for all characters that a terminal or a reader of JSON would not take."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


def stage_name(name: str) -> str:
    """Return the name in STAGES that a short name stands for; any other name as it is."""
    return SHORT_STAGES.get(name, name)


def finite(value) -> float | int | None:
    """Return a value that is a finite number; None for any other."""
    if isinstance(value, NUMBER) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return value if math.isfinite(value) else None
    return None


def in_range(value, least: float = 0, most: float = MAX_NUMBER) -> bool:
    """Return True for a finite number within a range."""
    return finite(value) is not None and least <= value <= most


def check_keys(value, schema: dict, where: str) -> None:
    """Raise UserError unless a value is an object that matches a schema and has no other keys."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, not {KINDS.get(type(value), type(value).__name__)}")
    for key in value:
        if key not in schema:
            near = difflib.get_close_matches(key[:80], schema, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": it may have {', '.join(schema)}"
            raise UserError(f"unknown key {shown(key)} in {where}{hint}")
    for key, (kinds, needed) in schema.items():
        if key not in value and needed:
            raise UserError(f"{where} has no {key!r}: add it (configs/baseline.json shows all keys)")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key in value and (not isinstance(value[key], kinds)
                             or (isinstance(value[key], bool) and bool not in kinds)):
            names = [KINDS[kind] for kind in kinds if kind is not int or float not in kinds]
            expected = " or ".join(names)
            raise UserError(f"{where}: {key}={shortened(json.dumps(value[key]), 80)} must be {expected}")


def check_options(of: dict[str, tuple[str, ...]], command: str, given: list[str]) -> None:
    """Raise UserError for an option of other commands. of: command -> its options; given: the arguments."""
    names = [word.partition("=")[0].removeprefix("--") for word in given if word.startswith("--")]
    for name in names:
        owners = [owner for owner, options in of.items() if name in options]
        if owners and command not in owners:
            raise UserError(f"--{name} is for {' and '.join(owners)}: leave it out of {command}")


def check_name(name: str, key: str, where: str) -> None:
    """Raise UserError unless a name is portable as the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"{where}: {key}={shown(name)} names a folder: use up to 100 letters, digits, '.', "
                        f"'_' and '-', a letter or digit first")


def check_values(config: dict, where: str) -> None:
    """Raise UserError for values outside their ranges."""
    check_name(config["experiment_name"], "experiment_name", where)
    if config["stage"] not in STAGES:
        raise UserError(f"{where}: stage={shown(config['stage'])} is unknown: use "
                        f"{', '.join([*STAGES, *SHORT_STAGES])}")
    if not 1 <= config["n_gpus"] <= 1024:
        raise UserError(f"{where}: n_gpus={config['n_gpus']} must be at least 1 (processes, on a CPU) and at "
                        f"most 1024")
    if not 0 <= config["base_seed"] < 2**31:  # the order of the data uses 32 bits of base_seed + run_id
        raise UserError(f"{where}: base_seed={config['base_seed']} must be at least 0 and below 2**31")
    for key in LOSSES:
        if config[key] is not None and not in_range(config[key]):
            raise UserError(f"{where}: {key}={shown(config[key])} must be finite and not below 0")
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
        tree = script_tree(path)
        script_defaults(path)
    except (OSError, SyntaxError, ValueError) as e:
        reason = getattr(e, "strerror", None) or getattr(e, "msg", None) or first_line(e)
        raise UserError(f"{where}: cannot read the script {path}: {reason}") from None
    if not any(isinstance(node, ast.Name) and node.id == "configure" for node in ast.walk(tree)):
        raise UserError(f"{where}: {path} never calls configurator.configure, so its keys are not known: "
                        f"take them by it, as train_gpt.py does")
    return dict(_settings(path, _stamp(path)))


def _stamp(path: str) -> tuple[int, int]:
    """Return time and size of a file, for caches of what it contains. Raises OSError."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=16)
def _defaults(path: str, stamp: tuple[int, int]) -> dict:
    return literal_defaults(path)


@functools.lru_cache(maxsize=16)
def _settings(path: str, stamp: tuple[int, int]) -> dict[str, Setting]:
    return {setting.name: setting for setting in read_settings(_defaults(path, stamp) | {"__file__": path})}


def script_defaults(path: str) -> dict:
    """Return the literal defaults of a script; it is parsed again if it has changed."""
    return dict(_defaults(path, _stamp(path)))


def script_tree(path: str) -> ast.Module:
    """Parse a script; again if it has changed. Raises OSError, SyntaxError or ValueError."""
    return _tree(path, _stamp(path))


@functools.lru_cache(maxsize=16)
def _tree(path: str, stamp: tuple[int, int]) -> ast.Module:
    try:
        return ast.parse(read_file(path, MAX_CONFIG_FILE).decode("utf-8-sig"))
    except (RecursionError, MemoryError):
        raise SyntaxError("it is nested too deeply") from None


def check_settings(config: dict, where: str) -> None:
    """Raise UserError for a setting that the script lacks or that has another type there. A value that the
    script converts, such as 1e3 for an integer, is replaced by what the script will have."""
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
            config[part] = config[part] | {key: check_type(settings[key], value, f"{part} of {where}")}
            if key == "batch_size" and isinstance(value, str):
                raise UserError(f"{part} of {where}: {key}={shown(value)} must be a number: runs to "
                                f"compare have the same micro-batches on every machine")
            if len(str(value)) > MAX_VALUE:
                raise UserError(f"{part} of {where}: {key}={shown(value)} is too long for a command line")
    steps, key = num_iterations(config), steps_key(config)
    if type(steps) is not int or not 1 <= steps < 2**53:
        raise UserError(f"{where}: stage_config needs {key}, an integer of at least 1, and has "
                        f"{json.dumps(steps)[:40]}")
    for name in os.environ:
        if name.startswith("STAGE_") and name[6:].lower() in settings:
            raise UserError(f"the environment has {name}, which would change the runs unseen: unset it, and "
                            f"put {name[6:].lower()!r} into hyperparameters or give it as --key=value")


def load_config(path: str, overrides: list[str] = (), n_gpus: int | None = None,
                arm: dict[str, dict] | None = None) -> dict:
    """Load and check an experiment's JSON, and add defaults.

    arm: name of a variant -> its settings of the script, which replace those of the file.
    overrides: --key=value arguments for the script; a key of stage_config is replaced there, any other key is
    set in hyperparameters, another dataset sets LOSSES to null. Raises UserError.
    """
    config = read_json(path)
    check_keys(config, SCHEMA, path)
    config = DEFAULTS | config
    config = {key: config[key] for key in SCHEMA}  # in the order of readers
    config["stage"] = stage_name(config["stage"])
    if n_gpus is not None:
        config["n_gpus"] = n_gpus
    where = path
    for name, changed in (arm or {}).items():
        where = f"{path} with the plan's settings of {name}"
        config |= {"experiment_name": f"{config['experiment_name']}_{name}",
                   "modification_type": "settings", "modification_details": changed}
        for key, value in changed.items():
            replace_setting(config, key, value)
    settings = script_settings(config, path) if overrides else {}
    dataset = dataset_of(config) if overrides else None
    for argument in join_values(overrides, settings):
        if not argument.startswith("--"):
            raise UserError(f"cannot read argument {argument!r}: --key=value goes to the script, and --help "
                            f"lists the runner's own options")
        key, value = parse_argument(argument, settings)
        replace_setting(config, key, value)
    if overrides and dataset_of(config) != dataset:
        config |= dict.fromkeys(LOSSES)
    check_values(config, where)
    check_settings(config, where)
    return config


def replace_setting(config: dict, key: str, value) -> None:
    """Set a setting of the script where an experiment has it, else in its hyperparameters."""
    part = "stage_config" if key in config["stage_config"] else "hyperparameters"
    config[part] = config[part] | {key: value}


def script_path(config: dict) -> str:
    """Return the path of the script; a relative path starts at the root of the repository, with or without
    experiments/."""
    path = os.path.join(ROOT, os.path.expanduser(config["script"]))
    at_root = os.path.join(ROOT, config["script"].removeprefix("experiments/"))
    return at_root if os.path.isfile(at_root) and not os.path.exists(path) else path


def reads_stage_variables(config: dict) -> bool:
    """Return True if the script takes settings from variables STAGE_<KEY>."""
    calls = [node for node in ast.walk(script_tree(script_path(config))) if isinstance(node, ast.Call)]
    keywords = [keyword for call in calls if isinstance(call.func, ast.Name) and call.func.id == "configure"
                for keyword in call.keywords if keyword.arg == "environment"]
    return any(isinstance(k.value, ast.Constant) and k.value.value == "STAGE_" for k in keywords)


def all_settings(config: dict) -> dict:
    """Return all settings of the script: its defaults, replaced by the experiment's values."""
    return script_defaults(script_path(config)) | config["stage_config"] | arguments_of(config)


def arguments_of(config: dict) -> dict:
    """Return the hyperparameters without the notes for readers."""
    return {key: value for key, value in config["hyperparameters"].items() if key != NOTES}


def dataset_of(config: dict) -> str | None:
    """Return the data folder of the runs; None if none is set."""
    return judged_by(all_settings(config))["dataset"]


def check_data(config: dict) -> None:
    """Raise UserError if the runs would find no tokens, or too few."""
    settings = all_settings(config)
    name, length = settings.get("dataset"), settings.get("sequence_length")
    if isinstance(name, str):
        from nanosync.dataloader import open_dataset  # which imports PyTorch, for seconds

        open_dataset(name, length if type(length) is int and length > 0 else 1, "sequence_length")


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


def steps_key(config: dict) -> str:
    """Return the setting of the script that is the number of updates."""
    return STEPS[1] if STEPS[1] in all_settings(config) else STEPS[0]


def num_iterations(config: dict) -> int:
    """Return the updates of a run."""
    return all_settings(config).get(steps_key(config))


def command(config: dict, run_id: int, out_dir: str, **changed) -> list[str]:
    """Return the command of run `run_id`; changed: settings that differ from the experiment's."""
    stage = {} if reads_stage_variables(config) else config["stage_config"]
    settings = stage | arguments_of(config) | {
        "seed": config["base_seed"] + run_id, "out_dir": out_dir} | changed
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config['n_gpus']}", "--"]
    if config["n_gpus"] == 1:
        torchrun = []  # a process less that imports PyTorch, and no process group
    return [sys.executable, *torchrun, script_path(config),
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


def command_line(arguments: list[str], environment: dict[str, str]) -> str:
    """Return a command as a user types it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
                     shlex.join(arguments)])
