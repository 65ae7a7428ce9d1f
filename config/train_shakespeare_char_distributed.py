# Tiny Shakespeare by characters on 2 simulated ranks that synchronise everywhere: the function of the dense
# model of as many heads. --tp_size=3, 4, 6 and 12 work, too.
# First: python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_distributed.py

from config.train_shakespeare_char import *

out_dir = "out-shakespeare-char-distributed"
n_head = 12  # 2, 3, 4, 6 and 12 TP ranks divide them; parameters and FLOPs are those of 6 heads
model_type = "distributed_gpt"
tp_size = 2
block_types = ["tp"] * 6
