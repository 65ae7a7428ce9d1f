"""AdamW with clipping of the gradient's norm: two launches for the norm, two for each group of parameters.

PyTorch's fused AdamW with clipping reads every gradient three times and writes it once: the norm reads it,
the scaling reads and writes it, the update reads it. In bytes per value in fp32 that is 4, 8 and 28, in
some twenty launches. Here the update scales the gradients that it reads, so it is 4 and 28. The gradients
stay as they are.

A kernel works on all tensors of a group. It reads their addresses from a table, and each program processes
one piece of one tensor. The norm's partial sums are added up in a fixed order, so the same input gives the
same bits.

The formulas are those of torch.optim.AdamW (arXiv 1711.05101), without amsgrad.
"""

import math

import torch

from kernels import INTERPRETED, triton, usable

PIECE = 4096  # values of a program
WARPS = 8


class ClippingAdamW(torch.optim.AdamW):
    """Fused AdamW whose `clip` finds the norm of the gradient, and whose next step scales what it reads.

    Without `clip` before it, a step is PyTorch's, of gradients with any strides. The state is that of
    torch.optim.AdamW.
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, fused=True, **options)  # also keeps the steps on the device
        self._forget()

    def __setstate__(self, state):  # of a copy; also after load_state_dict
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._step_supports_amp_scaling = False  # a GradScaler leaves a step out by itself
        self._clipped = None  # norm and factor, and updates: of `clip`, for the next step
        # number of a group or "norm" -> what the tables were made from, the tables on the device
        self._pieces, self._tables = {}, {}

    def fits(self) -> bool:
        """Return True if the kernels can run: whole, contiguous fp32 tensors on one GPU, at least one."""
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        tensors = parameters + [p.grad for p in parameters]
        return (bool(tensors) and all(map(_fits, tensors)) and len({t.device for t in tensors}) == 1
                and all(g["fused"] for g in self.param_groups))  # a state from elsewhere may say otherwise

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Return the norm of the gradient, a scalar on the device; the next step limits it to max_norm.

        The gradients stay as they are, and must until the step. `fits` must be True.

        max_norm: 0 for no limit.
        """
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm_and_scale = self._find_norm(grads, max_norm)
        self._clipped = norm_and_scale, self._prepare()  # while the device finds the norm
        return norm_and_scale[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._clipped = None  # also if a scaler left the step out
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        if self._clipped is None:
            for p in (p for g in self.param_groups for p in g["params"]):
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = p.grad.contiguous()  # PyTorch's fused AdamW on a CPU misreads other strides
            return unhooked(torch.optim.AdamW.step)(self, closure)
        assert closure is None, "a closure would make other gradients than those of clip"
        (norm_and_scale, updates), self._clipped = self._clipped, None
        for group, steps, pieces, table in updates:
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            with torch.cuda.device_of(table):
                _adamw_kernel[len(pieces),](
                    table, pieces, norm_and_scale, len(steps), float(group["lr"]),
                    float(group["weight_decay"]), BETA1=beta1, BETA2=beta2, LOG2_BETA1=_log2(beta1),
                    LOG2_BETA2=_log2(beta2), EPS=group["eps"], PIECE=PIECE, num_warps=WARPS)

    def _find_norm(self, grads: list[torch.Tensor], max_norm: float) -> torch.Tensor:
        """Return (norm, factor of the gradients), (2,) fp32."""
        pieces, table = self._table("norm", [grads], grads)
        partial = torch.empty(len(pieces), dtype=torch.float32, device=pieces.device)
        result = partial.new_empty(2)
        with torch.cuda.device_of(partial):
            _squares_kernel[len(pieces),](table, pieces, partial, len(grads), PIECE=PIECE, num_warps=WARPS)
            _norm_kernel[1,](partial, result, len(pieces), max_norm, PIECE=1024, num_warps=8)
        return result

    def _prepare(self) -> list[tuple]:
        """Return (group, steps, pieces, table) for each group that has gradients."""
        updates = []
        for number, group in enumerate(self.param_groups):
            lists = [[] for _ in range(6)]  # parameters, gradients, moments, maxima, steps
            self._init_group(group, *lists)
            parameters, grads, averages, squares, _, steps = lists
            if parameters:
                tables = self._table(number, [parameters, grads, averages, squares, steps], grads)
                updates.append((group, steps, *tables))
        return updates

    def _table(self, kind, lists: list[list[torch.Tensor]], sized: list[torch.Tensor]):
        """Return pieces (P, 2) int32, number of a tensor and of its piece, and addresses and sizes, int64.

        The addresses are sent again if a tensor has moved, as gradients often do. The pieces, 30,000 for
        GPT-2 124M, are made again only if a size has changed.
        """
        device, sizes = sized[0].device, [t.numel() for t in sized]
        rows = [[t.data_ptr() for t in tensors] for tensors in lists] + [sizes]
        if self._pieces.get(kind, (None,))[0] != sizes:
            pieces = [(i, j) for i, size in enumerate(sizes) for j in range(-(-size // PIECE))]
            self._pieces[kind] = sizes, _to(torch.tensor(pieces, dtype=torch.int32), device)
        if self._tables.get(kind, (None,))[0] != rows:
            self._tables[kind] = rows, _to(torch.tensor(rows, dtype=torch.int64), device)
        return self._pieces[kind][1], self._tables[kind][1]


def unhooked(step):
    """Return an optimizer's `step` without its hooks, for the `step` of a class that extends it.

    PyTorch adds the hooks to the class of the first instance, and then to each class below that has its own
    step, so they would run twice.
    """
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _log2(beta: float) -> float:
    return math.log2(max(beta, 1e-300))  # 0 is allowed


def _to(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a table to the device. The call returns at once for up to 64 KB, as addresses are, without pinned
    memory, whose allocation would wait for the device."""
    return table.to(device, non_blocking=True)


def _fits(t: torch.Tensor) -> bool:
    return (usable(t) and type(t) in (torch.Tensor, torch.nn.Parameter) and t.dtype == torch.float32
            and t.is_contiguous() and t.numel() > 0 and t.data_ptr() % 16 == 0
            and (INTERPRETED or t.is_cuda))


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _piece(pieces_ptr, sizes_ptr, PIECE: tl.constexpr):
        """Return this program's tensor, its first value there, and the tensor's size."""
        tensor = tl.load(pieces_ptr + 2 * tl.program_id(0))
        piece = tl.load(pieces_ptr + 2 * tl.program_id(0) + 1)
        return tensor, piece.to(tl.int64) * PIECE, tl.load(sizes_ptr + tensor)

    @triton.jit
    def _values(addresses_ptr, tensor):
        """Return a pointer to the fp32 values of a tensor, which starts at a multiple of 16 bytes."""
        return tl.multiple_of(tl.load(addresses_ptr + tensor).to(tl.pointer_type(tl.float32)), 16)

    @triton.jit
    def _squares_kernel(
        table_ptr,  # (2, N) int64: addresses of gradients, their sizes
        pieces_ptr,  # (P, 2) int32: tensor, its piece
        partial_ptr,  # (P,) fp32
        N, PIECE: tl.constexpr,
    ):
        tensor, first, size = _piece(pieces_ptr, table_ptr + N, PIECE)
        i = first + tl.arange(0, PIECE)
        grad_ptr = _values(table_ptr, tensor) + i
        if first + PIECE <= size:  # a whole piece: without a mask, loads are of 16 bytes
            grad = tl.load(grad_ptr)
        else:
            grad = tl.load(grad_ptr, mask=i < size, other=0.0)
        tl.store(partial_ptr + tl.program_id(0), tl.sum(grad * grad, axis=0))

    @triton.jit
    def _norm_kernel(
        partial_ptr,  # (P,) fp32
        result_ptr,  # (2,) fp32: norm, factor of the gradients
        P, max_norm, PIECE: tl.constexpr,
    ):
        sums = tl.zeros((PIECE,), tl.float32)
        for start in range(0, P, PIECE):
            i = start + tl.arange(0, PIECE)
            sums += tl.load(partial_ptr + i, mask=i < P, other=0.0)
        norm = tl.sqrt_rn(tl.sum(sums, axis=0))
        scale = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(result_ptr, norm)
        tl.store(result_ptr + 1, tl.where(max_norm > 0, scale, 1.0))

    @triton.jit(do_not_specialize=["lr", "weight_decay"])
    def _adamw_kernel(
        table_ptr,  # (6, N) int64: addresses of parameters, gradients, moments, steps; sizes
        pieces_ptr,  # (P, 2) int32: tensor, its piece
        norm_and_scale_ptr,  # (2,) fp32
        N, lr, weight_decay, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG2_BETA1: tl.constexpr,
        LOG2_BETA2: tl.constexpr, EPS: tl.constexpr, PIECE: tl.constexpr,
    ):
        tensor, start, size = _piece(pieces_ptr, table_ptr + 5 * N, PIECE)
        i = start + tl.arange(0, PIECE)
        p_ptr, g_ptr = _values(table_ptr, tensor) + i, _values(table_ptr + N, tensor) + i
        m_ptr, v_ptr = _values(table_ptr + 2 * N, tensor) + i, _values(table_ptr + 3 * N, tensor) + i
        step = tl.load(tl.load(table_ptr + 4 * N + tensor).to(tl.pointer_type(tl.float32)))
        scale = tl.load(norm_and_scale_ptr + 1)
        first = 1 / _correction(LOG2_BETA1, step)
        second = 1 / tl.sqrt(_correction(LOG2_BETA2, step))
        if start + PIECE <= size:  # a whole piece: without a mask, loads are of 16 bytes
            p, m, v = _adamw(tl.load(p_ptr), tl.load(g_ptr) * scale, tl.load(m_ptr), tl.load(v_ptr), lr,
                             weight_decay, first, second, BETA1, BETA2, EPS)
            tl.store(p_ptr, p)
            tl.store(m_ptr, m)
            tl.store(v_ptr, v)
        else:
            mask = i < size
            p, m, v = _adamw(tl.load(p_ptr, mask=mask), tl.load(g_ptr, mask=mask) * scale,
                             tl.load(m_ptr, mask=mask), tl.load(v_ptr, mask=mask), lr, weight_decay, first,
                             second, BETA1, BETA2, EPS)
            tl.store(p_ptr, p, mask=mask)
            tl.store(m_ptr, m, mask=mask)
            tl.store(v_ptr, v, mask=mask)

    @triton.jit
    def _adamw(p, g, m, v, lr, weight_decay, first, second, BETA1: tl.constexpr, BETA2: tl.constexpr,
               EPS: tl.constexpr):
        """Return parameters and moments after an update. first, second: corrections of the moments' bias."""
        m += (1 - BETA1) * (g - m)
        v = BETA2 * v + (1 - BETA2) * g * g
        p -= lr * weight_decay * p
        return p - lr * first * m / (tl.sqrt(v) * second + EPS), m, v

    @triton.jit
    def _correction(log2_beta: tl.constexpr, step):
        """Return 1 - beta^step. In fp32 the difference would have few digits for beta near 1."""
        return (1 - tl.exp2(step.to(tl.float64) * log2_beta)).to(tl.float32)
