"""Write a data set of another one's most frequent tokens: python small_vocabulary.py data/python_source OUT

OUT has the first 30M train and 2M val tokens of shards in GPT-2's tokens. The 4,094 most frequent tokens keep
an id, all others share one, and the last one is <|endoftext|>. `train_gpt_fast.py --dataset=OUT` reads it.
"""

import glob
import json
import os
import sys

import numpy as np

HEADER, V, END_OF_TEXT = 512, 4096, 50256  # uint16s of a shard before its tokens; ids
TOKENS = {"train": 30_000_000, "val": 2_000_000}


def main() -> None:
    source, out = sys.argv[1:]
    os.makedirs(out, exist_ok=True)
    new = np.full(65536, V - 2, dtype=np.uint16)
    for split, count in TOKENS.items():
        path = sorted(glob.glob(f"{source}/*_{split}_*.bin"))[0]
        data = np.fromfile(path, np.uint16, HEADER + count)
        header, tokens = data[:HEADER].copy(), data[HEADER:]
        if split == "train":
            order = np.argsort(-np.bincount(tokens, minlength=65536), kind="stable")
            new[order[order != END_OF_TEXT][:V - 2]] = np.arange(V - 2)
            new[END_OF_TEXT] = V - 1
        header.view(np.int32)[2] = len(tokens)
        with open(os.path.join(out, f"small_{split}_000000.bin"), "wb") as f:
            f.write(header.tobytes() + new[tokens].tobytes())
    with open(os.path.join(out, "meta.json"), "w", encoding="utf-8") as f:
        json.dump({"format": "shards", "name": "small", "tokenizer": "other", "vocab_size": V,
                   "end_of_text": V - 1, "dtype": "uint16"}, f)


if __name__ == "__main__":
    main()
