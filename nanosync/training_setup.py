"""Set-up of train.py and train_reduced_sync.py before their loops: checks of settings, micro-steps, the
optimizer, start-up lines, compiling and wrapping the model.
"""

import torch
import torch.nn as nn

from configurator import check_at_least, check_at_most, check_choice, check_seed
from kernels import usable
from nanosync.batch_size import check_batch_size
from nanosync.checkpoint import exit_with_listing
from nanosync.dataloader import evaluate, evaluation_batches
from nanosync.diagnose import check_diagnosis, only_diagnose
from nanosync.distributed import finish, start
from nanosync.errors import UserError, shown
from nanosync.fp8 import check_fp8, check_fp8_device, describe_fp8, follow_weights
from nanosync.hardware import check_compile, make_deterministic, pick_dtype
from nanosync.log_text import evaluation_line
from nanosync.model_kind import MAX_LAYERS, ModelKind
from nanosync.muon import build_muon
from nanosync.optim import build_adamw
from nanosync.parallelism import Parallelism, check_parallelism, parallelism_of, settle_buckets
from nanosync.recompute import ACTIVATION_CHECKPOINTING
from nanosync.resuming import resume_of
from nanosync.run import Run
from nanosync.sharding import reshard


def check_training_settings(config: dict) -> None:
    """Raise UserError for wrong values of the settings that both scripts have."""
    check_choice(config, "activation_checkpointing", ACTIVATION_CHECKPOINTING)
    check_at_least(config, 1, "block_size", "gradient_accumulation_steps", "eval_interval",
                   "log_interval", "eval_iters", "keep_checkpoints", "lr_decay_iters")
    check_at_least(config, 0, "max_iters", "warmup_iters", "grad_clip", "min_lr", "checkpoint_interval",
                   "sample_interval", "hellaswag_interval")
    check_at_least(config, 1, "sample_tokens", "timeout")
    check_at_most(config, 1e6, "timeout")
    check_at_most(config, MAX_LAYERS, "n_layer")
    check_at_least(config, 0, "fsdp_min_num_params")
    if config["use_triton"] not in (True, False, "auto"):
        raise UserError(f"use_triton={shown(config['use_triton'])} is unknown: use True, False or auto")
    check_seed(config)
    if config["cuda_graphs"] and not config["compile"]:
        raise UserError("cuda_graphs records compiled passes: leave out compile=False, or cuda_graphs")
    if config["cuda_graphs"] and config["dropout"] > 0:  # torch 2.11: see records/fp8-training
        raise UserError(f"cuda_graphs draws other masks in a resumed run, and dropout is "
                        f"{config['dropout']}: use --dropout=0, or leave cuda_graphs out")
    check_fp8(config)
    check_parallelism(config)
    check_optimizer(config)
    check_diagnosis(config)
    check_batch_size(config)
    resume_of(config)  # init_from may contradict it


def _check_muon(settings: dict) -> None:
    if settings["use_zero1"]:
        raise UserError("optimizer='muon' already shards its state over the data-parallel processes: leave "
                        "use_zero1 out")
    if settings["use_fsdp"]:
        raise UserError("optimizer='muon' needs whole matrices, and use_fsdp divides them: leave use_fsdp "
                        "out (Muon shards its state already), or use --optimizer=adamw")
    if settings["tp_processes"] > 1:
        raise UserError(f"optimizer='muon' needs whole matrices, and tp_processes={settings['tp_processes']} "
                        f"divides them: use --tp_processes=1, which simulates the ranks, or "
                        f"--optimizer=adamw")


OPTIMIZERS = {  # name -> check(settings), build(model, settings, parallelism)
    "adamw": (lambda s: None, lambda model, s, parallel: build_adamw(
        model, s["learning_rate"], (s["beta1"], s["beta2"]), s["weight_decay"], parallel.optimizer_group)),
    "muon": (_check_muon, lambda model, s, parallel: build_muon(
        model, s["learning_rate"], s["muon_learning_rate"], (s["beta1"], s["beta2"]), s["weight_decay"],
        s["muon_momentum"], parallel.processes.dp_group)),
}


