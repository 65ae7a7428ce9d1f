"""Interval attention on a GPU: errors against fp64, configurations of the three kernels, then peers.

From the repository's root: OUT=FOLDER python records/2026-11-29-interval-attention-h200/attention.py
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from kernels import interval_attention as module

T, H, D = 65536, 6, 128
SCALE, WINDOWS = D**-0.5, (384, 1664)
CONFIGS = {  # kernel -> (queries, keys, warps, stages)
    "forward": [
        (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 64, 4, 3),
        (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3),
        (64, 32, 4, 4), (128, 32, 4, 3)],
    "backward_kv": [
        (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2),
        (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 4, 2), (128, 128, 8, 1), (64, 64, 4, 1),
        (128, 64, 8, 1), (128, 64, 8, 2), (64, 64, 4, 3)],
    "backward_q": [
        (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 1),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 4, 2), (128, 128, 8, 1),
        (64, 128, 4, 1), (64, 128, 8, 1)],
}


def make(n, seed=0):
    """Return the documents' first tokens, token ids (1, n), and random q, k, v, gradient (1, n, H, D)."""
    random = torch.Generator().manual_seed(seed)
    starts, at = [], 0
    while at < n:
        starts.append(at)
        at += int(torch.empty(1).log_normal_(7.2, 1.0, generator=random).clamp(30, 60000))
    idx = torch.ones(1, n, dtype=torch.int64)
    idx[0, starts] = 0
    return starts, idx.cuda(), [torch.randn(1, n, H, D, generator=random).to("cuda", torch.bfloat16)
                                for _ in range(4)]


class Kernels:
    """The three kernels on one input."""

    def __init__(self, n, window):
        _, idx, (self.q, self.k, self.v, self.grad) = make(n)
        t = torch.arange(n, device="cuda", dtype=torch.int32)[None].contiguous()
        self.n, self.first = n, module.first_visible(idx, 0, window)
        self.last = torch.searchsorted(self.first, t, right=True, out_int32=True) - 1
        self.out, self.lse, self.delta = torch.empty_like(self.q), *torch.zeros(2, 1, H, n, device="cuda")
        self.grads = [torch.empty_like(self.q) for _ in range(3)]
        self.launch("forward", (64, 64, 4, 2))
        grid = triton.cdiv(n, 64), H
        module._delta_kernel[grid](self.out, self.grad, self.delta, BLOCK_M=64, num_warps=4,
                                   **module._sizes(self.q))

    def launch(self, name, config):
        M, N, warps, stages = config
        options = dict(module._sizes(self.q), BLOCK_M=M, BLOCK_N=N, num_warps=warps, num_stages=stages)
        grid = (triton.cdiv(self.n, N if name == "backward_kv" else M), H)
        q, k, v, first, lse, delta = self.q, self.k, self.v, self.first, self.lse, self.delta
        if name == "forward":
            module._attention_forward_kernel[grid](q, k, v, first, self.out, lse, SCALE * module.LOG2E,
                                                   **options)
        elif name == "backward_kv":
            module._backward_kv_kernel[grid](q, k, v, self.grad, first, self.last, lse, delta,
                                             *self.grads[:2], SCALE, **options)
        else:
            module._backward_q_kernel[grid](q, k, v, self.grad, first, lse, delta, self.grads[2], SCALE,
                                            **options)


def compile_one(job):
    """Fill Triton's cache in a process of its own; return an error's text or None."""
    try:
        Kernels(512, 384).launch(*job)
        torch.cuda.synchronize()
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:100]}"


def median_ms(function, n=20):
    for _ in range(3):
        function()
    times = []
    for _ in range(n):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[n // 2]


def forward_and_backward(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    forward = median_ms(lambda: function(*inputs))
    out = function(*inputs)
    grad = torch.randn_like(out)
    return forward, median_ms(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True))


def errors():
    """Return relative errors of out and of the gradients of q, k and v, in norm, against fp64."""
    _, idx, (q, k, v, grad) = make(1500, seed=3)
    first = module.first_visible(idx, 0, 300)
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, expected = module.interval_attention(*given, first), module._in_pytorch(*exact, first, SCALE)
    out.backward(grad)
    expected.backward(grad.double())
    pairs = zip([out, *(x.grad for x in given)], [expected, *(x.grad for x in exact)])
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def peers():
    """Yield (name, (forward, backward) ms)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    starts, idx, (q, k, v, _) = make(T)
    ends, flex = [*starts[1:], T], torch.compile(flex_attention, dynamic=False)
    cut = [s for a, b in zip(starts, ends) for s in range(a, b, 4096)]

    def varlen(firsts, longest, window):
        offsets = torch.tensor([*firsts, T], device="cuda", dtype=torch.int32)
        return lambda q, k, v: varlen_attn(q[0], k[0], v[0], offsets, offsets, longest, longest,
                                           window_size=(window - 1, 0))

    for turn in (1, 2):
        for window in WINDOWS:
            first = module.first_visible(idx, 0, window)
            longest = max(b - a for a, b in zip(starts, ends))
            yield f"ours {window} {turn}", forward_and_backward(
                lambda q, k, v, first=first: module.interval_attention(q, k, v, first), q, k, v)
            yield f"varlen {window} {turn}", forward_and_backward(varlen(starts, longest, window), q, k, v)
            yield f"varlen cut {window} {turn}", forward_and_backward(varlen(cut, 4096, window), q, k, v)
            document = (idx[0] == 0).cumsum(0)
            mask = create_block_mask(lambda b, h, i, j, d=document, w=window:
                                     (j <= i) & (i - j < w) & (d[i] == d[j]), None, None, T, T)
            yield f"flex {window} {turn}", forward_and_backward(
                lambda q, k, v, mask=mask: flex(q, k, v, block_mask=mask),
                *(x.transpose(1, 2).contiguous() for x in (q, k, v)))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            yield f"cuDNN {turn}", forward_and_backward(
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                *(x.view(64, 1024, H, D).transpose(1, 2) for x in (q, k, v)))


def main():
    out = Path(os.environ.get("OUT", "."), "attention.json")
    jobs = [(name, config) for name in CONFIGS for config in CONFIGS[name]]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        failures = pool.map(compile_one, jobs, chunksize=1)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "errors": errors(),
              "sweep": [], "peers": {}}
    for window in WINDOWS:
        kernels = Kernels(T, window)
        for (name, config), failure in zip(jobs, failures):
            row = dict(zip(("kernel", "window", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
                           (name, window, *config)))
            found = {"failure": failure} if failure else \
                {"ms": median_ms(lambda n=name, c=config, kernels=kernels: kernels.launch(n, c))}
            result["sweep"].append(row | found)
            out.write_text(json.dumps(result, indent=1))
    for name, times in peers():
        result["peers"][name] = times
        print(f"{name:20s} {times[0]:.3f} + {times[1]:.3f} ms", flush=True)
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
