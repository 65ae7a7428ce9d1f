# One all-reduce every 6 layers, on Python source: 2 of 24.
# $ python train_reduced_sync.py config/train_python_2sync.py

from config.python_sync_base import *

out_dir = "out-python-2sync"
sync_strategy = "grouped"
layers_per_group = 6
