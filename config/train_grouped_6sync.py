# One all-reduce every 2 layers: 6 of 24.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_6sync.py

from config.reduced_sync_base import *

out_dir = "out-grouped-6sync"
wandb_run_name = "grouped-6sync"
sync_strategy = "grouped"
layers_per_group = 2
