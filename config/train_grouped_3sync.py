# One all-reduce every 4 layers: 3 of 24.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_3sync.py

from config.reduced_sync_base import *

out_dir = "out-grouped-3sync"
wandb_run_name = "grouped-3sync"
sync_strategy = "grouped"
layers_per_group = 4
