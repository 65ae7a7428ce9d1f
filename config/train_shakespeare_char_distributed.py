# Tiny Shakespeare by characters on 2 simulated ranks that synchronise everywhere: the dense model.
# First: python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_distributed.py

from config.train_shakespeare_char import *

out_dir = "out-shakespeare-char-distributed"
model_type = "distributed_gpt"
tp_size = 2
block_types = ["tp"] * 6
