"""The checks of fused_step.py: kernels against fp64, beside PyTorch's error in the same dtype."""

import itertools
import traceback
from collections.abc import Callable

import torch

from kernels import adamw, gelu_mlp, qkv_linear, usable
from nanosync.files import first_line

GELU = {"gelu": "preactivation", "gelu-derivative": "derivative", "gelu-derivative8": "derivative8",
        "gelu-recompute": "nothing"}  # word of a contender -> what the kernel keeps


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest error as a share of the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def values_and_gradients(function, inputs, grad) -> list[torch.Tensor]:
    """Return the results of a function and the gradients of its inputs that are not None."""
    inputs = [z if z is None else z.detach().requires_grad_() for z in inputs]
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, grad)
    return [*(z.detach() for z in results), *(z.grad for z in inputs if z is not None)]


def compare(what: str, word: str, function, plain, inputs, grad, factor: float, figures: list) -> None:
    """Compare function and plain, both in 16 bits, with plain in fp64; note the errors.

    word: of the contenders that run the function.
    """
    double = [z if z is None else z.double() for z in inputs]
    exact = values_and_gradients(plain, double, [g.double() for g in grad])
    theirs = [relative_error(z, e) for z, e in zip(values_and_gradients(plain, inputs, grad), exact)]
    try:
        ours = [relative_error(z, e) for z, e in zip(values_and_gradients(function, inputs, grad), exact)]
    except Exception as e:  # of a compiler, or of a launch
        _note_failure(what, word, e, figures)
        return
    good = all(a <= factor * b + 1e-3 for a, b in zip(ours, theirs))
    figures.append({"what": what, "word": word, "ours": ours, "plain": theirs, "good": good})
    print(f"{'ok   ' if good else 'WRONG'} {what}: largest error, ours / PyTorch's: "
          + ", ".join(f"{a:.1e} / {b:.1e}" for a, b in zip(ours, theirs)), flush=True)


def _note_failure(what: str, word: str, error: Exception, figures: list) -> None:
    traceback.print_exc()
    what = f"{what}: {type(error).__name__}: {first_line(error)}"
    figures.append({"what": what, "word": word, "good": False})
    print(f"WRONG {what}", flush=True)


def check(device: torch.device, dtype: torch.dtype, sizes: list[tuple], note: Callable) -> set[str]:
    """Compare all kernels with fp64; return the words of contenders with a wrong one.

    sizes: of the products, (N, C, H). note: function that writes the figures so far.
    """
    figures = []
    for size in sizes:
        check_gelu(*size, device, dtype, figures)
        check_qkv(*size[:2], device, dtype, figures)
        note(figures)
    try:
        check_adamw(device, figures)
    except Exception as e:
        _note_failure("adamw", "adamw", e, figures)
    note(figures)
    return {f["word"] for f in figures if not f["good"]}


def check_gelu(N: int, C: int, H: int, device, dtype, figures: list) -> None:
    """Compare output and gradients of the MLP, for everything that can be kept."""
    def plain(x, w_in, b_in, w_out, b_out):
        linear = torch.nn.functional.linear
        return linear(torch.nn.functional.gelu(linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)

    for (word, keep), (sigmoid, bias) in itertools.product(GELU.items(), (("exponential", True),
                                                                          ("tanh", False))):
        gelu_mlp.SIGMOID = sigmoid
        x, w_in, b_in, w_out, b_out, grad = (z.to(device, dtype) for z in (
            torch.randn(N, C), torch.randn(H, C) / C**0.5, torch.randn(H), torch.randn(C, H) / H**0.5,
            torch.randn(C), torch.randn(N, C)))
        inputs = (x, w_in, b_in if bias else None, w_out, b_out if bias else None)
        factor = 2.0 if sigmoid == "tanh" or keep == "derivative8" else 1.3
        compare(f"gelu {N} x {C} x {H}, {keep}, {sigmoid}, bias={bias}",
                "tanh" if sigmoid == "tanh" else word, lambda *z, keep=keep: gelu_mlp.gelu_mlp(*z, keep),
                plain, inputs, [grad], factor, figures)
    gelu_mlp.SIGMOID = "exponential"


def check_adamw(device, figures: list) -> None:
    """Compare parameters after three clipped updates with those of PyTorch's AdamW in fp64."""
    errors = []
    for double, kind in ((False, adamw.ClippingAdamW), (False, torch.optim.AdamW), (True, torch.optim.AdamW)):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape).to(device, torch.float64 if double else None))
                      for shape in ((768, 3072), (5,), (50304, 16))]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.95), fused=True) if kind is torch.optim.AdamW \
            else kind([{"params": parameters}], lr=1e-2, betas=(0.9, 0.95))
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape).to(p)
            if kind is adamw.ClippingAdamW and usable(parameters[0]):
                assert optimizer.fits(), "PyTorch's AdamW would be compared with itself"
                optimizer.clip(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        errors.append([p.detach() for p in parameters])
    ours, theirs = ([relative_error(z, e) for z, e in zip(found, errors[2])] for found in errors[:2])
    good = all(a <= 2 * b + 1e-6 for a, b in zip(ours, theirs))
    figures.append({"what": "adamw", "word": "adamw", "ours": ours, "plain": theirs, "good": good})
    print(f"{'ok   ' if good else 'WRONG'} adamw: largest error, ours {max(ours):.1e}, PyTorch's "
          f"{max(theirs):.1e}", flush=True)


def check_qkv(N: int, C: int, device, dtype, figures: list) -> None:
    """Compare q, k, v and gradients; the gradients come from three tensors, as attention makes them."""
    def plain(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).chunk(3, dim=-1)

    x, weight, b = (z.to(device, dtype) for z in (
        torch.randn(N, C), torch.randn(3 * C, C) / C**0.5, torch.randn(3 * C)))
    grads = [torch.randn(N, C, device=device, dtype=dtype) for _ in range(3)]
    compare(f"q, k, v {N} x {C}", "qkv", qkv_linear.qkv_linear, plain, (x, weight, b), grads, 1.3, figures)
