"""Activation checkpointing: the results that a block keeps for its backward pass, or recomputes there."""

import contextlib
import logging

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import kernels.fp8
import kernels.interval_attention  # noqa: F401  both register an operator
from nanosync.errors import UserError

ACTIVATION_CHECKPOINTING = ("none", "block", "selective")
aten = torch.ops.aten
KEPT = [  # by 'selective': operations whose results are expensive to recompute for their memory
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default,
    torch.ops.nanosync.fp8_batched_product.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default, torch.ops.nanosync.interval_attention.default,
]


def use_activation_checkpointing(model: nn.Module, kind: str) -> None:
    """Choose the activations that the blocks of a model keep. Raises UserError for an unknown kind.

    kind: 'none' recomputes nothing. 'block' keeps only the input of each block (arXiv 1604.06174).
        'selective' keeps the results of matrix products, attention and all-reduces (arXiv 2205.05198).
    """
    if kind not in ACTIVATION_CHECKPOINTING:
        raise UserError(f"activation_checkpointing={kind!r} is unknown: use "
                        f"{', '.join(ACTIVATION_CHECKPOINTING)}")
    for block in model.transformer.h:
        block.recompute = kind
    # compiled, 'selective' warns about in-place operations, which the blocks do not have
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(
        lambda record: "context_fn is passed" not in record.getMessage())


def run(compute, args: tuple, kind: str, generator: torch.Generator | None = None):
    """Return compute(*args), and keep the activations that `kind` selects.

    generator: generator of dropout masks inside `compute`, None for PyTorch's own, which PyTorch rewinds.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return compute(*args)
    if generator is None and kind == "block":
        return checkpoint(compute, *args, use_reentrant=False)
    contexts = selective_contexts if generator is None else lambda: _contexts(kind, generator)
    return checkpoint(compute, *args, use_reentrant=False, context_fn=contexts)


def selective_contexts():
    """Make the contexts of the forward pass and of its recomputation."""
    return create_selective_checkpoint_contexts(KEPT)


def _contexts(kind: str, generator: torch.Generator):
    """Make both contexts, with a generator that draws the same numbers in both."""
    first, again = selective_contexts() if kind == "selective" else noop_context_fn()
    rewind = _Rewind(generator)
    return _both(first, rewind.noted()), _both(again, rewind.back())


class _Rewind:
    """A pair of contexts: the generator draws the same numbers in the second as in the first."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    @contextlib.contextmanager
    def noted(self):
        self.state = self.generator.get_state()
        yield

    @contextlib.contextmanager
    def back(self):
        now = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            yield
        finally:
            self.generator.set_state(now)


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield
