"""Train a GPT on one process or, under torchrun, on many: with data parallelism (DDP), with sharded optimizer
state (ZeRO-1), with everything sharded (FSDP), on tensor-parallel ranks.

One process:
$ python train.py config/train_python_char.py

Tensor-parallel ranks that synchronise less often, simulated, and on 4 GPUs as 2 models of 2 GPUs each:
$ python train.py config/train_shakespeare_char_spd.py
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_distributed.py --tp_processes=2

4 GPUs on one machine:
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py --use_fsdp --fsdp_min_num_params=4e7

2 machines of 8 GPUs; run the first command on the machine with the address 10.0.0.1, the second on the other:
$ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 train.py config/train_gpt2.py
$ torchrun --nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 train.py config/train_gpt2.py

The settings and the structure of this file follow nanoGPT's train.py. nanoGPT's config files run unchanged.
"""

import torch

import models
from configurator import check_choice, configure
from nanosync import training_setup as setup
from nanosync.batch_size import settle_batch_size
from nanosync.dataloader import DataLoader, open_dataset
from nanosync.diagnose import profiled
from nanosync.distributed import env_rank
from nanosync.evaluations import prepare_evaluations
from nanosync.model_kind import schedule_description
from nanosync.optim import cosine_learning_rate, set_learning_rate
from nanosync.run import Run

# -----------------------------------------------------------------------------
# The defaults train GPT-2 (124M) on OpenWebText.
# output
out_dir = "out"  # folder for checkpoints and logs
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between log lines
eval_iters = 200  # batches of batch_size in an evaluation, over all processes
eval_only = False  # evaluate once and exit, without writing files
diagnose = 0  # profile so many steps after the first 10, print where their time goes, and exit
save_checkpoint = True  # False: write no checkpoint at all, if only the losses are of interest
always_save_checkpoint = True  # save at every evaluation; False: only if the val loss is the lowest so far
checkpoint_interval = 250  # iterations between further checkpoints, 0 for none
keep_checkpoints = 10  # number of checkpoints to keep, the newest; the best is kept as well
init_from = "scratch"  # 'scratch', 'resume', 'gpt2', ..., 'gpt2-xl', or a folder of weights, also an out_dir
resume = ""  # 'latest', 'best', a step, a path of a checkpoint or an out_dir; 'auto': 'latest' or a new run
list_checkpoints = False  # print the checkpoints in out_dir and exit
# monitoring; log.txt and run_<time>.jsonl in out_dir are always written
sample_interval = 0  # iterations between generated samples of text, 0 for none
sample_prompt = "\n"
sample_tokens = 200
hellaswag_interval = 0  # iterations between HellaSwag evaluations, 0 for none; needs GPT-2's tokens
hellaswag_input = ""  # hellaswag_val.jsonl; '' downloads it into data/hellaswag
use_tensorboard = False  # also write out_dir/tensorboard
# wandb
wandb_log = False  # also log to Weights & Biases
wandb_mode = "online"  # 'online', or 'offline' for a later upload
wandb_project = "owt"
wandb_run_name = "gpt2"
# data
dataset = "openwebtext"  # a folder in data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-batches of an update, over all data-parallel models
batch_size: int | str = 12  # sequences of a micro-batch; 'auto': as many as fit, same tokens an iteration
block_size = 1024  # tokens of a sequence
document_mask = False  # attention does not cross documents; the data needs end-of-text tokens
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 is good for pretraining, 0.1 and more for finetuning
bias = False  # biases in Linear and LayerNorm
model_type = "gpt"  # 'gpt', or 'distributed_gpt': tensor-parallel ranks and a kind of block for each layer
tp_size = 2  # ranks of a distributed_gpt
block_types: list | None = None  # 'tp', 'spd' or 'parallel' for each layer, e.g. ['spd']*12; None: all 'tp'
# AdamW
learning_rate = 6e-4  # highest value of the schedule
max_iters = 600000  # number of updates
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient, 0 for no limit
# Muon
optimizer = "adamw"  # 'adamw', or 'muon' for the matrices of the blocks and AdamW for all other parameters
muon_learning_rate = 6e-4  # highest value, comparable with AdamW's; both follow the same schedule
muon_momentum = 0.95
# learning-rate schedule
decay_lr = True  # cosine from learning_rate to min_lr; False: constant
warmup_iters = 2000
lr_decay_iters = 600000  # about max_iters
min_lr = 6e-5  # about learning_rate / 10
# system
seed = 1337  # of initialisation, data order and dropout
device = "auto"  # 'auto' (cuda, else mps, else cpu), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto' (bfloat16 on CUDA, else float32), 'float32', 'bfloat16', 'float16' (scales the loss)
compile = True  # torch.compile the model
cuda_graphs = False  # launch each pass as a CUDA graph, on one GPU: faster for small models and batches
deterministic = False  # compute the same bits in every run on a GPU, too; slower
timeout = 600.0  # longest time that processes wait for each other, also while one is saving, in seconds
backend = "auto"  # 'auto' (nccl on CUDA, else gloo), 'nccl', 'gloo'
tp_processes = 1  # processes that hold the ranks of one model; 1 simulates them, under data parallelism
use_zero1 = False  # shard the optimizer's state over the data-parallel processes
use_fsdp = False  # shard parameters, gradients and the optimizer's state over them (FSDP2, ZeRO-3)
fsdp_min_num_params = 1e6  # FSDP gathers consecutive layers as one unit of at least so many parameters
fsdp_reshard_after_forward = True  # free gathered parameters; gather them again for the backward pass
fsdp_accumulate_sharded = False  # True: average gradients after every micro-step; less memory, slower
fsdp_cpu_offload = False  # keep and update sharded state in the CPU's memory
activation_checkpointing = "none"  # 'block', 'selective': recompute activations in the backward pass
use_triton: bool | str = "auto"  # LayerNorm as a Triton kernel; 'auto': on CUDA with Triton, without fp8
fp8: bool | str = False  # products of the blocks in FP8, on Hopper and later: True or 'emulated'
fp8_head = False  # with fp8: the head's products as well
fp8_weight_gradients = False  # with fp8: gradients of the blocks' weights as well
# -----------------------------------------------------------------------------
config = configure(globals(), rank=env_rank())


