"""Train a GPT whose tensor-parallel ranks synchronise less often, by a named strategy.

Simulated ranks on one process, and on 8 GPUs under data parallelism:
$ python train_reduced_sync.py config/train_python_6sync.py
$ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_6sync.py

Real ranks, 2 GPUs a model; two runs side by side on the halves of a machine:
$ CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --standalone --nproc_per_node=4 train_reduced_sync.py \\
      config/train_spd_12sync.py --tp_processes=2
$ CUDA_VISIBLE_DEVICES=4,5,6,7 torchrun --standalone --nproc_per_node=4 train_reduced_sync.py \\
      config/train_tp_24sync.py --tp_processes=2

What weights that are there lose when syncs are dropped (GPT-2's, or those of another run):
$ python train_reduced_sync.py --eval_only --init_from=gpt2 --dataset=shakespeare --sync_strategy=spd

The strategies are those of reduced_sync_model.py. All but `standard` compute another function than the dense
GPT, and a model is good only with the schedule that it was trained with.
"""

import math
import time

import torch

import checkpoint
from configurator import UserError, before_exit, check_at_least, check_at_most, check_seed, configure
from data import hellaswag, tokenizers
from dataloader import DataLoader, epoch_messages, evaluate, evaluation_batches, open_dataset
from distributed import (
    Sharding,
    StopSignal,
    agree,
    average_gradients,
    barrier,
    check_compile,
    data_parallel,
    env_rank,
    finish,
    make_deterministic,
    on_main,
    peak_memory,
    pick_dtype,
    reshard,
    settle_buckets,
    start,
)
from kernels import usable
from model import (
    ACTIVATION_CHECKPOINTING,
    compile_blocks,
    initial_parameters,
    padded_vocab_size,
    sample_text,
    use_activation_checkpointing,
    use_triton_layer_norm,
)
from optim import (
    build_adamw,
    build_muon,
    check_optimizer,
    clip_gradients,
    cosine_learning_rate,
    load_state_by_name,
    set_learning_rate,
)
from reduced_sync_model import parse_stop_if
from tensor_parallel_model import ranks_on
from training_logger import Stopwatch, TrainingLogger, check_installed, environment, peak_flops

