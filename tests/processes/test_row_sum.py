"""RowSum against the sum of whole gradients: values, bits on all processes, what is sent, too many rows. CPU,
real gloo processes.

    python -m pytest tests/processes/test_row_sum.py
"""

import pytest
import torch
import torch.distributed as dist
from helpers import run_processes

from nanosync.distributed import all_values
from nanosync.row_sum import RowSum

ROWS, C = 40, 6


def shares(world: int, touched: int, dtype) -> list[torch.Tensor]:
    """Gradients of all processes, each with so many rows that are not zero; processes share some of them."""
    torch.manual_seed(touched)
    grads = [torch.zeros(ROWS, C, dtype=dtype) for _ in range(world)]
    for grad in grads:
        rows = torch.randperm(ROWS)[:touched]
        grad[rows] = torch.randn(touched, C, dtype=torch.float64).to(dtype)
        grad[rows, 2] = 0
    return grads


def check(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.float64):
        for touched, at_most in ((7, 7), (7, 20), (7, None), (0, 3), (ROWS, None), (ROWS, 99), (1, 1)):
            grads = shares(world, touched, dtype)
            mine = grads[rank].clone()
            row_sum = RowSum(mine, at_most, dist.group.WORLD)
            row_sum.wait()
            # world terms of about 1, each sum rounded
            exact = sum(grad.double() for grad in grads)
            limit = world * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
            assert (mine.double() - exact).abs().max() <= limit, (dtype, touched, at_most)
            assert all(torch.equal(mine, other) for other in all_values(mine, dist.group.WORLD))
            n = ROWS if at_most is None else min(ROWS, at_most)
            assert row_sum.bytes_sent == (world - 1) * n * (8 + C * mine.element_size())
    grads = shares(world, 5, torch.float32)
    grads[0][grads[0].nonzero()[0, 0], 1] = torch.nan
    mine = grads[rank].clone()
    RowSum(mine, 5, dist.group.WORLD).wait()
    assert torch.equal(mine.isnan(), sum(grads).isnan()) and mine.isnan().sum() == 1
    with pytest.raises(RuntimeError):
        RowSum(shares(world, 5, torch.float32)[rank], 4, dist.group.WORLD)


@pytest.mark.parametrize("world", [2, 4])
def test_sums(world, tmp_path):
    run_processes(world, check, tmp_path)
