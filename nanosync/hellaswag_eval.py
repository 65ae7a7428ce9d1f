"""HellaSwag: which of four endings a model finds most likely, in the completion style of build-nanogpt.

An example is a context and four endings, one of them right (Zellers et al., arXiv 1905.07830). A row is the
tokens of the context and then those of " " + ending; both texts are tokenised separately. Only the losses of
the ending's tokens count. `acc` is the share of examples whose right ending has the lowest sum of losses,
`acc_norm` the share whose right ending has the lowest mean. The prompt has no other text, so the figures
compare with build-nanogpt's (https://github.com/karpathy/build-nanogpt), not with the EleutherAI harness's.

Shapes: N rows of a batch, 4 per example, T tokens of a row.
"""

import contextlib
import json
import os
from dataclasses import dataclass

import numpy as np
import torch

from nanosync.distributed import all_reduce_sum
from nanosync.errors import UserError
from nanosync.files import (
    ROOT,
    fetch,
    first_line,
    made_folder,
    open_regular,
    os_error_as_user_error,
    replace_file,
)
from nanosync.token_losses import token_losses
from nanosync.tokenizers import GPT2Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
N_VAL = 10042  # examples in that file
FOLDER = os.path.join(ROOT, "data", "hellaswag")
VOCAB_SIZES = range(GPT2Tokenizer.vocab_size, 50304 + 1)  # from GPT-2's to nanoGPT's, which has padding rows
LENGTH_STEP = 32  # T is a multiple of LENGTH_STEP, or block_size, as PyTorch caches kernels for each shape


@dataclass(frozen=True, eq=False)
class Example:
    """A context and its endings in GPT-2's tokens."""

    context: np.ndarray  # at least one token
    endings: tuple[np.ndarray, ...]  # 4, at least one token each
    label: int  # index of the right ending

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return len(self.context) + max(map(len, self.endings))


