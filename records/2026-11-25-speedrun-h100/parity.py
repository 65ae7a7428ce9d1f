"""Do train_gpt.py and the record's script compute the same? Both from the same weights, on the same batches.

    python records/2026-11-25-speedrun-h100/parity.py TRAIN_GPT2.PY    # from the repository's root; minutes

On a CPU in fp32, a model of 4 layers of width 128 on the bytes of some of Python's own modules, 300 steps of
4,096 bytes. Of TRAIN_GPT2.PY (see run_record.py) the classes are taken as they stand; its optimizers and
their settings are spelled out here, as its loop has them. Its tables of angles are bfloat16, ours fp32, and
both orthogonalise in bfloat16: the differences begin there, and grow.
"""

import argparse
import ast
import inspect
import json
import os
import random
import sys
import typing

sys.path.insert(0, os.getcwd())

import numpy as np
import torch

import train_gpt
from nanosync.muon import build_muon

STEPS, BATCH, T, LR = 300, 32, 128, 0.0036
SHAPE = dict(vocab_size=256, n_layer=4, n_head=2, n_embd=128)


def classes_of(path: str) -> dict:
    """Imports, functions and classes of the file, but for torch.compile."""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))
                 or (isinstance(node, ast.FunctionDef) and node.name != "get_lr")
                 or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "zeropower_backends")]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    found = {"__name__": "record"}
    sys.modules["record"] = type(sys)("record")  # where dataclasses look for their module
    exec(compile(tree, path, "exec"), found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", metavar="TRAIN_GPT2.PY")
    args = parser.parse_args()
    record = classes_of(args.peer)
    torch.manual_seed(0)
    ours = train_gpt.GPT(train_gpt.GPTConfig(T, **SHAPE))
    theirs = record["GPT"](record["GPTConfig"](**SHAPE))
    with torch.no_grad():
        theirs.lm_head.weight.copy_(ours.transformer.wte.weight)
        for a, b in zip(ours.transformer.h, theirs.transformer.h):
            for p, part in zip((b.attn.c_q, b.attn.c_k, b.attn.c_v), a.attn.c_attn.weight.chunk(3)):
                p.weight.copy_(part)
            b.attn.c_proj.weight.copy_(a.attn.c_proj.weight)
            b.mlp.c_fc.weight.copy_(a.mlp.c_fc.weight)
            b.mlp.c_proj.weight.copy_(a.mlp.c_proj.weight)
    our_optimizer = build_muon(ours, LR, 0.5 * LR, (0.9, 0.95), 0.0, 0.95)
    their_optimizers = [
        torch.optim.AdamW(theirs.lm_head.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
        record["Muon"](theirs.transformer.h.parameters(), lr=0.1 * LR, momentum=0.95)]

    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, json, os, random, typing))
    data = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))
    order, losses = np.random.RandomState(0), []
    for step in range(STEPS):
        starts = order.randint(0, len(data) - T - 1, BATCH)
        x, y = (torch.stack([data[i + at:i + at + T] for i in starts]) for at in (0, 1))
        pair = ours(x, y)[1], theirs(x, y, return_logits=False)[1]
        losses.append([loss.item() for loss in pair])
        for loss in pair:
            loss.backward()
        for optimizer in (our_optimizer, *their_optimizers):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            apart = np.abs(np.diff(losses, axis=1)).ravel()
            print(f"step {step + 1}: loss {losses[-1][0]:.4f}, the record's {losses[-1][1]:.4f}; "
                  f"apart by at most {apart.max():.1e} so far, {apart[-50:].mean():.1e} in the mean of 50",
                  flush=True)


if __name__ == "__main__":
    main()
