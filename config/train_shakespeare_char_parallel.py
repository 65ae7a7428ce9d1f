# Tiny Shakespeare by characters with a single all-reduce, after the last layer.
# First: python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_parallel.py

from config.train_shakespeare_char import *

out_dir = "out-shakespeare-char-parallel"
model_type = "distributed_gpt"
tp_size = 2
block_types = ["parallel"] * 6