# -----------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on OpenWebText, synchronised everywhere.
# synchronisation
sync_strategy = "standard"  # 'standard', 'spd', 'selective', 'grouped' or 'custom'
attn_sync_layers: list | None = None  # selective: layers that sync after attention, too
layers_per_group = 2  # grouped: layers between two syncs
sync_points: list | None = None  # custom: sublayers to sync after (2i: attention, 2i + 1: MLP of layer i)
tp_size = 2  # tensor-parallel ranks
tp_processes = 1  # processes that hold the ranks of one model; 1 simulates them, under data parallelism
stop_if = ""  # '5000:3.8' ends a run whose val loss is above 3.8 at an evaluation from step 5000 on
# I/O
out_dir = "out-reduced-sync"  # checkpoints and logs go here
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between log lines
eval_iters = 200  # batches of batch_size that an evaluation looks at, in all
eval_only = False  # evaluate once and exit, writing nothing
always_save_checkpoint = True  # save at every evaluation, not only when the val loss is the best so far
checkpoint_interval = 250  # iterations between checkpoints besides those of evaluations, 0 for none
keep_checkpoints = 10  # how many to keep besides the best, the oldest go first
init_from = "scratch"  # 'scratch', 'resume', 'gpt2', ..., 'gpt2-xl', or a folder of weights, also an out_dir
resume = ""  # go on with a run: 'latest', 'best', a step, or the path of a checkpoint or of another out_dir
list_checkpoints = False  # print the checkpoints in out_dir and exit
# watching; log.txt and run_<time>.jsonl in out_dir are always written
sample_interval = 0  # iterations between samples of text, 0 for none
sample_prompt = "\n"
sample_tokens = 200
hellaswag_interval = 0  # iterations between HellaSwag evaluations, 0 for none; needs GPT-2's tokens
hellaswag_input = ""  # hellaswag_val.jsonl; '' downloads it into data/hellaswag
use_tensorboard = False  # write out_dir/tensorboard as well
# wandb
wandb_log = False  # log to Weights & Biases as well
wandb_mode = "online"  # or 'offline', to be uploaded later
wandb_project = "reduced-sync"
wandb_run_name = "gpt2"
# data
dataset = "openwebtext"  # a folder in data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-batches of an update, over all processes (models)
batch_size = 12  # sequences of a micro-batch
block_size = 1024  # tokens of a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 is good for pretraining, 0.1 and more for finetuning
bias = False  # biases in Linear and LayerNorm
# AdamW
learning_rate = 6e-4  # the highest
max_iters = 600000  # updates in all
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient, 0 for no limit
# Muon
optimizer = "adamw"  # or 'muon' for the matrices of the blocks, with AdamW for the rest
muon_learning_rate = 6e-4  # the highest, in AdamW's units; the schedule scales both alike
muon_momentum = 0.95
# learning-rate schedule
decay_lr = True  # cosine from learning_rate to min_lr; otherwise constant
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters
min_lr = 6e-5  # about learning_rate / 10
# system
seed = 1337  # of initialisation, data order and dropout
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16' (scales the loss)
compile = True  # torch.compile the model
deterministic = False  # the same bits in every run on a GPU, too; slower
timeout = 600.0  # seconds after which a process that does not answer, or is still saving, ends the run
backend = "auto"  # 'auto' (nccl on CUDA, else gloo), 'nccl', 'gloo'
use_zero1 = False  # shard the optimizer's state over the data-parallel processes
use_fsdp = False  # shard parameters, gradients and the optimizer's state over them (FSDP2, ZeRO-3)
fsdp_min_num_params = 1e6  # layers are fetched together until they hold so many parameters
fsdp_reshard_after_forward = True  # drop what was fetched and fetch it again for the backward pass
fsdp_accumulate_sharded = False  # with accumulation, average gradients every time; True: less memory, slower
fsdp_cpu_offload = False  # keep what is sharded in the CPU's memory, updates included
activation_checkpointing = "none"  # 'block', 'selective': compute again in the backward pass, see model.py
use_triton = False  # LayerNorm as a Triton kernel
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank())

# what can be known to be wrong before anything is built
check_at_least(config, 1, "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval",
               "log_interval", "eval_iters", "keep_checkpoints", "lr_decay_iters")
check_at_least(config, 0, "max_iters", "warmup_iters", "grad_clip", "min_lr", "checkpoint_interval",
               "sample_interval", "hellaswag_interval")
check_at_least(config, 1, "sample_tokens", "timeout")
check_at_most(config, 1e6, "timeout")
check_at_least(config, 0, "fsdp_min_num_params")
check_seed(config)
for name in config:
    if name.startswith("fsdp_") and config.origin[name] and not use_fsdp:
        raise UserError(f"{name} is for --use_fsdp")
if use_fsdp and use_zero1:
    raise UserError("use_fsdp shards the optimizer's state already, with all else: leave use_zero1 out")
if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
    raise UserError(f"activation_checkpointing={activation_checkpointing!r} is unknown: use "
                    f"{', '.join(ACTIVATION_CHECKPOINTING)}")
if list_checkpoints:
    if env_rank() == 0:
        print(checkpoint.listing(out_dir))
    raise SystemExit(0)
resume = checkpoint.resume_of(config)
stop_step, stop_loss = parse_stop_if(stop_if)
if config.origin["layers_per_group"] and sync_strategy != "grouped" and not resume:
    raise UserError(f"layers_per_group={layers_per_group} is for sync_strategy='grouped', and it is "
                    f"{sync_strategy!r}")
check_optimizer(optimizer, use_zero1, use_fsdp, tp_processes)
if deterministic:
    make_deterministic()
processes = start(device, backend, timeout, tp_processes)
main, group, device = processes.main, processes.group, processes.device
compute_dtype = pick_dtype(dtype, device)
if compute_dtype == torch.float16 and (use_fsdp or tp_processes > 1):
    raise UserError("float16 scales losses for one process at a time: with use_fsdp or tp_processes use "
                    "--dtype=bfloat16")
