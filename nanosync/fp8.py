"""The setting --fp8: matrix products of the blocks, and with --fp8_head of the head, in FP8 while training.

The linear layers of the blocks become Float8Linear. Parameters, their names, gradients and checkpoints stay
as they are. Without gradients (evaluations, samples) the model runs in the usual dtype, as it does later from
its weights.
Scales depend on the tensors alone (see kernels/fp8.py), so FP8 adds no state to a checkpoint.

Each process casts its weights once per update: a hook of the optimizer does it after each step. FSDP gathers
a unit's weights for each pass, so there a weight is cast in each pass. So is the head's on real TP ranks,
because its replicas drift apart and are made equal outside of updates.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import fp8
from kernels.fp8 import MULTIPLE, WeightCast, WeightCasts
from kernels.gelu_cast import fp8_gelu_mlp
from nanosync.errors import UserError, shown
from nanosync.sharding import is_sharded


class Float8Linear(nn.Linear):
    """A linear layer whose forward product and input gradient are in FP8 where gradients are recorded."""

    emulated = False  # products in fp32, on any device
    low_weight_gradient = False  # the weight's gradient in FP8 as well
    casts: WeightCast | None = None  # of the weight as it is now; None: cast in each pass

    def forward(self, x):
        return self.product(x, self.bias)

    def product(self, x, bias=None):
        """Return x @ weight.T + bias, (..., N), for x (..., K)."""
        if torch.is_grad_enabled():
            return fp8.linear(x, self.weight, bias, self.emulated, self.casts, self.low_weight_gradient)
        return F.linear(x, self.weight, bias)

    def split_casts(self, split: Callable) -> WeightCast | None:
        """Return the casts of split(weight), None if the weight is cast in each pass."""
        if self.casts is None:
            return None
        values, transposed = split(self.casts.values), split(self.casts.transposed.t()).mT
        return WeightCast(*(t if t.stride(-1) == 1 else t.contiguous() for t in (values, transposed)),
                          self.casts.scale)


def product_without_bias(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """Return x @ weight.T, in FP8 if the layer is in FP8."""
    return linear.product(x) if isinstance(linear, Float8Linear) else F.linear(x, linear.weight)


def runs_in_fp8(linear: nn.Linear) -> bool:
    """Return True if a layer is in FP8, and gradients are recorded."""
    return isinstance(linear, Float8Linear) and torch.is_grad_enabled()


def split_product(x: torch.Tensor, linear: Float8Linear, parts: int) -> tuple[torch.Tensor, ...]:
    """Return linear(x) in equal parts of the last dimension, whose gradients are joined in FP8 alone."""
    return fp8.split_linear(x, linear.weight, linear.bias, parts, linear.emulated, linear.casts,
                            linear.low_weight_gradient)


def fused_mlp(x: torch.Tensor, c_fc: Float8Linear, c_proj: Float8Linear) -> torch.Tensor:
    """Return c_proj(gelu(c_fc(x))), with the casts around GELU in its kernels."""
    return fp8_gelu_mlp(x, c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias, c_fc.emulated,
                        c_fc.casts, c_proj.casts, c_fc.low_weight_gradient)


def batched_product(x: torch.Tensor, linear: nn.Linear, split: Callable) -> torch.Tensor:
    """Return x[r] @ split(weight)[r].T for each r, in FP8 if the layer is in FP8.

    x: (R, M, K). split: function of a matrix like the weight that returns R matrices, (R, N, K).
    """
    weight = split(linear.weight)
    if runs_in_fp8(linear):
        return fp8.batched_linear(x, weight, linear.emulated, linear.split_casts(split))
    return torch.bmm(x, weight.transpose(1, 2))


def check_fp8(config: dict) -> None:
    """Raise UserError for wrong values of fp8, fp8_head and fp8_weight_gradients."""
    setting = config["fp8"]
    if type(setting) is not bool and setting != "emulated":
        raise UserError(f"fp8={shown(setting)} is unknown: use True, False or emulated")
    for name, what in (("fp8_head", "the head"), ("fp8_weight_gradients", "the gradients of weights")):
        if config[name] and not setting:
            raise UserError(f"{name} adds {what} to the products in FP8: add --fp8, or leave {name} out")


def check_fp8_device(config: dict, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if FP8 cannot run on the device or beside the dtype of other products."""
    if not config["fp8"]:
        return
    if dtype == torch.float16:
        raise UserError("fp8 does not go with float16, which scales losses: use --dtype=bfloat16, or leave "
                        "fp8 out")
    if config["fp8"] == "emulated":
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        raise UserError(f"fp8 needs an NVIDIA GPU since Hopper (H100), and the device is {name}: leave fp8 "
                        f"out, or use --fp8=emulated, which casts in the same way and is slow")
    if dtype != torch.bfloat16:
        raise UserError(f"fp8 needs dtype='bfloat16' for all other products, and it is "
                        f"{str(dtype).removeprefix('torch.')!r}: use --dtype=bfloat16")


