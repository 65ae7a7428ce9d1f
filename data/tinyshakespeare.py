"""Tiny Shakespeare (1.1 MB): the common part of data/shakespeare_char and data/shakespeare."""

import os

from configurator import Parser
from data.token_writer import check_out, dataset_writers, is_published, publish_dataset
from nanosync.errors import UserError
from nanosync.files import (
    decode_text,
    fetch,
    made_folder,
    open_regular,
    os_error_as_user_error,
    replace_file,
)
from nanosync.token_files import DTYPES, dtype_for

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def prepare(folder: str, description: str, tokenizer_name: str, tokens: tuple[int, int],
            make_tokenizer) -> None:
    """Run the command line of a prepare.py: get the text, split it 90/10 as nanoGPT does, write train.bin and
    val.bin.

    tokens: train and val tokens of tiny Shakespeare, by which a complete data set is known without its text.
    make_tokenizer: a function from the text to a tokenizer. Raises UserError.
    """
    parser = Parser(description)
    parser.add_argument("--input", help="a text file, instead of the download")
    parser.add_argument("--out", default=folder, help="folder of the data set (this one)")
    args = parser.parse_args()
    name = os.path.basename(folder)
    check_out(args.out, name, tokenizer_name, "bin")
    counts = dict(zip(("train_tokens", "val_tokens"), tokens))
    if args.input is None and is_published(args.out, tokenizer=tokenizer_name, **counts):
        print(f"{args.out} is up to date")
        return
    text = read_text(args.input or os.path.join(args.out, "input.txt"), download=args.input is None)
    if len(text) < 100:
        raise UserError(f"the text has {len(text)} characters: too few to split into train and val")
    tokenizer = make_tokenizer(text)
    dtype = dtype_for(tokenizer.vocab_size)
    print(f"{len(text):,} characters: at most {DTYPES[dtype].itemsize * len(text) / 1e6:.1f} MB of tokens to "
          f"write to {args.out}")
    cut = int(len(text) * 0.9)
    with dataset_writers(args.out, dtype=dtype) as (train, val):
        train.write(tokenizer.encode_ordinary(text[:cut]))
        val.write(tokenizer.encode_ordinary(text[cut:]))
        if is_published(args.out, **tokenizer.meta(), train_tokens=train.total, val_tokens=val.total):
            print(f"{args.out} is up to date")
            return
        source = URL if args.input is None else "--input"
        publish_dataset(args.out, {"name": name, **tokenizer.meta(), "source": source}, train, val)


def read_text(path: str, download: bool) -> str:
    """Return the text of a file; with `download`, fetch a missing file first. Raises UserError."""
    if download and not os.path.exists(path):
        content = fetch(URL, "give the file as --input=FILE, or use data/python_source, which needs none")
        with made_folder(os.path.dirname(path)):
            replace_file(path, content)
    with os_error_as_user_error(f"cannot read {path}"), open_regular(path) as f:
        return decode_text(f.read(), path)