if fsdp_cpu_offload and (tp_processes > 1 or device.type != "cuda" or processes.dp_size == 1):
    raise UserError("fsdp_cpu_offload moves what use_fsdp shards out of a GPU's memory: it needs CUDA, "
                    "several processes, and tp_processes=1")
if compile:
    check_compile(device)
if gradient_accumulation_steps % processes.dp_size:
    what = "processes" if tp_processes == 1 else f"groups of {tp_processes} processes"
    raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} is the total over all "
                    f"{what} and must be a multiple of their number, {processes.dp_size}")
micro_steps = gradient_accumulation_steps // processes.dp_size
log, held = TrainingLogger(active=main), None
if not eval_only:
    check_installed(use_tensorboard, wandb_log)
    on_main(lambda: checkpoint.check_out_dir(out_dir), group)
    held = on_main(lambda: checkpoint.lock(out_dir, make=False), group)  # until the process ends

# what is continued decides the architecture, and with it which windows the data is cut into
resumed = checkpoint.find_resumed(resume, out_dir, log.line, group) if resume else None
if resumed is not None:
    checkpoint.take_model(config, resumed, ("reduced_sync_gpt",))
    block_size, seed = config["block_size"], config["seed"]
ranks = None  # those of this process, if they are real
if tp_processes > 1:
    ranks = ranks_on(processes.tp_group, config["tp_size"])
tokens_per_iter = batch_size * block_size * gradient_accumulation_steps

# data
data = open_dataset(dataset, block_size)
if resumed is not None and not eval_only:
    checkpoint.check_same_data(resumed, data.folder, data.fingerprint)


def check_tokens(vocab_size: int) -> None:
    for split in (data.train, data.val):
        split.check_tokens(vocab_size)


# what is needed now and then is known to be there
if sample_interval:
    tokenizer = tokenizers.from_meta(data.meta)
    if len(tokenizer.encode(sample_prompt)) == 0:
        raise UserError("sample_prompt is empty: give at least one character")
if hellaswag_interval and not eval_only:
    with hellaswag.in_training():
        examples = on_main(lambda: hellaswag.load(hellaswag_input, setting="hellaswag_input"), group)
        hellaswag.check_lengths(examples, block_size)

# model; first without values, so that none are anywhere but where they are to be; the tokens are checked as
# soon as its vocabulary is known
checkpoint.seed_random_states(seed)
sharding = None
if use_fsdp and processes.dp_size > 1:
    sharding = Sharding(processes, compute_dtype, fsdp_min_num_params, fsdp_reshard_after_forward,
                        fsdp_cpu_offload, fsdp_accumulate_sharded)
variant = {name: config[name] for name in checkpoint.VARIANT["reduced_sync_gpt"]}
if resumed is not None:
    check_tokens(resumed.state["model"]["config"]["vocab_size"])
    with torch.device("meta"):
        model = checkpoint.build_model(resumed.state["model"], dropout=dropout)
    weights = resumed.tensors("model")
elif init_from == "scratch":
    used_vocab_size, vocab_size = padded_vocab_size(data.meta)
    architecture = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                        n_embd=n_embd, dropout=dropout, bias=bias, used_vocab_size=used_vocab_size)
    check_tokens(vocab_size)
    with torch.device("meta"):
        model = checkpoint.build_model({"kind": "reduced_sync_gpt", "config": architecture | variant})
    weights = initial_parameters(model)
else:
    model = checkpoint.load_weights(init_from, "reduced_sync_gpt", variant, warn=log.line, group=group,
                                    dropout=dropout)
    check_tokens(model.config.vocab_size)
    if block_size != model.config.block_size:
        model.crop_block_size(block_size)
    checkpoint.take_architecture(config, vars(model.config), init_from)
    weights = list(model.named_parameters())
if hellaswag_interval and not eval_only:
    with hellaswag.in_training():
        hellaswag.check_vocabulary(model.config.used_vocab_size, data.meta, data.folder)
