"""train_gpt_fast.py: the model in plain PyTorch, each technique on and off; initialisation, optimizer groups,
schedules, and settings that are refused. CPU; seconds.

    python -m pytest tests/unit/test_train_gpt_fast.py
"""

import copy
import functools
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import tokens

import train_gpt_fast
from configurator import configure, read_settings
from kernels.cross_entropy import cap_logits
from nanosync.errors import UserError
from nanosync.optimizer_state import load_state_by_name, state_by_name
from train_gpt_fast import GPT, GPTConfig, Stage, momentum_at, rate_at, stages_of, target_weights_at

EOT = 7
TECHNIQUES = ("bigram", "trigram", "suffix_match", "embedding_skip", "smear", "attention_gate",
              "late_attention", "backout", "half_rotary", "softcap")
SHAPE = dict(sequence_length=18, vocab_size=61, n_layer=3, n_head=2, n_embd=16, windows=[5, 9],
             long_layers=[1, 2], value_layers=[0, 2],
             offset_layers=[0, 2], exclusive_layers=[0, 2], end_of_text=EOT)
ON = SHAPE | dict.fromkeys(TECHNIQUES, True)
PLAIN = SHAPE | dict(long_layers=[], value_layers=[], offset_layers=[], exclusive_layers=[], end_of_text=None)


def random_model(**changes) -> GPT:
    """A model in fp64, tables of angles too, none of whose parameters is zero."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**(ON | changes)))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def documents(B: int = 2, T: int = 18) -> torch.Tensor:
    """Sequences that begin inside a document; with a document of one token, and one that begins at the end.
    Tokens repeat within documents and across their ends.
    """
    idx = tokens(B, T)
    idx[idx == EOT] += 1
    idx[0, 5:9], idx[0, 12:15], idx[1, 12:16] = idx[0, :4], idx[0, :3], idx[1, 7:11]
    idx[0, 10] = idx[0, 11] = idx[1, 0] = idx[1, 6] = idx[1, T - 1] = EOT
    return idx


def targets_of(idx: torch.Tensor) -> torch.Tensor:
    """The next tokens; the first rows are context only."""
    y = idx.roll(-1, 1)
    y[:, -1] = 3
    y[0, :5] = -1
    return y


# The model by its formulas, one sequence, one head and one token at a time


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x, half: bool):
    """x: (T, D) of one head. Channels i and i + D / 2 turn by t * 1024^-(share of the turning channels)."""
    T, D = x.shape
    turning = D // 4 if half else D // 2
    speeds = [1024 ** -(i / (turning - 1)) if i < turning else 0.0 for i in range(D // 2)]
    angles = torch.tensor([[t * speed for speed in speeds] for t in range(T)], dtype=x.dtype)
    a, b = norm(x).chunk(2, -1)
    return torch.cat((a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()), -1)


def attention(p, x, value, begins, window, config, offset, exclusive):
    """p: parameter of a name in attn; begins: first token of each token's document, or of the sequence;
    offset, exclusive: see offset_layers, exclusive_layers."""
    T, C = x.shape
    D = C // config.n_head
    q, k, v = (x @ p("c_attn.weight").T).chunk(3, -1)
    out = []
    for h in range(config.n_head):
        part = slice(h * D, (h + 1) * D)
        v_h = v[:, part]
        if value is not None:
            gate = torch.sigmoid(torch.cat((x[:, :6], value[:, :6]), -1) @ p("value_gate.weight")[h])
            v_h = v_h + 2 * gate[:, None] * value[:, part]
        q_h, k_h = (rotated(y[:, part], config.half_rotary) for y in (q, k))
        if offset:  # in the channels that do not turn, the key of the token before in the document
            before = [t if t == begins[t] else t - 1 for t in range(T)]
            still = [D // 4 <= channel % (D // 2) for channel in range(D)]
            k_h = torch.where(torch.tensor(still), k_h[before], k_h)
        rows = []
        for t in range(T):
            seen = slice(max(begins[t], t - window + 1, 0), t + 1)
            rows.append((0.1 * k_h[seen] @ q_h[t]).softmax(0) @ v_h[seen])
        head = torch.stack(rows)
        if exclusive:  # less of what lies along the token's own value
            own = (head * v_h).sum(1) / v_h.square().sum(1)
            head = head - torch.tanh(p("own_share")[h]) * own[:, None] * v_h
        if config.attention_gate:
            head = head * torch.sigmoid(x[:, :12] @ p("gate.weight")[h])[:, None]
        out.append(head)
    return torch.cat(out, -1) @ p("c_proj.weight").T


def longest_match(ids: list[int], t: int, begin: int) -> tuple[int, int]:
    """Return the length n of the longest match of position t, at most 32, and where the token after it is;
    (0, 0) without a match. begin: first token of t's document."""
    for n in (32, 16, 8, 4, 2, 1):
        for s in range(t - 1, begin + n - 2, -1):
            if t - n + 1 >= begin and ids[s - n + 1:s + 1] == ids[t - n + 1:t + 1]:
                return n, s + 1
    return 0, 0


