"""Time a step of train_gpt_fast.py of one micro-batch, with and without candidates, by turns.

    python time_candidates.py config/fast_python_source.py   # in the root, after candidates_2.patch

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
from kernels.fp8 import Recipe, WeightCasts
from nanosync.speedrun_setup import start_processes

ROUNDS, REPEATS = 5, 10


def seconds(function, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    for _ in range(REPEATS):
        function()
    wait()
    return (time.perf_counter() - began) / REPEATS


def main() -> None:
    config = configure(vars(fast), rank=0)
    device = start_processes(config)[0].device
    torch.manual_seed(1)
    V, T = 50304, config["sequence_length"]
    model = fast.GPT(fast.model_config(config, 50257, V, 50256)).to(device)
    torch.set_float32_matmul_precision("high")
    if config["compile"]:
        model.hidden = torch.compile(model.hidden, dynamic=False)
    optimizers = {lazy: fast.build_optimizer(model, config | {"lazy_tables": lazy}, None)
                  for lazy in (False, True)}
    recipe = Recipe(per_tensor=True, emulated=device.type != "cuda")
    casts = WeightCasts([model.transformer.wte.weight.detach(), model.lm_head.weight.detach()])
    batches = [(50000 * torch.rand(1, T + 1, device=device)**4).long() for _ in range(4)]
    weights, windows = torch.tensor([1.0, 0.5, 0.2], device=device), torch.tensor([384, 384], device=device)

    def micro_batch(i: int) -> None:
        x = batches[i % 4]
        with torch.autocast(device.type, torch.bfloat16):
            model(x[:, :-1].contiguous(), x[:, 1:].contiguous(), windows.int(), weights)[1].backward()

    variants = {}

    def step(fp8: bool, lazy: bool, every: int) -> None:
        model.head_recipe, model.head_casts = (recipe, casts) if fp8 else (None, None)
        optimizer = optimizers[lazy]
        for number in range(2):
            micro_batch(number)
            optimizer.adamw_due = number % every == every - 1
            optimizer.step()
            if fp8:
                casts.update()
            optimizer.zero_grad(set_to_none=True)

    for r in range(ROUNDS + 1):
        for name, *options in (("plain", False, False, 1), ("fp8_head", True, False, 1),
                               ("lazy_tables", False, True, 1), ("adam_every", False, False, 2),
                               ("all", True, True, 2)):
            found = seconds(lambda: step(*options), device) / 2  # noqa: B023
            if r:
                variants.setdefault(name, []).append(1e3 * found)
    for name, times in variants.items():
        print(json.dumps({"variant": name, "ms_of_a_step": round(statistics.median(times), 3),
                          "all": [round(t, 3) for t in times]}), flush=True)


if __name__ == "__main__":
    main()
