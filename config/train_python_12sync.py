# Sync-Point Drop on Python source: 12 of 24 all-reduces.
# $ python train_reduced_sync.py config/train_python_12sync.py

from config.python_sync_base import *

out_dir = "out-python-12sync"
sync_strategy = "spd"