def reference_logits(model: GPT, ids: list[int], windows: list[int]):
    """ids: one sequence."""
    config, T, p = model.config, len(ids), dict(model.named_parameters())
    L, V = config.n_layer, config.vocab_size
    begins = [max([s for s in range(t + 1) if ids[s] == config.end_of_text], default=0) for t in range(T)]
    wte = p["transformer.wte.weight"]
    x = wte[ids]
    if config.smear:
        rows = [x[0]]
        for t in range(1, T):
            share = p["smear_factor"][0] * torch.sigmoid(p["smear.weight"][0] @ x[t, :12])
            rows.append(x[t] if ids[t] == config.end_of_text else x[t] + share * x[t - 1])
        x = torch.stack(rows)
    if config.bigram:  # the first token of a document, or of the sequence, has no token before it
        pairs = [5 * V - 1 if t == 0 or ids[t] == config.end_of_text else
                 (36313 * ids[t] ^ 27191 * ids[t - 1]) % (5 * V - 1) for t in range(T)]
    if config.trigram:  # nor have the first two tokens two
        triples = [5 * V - 1 if t < 2 or config.end_of_text in ids[t - 1:t + 1] else
                   (36313 * ids[t] ^ 27191 * ids[t - 1] ^ 50591 * ids[t - 2]) % (5 * V - 1) for t in range(T)]
    if config.suffix_match:
        matches = [longest_match(ids, t, begins[t]) for t in range(T)]
        levels = [0 if n == 0 else 1 + int(math.log2(n)) for n, _ in matches]
        row = torch.stack([p["match.rows"][level - 1] + norm(wte[ids[at]]) if level else 0.0 * x[0]
                           for level, (_, at) in zip(levels, matches)])
    x = x0 = norm(x)
    middle, at = None, (2 * L - 1) // 3
    for i in range(L):
        def of(name, block=f"transformer.h.{i}."):
            return p[block + name]
        a, b, c, d = of("factors")
        source = middle if config.late_attention and middle is not None else x
        value = p[f"values.{config.value_table(i)}"][ids] if i in config.value_layers else None
        y = attention(lambda name: of("attn." + name), norm(source), value, begins,
                      windows[i in config.long_layers], config,
                      i in config.offset_layers and config.half_rotary, i in config.exclusive_layers)
        x = a * x + y
        if config.embedding_skip:
            x = x + b * x0
        if config.bigram:
            x = x + c * p["pairs"][pairs]
        if config.trigram:
            x = x + c * p["triples"][triples]
        if config.suffix_match:
            x = x + p["match.shares"][i][torch.tensor(levels) - 1][:, None] * row
        x = d * x + F.relu(norm(x) @ of("mlp.c_fc.weight").T)**2 @ of("mlp.c_proj.weight").T
        if i == at and i < L - 1:
            middle = x
    if config.backout and middle is not None:
        x = x - 0.5 * middle
    z = norm(x) @ (wte if model.tied else p["lm_head.weight"]).T
    return 23 * torch.sigmoid((z + 5) / 7.5) if config.softcap else z


def reference_loss(logits, y, weights):
    """Mean over positions with a target of the weighted cross-entropies of the next targets."""
    total, rows = 0.0, 0
    for b, sequence in enumerate(y.tolist()):
        for t, target in enumerate(sequence):
            if target == -1:
                continue
            rows += 1
            for weight, further in zip(weights, sequence[t:]):
                if further != -1:
                    total = total - weight * logits[b, t].log_softmax(-1)[further]
    return total / rows


def check_against_formulas(model: GPT, windows=None, weights=(1.0,)) -> None:
    """Logits, loss, and every gradient."""
    idx = documents()
    y = targets_of(idx)
    used = [5, 9] if windows is None else windows
    logits = torch.stack([reference_logits(model, ids, used) for ids in idx.tolist()])
    given = None if windows is None else torch.tensor(windows, dtype=torch.int32)
    assert torch.allclose(model(idx, windows=given)[0].double(), logits, atol=2e-5)  # capped in fp32
    expected = reference_loss(logits, y, weights)
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss = model(idx, y, given, None if weights == (1.0,) else torch.tensor(weights, dtype=torch.float64))[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    for name, p, gradient in zip(names, parameters, gradients):
        if gradient is None:
            assert p.grad is None and name == "lm_head.weight" and model.tied, name
        else:
            assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-11), name
            assert gradient.abs().max() > 0 or name.endswith("factors"), name
    model.zero_grad(set_to_none=True)


