# 9 of 24 all-reduces, chosen by hand.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_selective_9sync.py

from config.reduced_sync_base import *

out_dir = "out-selective-9sync"
wandb_run_name = "selective-9sync"
# After the MLP of layers 0 to 3, where the residual stream takes shape; of 5, 7 and 9, in pairs, where layers
# change it least; and of 10 and 11, so that the head sees nothing that was long pending.
sync_strategy = "custom"
sync_points = [1, 3, 5, 7, 11, 15, 19, 21, 23]
