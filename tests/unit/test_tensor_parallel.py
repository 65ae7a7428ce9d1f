"""Schedules, simulated and real ranks: functions and every gradient against an fp64 reference that is written
as the definition reads, rank by rank; counted collectives; who can influence whom; checkpoints across
variants. CPU, real gloo processes (2 and 4, one launch each).

    python -m pytest tests/unit/test_tensor_parallel.py
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ARCHITECTURE,
    EXACT,
    FAMILY,
    SCHEDULES,
    SYNCS,
    build,
    compare_decoder,
    gradients,
    largest_difference,
    random_schedule,
    tokens,
)
from helpers import N_LAYER as L

import reduced_sync_model
from model import GPT, GPTConfig
from nanosync.errors import UserError
from nanosync.ranks import Ranks, f_op, g_op, join_parts, part_of
from nanosync.sync_schedule import Sublayer, SyncSchedule
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig


def reference_logits(model, idx, R):
    """Logits (B, T, V) by the definition: a base, and sums, packets and weights of each of R ranks."""
    p, c = dict(model.named_parameters()), model.config
    H, D = c.n_head // R, c.n_embd // c.n_head
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p.get(name + ".bias"))  # noqa: E731
    base = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][:idx.shape[1]]
    zero, flight = torch.zeros_like(base), []  # flight: (first sublayer with the sum, packet of each rank)
    pending, sent = [zero] * R, torch.arange(c.n_embd) < max(1, round(model.schedule.channels * c.n_embd))

    def attention(x, h, r):
        weight, bias = (None if (whole := p.get(f"{h}.attn.c_attn.{kind}")) is None else
                        part_of("c_attn.", whole, r, R) for kind in ("weight", "bias"))
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in F.linear(x, weight, bias).chunk(3, -1))
        mask = torch.ones(idx.shape[1], idx.shape[1], dtype=torch.bool).tril()
        y = ((q @ k.transpose(-1, -2)) / D**0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    def mlp(x, h, r):
        weight, bias = (None if (whole := p.get(f"{h}.mlp.c_fc.{kind}")) is None else whole.chunk(R)[r]
                        for kind in ("weight", "bias"))
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    for j, sublayer in enumerate(model.schedule.sublayers):
        base = base + sum(sum(packet) for due, packet in flight if due <= j)
        flight = [(due, packet) for due, packet in flight if due > j]
        unsent = [pending[r] + sum(packet[r] for _, packet in flight) for r in range(R)]
        h = f"transformer.h.{j // 2}"
        sub, norm_name, compute = (("attn", "ln_1", attention), ("mlp", "ln_2", mlp))[j % 2]
        matrix = p[f"{h}.{sub}.c_proj.weight"].chunk(R, dim=1)
        outs = [F.linear(compute(norm(base + sublayer.sees * unsent[r], f"{h}.{norm_name}"), h, r), matrix[r])
                for r in range(R)]
        base = base + p.get(f"{h}.{sub}.c_proj.bias", 0.0)
        pending = [d + o for d, o in zip(pending, outs)]
        if sublayer.sync:
            flight.append((j + 1 + sublayer.delay, [d * sent for d in pending]))
            pending = [d * ~sent for d in pending]
    base = base + sum(pending) + sum(sum(packet) for _, packet in flight)
    return norm(base, "transformer.ln_f") @ p["transformer.wte.weight"].T


@pytest.mark.parametrize("number, R", [(number, R) for number in range(len(SCHEDULES))
                                       for R in (2, 6, (1, 3, 4)[number % 3])])
def test_simulated_ranks_are_the_definition(number, R):
    model = build(SCHEDULES[number], R)
    idx, targets = tokens(3, 16), tokens(3, 16, seed=1)
    expected = reference_logits(model, idx, R)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_gradients = gradients(model, loss)
    assert (model(idx, all_logits=True)[0] - expected).abs().max() < EXACT
    assert abs(model(idx, targets)[1] - loss) < EXACT
    assert largest_difference(gradients(model, model(idx, targets)[1]), expected_gradients) < EXACT
    assert model.syncs == SYNCS[number]


@pytest.mark.parametrize("R", [1, 2, 3, 4, 6])
def test_all_synchronised_is_the_dense_model(R):
    """To the last bit, dropout included: with nothing pending the same operations run in the same order."""
    idx, targets = tokens(3, 16), tokens(3, 16, seed=1)
    for schedule in (dict(block_types=None), dict(sync_strategy="standard")):
        dense, model = build(None, dropout=0.3), build(schedule, R, dropout=0.3)
        results = []
        for m in (dense, model):
            torch.manual_seed(5)
            results.append(gradients(m, m(idx, targets)[1]))
        assert largest_difference(*results) == 0


@pytest.mark.parametrize("strategy", FAMILY)
@pytest.mark.parametrize("R", [1, 2, 4])
def test_simulated_family_is_the_definition(strategy, R):
    model = build(dict(sync_strategy=strategy), R)
    assert not model.schedule.is_plain or (R, strategy[:4]) == (1, "mean")
    assert model.syncs == FAMILY[strategy]
    check_simulation(model, R)


def check_simulation(model, R):
    """Logits and gradients of all parameters are those of the definition."""
    idx = tokens(2, 9)
    weights = torch.linspace(-1, 1, 61, dtype=torch.float64)
    expected, found = reference_logits(model, idx, R), model(idx, all_logits=True)[0]
    assert (found - expected).abs().max() < EXACT, model.schedule
    difference = largest_difference(*(gradients(model, (logits.sin() * weights).mean())
                                      for logits in (found, expected)))
    assert difference < EXACT, model.schedule


@pytest.mark.parametrize("R", [1, 2, 4])
def test_random_schedules_are_the_definition(R):
    """120 of the family in all, half of them without biases."""
    for bias in (True, False):
        model = build(dict(block_types=None), R, bias=bias)
        for number in range(20):
            model.reschedule(random_schedule(1000 * R + 100 * bias + number))
            check_simulation(model, R)


@pytest.mark.parametrize("strategy", ["palm", "ladder"])
def test_schedules_that_do_not_depend_on_the_number_of_ranks(strategy):
    """Their ranks read only what all ranks share."""
    models = [build(dict(sync_strategy=strategy), R) for R in (1, 2, 4)]
    logits = [model(tokens(2, 9), all_logits=True)[0] for model in models]
    grads = [gradients(model, out.sin().mean()) for model, out in zip(models, logits)]
    for i in (1, 2):
        assert (logits[i] - logits[0]).abs().max() < EXACT
        assert largest_difference(grads[i], grads[0]) < EXACT
    others = [build(dict(sync_strategy="kraken"), R)(tokens(2, 9))[0] for R in (1, 2)]
    assert (others[1] - others[0]).abs().max() > 1e-3  # of another strategy they do


@pytest.mark.parametrize("make, message", [
    (lambda: Sublayer(True, delay=-1), "delay=-1 must be"),
    (lambda: Sublayer(True, delay=1.0), "delay=1.0 must be"),
    (lambda: Sublayer(True, sees=float("nan")), "sees=nan must be"),
    (lambda: SyncSchedule((Sublayer(True),), channels=0), "channels=0 must be above 0"),
    (lambda: SyncSchedule((Sublayer(True),), channels=1.01), "channels=1.01 must be"),
    (lambda: SyncSchedule((Sublayer(True),), channels=float("nan")), "channels=nan must be")])
def test_wrong_schedules(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_dense_and_plain_schedules():
    points = [SyncSchedule.at(2, p) for p in ([0, 1, 2, 3], [1, 3], [])]
    assert [(s.is_plain, s.is_dense) for s in points] == [(True, True), (True, False), (True, False)]
    seen = SyncSchedule((Sublayer(True, sees=3.0), Sublayer(True, sees=0.0)))  # nothing is unsent there
    assert seen.is_plain and seen.is_dense
    for sublayers in ((Sublayer(True, delay=1), Sublayer(True)), (Sublayer(False), Sublayer(True, sees=0.0))):
        assert not SyncSchedule(sublayers).is_plain and not SyncSchedule(sublayers).is_dense
    assert not SyncSchedule(points[0].sublayers, channels=0.5).is_dense


@pytest.mark.parametrize("schedule", [*SCHEDULES, *(dict(sync_strategy=name) for name in FAMILY)], ids=str)
def test_rows_are_apart_and_time_has_one_direction(schedule):
    model = build(schedule, 2).eval()
    idx = tokens(3, 16)
    before = model(idx, all_logits=True)[0]
    other_row = idx.clone()
    other_row[1] = (other_row[1] + 1) % 61
    after = model(other_row, all_logits=True)[0]
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.allclose(after[1], before[1])
    later = idx.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 61
    after = model(later, all_logits=True)[0]
    assert (after[:, :9] - before[:, :9]).abs().max() < EXACT
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_ranks_differ_only_where_syncs_are_dropped():
    """Dropping syncs changes the function, with one rank it does not; block types and strategies agree."""
    idx = tokens(2, 16)
    out = {R: {str(s): build(s, R)(idx)[0] for s in SCHEDULES} for R in (1, 2)}
    dense = build(None)(idx)[0]
    for schedule, syncs in zip(SCHEDULES, SYNCS):
        assert (out[1][str(schedule)] - dense).abs().max() < EXACT
        assert ((out[2][str(schedule)] - dense).abs().max() < EXACT) == (syncs == 2 * L)
    assert torch.equal(out[2][str(SCHEDULES[1])], out[2][str(dict(sync_strategy="spd"))])
    never = out[2][str(dict(sync_strategy="custom", sync_points=[]))]
    assert (out[2][str(SCHEDULES[2])] - never).abs().max() < EXACT


def test_f_and_g_are_adjoint():
    ranks = Ranks(3)
    base = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    pending = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    u, v = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    (f_op(base, ranks) * u).sum().backward()
    (g_op(pending, ranks) * v).sum().backward()
    assert torch.allclose(base.grad, u.sum(0)) and torch.equal(pending.grad, v.expand(3, 5, 7))


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[3], SCHEDULES[10]], ids=str)
def test_dropout_is_one_mask_for_all_ranks(schedule):
    """A mask takes out the outputs of all ranks and the bias together."""
    model = build(schedule, 2, dropout=0.5)
    ones = torch.ones(2, 3, 16, 48, dtype=torch.float64)
    out, bias = model._residual_dropout(ones, torch.ones(48, dtype=torch.float64))
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], bias)
    assert set(out.unique().tolist()) == {0.0, 2.0} and 0.4 < (out > 0).double().mean() < 0.6


@pytest.mark.parametrize("schedule", [None, *SCHEDULES[:6:2], SCHEDULES[10]], ids=str)
def test_initialisation_is_gpt2s(schedule):
    """Standard deviations within 2% of 0.02 and 0.02 / sqrt(2L), for every model, and equal for all."""
    torch.manual_seed(0)
    config = dict(block_size=256, vocab_size=512, n_layer=L, n_head=4, n_embd=256)
    if schedule is None:
        model = GPT(GPTConfig(**config))
    elif "block_types" in schedule:
        model = DistributedGPT(DistributedGPTConfig(**config, tp_size=2, **schedule))
    else:
        model = reduced_sync_model.GPT(reduced_sync_model.GPTConfig(**config, tp_size=2, **schedule))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / (2 * L)**0.5 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name


@pytest.mark.parametrize("strategy, syncs", [
    (dict(sync_strategy="standard"), 24), (dict(sync_strategy="spd"), 12),
    (dict(sync_strategy="selective", attn_sync_layers=[0, 1, 2, 9, 10, 11]), 18),
    *((dict(sync_strategy="grouped", layers_per_group=k), 12 // k) for k in (2, 3, 4, 6)),
    (dict(sync_strategy="custom", sync_points=[23]), 1), (dict(sync_strategy="custom", sync_points=[5]), 2),
    *((dict(sync_strategy=name), syncs) for name, syncs in {
        "palm": 12, "ladder": 23, "kraken": 12, "dtp:1": 23, "dtp:2": 22, "dtp:23": 24, "mean:3": 4,
        "mean:12": 1, "caat:1": 24, "caat:0.5": 24}.items())])
def test_says_how_often_it_synchronises(strategy, syncs, capsys):
    size = dict(block_size=8, vocab_size=16, n_layer=12, n_head=2, n_embd=8)
    model = reduced_sync_model.GPT(reduced_sync_model.GPTConfig(**size, **strategy))
    assert capsys.readouterr().out.splitlines() == [
        f"Sync strategy: {strategy['sync_strategy']}",
        f"Synchronization points per forward pass: {syncs} (baseline 24)",
        *["Synchronised channels: 4 of 8, at the end all"] * (strategy["sync_strategy"] == "caat:0.5")]
    assert model.n_parameters() == GPT(GPTConfig(**size)).n_parameters()


@pytest.mark.parametrize("config, message", [
    (dict(n_layer=4, block_types=["tp"] * 3), "block_types has 3 entries"),
    (dict(n_layer=2, block_types=["tp", "sdp"]), "block_types[1]='sdp' is unknown"),
    (dict(tp_size=5, block_types=None), "tp_size=5 must divide n_head=12"),
    (dict(tp_size=0, block_types=None), "tp_size=0 must divide"),
    (dict(sync_strategy="sdp"), "sync_strategy='sdp' is unknown"),
    *((dict(sync_strategy=name), f"sync_strategy={name!r} is unknown: use standard, spd")
      for name in ("", ":", "palm:2", "ladder:", "spd:1", "DTP:2", " dtp:2")),
    *((dict(sync_strategy=name), f"sync_strategy={name!r} needs a delay from 1 to 23 sublayers")
      for name in ("dtp", "dtp:", "dtp:0", "dtp:24", "dtp:-1", "dtp:1.5", "dtp:2:3", "dtp:x", "dtp:\u0663")),
    *((dict(sync_strategy=name), f"sync_strategy={name!r} needs a divisor of n_layer=12")
      for name in ("mean", "mean:5", "mean:0", "mean:24", "mean:-3")),
    *((dict(sync_strategy=name), f"sync_strategy={name!r} needs a share of the channels")
      for name in ("caat", "caat:0", "caat:1.5", "caat:nan", "caat:-inf", "caat:half", "caat:0.9999",
                   "caat:1e-9")),
    (dict(sync_strategy="grouped", layers_per_group=5), "layers_per_group=5 does not divide n_layer=12"),
    (dict(sync_strategy="grouped", layers_per_group=0), "layers_per_group=0"),
    (dict(sync_strategy="selective", attn_sync_layers=[12]), "attn_sync_layers has 12"),
    (dict(sync_strategy="spd", attn_sync_layers=[1]), "attn_sync_layers=[1] is for sync_strategy='sel"),
    (dict(sync_points=[1]), "sync_points=[1] is for sync_strategy='custom', but sync_strategy is 'standard'"),
    (dict(sync_strategy="custom", sync_points=[-1]), "sync_points has -1"),
    (dict(sync_strategy="custom", sync_points=[1.0]), "sync_points has 1.0")], ids=str)
def test_wrong_configurations(config, message):
    config_class = DistributedGPTConfig if "block_types" in config else reduced_sync_model.GPTConfig
    with pytest.raises(UserError) as error:
        config_class(**config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("strategy, syncs", [("standard", 24), ("spd", 12), ("selective", 12),
                                             ("grouped", 6), ("custom", 1)])
def test_every_strategy_has_gpt2s_parameters(strategy, syncs):
    """With nothing else set, as it is typed on a command line to have a look."""
    config = reduced_sync_model.GPTConfig(sync_strategy=strategy, n_layer=12, n_head=12, n_embd=768)
    with torch.device("meta"):
        model = GPT(config)
    assert 124e6 < sum(p.numel() for p in model.parameters()) < 125e6
    small = dict(n_layer=12, n_head=2, n_embd=8, vocab_size=16, block_size=8)
    config = reduced_sync_model.GPTConfig(sync_strategy=strategy, **small)
    assert reduced_sync_model.GPT(config).syncs == syncs


def test_ranks_that_do_not_fit():
    with pytest.raises(UserError, match="do not make tp_size=4"):
        DistributedGPT(DistributedGPTConfig(**ARCHITECTURE, tp_size=4), Ranks(2))


def test_parts_of_parameters_join_again():
    model = build(SCHEDULES[0], 2)
    for name, p in model.named_parameters():
        for n in (1, 2, 3, 4):
            parts = [part_of(name, p, i, n) for i in range(n)]
            if parts[0].shape != p.shape or n == 1:
                assert torch.equal(join_parts(name, parts), p) if n > 1 else torch.equal(parts[0], p)
            else:
                assert all(torch.equal(part, p) for part in parts)


WITH_FAMILY = [*SCHEDULES, *(dict(sync_strategy=name) for name in FAMILY)]


@pytest.mark.parametrize("schedule, R", [(schedule, R) for i, schedule in enumerate(WITH_FAMILY)
                                         for R in (2, (1, 4)[i % 2])], ids=str)
def test_cache_of_each_rank(schedule, R):
    model = build(schedule, R).eval()
    assert compare_decoder(model, model.decoder(2), tokens(2, 5), 14) < EXACT  # past block_size, too


def test_saving_a_variant_as_gpt2_warns(tmp_path):
    with pytest.warns(UserWarning, match="computes another function than these weights do here"):
        build(SCHEDULES[1], 2, torch.float32).save_pretrained(str(tmp_path))
