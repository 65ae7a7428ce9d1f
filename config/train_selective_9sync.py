# 9 of 24 all-reduces, chosen by hand.
# $ torchrun --standalone --nproc_per_node=8 train_reduced_sync.py config/train_selective_9sync.py

from config.reduced_sync_base import *

out_dir = "out-selective-9sync"
wandb_run_name = "selective-9sync"
# After the MLPs of layers 0 to 3, where the residual stream forms; of layers 5, 7 and 9, where layers change
# it least; and of layers 10 and 11, so that no sum is pending for long before the head.
sync_strategy = "custom"
sync_points = [1, 3, 5, 7, 11, 15, 19, 21, 23]
