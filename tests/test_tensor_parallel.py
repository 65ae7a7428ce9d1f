"""Schedules, simulated and real ranks: functions and every gradient against an fp64 reference that is written
as the definition reads, rank by rank; counted collectives; who can influence whom; checkpoints across
variants. CPU, real gloo processes (2 and 4, one launch each).

    python -m pytest tests/test_tensor_parallel.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import run_processes
from test_model import tokens
from torch.utils._python_dispatch import TorchDispatchMode

import reduced_sync_model
from kernels.exchange import GroupSum
from model import GPT, GPTConfig
from nanosync.errors import UserError
from nanosync.ranks import Ranks, f_op, g_op, join_parts, part_of
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig

L = 4
ARCHITECTURE = dict(block_size=16, vocab_size=61, n_layer=L, n_head=12, n_embd=48, bias=True)
EXACT = 1e-12  # fp64 sums of at most some thousand terms of size one, in another order

BLOCKS = [["tp"] * L, ["spd"] * L, ["parallel"] * L, ["tp", "spd", "parallel", "parallel"],
          ["spd", "parallel", "spd", "parallel"], ["parallel", "tp", "parallel", "spd"]]
STRATEGIES = [dict(sync_strategy="standard"), dict(sync_strategy="spd"),
              dict(sync_strategy="selective", attn_sync_layers=[0]),
              dict(sync_strategy="selective", attn_sync_layers=[1, 3]),
              dict(sync_strategy="grouped", layers_per_group=2),
              dict(sync_strategy="grouped", layers_per_group=4),
              dict(sync_strategy="custom", sync_points=[]), dict(sync_strategy="custom", sync_points=[0]),
              dict(sync_strategy="custom", sync_points=[1, 4]),
              dict(sync_strategy="custom", sync_points=[2, 3, 6, 7])]
SCHEDULES = [dict(block_types=b) for b in BLOCKS] + STRATEGIES
SYNCS = [8, 4, 1, 4, 4, 5, 8, 4, 5, 6, 2, 1, 1, 2, 3, 4]  # of SCHEDULES, counted by hand


def build(schedule: dict | None, tp_size: int = 1, dtype=torch.float64, seed=1, **changes):
    """A model whose parameters, biases and LayerNorms too, are random and the same for every schedule."""
    torch.manual_seed(seed)
    architecture = ARCHITECTURE | changes
    if schedule is None:
        model = GPT(GPTConfig(**architecture))
    elif "block_types" in schedule:
        model = DistributedGPT(DistributedGPTConfig(**architecture, tp_size=tp_size, **schedule))
    else:
        model = reduced_sync_model.GPT(reduced_sync_model.GPTConfig(**architecture, tp_size=tp_size,
                                                                    **schedule))
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def reference_logits(model, idx, R, points):
    """Logits (B, T, V) by the definition: a base, and a pending sum and weights for each of R ranks."""
    p, c = dict(model.named_parameters()), model.config
    H, D = c.n_head // R, c.n_embd // c.n_head
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"])  # noqa: E731
    base = p["transformer.wte.weight"][idx] + p["transformer.wpe.weight"][:idx.shape[1]]
    pending = [torch.zeros_like(base) for _ in range(R)]

    def attention(x, h, r):
        weight, bias = (part_of("c_attn.", p[f"{h}.attn.c_attn.{kind}"], r, R) for kind in ("weight", "bias"))
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in F.linear(x, weight, bias).chunk(3, -1))
        mask = torch.ones(idx.shape[1], idx.shape[1], dtype=torch.bool).tril()
        y = ((q @ k.transpose(-1, -2)) / D**0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    def mlp(x, h, r):
        weight, bias = (p[f"{h}.mlp.c_fc.{kind}"].chunk(R)[r] for kind in ("weight", "bias"))
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    for j in range(2 * c.n_layer):
        h = f"transformer.h.{j // 2}"
        sub, norm_name, compute = (("attn", "ln_1", attention), ("mlp", "ln_2", mlp))[j % 2]
        matrix = p[f"{h}.{sub}.c_proj.weight"].chunk(R, dim=1)
        outs = [F.linear(compute(norm(base + pending[r], f"{h}.{norm_name}"), h, r), matrix[r])
                for r in range(R)]
        base = base + p[f"{h}.{sub}.c_proj.bias"]
        pending = [d + o for d, o in zip(pending, outs)]
        if j in points or j == 2 * c.n_layer - 1:
            base, pending = base + sum(pending), [torch.zeros_like(base) for _ in range(R)]
    return norm(base, "transformer.ln_f") @ p["transformer.wte.weight"].T


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def largest_difference(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("number", range(len(SCHEDULES)))
@pytest.mark.parametrize("R", [1, 2, 3, 4, 6])
def test_simulated_ranks_are_the_definition(number, R):
    model = build(SCHEDULES[number], R)
    idx, targets = tokens(3, 16), tokens(3, 16, seed=1)
    expected = reference_logits(model, idx, R, model.schedule.points)
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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
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


@pytest.mark.parametrize("R", [2, 4])
def test_compiles_as_one_graph(R):
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    model = build(dict(block_types=BLOCKS[3]), R, torch.float32)
    expected = gradients(model, model(idx, targets)[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if R == 2 else "aot_eager")
    # fp32: gradients of size 1 through four layers
    assert largest_difference(gradients(model, compiled(idx, targets)[1]), expected) < 1e-4


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
    (dict(sync_strategy="custom", sync_points=[23]), 1), (dict(sync_strategy="custom", sync_points=[5]), 2)])
def test_says_how_often_it_synchronises(strategy, syncs, capsys):
    size = dict(block_size=8, vocab_size=16, n_layer=12, n_head=2, n_embd=8)
    model = reduced_sync_model.GPT(reduced_sync_model.GPTConfig(**size, **strategy))
    assert capsys.readouterr().out.splitlines() == [
        f"Sync strategy: {strategy['sync_strategy']}",
        f"Synchronization points per forward pass: {syncs} (baseline 24)"]
    assert model.n_parameters() == GPT(GPTConfig(**size)).n_parameters()


@pytest.mark.parametrize("config, message", [
    (dict(n_layer=4, block_types=["tp"] * 3), "block_types has 3 entries"),
    (dict(n_layer=2, block_types=["tp", "sdp"]), "block_types[1]='sdp' is unknown"),
    (dict(tp_size=5, block_types=None), "tp_size=5 must divide n_head=12"),
    (dict(tp_size=0, block_types=None), "tp_size=0 must divide"),
    (dict(sync_strategy="sdp"), "sync_strategy='sdp' is unknown"),
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


# Generation: each rank's cache, step by step, against the model without one


def compare_decoder(model, decoder, prompt, n: int) -> float:
    """The largest difference of the decoder's logits from those of the model on all that came before."""
    worst, V = 0.0, model.config.used_vocab_size
    for all_tokens, at in decoder.run(prompt, n):
        window = all_tokens[:, :at][:, -model.config.block_size:]
        with torch.no_grad():
            expected = model(window)[0][:, 0]
        worst = max(worst, (decoder.logits[:, :V] - expected[:, :V]).abs().max().item())
    return worst


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_cache_of_each_rank(schedule, R):
    model = build(schedule, R).eval()
    assert compare_decoder(model, model.decoder(2), tokens(2, 5), 14) < EXACT  # past block_size, too


