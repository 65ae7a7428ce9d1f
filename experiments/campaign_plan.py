"""Read the plan of a campaign and the experiments of its stages, and check all before anything runs.

A variant is either a file, as the baseline, or an entry of `settings`: the settings of the script in which it
differs from the baseline's file, {"no_bigram": {"bigram": false}}. `settings` of a stage add to those of the
plan, and win.
"""

import os

from experiments.experiment_config import (
    MAX_RUNS,
    NUMBER,
    STAGES,
    all_settings,
    check_keys,
    check_name,
    in_range,
    judged_by,
    load_config,
    num_iterations,
    read_json,
    stage_name,
)
from experiments.experiment_logger import differences
from experiments.runner import ENDING
from nanosync.errors import UserError, shown

PLAN = {"campaign_name": (str, True), "description": (str, False), "baseline": (str, True),
        "variants": (list, True), "target_val_loss": ((*NUMBER, type(None)), True), "stages": (list, True),
        "most_advanced": (int, True), "most_proved": (int, True), "probe_steps": (int, True),
        "budget": (dict, True), "settings": (dict, False)}
STAGE = {"stage": (str, True), "config": ((str, dict), True), "n_runs": (int, True), "n_gpus": (int, False),
         "settings": (dict, False)}
BUDGET = {"gpu_hours": (NUMBER, True), "gpu_hours_per_run": (NUMBER, True), "probe_gpu_hours": (NUMBER, True),
          "price_per_gpu_hour": ((*NUMBER, type(None)), False)}
HOUR = 3600.0
MAX_BUDGET = 1e9  # GPU-hours, or price of one
STARTING = 60.0  # seconds added to a run's limit, because the time to compile varies


def read_plan(path: str) -> dict:
    """Read and check a plan, and replace short names of stages. Raises UserError."""
    plan = read_json(path)
    check_plan(plan, path)
    return plan


def check_plan(plan: dict, path: str) -> None:
    """Do what read_plan does with a plan that was read."""
    check_keys(plan, PLAN, path)
    check_keys(plan["budget"], BUDGET, f"budget of {path}")
    check_name(plan["campaign_name"], "campaign_name", path)
    for stage in plan["stages"]:
        check_keys(stage, STAGE, f"a stage of {path}")
        stage["stage"] = stage_name(stage["stage"])
        if not 1 <= stage["n_runs"] <= MAX_RUNS:
            raise UserError(f"{path}: n_runs={stage['n_runs']} of {shown(stage['stage'])} must be from 1 to "
                            f"{MAX_RUNS}")
    names = [stage["stage"] for stage in plan["stages"]]
    if names != list(STAGES):
        raise UserError(f"{path}: the stages must be {', '.join(STAGES)}, and are {shown(names, 200)}")
    arms = [plan["baseline"], *plan["variants"]]
    if not plan["variants"] or not all(isinstance(arm, str) for arm in arms) or len(set(arms)) < len(arms):
        raise UserError(f"{path}: variants must be names, each once, without {shown(plan['baseline'])}")
    check_name(plan["baseline"], "baseline", path)
    for arm in plan["variants"]:
        check_name(arm, "a variant", path)
    for key in ("most_advanced", "most_proved", "probe_steps"):
        if plan[key] < 1:
            raise UserError(f"{path}: {key}={plan[key]} must be at least 1")
    for key, value in plan["budget"].items():
        if value is not None and not (in_range(value, most=MAX_BUDGET) and value > 0):
            raise UserError(f"{path}: budget's {key}={shown(value)} must be finite, above 0 and at most "
                            f"{MAX_BUDGET:g}")
    for part, where in ((plan, path), *((stage, f"{stage['stage']} of {path}") for stage in plan["stages"])):
        for arm, settings in part.get("settings", {}).items():
            if arm not in plan["variants"]:
                raise UserError(f"{where}: settings has {shown(arm)}, which is not in variants")
            if not isinstance(settings, dict) or not settings:
                raise UserError(f"{where}: settings of {shown(arm)} must be an object with a setting of the "
                                f"script or more")
    target = plan["target_val_loss"]
    if target is not None and not in_range(target):
        raise UserError(f"{path}: target_val_loss={shown(target)} must be finite and not below 0")


def parts_that_stay(plan: dict) -> dict:
    """Return what a resumed campaign may not change: all but budget, description and names of files, whose
    content is compared when its experiment is reopened."""
    stages = [{key: value for key, value in stage.items() if key != "config"} for stage in plan["stages"]]
    return {key: value for key, value in plan.items() if key not in ("budget", "description")} | {
        "stages": stages}


