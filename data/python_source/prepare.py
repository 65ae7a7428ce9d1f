"""Python source code of this machine as a data set: nothing is downloaded.

    python data/python_source/prepare.py    # the standard library, by characters
    python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards

Of files with equal content one is taken. A hash of the path inside the root orders the files and splits them
into train and val. So no file is in both, and the split is the same on every machine with the same files. The
characters are printable ASCII, tab and newline; all others become one unknown character. GPT-2's tokens need
tiktoken's files (TIKTOKEN_CACHE_DIR); a document then begins with <|endoftext|>.
"""

import hashlib
import multiprocessing
import os
import signal
import string
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass

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
from nanosync.files import expand_path, open_regular
from nanosync.tokenizers import GPT2_META, UNKNOWN, CharTokenizer, GPT2Tokenizer

NAME = "python_source"
CHARS = "\t\n" + "".join(sorted(c for c in string.printable if c >= " ")) + UNKNOWN  # 98 of them
TOKENS_PER_BYTE = {"char": 1.0, "gpt2": 0.49}  # of Python source, for the estimate
VAL_SHARE = 0.05
BATCH = 32  # documents that a worker encodes at a time


@dataclass(frozen=True)
class Document:
    """A Python file."""

    path: str
    name: str  # name of the root and path inside it: the place is a function of the name
    size: int  # bytes
    digest: str  # SHA-256 of the content

    @property
    def place(self) -> float:
        """A number in [0, 1) by which documents are ordered and split."""
        return int.from_bytes(hashlib.sha256(file_name_bytes(self.name)).digest()[:8], "big") / 2**64


