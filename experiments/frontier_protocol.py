"""The protocol of a frontier: which runs it has, in which order, and their commands.

    {"name": "sync-frontier", "description": "...", "script": "train_reduced_sync.py",
     "dataset": "python_source_gpt2", "data_sha256": {"train.bin": "...", "val.bin": "..."},
     "tokens": 65536000, "seeds": [1, 2, 3, 4],
     "settings": {"n_layer": 12, "tp_size": 2, "...": "settings of the script for all arms"},
     "baseline": "dense_12",
     "arms": {"dense_12": {"sync_strategy": "standard"}, "drop_6_r4": {"...": "settings of this arm"}},
     "latency_rows": {"ladder": "ladder"}, "spread_groups": {"1 and 2 syncs": ["drop_2_r2", "drop_1_r2"]},
     "seconds_per_run": 60}

A protocol with runs does not change: a change is a new file. Only description, latency_rows, spread_groups
and seconds_per_run may change. Without data_sha256 (null) the protocol is a draft: its runs are of the data
that the first run had. spread_groups names arms whose losses vary between seeds otherwise than those of the
rest. latency_rows has the names of arms in the tables of bench.py, "6 syncs" without an entry.
seconds_per_run is the estimate for a machine without a measured run.
"""

import hashlib
import json
import os
import re

from experiments.experiment_config import (
    DEFAULTS,
    NUMBER,
    RUNNER_SETTINGS,
    all_settings,
    check_keys,
    check_name,
    check_settings,
    check_values,
    in_range,
    read_json,
    steps_key,
)
from experiments.search_plan import SCHEDULE
from nanosync.errors import UserError, shown
from nanosync.files import dataset_folder, os_error_as_user_error, sha256_of
from nanosync.token_files import split_files

NONE = type(None)
PROTOCOL = {"name": (str, True), "description": (str, False), "script": (str, False), "dataset": (str, True),
            "data_sha256": ((dict, NONE), True), "tokens": (int, True), "seeds": (list, True),
            "settings": (dict, True), "baseline": (str, True), "arms": (dict, True),
            "latency_rows": (dict, False), "spread_groups": (dict, False), "seconds_per_run": (NUMBER, True)}
OPTIONAL = {"description": "", "script": "train_reduced_sync.py", "latency_rows": {}, "spread_groups": {}}
MAY_CHANGE = "description", "latency_rows", "spread_groups", "seconds_per_run"
LENGTHS = "lr_decay_iters", "max_iters", "num_iterations"  # follow from the tokens
SET_HERE = (*RUNNER_SETTINGS, *LENGTHS, "dataset", "save_checkpoint", "checkpoint_interval",
            "always_save_checkpoint", "wandb_log", "use_tensorboard", "eval_only", "stop_if", "init_from")
OF_ARMS = *SCHEDULE, "n_layer", "tp_size"  # settings by which the arms of a group differ
REST = "the rest"  # the arms that are in no group of spread_groups
MAX_ARMS, MAX_SEEDS, MAX_SEED, MAX_TOKENS, MAX_SECONDS = 1000, 1000, 10_000, 10**15, 1e7
DIGEST = 16  # hexadecimal digits of a digest in runs.jsonl


