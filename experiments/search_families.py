"""The families of a search: strategies of reduced_sync_model.py whose sums land late, or are weighted.

They are arms beside the counts. A strategy that only drops syncs is no family: `counts` has it already.
"""

import os

from nanosync.errors import UserError, shown

SIZES = "n_layer", "n_head", "n_embd", "tp_size"  # settings on which a schedule depends
EXAMPLES = "palm, ladder, kraken, dtp:2, mean:3 or caat:0.5"
MAX_FAMILIES = 20


def arm_of(strategy: str) -> str:
    """Return the name of a family's arm, which is also the name of its folder: dtp:2 -> dtp-2."""
    return strategy.replace(":", "-")


def families_of(plan: dict, settings: dict, path: str) -> dict[str, tuple[str, int]]:
    """Return arm -> (strategy, all-reduces of a forward pass) of each family in a plan. Raises UserError.

    settings: all settings of the script.
    """
    names = plan["families"]
    if not names:
        return {}
    if len(names) > MAX_FAMILIES or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: families={shown(names)} must be up to {MAX_FAMILIES} strategies, such as "
                        f"{EXAMPLES}")
    if "variant" in settings:
        raise UserError(f"{path}: {os.path.basename(plan['script'])} has no families: leave families out, or "
                        f"use train_reduced_sync.py")
    from reduced_sync_model import (  # which imports PyTorch, for seconds
        GPT,
        NUMBERED,
        PRESETS,
        GPTConfig,
        number_of,
    )

    found, schedules = {}, {}
    for name in names:
        if name.partition(":")[0] not in (*PRESETS, *NUMBERED):
            raise UserError(f"{path}: families has {shown(name)}: use {EXAMPLES}")
        try:
            config = GPTConfig(sync_strategy=name, **{key: settings[key] for key in SIZES if key in settings})
        except UserError as e:
            raise UserError(f"{path}: families has {shown(name)}: {e}") from None
        number, schedule = number_of(config, name), config.schedule()
        name = name if number is None else f"{name.partition(':')[0]}:{number}"  # dtp:02 -> dtp:2
        if schedule.is_plain:
            raise UserError(f"{path}: families has {shown(name)}, which only drops syncs: leave it out, "
                            f"counts has it")
        if schedule in schedules:
            raise UserError(f"{path}: families has {shown(schedules[schedule])} and {shown(name)}, which are "
                            f"the same: leave one out")
        schedules[schedule] = name
        ranks = config.tp_size  # as many all-reduces at any width
        tiny = GPTConfig(sync_strategy=name, n_layer=config.n_layer, n_head=ranks, n_embd=4 * ranks,
                         tp_size=ranks, block_size=1, vocab_size=8)
        found[arm_of(name)] = name, GPT(tiny, announce=False).syncs
    return found
