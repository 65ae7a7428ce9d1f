# GPT-2 (124M) on OpenWebText with blocks of all three kinds: 8 + 4 + 1 = 13 all-reduces, instead of 24.
# Simulated TP ranks on 8 GPUs. --tp_processes=2 runs each model on a pair of GPUs.
# First: python data/openwebtext/prepare.py
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_distributed.py

from config.train_gpt2 import *

out_dir = "out-gpt2-distributed"
wandb_run_name = "gpt2-124M-distributed"

model_type = "distributed_gpt"
tp_size = 2
block_types = ["tp"] * 4 + ["spd"] * 4 + ["parallel"] * 4
