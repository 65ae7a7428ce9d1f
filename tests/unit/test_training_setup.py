"""What prepare_training wraps around a model. CPU; seconds.

    python -m pytest tests/unit/test_training_setup.py
"""

import torch

from nanosync.training_setup import seeded


def test_seeds_of_dropout_come_from_the_cpu(monkeypatch):
    """The checkpoint has the state of the CPU's generator, so that a resumed run draws the same seeds."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    torch.manual_seed(5)
    double = seeded(lambda x: 2 * x)
    assert [double(1), double(2)] == [2, 4]
    state = torch.get_rng_state()
    double(3)
    torch.set_rng_state(state)
    double(3)
    assert seeds[2] == seeds[3] and len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)
