"""How often the token after the longest match comes next: python match_statistics.py data/python_source

In the repository's root. The first 524,288 val tokens of shards in GPT-2's tokens.
"""

import glob
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.getcwd())

from kernels.interval_attention import first_visible
from nanosync.ngram_features import LEVELS, suffix_matches


def main() -> None:
    path = sorted(glob.glob(f"{sys.argv[1]}/*_val_*.bin"))[0]
    ids = torch.from_numpy(np.fromfile(path, np.uint16)[512:][:524288 + 1].astype(np.int64))[None]
    idx, following = ids[:, :-1], ids[:, 1:]
    token, level = suffix_matches(idx, first_visible(idx, 50256))
    right = token == following
    for i in range(LEVELS + 1):
        at = level == i
        print(f"level {i}: {at.float().mean():.3f} of the tokens, right in {right[at].float().mean():.3f}")
    print(f"a match and right: {(right & (level > 0)).float().mean():.3f} of the tokens")


if __name__ == "__main__":
    main()
