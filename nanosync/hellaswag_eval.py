"""HellaSwag: which of four endings a model finds the most likely, in the completion style of build-nanogpt.

An example is a context and four endings, of which one is right (Zellers et al., arXiv 1905.07830). A row is
the tokens of the context, then those of " " + ending, each tokenised by itself, and the losses of the
ending's tokens count. `acc` is the share of examples whose right ending has the least sum of them, `acc_norm`
of those where it has the least mean. Nothing else is in the prompt, so the figures compare with those of
build-nanogpt (https://github.com/karpathy/build-nanogpt), not with those of the EleutherAI harness.

Shapes: N rows of a batch, 4 an example; T tokens of a row, C = n_embd, V = vocab_size, P tokens that count.
"""

import contextlib
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanosync.distributed import all_reduce_sum
from nanosync.errors import UserError
from nanosync.files import ROOT, fetch, first_line, made_folder, os_error_as_user_error, replace_file
from nanosync.tokenizers import GPT2Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
N_VAL = 10042  # examples in that file
FOLDER = os.path.join(ROOT, "data", "hellaswag")
VOCAB_SIZES = range(GPT2Tokenizer.vocab_size, 50304 + 1)  # GPT-2's; up to nanoGPT's, which counts padding
LENGTH_STEP = 32  # T is a multiple of it, or block_size: few shapes, for what PyTorch keeps of each
HEAD_ROWS = 1024  # so many positions at a time have logits
STOP_EVERY = 8  # batches between two questions whether to stop


@dataclass(frozen=True, eq=False)
class Example:
    """A context and its endings in GPT-2's tokens."""

    context: np.ndarray  # at least one token
    endings: tuple[np.ndarray, ...]  # 4, at least one token each
    label: int  # which of them is right

    @property
    def length(self) -> int:
        """Tokens of its longest row."""
        return len(self.context) + max(map(len, self.endings))


@contextlib.contextmanager
def in_training():
    """Let a UserError also say how to train without HellaSwag."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e}; or train without HellaSwag, --hellaswag_interval=0") from None


def load(path: str = "", n_examples: int | None = None, setting: str = "input") -> list[Example]:
    """The first n_examples (None: all) of a file such as hellaswag_val.jsonl, tokenised.

    Without a path of that file itself, which is downloaded if it is not there. All lines are checked.
    setting: by which the user gives the path. Raises UserError.
    """
    if not path:
        path = os.path.join(FOLDER, "hellaswag_val.jsonl")
        if not os.path.exists(path):
            download(path, setting)
    with os_error_as_user_error(f"cannot read {path}"), open(path, "rb") as f:
        records = parse_lines(f.read(), path)
    tokenizer = GPT2Tokenizer()
    return [Example(tokenizer.encode_ordinary(record["ctx"]),
                    tuple(tokenizer.encode_ordinary(" " + ending) for ending in record["endings"]),
                    record["label"]) for record in records[:n_examples]]


def download(path: str, setting: str) -> None:
    """Fetch hellaswag_val.jsonl. Raises UserError."""
    print(f"downloading {URL} to {path}", flush=True)
    content = fetch(URL, f"give the file as --{setting}=FILE.jsonl")
    n = len(parse_lines(content, URL))
    if n != N_VAL:
        raise UserError(f"{URL} gave {n} examples, not {N_VAL}: try again, or give the file as "
                        f"--{setting}=FILE.jsonl")
    with made_folder(os.path.dirname(path)), os_error_as_user_error(f"cannot write {path}"):
        replace_file(path, content)


def parse_lines(content: bytes, where: str) -> list[dict]:
    """JSON Lines -> a dict with ctx, endings and label of each. Raises UserError with the line's number."""
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
            problem = f"it is no JSON ({first_line(e)})"
        if problem is not None:
            raise UserError(f"{where}, line {number}: {problem}")
    return records


def problem_of(record) -> str | None:
    """What keeps a value from being an example, None if nothing does."""
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}, not an object with ctx, endings and label"
    missing = [key for key in ("ctx", "endings", "label") if key not in record]
    if missing:
        hint = "; HellaSwag's test split has none: take val" if missing == ["label"] else ""
        return f"it has no {' and no '.join(missing)}{hint}"
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(context, str) or not context:
        return f"ctx={context!r:.40} is no text with at least one character"
    if not isinstance(endings, list) or len(endings) != 4:
        kind = f"list of {len(endings)}" if isinstance(endings, list) else type(endings).__name__
        return f"endings is a {kind}, not a list of 4 texts"
    for i, ending in enumerate(endings):
        if not isinstance(ending, str):
            return f"endings[{i}]={ending!r:.40} is no text"
    if type(label) is not int or not 0 <= label <= 3:
        return f"label={label!r:.40} is no whole number from 0 to 3"
    return None


