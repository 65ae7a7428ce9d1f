"""An optimizer's state by parameter name: gathering it for a checkpoint, and loading it."""

import torch
import torch.distributed as dist
import torch.nn as nn

from nanosync.distributed import all_values
from nanosync.errors import UserError, shown
from nanosync.sharding import part_like, whole_tensor
from nanosync.tensor_files import FLOATING

ADAMW_ENTRIES = ("exp_avg", "exp_avg_sq", "step")


def adamw_entries(parameter: nn.Parameter) -> dict[str, torch.Size]:
    """Return the names and whole shapes of the tensors in a parameter's AdamW state."""
    return {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size()}


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
    mine, copies, device = state_by_name(optimizer, model), {}, next(model.parameters()).device
    entries = all_values({name: (t.shape, t.dtype) for name, t in mine.items()}, group)
    rows_of = getattr(optimizer, "rows_of", lambda parameter: None)
    in_rows = {f"{name}.{entry}" for name, p in model.named_parameters() if rows_of(p) is not None
               for entry in optimizer.state_entries(p) if entry != "step"}
    seen = set()  # entries without shards are on all processes
    for owner, of_owner in enumerate(entries):
        for name, (shape, dtype) in of_owner.items():
            if name in seen and name not in in_rows:
                continue
            seen.add(name)
            tensor = mine[name] if owner == rank else torch.empty(shape, dtype=dtype, device=device)
            if owner > 0:
                dist.broadcast(tensor, group_src=owner, group=group)
            if rank == 0:
                for copy in whole_on_cpu(model, {name: tensor}, keep).values():
                    copies.setdefault(name, []).append(copy)
            del tensor  # free it before the next tensor is allocated
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in copies.items()}


@torch.no_grad()
def load_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module,
                       state: dict[str, torch.Tensor], begun: bool = True) -> None:
    """Load the whole state of all parameters, as in a checkpoint; keep only this process's part and shard.

    Raises UserError if names, shapes or dtypes do not fit the model's parameters. A kernel that updates a
    parameter with a state of another size or dtype writes beyond its memory.

    begun: False if the optimizer may have made no update yet. AdamW's entries may then all be missing, and
        without any entries, as of converted weights, every kind of optimizer begins anew.
    """
    if not begun and not state:
        return
    entries_of = getattr(optimizer, "state_entries", adamw_entries)
    parameters = dict(model.named_parameters())
    expected = {f"{name}.{entry}": (p, entry) for name, p in parameters.items() for entry in entries_of(p)}
    if not begun and not any(key.endswith(tuple(f".{entry}" for entry in ADAMW_ENTRIES)) for key in state):
        expected = {key: place for key, place in expected.items() if place[1] not in ADAMW_ENTRIES}
    if set(expected) != set(state):
        mismatched = sorted(set(expected) ^ set(state))
        known = {entry for _, entry in expected.values()}.union(ADAMW_ENTRIES)
        other = hasattr(optimizer, "state_entries") or {key.rpartition(".")[2] for key in state} - known
        hint = ": resume with the --optimizer of the run and its settings" if other else ""
        if any(key.endswith(".last_step") for key in mismatched):
            hint = ": resume with --lazy_tables as the run had it"
        raise UserError(f"the optimizer's state does not fit the model: {len(mismatched)} entries differ, "
                        f"such as {shown(mismatched[0])}{hint}")
    owns = getattr(optimizer, "owns", lambda parameter: True)
    rows_of = getattr(optimizer, "rows_of", lambda parameter: None)
    for key, (parameter, entry) in expected.items():
        name, shape = key.removesuffix(f".{entry}"), entries_of(parameter)[entry]
        try:
            value = model.own_part({name: state[key]})[name]
        except (IndexError, RuntimeError):  # too few dimensions; the check below raises the error
            value = state[key]
        if value.shape != shape or value.dtype not in FLOATING:
            expected_shape = "it must be a scalar" if entry == "step" else \
                f"the parameter {tuple(shape)}" if shape == parameter.shape else f"must be {tuple(shape)}"
            problem = f"{tuple(value.shape)} and {expected_shape}" if value.shape != shape else \
                f"{str(value.dtype).removeprefix('torch.')} and must be floating-point"
            raise UserError(f"the optimizer's state does not fit the model: {key} is {problem}")
        if entry == "last_step" and value.max() > state[f"{name}.step"]:
            raise UserError(f"the optimizer's state does not fit the model: {key} is after {name}.step")
        if owns(parameter):
            # a step counter is on the parameter's device, as fused AdamW needs it
            dtype = torch.float32 if entry == "step" else parameter.dtype
            if entry != "step" and rows_of(parameter) is not None:
                value = value[rows_of(parameter)]
            optimizer.state[parameter][entry] = part_like(value.to(dtype), parameter)
