"""Models under torch.compile: one graph each, and the gradients of the eager model. CPU; a C++ compiler.

    python -m pytest tests/compile/test_compiled_models.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SMALL,
    TINY,
    build,
    gradients,
    largest_difference,
    losses_and_norms,
    random_model,
    random_speedrun_model,
    run_processes,
    tokens,
    torchrun,
)
from helpers import random_hellaswag as random_examples
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt_fast
from model import GPT, MLP, GPTConfig, use_fused_gelu, use_qkv_linear
from nanosync.fp8 import follow_weights, use_fp8
from nanosync.hellaswag_eval import accuracy
from nanosync.ranks import Ranks
from nanosync.recompute import use_activation_checkpointing

CPU = torch.device("cpu")
TWO_LAYERS = dict(block_types=["spd", "parallel"])  # tracing takes a second a layer
ONE_LAYER = dict(block_types=["spd"])


def test_compiled_modules_are_not_compiled_again():
    """Whichever way they were compiled, and the shapes of training stay what they are."""
    model, examples, shapes = random_model(torch.float32), random_examples(9), []
    expected = accuracy(model, examples, 2, CPU)

    def backend(graph, inputs):
        shapes.append([tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 2])
        return graph.forward

    model.compile(backend=backend)
    assert accuracy(model, examples, 2, CPU) == expected
    assert accuracy(torch.compile(model, backend=backend), examples, 2, CPU) == expected
    assert shapes == []
    model(torch.zeros(3, 9, dtype=torch.int64))
    assert len(shapes) == 1 and (3, 9) in shapes[0]
    torch._dynamo.reset()


def test_compiles_as_one_graph():
    model = random_model(torch.float32, n_layer=1)
    idx, y = tokens(4, 16), tokens(4, 16, seed=3)
    _, eager = model(idx, y)
    eager.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    names = list(model.state_dict())
    model.zero_grad(set_to_none=True)
    model.compile(fullgraph=True, backend="aot_eager")  # traces as the default does, without a C++ compiler
    _, compiled = model(idx, y)
    compiled.backward()
    assert list(model.state_dict()) == names
    assert torch.allclose(eager, compiled, rtol=1e-6)
    for name, p in model.named_parameters():
        # fp32; the compiled GELU is the sigmoid form of the same function
        assert torch.allclose(gradients[name], p.grad, rtol=1e-4, atol=1e-6), name


def test_compiled_gelu_is_the_same_function():
    x = torch.linspace(-8, 8, 10001, dtype=torch.float64)
    mlp = MLP(GPTConfig(**SMALL))
    mlp.c_fc = mlp.c_proj = mlp.dropout = torch.nn.Identity()
    compiled = torch.compile(mlp, backend="aot_eager")(x)
    assert (compiled - F.gelu(x, approximate="tanh")).abs().max() < 1e-14


def test_schedules_compile_as_one_graph():
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    model = build(TWO_LAYERS, 4, torch.float32, n_layer=2)
    expected = gradients(model, model(idx, targets)[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # fp32: gradients of size 1 through two layers
    assert largest_difference(gradients(model, compiled(idx, targets)[1]), expected) < 1e-4


@pytest.mark.parametrize("schedule, R, recompute", [(None, 1, "selective"),
                                                    (dict(sync_strategy="dtp:2"), 2, "block"),
                                                    (dict(sync_strategy="caat:0.5"), 2, "none")])
def test_document_mask_compiles_as_one_graph(schedule, R, recompute):
    """With the gradients of the eager model, which keeps everything for the backward pass."""
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    model = build(schedule, R, torch.float32, n_layer=1 if schedule is None else 2)
    model.end_of_text = int(idx[0, 5])
    expected = gradients(model, model(idx, targets)[1])
    use_activation_checkpointing(model, recompute)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # fp32: gradients of size 1 through two layers
    assert largest_difference(gradients(model, compiled(idx, targets)[1]), expected) < 1e-4


def check_compiled(rank: int, world: int) -> None:
    """f, g and the divided loss in one compiled graph a process, in fp32 and under bf16 autocast."""
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    for autocast, tolerance in ((False, 1e-5), (True, 3e-2)):  # rounding of fp32, of bf16
        blocks = ["parallel"] if autocast else ["spd", "parallel"]
        simulated = build(dict(block_types=blocks), 2, torch.float32, n_layer=len(blocks))
        real = copy.deepcopy(simulated)
        real.place(Ranks(1, torch.distributed.group.WORLD))
        real.compile(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, real_loss = simulated(idx, targets)[1], real(idx, targets)[1]
        assert abs(real_loss - loss) < tolerance
        real_loss.backward()
        real.reduce_partial_gradients()
        found = real.whole({name: p.grad for name, p in real.named_parameters()})
        for name, expected in gradients(simulated, loss).items():
            size = expected.abs().max().clamp(min=0.05)
            assert (found[name] - expected).abs().max() < 4 * tolerance * size, name


def test_real_ranks_compile(tmp_path):
    """As traced; test_training_compiled has what Inductor makes of it."""
    run_processes(2, check_compiled, tmp_path)


@pytest.mark.parametrize("variant, crop", [("baseline", 32), ("baseline", 12), ("palm", 32), ("sync", 32)])
def test_speedrun_variants_compile_without_breaks(variant, crop):
    """One graph, of which every gradient is eager's; what Inductor makes of it is its own affair."""
    changes = dict(tp_size=2, sync_points=[3]) if variant == "sync" else {}
    eager, compiled = random_speedrun_model(variant, **changes), random_speedrun_model(variant, **changes)
    compiled.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    x, y = tokens(2, 32), tokens(2, 32, seed=2)
    for model in (eager, compiled):
        model(x, y, crop, (0, 2))[1].backward()
    for p, q in zip(eager.parameters(), compiled.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad))


