"""Tiny Shakespeare in GPT-2's tokens: 301,966 for train and 36,059 for val, as in nanoGPT.

    python data/shakespeare/prepare.py [--input=FILE]

Needs tiktoken's GPT-2 files: downloaded at first use, or in the folder that TIKTOKEN_CACHE_DIR names.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from data.tinyshakespeare import prepare

if __name__ == "__main__":
    prepare(HERE, __doc__, "gpt2", (301_966, 36_059))