class Protocol:
    """A checked protocol, and the experiment of each of its arms."""

    def __init__(self, values: dict, path: str):
        """Raises UserError."""
        check_protocol(values, path)
        self.path, self.values = path, OPTIONAL | values
        self.name, self.arms, self.seeds, self.baseline = (values[key] for key in (
            "name", "arms", "seeds", "baseline"))
        self.configs = {arm: self._config(arm) for arm in self.arms}
        self.settings = {arm: all_settings(config) for arm, config in self.configs.items()}
        first = {}
        for arm, settings in self.settings.items():
            same = first.setdefault(json.dumps(settings, sort_keys=True), arm)
            if same != arm:
                raise UserError(f"{path}: the arms {same} and {arm} have the same settings: remove one")

    @classmethod
    def read(cls, path: str) -> "Protocol":
        """Read and check a protocol. Raises UserError."""
        return cls(read_json(path), path)

    @property
    def digest(self) -> str:
        """The digest of all that its losses depend on; its runs name it."""
        return digest_of({key: value for key, value in self.values.items() if key not in MAY_CHANGE})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All runs as (arm, seed), seed by seed, so that any prefix is balanced over the arms."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    @property
    def runs_path(self) -> str:
        """The path of its runs: runs.jsonl beside protocol.json. Raises UserError if no rule names it."""
        folder, file = os.path.split(self.path)
        if not (file.startswith("protocol") and file.endswith(".json")):
            raise UserError(f"{self.path} is not named protocol*.json, so its runs have no file: give "
                            f"--runs=FILE")
        return os.path.join(folder, "runs" + file.removeprefix("protocol") + "l")

    def setting_group(self, arm: str) -> str:
        """Return the settings that make an arm comparable: all but schedule, ranks and layers, as JSON."""
        return json.dumps({key: value for key, value in self.arms[arm].items() if key not in OF_ARMS},
                          sort_keys=True)

    def steps(self, arm: str) -> int:
        """Return the updates of a run."""
        return self.settings[arm][steps_key(self.configs[arm])]

    def _config(self, arm: str) -> dict:
        """Return the experiment of an arm, whose run i has the seed i. Raises UserError."""
        values, where = self.values, f"settings of {self.path}, arm {arm}"
        config = DEFAULTS | {"experiment_name": arm, "script": values["script"], "n_gpus": 1, "base_seed": 0,
                             "hyperparameters": values["settings"] | values["arms"][arm] | {
                                 "dataset": values["dataset"]}}
        check_values(config, where)
        check_settings(config, where)
        settings = all_settings(config)
        length = settings.get("block_size", settings.get("sequence_length"))
        sequences = settings.get("batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
        per_step = sequences * (length or 1)
        if per_step < 1 or values["tokens"] % per_step:
            raise UserError(f"{where}: tokens={values['tokens']} is no multiple of the {per_step} tokens of "
                            f"an update")
        steps = values["tokens"] // per_step
        fixed = {key: steps for key in LENGTHS if key in settings}
        fixed |= {"save_checkpoint": False} if "save_checkpoint" in settings else {}
        config["hyperparameters"] = config["hyperparameters"] | fixed
        check_settings(config, where)
        return config


def digest_of(value) -> str:
    """Return the first digits of the SHA-256 of a value as JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]


def check_protocol(values, path: str) -> None:
    """Raise UserError for a protocol with wrong keys or values."""
    check_keys(values, PROTOCOL, path)
    check_name(values["name"], "name", path)
    seeds, arms = values["seeds"], values["arms"]
    if not 1 <= len(seeds) <= MAX_SEEDS or len({*map(repr, seeds)}) < len(seeds):
        raise UserError(f"{path}: seeds={shown(seeds)} must be 1 to {MAX_SEEDS} different integers")
    for seed in seeds:
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise UserError(f"{path}: seeds has {shown(seed)}: use integers from 0 to {MAX_SEED}")
    if not 1 <= values["tokens"] <= MAX_TOKENS:
        raise UserError(f"{path}: tokens={values['tokens']} must be from 1 to {MAX_TOKENS}")
    if not (in_range(values["seconds_per_run"], most=MAX_SECONDS) and values["seconds_per_run"] > 0):
        raise UserError(f"{path}: seconds_per_run={values['seconds_per_run']} must be above 0 and at most "
                        f"{MAX_SECONDS:g}")
    if not 2 <= len(arms) <= MAX_ARMS:
        raise UserError(f"{path}: arms must be 2 to {MAX_ARMS} arms, and are {len(arms)}")
    if values["baseline"] not in arms:
        raise UserError(f"{path}: baseline={shown(values['baseline'])} is not in arms")
    for arm, settings in arms.items():
        check_name(arm, "an arm", path)
        if not isinstance(settings, dict):
            raise UserError(f"{path}: arm {arm} must be an object of settings, and is {shown(settings)}")
    for where, settings in (("settings", values["settings"]), *((f"arm {a}", s) for a, s in arms.items())):
        for key in SET_HERE:
            if key in settings:
                raise UserError(f"{path}: {where} has {key!r}, which the command sets: leave it out")
    for arm, row in values.get("latency_rows", {}).items():
        if arm not in arms or not isinstance(row, str):
            raise UserError(f"{path}: latency_rows has {shown(arm)}: {shown(row)}: it needs names of arms, "
                            f"each with the name of a row")
    check_groups(values.get("spread_groups", {}), arms, path)
    check_digests(values["data_sha256"], path)


def check_groups(groups: dict, arms: dict, path: str) -> None:
    """Raise UserError unless groups have a name each, and arms that are in no other group."""
    seen = set()
    for name, group in groups.items():
        if not isinstance(group, list) or len(group) < 2 or name in ("", REST) or not name.isprintable():
            raise UserError(f"{path}: spread_groups has {shown(name)}: {shown(group)}: it needs names, each "
                            f"with a list of at least two arms")
        for arm in group:
            if not isinstance(arm, str) or arm not in arms or arm in seen:
                raise UserError(f"{path}: spread_groups, {shown(name)}: {shown(arm)} is no arm, or is there "
                                f"twice")
            seen.add(arm)


def check_digests(digests, path: str) -> None:
    """Raise UserError unless these are the SHA-256 of files, or None."""
    if digests is None:
        return
    for name, digest in digests.items():
        if os.path.basename(name) != name or not name.strip("."):
            raise UserError(f"{path}: data_sha256 has {shown(name)}, which is no name of a file")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise UserError(f"{path}: data_sha256 of {name}={shown(digest)} must be 64 hexadecimal digits")
    if not digests:
        raise UserError(f"{path}: data_sha256 is empty: name the files, or write null for a draft")


def data_digests(protocol: Protocol) -> dict[str, str]:
    """Return the SHA-256 of the token files of the data set here. Raises UserError, also if they are not
    those of the protocol."""
    folder, found = dataset_folder(protocol.values["dataset"]), {}
    for path in (path for split in ("train", "val") for path in split_files(folder, split)[1]):
        with os_error_as_user_error(f"cannot read {path}"):
            found[os.path.basename(path)] = sha256_of(path)
    asked = protocol.values["data_sha256"]
    for name in sorted(found.keys() | asked.keys()) if asked is not None else ():
        if found.get(name) != asked.get(name):
            raise UserError(f"{os.path.join(folder, name)} is not the file of {protocol.path}: its SHA-256 "
                            f"is {found.get(name, 'that of no file')[:DIGEST]}, and data_sha256 has "
                            f"{(asked.get(name) or 'no such file')[:DIGEST]}: prepare the same data")
    return found


def check_strategies(protocol: Protocol) -> None:
    """Raise UserError for an arm whose schedule train_reduced_sync.py would refuse."""
    if os.path.basename(protocol.values["script"]) != "train_reduced_sync.py":
        return
    import dataclasses

    from reduced_sync_model import GPTConfig  # which imports PyTorch, for seconds

    names = {field.name for field in dataclasses.fields(GPTConfig)}
    for arm, settings in protocol.settings.items():
        try:
            GPTConfig(**{key: value for key, value in settings.items() if key in names}).schedule()
        except UserError as e:
            raise UserError(f"{protocol.path}, arm {arm}: {e}") from None
