"""Import in the fork server what its processes need, before it forks the first of them."""

import gc
import importlib
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(FOLDER), FOLDER]

for name in ("helpers", "pytest", "torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp",
             "safetensors.torch", "scipy.stats", "matplotlib.pyplot", "models", "nanosync.training_setup",
             "nanosync.step_clock"):
    importlib.import_module(name)

# A garbage collection writes to each object that it visits, and a forked process then copies the memory.
gc.collect()
gc.freeze()