CHANGES = {"all on": {}, **{f"no {name}": {name: False} for name in TECHNIQUES},
           "no values": dict(value_layers=[]), "no long layers": dict(long_layers=[]),
           "no offset keys": dict(offset_layers=[]), "own values": dict(exclusive_layers=[]),
           "one document": dict(end_of_text=None), "plain": PLAIN | dict.fromkeys(TECHNIQUES, False),
           "one layer": dict(n_layer=1, long_layers=[0], value_layers=[0], offset_layers=[0],
                             exclusive_layers=[0]),
           "two layers": dict(n_layer=2, long_layers=[1], value_layers=[0, 1], offset_layers=[1],
                              exclusive_layers=[1]),
           "five layers": dict(n_layer=5, long_layers=[4], value_layers=[1, 4]),
           "shared value tables": dict(n_layer=5, value_layers=[0, 1, 3, 4], value_tables=3)}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_model_by_the_formulas(changes):
    check_against_formulas(random_model(**changes))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5, 0.125)])
def test_untied_model_by_the_formulas(weights):
    model = random_model()
    model.untie()
    check_against_formulas(model, weights=weights)


@pytest.mark.parametrize("windows, weights", [([2, 18], (1.0, 0.5, 0.25)), ([1, 1], (1.0, 0.0, 0.0)),
                                              ([100, 2**31 - 1], (1.0, 0.3, 0.0))])
def test_windows_and_further_targets_by_the_formulas(windows, weights):
    """Also windows of one token, and windows longer than the sequence."""
    check_against_formulas(random_model(softcap=weights[1] == 0.5), windows, weights)


def test_a_model_without_techniques_has_the_parameters_of_a_plain_model():
    model = random_model(**PLAIN | dict.fromkeys(TECHNIQUES, False))
    names = {name for name, _ in model.named_parameters()}
    layers = {f"transformer.h.{i}.{name}" for i in range(3) for name in (
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "factors")}
    assert names == layers | {"transformer.wte.weight", "lm_head.weight"}


def changed_logits(model: GPT, idx, b: int, t: int) -> list[tuple[int, int]]:
    """Return (sequence, position) of the logits that change with token t of sequence b."""
    other = idx.clone()
    other[b, t] = (idx[b, t] + 1) % 61 if (idx[b, t] + 1) % 61 != EOT else EOT + 1
    with torch.no_grad():
        changed = (model(idx)[0] != model(other)[0]).any(-1)
    return [tuple(place) for place in changed.nonzero().tolist()]


def test_documents_do_not_influence_each_other():
    """With the last token of a document, too, which is next to the first token of the next."""
    model, idx = random_model(windows=[18, 18]), documents()
    for b, t, end in ((0, 3, 10), (0, 9, 10), (1, 2, 6), (1, 5, 6), (1, 16, 17), (0, 14, 18)):
        assert changed_logits(model, idx, b, t) == [(b, s) for s in range(t, end)], (b, t)


@pytest.mark.parametrize("long_layers, window", [([], 5), ([0], 9)])
def test_a_token_reaches_as_far_as_the_window(long_layers, window):
    """In one layer; smeared it is in the next token, too, as with an offset in its key."""
    model = random_model(n_layer=1, long_layers=long_layers, value_layers=[0], offset_layers=[],
                         exclusive_layers=[0], end_of_text=None, suffix_match=False)
    assert changed_logits(model, tokens(2, 18), 1, 3) == [(1, t) for t in range(3, 3 + window + 1)]
    plain = dict(n_layer=1, long_layers=long_layers, exclusive_layers=[], end_of_text=None, bigram=False,
                 trigram=False, smear=False, suffix_match=False)
    for layers, reach in (([], window), ([0], window + 1)):
        model = random_model(**plain, value_layers=[], offset_layers=layers)
        assert changed_logits(model, tokens(2, 18), 1, 3) == [(1, t) for t in range(3, 3 + reach)]


def test_shorter_sequences_are_the_beginning_of_longer_ones():
    model, idx = random_model(), documents()
    for T in (1, 2, 13):
        assert torch.allclose(model(idx[:, :T])[0], model(idx)[0][:, :T], atol=1e-5), T


def test_logits_are_capped_as_in_the_loss():
    model, idx = random_model(), documents()
    z = model.hidden(idx) @ model.transformer.wte.weight.T
    assert torch.allclose(model(idx)[0], cap_logits(z, train_gpt_fast.CAP))
    assert model(idx)[0].min() > 0 and model(idx)[0].max() < 23


