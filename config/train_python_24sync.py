# Standard tensor parallelism on Python source: 24 all-reduces a forward pass.
# $ python train_reduced_sync.py config/train_python_24sync.py

from config.python_sync_base import *

out_dir = "out-python-24sync"
sync_strategy = "standard"