def check_optimizer(settings: dict) -> None:
    """Raise UserError for an unknown `optimizer`, or for settings that contradict it."""
    kind = settings["optimizer"]
    if kind not in OPTIMIZERS:
        raise UserError(f"optimizer={kind!r} is unknown: use {' or '.join(OPTIMIZERS)}")
    OPTIMIZERS[kind][0](settings)


def build_optimizer(model: nn.Module, settings: dict, parallel) -> torch.optim.Optimizer:
    """Build the optimizer that the settings name; the model must be on its device. Raises UserError.

    An optimizer whose state is sharded over processes has `group`, `rank` and `owns(parameter)`, and
    `rows_of(parameter)` if it shards some parameters by rows. An optimizer whose state differs from AdamW's
    has `state_entries(parameter)`, the names and whole shapes of the tensors in a parameter's state.
    """
    return OPTIMIZERS[settings["optimizer"]][1](model, settings, parallel)


def check_dense(config: dict) -> None:
    """Raise UserError for settings of tensor-parallel ranks if train.py's model is the dense GPT.

    A resumed run whose model_type is not known yet passes: call this function again with the checkpoint's.
    """
    if config["model_type"] != "gpt" or (resume_of(config) and not config.origin["model_type"]):
        return
    if config["tp_processes"] > 1:
        raise UserError(f"tp_processes={config['tp_processes']} cannot divide the dense model: use "
                        f"--model_type=distributed_gpt, or leave tp_processes out")
    for name in ("tp_size", "block_types"):
        if config.origin[name] and config[name] not in (None, 1):
            raise UserError(f"{name} is for --model_type=distributed_gpt, as the dense GPT has no ranks and "
                            f"one kind of block: add that setting, or leave {name} out")


def start_processes(config: dict, kinds: dict[str, ModelKind]) -> Parallelism:
    """Start processes, device and dtype; return how they divide a step. With list_checkpoints, print the
    checkpoints and exit. Raises UserError.
    """
    exit_with_listing(config, kinds)
    if config["deterministic"]:
        make_deterministic()
    tp_processes, total = config["tp_processes"], config["gradient_accumulation_steps"]
    processes = start(config["device"], config["backend"], config["timeout"], tp_processes, config)
    only_diagnose(config, processes.device)
    n, kind = processes.world_size, processes.device.type
    if config["cuda_graphs"] and (kind != "cuda" or n > 1):
        raise UserError(f"cuda_graphs is for one process on a CUDA GPU, and this run has {n} "
                        f"process{'es' * (n > 1)} on {kind}: leave cuda_graphs out")
    if config["use_triton"] == "auto":
        fuses_casts = config["fp8"] and config["compile"]  # into its own LayerNorm, forward and backward
        config["use_triton"] = usable(torch.empty(0, device=processes.device)) and not fuses_casts
    dtype = pick_dtype(config["dtype"], processes.device)
    parallel = parallelism_of(config, processes, dtype)
    check_fp8_device(config, processes.device, dtype)
    if config["compile"]:
        check_compile(processes.device)
    if total % processes.dp_size:
        what = "processes" if tp_processes == 1 else f"groups of {tp_processes} processes"
        raise UserError(f"gradient_accumulation_steps={total} is the total over all {what} and must be a "
                        f"multiple of their number, {processes.dp_size}")
    return parallel


