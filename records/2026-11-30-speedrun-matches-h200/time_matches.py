"""Time a step of train_gpt_fast.py of two micro-batches, with and without matches, by turns.

    python time_matches.py config/fast_python_source.py [--key=value ...]   # in the root

Tokens are random with frequencies that fall as those of text do, so no data set is needed.
"""

import json
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.getcwd())

import train_gpt_fast as fast
from configurator import configure
from nanosync.speedrun_setup import start_processes

ROUNDS, REPEATS = 5, 10


def main() -> None:
    config = configure(vars(fast), rank=0)
    processes, compute_dtype = start_processes(config)
    device = processes.device
    torch.set_float32_matmul_precision("high")
    T, V = config["sequence_length"], 50304
    steps = {}
    for match in (False, True):
        torch.manual_seed(1)
        model = fast.GPT(fast.model_config(config | {"suffix_match": match}, 50257, V, 50256)).to(device)
        if config["compile"]:
            model.hidden = torch.compile(model.hidden, dynamic=False)
        steps[match] = model, fast.build_optimizer(model, config, None)
    batches = [(50000 * torch.rand(1, T + 1, device=device)**4).long() for _ in range(4)]
    weights = torch.tensor([1.0, 0.5, 0.2], device=device)
    windows = torch.tensor([640, 896], dtype=torch.int32, device=device)

    def step(match: bool) -> None:
        model, optimizer = steps[match]
        for number in range(2):
            x = batches[number]
            with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
                loss = model(x[:, :-1].contiguous(), x[:, 1:].contiguous(), windows, weights)[1]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def milliseconds(match: bool) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(REPEATS):
            step(match)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / REPEATS

    found = {match: [] for match in steps}
    for r in range(ROUNDS + 1):
        for match in steps:
            took = milliseconds(match)
            if r:  # the first compiles
                found[match].append(took)
    for match, times in found.items():
        print(json.dumps({"suffix_match": match, "ms_of_a_step": round(statistics.median(times), 3),
                          "all": [round(t, 3) for t in times]}), flush=True)


if __name__ == "__main__":
    main()
