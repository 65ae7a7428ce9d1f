# One all-reduce every 3 layers: 4 of 24.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_grouped_4sync.py

from config.reduced_sync_base import *

out_dir = "out-grouped-4sync"
wandb_run_name = "grouped-4sync"
sync_strategy = "grouped"
layers_per_group = 3