if device.type == "cpu":
    checkpoint.check_size(model.config)
if ranks is not None:
    model.place(ranks)
use_activation_checkpointing(model, activation_checkpointing)
if use_triton:
    use_triton_layer_norm(model)
checkpoint.fill(model, weights, init_from if resumed is None else resumed.path, device, sharding)
del weights

# optimizer; the scaler does nothing unless the dtype is float16
if optimizer == "muon":
    optimizer = build_muon(model, learning_rate, muon_learning_rate, (beta1, beta2), weight_decay,
                           muon_momentum, processes.dp_group)
else:
    optimizer = build_adamw(model, learning_rate, (beta1, beta2), weight_decay,
                            processes.dp_group if use_zero1 else None)
scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
first_iter, first_sample, evaluated, best_val_loss = 0, 0, False, math.inf
same_run = resumed is not None and checkpoint.belongs_to(resumed, out_dir)  # or it goes on in another out_dir
where = environment(device) | {"world_size": processes.world_size, "tp_processes": tp_processes}
if resumed is not None:
    load_state_by_name(optimizer, model, model.own_part(resumed.tensors("optim")))
    checkpoint.load_scaler(scaler, resumed)
    first_iter, first_sample, evaluated = (resumed.state[name] for name in ("step", "sample", "evaluated"))
    if resumed.state["best_val_loss"] is not None:
        best_val_loss = resumed.state["best_val_loss"]

    if (first_iter > max_iters or (first_iter == max_iters and evaluated)) and not eval_only:
        log.line(f"nothing left to do: {resumed.path} is at step {first_iter} of max_iters={max_iters}")
        finish(processes)
        raise SystemExit(0)


def open_out_dir() -> None:
    """From here on files are written."""
    global held
    if held is None:
        held = checkpoint.lock(out_dir, make=True)
    if wandb_log:
        try:
            log.start_wandb(wandb_project, wandb_run_name, config, out_dir, wandb_mode, same_run)
        except UserError:
            checkpoint.unlock(out_dir, held)
            raise
    checkpoint.make_room(out_dir, resumed, log.line)
    log.open_files(out_dir, config, where, first_iter if same_run else None, evaluated, use_tensorboard)


if not eval_only:
    barrier(group)  # nobody still reads weights that are moved now
    on_main(open_out_dir, group)
log.line("settings, with where they differ from the script's:\n" + config.table())
log.line(f"device {where['device']}, {str(compute_dtype).removeprefix('torch.')}, "
         f"{processes.world_size} process{'es' if processes.world_size > 1 else ''}; "
         f"{model.n_parameters() / 1e6:.2f}M parameters; {data.folder}: {data.train.n_tokens:,} train and "
         f"{data.val.n_tokens:,} val tokens, {data.train.n_windows:,} windows an epoch")
log.line(f"tokens per iteration: {batch_size} sequences x {block_size} tokens x {micro_steps} accumulation x "
         f"{processes.dp_size} ranks = {tokens_per_iter:,}")
alone = ": one data-parallel process keeps it all" if processes.dp_size == 1 else ""
if use_zero1:
    log.line("Using ZeRO-1 optimizer state sharding" + alone)
if use_fsdp:
    n_units = 0 if sharding is None else len(sharding.units(model.transformer.h))
    log.line("Wrapping model with FSDP..." + (alone or f" {n_units} unit{'s' * (n_units != 1)} of layers"))
if use_triton:
    log.line("using Triton-accelerated LayerNorm" if usable(torch.empty(0, device=device)) else
             f"use_triton: no Triton kernels on {device.type} here, LayerNorm is PyTorch's")
log.line(f"{model.syncs} of {2 * model.config.n_layer} synchronization points, {model.config.tp_size} ranks "
         f"on {tp_processes} process{'es' if tp_processes > 1 else ''}")
log.event("schedule", **checkpoint.schedule_description(model))
if data.meta is None and init_from == "scratch":
    log.line(f"{data.folder} has no meta.json: taking GPT-2's vocabulary of 50257")

