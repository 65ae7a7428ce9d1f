"""Checkpoints as nanoGPT's train.py writes them, without nanoGPT: the same entries, names and order."""

import copy
import functools
import pickle
from pathlib import Path

import torch
from helpers import random_model, tokens

SETTINGS = {"dataset": "letters", "learning_rate": 1e-3, "max_iters": 60, "warmup_iters": 5, "batch_size": 4,
            "lr_decay_iters": 100, "gradient_accumulation_steps": 1, "eval_iters": 2, "eval_interval": 50,
            "out_dir": "out", "device": "cpu", "wandb_log": False, "init_from": "scratch"}
GROUPS = (lambda p: p.dim() >= 2, lambda p: p.dim() < 2)  # of its optimizer; the first decays


def optimizer_of(model) -> torch.optim.AdamW:
    groups = [{"params": [p for p in model.parameters() if fits(p)], "weight_decay": decay}
              for fits, decay in zip(GROUPS, (0.1, 0.0))]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def updates(model, optimizer, count: int, begin: int, vocab_size: int = 61) -> list[float]:
    """Update a model on batches that are a function of their number; return the losses."""
    losses = []
    for number in range(begin, begin + count):
        idx, targets = (tokens(4, 16, vocab_size=vocab_size, seed=2 * number + i) for i in (0, 1))
        loss = model(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def content_of(model, optimizer, step: int, prefix: str = "") -> dict:
    """The dict that train.py saves."""
    args = {name: getattr(model.config, name)
            for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")}
    state = {prefix + name: value for name, value in model.state_dict().items()}
    return {"model": state, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": step,
            "best_val_loss": torch.tensor(1.5), "config": dict(SETTINGS)}


def trained(step: int = 8, **changes):
    """A model after some updates, and its optimizer."""
    model = random_model(torch.float32, **changes)
    optimizer = optimizer_of(model)
    updates(model, optimizer, step, begin=0, vocab_size=model.config.vocab_size)
    return model, optimizer


@functools.cache
def _content() -> dict:
    return content_of(*trained(), 8, "_orig_mod.")


def content() -> dict:
    """The dict of a trained model, with torch.compile's prefix; each caller has a copy of its own."""
    return copy.deepcopy(_content())


def write(path: Path, **entries) -> Path:
    """A ckpt.pt of a trained model, some of whose entries are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content() | entries, path)
    return path


def write_vocabulary(path: Path, chars: str, **entries) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = dict(enumerate(chars))
    meta = {"vocab_size": len(chars), "itos": table, "stoi": {c: i for i, c in table.items()}}
    path.write_bytes(pickle.dumps(meta | entries))
    return path
