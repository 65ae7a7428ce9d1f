# GPT-2 (124M) on FineWeb-Edu, for 4 GPUs: five epochs of 10 billion tokens, with periodic evaluations and
# checkpoints. At 57,900 tok/s the run takes ten days; estimate_training_time.py computes the time at another
# speed.
# First: put the shards that build-nanogpt's fineweb.py writes into data/edu_fineweb10B. --dataset=fineweb10B
# trains on FineWeb itself, which data/cached_fineweb10B.py downloads.
# $ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2_improved.py

out_dir = "out-gpt2-improved"
dataset = "edu_fineweb10B"

# 32 sequences x 1024 tokens x 4 accumulation x 4 GPUs = 524,288 tokens an iteration, of 19,073 in an epoch
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 4 * 4

max_iters = 5 * 19073
lr_decay_iters = 5 * 19073
warmup_iters = 700

eval_interval = 500
eval_iters = 80  # 2.6 million tokens of each split
log_interval = 10
hellaswag_interval = 1000
sample_interval = 1000
use_tensorboard = True

checkpoint_interval = 250  # 38 minutes at that speed
keep_checkpoints = 10

weight_decay = 1e-1