# speed
torch.set_float32_matmul_precision("high")  # TF32 where a product is in fp32
autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32)
if compile and ranks is not None and model.config.dropout > 0:
    log.line("not compiling: the dropout masks of real ranks come from a generator that they share")
elif compile:
    log.line("compiling the model (about a minute)")
    model.compile() if sharding is None else compile_blocks(model)
trained = data_parallel(model, processes, compile)
flops_per_iter, peak = model.flops_per_token(block_size) * tokens_per_iter, peak_flops(device, compute_dtype)


def estimate_losses() -> dict[str, float]:
    """Mean loss of fixed windows of both splits, the same for any number of processes."""
    model.eval()
    losses = {}
    for split in (data.train, data.val):
        batches = evaluation_batches(split, eval_iters * batch_size, batch_size, device, processes.dp_rank,
                                     processes.dp_size)
        with autocast:
            losses[split.name] = evaluate(model, batches, processes.dp_group)
    reshard(model)
    model.train()
    return losses


def save_checkpoint(step: int, evaluated: bool, val_loss: float | None, best: bool) -> None:
    """Copy everything that the run depends on and begin to write it; all processes take part.

    evaluated: whether the evaluation due at this step, if one is, was done; val_loss: that of this step.
    """
    started = time.perf_counter()
    if main:
        saver.wait()  # before there is a second copy in memory
    model.align_replicas(optimizer)
    tensors = checkpoint.snapshot(model, optimizer, device, shared_generator, group)
    if main:
        state = {"sample": loader.sample, "epoch": loader.epoch, "seed": seed, "evaluated": evaluated,
                 "val_loss": val_loss, "best_val_loss": best_val_loss, "world_size": processes.world_size,
                 "tp_processes": tp_processes, "scaler": scaler.state_dict(),
                 "model": checkpoint.model_description("reduced_sync_gpt", model),
                 "schedule": checkpoint.schedule_description(model), "config": config,
                 "data": data.fingerprint, "meta": data.meta, "environment": where}
        saver.save(step, tensors, state, best, started)


def end_run(status: str) -> None:
    """Let what is being written be written, and end the logs; also if an error ends the run."""
    loader.close()
    saver.wait()
    log.status(status, it, max_iters=max_iters, best_val_loss=best_val_loss)
    log.close(status=status, step=it, best_val_loss=best_val_loss, tokens=it * tokens_per_iter)


def due(interval: int) -> bool:
    """Whether what happens every so many iterations is to be done before update `it`."""
    return interval > 0 and not done and (it % interval == 0 or it == max_iters)


