# Sync-Point Drop, but with syncs after attention in the first and last three layers: 18 of 24 all-reduces.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_selective_18sync.py

from config.reduced_sync_base import *

out_dir = "out-selective-18sync"
wandb_run_name = "selective-18sync"
sync_strategy = "selective"
attn_sync_layers = [0, 1, 2, 9, 10, 11]
