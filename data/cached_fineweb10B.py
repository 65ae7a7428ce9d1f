"""FineWeb 10B in GPT-2's tokens, ready-made: shards of 100M tokens (200 MB) from the Hugging Face hub.

    python data/cached_fineweb10B.py 9    # the first 9 train shards and the val shard, into data/fineweb10B

Without a number, all 103 train shards. Complete shards are kept, so the same command resumes a download.
"""

import contextlib
import glob
import os
import shutil
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from configurator import Parser  # noqa: E402
from data.token_writer import check_out, check_space  # noqa: E402
from nanosync.errors import UserError  # noqa: E402
from nanosync.files import made_folder, write_json  # noqa: E402
from nanosync.token_files import open_tokens  # noqa: E402

REPOSITORY, SHARDS, SHARD_MB = "kjj0/fineweb10B-gpt2", 103, 200


def is_whole(path: str) -> bool:
    """Return True if a shard exists and is as long as its header says."""
    try:
        open_tokens(path, "shards")
    except UserError:
        return False
    return True


def fetch(name: str, folder: str) -> None:
    """Download one shard, under a temporary name until it is complete. Raises UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # a failure is reported below, once
    path = os.path.join(folder, name)
    try:
        hf_hub_download(repo_id=REPOSITORY, repo_type="dataset", filename=name, local_dir=folder,
                        force_download=os.path.exists(path))
    except Exception as e:  # of huggingface_hub or its HTTP library
        raise UserError(f"could not download {name} of {REPOSITORY} ({type(e).__name__}): without a network, "
                        f"copy the shards to {folder}, or use python data/python_source/prepare.py "
                        f"--tokenizer=gpt2 --format=shards") from None
    open_tokens(path, "shards")


@contextlib.contextmanager
def no_traces(folder: str):
    """Remove the cache that huggingface_hub makes beside its downloads, unless it is older or holds a part of
    a file, from which a download resumes.
    """
    cache = os.path.join(folder, ".cache")
    existed = os.path.exists(cache)
    try:
        yield
    finally:
        parts = glob.glob(os.path.join(glob.escape(cache), "**", "*.incomplete"), recursive=True)
        if not existed and not any(map(os.path.getsize, parts)):
            shutil.rmtree(cache, ignore_errors=True)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("shards", nargs="?", type=int, default=SHARDS, help=f"train shards, 1 to {SHARDS}")
    parser.add_argument("--out", default=os.path.join(HERE, "fineweb10B"), help="folder (data/fineweb10B)")
    args = parser.parse_args()
    if not 1 <= args.shards <= SHARDS:
        raise UserError(f"{args.shards} shards: there are 1 to {SHARDS}")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    check_out(args.out, "fineweb", "gpt2", "shards")
    missing = [name for name in names if not is_whole(os.path.join(args.out, name))]
    print(f"{len(names)} shards, {len(missing)} to download: {len(missing) * SHARD_MB:,} MB to {args.out}")
    check_space(args.out, len(missing) * SHARD_MB * 1e6, "ask for fewer shards or ")
    with made_folder(args.out), no_traces(args.out):
        for i, name in enumerate(missing):
            print(f"[{i + 1}/{len(missing)}] {name}", flush=True)
            fetch(name, args.out)
        write_json(os.path.join(args.out, "meta.json"), {
            "name": "fineweb", "format": "shards", "tokenizer": "gpt2", "vocab_size": 50257,
            "dtype": "uint16", "source": f"https://huggingface.co/datasets/{REPOSITORY}"})
    print(f"{args.out}: {len(names) - 1} train shards and 1 val shard are there")


if __name__ == "__main__":
    main()
