"""Import in the fork server what its processes need, before it forks the first of them."""

import gc
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(FOLDER), FOLDER]

import helpers  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.run  # noqa: F401

import models  # noqa: F401
import nanosync.step_clock
import nanosync.training_setup  # noqa: F401

# A garbage collection writes to each object that it visits, and a forked process then copies the memory.
gc.collect()
gc.freeze()
