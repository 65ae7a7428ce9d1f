"""Parameter groups, AdamW, learning-rate schedules, the gradient norm, optimizer state by name."""

import math

import torch
import torch.nn as nn

from configurator import UserError
from distributed import all_reduce_sum


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, vectors (biases, LayerNorm) do not. Each parameter is in one group."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied weight comes once
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def build_adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float],
                weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), one fused kernel a group. Raises UserError for values that it cannot take."""
    for name, beta in zip(("beta1", "beta2"), betas):
        if not 0 <= beta < 1:
            raise UserError(f"{name}={beta} must be at least 0 and below 1")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def cosine_learning_rate(step: int, peak: float, minimum: float, warmup_steps: int,
                         decay_steps: int) -> float:
    """Linear to `peak` over warmup_steps, then half a cosine to `minimum` at decay_steps, then that."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step > decay_steps:
        return minimum
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return minimum + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - minimum)


@torch.no_grad()
def clip_gradients(parameters, max_norm: float, split=(), group=None) -> torch.Tensor:
    """Scale all gradients so that their joint L2 norm is at most max_norm (0: leave them); return the norm
    before, a scalar on the device; nothing waits for it.

    split, group: parameters of which each process of the group has a part; the others it has whole. The norm
    is that of the whole gradient, the same on all.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if group is None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    else:
        in_parts = {id(p) for p in split}
        here = [p.grad for p in parameters if id(p) in in_parts]
        whole = [p.grad for p in parameters if id(p) not in in_parts]
        squares = [torch.stack(torch._foreach_norm(grads)).square().sum() for grads in (here, whole)]
        # the same bits on all processes, though replicas of a gradient may differ in rounding
        norm = all_reduce_sum(squares[0] + squares[1] / group.size(), group).sqrt()
    if max_norm > 0:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{parameter}.{entry}` -> tensor, e.g. `transformer.wte.weight.exp_avg`."""
    state = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{entry}"] = torch.as_tensor(value)
    return state


@torch.no_grad()
def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module,
                       state: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_by_name`. Raises UserError if names or shapes are not those of the model's
    parameters.
    """
    entries = sorted({key.rpartition(".")[2] for key in state})
    expected = {f"{name}.{entry}" for name, _ in model.named_parameters() for entry in entries}
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise UserError(f"the optimizer's state does not fit the model: {len(odd)} entries differ, such as "
                        f"{odd[0]}")
    for name, parameter in model.named_parameters():
        for entry in entries:
            shape = state[f"{name}.{entry}"].shape
            if shape not in (parameter.shape, torch.Size()):  # a step counter is a scalar
                raise UserError(f"the optimizer's state does not fit the model: {name}.{entry} is "
                                f"{tuple(shape)} and the parameter {tuple(parameter.shape)}")
    for name, parameter in model.named_parameters():
        for entry in entries:
            value = state[f"{name}.{entry}"]
            # a step counter stays where AdamW put it: fused, beside the parameter
            optimizer.state[parameter][entry] = value.to(parameter.device, copy=True)
