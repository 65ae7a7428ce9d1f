"""An update of a table of embeddings that leaves rows without a gradient as they are.

AdamW reads and writes all of a table and its two moments, though a step needs few of its rows: 28 bytes a
value in fp32. Here a row whose gradient is zero costs the 4 bytes of its gradient, any other row 20.

AdamW also moves a row in the steps after its gradient, by the first moment. Here there is no first moment: a
row moves once, by its gradient over the root of the second moment. If a row has a gradient in few steps, both
add up to about the same: AdamW's moves to sum_k (1 - b1) b1^k / sqrt((1 - b2) b2^k) times the learning rate,
4.85 for b1 = 0.75 and b2 = 0.95, this one to 1 / sqrt(1 - b2), 4.47.

The second moment decays in every step. The decay of the steps in which a row has no gradient is computed when
the row has its next gradient.
"""

import math

import torch

from kernels import INTERPRETED, triton, usable


@torch.no_grad()
def update_rows_(parameter: torch.Tensor, grad: torch.Tensor, square: torch.Tensor, last: torch.Tensor,
                 step: torch.Tensor, lr: float, beta2: float, eps: float) -> None:
    """Update the rows of a table that have an entry of the gradient other than 0, in place.

        square = beta2^(step - last) square + (1 - beta2) grad^2
        parameter -= lr grad / (sqrt(square / (1 - beta2^step)) + eps)
        last = step

    parameter, grad, square: (rows, C). An entry of the gradient that is not finite makes its entry NaN.
    last: number of the update in which a row last had a gradient, 0 before the first; (rows,).
    step: number of this update, from 1, a scalar on the device.
    """
    tensors = (parameter, grad, square, last)
    if all(usable(t) and t.dtype == torch.float32 and t.is_contiguous() for t in tensors) and \
            (INTERPRETED or parameter.is_cuda) and parameter.numel() > 0:
        rows, C = parameter.shape
        with torch.cuda.device_of(parameter):
            _update_rows_kernel[(rows,)](parameter, grad, square, last, step, C, float(lr), float(eps),
                                         BETA2=beta2, LOG2_BETA2=math.log2(max(beta2, 1e-300)),
                                         BLOCK=triton.next_power_of_2(C), num_warps=4)
        return
    rows = (grad != 0).any(dim=1).nonzero()[:, 0]
    g, decay = grad[rows], beta2 ** (step - last[rows])[:, None]
    new = decay * square[rows] + (1 - beta2) * g.square()
    parameter[rows] -= lr * g / ((new / (1 - beta2**step)).sqrt() + eps)
    square[rows] = new
    last[rows] = step.to(last.dtype)


if triton is not None:
    import triton.language as tl

    from kernels.adamw import _correction

    @triton.jit(do_not_specialize=["lr", "eps"])
    def _update_rows_kernel(
        p_ptr, g_ptr, v_ptr,  # (rows, C) fp32
        last_ptr,  # (rows,) fp32
        step_ptr,  # scalar fp32
        C, lr, eps, BETA2: tl.constexpr, LOG2_BETA2: tl.constexpr, BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        place, mask = row * C + i, i < C
        g = tl.load(g_ptr + place, mask=mask, other=0.0)
        if tl.max((g != 0).to(tl.int32), axis=0) > 0:  # NaN != 0
            step, last = tl.load(step_ptr), tl.load(last_ptr + row)
            decay = tl.exp2((step - last) * LOG2_BETA2)
            v = decay * tl.load(v_ptr + place, mask=mask, other=0.0) + (1 - BETA2) * g * g
            root = tl.sqrt_rn(v / _correction(LOG2_BETA2, step))
            p = tl.load(p_ptr + place, mask=mask, other=0.0)
            tl.store(p_ptr + place, p - lr * g / (root + eps), mask=mask)
            tl.store(v_ptr + place, v, mask=mask)
            tl.store(last_ptr + row, step)
