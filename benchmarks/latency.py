"""Modes decode and prefill of bench.py: the latency of one request on one GPU and on tensor-parallel ranks.

Each contender is a CUDA graph, for every width and batch size: the dense GPT on one GPU (TP=1), a model on
all processes by each schedule, and the same model without any all-reduce (0 syncs). The last is no model; its
time shows the cost of communication.
"""

import dataclasses
import math
import statistics
import time

import torch

from benchmarks.harness import Bench, in_unit, seconds_per_call, synchronize, take_turns, with_range
from model import GPT, GPTConfig
from nanosync.errors import UserError
from nanosync.generation import capture_graph
from nanosync.ranks import Ranks
from nanosync.sync_schedule import SyncSchedule
from reduced_sync_model import named_schedule
from tensor_parallel_model import DistributedGPT, DistributedGPTConfig, RanksConfig

MODES = ("decode", "prefill")
ONE_GPU, NO_SYNCS = "TP=1", "0 syncs"


def check_latency(config: dict) -> None:
    """Raise UserError for wrong settings of modes decode and prefill, before processes start."""
    mode = config["mode"]
    if mode not in MODES:
        return
    if config.origin["tp_size"]:
        raise UserError(f"tp_size: in mode {mode} every process holds one rank, so leave it out")
    sizes = config["batch_sizes"] and config["widths"]
    if not sizes or (mode == "decode" and config["max_new_tokens"] < 3):
        raise UserError("decode needs max_new_tokens of at least 3, and batch_sizes and widths that are not "
                        "empty")