def file_name_bytes(name: str) -> bytes:
    """Return the bytes of a file name, which need not be valid UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def find_roots(roots: str) -> dict[str, str]:
    """Return the folder of each root by its name. Raises UserError.

    roots: 'stdlib', 'site-packages' and folders, comma-separated.
    """
    paths = sysconfig.get_paths()
    known = {"stdlib": paths["stdlib"], "site-packages": paths["purelib"]}
    found, folders = {}, {}
    for root in map(expand_path, filter(None, roots.split(","))):
        if not os.path.isdir(known.get(root, root)):
            raise UserError(f"--roots: {root!r} is neither stdlib, site-packages nor a folder")
        if root in known:
            found[root] = known[root]
        else:
            folders[os.path.abspath(root).replace(os.sep, "/")] = root
    for path, folder in folders.items():
        found[root_name(path, [p for p in folders if p != path], known)] = folder
    if not found:
        raise UserError("--roots is empty: name stdlib, site-packages or folders")
    return found


def root_name(path: str, others: list[str], taken: Collection[str]) -> str:
    """Return the last part of a path, with as many parts before it as distinguish it from other paths."""
    parts = path.split("/")
    for n in range(1, len(parts) + 1):
        name = "/".join(parts[-n:])
        if name not in taken and not any(f"/{other}".endswith(f"/{name}") for other in others):
            break
    return name


def find_documents(roots: dict[str, str]) -> list[Document]:
    """Return all *.py files in UTF-8 below the roots, each content once, in the order of their places."""
    documents, seen = [], set()
    for root, folder in roots.items():
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(f for f in folders
                                if f != "__pycache__" and not (root == "stdlib" and f.endswith("-packages")))
            for file in sorted(f for f in files if f.endswith(".py")):
                path = os.path.join(parent, file)
                content = read_source(path)
                digest = hashlib.sha256(content.encode()).hexdigest()
                if content and digest not in seen:
                    seen.add(digest)
                    name = f"{root}/{os.path.relpath(path, folder)}".replace(os.sep, "/")
                    documents.append(Document(path, name, len(content.encode()), digest))
    return sorted(documents, key=lambda d: d.place)


def read_source(path: str) -> str:
    """Return the text of a file; '' if it cannot be read as UTF-8."""
    try:
        with open_regular(path, "r", encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError):
        return ""


def make_tokenizer(name: str):
    """Return the tokenizer of --tokenizer."""
    return CharTokenizer(CHARS) if name == "char" else GPT2Tokenizer()


def _start_worker(name: str):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends the workers
    global _tokenizer
    _tokenizer = make_tokenizer(name)


def _encode(paths: list[str]) -> tuple[np.ndarray, int]:
    """Return the tokens of some documents: <|endoftext|> before each, or, if the tokenizer has none, blank
    lines after each; and the bytes of their text."""
    parts, size = [], 0
    for path in paths:
        text = read_source(path)
        if _tokenizer.eot_token is None:
            text = text.rstrip("\n") + "\n\n\n"
        else:
            parts.append(np.array([_tokenizer.eot_token], np.uint16))
        parts.append(_tokenizer.encode_ordinary(text))
        size += len(text.encode())
    return np.concatenate(parts), size


def write_split(writer: TokenWriter, documents: list[Document], tokenizer: str, workers: int) -> float:
    """Encode the documents in parallel and write them in order. Return the bytes of text a token."""
    from tqdm import tqdm

    paths, size = [d.path for d in documents], 0
    batches = [paths[i:i + BATCH] for i in range(0, len(paths), BATCH)]
    with multiprocessing.Pool(workers, _start_worker, (tokenizer,)) as pool:
        encoded = pool.imap(_encode, batches)
        for tokens, n_bytes in tqdm(encoded, total=len(batches), desc=f"{writer.split:5}", unit="batch",
                                    disable=None):
            writer.write(tokens)
            size += n_bytes
    return size / (writer.total - len(paths) * (tokenizer != "char"))  # without <|endoftext|>


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--roots", default="stdlib", help="stdlib, site-packages, folders; comma-separated")
    parser.add_argument("--tokenizer", default="char", choices=["char", "gpt2"])
    parser.add_argument("--format", default="bin", choices=["bin", "shards"])
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard (100,000,000)")
    parser.add_argument("--out", default=HERE, help="folder of the data set (this one)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    args = parser.parse_args()
    if args.shard_tokens < 1 or args.workers < 1:
        raise UserError("--shard_tokens and --workers must be at least 1")

    check_out(args.out, NAME, args.tokenizer, args.format)
    if not os.path.exists(os.path.join(args.out, "meta.json")):
        make_tokenizer(args.tokenizer)  # its files are there, or an error says how to get them
    documents = find_documents(find_roots(args.roots))
    train = [d for d in documents if d.place >= VAL_SHARE]
    val = [d for d in documents if d.place < VAL_SHARE]
    if not train or not val:
        raise UserError(f"{len(documents)} Python files below {args.roots} are too few to split into train "
                        f"and val")
    size = sum(d.size for d in documents)
    tokens = size * TOKENS_PER_BYTE[args.tokenizer]
    print(f"{len(documents):,} files, {size / 1e6:,.1f} MB of source: about {tokens / 1e6:,.1f}M tokens, "
          f"{2 * tokens / 1e6:,.1f} MB to write to {args.out}", flush=True)

    contents = b"".join(file_name_bytes(d.name) + d.digest.encode() for d in documents)
    meta = {"format": args.format, **(CharTokenizer(CHARS).meta() if args.tokenizer == "char" else GPT2_META),
            "source": {"roots": args.roots, "files": len(documents),
                       "digest": hashlib.sha256(contents).hexdigest()}}
    if args.format == "shards":
        meta["source"]["shard_tokens"] = args.shard_tokens
    if is_published(args.out, **meta):
        print(f"{args.out} is up to date")
        return
    check_space(args.out, 2.2 * tokens)
    shard_tokens = args.shard_tokens if args.format == "shards" else None
    with dataset_writers(args.out, NAME, shard_tokens) as (train_writer, val_writer):
        ratios = {writer.split: write_split(writer, documents, args.tokenizer, args.workers)
                  for writer, documents in ((val_writer, val), (train_writer, train))}
        meta["bytes_per_token"] = ratios
        publish_dataset(args.out, {"name": NAME, **meta}, train_writer, val_writer)


if __name__ == "__main__":
    main()
