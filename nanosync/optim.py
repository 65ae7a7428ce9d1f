"""Parameter groups, AdamW, AdamW with sharded state (ZeRO-1), learning-rate schedules, the gradient norm."""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn

from kernels.adamw import ClippingAdamW, unhooked
from nanosync.distributed import all_reduce_sum
from nanosync.errors import UserError
from nanosync.sharding import is_sharded, local_part


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Make two groups: matrices and embeddings with weight decay, vectors (biases, LayerNorm) without.

    Each parameter is in one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # lists a tied weight once
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def build_adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float,
                shard_over=None) -> ClippingAdamW:
    """Build AdamW (arXiv 1711.05101), fused. Raises UserError. The model must be on its final device.

    shard_over: data-parallel group over which its state is sharded, see ShardedAdamW; None for no sharding.
    """
    check_adamw(learning_rate, betas, weight_decay)
    groups = [g for g in parameter_groups(model, weight_decay) if g["params"]]
    options = dict(lr=learning_rate, betas=betas)
    if shard_over is None or shard_over.size() == 1:
        return ClippingAdamW(groups, **options)
    return ShardedAdamW(groups, shard_over, **options)


def check_adamw(learning_rate: float, betas: tuple[float, float], weight_decay: float) -> None:
    """Raise UserError for values outside AdamW's ranges."""
    for name, beta in zip(("beta1", "beta2"), betas):
        if not 0 <= beta < 1:
            raise UserError(f"{name}={beta} must be at least 0 and below 1")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")


class ShardedAdamW(ClippingAdamW):
    """AdamW whose state is sharded over the processes of a group (ZeRO-1, arXiv 1910.02054).

    Each parameter has one owner. A process keeps the moments of its own parameters only, updates these, and
    receives the other parameters from their owners. Gradients must be the same on all processes, as with DDP.
    The weights then have the same bits as without sharding.

    All parameters stay in param_groups, so that a GradScaler unscales and zero_grad drops every gradient. The
    parameters of an owner move into one flat tensor. A step broadcasts each flat tensor in place, one
    broadcast per process.
    """

    def __init__(self, groups: list[dict], group, **options):
        """Assign owners and move the parameters. groups, options: of ClippingAdamW; group: process group."""
        super().__init__(groups, **options)
        self.group, self.rank = group, dist.get_rank(group)
        parameters = [p for g in self.param_groups for p in g["params"]]
        self.owner = share_out(parameters, dist.get_world_size(group))
        self._flat = {}  # owner -> flat tensor
        for rank in sorted(set(self.owner.values())):
            self._flat[rank] = flatten_together([p for p in parameters if self.owner[p] == rank])
        self._places = {p: p.data_ptr() for p in parameters}

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return True if this process has the parameter's state."""
        return self.owner.get(parameter) == self.rank

    @contextmanager
    def _own_parameters(self):
        """Leave the parameters of other processes out of param_groups."""
        whole = [g["params"] for g in self.param_groups]
        try:
            for g in self.param_groups:
                g["params"] = list(filter(self.owns, g["params"]))
            yield
        finally:
            for g, parameters in zip(self.param_groups, whole):
                g["params"] = parameters

    def _prepare(self) -> list[tuple]:
        with self._own_parameters():
            return super()._prepare()

    def step(self, closure=None):
        assert all(p.data_ptr() == place for p, place in self._places.items()), (
            "a parameter was moved after ShardedAdamW was built: build it when the model is on its device")
        with self._own_parameters():
            loss = unhooked(ClippingAdamW.step)(self, closure)
        for work in [dist.broadcast(flat, group_src=rank, group=self.group, async_op=True)
                     for rank, flat in self._flat.items()]:
            work.wait()
        return loss


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all groups, times the lr_ratio of a group that has one."""
    for g in optimizer.param_groups:
        g["lr"] = learning_rate * g.get("lr_ratio", 1.0)


def share_out(parameters: list[nn.Parameter], processes: int) -> dict[nn.Parameter, int]:
    """Assign an owner to each parameter: largest first, to the process with the fewest elements so far."""
    owner, load = {}, [0] * processes
    for p in sorted(parameters, key=torch.numel, reverse=True):  # stable: the same on all processes
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner


@torch.no_grad()
def flatten_together(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Move parameters of one dtype and device into a new flat tensor, as views of it; return the tensor."""
    sizes = [-(-p.numel() // 128) * 128 for p in parameters]  # fp32 aligned to 512 bytes, as CUDA allocates
    flat = parameters[0].new_zeros(sum(sizes))
    for p, place in zip(parameters, flat.split(sizes)):
        assert p.dtype == flat.dtype and p.device == flat.device, "parameters differ in dtype or device"
        p.data = place[:p.numel()].view_as(p).copy_(p)
    return flat


def cosine_learning_rate(step: int, peak: float, minimum: float, warmup_steps: int,
                         decay_steps: int) -> float:
    """Return the learning rate: linear to `peak` over warmup_steps, then half a cosine, then `minimum`.

    The cosine reaches `minimum` at decay_steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step > decay_steps:
        return minimum
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return minimum + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - minimum)


def trapezoidal_learning_rate(step: int, peak: float, warmup_steps: int, warmdown_steps: int,
                              total_steps: int) -> float:
    """Return the learning rate: linear to `peak` in warmup_steps, constant, linear to 0 in warmdown_steps.

    If warm-up and warm-down overlap, the lower value counts.
    """
    return peak * min(1.0, (step + 1) / max(1, warmup_steps), (total_steps - step) / max(1, warmdown_steps))


@torch.no_grad()
def clip_gradients(parameters, max_norm: float, split=(), group=None) -> torch.Tensor:
    """Scale the gradients to a joint L2 norm of at most max_norm, 0 for no limit; return the norm before.

    The norm is a scalar on the device, without waiting for it. It is the norm of the whole gradient, the same
    on all processes, also if FSDP or tensor parallelism divides parameters.

    split: parameters of which each process of `group` has a part. All other parameters are whole.
    group: tensor-parallel group, None for one process.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [local_part(p.grad) for p in parameters]
    sharded = [p.grad.device_mesh for p in parameters if is_sharded(p.grad)]
    if group is None and not sharded:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    else:
        in_parts = {id(p) for p in split}
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        counted = [1.0 if group is None or id(p) in in_parts else 1 / group.size() for p in parameters]
        total = (squares * torch.tensor(counted).to(squares, non_blocking=True)).sum()
        for mesh in sharded[:1]:  # one mesh for all
            total = all_reduce_sum(total.to(mesh.device_type), mesh.get_group())
        # the sum makes the bits equal on all processes, though replicas of a gradient may differ in rounding
        norm = all_reduce_sum(total, group).sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return norm
