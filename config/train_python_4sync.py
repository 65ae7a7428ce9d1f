# One all-reduce every 3 layers, on Python source: 4 of 24.
# $ python train_reduced_sync.py config/train_python_4sync.py

from config.python_sync_base import *

out_dir = "out-python-4sync"
sync_strategy = "grouped"
layers_per_group = 3
