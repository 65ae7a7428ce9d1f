"""Losses of single tokens, and of the windows of a split: the units of evaluate.py and HellaSwag.

Training computes mean losses only, with a kernel that never has the logits of a batch in memory. An
evaluation needs the loss of each token, because it leaves tokens out and compares models window by window.

Shapes: N rows of a batch, T tokens of a row, C = n_embd, V = vocab_size, P tokens that count.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F

from nanosync.distributed import all_values

HEAD_ROWS = 1024  # positions whose logits are in memory at a time


@torch.no_grad()
def token_losses(model, idx: torch.Tensor, targets: torch.Tensor, device: torch.device,
                 used_vocab_size: int | None = None, greedy: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of each target, 0 if the target is -1: (N, T), in fp32 (fp64 for an fp64 model).

    Logits are computed only for targets that count, at most HEAD_ROWS at a time. They are in fp32 even under
    autocast, because bf16 would round a logit of -100 to a multiple of 0.5. The function calls
    `model.hidden`, which `model.compile()` does not compile.

    model: a model of any kind, without its DDP wrapper. The caller chooses the autocast.
    idx, targets: (N, T) int64.
    used_vocab_size: number of tokens over which probabilities sum to 1; None for all V rows of the head, as
        in training.
    greedy: (N, T) bool on the device, set to True where the target is the most likely token; None if the
        caller does not need it.
    """
    N, T = idx.shape
    places = (targets.flatten() != -1).nonzero()[:, 0].to(device)  # (P,)
    x = model.hidden(idx.to(device)).flatten(0, 1)[places]  # (P, C)
    targets = targets.flatten().to(device)[places]
    dtype = torch.promote_types(x.dtype, torch.float32)
    losses = torch.zeros(N * T, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(places), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = model.head(x[part].to(dtype))[:, :used_vocab_size]  # (HEAD_ROWS, V)
            losses[places[part]] = F.cross_entropy(logits, targets[part], reduction="none")
            if greedy is not None:
                greedy.view(-1)[places[part]] = logits.argmax(dim=-1) == targets[part]
    return losses.view(N, T)


def window_losses(model, batches: Iterable, n_windows: int, device: torch.device, end_of_text: int | None,
                  group=None, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Return sums over the targets of each window, (n_windows, 4) float64, on every process.

    The columns are the loss of all targets and their number, then the loss of the targets that have text and
    their number. End-of-text has no text.

    model: see token_losses; in eval mode.
    batches: this DDP rank's share of the windows, see dataloader.evaluation_batches.
    end_of_text: token with which documents begin, None if there is none.
    group: processes that have the other shares. progress: function of (windows done, windows).
    """
    mine, per_rank = [], -(-n_windows // len(all_values(0, group)))
    for x, y in batches:
        losses = token_losses(model, x, y, device)
        counted = y != -1
        text = counted if end_of_text is None else counted & (y != end_of_text)
        sums = (losses, counted, torch.where(text, losses, 0), text)
        mine += torch.stack([values.sum(dim=1, dtype=losses.dtype) for values in sums], dim=1).tolist()
        if progress is not None:
            progress(min(len(mine), per_rank) * n_windows // per_rank, n_windows)
    rows = [row for share in all_values(mine[:per_rank], group) for row in share if row[1] > 0]
    assert len(rows) == n_windows, f"{len(rows)} of {n_windows} windows"
    return np.array(rows, np.float64)
