"""Random states of a process, as tensors: PyTorch's on CPU and GPU, numpy's and Python's."""

import random

import numpy as np
import torch

from nanosync.checkpoint import Checkpoint
from nanosync.distributed import Processes
from nanosync.errors import UserError, shown

WORDS = {"numpy": 624, "python": 625}  # generators of the Mersenne Twister -> words of 32 bits of a state
RESTS = ("numpy_rest", "python_rest")  # what belongs to these states besides, three numbers each


def seed_random_states(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states(device: torch.device, shared: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Return the random states of this process as tensors by name.

    shared: generator that the processes of one model share, None without.
    """
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_rest": torch.tensor([version, gauss is not None, gauss or 0.0], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if shared is not None:
        states["shared"] = shared.get_state()
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device,
                      shared: torch.Generator | None = None) -> None:
    """Set the random states that `random_states` returned. Raises UserError if they are malformed."""
    try:
        _check_states(states)
        torch.set_rng_state(states["torch"])
        position, has_gauss, cached = states["numpy_rest"].tolist()
        keys = states["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
        version, has_gauss, gauss = states["python_rest"].tolist()
        random.setstate((int(version), tuple(states["python"].tolist()), gauss if has_gauss else None))
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        if shared is not None and "shared" in states:
            shared.set_state(states["shared"])
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as e:
        raise UserError(f"the checkpoint's rng.safetensors has no valid random states ({type(e).__name__}: "
                        f"{e})") from None


def _check_states(states: dict[str, torch.Tensor]) -> None:
    """Check dtypes, shapes and ranges. numpy takes any position, and then reads beyond its keys. Raises
    ValueError or KeyError."""
    if unknown := sorted(set(states) - {*WORDS, *RESTS, "torch", "cuda", "shared"}):
        raise ValueError(f"{shown(unknown[0])} is no random state")
    for name, size in WORDS.items():
        words = states[name]
        if words.dtype != torch.int64 or words.shape != (size,) \
                or not 0 <= words.min() <= words.max() < 2**32:
            raise ValueError(f"{name} is not {size} words of 32 bits")
    for name in RESTS:
        rest = states[name]
        if rest.dtype != torch.float64 or rest.shape != (3,) or not rest.isfinite().all():
            raise ValueError(f"{name} is not 3 finite numbers")
    if not 0 <= states["numpy_rest"][0] <= 624 or states["python"][-1] > 624:
        raise ValueError("a position is not between 0 and 624")
    for name in {"torch", "cuda", "shared"} & set(states):
        if states[name].dtype != torch.uint8 or states[name].dim() != 1:
            raise ValueError(f"{name} is not bytes")


def resume_random_states(resumed: Checkpoint, processes: Processes, shared: torch.Generator | None,
                         say) -> None:
    """Set this process's random states to those that its rank had in the checkpoint.

    If the number of processes has changed, set new states that are a pure function of (seed, step, rank).

    shared: generator that the processes of one model share. say: function that prints a line.
    """
    then = resumed.state["world_size"], resumed.state.get("tp_processes", 1)
    tp_processes = processes.world_size // processes.dp_size
    if then == (processes.world_size, tp_processes):
        states = {name.partition(".")[2]: t for name, t in resumed.tensors("rng").items()
                  if name.startswith(f"{processes.rank}.")}
        return set_random_states(states, processes.device, shared)
    tp_note = f" (tp_processes={then[1]} and {tp_processes})" if then[1] != tp_processes else ""
    say(f"saved on {then[0]} process{'es' * (then[0] > 1)} and resumed on {processes.world_size}{tp_note}: "
        f"dropout masks differ from here on, the order of the data does not")
    key = resumed.state["seed"] % 2**64, resumed.step
    seed_random_states(_seed_of(*key, processes.rank))
    if shared is not None:
        shared.manual_seed(_seed_of(*key, 2**40 + processes.dp_rank))


def _seed_of(*key: int) -> int:
    """Return a seed of 63 bits that is a pure function of a key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
