# Tiny Shakespeare by characters with Sync-Point Drop in every layer.
# First: python data/shakespeare_char/prepare.py
# $ python train.py config/train_shakespeare_char_spd.py

from config.train_shakespeare_char import *

out_dir = "out-shakespeare-char-spd"
model_type = "distributed_gpt"
tp_size = 2
block_types = ["spd"] * 6