@contextlib.contextmanager
def in_training():
    """Add to a UserError of the body how to train without HellaSwag."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e}; or train without HellaSwag, --hellaswag_interval=0") from None


def load(path: str = "", n_examples: int | None = None, setting: str = "input") -> list[Example]:
    """Load and tokenise examples. All lines of the file are checked. Raises UserError.

    path: JSON Lines file in the format of hellaswag_val.jsonl. '' downloads that file if it is missing.
    n_examples: number of examples, the first of the file; None for all.
    setting: name of the setting for the path, for error messages.
    """
    if not path:
        path = os.path.join(FOLDER, "hellaswag_val.jsonl")
        if not os.path.exists(path):
            download(path, setting)
    with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
        records = parse_lines(f.read(), path)
    tokenizer = GPT2Tokenizer()
    return [Example(tokenizer.encode_ordinary(record["ctx"]),
                    tuple(tokenizer.encode_ordinary(" " + ending) for ending in record["endings"]),
                    record["label"]) for record in records[:n_examples]]


def download(path: str, setting: str) -> None:
    """Download hellaswag_val.jsonl to path. Raises UserError. setting: see load."""
    print(f"downloading {URL} to {path}", flush=True)
    content = fetch(URL, f"give the file as --{setting}=FILE.jsonl")
    n = len(parse_lines(content, URL))
    if n != N_VAL:
        raise UserError(f"{URL} gave {n} examples, not {N_VAL}: try again, or give the file as "
                        f"--{setting}=FILE.jsonl")
    with made_folder(os.path.dirname(path)), os_error_as_user_error(f"cannot write {path}"):
        replace_file(path, content)


def parse_lines(content: bytes, where: str) -> list[dict]:
    """Parse JSON Lines into dicts with ctx, endings and label. Raises UserError with the line's number.

    where: path or URL of the content, for error messages.
    """
    if not content:
        raise UserError(f"{where} is empty: HellaSwag has an example, a JSON object, on each line")
    records = []
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            records.append(json.loads(line.decode()))
            problem = problem_of(records[-1])
        except UnicodeDecodeError as e:
            problem = f"byte {e.start} is not UTF-8"
        except (ValueError, RecursionError) as e:
            problem = f"it is not JSON ({first_line(e)})"
        if problem is not None:
            raise UserError(f"{where}, line {number}: {problem}")
    return records


def problem_of(record) -> str | None:
    """Return the problem of a value that is not an example, None if the value is an example."""
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}, not an object with ctx, endings and label"
    missing = [key for key in ("ctx", "endings", "label") if key not in record]
    if missing:
        hint = "; HellaSwag's test split has no labels: use val" if missing == ["label"] else ""
        return f"it has no {' and no '.join(missing)}{hint}"
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(context, str) or not context:
        return f"ctx={context!r:.40} is not a text with at least one character"
    if not isinstance(endings, list) or len(endings) != 4:
        kind = f"list of {len(endings)}" if isinstance(endings, list) else type(endings).__name__
        return f"endings is a {kind}, not a list of 4 texts"
    for i, ending in enumerate(endings):
        if not isinstance(ending, str):
            return f"endings[{i}]={ending!r:.40} is not a text"
    if type(label) is not int or not 0 <= label <= 3:
        return f"label={label!r:.40} is not a whole number from 0 to 3"
    return None


def check_vocabulary(used_vocab_size: int, meta: dict | None, where: str) -> None:
    """Raise UserError unless a model uses GPT-2's tokens.

    used_vocab_size: of the model's configuration.
    meta: meta.json of the checkpoint or the data set, None for GPT-2's tokens.
    where: name of the weights or the data set, for error messages.
    """
    tokenizer = "gpt2" if meta is None else meta.get("tokenizer")
    if tokenizer != "gpt2":
        raise UserError(f"{where} has the tokens of the tokenizer {tokenizer!r}, and HellaSwag needs "
                        f"GPT-2's: evaluate a model that was trained on GPT-2's tokens")
    if used_vocab_size not in VOCAB_SIZES:
        raise UserError(f"{where} has a vocabulary of {used_vocab_size} tokens, and HellaSwag needs "
                        f"GPT-2's {GPT2Tokenizer.vocab_size}: evaluate a model that was trained on GPT-2's "
                        f"tokens")


def check_lengths(examples: list[Example], block_size: int) -> None:
    """Raise UserError if an ending is longer than block_size. Contexts may be longer: they are cropped."""
    longest = max(len(ending) for example in examples for ending in example.endings)
    if longest > block_size:
        raise UserError(f"block_size={block_size} is too short for HellaSwag: an ending has {longest} tokens")


def accuracy(*args, **options) -> dict | None:
    """Return {"acc": ..., "acc_norm": ..., "n": ...} over all examples, None if stop() returned True.

    The arguments are those of `judge`.
    """
    right = judge(*args, **options)
    if right is None:
        return None
    n = len(right)
    acc, acc_norm = (count / n for count in right.sum(axis=0).tolist())
    return {"acc": acc, "acc_norm": acc_norm, "n": n}


@torch.no_grad()
def judge(model, examples: list[Example], batch_size: int, device: torch.device, rank: int = 0,
          world_size: int = 1, group=None, stop=None, progress=None) -> np.ndarray | None:
    """Return which examples the model answers right by sums and by means of losses, (n, 2) bool, in the order
    of the examples and on every process; None if stop() returned True.

    Rows longer than block_size lose tokens on the left. Uses no random numbers, and keeps the model's mode.
    Raises UserError if an ending is longer than block_size.

    model: a model of any kind, without its DDP wrapper. The caller chooses the autocast. The function calls
        `model.hidden`, which `model.compile()` does not compile. So the shapes here cause no compilation, and
        do not make the shapes of training dynamic.
    batch_size: examples of a batch, 4 rows each.
    rank, world_size, group: DDP rank of this process, number of DDP ranks, and their group. The processes of
        one model evaluate the same examples.
    stop: function that all processes call after every batch, with the same result.
    progress: function of (examples done, examples), called after every batch.
    """
    check_lengths(examples, model.config.block_size)
    n = len(examples)
    # sorted, so that the rows of a batch are about equally long; the longest first, so that a lack of memory
    # shows at once
    mine = sorted(range(n), key=lambda i: -examples[i].length)[rank::world_size]
    right = torch.zeros(n, 2, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        for i in range(-(-n // (world_size * batch_size))):  # batches of the DDP rank with the most examples
            if batch := mine[i * batch_size:(i + 1) * batch_size]:
                right[batch] = right_of(model, [examples[i] for i in batch], device).long()
            if progress is not None:
                progress(min((i + 1) * world_size * batch_size, n), n)
            if stop is not None and stop():
                return None
    finally:
        model.train(was_training)
    return all_reduce_sum(right, group).bool().cpu().numpy()


def right_of(model, batch: list[Example], device: torch.device) -> torch.Tensor:
    """Return True for each example whose right ending has the lowest sum, and the lowest mean, of losses:
    (examples, 2).

    An example with a loss that is not finite counts as wrong.
    """
    idx, targets = make_rows(batch, model.config.block_size)
    losses = token_losses(model, idx, targets, device)
    sums = losses.sum(dim=1).view(-1, 4)
    counts = (targets != -1).sum(dim=1).view(-1, 4).to(device)
    labels = torch.tensor([example.label for example in batch], device=device)
    right = torch.stack([values.argmin(dim=1) == labels for values in (sums, sums / counts)], dim=1)
    return right & sums.isfinite().all(dim=1)[:, None]


def make_rows(batch: list[Example], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make inputs and targets (N, T) int64 of a batch, on the CPU. Targets are -1 outside the endings.

    A row has at most block_size + 1 tokens, the last only as a target. Longer rows are cropped on the left.
    """
    rows = [(np.concatenate((example.context, ending))[-block_size - 1:], len(ending))
            for example in batch for ending in example.endings]
    longest = max(len(row) for row, _ in rows) - 1
    T = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, block_size)
    idx, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -1, np.int64)
    for i, (row, n) in enumerate(rows):
        t = len(row) - 1
        idx[i, :t] = row[:-1]
        targets[i, t - n:t] = row[-n:]
    return torch.from_numpy(idx), torch.from_numpy(targets)
