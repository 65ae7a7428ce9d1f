# Settings that the other train_*sync.py configs share: GPT-2 (124M) on OpenWebText for 20,000 steps of 0.49M
# tokens, 9.8 billion tokens. For 8 GPUs, or any number that divides 40. The TP ranks are simulated, so the
# GPUs run plain data parallelism.
# First: python data/openwebtext/prepare.py

dataset = "openwebtext"
wandb_project = "reduced-sync"

# 12 sequences x 1024 tokens x 40 accumulation over all GPUs = 491,520 tokens a step
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 40

max_iters = 20000
lr_decay_iters = 20000
warmup_iters = 700
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 500
eval_iters = 200
log_interval = 10

tp_size = 2
