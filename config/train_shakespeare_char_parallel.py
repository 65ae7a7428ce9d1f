# Tiny Shakespeare by characters with a single all-reduce, after the last layer.
# First: python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_parallel.py

from config.train_shakespeare_char import *

out_dir = "out-shakespeare-char-parallel"
n_head = 12  # 2, 3, 4, 6 and 12 TP ranks divide them; parameters and FLOPs are those of 6 heads
model_type = "distributed_gpt"
tp_size = 2
block_types = ["parallel"] * 6