def test_the_residual_stream_is_in_the_compute_dtype(monkeypatch):
    model, seen = random_model().float(), []
    rms_norm = train_gpt_fast.rms_norm
    monkeypatch.setattr(train_gpt_fast, "rms_norm", lambda x: seen.append(x.dtype) or rms_norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(documents()).dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16} and len(seen) == 2 + 2 * 3


# Initialisation and optimizer


@functools.cache
def defaults() -> dict:
    values = vars(train_gpt_fast)
    return {setting.name: values[setting.name] for setting in read_settings(values)}


def config(**changes) -> dict:
    """The script's settings, smaller."""
    smaller = dict(num_iterations=100, stage_shares=[0.25, 0.25, 0.25, 0.25], batch_sizes=[1, 2, 3, 3],
                   short_windows=[2, 4, 6, 8], long_windows=[4, 8, 12, 16], stage_rates=[1.0, 1.5, 2.0, 2.0])
    return defaults() | smaller | changes


def test_heads_of_a_matrix_are_those_of_the_model():
    """A checkpoint decides both settings, so they are compared when the checkpoint is read."""
    train_gpt_fast.check_settings(config(muon_heads=4))  # the default of n_head is 6
    with pytest.raises(UserError, match="muon_heads=4 must divide n_head=6"):
        train_gpt_fast.model_config(config(muon_heads=4), 61, 61, None)
    train_gpt_fast.model_config(config(muon_heads=4, n_head=8), 61, 61, None)


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ON | dict(vocab_size=500, n_embd=384, n_head=6)))
    for name, p in model.named_parameters():
        if name.endswith("factors"):
            assert torch.equal(p, torch.tensor([1.1**0.5, 0.0, 0.05, 1.1**0.5])), name
            continue
        std = 0.005 if "wte" in name or "lm_head" in name else \
            0.5 * 384**-0.5 if "c_attn" in name or "c_fc" in name else 0.0
        assert p.std().item() == pytest.approx(std, rel=0.01) if p.numel() > 1 else p.item() == 0, name
        assert abs(p.mean().item()) < 0.02 * max(std, 1e-9), name
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_a_new_model_predicts_every_token_alike():
    """Projections are zero, so the loss is about ln V, with the cap's slope on small logits."""
    model = GPT(GPTConfig(**ON))
    loss = model(documents(), targets_of(documents()))[1]
    assert loss.item() == pytest.approx(math.log(61), abs=0.02)


@pytest.mark.parametrize("muon_heads, matrices", [(None, 3), (2, 3), (1, 6)])
def test_optimizer_has_each_parameter_once(muon_heads, matrices):
    model = random_model().float()
    optimizer = train_gpt_fast.build_optimizer(model, config(muon_heads=muon_heads), None)
    found, names = {}, {p: name for name, p in model.named_parameters()}
    for g in optimizer.param_groups:
        kind = g.get("stacked") or (*g["betas"], round(g["lr"], 6))
        for p in g["params"]:
            assert names[p] not in found
            found[names[p]] = kind
    for name in names.values():
        expected = matrices if "c_attn" in name else 1 if "c_fc" in name or "c_proj" in name else \
            (0.5, 0.95, 0.008) if "wte" in name or "lm_head" in name else \
            (0.75, 0.95, 0.6) if name.startswith(("values.", "pairs", "triples")) else \
            (0.9, 0.99, 0.008 if name.endswith(("gate.weight", "smear.weight", "match.rows")) else 0.04)
        assert found[name] == expected, name
    assert all(g["eps"] == 1e-10 and g["weight_decay"] == 0 for g in optimizer.param_groups)


@pytest.mark.parametrize("rates", [(1e-9, 1e6), (1e6, 1e-320), (1e-9, 0.0), (1e6, 1e6)])
def test_extreme_rates_reach_the_optimizer(rates):
    """The rates that settings may have: their ratios are finite, and groups get their own rate."""
    muon, rest = rates
    c = config(muon_learning_rate=muon, adam_learning_rate=rest, table_learning_rate=rest,
               scalar_learning_rate=rest, gate_learning_rate=rest)
    optimizer = train_gpt_fast.build_optimizer(random_model().float(), c, None)
    assert {g["lr"] for g in optimizer.param_groups if "stacked" in g} == {muon}
    for g in optimizer.param_groups:
        if "stacked" not in g:
            assert g["lr"] == pytest.approx(rest, rel=1e-12, abs=1e-319) and math.isfinite(g["lr_ratio"])


