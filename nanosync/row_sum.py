"""The sum over processes of a table's gradient that is zero in most rows, without sending those."""

import torch

from nanosync.distributed import begin_all_gather, finish_tensor


class RowSum:
    """A sum over the processes of a group, which has begun. `wait` ends it and puts it into the gradient.

    Every process sends its rows that are not zero to all others. Their number is known to the device only, so
    `at_most` rows are sent: without waiting for the device, and as many on each process.
    """

    def __init__(self, grad: torch.Tensor, at_most: int | None, group):
        """Begin to send.

        grad: this process's share, (rows, C), contiguous; overwritten by `wait`.
        at_most: number of rows that can have an entry other than 0, e.g. the tokens of a step. More of them
            are an assertion on the device. None: all rows.
        group: process group of two or more processes.
        """
        rows = len(grad)
        n = rows if at_most is None else min(rows, at_most)
        touched = (grad != 0).any(dim=1)
        place = touched.cumsum(0) - 1  # in what is sent, of a row that is
        torch._assert_async(place[-1] < n)
        numbers = torch.arange(rows, device=grad.device)
        # the places that are left over, and one more for the other rows, have numbers of rows, too
        mine = numbers.new_zeros(n + 1).scatter_(0, torch.where(touched, place, n), numbers)[:n]
        used = (numbers[:n] <= place[-1])[:, None]
        self._grad, self._mine, self._n = grad, mine, n
        self._numbers = begin_all_gather(mine, group)
        self._values = begin_all_gather(torch.where(used, grad[mine], 0), group)
        self.bytes_sent = (group.size() - 1) * (mine.nbytes + n * grad[:1].nbytes)  # by this process

    def wait(self) -> None:
        """Put the sum into the gradient. It has the same bits on all processes."""
        numbers, values = finish_tensor(self._numbers), finish_tensor(self._values)
        self._grad.index_fill_(0, self._mine, 0)
        for its_rows, its_values in zip(numbers.split(self._n), values.split(self._n)):
            self._grad.index_add_(0, its_rows, its_values)