def check_settings(config: dict) -> None:
    """Raise UserError for wrong settings, before any work is done."""
    setup.check_training_settings(config)
    check_choice(config, "model_type", ("gpt", "distributed_gpt"))
    setup.check_dense(config)


check_settings(config)
parallel = setup.start_processes(config, models.KINDS)
processes, device = parallel.processes, parallel.processes.device

# a resumed checkpoint decides the architecture, and so the length of the data's windows
run = Run(config, processes, models.KINDS, own=("gpt", "distributed_gpt"))
setup.check_dense(config)
data = open_dataset(dataset, block_size)
run.check_data(data)
evaluations = prepare_evaluations(run, data)

# model and optimizer; the scaler does nothing unless the dtype is float16
model = models.model_for_training(run, model_type, parallel, evaluations)
optimizer = setup.build_optimizer(model, config, parallel)
scaler = torch.amp.GradScaler(device.type, enabled=parallel.dtype == torch.float16)
run.restore(model, optimizer, scaler)
settle_batch_size(run, model, optimizer, parallel)
run.open()
setup.describe_start(run, model, parallel)
if model_type == "distributed_gpt":
    run.line(f"synchronization points per forward pass: {model.syncs} (baseline {2 * model.config.n_layer}), "
             f"{model.config.tp_size} ranks on {tp_processes} process{'es' * (tp_processes > 1)}")
    run.log.event("schedule", **schedule_description(model))

trained, autocast, shared_generator = setup.prepare_training(run, model, parallel)
if eval_only:
    setup.evaluate_and_exit(run, model, autocast)

# training loop
micro_steps = gradient_accumulation_steps // processes.dp_size
tokens_per_iter = batch_size * block_size * gradient_accumulation_steps
loader = DataLoader(data.train, batch_size, micro_steps, model.config.vocab_size, seed, device,
                    processes.dp_rank, processes.dp_size, run.sample)
run.begin(loader, tokens_per_iter, model.flops_per_token(block_size) * tokens_per_iter, parallel.dtype,
          shared_generator, kind=model_type)
for it in profiled(run):
    lr = learning_rate
    if decay_lr:
        lr = cosine_learning_rate(it, learning_rate, min_lr, warmup_iters, lr_decay_iters)
    set_learning_rate(optimizer, lr)

    # evaluate and save what is due before this update
    if run.due(eval_interval):
        run.evaluated(setup.estimate_losses(run, model, autocast), lr)
    if due := [evaluation for evaluation in evaluations if run.due(evaluation.interval)]:
        with autocast:
            models.run_evaluations(due, model, model_type, parallel.dtype, device)
    if not run.proceed():
        break

    # forward and backward; the loss of an update is the mean over its micro-batches and processes
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = loader.next()
        parallel.sync(trained, now=micro_step == micro_steps - 1)  # one average over processes per update
        with autocast:
            _, loss = trained(x, y)
        scaler.scale(loss / micro_steps).backward()
        loss_sum += loss.detach()

    # update; the run ends if loss or norm is not finite (with float16 the scaler skips the update)
    model.reduce_partial_gradients()
    scaler.unscale_(optimizer)
    norm = parallel.clip(model, grad_clip, optimizer)
    loss, norm = run.agree(loss_sum, norm, gradient_accumulation_steps)  # waits for the device
    scaler.step(optimizer)
    scaler.update()
    # a CUDA graph reuses the memory of its gradients, so micro-steps add to gradients outside of it
    optimizer.zero_grad(set_to_none=not (config["cuda_graphs"] and micro_steps > 1))
    run.iteration(loss, lr, norm)
run.end()
