"""Activation checkpointing: what a block keeps for its backward pass, and what is computed again there."""

import contextlib
import logging

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from nanosync.errors import UserError

ACTIVATION_CHECKPOINTING = ("none", "block", "selective")
aten = torch.ops.aten
KEPT = [  # by 'selective': results that cost much to compute again for the memory that they take
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
]


def use_activation_checkpointing(model: nn.Module, kind: str) -> None:
    """Choose what a model of any kind keeps of its blocks. Raises UserError for an unknown kind.

    kind: 'none' computes nothing again; 'block' keeps only the input of each block (arXiv 1604.06174);
    'selective' keeps the results of matrix products, attention and all-reduces (arXiv 2205.05198).
    """
    if kind not in ACTIVATION_CHECKPOINTING:
        raise UserError(f"activation_checkpointing={kind!r} is unknown: use "
                        f"{', '.join(ACTIVATION_CHECKPOINTING)}")
    for block in model.transformer.h:
        block.recompute = kind
    # compiled, 'selective' causes a warning about operations in place, of which blocks have none
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(
        lambda record: "context_fn is passed" not in record.getMessage())


def run(compute, args: tuple, kind: str, generator: torch.Generator | None = None):
    """Return compute(*args), and keep of it what `kind` says.

    generator: draws dropout masks inside `compute`; PyTorch rewinds only its own generators by itself.
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
    """Make both contexts, in which the generator draws the same twice."""
    first, again = selective_contexts() if kind == "selective" else noop_context_fn()
    rewind = _Rewind(generator)
    return _both(first, rewind.noted()), _both(again, rewind.back())


class _Rewind:
    """Lets a generator draw again what it drew."""

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
