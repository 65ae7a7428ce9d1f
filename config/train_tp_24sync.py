# Standard tensor parallelism: 24 all-reduces a forward pass, the function of the dense GPT-2.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_tp_24sync.py

from config.reduced_sync_base import *

out_dir = "out-tp-24sync"
wandb_run_name = "tp-24sync"
sync_strategy = "standard"
