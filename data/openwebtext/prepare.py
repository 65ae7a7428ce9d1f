"""OpenWebText in GPT-2's tokens: 8,013,769 documents, about 9.0B train and 4.4M val tokens (18 GB and 9 MB).

    python data/openwebtext/prepare.py                     # downloads parquet files from the Hugging Face hub
    python data/openwebtext/prepare.py --parquet=FOLDER    # or takes them from a folder

`datasets` keeps downloads, text and tokenised parts in its cache (24 + 40 + 18 GB, below HF_HOME), so an
interrupted run resumes. Val is 0.05% of the documents, with nanoGPT's seed. A document ends with
<|endoftext|>, as in nanoGPT. Needs tiktoken's GPT-2 files: downloaded at first use, or in the folder that
TIKTOKEN_CACHE_DIR names.
"""

import glob
import hashlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

import numpy as np

from configurator import Parser
from data.token_writer import (
    TokenWriter,
    check_out,
    check_space,
    dataset_writers,
    is_published,
    publish_dataset,
)
from nanosync.errors import UserError
from nanosync.files import first_line, is_utf8, open_regular
from nanosync.tokenizers import GPT2_META, GPT2Tokenizer

NAME = "openwebtext"
REPOSITORY, REVISION = "Skylion007/openwebtext", "refs/convert/parquet"  # the hub's own parquet export
DOCUMENTS, TEXT_BYTES, DOWNLOAD_BYTES = 8_013_769, 39_769_491_688, 24_193_092_408  # from its card
TOKENS_PER_BYTE = 0.23  # for the estimate


def find_parquet(folder: str) -> list[str]:
    """Return the parquet files below a folder. Raises UserError if there is none."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.parquet"), recursive=True))
    if not files:
        raise UserError(f"--parquet: no *.parquet files below {folder!r}")
    unusable = [path for path in files if not is_utf8(path)]
    if unusable:
        raise UserError(f"--parquet: the name of {unusable[0]!r} is not valid UTF-8: rename it")
    return files


def survey(files: list[str], folder: str) -> tuple[int, int, dict]:
    """Return the documents and bytes of text that the footers of parquet files count, and a fingerprint by
    which a later run recognises the same files: a hash of names, sizes, and the last 64 KB with the footer.
    Raises UserError.
    """
    from pyarrow import ArrowException, parquet, types

    documents, text_bytes, digest = 0, 0, hashlib.sha256()
    for path in files:
        try:
            with open_regular(path) as f:
                footer = parquet.read_metadata(f)
                schema = footer.schema.to_arrow_schema()
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - (1 << 16)))
                digest.update(f"{os.path.relpath(path, folder)} {size}\n".encode() + f.read())
        except (OSError, ArrowException) as e:
            raise UserError(f"{path} is no whole parquet file ({first_line(e)}): get it again") from None
        text = schema.get_field_index("text")
        if text < 0 or not (types.is_string(schema.types[text]) or types.is_large_string(schema.types[text])):
            raise UserError(f"{path} has columns {schema.names}, and no 'text' of strings among them")
        documents += footer.num_rows
        for group in map(footer.row_group, range(footer.num_row_groups)):
            text_bytes += sum(column.total_uncompressed_size for column in map(group.column, range(
                group.num_columns)) if column.path_in_schema == "text")
    return documents, text_bytes, {"parquet_files": len(files), "digest": digest.hexdigest()}


def load(files: list[str] | None, workers: int):
    """Return the documents as a `datasets` data set with a column `text`. Raises UserError."""
    import datasets
    import huggingface_hub

    for logging in (datasets.logging, huggingface_hub.logging):
        logging.set_verbosity(logging.CRITICAL)  # a failure is reported below, once
    try:
        if files is None:
            documents = datasets.load_dataset(REPOSITORY, revision=REVISION, split="train", num_proc=workers)
        else:
            documents = datasets.load_dataset("parquet", data_files=files, split="train",
                                              num_proc=min(workers, len(files)))
    except Exception as e:  # of datasets, fsspec, pyarrow or the HTTP library
        cause = e.__cause__ or e
        reason = f"{type(cause).__name__}: {first_line(cause)[:120]}"
        if files is None:
            raise UserError(f"could not load OpenWebText ({reason}): without a network, give a folder of its "
                            f"parquet files as --parquet=FOLDER") from None
        raise UserError(f"could not load the parquet files ({reason}): get a damaged one again, and see that "
                        f"there is room in the cache of `datasets`") from None
    return documents.select_columns(["text"])


def encode(example: dict) -> dict:
    """Return the ids of one document, with <|endoftext|> at the end, and the bytes of its text."""
    global _tokenizer
    _tokenizer = globals().get("_tokenizer") or GPT2Tokenizer()
    ids = _tokenizer.encode_ordinary(example["text"] or "")  # null is an empty text
    return {"ids": np.append(ids, np.uint16(_tokenizer.eot_token)),
            "bytes": len((example["text"] or "").encode(errors="replace"))}


def write(writer: TokenWriter, documents, rows: int = 4096) -> float:
    """Append the ids of all documents, `rows` at a time. Return the bytes of text a token."""
    from tqdm import tqdm

    documents, size = documents.with_format("numpy"), 0
    for start in tqdm(range(0, len(documents), rows), desc=f"writing {writer.split:5}", disable=None):
        some = documents[start:start + rows]
        writer.write(np.concatenate(some["ids"]))
        size += int(some["bytes"].sum())
    return size / max(1, writer.total - len(documents))  # without <|endoftext|>


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--parquet", help="a folder of parquet files with a column 'text', for no download")
    parser.add_argument("--out", default=HERE, help="folder of the data set (this one)")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() // 2),
                        help="processes (half the cores)")
    args = parser.parse_args()
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    check_out(args.out, NAME, "gpt2", "bin")
    meta, files = GPT2_META, None
    if args.parquet is None:
        n_documents, text_bytes, source = DOCUMENTS, TEXT_BYTES, f"{REPOSITORY}@{REVISION}"
    else:
        files = find_parquet(args.parquet)
        n_documents, text_bytes, source = survey(files, args.parquet)
    if is_published(args.out, **meta, source=source):
        print(f"{args.out} is up to date (delete its meta.json to prepare it again)")
        return
    GPT2Tokenizer()  # its files are there, or an error says how to get them
    tokens, download = text_bytes * TOKENS_PER_BYTE, 0 if files else DOWNLOAD_BYTES
    cached = download + text_bytes + 2 * tokens
    print(f"{n_documents:,} documents, {text_bytes / 1e9:,.2f} GB of text: about {tokens / 1e6:,.1f}M "
          f"tokens, {2 * tokens / 1e9:,.2f} GB to write to {args.out}; {download / 1e9:,.2f} GB to "
          f"download, {cached / 1e9:,.2f} GB in the cache of `datasets`", flush=True)
    if n_documents < 2:
        raise UserError(f"{n_documents} document is too little to split into train and val")
    check_space(args.out, 2.2 * tokens)
    documents = load(files, args.workers)
    splits = documents.train_test_split(test_size=max(0.0005, 1.5 / len(documents)), seed=2357, shuffle=True)
    ids = splits.map(encode, remove_columns=["text"], num_proc=min(args.workers, len(splits["test"])),
                     desc="tokenising")
    with dataset_writers(args.out) as (train, val):
        ratios = {"val": write(val, ids["test"]), "train": write(train, ids["train"])}
        publish_dataset(args.out, {"name": NAME, **meta, "source": source, "bytes_per_token": ratios}, train,
                        val)


if __name__ == "__main__":
    main()
