"""Step time with one or another piece of train_gpt.py, in one process, by turns, and a profile of one step.

    python records/2026-11-25-speedrun-h100/pieces.py    # from the repository's root, on a GPU

The baseline at full size, 128 sequences of random tokens a step, compiled.
"""

import os
import statistics
import sys
import time

sys.path.insert(0, os.getcwd())

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import train_gpt
from kernels.qk_rotary import _rotate, qk_norm_rotary, rms_norm
from nanosync import random_states
from nanosync.muon import build_muon

SEQUENCES, T, LAYERS = 128, 1024, tuple(range(12))


def by_autograd(x):
    """ReLU^2 that keeps its input, too."""
    y = F.relu(x)
    return y * y


def mlp_with(relu_squared):
    return lambda x, w_in, w_out: F.linear(relu_squared(F.linear(x, w_in)), w_out)


def plain(qkv, cos, sin):
    q, k, v = qkv.unbind(2)
    return _rotate(rms_norm(q), cos, sin), _rotate(rms_norm(k), cos, sin), v


FUSED, FIRST = train_gpt.relu_squared_mlp, "ReLU^2 by autograd"
FROM_OUTPUT = mlp_with(train_gpt.relu_squared)
PIECES = {  # QK-norm with rotary embedding, MLP, device_batch_size
    FIRST: (qk_norm_rotary, mlp_with(by_autograd), 64),
    "the same, QK-norm and rotary embedding by inductor": (plain, mlp_with(by_autograd), 64),
    "ReLU^2 from its output": (qk_norm_rotary, FROM_OUTPUT, 64),
    "the same, 128 at a time": (qk_norm_rotary, FROM_OUTPUT, 128),
    "ReLU^2 in the products": (qk_norm_rotary, FUSED, 64),
}


class Contender:
    def __init__(self, name: str, data: torch.Tensor):
        self.pieces, self.data = PIECES[name], data
        random_states.seed_random_states(1337)
        self.model = train_gpt.GPT(train_gpt.GPTConfig(T, 50304, 12, 6, 768, 50257)).cuda()
        self.optimizer = build_muon(self.model, 0.0036, 0.0018, (0.9, 0.95), 0.0, 0.95, sum_gradients=True)
        self.model.compile(dynamic=False)

    def step(self, i: int) -> None:
        train_gpt.qk_norm_rotary, train_gpt.relu_squared_mlp, B = self.pieces
        tokens = self.data[i % len(self.data)]
        for begin in range(0, SEQUENCES, B):
            x, y = (tokens[begin:begin + B, at:at + T].contiguous() for at in (0, 1))
            with torch.autocast("cuda", torch.bfloat16):
                loss = self.model(x, y, T, LAYERS)[1] * (B / SEQUENCES)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 32
    data = torch.randint(0, 50257, (8, SEQUENCES, T + 1), device="cuda")
    contenders, times = {}, {name: [] for name in PIECES}
    for name in PIECES:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated()  # weights and moments of those before it
        contenders[name] = Contender(name, data)
        for i in range(3):
            contenders[name].step(i)
        print(f"{name}: {(torch.cuda.max_memory_allocated() - others) / 2**30:.1f} GB", flush=True)
    for _ in range(5):
        for name, contender in contenders.items():
            contender.step(3)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(5):
                contender.step(i)
            torch.cuda.synchronize()
            times[name].append(200 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CUDA]) as of_step:
        contenders[FIRST].step(1)
        torch.cuda.synchronize()
    print(of_step.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=100))
    for name, of in times.items():
        print(f"{name}: median {statistics.median(of):.2f} ms of {[round(t, 2) for t in of]}")


if __name__ == "__main__":
    main()
