"""Tiny Shakespeare by characters: 1,003,854 train and 111,540 val tokens, 65 symbols, nanoGPT's ids.

    python data/shakespeare_char/prepare.py [--input=FILE]
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from data.tinyshakespeare import prepare

if __name__ == "__main__":
    prepare(HERE, __doc__, "char", (1_003_854, 111_540))
