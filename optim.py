"""Parameter groups, AdamW, alone and with its state shared out over processes (ZeRO-1), learning-rate
schedules, the gradient norm, optimizer state by name.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from configurator import UserError
from distributed import all_reduce_sum, all_values, local_part, part_like, whole_tensor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, vectors (biases, LayerNorm) do not. Each parameter is in one group."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied weight comes once
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def build_adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float,
                shard_over=None) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), one fused kernel a group. Raises UserError for values that it cannot take.

    shard_over: the data-parallel group over which to share out its state, see ShardedAdamW; the model's
    parameters must be where they are to stay.
    """
    for name, beta in zip(("beta1", "beta2"), betas):
        if not 0 <= beta < 1:
            raise UserError(f"{name}={beta} must be at least 0 and below 1")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")
    groups = [g for g in parameter_groups(model, weight_decay) if g["params"]]
    options = dict(lr=learning_rate, betas=betas, fused=True)
    if shard_over is None or shard_over.size() == 1:
        return torch.optim.AdamW(groups, **options)
    return ShardedAdamW(groups, shard_over, **options)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of which each process of a group keeps the moments of its own parameters only: it updates those
    and takes the others from their owners (ZeRO-1, arXiv 1910.02054).

    Gradients must be the same on all processes, as DDP leaves them; then the weights have the bits that they
    have without sharding. All parameters stay in param_groups, so that a GradScaler unscales and zero_grad
    drops every gradient. The parameters of an owner move into one flat tensor: what a step made of them is
    broadcast from there, in place, in as many calls as there are processes.
    """

    def __init__(self, groups: list[dict], group, **options):
        super().__init__(groups, **options)
        self.group, self.rank = group, dist.get_rank(group)
        parameters = [p for g in self.param_groups for p in g["params"]]
        self.owner = share_out(parameters, dist.get_world_size(group))
        self._flat = {}  # of each owner
        for rank in sorted(set(self.owner.values())):
            self._flat[rank] = flatten_together([p for p in parameters if self.owner[p] == rank])
        self._places = {p: p.data_ptr() for p in parameters}

    def owns(self, parameter: nn.Parameter) -> bool:
        return self.owner.get(parameter) == self.rank

    def step(self, closure=None):
        assert all(p.data_ptr() == place for p, place in self._places.items()), (
            "a parameter was moved after ShardedAdamW was built: build it when the model is on its device")
        whole = [g["params"] for g in self.param_groups]
        try:
            for g in self.param_groups:
                g["params"] = list(filter(self.owns, g["params"]))
            loss = super().step(closure)
        finally:
            for g, parameters in zip(self.param_groups, whole):
                g["params"] = parameters
        for work in [dist.broadcast(flat, group_src=rank, group=self.group, async_op=True)
                     for rank, flat in self._flat.items()]:
            work.wait()
        return loss


def share_out(parameters: list[nn.Parameter], processes: int) -> dict[nn.Parameter, int]:
    """Which process owns a parameter: the largest first, each to the one that has the least so far."""
    owner, load = {}, [0] * processes
    for p in sorted(parameters, key=torch.numel, reverse=True):  # stable: the same on all processes
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner


@torch.no_grad()
def flatten_together(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Move parameters of one dtype and device into a flat tensor that they become views of; return that."""
    sizes = [-(-p.numel() // 128) * 128 for p in parameters]  # fp32 begins at 512 bytes, as CUDA allocates
    flat = parameters[0].new_zeros(sum(sizes))
    for p, place in zip(parameters, flat.split(sizes)):
        assert p.dtype == flat.dtype and p.device == flat.device, "parameters differ in dtype or device"
        p.data = place[:p.numel()].view_as(p).copy_(p)
    return flat


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
    is that of the whole gradient, the same on all. What FSDP sharded it has parts of as well.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [local_part(p.grad) for p in parameters]
    sharded = [p.grad.device_mesh for p in parameters if isinstance(p.grad, DTensor)]
    if group is None and not sharded:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    else:
        in_parts = {id(p) for p in split}
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        counted = [1.0 if group is None or id(p) in in_parts else 1 / group.size() for p in parameters]
        total = (squares * torch.tensor(counted).to(squares, non_blocking=True)).sum()
        for mesh in sharded[:1]:  # all have the same
            total = all_reduce_sum(total.to(mesh.device_type), mesh.get_group())
        # the same bits on all processes, though replicas of a gradient may differ in rounding
        norm = all_reduce_sum(total, group).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return norm


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as `{parameter}.{entry}` -> tensor, e.g. `transformer.wte.weight.exp_avg`; of a
    ShardedAdamW, what this process has of it.
    """
    state, parameters = {}, set(model.parameters())
    assert parameters.issuperset(optimizer.state), "the model must be resharded first"
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{entry}"] = torch.as_tensor(value)
    return state


def whole_on_cpu(model: nn.Module, tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Copies of what the dense model has under these names (see `whole`), made one at a time; {} if not keep.
    All processes of the model take part."""
    copies = {}
    for name, tensor in tensors.items():
        whole = model.whole({name: whole_tensor(tensor.detach())})
        if keep:
            copies[name] = whole[name].to("cpu", copy=True).contiguous()
        del whole  # before the next is made
    return copies


@torch.no_grad()
def gather_state(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """`state_by_name` of all owners and of the dense model, on the CPU; {} if not keep, which is for those
    with the first of the data-parallel models. All processes take part; none has more than one tensor of
    others on its device at a time.
    """
    group = optimizer.group if isinstance(optimizer, ShardedAdamW) else None
    rank = 0 if group is None else optimizer.rank
    mine, state, device = state_by_name(optimizer, model), {}, next(model.parameters()).device
    entries = all_values({name: (t.shape, t.dtype) for name, t in mine.items()}, group)
    for owner, of_owner in enumerate(entries):
        for name, (shape, dtype) in of_owner.items():
            tensor = mine[name] if owner == rank else torch.empty(shape, dtype=dtype, device=device)
            if owner > 0:
                dist.broadcast(tensor, group_src=owner, group=group)
            if rank == 0:
                state |= whole_on_cpu(model, {name: tensor}, keep)
            del tensor  # before the next is made
    return state


@torch.no_grad()
def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module,
                       state: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_by_name`; from the state of all parameters, a ShardedAdamW takes what it owns.
    Raises UserError if names or shapes are not those of the model's parameters.
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
        if isinstance(optimizer, ShardedAdamW) and not optimizer.owns(parameter):
            continue
        for entry in entries:
            value = state[f"{name}.{entry}"]
            # a step counter stays where AdamW put it: fused, beside the parameter
            optimizer.state[parameter][entry] = part_like(value, parameter)
