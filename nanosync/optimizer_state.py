"""An optimizer's state by parameter name: gathering it for a checkpoint, and loading it."""

import torch
import torch.distributed as dist
import torch.nn as nn

from nanosync.distributed import all_values
from nanosync.errors import UserError
from nanosync.sharding import part_like, whole_tensor

ADAMW_ENTRIES = ("exp_avg", "exp_avg_sq", "step")


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as `{parameter}.{entry}` -> tensor, e.g. `transformer.wte.weight.exp_avg`.

    If the state is sharded over processes, return this process's shard.
    """
    state, parameters = {}, set(model.parameters())
    assert parameters.issuperset(optimizer.state), "the model must be resharded first"
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{entry}"] = torch.as_tensor(value)
    return state


def whole_on_cpu(model: nn.Module, tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Copy the dense model's tensors of these names to the CPU, one at a time; return {} if not `keep`.

    All processes of the model must call this function.

    tensors: this process's parts, by name, see Replicated.whole.
    """
    copies = {}
    for name, tensor in tensors.items():
        whole = model.whole({name: whole_tensor(tensor.detach())})
        if keep:
            copies[name] = whole[name].to("cpu", copy=True).contiguous()
        del whole  # free it before the next tensor is gathered
    return copies


@torch.no_grad()
def gather_state(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Gather `state_by_name` of all owners, with whole tensors, on the CPU; return {} if not `keep`.

    All processes must call this function. Each process holds at most one tensor of another process on its
    device at a time. keep: True only on processes of DDP rank 0.
    """
    group = getattr(optimizer, "group", None)
    rank = 0 if group is None else optimizer.rank
    mine, state, device = state_by_name(optimizer, model), {}, next(model.parameters()).device
    entries = all_values({name: (t.shape, t.dtype) for name, t in mine.items()}, group)
    seen = set()  # entries without shards are on all processes
    for owner, of_owner in enumerate(entries):
        for name, (shape, dtype) in of_owner.items():
            if name in seen:
                continue
            seen.add(name)
            tensor = mine[name] if owner == rank else torch.empty(shape, dtype=dtype, device=device)
            if owner > 0:
                dist.broadcast(tensor, group_src=owner, group=group)
            if rank == 0:
                state |= whole_on_cpu(model, {name: tensor}, keep)
            del tensor  # free it before the next tensor is allocated
    return state


@torch.no_grad()
def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module,
                       state: dict[str, torch.Tensor]) -> None:
    """Load the state of all parameters, as `state_by_name` returns it; keep only this process's shard.

    Raises UserError if names or shapes do not fit the model's parameters.
    """
    entries_of = getattr(optimizer, "state_entries", lambda parameter: ADAMW_ENTRIES)
    saved = {key.rpartition(".")[2] for key in state}  # AdamW has no state before its first step
    entries = {name: sorted(saved.intersection(entries_of(parameter)))
               for name, parameter in model.named_parameters()}
    expected = {f"{name}.{entry}" for name in entries for entry in entries[name]}
    if expected != set(state):
        mismatched = sorted(expected ^ set(state))
        hint = ": was it saved with another --optimizer?" if hasattr(optimizer, "state_entries") \
            or saved.difference(ADAMW_ENTRIES) else ""
        raise UserError(f"the optimizer's state does not fit the model: {len(mismatched)} entries differ, "
                        f"such as {mismatched[0]}{hint}")
    for name, parameter in model.named_parameters():
        for entry in entries[name]:
            shape = state[f"{name}.{entry}"].shape
            if shape not in (parameter.shape, torch.Size()):  # a step counter is a scalar
                raise UserError(f"the optimizer's state does not fit the model: {name}.{entry} is "
                                f"{tuple(shape)} and the parameter {tuple(parameter.shape)}")
    owns = getattr(optimizer, "owns", lambda parameter: True)
    for name, parameter in model.named_parameters():
        for entry in entries[name] if owns(parameter) else ():
            value = state[f"{name}.{entry}"]
            # a step counter is on the parameter's device, as fused AdamW needs it
            optimizer.state[parameter][entry] = part_like(value, parameter)
