"""Muon: orthogonal updates of matrices, with AdamW for all other parameters."""

import torch
import torch.distributed as dist
import torch.nn as nn

from nanosync.distributed import begin_all_gather, begin_reduce_scatter, finish_tensor
from nanosync.errors import UserError
from nanosync.optim import check_adamw, parameter_groups, set_learning_rate, share_out
from nanosync.optimizer_state import ADAMW_ENTRIES


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