# Real processes


class CountAllReduces(TorchDispatchMode):
    """How many all-reduces, and how many other collectives, were issued."""

    def __init__(self):
        super().__init__()
        self.all_reduces, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if function.namespace in ("_c10d_functional", "c10d") and "wait" not in name:
            if name.startswith(("all_reduce", "allreduce")):
                self.all_reduces += 1
            else:
                self.others.append(name)
        return function(*args, **(kwargs or {}))


def check_real_ranks(rank: int, world: int) -> None:
    """Every schedule, `local` 1 and 2: logits, loss, every gradient, gradient norm, counts, generation."""
    group = torch.distributed.group.WORLD
    idx, targets = tokens(3, 16), tokens(3, 16, seed=1)
    targets[0, :5] = -1
    for local in (1, 2):
        R = world * local
        for number, schedule in enumerate(SCHEDULES):
            if 12 % R:
                continue
            case = f"local {local}, {schedule}"
            simulated = build(schedule, R)
            real = copy.deepcopy(simulated)
            real.place(Ranks(local, group))
            loss = simulated(idx, targets)[1]
            expected = gradients(simulated, loss)
            real_loss = real(idx, targets)[1]
            assert abs(real_loss - loss) < EXACT, case
            real_loss.backward()
            real.reduce_partial_gradients()
            found = real.whole({name: p.grad for name, p in real.named_parameters()})
            assert largest_difference(found, expected) < EXACT, case
            logits, real_logits = (m(idx, all_logits=True)[0] for m in (simulated, real))
            assert (real_logits - logits).abs().max() < EXACT, case
            with CountAllReduces() as forward:
                hidden = real.hidden(idx)
            with CountAllReduces() as backward:
                hidden.square().sum().backward()
            assert (forward.all_reduces, forward.others) == (SYNCS[number], []), case
            assert (backward.all_reduces, backward.others) == (SYNCS[number], []), case
            if number in (0, 3, 10):
                real.eval()
                assert compare_decoder(real, real.decoder(2), tokens(2, 5), 14) < EXACT, case
                greedy = real.decoder(2, temperature=1e-6, top_k=3).generate(tokens(2, 5), 14)
                assert torch.equal(greedy, real.decoder(2, temperature=0).generate(tokens(2, 5), 14)), case


