# Finetune GPT-2 XL on tiny Shakespeare in GPT-2's tokens.
# First: python data/shakespeare/prepare.py
# Weights, gradients and moments take 25 GB of GPU memory (16 bytes per parameter), and activations more.
# --init_from=gpt2-medium or a smaller model needs less.

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"  # without a network: a folder with GPT-2 weights

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # save only the best: the model overfits within an epoch or two
wandb_project = "shakespeare"
wandb_run_name = f"ft-{time.time():.0f}"

# 1 sequence x 1024 tokens x 32 accumulation = 32,768 tokens an iteration, of 301,966 in an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
