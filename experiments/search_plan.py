"""Read the plan of a search for the fewest syncs, and make an experiment of each of its arms.

    {"campaign_name": "fewest_syncs", "script": "train_reduced_sync.py", "n_gpus": 1,
     "settings": {"dataset": "python_source", "n_layer": 12, "...": "settings of the script for all arms"},
     "counts": [24, 12, 8, 6, 4, 3, 2, 1], "placements": ["even", "mlp", "ends", "greedy"],
     "families": ["palm", "ladder", "kraken", "dtp:2", "mean:3", "caat:0.5"],
     "control_layers": [11, 10, 8, 6], "tokens": [32768000, 131072000], "search_seed": 100,
     "proof_seed": 500, "looks": [2, 3, 4, 6, 8], "alpha": 0.05, "latency": null,
     "budget": {"gpu_hours": 1.5, "gpu_hours_per_run": 0.05, "price_per_gpu_hour": null}}

counts, tokens, seeds and budget are required. The first count is the dense model, two syncs a layer. tokens
of a run: of the first budget, and of the second, if there is one. The script is train_reduced_sync.py, or
train_gpt.py, whose variant `sync` is trained.
"""

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from experiments import search_greedy
from experiments.campaign_plan import HOUR, MAX_BUDGET, STARTING, with_ends
from experiments.experiment_config import (
    DEFAULTS,
    NUMBER,
    all_settings,
    check_keys,
    check_name,
    check_settings,
    check_values,
    in_range,
    read_json,
    steps_key,
)
from experiments.search_evidence import (
    DROPS,
    GREEDY,
    LOOKS,
    PILOT,
    PROOF,
    SEARCH,
    SECOND,
    SENSITIVITY,
    SPARE,
    SearchPlan,
    arm_name,
    control_name,
)
from experiments.search_families import arm_of, families_of
from nanosync.errors import UserError, shown

NONE = type(None)
PLAN = {"campaign_name": (str, True), "description": (str, False), "script": (str, False),
        "n_gpus": (int, False), "settings": (dict, True), "counts": (list, True), "placements": (list, False),
        "families": (list, False),
        "control_layers": (list, False), "control_runs": (int, False), "second_runs": (int, False),
        "tokens": (list, True), "search_seed": (int, True), "proof_seed": (int, True), "looks": (list, False),
        "alpha": (NUMBER, False), "latency": ((str, NONE), False), "budget": (dict, True)}
BUDGET = {"gpu_hours": (NUMBER, True), "gpu_hours_per_run": (NUMBER, True),
          "price_per_gpu_hour": ((*NUMBER, NONE), False)}
OPTIONAL = {"description": "", "script": "train_reduced_sync.py", "n_gpus": 1, "placements": ["even"],
            "families": [],
            "control_layers": [], "control_runs": 3, "second_runs": 2, "looks": list(LOOKS), "alpha": 0.05,
            "latency": None}
