"""Check every gather over NCCL: pending, finished, of a sharded tensor, in a compiled function."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from kernels.collectives import functional_all_gather
from nanosync.distributed import begin_all_gather, finish_tensor
from nanosync.sharding import whole_tensor


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    mesh = init_device_mesh("cuda", (2,))
    group = mesh.get_group()
    whole = torch.arange(2 * 6 * 5, device="cuda", dtype=torch.float32).view(2, 6, 5)
    part = whole[rank].clone().requires_grad_()

    def gathered(x):
        return 2 * functional_all_gather(x * 1.5, 2, group.group_name)

    assert torch.equal(functional_all_gather(part, 2, group.group_name), whole)
    assert torch.equal(torch.compile(gathered)(part.detach()), 3 * whole)
    assert torch.equal(finish_tensor(begin_all_gather(part, group)), whole.flatten(0, 1))
    out = torch.empty_like(whole).flatten(0, 1)
    assert finish_tensor(begin_all_gather(part, group, out)).data_ptr() == out.data_ptr()
    assert torch.equal(out, whole.flatten(0, 1))
    for rows in (8, 7):  # 7: the last part is smaller
        x = torch.randn(rows, 3, device="cuda")
        dist.broadcast(x, 0)
        assert torch.equal(whole_tensor(distribute_tensor(x, mesh, [Shard(0)])), x)
    print(f"process {rank}: gathers over {dist.get_backend()} are right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
