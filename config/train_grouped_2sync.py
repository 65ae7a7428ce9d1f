# One all-reduce every 6 layers: 2 of 24.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_2sync.py

from config.reduced_sync_base import *

out_dir = "out-grouped-2sync"
wandb_run_name = "grouped-2sync"
sync_strategy = "grouped"
layers_per_group = 6
