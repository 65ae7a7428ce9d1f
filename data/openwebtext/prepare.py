"""OpenWebText in GPT-2's tokens: 8,013,769 documents, about 9.0B train and 4.4M val tokens (17 GB and 9 MB).

    python data/openwebtext/prepare.py                     # downloads parquet files from the Hugging Face hub
    python data/openwebtext/prepare.py --parquet=FOLDER    # or takes them from a folder

`datasets` keeps downloads and tokenised parts in its cache (54 GB and more), so a run that was cut off
resumes. Val is 0.05% of the documents with the seed of nanoGPT. A document ends with <|endoftext|>, as
nanoGPT's do. Needs tiktoken's GPT-2 files: downloaded at first use, or in the folder that TIKTOKEN_CACHE_DIR
names.
"""

import glob
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import numpy as np

from configurator import UserError
from data.files import Parser, TokenWriter, is_published, publish_dataset
from data.tokenizers import GPT2Tokenizer

REPOSITORY, REVISION = "Skylion007/openwebtext", "refs/convert/parquet"  # the hub's own parquet export
TOKENS_PER_BYTE = 0.23  # of this text, for the estimate


def load(parquet: str | None, workers: int):
    """The documents as a `datasets` data set with a column `text`. Raises UserError."""
    from datasets import load_dataset

    try:
        if parquet is None:
            documents = load_dataset(REPOSITORY, revision=REVISION, split="train", num_proc=workers)
        else:
            files = sorted(glob.glob(os.path.join(glob.escape(parquet), "**", "*.parquet"), recursive=True))
            if not files:
                raise UserError(f"--parquet: no *.parquet files below {parquet!r}")
            documents = load_dataset("parquet", data_files=files, split="train",
                                     num_proc=min(workers, len(files)))
    except UserError:
        raise
    except Exception as e:  # of datasets, fsspec, pyarrow or the HTTP library
        reason = f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
        raise UserError(f"could not load OpenWebText ({reason}): without a network, give a folder of its "
                        f"parquet files as --parquet=FOLDER") from None
    if "text" not in documents.column_names:
        raise UserError(f"the parquet files have columns {documents.column_names}, not 'text'")
    return documents.select_columns(["text"])


def encode(example: dict) -> dict:
    """Ids of one document, closed by <|endoftext|>."""
    global _tokenizer
    _tokenizer = globals().get("_tokenizer") or GPT2Tokenizer()
    return {"ids": np.append(_tokenizer.encode_ordinary(example["text"]), np.uint16(_tokenizer.eot_token))}


def write(writer: TokenWriter, documents, rows: int = 4096) -> None:
    """Append the ids of all documents, some thousand at a time."""
    from tqdm import tqdm

    documents = documents.with_format("numpy")
    for start in tqdm(range(0, len(documents), rows), desc=f"writing {writer.split:5}", disable=None):
        writer.write(np.concatenate(documents[start:start + rows]["ids"]))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--parquet", help="a folder of parquet files with a column 'text', not the download")
    parser.add_argument("--out", default=HERE, help="folder of the data set (this one)")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() // 2),
                        help="processes (half the cores)")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    meta = {**GPT2Tokenizer().meta(), "source": args.parquet or f"{REPOSITORY}@{REVISION}"}
    if is_published(args.out, **meta):
        print(f"{args.out} is up to date (delete its meta.json to prepare it again)")
        return
    documents = load(args.parquet, args.workers)
    size = documents.data.nbytes
    tokens = size * TOKENS_PER_BYTE
    print(f"{len(documents):,} documents, {size / 1e9:,.2f} GB: about {tokens / 1e6:,.1f}M tokens, "
          f"{2 * tokens / 1e9:,.2f} GB to write to {args.out}")
    if len(documents) < 2:
        raise UserError(f"{len(documents)} document is too little to split into train and val")
    splits = documents.train_test_split(test_size=max(0.0005, 1.5 / len(documents)), seed=2357, shuffle=True)
    ids = splits.map(encode, remove_columns=["text"], num_proc=min(args.workers, len(splits["test"])),
                     desc="tokenising")
    os.makedirs(args.out, exist_ok=True)
    train, val = TokenWriter(args.out, "train"), TokenWriter(args.out, "val")
    write(val, ids["test"])
    write(train, ids["train"])
    publish_dataset(args.out, meta, train, val)


if __name__ == "__main__":
    main()