def use_fp8(model: nn.Module, config: dict) -> None:
    """Run the products of a model's blocks in FP8, and the head's with fp8_head. Call follow_weights when the
    model has its weights. Raises UserError for a model whose sizes do not fit.

    With fp8_weight_gradients, those of the blocks' weights as well, except in batches of simulated ranks.

    model: a model of any kind, with or without values, whole or on real TP ranks.
    """
    if not config["fp8"]:
        return
    parts = model.ranks.local if _streams_differ(model) else 1
    for name, module in model.transformer.h.named_modules():
        if isinstance(module, nn.Linear):
            (rows, columns), kind = module.weight.shape, name.partition(".")[2]
            split = (rows, columns // parts) if kind.endswith("c_proj") else (rows // parts, columns)
            where = "a simulated rank" if parts > 1 else "a process"
            _check_size(f"transformer.h.{name}.weight", *split, where)
            module.__class__, module.emulated = Float8Linear, config["fp8"] == "emulated"
            # for a square weight the casts take longer than FP8 saves
            module.low_weight_gradient = config["fp8_weight_gradients"] and rows != columns and parts == 1
    if config["fp8_head"]:
        V, C = model.transformer.wte.weight.shape
        ranks = getattr(model, "ranks", None)
        processes = 1 if ranks is None else ranks.processes
        for rows in (V, -(-V // processes)):
            _check_size("the head", rows, C, setting="fp8_head")
        model.head_in_fp8 = config["fp8"]


def _streams_differ(model: nn.Module) -> bool:
    """Return True for a model with simulated ranks whose streams differ somewhere, so that they multiply in a
    batch."""
    ranks, schedule = getattr(model, "ranks", None), getattr(model, "schedule", None)
    return ranks is not None and ranks.local > 1 and not schedule.is_dense


def _check_size(matrix: str, rows: int, columns: int, of: str = "a process", setting: str = "fp8") -> None:
    if rows % MULTIPLE or columns % MULTIPLE:
        raise UserError(f"{setting} needs matrices whose sizes are multiples of {MULTIPLE}, and on {of} "
                        f"{matrix} has {rows} x {columns}: choose other sizes, or leave {setting} out")


def layers_of(model: nn.Module) -> list[Float8Linear]:
    """Return the layers of a model that use_fp8 changed."""
    return [module for module in model.modules() if isinstance(module, Float8Linear)]


def follow_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cast a model's weights now and after each step of its optimizer.

    The model must have its weights, on their final device. Weights that FSDP shards are cast in each pass.
    """
    layers = [layer for layer in layers_of(model) if not is_sharded(layer.weight)]
    if not layers:
        return
    weights, head = [layer.weight.detach() for layer in layers], model.transformer.wte.weight
    ranks = getattr(model, "ranks", None)
    keeps_head = model.head_in_fp8 and not is_sharded(head) and (
        ranks is None or ranks.group is None)
    kept = WeightCasts(weights + [head.detach()] * keeps_head)
    for layer, casts in zip(layers, kept.casts):
        layer.casts = casts
    model.head_casts = kept.casts[-1] if keeps_head else None
    optimizer.register_step_post_hook(lambda *_: kept.update())


def describe_fp8(config: dict, model: nn.Module) -> str:
    """Return the line that a run prints about FP8."""
    how = "emulated, which is slow" if config["fp8"] == "emulated" else "scales per row"
    head = " and the head" if config["fp8_head"] else ""
    gradients = sum(layer.low_weight_gradient for layer in layers_of(model))
    gradients = "" if not config["fp8_weight_gradients"] else f", {gradients} weight gradients" if gradients \
        else ", no weight gradients, which batches of simulated ranks leave as they are"
    return (f"FP8: {len(layers_of(model))} matrices of the blocks{head}{gradients} ({how})"
            + ("; without compile the casts cost more than FP8 saves"
               if not config["compile"] and config["fp8"] != "emulated" else ""))