def several_schedules(config: dict) -> dict[str, SyncSchedule]:
    """Make the schedules that `syncs` names, by name; decode and prefill have some by default. Raises
    UserError.

    Where a strategy depends on the number of TP ranks, it weights sums. Its speed does not depend on that.
    """
    syncs, n_layer, mode = config["syncs"], config["n_layer"], config["mode"]
    channels = min(config["widths"]) if mode in MODES else config["n_embd"]
    if syncs is None and mode in MODES and config["block_types"] is None:
        syncs = [2 * n_layer // n for n in (1, 2, 4, 8, 24) if 2 * n_layer % n == 0]
    ranks, found = config["tp_size"], {}
    for entry in syncs or []:
        count, delay = entry if isinstance(entry, list) and len(entry) == 2 else (entry, 0)
        if isinstance(entry, str) and entry[:1].isalpha():
            n_embd = math.ceil(channels / ranks) * ranks  # what the ranks cannot divide is refused elsewhere
            shape = RanksConfig(n_layer=n_layer, n_head=ranks, n_embd=n_embd, tp_size=ranks)
            found[entry] = named_schedule(shape, entry)
        elif type(count) is int and count > 0 and type(delay) is int and delay >= 0:
            schedule = SyncSchedule.evenly(n_layer, count)
            late = tuple(dataclasses.replace(s, delay=delay if s.sync else 0) for s in schedule.sublayers)
            found[f"{count} syncs{f', delay {delay}' * (delay > 0)}"] = SyncSchedule(late)
        else:
            raise UserError(f"syncs has {entry!r}: its entries are whole numbers from 1, pairs "
                            f"[all-reduces, delay], or strategies of train_reduced_sync.py")
    return found


def check_sizes(config: dict, processes: int) -> None:
    """Raise UserError for sizes that so many processes cannot run."""
    for C in config["widths"]:
        if C % 64 or (C // 64) % processes:
            raise UserError(f"widths: {C} is not made of heads of 64, equally many for each of "
                            f"{processes} processes")
    prompt_tokens, max_new_tokens = config["prompt_tokens"], config["max_new_tokens"]
    if prompt_tokens + (max_new_tokens if config["mode"] == "decode" else 0) > config["block_size"]:
        raise UserError(f"prompt_tokens={prompt_tokens} and max_new_tokens={max_new_tokens} exceed "
                        f"block_size={config['block_size']}")


class Latency:
    """A contender that answers one request at a time: `turn()` is seconds a token, or seconds a prefill."""

    def __init__(self, bench: Bench, model, B: int, **options):
        """model: a GPT, or a DistributedGPT, of which the schedule and the ranks are those of now.
        options: of its decoder."""
        self.bench, self.model = bench, model
        self.variant = (model.schedule, model.ranks) if isinstance(model, DistributedGPT) else None
        settings = bench.config
        self.prompt = torch.randint(min(settings["vocab_size"], 50257), (B, settings["prompt_tokens"]),
                                    device=bench.device)
        options |= {"temperature": settings["temperature"], "top_k": settings["top_k"]}
        self.decoder = model.decoder(B, **options)
        self.graph = None
        with torch.no_grad():
            if settings["mode"] == "prefill" and bench.device.type == "cuda":
                self.decoder.prefill(self.prompt)
                self.graph = capture_graph(lambda: self.decoder.prefill(self.prompt))
            self.turn()

    @torch.no_grad()
    def turn(self) -> float:
        if self.variant is not None:  # contenders share a model
            self.model.reschedule(self.variant[0])
            self.model.ranks = self.variant[1]
        settings, device = self.bench.config, self.bench.device
        if settings["mode"] == "prefill":
            return seconds_per_call(self.prefill, device, settings["steps"])
        synchronize(device)
        new = settings["max_new_tokens"]
        for n, _ in enumerate(self.decoder.run(self.prompt, new)):
            if n == 1:  # prefill and the capture of a step come before
                synchronize(device)
                started = time.perf_counter()
        synchronize(device)
        return (time.perf_counter() - started) / (new - 2)

    def prefill(self) -> None:
        self.graph.replay() if self.graph else self.decoder.prefill(self.prompt)


def make_contenders(bench: Bench, schedules: dict, C: int, B: int) -> dict[tuple[str, str], Latency]:
    """Make the contenders of one width and batch size on this process, by name and tp_allreduce. Weights are
    random: the speed of a schedule does not depend on them."""
    settings, processes = bench.config, bench.processes
    shape = bench.architecture | {"n_embd": C, "n_head": C // 64}
    torch.manual_seed(settings["seed"])
    with torch.device(bench.device):
        model = DistributedGPT(DistributedGPTConfig(**shape, tp_size=processes.world_size))
        dense = GPT(GPTConfig(**shape)) if processes.main else None
    contenders = {}
    if processes.world_size > 1:
        model.place(Ranks(1, processes.group))
        model.to(bench.dtype).eval()
        for name, schedule in schedules.items():
            model.reschedule(schedule)
            for kind in kinds_of(settings):
                contenders[name, kind] = Latency(bench, model, B, tp_allreduce=kind)
        model.reschedule(SyncSchedule.evenly(settings["n_layer"], 1))
        model.ranks = dataclasses.replace(model.ranks, dry=True)
        contenders[NO_SYNCS, ""] = Latency(bench, model, B)
    if dense is not None:
        contenders[ONE_GPU, ""] = Latency(bench, dense.to(bench.dtype).eval(), B)
    return contenders


def measure(bench: Bench, schedules: dict, C: int, B: int) -> list[dict]:
    """Make a row for each contender of one width and batch size; on the main process, an empty list on
    others."""
    P, group = bench.processes.world_size, bench.processes.group
    contenders = make_contenders(bench, schedules, C, B)
    names = [(name, kind) for name in schedules for kind in kinds_of(bench.config)] + [(NO_SYNCS, "")]
    names = names * (P > 1) + [(ONE_GPU, "")]
    turns = {name: contenders[name].turn if name in contenders else None for name in names}
    seconds = take_turns(turns, bench.config["rounds"], group)
    if not bench.processes.main:
        return []
    alone = statistics.median(seconds[ONE_GPU, ""])
    floor = statistics.median(seconds[NO_SYNCS, ""]) if P > 1 else None
    # a sum can be of another kind than tp_allreduce, where that kind cannot work
    sums = {name: c.decoder.sum_kind for name, c in contenders.items() if name[0] != ONE_GPU}
    if bench.config["mode"] == "prefill":  # which always sums by the group's all-reduce
        sums = {name: "none" if kind == "none" else "nccl" for name, kind in sums.items()}
    return [{"n_embd": C, "batch_size": B, "processes": 1 if name[0] == ONE_GPU else P, "name": name[0],
             "tp_allreduce": name[1] or None, "allreduce": sums.get(name), **in_unit("us", 1e6, times),
             "of_one_gpu": statistics.median(times) / alone,
             "of_no_syncs": None if floor is None else statistics.median(times) / floor}
            for name, times in seconds.items()]


def kinds_of(settings: dict) -> list[str]:
    """Return the kinds of sums to measure; a prefill always sums by the group's all-reduce."""
    kinds = settings["tp_allreduce"].split(",")
    return kinds[:1] if settings["mode"] == "prefill" else list(dict.fromkeys(kinds))


def run(bench: Bench, schedules: dict) -> None:
    """Measure all widths and batch sizes; print a line for each contender, write the JSON file. Raises
    UserError.

    schedules: name -> SyncSchedule.
    """
    settings, processes = bench.config, bench.processes
    check_sizes(settings, processes.world_size)
    if processes.main:
        print(f"{settings['mode']}: {processes.world_size} x {bench.machine}, L={settings['n_layer']}, "
              f"V={settings['vocab_size']}, prompt {settings['prompt_tokens']}, {settings['tp_allreduce']}; "
              f"us a {'token' if settings['mode'] == 'decode' else 'prefill'}, "
              f"median of {settings['rounds']} rounds (range)")
    rows, width = [], max(map(len, [*schedules, " " * 9]))
    for C in settings["widths"]:
        for B in settings["batch_sizes"]:
            for row in measure(bench, schedules, C, B):
                rows.append(row)
                floor = "" if row["of_no_syncs"] is None else f", {row['of_no_syncs']:.3f} of {NO_SYNCS}"
                print(f"C={C:5} B={B:3} {row['name']:>{width}} on {row['processes']} "
                      f"{row['allreduce'] or '-':>7}  {with_range(row, 'us', 9, 1)}  "
                      f"{row['of_one_gpu']:.3f} of TP=1{floor}", flush=True)
    bench.write_json(world_size=processes.world_size, rows=rows)
