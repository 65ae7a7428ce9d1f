"""Tiny Shakespeare (1.1 MB): the common part of data/shakespeare_char and data/shakespeare."""

import os

from configurator import Parser
from data.corpus import Plan, prepare_corpus
from data.corpus_encoding import check_tokenizer
from data.corpus_inputs import TextFile
from data.token_writer import check_out, is_published
from nanosync.errors import UserError
from nanosync.files import fetch, made_folder, replace_file

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def prepare(folder: str, description: str, tokenizer: str, tokens: tuple[int, int]) -> None:
    """Run the command line of a prepare.py: get the text, split it 90/10 as nanoGPT does, write the data set.

    tokenizer: as in data/prepare.py. tokens: train and val tokens of tiny Shakespeare, by which a complete
    data set is known without its text. Raises UserError.
    """
    parser = Parser(description)
    parser.add_argument("--input", help="a text file, instead of the download")
    parser.add_argument("--out", default=folder, help="folder of the data set (this one)")
    args = parser.parse_args()
    name = os.path.basename(folder)
    check_out(args.out, name, tokenizer, "bin")
    counts = dict(zip(("train_tokens", "val_tokens"), tokens))
    if args.input is None and is_published(args.out, tokenizer=tokenizer, **counts):
        print(f"{args.out} is up to date")
        return
    text = TextFile(args.input or download(os.path.join(args.out, "input.txt")), separator="")
    if text.size < 100:
        raise UserError(f"{text.path} has {text.size} bytes: too few to split into train and val")
    _, vocab_size = check_tokenizer(tokenizer)
    source = {"inputs": [URL if args.input is None else args.input]}
    prepare_corpus(Plan(name, args.out, tokenizer, [[text]], [1.0], source, val_share=0.1,
                        vocab_size=vocab_size))


def download(path: str) -> str:
    """Return a path at which the text is, downloaded unless it is there. Raises UserError."""
    if not os.path.exists(path):
        content = fetch(URL, "give the file as --input=FILE, or use data/python_source, which needs none")
        with made_folder(os.path.dirname(path)):
            replace_file(path, content)
    return path