def describe_start(run: Run, model: nn.Module, parallel: Parallelism) -> None:
    """Print device, dtype, model, data, batch and parallelism of the run."""
    config, data, processes = run.config, run.data, run.processes
    dtype, n = str(parallel.dtype).removeprefix("torch."), processes.world_size
    run.line(f"device {run.environment['device']}, {dtype}, {n} process{'es' * (n > 1)}; "
             f"{model.n_parameters() / 1e6:.2f}M parameters; {data.folder}: {data.train.n_tokens:,} train "
             f"and {data.val.n_tokens:,} val tokens, {data.train.n_windows:,} windows an epoch")
    micro_steps = config["gradient_accumulation_steps"] // processes.dp_size
    tokens = config["batch_size"] * config["block_size"] * config["gradient_accumulation_steps"]
    run.line(f"tokens per iteration: {config['batch_size']} sequences x {config['block_size']} tokens x "
             f"{micro_steps} accumulation x {processes.dp_size} DDP rank{'s' * (processes.dp_size > 1)} = "
             f"{tokens:,}")
    if model.end_of_text is not None:
        run.line(f"attention does not cross documents, which begin with token {model.end_of_text}")
    for line in parallel.describe(model):
        run.line(line)
    if config["use_triton"]:
        kind = processes.device.type
        run.line("using Triton-accelerated LayerNorm" if usable(torch.empty(0, device=processes.device)) else
                 f"use_triton: no Triton kernels on {kind} here, using PyTorch's LayerNorm")
    if config["fp8"]:
        run.line(describe_fp8(config, model))
    if data.meta is None and config["init_from"] == "scratch":
        run.line(f"{data.folder} has no meta.json: using GPT-2's vocabulary of 50257 tokens")


def prepare_training(run: Run, model: nn.Module, parallel: Parallelism) -> tuple:
    """Compile and wrap the model; return (module that the training loop calls, autocast context, generator).

    The generator draws the dropout masks that the processes of one model share. It is None without
    tp_processes.
    """
    config, processes = run.config, run.processes
    torch.set_float32_matmul_precision("high")  # TF32 where a product is in fp32
    autocast = parallel.autocast()
    follow_weights(model, run.optimizer)
    real_ranks = config["tp_processes"] > 1
    compiled = config["compile"] and not (real_ranks and model.config.dropout > 0)
    if compiled:
        run.line("compiling the model (about a minute)")
    elif config["compile"]:
        run.line("not compiling: dropout masks on real TP ranks come from a shared generator")
    trained = parallel.prepare(model, compiled, config["cuda_graphs"])
    if config["eval_only"]:
        return trained, autocast, None
    if config["cuda_graphs"] and config["gradient_accumulation_steps"] > 1:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # outside of the graphs' memory
    shared = model.share_dropout(config["seed"], processes.dp_rank, processes.device) if real_ranks else None
    with autocast:
        settle_buckets(trained, (config["batch_size"], config["block_size"]), processes.device, shared)
    return trained, autocast, shared


def estimate_losses(run: Run, model: nn.Module, autocast) -> dict[str, float] | None:
    """Return the mean losses of fixed windows of both splits, {"train": ..., "val": ...}.

    The windows are the same for any number of processes. Return None if a process was asked to stop.
    """
    config, processes, losses = run.config, run.processes, {}
    if run.step == run.first_step:  # nothing is on the screen yet that moves
        run.line(f"evaluating: {config['eval_iters']} batch{'es' * (config['eval_iters'] > 1)} of each split")
    model.align_replicas(run.optimizer)
    model.eval()
    for split in (run.data.train, run.data.val):
        batches = evaluation_batches(split, config["eval_iters"] * config["batch_size"], config["batch_size"],
                                     processes.device, processes.dp_rank, processes.dp_size)
        with autocast:
            losses[split.name] = evaluate(model, batches, processes.dp_group, run.stop_anywhere)
        if run.stopping:
            break
    reshard(model)
    model.train()
    return None if run.stopping else losses


def evaluate_and_exit(run: Run, model: nn.Module, autocast) -> None:
    """Print the losses and exit, for eval_only."""
    losses = estimate_losses(run, model, autocast)
    run.line(evaluation_line(run.first_step, losses["train"], losses["val"],
                             run.data.bits_per_byte(losses["val"])))
    finish(run.processes)
    raise SystemExit(0)
