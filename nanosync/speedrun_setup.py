"""Set-up that the speedrun scripts share: processes and dtype, the windows of an evaluation."""

from collections.abc import Callable

import torch

from nanosync.batch_size import check_micro_batch
from nanosync.dataloader import Split
from nanosync.diagnose import only_diagnose
from nanosync.distributed import Processes, start
from nanosync.errors import UserError
from nanosync.hardware import check_compile, make_deterministic, pick_dtype


def start_processes(config: dict) -> tuple[Processes, torch.dtype]:
    """Start the processes of a run; return them and the dtype of products. Raises UserError."""
    check_micro_batch(config, "device_batch_size", "sequence_length")
    if config["deterministic"]:
        make_deterministic()
    processes = start(config["device"], config["backend"], config["timeout"], settings=config)
    only_diagnose(config, processes.device)
    compute_dtype = pick_dtype(config["dtype"], processes.device)
    if compute_dtype == torch.float16:
        raise UserError("dtype='float16' needs scaled losses, which this script does not have: use "
                        "--dtype=bfloat16 or --dtype=float32")
    if config["compile"]:
        check_compile(processes.device)
    return processes, compute_dtype


def evaluation_windows(config: dict, split: Split, line: Callable[[str], None]) -> int:
    """Return the number of windows of an evaluation; print a warning if their tokens are not val_tokens.

    line: function that prints a line.
    """
    wanted, T = config["val_tokens"], split.block_size
    n = min(max(1, wanted // T), sum(split.eval_windows))
    if n * T != wanted:
        why = "whole sequences" if n < sum(split.eval_windows) else "the whole val split"
        line(f"warning: val_tokens={wanted}, but evaluations use {n * T} tokens: {why}")
    return n
