"""Optimizers: parameter groups, AdamW, AdamW with sharded state (ZeRO-1), Muon, learning-rate schedules, the
gradient norm.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn

from nanosync.distributed import (
    all_reduce_sum,
    begin_all_gather,
    begin_reduce_scatter,
    finish_tensor,
)
from nanosync.errors import UserError
from nanosync.optimizer_state import ADAMW_ENTRIES
from nanosync.sharding import is_sharded, local_part


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Make two groups: matrices and embeddings with weight decay, vectors (biases, LayerNorm) without.

    Each parameter is in one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]  # lists a tied weight once
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def build_adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float,
                shard_over=None) -> torch.optim.AdamW:
    """Build AdamW (arXiv 1711.05101) with one fused kernel per group. Raises UserError.

    The model must be on its final device.

    shard_over: data-parallel group over which its state is sharded, see ShardedAdamW; None for no sharding.
    """
    check_adamw(learning_rate, betas, weight_decay)
    groups = [g for g in parameter_groups(model, weight_decay) if g["params"]]
    options = dict(lr=learning_rate, betas=betas, fused=True)
    if shard_over is None or shard_over.size() == 1:
        return torch.optim.AdamW(groups, **options)
    return ShardedAdamW(groups, shard_over, **options)


def check_adamw(learning_rate: float, betas: tuple[float, float], weight_decay: float) -> None:
    """Raise UserError for values outside AdamW's ranges."""
    for name, beta in zip(("beta1", "beta2"), betas):
        if not 0 <= beta < 1:
            raise UserError(f"{name}={beta} must be at least 0 and below 1")
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose state is sharded over the processes of a group (ZeRO-1, arXiv 1910.02054).

    Each parameter has one owner. A process keeps the moments of its own parameters only, updates these, and
    receives the other parameters from their owners. Gradients must be the same on all processes, as with DDP.
    The weights then have the same bits as without sharding.

    All parameters stay in param_groups, so that a GradScaler unscales and zero_grad drops every gradient. The
    parameters of an owner move into one flat tensor. A step broadcasts each flat tensor in place, one
    broadcast per process.
    """

    def __init__(self, groups: list[dict], group, **options):
        """Assign owners and move the parameters. groups, options: of AdamW; group: process group."""
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


class Muon(torch.optim.AdamW):
    """Muon (kellerjordan.github.io/posts/muon) for matrices, AdamW for all other parameters.

    The update of a matrix is the orthogonal matrix nearest to its momentum, times 0.2 sqrt(max(rows,
    columns)). The factor gives it the usual RMS of AdamW's updates, 0.2 (arXiv 2502.16982), so that AdamW's
    learning rates fit. A parameter with several matrices stacked in dimension 0, such as c_attn with q, k and
    v, is split first, because each of them is a map of its own.

    Each matrix has one owner in the process group. A process keeps the momentum of its own matrices and
    orthogonalises these, all matrices of one shape in one batched product. The updates are gathered, and
    every process applies all of them. Without a group one process owns all matrices. The weights are the same
    on all processes.
    """

    def __init__(self, groups: list[dict], group=None, sum_gradients: bool = False, momentum: float = 0.95,
                 nesterov: bool = True, product_dtype: torch.dtype | None = None, **options):
        """Assign owners and allocate the momentum.

        groups: parameter groups. A group with a key `stacked`, the number of matrices in each of its
            parameters, is Muon's, any other group AdamW's.
        group: process group, None for one process.
        sum_gradients: True if each process has only its share of a gradient. `step` then sums the shares,
            which sends less than an all-reduce of all gradients. False if gradients are the same on all
            processes, as with DDP.
        product_dtype: dtype of the products of Newton-Schulz. None: bfloat16 on CUDA, else float32.
        options: of AdamW. Muon uses lr and weight_decay.
        """
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # a GradScaler must skip a whole step, not only AdamW's part
        self.group, self.rank = group, 0 if group is None else dist.get_rank(group)
        self.sum_gradients, self.momentum, self.nesterov = sum_gradients, momentum, nesterov
        self.bytes_sent = 0  # by this process so far, with ring algorithms: updates, and gradients if summed
        self._stacked = {p: g["stacked"] for g in self.param_groups if "stacked" in g for p in g["params"]}
        self._rest = [p for g in self.param_groups if "stacked" not in g for p in g["params"]]
        first = next(iter(self._stacked))
        for p, n in self._stacked.items():
            assert p.dim() == 2 and p.shape[0] % n == 0, f"{tuple(p.shape)} is not {n} matrices"
            assert p.dtype == first.dtype and p.device == first.device, "matrices differ in dtype or device"
        self._dtype = product_dtype or (torch.bfloat16 if first.is_cuda else torch.float32)
        self.processes = 1 if group is None else dist.get_world_size(group)
        self.owner, self._layouts = share_out(list(self._stacked), self.processes), {}
        for p in filter(self.owns, self._stacked):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _layout(self, present: list) -> tuple[int, dict]:
        """Return (elements per owner, matrix -> first element) of a flat tensor that holds these matrices.

        All owners have parts of one size. present: matrices with a gradient; only these are sent.
        """
        key = tuple(map(id, present))
        if key not in self._layouts:
            ends, places = [0] * self.processes, {}  # ends: elements that each owner has so far
            for p in present:
                rank = self.owner[p]
                places[p] = rank, ends[rank]
                ends[rank] += -(-p.numel() // 128) * 128
            part = max(ends)
            self._layouts[key] = part, {p: rank * part + start for p, (rank, start) in places.items()}
        return self._layouts[key]

    def owns(self, parameter: nn.Parameter) -> bool:
        """Return True if this process has the parameter's state. All have that of AdamW's parameters."""
        return self.owner.get(parameter, self.rank) == self.rank

    def state_entries(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Return the names of the tensors in a parameter's state."""
        return ("momentum_buffer",) if parameter in self.owner else ADAMW_ENTRIES

    def _views(self, flat: torch.Tensor, layout: tuple[int, dict], parameters: list) -> list[torch.Tensor]:
        """Return views of parameters in a flat tensor. flat: whole, or this process's part of it."""
        part, places = layout
        begin = 0 if len(flat) == self.processes * part else self.rank * part
        return [flat[places[p] - begin:][:p.numel()].view_as(p) for p in parameters]

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter with a gradient; these must be the same parameters on all processes."""
        assert closure is None, "Muon takes no closure: compute gradients before step()"
        present = [p for p in self._stacked if p.grad is not None]
        mine, layout = list(filter(self.owns, present)), self._layout(present)
        gradients, others = self._own_gradients(present, mine, layout)
        updates = present[0].new_zeros(layout[0], dtype=self._dtype)
        self._orthogonalise(mine, gradients, self._views(updates, layout, mine))
        if self.processes > 1:
            self.bytes_sent += (self.processes - 1) * updates.nbytes
            updates = begin_all_gather(updates, self.group)
        for work in others:
            work.wait()
        self._step_adamw()
        self._apply(present, self._views(finish_tensor(updates).to(present[0].dtype), layout, present))

    def _own_gradients(self, present: list, mine: list, layout) -> tuple[list[torch.Tensor], list]:
        """Return the whole gradients of this process's matrices, and pending sums of AdamW's gradients."""
        if self.processes == 1 or not self.sum_gradients:
            return [p.grad for p in mine], []
        flat = present[0].new_zeros(self.processes * layout[0])
        torch._foreach_copy_(self._views(flat, layout, present), [p.grad for p in present])
        part = begin_reduce_scatter(flat, self.group)
        rest = [p.grad for p in self._rest if p.grad is not None]
        others = [dist.all_reduce(grad, group=self.group, async_op=True) for grad in rest]
        self.bytes_sent += (self.processes - 1) * part.nbytes
        self.bytes_sent += sum(2 * (self.processes - 1) * grad.nbytes // self.processes for grad in rest)
        return self._views(finish_tensor(part), layout, mine), others

    def _orthogonalise(self, parameters: list, gradients: list, out: list[torch.Tensor]) -> None:
        """Update the momentum, and write the orthogonal matrices nearest to it into `out`."""
        if not parameters:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        moves = torch._foreach_lerp(gradients, buffers, self.momentum) if self.nesterov else buffers
        by_shape = {}  # shape of wide matrices -> pairs (matrix, place of its result)
        for p, move, place in zip(parameters, moves, out):
            for pair in zip(move.chunk(self._stacked[p]), place.chunk(self._stacked[p])):
                wide = pair if pair[0].shape[0] <= pair[0].shape[1] else tuple(m.mT for m in pair)
                by_shape.setdefault(wide[0].shape, []).append(wide)
        for pairs in by_shape.values():
            matrices, places = zip(*pairs)
            torch._foreach_copy_(list(places), list(newton_schulz(torch.stack(matrices), self._dtype)))

    def _step_adamw(self) -> None:
        whole = self.param_groups
        try:
            self.param_groups = [g for g in whole if "stacked" not in g]
            super().step()
        finally:
            self.param_groups = whole

    def _apply(self, present: list, updates: list[torch.Tensor]) -> None:
        moves = dict(zip(present, updates))
        for g in self.param_groups:
            parameters = [p for p in g["params"] if p in moves]
            if parameters and g["weight_decay"] > 0:
                torch._foreach_mul_(parameters, 1 - g["lr"] * g["weight_decay"])
            sizes = [max(p.shape[0] // g["stacked"], p.shape[1]) for p in parameters]
            for size in set(sizes):
                alike = [p for p, s in zip(parameters, sizes) if s == size]
                torch._foreach_add_(alike, [moves[p] for p in alike], alpha=-g["lr"] * 0.2 * size**0.5)


NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Keller Jordan's coefficients, steepest at 0; source: class Muon


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """Orthogonalise matrices approximately: return about U V^T for each U S V^T, in `dtype`.

    Singular values that were not tiny are then between 0.68 and 1.14.

    matrices: (n, rows, columns), rows <= columns.
    """
    a, b, c = NEWTON_SCHULZ
    X = (matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):  # X <- (a + b X X^T + c (X X^T)^2) X
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def build_muon(model: nn.Module, learning_rate: float, muon_learning_rate: float, betas: tuple[float, float],
               weight_decay: float, momentum: float, group=None, sum_gradients: bool = False) -> Muon:
    """Build Muon for the matrices of a model's blocks, with AdamW for embeddings, head and vectors.

    The model must be on its final device. Raises UserError.

    learning_rate, muon_learning_rate: highest values, of AdamW and of Muon. A schedule scales both alike, see
        set_learning_rate.
    group, sum_gradients: see Muon.
    """
    if not 0 <= momentum < 1:
        raise UserError(f"muon_momentum={momentum} must be at least 0 and below 1")
    if learning_rate <= 0:
        raise UserError(f"learning_rate={learning_rate} must be above 0: the schedule scales Muon's learning "
                        f"rate in proportion to it")
    if muon_learning_rate < 0:
        raise UserError(f"muon_learning_rate={muon_learning_rate} must not be negative")
    check_adamw(learning_rate, betas, weight_decay)
    matrices = {p: 3 if "c_attn." in name else 1 for name, p in model.named_parameters()
                if ".h." in name and p.dim() == 2}
    ratio, stacked = muon_learning_rate / learning_rate, sorted(set(matrices.values()))
    groups = [{"params": [p for p in matrices if matrices[p] == n], "stacked": n, "lr_ratio": ratio,
               "weight_decay": weight_decay} for n in stacked]
    for g in parameter_groups(model, weight_decay):
        rest = [p for p in g["params"] if p not in matrices]
        groups += [g | {"params": rest}] if rest else []
    optimizer = Muon(groups, group, sum_gradients, momentum, lr=learning_rate, betas=betas, fused=True)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


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


def _check_muon(settings: dict) -> None:
    if settings["use_zero1"]:
        raise UserError("optimizer='muon' already shards its state over the data-parallel processes: leave "
                        "use_zero1 out")
    if settings["use_fsdp"]:
        raise UserError("optimizer='muon' needs whole matrices, and use_fsdp divides them: leave use_fsdp "
                        "out (Muon shards its state already), or use --optimizer=adamw")
    if settings["tp_processes"] > 1:
        raise UserError(f"optimizer='muon' needs whole matrices, and tp_processes={settings['tp_processes']} "
                        f"divides them: use --tp_processes=1, which simulates the ranks, or "
                        f"--optimizer=adamw")


OPTIMIZERS = {  # name -> check(settings), build(model, settings, parallelism)
    "adamw": (lambda s: None, lambda model, s, parallel: build_adamw(
        model, s["learning_rate"], (s["beta1"], s["beta2"]), s["weight_decay"], parallel.optimizer_group)),
    "muon": (_check_muon, lambda model, s, parallel: build_muon(
        model, s["learning_rate"], s["muon_learning_rate"], (s["beta1"], s["beta2"]), s["weight_decay"],
        s["muon_momentum"], parallel.processes.dp_group)),
}


def check_optimizer(settings: dict) -> None:
    """Raise UserError for an unknown `optimizer`, or for settings that contradict it."""
    kind = settings["optimizer"]
    if kind not in OPTIMIZERS:
        raise UserError(f"optimizer={kind!r} is unknown: use {' or '.join(OPTIMIZERS)}")
    OPTIMIZERS[kind][0](settings)


def build_optimizer(model: nn.Module, settings: dict, parallel) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name; the model must be on its device. Raises UserError.

    An optimizer whose state is sharded over processes has `group`, `rank` and `owns(parameter)`. An optimizer
    whose state differs from AdamW's has `state_entries(parameter)`, the names of the tensors in a parameter's
    state.
    """
    return OPTIMIZERS[settings["optimizer"]][1](model, settings, parallel)
