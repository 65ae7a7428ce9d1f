"""An optimizer's state by parameter name: gathered for a checkpoint, and loaded from one."""

import torch
import torch.distributed as dist
import torch.nn as nn

from nanosync.distributed import all_values
from nanosync.errors import UserError
from nanosync.sharding import part_like, whole_tensor

ADAMW_ENTRIES = ("exp_avg", "exp_avg_sq", "step")


def state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as `{parameter}.{entry}` -> tensor, e.g. `transformer.wte.weight.exp_avg`.
    If the state is sharded over processes, return what this process has of it.
    """
    state, parameters = {}, set(model.parameters())
    assert parameters.issuperset(optimizer.state), "the model must be resharded first"
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}.{entry}"] = torch.as_tensor(value)
    return state


def whole_on_cpu(model: nn.Module, tensors: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Copy what the dense model has under these names (see `whole`) to the CPU, one tensor at a time;
    return {} if not keep. All processes of the model take part."""
    copies = {}
    for name, tensor in tensors.items():
        whole = model.whole({name: whole_tensor(tensor.detach())})
        if keep:
            copies[name] = whole[name].to("cpu", copy=True).contiguous()
        del whole  # before the next is made
    return copies


@torch.no_grad()
def gather_state(optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Gather `state_by_name` of all owners and of the dense model on the CPU; return {} if not keep, which is
    for the processes of the first of the data-parallel models. All processes take part; each holds at most
    one tensor of another process on its device at a time.
    """
    group = getattr(optimizer, "group", None)
    rank = 0 if group is None else optimizer.rank
    mine, state, device = state_by_name(optimizer, model), {}, next(model.parameters()).device
    entries = all_values({name: (t.shape, t.dtype) for name, t in mine.items()}, group)
    seen = set()  # entries that are not sharded are on all processes
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
            del tensor  # before the next is made
    return state


@torch.no_grad()
def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module,
                       state: dict[str, torch.Tensor]) -> None:
    """Load `state_by_name` of all parameters; an optimizer whose state is sharded keeps what it owns. Raises
    UserError if names or shapes are not those of the model's parameters.
    """
    entries_of = getattr(optimizer, "state_entries", lambda parameter: ADAMW_ENTRIES)
    saved = {key.rpartition(".")[2] for key in state}  # AdamW has no state before its first step
    entries = {name: sorted(saved.intersection(entries_of(parameter)))
               for name, parameter in model.named_parameters()}
    expected = {f"{name}.{entry}" for name in entries for entry in entries[name]}
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        hint = ": was it saved with another --optimizer?" if hasattr(optimizer, "state_entries") \
            or saved.difference(ADAMW_ENTRIES) else ""
        raise UserError(f"the optimizer's state does not fit the model: {len(odd)} entries differ, such as "
                        f"{odd[0]}{hint}")
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
            # a step counter stays where AdamW put it: fused, beside the parameter
            optimizer.state[parameter][entry] = part_like(value, parameter)
