"""Muon: orthogonal updates of matrices, with AdamW for all other parameters.

Options add what later speedrun records use: the Polar Express polynomials, NorMuon's normalisation of
neurons, cautious weight decay, and AdamW's state sharded by rows for large tables.
"""

import torch
import torch.distributed as dist
import torch.nn as nn

from kernels.lazy_rows import update_rows_
from nanosync.distributed import begin_all_gather, begin_reduce_scatter, finish_tensor
from nanosync.errors import UserError
from nanosync.optim import check_adamw, parameter_groups, set_learning_rate, share_out
from nanosync.optimizer_state import adamw_entries
from nanosync.row_sum import RowSum

SCALES = {  # name -> factor(lr, rows, columns) of an orthogonal update
    "rms": lambda lr, rows, columns: lr * 0.2 * max(rows, columns)**0.5,  # RMS 0.2 (arXiv 2502.16982)
    "spectral": lambda lr, rows, columns: lr * max(1.0, rows / columns)**0.5,  # as Keller Jordan's Muon
}


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

    `momentum` can be set before each step, and so can `lookups`: in how many rows of a table of a lazy group
    this process's gradient is not zero, at most; None: in all.
    """

    def __init__(self, groups: list[dict], group=None, sum_gradients: bool = False, momentum: float = 0.95,
                 nesterov: bool = True, product_dtype: torch.dtype | None = None, *,
                 polar_express: bool = False, norm_beta2: float | None = None, cautious: bool = False,
                 scale: str = "rms", shard_rows_from: int | None = None, **options):
        """Assign owners and allocate the state. Raises UserError.

        groups: parameter groups. A group with a key `stacked`, the number of matrices in each of its
            parameters, is Muon's, any other group AdamW's. With a key `lazy_rows` that is true, a group of
            AdamW's has tables whose rows are updated by update_rows_, without weight decay; of the gradients
            only rows that are not zero are sent. A group's learning rate is the common one times its key
            `lr_ratio`, 1 by default, see set_learning_rate.
        group: process group, None for one process.
        sum_gradients: True if each process has only its share of a gradient. `step` then sums the shares,
            which sends less than an all-reduce of all gradients. False if gradients are the same on all
            processes, as with DDP.
        product_dtype: dtype of the products of Newton-Schulz. None: bfloat16 on CUDA, else float32.
        polar_express: orthogonalise with polar_factor, not with newton_schulz.
        norm_beta2: decay of NorMuon's second moments, see normalise_neurons; None for no normalisation.
        cautious: apply weight decay to a matrix only where the update shrinks it too, see decay_cautiously.
        scale: factor of the orthogonal matrix, a key of SCALES.
        shard_rows_from: number of elements from which a parameter of AdamW is sharded, if gradients are
            summed: each process has the moments of some rows and updates these. None: no parameter.
        options: of AdamW, lr among them. Muon uses lr and weight_decay.
        """
        super().__init__(groups, **{"fused": True} | options)
        self._step_supports_amp_scaling = False  # a GradScaler must skip a whole step, not only AdamW's part
        self.group, self.rank = group, 0 if group is None else dist.get_rank(group)
        self.processes = 1 if group is None else dist.get_world_size(group)
        self.sum_gradients, self.momentum, self.nesterov = sum_gradients, momentum, nesterov
        self.norm_beta2, self.cautious, self.scale, self.lookups = norm_beta2, cautious, scale, None
        self._orthogonal = polar_factor if polar_express else newton_schulz
        self.bytes_sent = 0  # by this process so far, with ring algorithms: updates, and gradients if summed
        set_learning_rate(self, self.defaults["lr"])
        self._stacked = {p: g["stacked"] for g in self.param_groups if "stacked" in g for p in g["params"]}
        self._rest = [p for g in self.param_groups if "stacked" not in g for p in g["params"]]
        self._lazy = {p for g in self.param_groups if g.get("lazy_rows") for p in g["params"]}
        self._check()
        first = next(iter(self._stacked))
        self._dtype = product_dtype or (torch.bfloat16 if first.is_cuda else torch.float32)
        self.owner, self._layouts = share_out(list(self._stacked), self.processes), {}
        self._sharded = self._choose_sharded(shard_rows_from)
        for p in filter(self.owns, self._stacked):
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            if norm_beta2 is not None:
                self.state[p]["second_moment"] = p.new_zeros(self.state_entries(p)["second_moment"])
        for p in self._rest:  # now, so that checkpoints also have the state of a parameter without a gradient
            own = p if self.rows_of(p) is None else p[self.rows_of(p)]
            whole = self.state_entries(p)
            self.state[p] = {"step": p.new_zeros((), dtype=torch.float32)} | {
                entry: own.new_zeros(own.shape[:len(whole[entry])]) for entry in whole if entry != "step"}

    def _check(self) -> None:
        if self.scale not in SCALES:
            raise UserError(f"scale={self.scale!r} is unknown: use {' or '.join(SCALES)}")
        if self.norm_beta2 is not None and not 0 <= self.norm_beta2 < 1:
            raise UserError(f"norm_beta2={self.norm_beta2} must be at least 0 and below 1, or None")
        for g in self.param_groups:
            check_adamw(g["lr"], g["betas"], g["weight_decay"])
            assert not (g.get("lazy_rows") and g["weight_decay"]), "lazy rows have no weight decay"
        assert all(p.dim() == 2 for p in self._lazy), "lazy rows of a parameter that is no table"
        first = next(iter(self._stacked))
        for p, n in self._stacked.items():
            assert p.dim() == 2 and p.shape[0] % n == 0, f"{tuple(p.shape)} is not {n} matrices"
            assert p.dtype == first.dtype and p.device == first.device, "matrices differ in dtype or device"

    def _choose_sharded(self, least: int | None) -> dict[nn.Parameter, int]:
        """Return {sharded parameter of AdamW: rows of a process}; the last process may have fewer rows."""
        if least is None or not self.sum_gradients or self.processes == 1:
            return {}
        rows = {p: -(-len(p) // self.processes) for p in self._rest
                if p.dim() > 0 and p.numel() >= least and p not in self._lazy}
        return {p: n for p, n in rows.items() if (self.processes - 1) * n < len(p)}  # the last has a row

    def rows_of(self, parameter: nn.Parameter) -> slice | None:
        """Return the rows whose moments this process has, None if the parameter is not sharded by rows."""
        n = self._sharded.get(parameter)
        return None if n is None else slice(self.rank * n, (self.rank + 1) * n)

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

    def state_entries(self, parameter: nn.Parameter) -> dict[str, torch.Size]:
        """Return the names and whole shapes of the tensors in a parameter's state."""
        if parameter in self._lazy:
            return {"step": torch.Size(), "exp_avg_sq": parameter.shape, "last_step": parameter.shape[:1]}
        if parameter not in self.owner:
            return adamw_entries(parameter)
        entries = {"momentum_buffer": parameter.shape}
        if self.norm_beta2 is not None:  # along the longer side; of square matrices, for each row
            n, (rows, columns) = self._stacked[parameter], parameter.shape
            entries["second_moment"] = torch.Size((rows, 1) if rows // n >= columns else (n, columns))
        return entries

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
        own, others, rows = self._begin_sums(present, layout)
        gradients = [p.grad for p in mine] if own is None else self._views(finish_tensor(own), layout, mine)
        updates = present[0].new_zeros(layout[0], dtype=self._dtype)
        self._orthogonalise(mine, gradients, self._views(updates, layout, mine))
        if self.processes > 1:
            self.bytes_sent += (self.processes - 1) * updates.nbytes
            updates = begin_all_gather(updates, self.group)
        for work in others:
            work.wait()
        gathers = self._step_adamw(rows)
        if self.processes > 1:
            updates = finish_tensor(updates)
        self._apply(present, self._views(updates.to(present[0].dtype), layout, present))
        for p, whole in gathers:
            if len(finish_tensor(whole)) > len(p):
                p.copy_(whole[:len(p)])

    def _begin_sums(self, present: list, layout) -> tuple[torch.Tensor | None, list, dict]:
        """Start to sum the gradients over the processes, if they are shares.

        Return the pending gradient of this process's matrices, flat, or None if no sum is needed; the pending
        sums of AdamW's gradients; {sharded parameter: pending gradient of this process's rows}.
        """
        if self.processes == 1 or not self.sum_gradients:
            return None, [], {}
        flat = present[0].new_zeros(self.processes * layout[0])
        torch._foreach_copy_(self._views(flat, layout, present), [p.grad for p in present])
        part = begin_reduce_scatter(flat, self.group)
        rest = [p for p in self._rest if p.grad is not None]
        rows = {p: begin_reduce_scatter(padded(p.grad, self.processes * self._sharded[p]), self.group)
                for p in rest if p in self._sharded}
        whole = [p.grad for p in rest if p not in self._sharded and p not in self._lazy]
        others = [dist.all_reduce(grad, group=self.group, async_op=True) for grad in whole]
        sums = [RowSum(p.grad, self.lookups, self.group) for p in rest if p in self._lazy]
        self.bytes_sent += (self.processes - 1) * sum(sent.nbytes for sent in (part, *rows.values()))
        self.bytes_sent += sum(2 * (self.processes - 1) * grad.nbytes // self.processes for grad in whole)
        self.bytes_sent += sum(row_sum.bytes_sent for row_sum in sums)
        return part, others + sums, rows

    def _orthogonalise(self, parameters: list, gradients: list, out: list[torch.Tensor]) -> None:
        """Update the momentum, and write the orthogonal matrices nearest to it into `out`."""
        if not parameters:
            return
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        moves = torch._foreach_lerp(gradients, buffers, self.momentum) if self.nesterov else buffers
        by_shape = {}  # shape of wide matrices -> tuples (matrix, place of its result, second moment if any)
        for p, move, place in zip(parameters, moves, out):
            moment = [] if self.norm_beta2 is None else [self.state[p]["second_moment"]]
            for parts in zip(*(t.chunk(self._stacked[p]) for t in (move, place, *moment))):
                wide = parts if move.shape[0] <= move.shape[1] * self._stacked[p] else \
                    tuple(t.mT for t in parts)
                by_shape.setdefault(wide[0].shape, []).append(wide)
        for tuples in by_shape.values():
            matrices, places, *moments = zip(*tuples)
            results = self._orthogonal(torch.stack(matrices), self._dtype)
            for own in map(list, moments):
                seconds = torch.stack(own)
                normalise_neurons(results, seconds, self.norm_beta2)
                torch._foreach_copy_(own, list(seconds))
            torch._foreach_copy_(list(places), list(results))

    def _step_adamw(self, rows: dict) -> list[tuple]:
        """Update AdamW's parameters; of sharded ones update this process's rows, and start to gather them.

        rows: sharded parameter -> pending gradient of this process's rows.
        Return pairs (parameter, pending tensor of all rows, with the parameter's memory if no row is padded).
        """
        whole, shards = self.param_groups, {}
        for p, gradient in rows.items():
            shards[p] = shard = p.detach()[self.rows_of(p)]
            shard.grad = finish_tensor(gradient)[:len(shard)]
            self.state[shard] = self.state[p]
        groups = [g | {"params": [shards.get(p, p) for p in g["params"]]}
                  for g in whole if "stacked" not in g]
        try:
            self.param_groups = [g for g in groups if not g.get("lazy_rows")]
            super().step()
            for g in groups:
                if g.get("lazy_rows"):
                    self._step_lazily(g)
        finally:
            self.param_groups = whole
            for shard in shards.values():
                del self.state[shard]
        return [(p, self._begin_gather(p, shard)) for p, shard in shards.items()]

    def _step_lazily(self, group: dict) -> None:
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                state["step"] += 1
                update_rows_(p.detach(), p.grad, state["exp_avg_sq"], state["last_step"],
                             state["step"], group["lr"], group["betas"][1], group["eps"])

    def _begin_gather(self, p: nn.Parameter, shard: torch.Tensor) -> torch.Tensor:
        own = padded(shard, self._sharded[p])
        self.bytes_sent += (self.processes - 1) * own.nbytes
        in_place = self.processes * len(own) == len(p)
        return begin_all_gather(own, self.group, p.detach() if in_place else None)

    def _apply(self, present: list, updates: list[torch.Tensor]) -> None:
        moves = dict(zip(present, updates))
        for g in self.param_groups:
            parameters = [p for p in g["params"] if p in moves]
            if parameters and g["weight_decay"] > 0:
                if self.cautious:
                    decay_cautiously(parameters, [moves[p] for p in parameters], g["lr"] * g["weight_decay"])
                else:
                    torch._foreach_mul_(parameters, 1 - g["lr"] * g["weight_decay"])
            factors = [SCALES[self.scale](g["lr"], p.shape[0] // g["stacked"], p.shape[1])
                       for p in parameters]
            for factor in set(factors):
                alike = [p for p, f in zip(parameters, factors) if f == factor]
                torch._foreach_add_(alike, [moves[p] for p in alike], alpha=-factor)


NEWTON_SCHULZ = 5 * [(3.4445, -4.7750, 2.0315)]  # Keller Jordan's, steepest at 0; source: class Muon
POLAR_EXPRESS = [  # arXiv 2505.16932, for singular values from 0.001
    (8.1566, -22.4833, 15.8788), (4.0429, -2.8089, 0.5), (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645), (2.3465, -1.7098, 0.4232)]


def newton_schulz(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Orthogonalise matrices approximately: return about U V^T for each U S V^T, in `dtype`.

    Singular values that were not tiny are then between 0.68 and 1.14.

    matrices: (n, rows, columns), rows <= columns.
    """
    norms = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    return odd_polynomials((matrices / norms).to(dtype), NEWTON_SCHULZ)


def polar_factor(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Orthogonalise matrices as newton_schulz does, but closer, by Polar Express (arXiv 2505.16932).

    Each step has the polynomial that is best for the singular values that the steps before it leave. The
    factor 1.02 keeps them below 1 in bfloat16.
    """
    norms = torch.linalg.matrix_norm(matrices, keepdim=True)
    return odd_polynomials((matrices / (1.02 * norms + 1e-6)).to(dtype), POLAR_EXPRESS)


def odd_polynomials(X: torch.Tensor, coefficients: list[tuple[float, float, float]]) -> torch.Tensor:
    """Apply X <- (a + b X X^T + c (X X^T)^2) X for each (a, b, c)."""
    for a, b, c in coefficients:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def normalise_neurons(X: torch.Tensor, seconds: torch.Tensor, beta2: float) -> None:
    """Divide each row by the root of its second moment, and keep each matrix's Frobenius norm, both in place.

    From NorMuon (arXiv 2510.05491): without it neurons of one matrix move by steps of different lengths.

    X: (n, rows, columns), orthogonal matrices.
    seconds: (n, rows, 1), decaying mean of the rows' mean squares, which is updated; (n, 1, columns) for
        columns in place of rows.
    """
    along = -1 if seconds.shape[-1] == 1 else -2
    squares = torch.linalg.vector_norm(X, dim=along, keepdim=True, dtype=seconds.dtype).square_()  # sums
    seconds.lerp_(squares / X.shape[along], 1 - beta2)
    factors = seconds.clamp(min=1e-10).rsqrt_()
    before = squares.sum((-2, -1), keepdim=True)
    after = (squares * factors.square()).sum((-2, -1), keepdim=True)
    X.mul_(factors * (before / after.clamp(min=1e-20)).sqrt_())


def decay_cautiously(parameters: list, updates: list[torch.Tensor], decay: float) -> None:
    """Shrink each weight by `decay` times itself where the update also moves it towards 0, or not at all.

    arXiv 2411.16085 masks updates so. updates: what is subtracted from the parameters, but for a factor.
    """
    masks = torch._foreach_mul(updates, parameters)
    torch._foreach_sign_(masks)
    torch._foreach_add_(masks, 1.0)
    torch._foreach_clamp_max_(masks, 1.0)  # 1 where the product is 0 or more
    torch._foreach_mul_(masks, parameters)
    torch._foreach_add_(parameters, masks, alpha=-decay)


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return x, contiguous, with rows of zeros added up to this number; a view if x has as many rows."""
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def build_muon(model: nn.Module, learning_rate: float, muon_learning_rate: float, betas: tuple[float, float],
               weight_decay: float, momentum: float, group=None, sum_gradients: bool = False,
               **options) -> Muon:
    """Build Muon for the matrices of a model's blocks, with AdamW for embeddings, head and vectors.

    The model must be on its final device. Raises UserError.

    learning_rate, muon_learning_rate: highest values, of AdamW and of Muon. A schedule scales both alike, see
        set_learning_rate.
    group, sum_gradients, options: see Muon.
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
    return Muon(groups, group, sum_gradients, momentum, lr=learning_rate, betas=betas, **options)