if eval_only:
    losses = estimate_losses()
    log.line(f"step {first_iter}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
    finish(processes)
    raise SystemExit(0)

# training loop
checkpoint.seed_random_states(seed + processes.rank)  # dropout differs between processes
shared_generator = None  # but for the masks that all ranks of a model have in common
if ranks is not None:
    shared_generator = model.share_dropout(seed, processes.dp_rank, device)
with autocast:
    settle_buckets(trained, (batch_size, block_size), device, shared_generator)
loader = DataLoader(data.train, batch_size, micro_steps, model.config.vocab_size, seed, device,
                    processes.dp_rank, processes.dp_size, sample=first_sample)
if resumed is not None:
    checkpoint.resume_random_states(resumed, processes, tp_processes, shared_generator, log.line)
saver = checkpoint.Saver(out_dir, keep_checkpoints, (resumed.step,) if same_run else (), log)
signals, stopping, status, problem = StopSignal(group), False, "finished", None
epoch, it, stopwatch = loader.epoch, first_iter, Stopwatch()
before_exit.append(lambda: end_run(status if status == "non_finite" else "failed"))
log.begin(first_iter, max_iters)
for it in range(first_iter, max_iters + 1):
    lr = learning_rate
    if decay_lr:
        lr = cosine_learning_rate(it, learning_rate, min_lr, warmup_iters, lr_decay_iters)
    set_learning_rate(optimizer, lr)

    # what is due before update `it`, but for what was done there before the checkpoint resumed from
    done, saved_here = it == first_iter and evaluated, it == first_iter and same_run
    val_loss, problem = None, None
    stopwatch.pause()
    if due(eval_interval) and not stopping:
        model.align_replicas(optimizer)
        losses = estimate_losses()
        log.evaluation(it, losses["train"], losses["val"], lr)
        val_loss = losses["val"]
        if not math.isfinite(losses["train"] + val_loss):
            problem = f"the train loss is {losses['train']}, the val loss {val_loss}"
            break
    whole = None
    if (due(sample_interval) or due(hellaswag_interval)) and not stopping:
        whole = checkpoint.unsharded(model, "reduced_sync_gpt", compute_dtype, device)
    if due(sample_interval) and not stopping and processes.dp_rank == 0:
        with autocast:
            log.sample(it, sample_text(whole, tokenizer, sample_prompt, sample_tokens, seed))
    if due(hellaswag_interval) and not stopping:
        with autocast:
            result = hellaswag.accuracy(whole, examples, batch_size, device, processes.dp_rank,
                                        processes.dp_size, processes.dp_group, signals.received_anywhere)
        stopping = result is None
        if not stopping:
            log.hellaswag(it, **result)
    whole = None
    if stopping:  # what is due here and not done is done by who goes on
        if not saved_here:
            save_checkpoint(it, not any(map(due, (eval_interval, sample_interval, hellaswag_interval))), None,
                            False)
        status = "interrupted"
        break
    improved = val_loss is not None and val_loss < best_val_loss
    if improved:
        best_val_loss = val_loss
    if it > 0 and (improved or (due(eval_interval) and always_save_checkpoint)
                   or (due(checkpoint_interval) and not saved_here)):
        save_checkpoint(it, True, val_loss, improved)
    if any(map(due, (eval_interval, checkpoint_interval))) or it == first_iter:
        log.status("running", it, max_iters=max_iters, best_val_loss=best_val_loss)
    stopwatch.go_on()
    if due(eval_interval) and it >= stop_step and val_loss > stop_loss:
        log.line(f"stopped: val loss {val_loss:.4f} at step {it} is above {stop_loss} ({stop_if=})")
        status = "stopped"
        break
    if it == max_iters:
        break

    # forward and backward; the loss of an update is the mean over its micro-batches and processes
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = loader.next()
        average_gradients(trained, micro_step == micro_steps - 1)  # over processes once an update
        with autocast:
            _, loss = trained(x, y)
        scaler.scale(loss / micro_steps).backward()
        loss_sum += loss.detach()

    # update, unless a loss or a gradient is not finite anywhere (float16's scaler skips what overflows)
    model.reduce_partial_gradients()
    scaler.unscale_(optimizer)
    norm = clip_gradients(model.parameters(), grad_clip, model.split_parameters(), processes.tp_group)
    loss_sum, norm, stopping = agree(loss_sum, norm, signals.received > 0, processes)  # waits for the device
    train_loss = loss_sum / gradient_accumulation_steps
    if not math.isfinite(train_loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        problem = f"the loss is {train_loss} and the gradient's norm {norm}"
        break
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)

    seconds = stopwatch.lap()
    mfu = None if peak is None else flops_per_iter / seconds / (peak * processes.world_size)
    log.iteration(it, train_loss, lr, norm, seconds, tokens_per_iter, mfu, loader.epoch, peak_memory(device),
                  line=it % log_interval == 0)
    for message in epoch_messages(data.train, epoch, loader.epoch):
        log.line(message)
    epoch = loader.epoch
    saver.poll()

if problem is not None:
    status = "non_finite"
    raise UserError(f"{problem} at iteration {it}: no update was made with that and no checkpoint has it; go "
                    f"on from an earlier one (--list_checkpoints shows them) with --resume=STEP and a lower "
                    f"learning_rate")
on_main(lambda: saver.wait(final=True), group)
if status == "interrupted":
    log.line(f"interrupted at step {it}: go on with --resume=latest")
end_run(status)
finish(processes)
