# Sync-Point Drop: no all-reduce after attention, 12 of 24.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_spd_12sync.py

from config.reduced_sync_base import *

out_dir = "out-spd-12sync"
wandb_run_name = "spd-12sync"
sync_strategy = "spd"
