"""Python source code of this machine as a data set: nothing is downloaded.

    python data/python_source/prepare.py    # the standard library, by characters
    python data/python_source/prepare.py --roots=stdlib,site-packages --tokenizer=gpt2 --format=shards

Characters go to data/python_source, GPT-2's tokens to data/python_source_gpt2, so both can be there.
Of files with equal content one is taken. A hash of the path inside the root orders the files and splits them
into train and val. So no file is in both, and the split is the same on every machine with the same files. The
characters are printable ASCII, tab and newline; all others become one unknown character. GPT-2's tokens need
tiktoken's files (TIKTOKEN_CACHE_DIR); a document then begins with <|endoftext|>.
"""

import hashlib
import os
import string
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from configurator import Parser
from data.corpus import Plan, prepare_corpus
from data.corpus_documents import READERS
from data.corpus_documents import Document as CorpusDocument
from data.corpus_encoding import check_tokenizer
from data.corpus_inputs import Job
from data.token_writer import check_out
from nanosync.errors import UserError
from nanosync.files import expand_path, open_regular
from nanosync.tokenizers import UNKNOWN, CharTokenizer

NAME = "python_source"
CHARS = "\t\n" + "".join(sorted(c for c in string.printable if c >= " ")) + UNKNOWN  # 98 of them
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


class PythonFiles:
    """Files as an input of a corpus: see data/corpus_inputs.py."""

    def __init__(self, documents: list[Document], blank_lines: bool):
        """blank_lines: they end each document, as a tokenizer without an end-of-text token needs."""
        self.documents, self.blank_lines = documents, blank_lines
        self.size = sum(d.size for d in documents)
        contents = b"".join(file_name_bytes(d.name) + d.digest.encode() for d in documents)
        self.identity = hashlib.sha256(contents).hexdigest()

    def jobs(self) -> Iterator[Job]:
        """Yield some files each, of val and then of train, in the order of their places."""
        done = 0
        for split in ("val", "train"):
            paths = [d.path for d in self.documents if (d.place < VAL_SHARE) == (split == "val")]
            for start in range(0, len(paths), BATCH):
                done += len(paths[start:start + BATCH])
                yield Job("python", (paths[start:start + BATCH], self.blank_lines),
                          done / len(self.documents), split=split)


def read_files(paths: list[str], blank_lines: bool) -> Iterator[CorpusDocument]:
    """Yield the documents of a job."""
    for path in paths:
        text = read_source(path)
        yield CorpusDocument(text.rstrip("\n") + "\n\n\n" if blank_lines else text, kept=True)


READERS["python"] = read_files


def folder_of(tokenizer: str) -> str:
    """Return the folder of the data set without --out."""
    return HERE if tokenizer == "char" else f"{HERE}_{tokenizer}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--roots", default="stdlib", help="stdlib, site-packages, folders; comma-separated")
    parser.add_argument("--tokenizer", default="char", choices=["char", "gpt2"])
    parser.add_argument("--format", default="bin", choices=["bin", "shards"])
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard (100,000,000)")
    parser.add_argument("--out", help=f"folder of the data set (data/{NAME}, with gpt2 data/{NAME}_gpt2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    args = parser.parse_args()
    if args.shard_tokens < 1 or args.workers < 1:
        raise UserError("--shard_tokens and --workers must be at least 1")

    args.out = args.out or folder_of(args.tokenizer)
    check_out(args.out, NAME, args.tokenizer, args.format)
    if not os.path.exists(os.path.join(args.out, "meta.json")):
        check_tokenizer(args.tokenizer)  # its files are there, or an error says how to get them
    make(find_documents(find_roots(args.roots)), args.roots, args.tokenizer, args.out, args.workers,
         args.shard_tokens if args.format == "shards" else None)


def make(documents: list[Document], roots: str, tokenizer: str, out: str, workers: int,
         shard_tokens: int | None = None) -> None:
    """Write the data set of documents, unless it is there, and print what it holds. Raises UserError.

    roots, tokenizer: values of the options; out: folder; shard_tokens: None for flat files.
    """
    if len({d.place < VAL_SHARE for d in documents}) < 2:
        raise UserError(f"{len(documents)} Python files below {roots} are too few to split into train and "
                        f"val")
    files = PythonFiles(documents, blank_lines=tokenizer == "char")
    print(f"{len(documents):,} files below {roots}")
    source = {"roots": roots, "files": len(documents), "digest": files.identity}
    prepare_corpus(Plan(NAME, out, tokenizer, [[files]], [1.0], source, val_share=VAL_SHARE,
                        shard_tokens=shard_tokens, workers=workers, report=False, resumable=False,
                        vocab_size=len(CHARS), made=CharTokenizer(CHARS) if tokenizer == "char" else None))


if __name__ == "__main__":
    main()
