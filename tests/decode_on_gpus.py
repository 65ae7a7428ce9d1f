"""Decoding with the sums of real GPUs: each schedule and kind of sum against the model without a cache.

    torchrun --standalone --nproc_per_node=2 tests/decode_on_gpus.py                 # a minute
    torchrun --standalone --nproc_per_node=2 tests/decode_on_gpus.py --device=cpu    # gloo; no kernels

Prints a line for each case, and exits with 1 if a case fails. pytest does not run it.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]

import torch  # noqa: E402

from configurator import configure  # noqa: E402
from nanosync.distributed import all_values, env_rank, finish, start  # noqa: E402
from nanosync.ranks import Ranks  # noqa: E402
from reduced_sync_model import GPT, GPTConfig, named_schedule  # noqa: E402

# -----------------------------------------------------------------------------
device = "auto"
n_embd = 768
new_tokens = 200  # of each case; the KV cache holds them all
# -----------------------------------------------------------------------------
configure(globals(), rank=env_rank())
STRATEGIES = "standard", "spd", "grouped", "palm", "ladder", "kraken", "dtp:2", "mean:3", "caat:0.5"
TOLERANCE = 1e-3  # of logits, relative; fp32, with sums in another order

processes = start(device)
group, device = processes.group, processes.device
assert group is not None, "start this script with torchrun, on two or more processes"
shape = dict(n_layer=6, n_head=n_embd // 64, n_embd=n_embd, block_size=256, vocab_size=1024)
torch.manual_seed(1)
model = GPT(GPTConfig(**shape, tp_size=processes.world_size), announce=False)
with torch.no_grad():  # larger than at the start of training, so that sums that are wrong show
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
model.place(Ranks(1, group))
model.to(device).eval()
failed = 0


@torch.no_grad()
def difference(strategy: str, kind: str, B: int) -> tuple[float, str]:
    """Return the largest difference of the last logits, and how the sums were done."""
    model.reschedule(named_schedule(model.config, strategy))
    decoder = model.decoder(B, tp_allreduce=kind, temperature=0)
    prompt = torch.randint(1024, (B, 8), generator=torch.Generator().manual_seed(B)).to(device)
    worst = 0.0
    for tokens, n in decoder.run(prompt, new_tokens):
        if (n - 8) % 50 == 1 or n == 8 + new_tokens - 1:
            expected = model(tokens[:, :n])[0][:, 0]
            worst = max(worst, (decoder.logits - expected).abs().max().item() / expected.abs().max().item())
    return worst, decoder.sum_kind


for strategy in STRATEGIES:
    for kind in ("nccl", "oneshot", "fused"):
        for B in (1, 4):
            found, did = difference(strategy, kind, B)
            wrong = not max(all_values(found, group)) < TOLERANCE
            failed += wrong
            if processes.main:
                print(f"{strategy:9} {kind:8} B={B}: {did:8} {found:.1e}{'  FAILED' * wrong}", flush=True)
finish(processes)
sys.exit(1 if failed else 0)