def test_fast_speedrun_compiles_once():
    """One graph for all windows, targets' weights and both states of the head; gradients are eager's."""
    techniques = ("bigram", "trigram", "suffix_match", "embedding_skip", "smear", "attention_gate",
                  "late_attention", "backout", "half_rotary", "softcap")
    torch.manual_seed(0)
    eager = train_gpt_fast.GPT(train_gpt_fast.GPTConfig(
        sequence_length=32, vocab_size=61, n_layer=3, n_head=2, n_embd=16, windows=[4, 8], long_layers=[1],
        value_layers=[0, 2], exclusive_layers=[1], end_of_text=7, **dict.fromkeys(techniques, True)))
    with torch.no_grad():
        for p in eager.parameters():
            p.add_(0.3 * torch.randn_like(p))
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("aot_eager")
    compiled.hidden = torch.compile(compiled.hidden, dynamic=False, fullgraph=True, backend=counter)
    for seed, (windows, weights) in enumerate([((4, 8), (1, 0.5, 0.25)), ((1, 32), (1, 0, 0)),
                                               ((9, 100), (1, 0.2, 0))]):
        x, y = tokens(2, 32, seed=seed), tokens(2, 32, seed=seed + 10)
        for model in (eager, compiled):
            if seed == 2:
                model.untie()
            model.zero_grad()
            model(x, y, torch.tensor(windows, dtype=torch.int32), torch.tensor(weights))[1].backward()
        for (name, p), q in zip(eager.named_parameters(), compiled.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            # fp32; gradients are of size 1
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name
    assert counter.frame_count == 1


def test_training_compiled(tiny_data, tmp_path):
    """train.py under Inductor has the losses and norms that it has without. Two processes of two simulated
    ranks each: batched products and all-reduces."""
    found = []
    for compiled in (True, False):
        out_dir = tmp_path / f"compiled-{compiled}"
        done = torchrun(2, "train.py", *TINY, "--n_layer=1", "--n_head=4", "--model_type=distributed_gpt",
                        "--block_types=['spd']", "--tp_size=4", "--tp_processes=2", "--warmup_iters=0",
                        "--learning_rate=1e-2", f"--dataset={tiny_data}", "--max_iters=3",
                        f"--compile={compiled}", f"--out_dir={out_dir}", cwd=tmp_path)
        assert done.code == 0, done.err
        found.append(losses_and_norms(out_dir))
    assert len(found[0][0]) == 3 and found[0][0][2] < found[0][0][0] - 0.1
    for compiled, eager in zip(*found):
        assert compiled == pytest.approx(eager, rel=1e-4)  # fp32; the compiled GELU is another form


def test_kernels_for_hopper_fall_back_to_the_same_bits():
    """Without Hopper the switches change nothing, and a model is compiled as one graph with them, too."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**SMALL | {"n_layer": 1})), torch.randint(16, (2, 9))
    expected = model(idx, idx)[1]
    use_fused_gelu(model, "derivative8")
    use_qkv_linear(model)
    assert torch.equal(model(idx, idx)[1], expected)
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(model(idx, idx)[1], expected, rtol=1e-6)


@pytest.mark.parametrize("recompute, schedule", [("none", None), ("block", ONE_LAYER),
                                                 ("selective", ONE_LAYER)])
def test_fp8_compiles_as_one_graph(recompute, schedule):
    """Loss, gradients and updated weights of the eager model, in two updates: the graph reads the casts of
    the weights, and has none of them as constants. Simulated ranks have batched products."""
    eager = build(schedule, 2, torch.float32, n_layer=1, n_head=2, n_embd=32, vocab_size=64)
    compiled, found = copy.deepcopy(eager), []
    for model in (eager, compiled):
        use_fp8(model, dict(fp8="emulated", fp8_head=True, fp8_weight_gradients=True))
        use_activation_checkpointing(model, recompute if model is compiled else "none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follow_weights(model, optimizer)
        if model is compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        for seed in range(3):
            _, loss = model(tokens(4, 16, seed=seed), tokens(4, 16, seed=9))
            found.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(torch.stack(found[:3]), torch.stack(found[3:]), rtol=1e-3), found
    assert found[2] < found[0] - 0.01
    difference = [(p - q).norm() / q.norm() for p, q in zip(compiled.parameters(), eager.parameters())]
    assert max(difference) < 1e-2  # a rounding error in fp32 moves a cast to the next number now and then