def check_vocabulary(used_vocab_size: int, meta: dict | None, where: str) -> None:
    """Raise UserError unless a model reads GPT-2's tokens.

    used_vocab_size: of its configuration; meta: what a checkpoint or a data set says of its tokens, None
    being GPT-2's; where: the weights or the data set.
    """
    tokenizer = "gpt2" if meta is None else meta.get("tokenizer")
    if tokenizer != "gpt2":
        raise UserError(f"{where} has the tokens of the tokenizer {tokenizer!r}, and HellaSwag is read in "
                        f"GPT-2's: evaluate a model that was trained on those")
    if used_vocab_size not in VOCAB_SIZES:
        raise UserError(f"{where} has a vocabulary of {used_vocab_size} tokens, and HellaSwag is read in "
                        f"GPT-2's {GPT2Tokenizer.vocab_size}: evaluate a model that was trained on those")


def check_lengths(examples: list[Example], block_size: int) -> None:
    """Raise UserError if a model's context cannot hold an ending; of contexts it may see only the end."""
    longest = max(len(ending) for example in examples for ending in example.endings)
    if longest > block_size:
        raise UserError(f"block_size={block_size} is too short for HellaSwag: an ending has {longest} tokens")


@torch.no_grad()
def accuracy(model, examples: list[Example], batch_size: int, device: torch.device, rank: int = 0,
             world_size: int = 1, group=None, stop=None, progress=None) -> dict | None:
    """{"acc": ..., "acc_norm": ..., "n": ...} over all examples, batch_size of them (4 rows each) at a time.

    model: any kind, the module itself rather than its DDP wrapper; it is left in the mode it was in. It runs
        under the caller's autocast, and uncompiled: `model.hidden` is what `model.compile()` and
        `torch.compile(model)` leave alone, so these shapes neither cost compilations nor make those of
        training dynamic.
    rank, world_size, group: this process's share of the examples, and the processes that have the others. Of
        a model on several processes, which must all see the same batch: dp_rank, dp_size and dp_group.
    stop: a function that every rank calls after every STOP_EVERY batches, equally often whatever its share;
        where it gives True, which must be on all, the result is None.
    progress: a function of (examples done, examples), called after every batch.

    Rows longer than block_size lose tokens from the left. Uses no random numbers. Raises UserError if an
    ending is longer than block_size.
    """
    check_lengths(examples, model.config.block_size)
    n = len(examples)
    # rows of a batch are about equally long; the longest come first, so memory runs out at once if it does
    mine = sorted(examples, key=lambda example: -example.length)[rank::world_size]
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        for i in range(-(-n // (world_size * batch_size))):  # of the rank with the most
            if batch := mine[i * batch_size:(i + 1) * batch_size]:
                correct += count_correct(model, batch, device)
            if progress is not None:
                progress(min((i + 1) * world_size * batch_size, n), n)
            if stop is not None and i % STOP_EVERY == STOP_EVERY - 1 and stop():
                return None
    finally:
        model.train(was_training)
    acc, acc_norm = (count / n for count in all_reduce_sum(correct, group).tolist())
    return {"acc": acc, "acc_norm": acc_norm, "n": n}


def count_correct(model, batch: list[Example], device: torch.device) -> torch.Tensor:
    """How many examples have the least sum of losses, and how many the least mean, at the right ending: (2,).

    An example with a loss that is infinite or no number counts as wrong.
    """
    idx, targets = make_rows(batch, model.config.block_size)
    losses = ending_losses(model, idx, targets, device)
    sums = losses.sum(dim=1).view(-1, 4)
    counts = (targets != -1).sum(dim=1).view(-1, 4).to(device)
    labels = torch.tensor([example.label for example in batch], device=device)
    right = torch.stack([values.argmin(dim=1) == labels for values in (sums, sums / counts)])
    return (right & sums.isfinite().all(dim=1)).sum(dim=1)


def make_rows(batch: list[Example], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (N, T) int64 of a batch, on the CPU; targets are -1 outside the endings.

    Of a row that is longer than block_size + 1, the last of which is only a target, the end is taken.
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


def ending_losses(model, idx: torch.Tensor, targets: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The loss of each target, 0 where it is -1: (N, T), in fp32 (fp64 for an fp64 model).

    Only positions that count get logits, at most HEAD_ROWS at a time, and these in fp32, also under autocast:
    bf16 would round a logit of -100 to a multiple of 0.5.
    """
    N, T = idx.shape
    places = (targets.flatten() != -1).nonzero()[:, 0].to(device)  # (P,)
    x = model.hidden(idx.to(device)).flatten(0, 1)[places]  # (P, C)
    targets = targets.flatten().to(device)[places]
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = model.lm_head.weight.to(dtype)
    losses = torch.zeros(N * T, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(places), HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = F.linear(x[part].to(dtype), weight)  # (HEAD_ROWS, V)
            losses[places[part]] = F.cross_entropy(logits, targets[part], reduction="none")
    return losses.view(N, T)
