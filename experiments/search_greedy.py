"""The greedy placement of a search: the run of drop_syncs.py that finds it, and the arms that it defines.

The run starts from the dense model of the pilot. It drops, one after another, the sync whose removal raises
the val loss least. The order gives the sync points of every count.
"""

import os

from experiments.experiment_config import all_settings, read_json
from experiments.search_evidence import DROPS, GREEDY, arm_name
from nanosync.errors import UserError

SCRIPT = "experiments/drop_syncs.py"
ORDER = "order.json"  # result in the out_dir of the run
SHARED = "dataset", "tp_size", "batch_size", "device", "dtype"  # settings that the runs of the search have
KEPT = {"save_checkpoint": True, "keep_checkpoints": 1, "checkpoint_interval": 0,
        "always_save_checkpoint": False}  # settings of the baseline's runs


def evaluations(syncs: int, fewest: int) -> int:
    """Return the evaluations of a run from all syncs down to the fewest; the last sublayer keeps its sync."""
    return 1 + sum(n - 1 for n in range(fewest + 1, syncs + 1))


def check_script(settings: dict, script: str, path: str) -> None:
    """Raise UserError if the models of a script cannot be loaded with another schedule."""
    if "variant" in settings or "save_checkpoint" not in settings:
        raise UserError(f"{path}: {os.path.basename(script)} has no greedy placement: leave it out, or use "
                        f"train_reduced_sync.py")


def kept(settings: dict) -> dict:
    """Return the settings with which a training script keeps the checkpoint of a run. settings: all that it
    has."""
    return {key: value for key, value in KEPT.items() if key in settings}


def run_settings(plan: dict, settings: dict) -> dict:
    """Return the settings of the run. All its evaluations together read about the tokens of a training run.

    settings: all settings of the training script.
    """
    syncs, fewest = plan["counts"][0], plan["counts"][-1]
    batch = settings.get("batch_size", 1) * settings.get("block_size", 1)
    batches = plan["tokens"][0] // (evaluations(syncs, fewest) * batch)
    batches = max(1, min(batches, settings.get("eval_iters", batches)))
    return {"max_iters": syncs - fewest, "eval_iters": batches,
            **{key: settings[key] for key in SHARED if key in settings}}


def experiment(plan: dict, base: dict) -> dict:
    """Return the experiment of the run. base: the experiment of all arms."""
    settings = run_settings(plan, all_settings(base))
    return base | {"experiment_name": DROPS, "script": SCRIPT, "n_gpus": 1, "hyperparameters": settings}


def read_order(folder: str, syncs: int, fewest: int) -> list[int] | None:
    """Return the sublayers in the order in which the run in this folder dropped their syncs; None if it left
    no valid order."""
    try:
        found = read_json(os.path.join(folder, "out", ORDER))
    except UserError:
        return None
    order = found.get("dropped") if isinstance(found, dict) else None
    valid = isinstance(order, list) and len(order) == syncs - fewest and all(
        type(j) is int and 0 <= j < syncs - 1 for j in order) and len(set(order)) == len(order)
    return order if valid else None


def arms_of(counts: list[int], order: list[int], points: dict[str, list[int]]
            ) -> tuple[dict[int, str], dict[str, list[int]]]:
    """Return (count -> arm with the greedy placement, sync points of the arms that no other arm equals)."""
    names, added = {}, {}
    for n in counts[1:]:
        found = sorted(set(range(counts[0])) - set(order[:counts[0] - n]))
        names[n] = next((arm for arm, others in points.items() if others == found), arm_name(n, GREEDY))
        if names[n] not in points:
            added[names[n]] = found
    return names, added


def checkpoint_of(log) -> str:
    """Return the out_dir of the first successful run of an experiment that has a checkpoint, '' if none has.

    log: ExperimentLogger of the baseline.
    """
    for run_id, result in sorted(log.results.items()):
        out_dir = os.path.join(log.run_folder(run_id), "out")
        if result["success"] and os.path.isdir(os.path.join(out_dir, "ckpt")):
            return os.path.abspath(out_dir)
    return ""