PLACEMENTS = {  # name -> function of (layers, count) that returns the sublayers to synchronise after
    "even": lambda layers, n: [math.floor((i + 1) * 2 * layers / n + 0.5) - 1 for i in range(n)],
    "mlp": lambda layers, n: [2 * math.ceil((i + 1) * layers / n) - 1 for i in range(n)],
    "ends": lambda layers, n: [*range(n // 2), *range(2 * layers - n + n // 2, 2 * layers)],
}
PLACEMENT = {  # values of --placement
    "even": list(PLACEMENTS), "greedy": ["even", GREEDY], "both": [*PLACEMENTS, GREEDY]}
SCHEDULE = "sync_strategy", "sync_points", "attn_sync_layers", "layers_per_group", "variant"  # set by arms
WITH_STEPS = "lr_decay_iters", "warmdown_iters"  # settings that grow with the number of updates
MAX_SYNCS, MAX_LOOKS, MAX_ARM_RUNS, MAX_TOKENS = 10_000, 10, 100, 10**15


@dataclass
class Search:
    """A plan, its decisions' part, and the experiment of each stage and arm."""

    plan: dict
    rules: SearchPlan
    configs: dict[tuple[str, str], dict]
    points: dict[str, list[int]]  # arm -> sublayers after which it synchronises
    families: dict[str, str]  # arm -> strategy
    experiment: Callable[[str, str, dict], dict]  # see experiments_of

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in which an arm may be trained."""
        return (SEARCH, PROOF) + ((SECOND,) if self.rules.second_multiple else ())

    def add(self, arm: str, changed: dict) -> None:
        """Make the experiments of an arm. changed: its settings."""
        for stage in self.stages:
            self.configs[stage, arm] = self.experiment(stage, arm, changed)

    def add_points(self, arm: str, points: list[int]) -> None:
        """Make the experiments of an arm that drops syncs."""
        dense = arm == self.rules.baseline
        self.points[arm] = points
        self.add(arm, {"sync_strategy": "standard"} if dense else
                 {"sync_strategy": "custom", "sync_points": points})


def read_search(path: str, within: float, overrides: dict, placement: str | None = None) -> Search:
    """Read and check a plan. Raises UserError.

    overrides: settings of the script that replace those of the plan. placement: a key of PLACEMENT, which
    replaces the plan's placements; None keeps them.
    """
    plan = read_json(path)
    check_plan(plan, path)
    plan = OPTIONAL | plan | ({} if placement is None else {"placements": PLACEMENT[placement]})
    plan["settings"] = plan["settings"] | overrides
    points = points_of(plan, path)
    layers = plan["counts"][0] // 2
    for k in plan["control_layers"]:
        if type(k) is not int or not 1 <= k < layers:
            raise UserError(f"{path}: control_layers has {shown(k)}: a control has 1 to {layers - 1} layers")
    multiple = plan["tokens"][1] / plan["tokens"][0] if len(plan["tokens"]) > 1 else 0.0
    placed = [(arm.rpartition("_")[0], int(arm.rpartition("_")[2])) for arm in points
              if not arm.startswith("even_")]
    base = base_of(plan, path)
    if GREEDY in plan["placements"]:
        search_greedy.check_script(all_settings(base), plan["script"], path)
        placed += [(GREEDY, n) for n in plan["counts"][1:] if n > 1]
    families = families_of(plan, all_settings(base), path)
    rules = SearchPlan(tuple(plan["counts"]), within, plan["alpha"], tuple(plan["looks"]), tuple(placed),
                       tuple(plan["control_layers"]), plan["control_runs"], multiple, plan["second_runs"],
                       tuple((arm, syncs) for arm, (_, syncs) in families.items()))
    strategies = {arm: strategy for arm, (strategy, _) in families.items()}
    search = Search(plan, rules, {}, {}, strategies, experiments_of(plan, base, path))
    add_arms(search, base, points)
    return search


def check_plan(plan: dict, path: str) -> None:
    """Raise UserError for a plan with wrong keys or values."""
    check_keys(plan, PLAN, path)
    plan = OPTIONAL | plan
    check_keys(plan["budget"], BUDGET, f"budget of {path}")
    check_name(plan["campaign_name"], "campaign_name", path)
    counts, looks, tokens = plan["counts"], plan["looks"], plan["tokens"]
    check_integers(counts, "counts", path, 1, MAX_SYNCS)
    if len(counts) < 2 or sorted(set(counts), reverse=True) != counts or counts[0] % 2:
        raise UserError(f"{path}: counts={shown(counts)} must fall from all syncs, two a layer, to "
                        f"the fewest")
    check_integers(looks, "looks", path, 2, MAX_ARM_RUNS)
    if not looks or sorted(set(looks)) != looks or len(looks) > MAX_LOOKS:
        raise UserError(f"{path}: looks={shown(looks)} must be up to {MAX_LOOKS} rising numbers of runs")
    check_integers(tokens, "tokens", path, 1, MAX_TOKENS)
    if not 1 <= len(tokens) <= 2 or sorted(set(tokens)) != tokens:
        raise UserError(f"{path}: tokens={shown(tokens)} must be those of a run, and more for the second "
                        f"budget")
    for key, least in (("control_runs", 2), ("second_runs", 2)):
        check_integers([plan[key]], key, path, least, most_runs(looks) - SPARE)
    for name in plan["placements"]:
        if not isinstance(name, str) or name not in (*PLACEMENTS, GREEDY):
            raise UserError(f"{path}: placements has {shown(name)}: use {', '.join(PLACEMENTS)}, {GREEDY}")
    if not in_range(plan["alpha"], 1e-6, 0.5):
        raise UserError(f"{path}: alpha={shown(plan['alpha'])} must be from 1e-6 to 0.5")
    for key, value in plan["budget"].items():
        if value is not None and not (in_range(value, most=MAX_BUDGET) and value > 0):
            raise UserError(f"{path}: budget's {key}={shown(value)} must be finite, above 0 and at most "
                            f"{MAX_BUDGET:g}")
    apart = abs(plan["search_seed"] - plan["proof_seed"])
    if apart < most_runs(looks):
        raise UserError(f"{path}: search_seed={plan['search_seed']} and proof_seed={plan['proof_seed']} must "
                        f"be {most_runs(looks)} or more apart: a proof needs fresh seeds")
    least = with_ends(STARTING, plan["n_gpus"]) / HOUR
    if plan["budget"]["gpu_hours_per_run"] < least:
        raise UserError(f"{path}: gpu_hours_per_run={plan['budget']['gpu_hours_per_run']} is below the "
                        f"{least:.3f} that starting and ending a run may take: raise it")
    for key in SCHEDULE:
        if key in plan["settings"]:
            raise UserError(f"settings of {path}: {key} is set for each arm: leave it out")


def most_runs(looks: list[int]) -> int:
    """Return the most runs of an arm in a stage."""
    return max(*looks, PILOT) + SPARE


def check_integers(values: list, key: str, path: str, least: int, most: int) -> None:
    """Raise UserError unless all values are integers within a range."""
    for value in values:
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{path}: {key} has {shown(value)}: use integers from {least} to {most}")


def points_of(plan: dict, path: str) -> dict[str, list[int]]:
    """Return the sync points of each arm that are known from the start, without arms that equal another."""
    layers, found = plan["counts"][0] // 2, {}
    for name in dict.fromkeys(("even", *(name for name in plan["placements"] if name != GREEDY))):
        for n in plan["counts"] if name == "even" else plan["counts"][1:]:
            points = PLACEMENTS[name](layers, n)
            if len(set(points)) == n and points not in found.values():
                found[arm_name(n, name)] = points
    return found


def base_of(plan: dict, path: str) -> dict:
    """Return the experiment with the settings that all arms have. Raises UserError."""
    layers, where = plan["counts"][0] // 2, f"settings of {path}"
    base = DEFAULTS | {"experiment_name": arm_name(plan["counts"][0]), "script": plan["script"],
                       "n_gpus": plan["n_gpus"], "base_seed": plan["search_seed"],
                       "hyperparameters": plan["settings"]}
    check_values(base | {"base_seed": plan["proof_seed"]}, where)
    check_values(base, where)
    check_settings(base, where)
    settings = all_settings(base)
    if "sync_points" not in settings:
        raise UserError(f"{where}: {plan['script']} has no setting 'sync_points': use "
                        f"train_reduced_sync.py or train_gpt.py")
    if settings.get("n_layer") != layers:
        raise UserError(f"{path}: {plan['counts'][0]} syncs are those of {layers} layers, and settings have "
                        f"n_layer={shown(settings.get('n_layer'))}")
    return base


def experiments_of(plan: dict, base: dict, path: str) -> Callable[[str, str, dict], dict]:
    """Return a function (stage, arm, changed settings) -> experiment. It raises UserError."""
    settings, key = all_settings(base), steps_key(base)

    def experiment(stage: str, arm: str, changed: dict) -> dict:
        tokens = plan["tokens"][-1 if stage == SECOND else 0]
        changed = changed | lengths(plan, base, settings, key, tokens, path)
        config = base | {"experiment_name": arm, "hyperparameters": base["hyperparameters"] | changed,
                         "base_seed": plan["proof_seed" if stage == PROOF else "search_seed"]}
        check_settings(config, f"settings of {path}")
        return config

    return experiment


def add_arms(search: Search, base: dict, points: dict[str, list[int]]) -> None:
    """Make the experiments of all arms that are known from the start. Raises UserError.

    base: the experiment of all arms; points: sync points of the arms.
    """
    for arm, places in points.items():
        search.add_points(arm, places)
    for arm, strategy in search.families.items():
        search.add(arm, {"sync_strategy": strategy})
    for k in search.rules.control_layers:
        arm, changed = control_name(k), {"sync_strategy": "standard", "n_layer": k}
        search.configs[SEARCH, arm] = search.experiment(SEARCH, arm, changed)
    if GREEDY in search.plan["placements"]:
        dense = search.rules.baseline
        search.configs[SEARCH, dense] = search.experiment(
            SEARCH, dense, {"sync_strategy": "standard"} | search_greedy.kept(all_settings(base)))
        search.configs[SENSITIVITY, DROPS] = search_greedy.experiment(search.plan, base)


def lengths(plan: dict, base: dict, settings: dict, key: str, tokens: int, path: str) -> dict:
    """Return the settings of a run on so many tokens; its schedule of learning rates is as long as the run.
    Raises UserError."""
    length = settings.get("block_size", settings.get("sequence_length"))
    per_step = settings.get("batch_size", 1) * (length or 1) * settings.get("gradient_accumulation_steps", 1)
    steps = round(tokens / per_step) if per_step > 0 else 0
    if steps < 1:
        raise UserError(f"{path}: {tokens} tokens are less than an update, which takes {per_step}")
    found = {key: steps} | ({"variant": "sync"} if "variant" in settings else {})
    for name in WITH_STEPS:
        if name in settings:
            first = max(round(plan["tokens"][0] / per_step), 1)
            given = base["hyperparameters"].get(name, first if name == "lr_decay_iters" else settings[name])
            found[name] = round(given * steps / first)
    return found


def parts_that_stay(plan: dict) -> dict:
    """Return what a resumed search may not change: all but budget, description and latency."""
    return {key: value for key, value in (OPTIONAL | plan).items()
            if key not in ("budget", "description", "latency")}


def read_latencies(path: str, width: int | None, families: Collection[str] = ()) -> dict[str, float]:
    """Return the µs of a token by arm, from the decode table of a bench.py JSON. Raises UserError.

    width: n_embd of the model; rows of other widths count only if the table has none of it. families: arms
    whose rows have the names of their strategies.
    """
    table = read_json(path)
    rows = table.get("rows") if isinstance(table, dict) else None
    rows, found = rows if isinstance(rows, list) else [], {}
    rows = [row for row in rows if isinstance(row, dict) and in_range(row.get("us"))]
    rows = [row for row in rows if row.get("n_embd") == width] or rows
    for row in rows:
        words = str(row.get("name")).split()
        if len(words) == 2 and words[0].isdigit() and words[1] in ("syncs", "sync", "layers"):
            arm = control_name(int(words[0])) if words[1] == "layers" else arm_name(int(words[0]))
            found.setdefault(arm, float(row["us"]))
        elif arm_of(str(row.get("name"))) in families:
            found.setdefault(arm_of(row["name"]), float(row["us"]))
    if not found:
        raise UserError(f"{os.path.relpath(path)} has no times by syncs: use the JSON of bench.py "
                        f"--mode=decode")
    return found
