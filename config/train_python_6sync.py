# One all-reduce every 2 layers, on Python source: 6 of 24.
# $ python train_reduced_sync.py config/train_python_6sync.py

from config.python_sync_base import *

out_dir = "out-python-6sync"
sync_strategy = "grouped"
layers_per_group = 2