def read_configs(plan: dict, path: str, overrides: list[str]) -> dict[tuple[str, str], dict]:
    """Load the experiment of each stage and arm (the baseline or a variant). Raises UserError if those of a
    stage are not comparable."""
    configs = {}
    for stage in plan["stages"]:
        arm_of = {}  # script and settings -> arm
        for arm in (plan["baseline"], *plan["variants"]):
            settings = settings_of(plan, stage, arm)
            name = file_of(stage, plan["baseline"] if settings else arm, path)
            file = os.path.join(os.path.dirname(path), name)
            config = configs[stage["stage"], arm] = load_config(
                file, overrides, stage.get("n_gpus"), {arm: settings} if settings else None)
            where = f"{file} with the plan's settings of {arm}" if settings else file
            if config["stage"] != stage["stage"]:
                raise UserError(f"{file} is of {config['stage']} and the plan names it for {stage['stage']}")
            check_comparable(where, config, configs[stage["stage"], plan["baseline"]])
            other = arm_of.setdefault((config["script"], repr(sorted(all_settings(config).items()))), arm)
            if other != arm:
                raise UserError(f"{where} has the settings of {other}: there is nothing to compare "
                                f"(--key=value sets a key in all experiments)")
    return configs


def settings_of(plan: dict, stage: dict, arm: str) -> dict:
    """Return the settings in which an arm differs from the baseline's file; none for an arm with a file."""
    found = {}
    for part in (plan, stage):
        found |= part.get("settings", {}).get(arm, {})
    return found


def file_of(stage: dict, arm: str, path: str) -> str:
    """Return the name of an arm's file, relative to the plan's folder. Raises UserError."""
    name = stage["config"]  # a pattern, or the file of each arm
    name = name.replace("{variant}", arm) if isinstance(name, str) else name.get(arm)
    if not isinstance(name, str):
        raise UserError(f"{path}: the config of {stage['stage']} names no file for {arm}")
    return name


def tokens_of(config: dict) -> float:
    """Return the tokens that a run trains on, up to a factor that all experiments of a script share."""
    settings = all_settings(config)
    batch, length = settings.get("batch_size", 1), settings.get("sequence_length", 1)
    sizes, shares = settings.get("batch_sizes"), settings.get("stage_shares")
    if all(isinstance(values, list) and values and all(map(in_range, values)) for values in (sizes, shares)):
        batch = sum(size * share for size, share in zip(sizes, shares))
    values = [value if in_range(value) and value > 0 else 1 for value in (batch, length)]
    return num_iterations(config) * float(values[0]) * values[1]


def check_comparable(file: str, config: dict, baseline: dict) -> None:
    """Raise UserError unless an experiment has the work, the seeds and the val tokens of its baseline."""
    for key in ("stage_config", "n_gpus", "base_seed"):
        if config[key] != baseline[key]:
            raise UserError(f"{file} has another {key} than the stage's baseline: they would not be "
                            f"comparable")
    judged = [judged_by(settings) | {"val_loss_every": settings.get("val_loss_every")}
              for settings in map(all_settings, (baseline, config))]
    for key, (ours, its) in differences(*judged).items():
        raise UserError(f"{file} has {key}={its} and the stage's baseline {ours}: they would not be "
                        f"comparable")


def with_ends(cost: float, n_gpus: int) -> float:
    """Return the GPU-seconds to reserve for a cost: with a slow start, and the ending at the limit."""
    return cost + (STARTING + ENDING) * n_gpus


def stages_until(plan: dict, until: str | None) -> list[dict]:
    """Return the plan's stages up to `until`, all for None."""
    names = [stage["stage"] for stage in plan["stages"]]
    return plan["stages"][:names.index(until) + 1] if until else plan["stages"]


def target_of(plan: dict, configs: dict) -> float | None:
    """Return the plan's target; None if the last stage has none, as when --dataset names another data set."""
    proof = configs[plan["stages"][-1]["stage"], plan["baseline"]]
    return None if proof["target_val_loss"] is None else plan["target_val_loss"]


def check_cap(plan: dict, stages: list[dict], configs: dict, path: str) -> None:
    """Raise UserError if gpu_hours_per_run is below the cost of a probe."""
    n_gpus = max(configs[stage["stage"], plan["baseline"]]["n_gpus"] for stage in stages)
    budget = plan["budget"]
    needed = with_ends(HOUR * budget["probe_gpu_hours"], n_gpus) / HOUR
    if budget["gpu_hours_per_run"] < needed:
        raise UserError(f"{path}: gpu_hours_per_run={budget['gpu_hours_per_run']} is below the {needed:.3f} "
                        f"that a probe on {n_gpus} GPU(s) may take (probe_gpu_hours and "
                        f"{STARTING + ENDING:.0f} s of each): raise it, or lower probe_gpu_hours")
