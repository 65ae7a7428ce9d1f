"""Training state divided over processes: AdamW's (ZeRO-1) or all of it (FSDP2), alone and with tensor
parallelism. Losses, gradient norms and weights of one process, the memory, what is communicated, activation
checkpointing, checkpoints of every way to divide a run loaded in every other, exact resume. CPU, real gloo
processes; a minute.

    python -m pytest tests/processes/test_sharded_training.py
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from helpers import TINY, build, losses, newest, run_processes, tokens, torchrun
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from models import registry, weights
from nanosync import checkpoint_writer, model_kind
from nanosync.distributed import Processes, agree
from nanosync.fp8 import follow_weights, layers_of, use_fp8
from nanosync.optim import ShardedAdamW, build_adamw
from nanosync.optimizer_state import load_state_by_name, state_by_name
from nanosync.parallelism import Parallelism, settle_buckets
from nanosync.ranks import Ranks
from nanosync.recompute import ACTIVATION_CHECKPOINTING, use_activation_checkpointing
from nanosync.sharding import local_part, reshard, whole_tensor

CPU = torch.device("cpu")
MODEL = dict(n_layer=2, n_head=4, n_embd=32)


@dataclass(frozen=True)
class Division:
    """How a run is divided: over so many of the 4 processes, tp of which hold one model."""

    processes: int
    tp: int = 1
    zero1: bool = False
    fsdp: bool = False


DIVISIONS = [Division(1), Division(2), Division(2, zero1=True), Division(4), Division(4, zero1=True),
             Division(2, tp=2), Division(4, tp=2), Division(4, tp=2, zero1=True), Division(2, fsdp=True),
             Division(4, fsdp=True), Division(4, tp=2, fsdp=True)]


def processes_of_divisions(rank: int) -> dict[Division, Processes]:
    """What this process, one of 4, is in each of them; it is not there in those that do without it."""
    neighbours = [dist.new_group(pair) for pair in ([0, 1], [2, 3])][rank // 2]
    across = [dist.new_group(pair) for pair in ([0, 2], [1, 3])][rank % 2]
    found = {}
    for division in DIVISIONS:
        n, tp = division.processes, division.tp
        if rank >= n:
            continue
        group = {1: None, 2: neighbours, 4: dist.group.WORLD}[n]
        dp_group = group if tp == 1 else across if n == 4 else None
        found[division] = Processes(rank, n, rank, CPU, group, rank // tp, n // tp, dp_group,
                                    neighbours if tp > 1 else None)
    return found


class Run:
    """Two simulated or real ranks that synchronise after every MLP, and their optimizer."""

    def __init__(self, division: Division, processes: Processes, saved: dict | None = None,
                 scaler: bool = False, recompute: str = "none", dropout: float = 0.0,
                 min_num_params: float = 1, reshard: bool = True, whole_gradients: bool = True,
                 end_of_text: int | None = None, fp8: bool | str = False, **model):
        """saved: what `snapshot` gave, to go on from."""
        self.processes = processes
        initial = build(dict(block_types=["spd"] * 2), 2, torch.float32, dropout=dropout,
                        **MODEL | model)
        values = list(initial.named_parameters() if saved is None else saved["model"].items())
        with torch.device("meta"):
            self.model = registry.build_model(model_kind.model_description("distributed_gpt", initial))
        if division.tp > 1:
            self.model.place(Ranks(1, processes.tp_group))
        self.model.end_of_text = end_of_text
        use_activation_checkpointing(self.model, recompute)
        use_fp8(self.model, dict(fp8=fp8, fp8_head=fp8, fp8_weight_gradients=fp8))
        self.parallel = Parallelism(processes, torch.float32, division.zero1, division.fsdp, min_num_params,
                                    reshard, False, not whole_gradients)
        weights.fill(self.model, values, "the test", CPU, self.parallel)
        self.optimizer = build_adamw(self.model, 1e-3, (0.9, 0.95), 0.1, self.parallel.optimizer_group)
        assert isinstance(self.optimizer, ShardedAdamW) == division.zero1
        follow_weights(self.model, self.optimizer)
        self.trained = self.parallel.prepare(self.model, compiled=False)
        if fp8:  # a rounding error can move a cast, so order of sums matters more
            settle_buckets(self.trained, (1, 16), CPU, None)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=2.0**10)
        if saved is not None:
            load_state_by_name(self.optimizer, self.model, saved["optim"])

    def step(self, it: int, spoilt: bool = False) -> tuple[float, float]:
        """An update with 4 sequences, however many processes there are; its loss and the gradient's norm."""
        dp_size, total = self.processes.dp_size, torch.zeros(())
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + it)
        for micro_step in range(4 // dp_size):
            self.parallel.sync(self.trained, micro_step == 4 // dp_size - 1)
            seed = 4 * it + micro_step * dp_size + self.processes.dp_rank
            _, loss = self.trained(tokens(1, 16, seed=seed), tokens(1, 16, seed=seed + 1000))
            if spoilt and seed == 4 * it:  # on one process only
                loss = loss * float("inf")
            self.scaler.scale(loss * dp_size / 4).backward()
            total += loss.detach() / 4
        self.model.reduce_partial_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = self.parallel.clip(self.model, 0.5, self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        assert all(p.grad is None for p in self.model.parameters())
        return agree(total, norm, False, self.processes)[:2]

    def snapshot(self) -> dict:
        self.model.align_replicas(self.optimizer)
        return checkpoint_writer.snapshot(self.model, self.optimizer, CPU, None, self.processes.group)


ALONE = Processes(0, 1, 0, CPU, None)


def all_weights(run: Run) -> torch.Tensor:
    return torch.cat([whole_tensor(p.detach()).flatten() for p in run.model.parameters()])


def check_training(rank: int, world: int) -> None:
    """Rounding differs by about 1e-7 an update, in fp32; ZeRO-1 has the bits of DDP."""
    mine, alone = processes_of_divisions(rank), Run(Division(1), ALONE)
    expected = [alone.step(it) for it in range(2)]  # the second reads the moments
    for division in mine:
        run, plain = Run(division, mine[division]), None
        if division.zero1:
            plain = Run(Division(division.processes, division.tp), mine[division])
        for it in range(2 if division.processes > 1 else 0):
            values = run.step(it)
            assert values == pytest.approx(expected[it], rel=1e-6), (division, it)
            if plain is not None:
                assert plain.step(it) == values, (division, it)
                assert torch.equal(all_weights(run), all_weights(plain)), (division, it)
                check_shares(division, plain, run)
        if division.fsdp:
            check_parts(division, run)


def check_parts(division: Division, run: Run) -> None:
    """Of each parameter and its moments a process has its rows."""
    parameters = list(run.model.parameters())
    parts = parameters + [t for state in run.optimizer.state.values() for t in state.values() if t.dim()]
    assert len(parts) == 3 * len(parameters) and all(isinstance(t, DTensor) for t in parts)
    share = sum(local_part(t).numel() for t in parts) / sum(t.numel() for t in parts)
    assert share == pytest.approx(division.tp / division.processes, rel=0.05)


class Counted(TorchDispatchMode):
    """How often each of PyTorch's operators is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.namespace, function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})

    def collectives(self) -> dict[str, int]:
        return {name: n for (space, name), n in self.calls.items() if space in ("c10d", "_c10d_functional")
                and name != "wait_tensor"}

    def times(self, *names: str) -> int:
        return sum(self.calls["aten", name] for name in names)


def check_communication(rank: int, world: int) -> None:
    """Collectives of an update of 4 processes, in two micro-steps of which the first leaves gradients where
    they are: units are fetched once for each pass, or once in all if they are kept."""
    processes = processes_of_divisions(rank)[Division(4, fsdp=True)]
    expected = Run(Division(1), ALONE).step(0)
    ways = [(True, True), (False, True), (True, False)]
    for min_num_params, units in ((1, 3), (20_000, 2), (1e9, 1)):  # a layer has 12,704 parameters
        for dropped, whole in ways if units == 3 else ways[:units]:
            run = Run(Division(4, fsdp=True), processes, min_num_params=min_num_params, reshard=dropped,
                      whole_gradients=whole)
            assert run.step(0) == pytest.approx(expected, rel=1e-6)
            with Counted() as counted:
                for last in (False, True):
                    run.parallel.sync(run.trained, last)
                    run.trained(tokens(1, 16), tokens(1, 16))[1].backward()
            fetched = 4 * (units - 1) + 2 if dropped else units  # the rest is kept for the backward pass
            assert counted.collectives() == {"_allgather_base_": fetched,
                                             "_reduce_scatter_base_": units * (1 if whole else 2)}


def check_starting(rank: int, world: int) -> None:
    """While a model gets its weights, never more than one unit is whole beside embedding and head, in
    whatever order a file has them; afterwards nothing is."""
    processes = processes_of_divisions(rank)[Division(4, fsdp=True)]
    torch.manual_seed(1)
    dense = GPT(GPTConfig(n_layer=12, n_head=2, n_embd=8, block_size=8, vocab_size=16))
    values = dict(sorted(dense.named_parameters()))  # h.1, h.10, h.11, h.2, ...
    with torch.device("meta"):
        model = registry.build_model(model_kind.model_description("gpt", dense))
    most = []

    def watched(names):
        for name in names:
            most.append(len({id(block) for block in model.transformer.h for p in block.parameters()
                             if not p.is_meta and not isinstance(p, DTensor)}))
            yield name

    parallel = Parallelism(processes, torch.float32, fsdp=True, min_num_params=1500)  # two of 872 parameters
    parallel.shard_as_filled(model, watched(weights.fill_each(model, values, "the test", CPU)))
    assert max(most) == 2 and all(isinstance(p, DTensor) for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(whole_tensor(p), values[name]), name
    idx = tokens(2, 8, vocab_size=16)
    assert torch.equal(model(idx, idx)[1], dense(idx, idx)[1])
    reshard(model)


def check_recomputation(rank: int, world: int) -> None:
    """The same gradients to the bit, with masks that ranks draw in common, too; 'block' computes everything
    twice, 'selective' no product and no all-reduce."""
    mine = processes_of_divisions(rank)
    for division in (Division(4), Division(4, fsdp=True), Division(4, tp=2), Division(4, tp=2, fsdp=True)):
        results, calls = {}, {}
        for kind in ACTIVATION_CHECKPOINTING:
            run = Run(division, mine[division], recompute=kind, dropout=0.2)
            if division.tp > 1:
                run.model.share_dropout(1, mine[division].dp_rank, CPU)
            torch.manual_seed(rank)
            with Counted() as counted:
                values = run.step(0)
            results[kind], calls[kind] = (values, all_weights(run)), counted
        products = {kind: c.times("mm", "addmm", "bmm") for kind, c in calls.items()}
        norms = {kind: c.times("native_layer_norm") for kind, c in calls.items()}
        for kind in ("block", "selective"):
            assert results[kind][0] == results["none"][0], (division, kind)
            assert torch.equal(results[kind][1], results["none"][1]), (division, kind)
            assert norms[kind] > norms["none"], (division, norms)
        assert products["block"] > products["selective"] == products["none"], (division, products)
        all_reduces = {kind: c.collectives().get("all_reduce", 0) for kind, c in calls.items()}
        assert all_reduces["selective"] == all_reduces["none"], (division, all_reduces)


def check_shares(division: Division, plain: Run, sharded: Run) -> None:
    """Each parameter's moments are kept once, with the bits of plain AdamW's, and shares are about equal."""
    whole, share = (state_by_name(run.optimizer, run.model) for run in (plain, sharded))
    assert all(torch.equal(t, whole[name]) for name, t in share.items())
    names = [None] * (division.processes // division.tp)
    dist.all_gather_object(names, sorted(share), group=sharded.optimizer.group)
    assert sorted(name for of_one in names for name in of_one) == sorted(whole)
    bytes_whole, bytes_share = (sum(t.nbytes for t in state.values()) for state in (whole, share))
    assert bytes_share == pytest.approx(bytes_whole / len(names), rel=0.15)


def check_scaler(rank: int, world: int) -> None:
    """A gradient that is not finite, whoever made it, stops the update everywhere."""
    processes = processes_of_divisions(rank)[Division(4)]
    plain, sharded = (Run(Division(4, zero1=zero1), processes, scaler=True) for zero1 in (False, True))
    for it in range(6):
        before = all_weights(sharded)
        for run in (plain, sharded):
            run.step(it, spoilt=it == 3)
        assert torch.equal(before, all_weights(sharded)) == (it == 3)
        assert torch.equal(all_weights(plain), all_weights(sharded))
    assert plain.scaler.get_scale() == sharded.scaler.get_scale() == 2.0**9


def check_checkpoints(rank: int, world: int) -> None:
    """What is saved is whole tensors by name. Loaded in any division and saved again it has the same bits, so
    whose they were cannot matter to the next loss, which is that of one process to 1e-6. Every division loads
    one of the four, for time."""
    mine, saved = processes_of_divisions(rank), {}
    for division in (Division(1), Division(4, zero1=True), Division(2, tp=2), Division(4, tp=2, fsdp=True)):
        if division in mine:
            run = Run(division, mine[division])
            for it in range(2):
                run.step(it)
            saved[division] = run.snapshot()
        box = [saved.get(division)]
        dist.broadcast_object_list(box, src=0)
        saved[division] = box[0]
    for i, (source, tensors) in enumerate(saved.items()):
        assert len(tensors["optim"]) == 3 * len(tensors["model"])
        expected = Run(Division(1), ALONE, tensors).step(2)
        for division in (d for d in DIVISIONS[i::4] if d in mine):
            case, run = (source, division), Run(division, mine[division], tensors)
            again = run.snapshot()
            for which in ("model", "optim") if rank == 0 else ():
                assert set(again[which]) == set(tensors[which]), case
                assert all(torch.equal(t, tensors[which][name]) for name, t in again[which].items()), case
            assert run.step(2) == pytest.approx(expected, rel=1e-6), case


def check_document_mask(rank: int, world: int) -> None:
    """Documents of about 6 tokens, in every division of a model: loss and norm of the gradient."""
    mine = processes_of_divisions(rank)
    expected = Run(Division(1), ALONE, end_of_text=3).step(0)
    for division in (d for d in mine if not d.zero1):
        found = Run(division, mine[division], end_of_text=3).step(0)
        assert found == pytest.approx(expected, rel=1e-6), division


def check_fp8(rank: int, world: int) -> None:
    """With the head, beside one process: rounding in fp32 moves a cast to the next number now and then, and
    real ranks have a scale for each part of a weight. Recomputation, ZeRO-1 and resuming change no bit."""
    options = dict(fp8="emulated", vocab_size=64)
    mine, alone = processes_of_divisions(rank), Run(Division(1), ALONE, **options)
    expected = [alone.step(it) for it in range(3)]
    assert expected[0] != pytest.approx(Run(Division(1), ALONE, vocab_size=64).step(0), rel=1e-5)
    for division in (Division(2, zero1=True), Division(4, tp=2), Division(4, tp=2, fsdp=True)):
        if division not in mine:
            continue
        results = {}
        for recompute in ("none", "selective")[:1 + division.fsdp]:
            run = Run(division, mine[division], recompute=recompute, **options)
            steps = [run.step(it) for it in range(2)]
            saved = [run.snapshot()]
            dist.broadcast_object_list(saved, src=0, group=mine[division].group)
            again = Run(division, mine[division], saved[0], recompute=recompute, **options)
            steps.append(run.step(2))
            assert again.step(2) == steps[2], division
            assert torch.equal(all_weights(run), all_weights(again)), division
            results[recompute] = steps
            assert [v for step in steps for v in step] == pytest.approx(
                [v for step in expected for v in step], rel=2e-2), (division, recompute)
        assert all(steps == results["none"] for steps in results.values()), division
        casts = [layer.casts for layer in layers_of(run.model)]
        assert all(c is None for c in casts) if run.parallel.sharded else None not in casts
        if division.zero1:
            plain = Run(Division(division.processes, division.tp), mine[division], **options)
            assert [plain.step(it) for it in range(3)] == results["none"], division


def check_all(rank: int, world: int) -> None:
    for check in (check_training, check_document_mask, check_starting, check_communication,
                  check_recomputation, check_scaler, check_checkpoints, check_fp8):
        check(rank, world)


def test_on_processes(tmp_path):
    run_processes(4, check_all, tmp_path)  # one launch, which costs as much as a check


RUN = [*TINY, "--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=12", "--dropout=0.1",
       "--checkpoint_interval=6", "--eval_interval=6"]


@pytest.mark.parametrize("processes, script, options, says", [
    (2, "train.py", ["--use_zero1"], "Using ZeRO-1 optimizer state sharding\n"),
    (2, "train.py", ["--use_fsdp", "--fsdp_min_num_params=1", "--fsdp_reshard_after_forward=False",
                     "--activation_checkpointing=selective", "--sample_interval=6", "--sample_prompt=A",
                     "--sample_tokens=9"],
     "Wrapping model with FSDP... 2 units of layers\n"),
    (4, "train_reduced_sync.py", ["--use_fsdp", "--tp_processes=2", "--sync_strategy=custom", "--bias",
                                  "--sync_points=[0,3]", "--fsdp_min_num_params=1"],
     "Wrapping model with FSDP... 2 units of layers\n")], ids=["zero1", "fsdp", "fsdp tp"])
def test_exact_resume(processes, script, options, says, tiny_data, tmp_path):
    """Losses, weights, moments, random states, to the last bit."""
    args = [*RUN, *options, f"--dataset={tiny_data}"]
    done = torchrun(processes, script, *args, "--out_dir=out", cwd=tmp_path)
    assert done.code == 0 and done.out.count(says) == 1, done.err
    resume = "--out_dir=again", "--resume=out/ckpt/step-00000006"
    done = torchrun(processes, script, *args, *resume, cwd=tmp_path)
    assert done.code == 0 and newest(tmp_path / "again") == newest(tmp_path / "out"), done.err
    through = losses(tmp_path / "out")
    assert losses(tmp_path / "again") == {it: through[it] for it in range(6, 12)}
    if script == "train.py" and "--use_fsdp" in options:  # weights of another run, of fewer positions
        crop = [*RUN, f"--dataset={tiny_data}", "--init_from=out", "--block_size=8", "--eval_only"]
        values = [torchrun(n, script, *crop, *use, cwd=tmp_path).out.splitlines()[-1]
                  for n, use in ((1, []), (2, options))]
        assert values[0] == values[1] and values[0].startswith("step 0: train loss 3.0"), values
