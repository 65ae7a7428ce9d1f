"""Write the first 20M train and 1M val tokens of shards: python small.py data/python_source OUT"""

import glob
import json
import os
import sys

import numpy as np

HEADER = 512  # uint16s of a shard before its tokens
TOKENS = {"train": 20_000_000, "val": 1_000_000}


def main() -> None:
    source, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    for split, count in TOKENS.items():
        path = sorted(glob.glob(f"{source}/*_{split}_*.bin"))[0]
        data = np.fromfile(path, np.uint16, HEADER + count)
        data[:HEADER].view(np.int32)[2] = len(data) - HEADER
        data.tofile(os.path.join(out, f"small_{split}_000000.bin"))
    with open(os.path.join(out, "meta.json"), "w", encoding="utf-8") as f:
        json.dump({"format": "shards", "name": "small", "tokenizer": "gpt2", "vocab_size": 50257,
                   "end_of_text": 50256, "dtype": "uint16"}, f)


if __name__ == "__main__":
    main()
