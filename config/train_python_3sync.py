# One all-reduce every 4 layers, on Python source: 3 of 24.
# $ python train_reduced_sync.py config/train_python_3sync.py

from config.python_sync_base import *

out_dir = "out-python-3sync"
sync_strategy = "grouped"
layers_per_group = 4
