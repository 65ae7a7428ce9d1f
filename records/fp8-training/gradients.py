"""How far the gradients of FP8 are from those in fp32, on the weights of a model that has learned something.

$ python records/fp8-training/gradients.py --out=FILE --data=FOLDER    # without FOLDER: random tokens

Trains GPT-2 124M in bf16, then computes the gradient of the same tokens in fp32 and in each contender. A line
has the difference of the loss, and for groups of parameters |g - g32| / |g32| and <g, g32> / |g32|^2, which
is 1 for errors without a direction. Without a GPU everything runs at toy size.

Contenders with `fast` leave the sums of all products in the matrix units, those with `exact` of none. The
others are as in training.
"""

import copy
import glob
import os
import sys

sys.path.insert(0, os.getcwd())

import numpy as np
import torch

from configurator import configure
from kernels import cross_entropy, fp8, gelu_cast
from model import GPT, GPTConfig
from nanosync.files import write_result
from nanosync.fp8 import follow_weights, use_fp8
from nanosync.hardware import environment
from nanosync.optim import build_adamw, clip_gradients

# -----------------------------------------------------------------------------
out = "gradients.json"
data = ""  # folder of token files; the first file of its train split is read
steps = 500  # of training, 16 sequences each
seed = 1
# -----------------------------------------------------------------------------
config = configure(globals())
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
real = device.type == "cuda"
SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304) if real else \
    dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=128)
T, B, PART = SIZES["block_size"], 16, 4
GROUPS = ["", "wte", "wpe", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln", "h.0.",
          f"h.{SIZES['n_layer'] - 1}."]
IN_FP8 = True if real else "emulated"
OFF, BLOCKS, ALL, WEIGHTS, EMULATED = (
    dict(fp8=kind, fp8_head=head, fp8_weight_gradients=weights) for kind, head, weights in (
        (False, False, False), (IN_FP8, False, False), (IN_FP8, True, False), (IN_FP8, True, True),
        ("emulated", True, True)))
CONTENDERS = [("bf16", OFF, None), ("blocks", BLOCKS, None), ("blocks and head", ALL, None),
              ("and weight gradients", WEIGHTS, None),
              ("blocks, fast", BLOCKS, True), ("blocks and head, fast", ALL, True),
              ("blocks, exact", BLOCKS, False), ("blocks and head, exact", ALL, False),
              ("all, emulated", EMULATED, None)]


def model_with(weights: dict | None) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES, bias=False)).to(device)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def batches(tokens: np.ndarray, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        starts = rng.integers(0, len(tokens) - T - 1, B)
        rows = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
        rows %= SIZES["vocab_size"]  # at toy size
        made.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return made


def train(tokens: np.ndarray) -> dict:
    """Return the weights after `steps` steps in bf16."""
    model = model_with(None)
    optimizer = build_adamw(model, 6e-4, (0.9, 0.95), 0.1)
    for step, (x, y) in enumerate(batches(tokens, steps)):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1, (step + 1) / 100)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x.to(device), y.to(device))[1]
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f"loss {loss.item():.3f} after {steps} steps", flush=True)
    return copy.deepcopy(model.state_dict())


def gradients(weights: dict, settings: dict, amp: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of two batches, and its gradients in fp64."""
    model = model_with(weights)
    use_fp8(model, settings)
    follow_weights(model, torch.optim.SGD(model.parameters(), lr=0.0))
    total, parts = 0.0, [(x[i:i + PART], y[i:i + PART]) for x, y in HELD for i in range(0, B, PART)]
    for x, y in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = model(x.to(device), y.to(device))[1] / len(parts)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.double() for name, p in model.named_parameters()}


def use_sums(wanted: bool | None) -> None:
    """Let all products have fast or exact sums; None: as in training."""
    def product(*args, fast: bool, **options):
        return PRODUCT(*args, fast=fast if wanted is None else wanted, **options)

    fp8.product = gelu_cast.product = cross_entropy.product = product


PRODUCT = fp8.product
if __name__ == "__main__":
    files = sorted(glob.glob(f"{data}/*train*.bin")) if data else []
    tokens = np.memmap(files[0], np.uint16, "r")[1024:] if files else np.random.default_rng(0).integers(
        0, SIZES["vocab_size"], 100_000)
    half = len(tokens) // 2
    weights, HELD = train(tokens[:half]), batches(tokens[half:], 2)
    torch.backends.cuda.matmul.allow_tf32 = False
    true_loss, true = gradients(weights, OFF, amp=False)
    rows = []
    for name, settings, fast in CONTENDERS:
        use_sums(fast)
        loss, found = gradients(weights, settings, amp=True)
        row = {"name": name, "loss_difference": loss - true_loss, "error": {}, "slope": {}}
        for group in GROUPS:
            a, b = (torch.cat([g[n].flatten() for n in true if group in n]) for g in (true, found))
            row["error"][group or "all"] = ((a - b).norm() / a.norm()).item()
            row["slope"][group or "all"] = (a @ b / (a @ a)).item()
        rows.append(row)
        write_result(out, {"environment": environment(device), "settings": dict(config), "loss": true_loss,
                           "contenders": rows})
        figures = "  ".join(f"{group} {row['error'][group]:.3f} {row['slope'][group]:.3f}"
                            for group in row["error"])
        print(f"{name:26} loss {row['loss_difference']:+.5f}  {figures}", flush=True)