def check_compiled(rank: int, world: int) -> None:
    """f, g and the divided loss in one compiled graph a process, in fp32 and under bf16 autocast."""
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):  # rounding of fp32, of bf16
        simulated = build(SCHEDULES[3], 2, torch.float32)
        real = copy.deepcopy(simulated)
        real.place(Ranks(1, torch.distributed.group.WORLD))
        # C++ is made, which takes long, for one of them; the graph of the other runs as it was traced
        real.compile(fullgraph=True, backend="inductor" if autocast else "aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, real_loss = simulated(idx, targets)[1], real(idx, targets)[1]
        assert abs(real_loss - loss) < tolerance
        real_loss.backward()
        real.reduce_partial_gradients()
        found = real.whole({name: p.grad for name, p in real.named_parameters()})
        for name, expected in gradients(simulated, loss).items():
            size = expected.abs().max().clamp(min=0.05)
            assert (found[name] - expected).abs().max() < 4 * tolerance * size, name


@pytest.mark.slow
def test_real_ranks_compile(tmp_path):
    run_processes(2, check_compiled, tmp_path)


def check_dropout(rank: int, world: int) -> None:
    """Real ranks drop the same entries and scale the others up; without a generator they refuse to guess."""
    model = build(SCHEDULES[3], 2, dropout=0.25)
    model.place(Ranks(1, torch.distributed.group.WORLD))
    with pytest.raises(AssertionError, match="share_dropout"):
        model(tokens(2, 16))
    torch.manual_seed(rank)
    model.share_dropout(1, 0, "cpu")
    state = torch.get_rng_state()
    ones = torch.ones(1, 3, 16, 48, dtype=torch.float64)
    out, bias = model._residual_dropout(ones, ones[0, 0, 0])
    assert torch.equal(out[0], bias) and set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert 0.7 < (out > 0).double().mean() < 0.8
    assert torch.equal(torch.get_rng_state(), state)  # a rank's own stream, of attention, is another
    others = [torch.empty_like(out) for _ in range(world)]
    torch.distributed.all_gather(others, out.contiguous())
    assert all(torch.equal(out, other) for other in others)
    with pytest.raises(UserError, match="divided over several processes"):
        model.save_pretrained("nowhere")


def test_dropout_of_real_ranks(tmp_path):
    run_processes(2, check_dropout, tmp_path)


def test_saving_a_variant_as_gpt2_warns(tmp_path):
    with pytest.warns(UserWarning, match="computes another function than these weights do here"):
        build(SCHEDULES[1], 2, torch.float32).save_pretrained(str(tmp_path))


def check_oneshot_fallback(rank: int, world: int) -> None:
    """Where symmetric memory cannot be had, the group's own all-reduce does it, and that is said once."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(3):
            total = GroupSum("oneshot", torch.zeros(2, 3), torch.distributed.group.WORLD)
    said = printed.getvalue()
    assert total.kind == "nccl" and said.count("\n") == (rank == 0)
    assert rank or "tp_allreduce='oneshot' does not work here (it needs CUDA)" in said
    for _ in range(2):
        total.buffer.fill_(rank + 1.0)
        gathered = torch.tensor([1.0, 2.0]).repeat_interleave(3).expand(2, 6)
        assert torch.equal(total.gather(), gathered)
        base = torch.ones(2, 3)
        total.add_to(base)
        assert torch.equal(base, torch.full((2, 3), 4.0))


def test_oneshot_falls_back(tmp_path):
    run_processes(2, check_oneshot_fallback, tmp_path)
    with pytest.raises(UserError, match="tp_allreduce='ring' is unknown"):
        GroupSum("ring", torch.zeros(1), None)


def test_top_k_from_each_process(tmp_path):
    run_processes(2, check_top_k, tmp_path)


def check_top_k(rank: int, world: int) -> None:
    """Draws follow the distribution over the most likely tokens of all processes, equally on all of them."""
    model = build(SCHEDULES[3], 2, torch.float32)
    prompt = tokens(1, 5).expand(4000, 5)
    logits = model(prompt[:1])[0][0, 0]
    values, ids = logits.topk(7)
    expected = torch.zeros(61).scatter(0, ids, (values / 1.5).softmax(0))
    model.place(Ranks(1, torch.distributed.group.WORLD))
    drawn = model.eval().decoder(4000, temperature=1.5, top_k=7).generate(prompt, 1)[:, 5]
    frequencies = drawn.bincount(minlength=61) / 4000
    # 4000 draws: a standard deviation of at most 0.008
    assert (frequencies - expected).abs().max() < 0.04
    others = [torch.empty_like(drawn) for _ in range(world)]
    torch.distributed.all_gather(others, drawn)
    assert all(torch.equal(drawn, other) for other in others)


@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks(world, tmp_path):
    run_processes(world, check_real_ranks, tmp_path)