def test_shares_and_rows_of_matches_learn_from_their_initialisation():
    """Both are 0 at first, and their product is what the layers get."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**ON))
    optimizer = train_gpt_fast.build_optimizer(model, config(), None)
    for _ in range(4):
        model(documents(), targets_of(documents()))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for level in range(3):  # matches of one, two and four tokens occur
        assert model.match.shares[:, level].all() and model.match.rows[level].all(), level
    assert not model.match.shares[:, 3:].any() and not model.match.rows[3:].any()


def test_lazy_tables_are_the_tables_and_leave_rows_without_a_gradient():
    model = random_model().float()  # a new one's projections are zero, and so are gradients of values
    optimizer = train_gpt_fast.build_optimizer(model, config(lazy_tables=True), None)
    tables = {f"values.{name}": p for name, p in model.values.items()} | \
        {"pairs": model.pairs, "triples": model.triples}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(documents(), targets_of(documents()))[1].backward()
    touched = {name: (p.grad != 0).any(dim=1) for name, p in tables.items()}
    optimizer.step()
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if name in tables:
            assert set(state) == {"exp_avg_sq", "last_step", "step"} and 0 < touched[name].sum() < len(p)
            assert torch.equal((p != before[name]).any(dim=1), touched[name])
            assert torch.equal(state["last_step"], touched[name].float())
        else:
            assert "last_step" not in state
    saved = state_by_name(optimizer, model)
    load_state_by_name(optimizer, model, saved)
    late = saved | {"pairs.last_step": torch.full_like(saved["pairs.last_step"], 2.0)}
    two = saved | {"pairs.step": torch.ones(2)}
    dense = train_gpt_fast.build_optimizer(model, config(), None)
    for other, state, message in ((optimizer, late, "pairs.last_step is after pairs.step"),
                                  (optimizer, two, r"pairs.step is \(2,\) and it must be a scalar"),
                                  (dense, saved, "resume with --lazy_tables as the run had it")):
        with pytest.raises(UserError, match=message):
            load_state_by_name(other, model, state)


def test_parameters_without_a_rule_are_refused():
    """By initialisation and by the optimizer: neither has a rule for all else."""
    model = random_model()
    model.transformer.h[1].attn.bias = torch.nn.Parameter(torch.zeros(3))
    for build in (model.init_weights, lambda: train_gpt_fast.build_optimizer(model, config(), None)):
        with pytest.raises(AssertionError, match=r"parameter transformer\.h\.1\.attn\.bias"):
            build()


class AdamW:
    """The formulas of arXiv 1412.6980 for one parameter, without weight decay."""

    def __init__(self, lr, betas, eps):
        self.lr, self.betas, self.eps, self.m, self.v, self.t = lr, betas, eps, 0.0, 0.0, 0

    def step(self, p, gradient):
        (b1, b2), self.t = self.betas, self.t + 1
        self.m, self.v = b1 * self.m + (1 - b1) * gradient, b2 * self.v + (1 - b2) * gradient**2
        return p - self.lr * (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)


@pytest.mark.parametrize("at", [0, 3])
def test_untied_head_continues_as_a_copy_of_the_embedding(at):
    """Weights, moments and count of steps are copied; from then on both have their own gradients."""
    model = random_model()
    optimizer = train_gpt_fast.build_optimizer(model, config(), None)
    head, wte = model.lm_head.weight, model.transformer.wte.weight
    before, rules = head.detach().clone(), [AdamW(0.008, (0.5, 0.95), 1e-10)]
    expected = [wte.detach().clone()]
    for step in range(6):
        if step == at:
            model.untie(optimizer)
            assert torch.equal(head, wte) and head is not wte
            for name, value in optimizer.state[wte].items():
                assert torch.equal(value, optimizer.state[head][name]), name
                assert value.data_ptr() != optimizer.state[head][name].data_ptr()
            rules, expected = rules + copy.deepcopy(rules), [*expected, expected[0].clone()]
        idx = documents()
        model(idx, targets_of(idx.roll(step, 0)))[1].backward()
        assert step >= at or (head.grad is None and torch.equal(head, before))
        trained = (wte, head)[:len(rules)]
        expected = [rule.step(value, p.grad) for rule, value, p in zip(rules, expected, trained)]
        optimizer.step()
        optimizer.zero_grad()
        for value, p in zip(expected, trained):
            assert torch.allclose(p, value, rtol=1e-9, atol=1e-9)
    assert not torch.equal(head, wte)


# Schedules


def test_stages():
    stages = stages_of(config())
    assert [(s.begin, s.end, s.batch_size, s.windows, s.rate) for s in stages] == [
        (0, 25, 1, (2, 4), 1.0), (25, 50, 2, (4, 8), 1.5), (50, 75, 3, (6, 12), 2.0),
        (75, 100, 3, (8, 16), 2.0)]

    def steps(*shares, n):
        lists = ("batch_sizes", "short_windows", "long_windows", "stage_rates")
        made = stages_of(config(stage_shares=list(shares), num_iterations=n,
                                **dict.fromkeys(lists, [1] * len(shares))))
        return [(s.begin, s.end) for s in made]

    assert steps(0.5, 0.5, n=0) == []
    assert steps(0.5, 0.5, n=1) == [(0, 1)]
    assert steps(0.5, 0.5, n=2) == [(0, 1), (1, 2)]
    assert steps(0.325, 0.325, 0.325, 0.025, n=20) == [(0, 6), (6, 13), (13, 20)]  # the last has no step
    assert steps(0.325, 0.325, 0.325, 0.025, n=1490) == [(0, 484), (484, 968), (968, 1453), (1453, 1490)]
    assert steps(1, n=3) == [(0, 3)]
    # sums that rounding of the user's or of fp64 leaves beside 1: every step is in a stage, no further step
    for shares in ([0.333333, 0.333333, 0.3333335], [0.333333, 0.333333, 0.333335], [0.1] * 10):
        for n in (1, 7, 10**6, 10**7 + 1):
            found = steps(*shares, n=n)
            assert found[0][0] == 0 and found[-1][1] == n
            assert all(a[1] == b[0] for a, b in itertools.pairwise(found))


def test_target_weights():
    c, stages = config(), stages_of(config())
    table = {0: [1, 0.5, 0.25], 5: [1, 0.5, 0.2], 24: [1, 0.5, 0.01], 25: [1, 0.5, 0], 30: [1, 0.4, 0],
             49: [1, 0.02, 0], 50: [1, 0, 0], 75: [1, 0, 0], 99: [1, 0, 0]}
    for step, weights in table.items():
        assert target_weights_at(c, stages, step) == pytest.approx(weights), step
        assert target_weights_at(c | dict(further_targets=False), stages, step) == [1, 0, 0]
    # the last stage trains what evaluations measure
    one, two = ([Stage(10 * i, 10 * i + 10, 1, (1, 1), 1.0, i) for i in range(n)] for n in (1, 2))
    assert target_weights_at(c | dict(stage_shares=[1]), one, 9) == [1, 0, 0]
    half = c | dict(stage_shares=[0.5, 0.5])
    assert [target_weights_at(half, two, step) for step in (0, 19)] == [[1, 0.5, 0.25], [1, 0, 0]]


@pytest.mark.parametrize("shares, n, weights", [
    ([0.1, 0.3, 0.3, 0.3], 3, [[1, 0.5, 0], [1, 0, 0], [1, 0, 0]]),  # the first stage has no step
    ([0.9, 0.1], 2, [[1, 0.5, 0.25], [1, 0.5, 0.125]]),  # the last one
    ([0.4, 0.1, 0.5], 2, [[1, 0.5, 0.25], [1, 0, 0]]),  # the second one
    ([0.01, 0.01, 0.98], 1, [[1, 0, 0]]),  # the first two
])
def test_target_weights_belong_to_the_stage_of_the_settings(shares, n, weights):
    """Not to its place among the stages that have steps."""
    c = config(stage_shares=shares, num_iterations=n, **dict.fromkeys(
        ("batch_sizes", "short_windows", "long_windows", "stage_rates"), [1] * len(shares)))
    assert [target_weights_at(c, stages_of(c), step) for step in range(n)] == weights


def test_rates():
    c, stage = config(cooldown_share=0.5, final_rate=0.2), Stage(0, 100, 1, (1, 1), 1.5, 0)
    table = {0: 1.5, 49: 1.5, 50: 1.5, 51: 1.5 * (0.2 + 0.8 * 0.98), 75: 1.5 * 0.6, 99: 1.5 * 0.216}
    assert {step: rate_at(c, stage, step) for step in table} == pytest.approx(table)
    assert rate_at(c | dict(cooldown_share=1.0), stage, 50) == pytest.approx(1.5 * 0.6)
    for n in (1, 2):
        flat = c | dict(cooldown_share=0.0, num_iterations=n)
        assert [rate_at(flat, stage, step) for step in range(n)] == [1.5] * n
        assert all(0.2 <= rate_at(c | dict(num_iterations=n), stage, step) / 1.5 <= 1 for step in range(n))


def test_momenta():
    c = config(muon_momentum=0.95, muon_momentum_warmup=30)
    table = {0: 0.85, 15: 0.9, 30: 0.95, 60: 0.95, 95: 0.95, 96: 0.93, 98: 0.89, 99: 0.87}
    assert {step: momentum_at(c, step) for step in table} == pytest.approx(table)
    assert [momentum_at(c | dict(muon_momentum=0.5), step) for step in (0, 30, 99)] == [0.5] * 3
    assert [momentum_at(c | dict(muon_momentum_warmup=0), step) for step in (0, 1, 99)] == [0.95] * 3
    short = c | dict(num_iterations=2)
    assert [momentum_at(short, step) for step in (0, 1)] == pytest.approx([0.85, 0.85 + 0.1 / 30])


# Architecture and settings


def architecture(**changes) -> GPTConfig:
    return train_gpt_fast.model_config(config(**changes), 61, 61, EOT)


def test_default_layers():
    """The fourth and the last layer have long windows, the first and last three values, of any depth."""
    found = {n: (architecture(n_layer=n).long_layers, architecture(n_layer=n).value_layers)
             for n in (1, 2, 3, 4, 11)}
    assert found == {1: ([0], [0]), 2: ([1], [0, 1]), 3: ([2], [0, 1, 2]), 4: ([3], [0, 1, 2, 3]),
                     11: ([3, 10], [0, 1, 2, 8, 9, 10])}
    given = architecture(n_layer=4, long_layers=[], value_layers=[2])
    assert (given.long_layers, given.value_layers) == ([], [2])
    assert architecture(document_mask=False).end_of_text is None and architecture().end_of_text == EOT


@pytest.mark.parametrize("number, tables", [(None, "0 1 3 4"), (1, "0 0 0 0"), (2, "0 1 0 1"),
                                            (3, "0 1 3 0"), (9, "0 1 3 4")])
def test_layers_take_the_value_tables_in_turn(number, tables):
    model = random_model(n_layer=5, value_layers=[4, 0, 1, 3], value_tables=number)
    assert [model.config.value_table(i) for i in (0, 1, 3, 4)] == tables.split()
    assert model.config.value_table(2) is None and set(model.values) == set(tables.split())
    tables = model.transformer.wte.weight, *model.values.parameters(), model.pairs, model.triples
    assert model.config.other_values == sum(p.numel() for p in tables) + model.cos.numel() * 2


@pytest.fixture
def refusal(monkeypatch):
    """refusal(*args): the line with which settings are refused before a process starts; None if they are not.
    """
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which `configure` replaces

    def refused(*args) -> str | None:
        try:
            values = configure(dict(vars(train_gpt_fast)),
                               ["--n_layer=4", "--n_head=2", "--n_embd=32", *args])
            train_gpt_fast.check_settings(values)
            stages_of(values)
            train_gpt_fast.model_config(values, 61, 61, None)
        except UserError as error:
            return str(error)
        return None

    return refused


@pytest.mark.parametrize("args, message", [
    (["--stage_shares=[0.5,0.5]"], "stage_shares has 2, batch_sizes has 4"),
    (["--stage_shares=[]", "--batch_sizes=[]", "--short_windows=[]", "--long_windows=[]", "--stage_rates=[]"],
     "give each as many entries as there are stages"),
    (["--stage_shares=[0.5,0.5,0.5,0.5]"], "must add up to 1"),
    (["--stage_shares=[0.5,0.5,-0.5,0.5]"], "must be positive numbers"),
    (["--stage_shares=['a',0.5,0.2,0.3]"], "must be positive numbers"),
    (["--stage_shares=0.5"], "it must be list"),
    (["--batch_sizes=[8,16,24,2.5]"], "batch_sizes=[8, 16, 24, 2.5] must be positive whole numbers"),
    (["--batch_sizes=[8,16,24,0]"], "must be positive whole numbers"),
    (["--batch_sizes=[8,16,24,True]"], "must be positive whole numbers"),
    (["--short_windows=[0,1,1,1]"], "short_windows=[0, 1, 1, 1] must be positive whole numbers"),
    (["--long_windows=[1,1,1,2147483648]"], "long_windows=[1, 1, 1, 2147483648] must be at most 2147483647"),
    (["--stage_rates=[1,1,1,None]"], "stage_rates=[1, 1, 1, None] must be positive numbers"),
    (["--stage_rates=[1,1,1,1e999]"], "not a finite number"),
    (["--stage_rates=[1,1,1,1e7]"], "stage_rates=[1, 1, 1, 10000000.0] must be at most 1000000"),
    (["--eval_windows=[0,1]"], "eval_windows=[0, 1] must be two positive"),
    (["--eval_windows=[768]"], "eval_windows=[768] must be two positive"),
    (["--eval_windows=[768,2560.5]"], "eval_windows=[768, 2560.5] must be two positive"),
    (["--eval_windows=[768,3000000000]"], "eval_windows=[768, 3000000000] must be two positive"),
    (["--value_layers=[99]"], "value_layers=[99] must be numbers of layers, 0 to 3"),
    (["--value_tables=0"], "value_tables=0 must be at least 1"),
    (["--value_layers=[-1]"], "value_layers=[-1] must be numbers of layers"),
    (["--long_layers=[1.5]"], "long_layers=[1.5] must be numbers of layers"),
    (["--long_layers=[[1]]"], "long_layers=[[1]] must be numbers of layers"),
    (["--n_head=5"], "n_embd=32 and n_head=5 do not give heads whose width is a multiple of 4"),
    (["--n_embd=8"], "n_embd=8 must be at least 12"),
    (["--n_layer=0"], "n_layer=0 must be at least 1"),
    (["--n_layer=10001"], "n_layer=10001 must be at most 10000"),
    (["--n_layer=9000", "--n_head=1", "--n_embd=20000"], "choose a smaller model"),
    (["--n_embd=1000000000"], "choose a smaller model"),
    (["--sequence_length=0"], "sequence_length=0 must be at least 1"),
    (["--device_batch_size=0"], "device_batch_size=0 must be at least 1"),
    (["--num_iterations=-1"], "num_iterations=-1 must be at least 0"),
    (["--untie_at=-1"], "untie_at=-1.0 must be at least 0"),
    (["--untie_at=1.5"], "untie_at=1.5 must be at most 1"),
    (["--cooldown_share=2"], "cooldown_share=2.0 must be at most 1"),
    (["--final_rate=-0.1"], "final_rate=-0.1 must be at least 0"),
    (["--muon_momentum=1"], "muon_momentum=1.0 must be below 1"),
    (["--muon_momentum=-0.5"], "muon_momentum=-0.5 must be at least 0"),
    (["--muon_beta2=1"], "muon_beta2=1.0 must be below 1"),
    (["--muon_momentum_warmup=-1"], "muon_momentum_warmup=-1 must be at least 0"),
    (["--muon_learning_rate=0"], "muon_learning_rate=0.0 must be at least 1e-09"),
    (["--muon_learning_rate=-1"], "muon_learning_rate=-1.0 must be at least 1e-09"),
    (["--muon_learning_rate=1e-30"], "muon_learning_rate=1e-30 must be at least 1e-09"),
    (["--muon_learning_rate=1e-320"], "muon_learning_rate=1e-320 must be at least 1e-09"),
    (["--muon_learning_rate=1e30"], "muon_learning_rate=1e+30 must be at most 1e+06"),
    (["--table_learning_rate=1e39"], "table_learning_rate=1e+39 must be at most 1e+06"),
    (["--muon_weight_decay=1e39"], "muon_weight_decay=1e+39 must be at most 1e+06"),
    (["--muon_learning_rate=nan"], "muon_learning_rate"),
    (["--muon_learning_rate=1e999"], "must be a finite number"),
    (["--table_learning_rate=-1"], "table_learning_rate=-1.0 must be at least 0"),
    (["--exclusive_layers=[4]"], "exclusive_layers=[4] must be numbers of layers"),
    (["--muon_heads=0"], "muon_heads=0 must divide n_head="),
    (["--muon_heads=-2"], "muon_heads=-2 must divide n_head="),
    (["--muon_heads=3"], "muon_heads=3 must divide n_head="),
    (["--gate_learning_rate=-1"], "gate_learning_rate=-1.0 must be at least 0"),
    (["--scalar_learning_rate=-1"], "scalar_learning_rate=-1.0 must be at least 0"),
    (["--adam_learning_rate=-1"], "adam_learning_rate=-1.0 must be at least 0"),
    (["--muon_weight_decay=-1"], "muon_weight_decay=-1.0 must be at least 0"),
    (["--val_tokens=0"], "val_tokens=0 must be at least 1"),
    (["--seed=9223372036854775808"], "does not fit into 64 bits"),
    (["--timeout=1e9"], "timeout=1000000000.0 must be at most 1e+06"),
    (["--bigramm=False"], "did you mean 'bigram'"),
])
def test_settings_that_are_refused(refusal, args, message):
    """Each is one line that names the setting and its value."""
    line = refusal(*args)
    assert line is not None and message in line and "\n" not in line, line


@pytest.mark.parametrize("args", [
    [], ["--num_iterations=0"], ["--long_layers=[]"], ["--value_layers=[]"], ["--value_layers=[1,1]"],
    ["--eval_windows=[1,2147483647]"], ["--untie_at=0"], ["--untie_at=1"], ["--cooldown_share=0"],
    ["--muon_beta2=0"], ["--muon_momentum=0"], ["--muon_momentum_warmup=0"], ["--n_embd=12", "--n_head=3"],
    ["--stage_shares=[1]", "--batch_sizes=[1]", "--short_windows=[9]", "--long_windows=[3]",
     "--stage_rates=[1]"]])
def test_settings_at_the_ends_of_their_ranges(refusal, args):
    assert refusal(*args) is None
