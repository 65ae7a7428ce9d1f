"""Prepare a corpus as a data set: a folder of text or code, texts, JSON lines, parquet files, the hub.

    python data/prepare.py --input=my.txt --out=data/mine --tokenizer=char
    python data/prepare.py --input=src --files='*.py' --out=data/code --tokenizer=gpt2
    python data/prepare.py --input=web.jsonl.zst --input=wiki.parquet --weights=1,2 --out=data/mix \\
        --tokenizer=bpe:32000
    python data/prepare.py --input=hf:OWNER/NAME --field=text --out=data/hub --tokenizer=my/tokenizer.json

A file of a folder, a line of .jsonl, .jsonl.gz and .jsonl.zst, a row of .parquet and of the hub is a
document. In a text, <|endoftext|> or another --separator ends a document. A hash of its text decides on a
document's split. Of one text without a separator, the end is val. A weight is the number of times that train
has each document of an input: 0.5 takes half of them, 2 all of them twice. A run that was killed or
interrupted resumes when the same command runs again.
"""

import math
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from configurator import Parser  # noqa: E402
from data.corpus import Plan, prepare_corpus  # noqa: E402
from data.corpus_encoding import check_tokenizer, tokenizer_path  # noqa: E402
from data.corpus_inputs import HUB, open_input  # noqa: E402
from data.token_writer import check_out  # noqa: E402
from nanosync.errors import UserError, shown  # noqa: E402
from nanosync.files import sha256_of  # noqa: E402

FIELD, SEPARATOR = "text", "<|endoftext|>"
WORDS = ("_train_", "_val_")  # by which the reader of a folder knows the shards of a split


def parse_weights(text: str | None, number: int) -> list[float]:
    """Return the weights of `number` inputs. Raises UserError."""
    if text is None:
        return [1.0] * number
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights={text} is no list of numbers: write one an input, as in "
                        f"--weights=1,0.5") from None
    if len(weights) != number:
        raise UserError(f"--weights={text} are {len(weights)} weights of {number} inputs: give one an input")
    if not all(0 < weight <= 100 and math.isfinite(weight) for weight in weights):
        raise UserError(f"--weights={text}: a weight is above 0 and at most 100")
    return weights


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument("--input", action="append",
                        help="file, folder or hf:NAME[:CONFIGURATION[:SPLIT]]; may be repeated")
    parser.add_argument("--out", help="folder of the data set, such as data/mine")
    parser.add_argument("--tokenizer", default="gpt2",
                        help="gpt2 (default), char, byte, bpe:SIZE (trained on the text), or the path of a "
                             "tokenizer.json")
    parser.add_argument("--weights", help="a number an input (1 each)")
    parser.add_argument("--val_input", action="append", default=[],
                        help="input of which all documents are val; those of --input are train then")
    parser.add_argument("--val_share", type=float, help="of the documents (0.05), or of one text (0.1)")
    parser.add_argument("--field", help=f"of JSON lines, parquet and the hub: name of the text ({FIELD})")
    parser.add_argument("--separator", help=f"ends a document of a text ({SEPARATOR})")
    parser.add_argument("--files", help="pattern of the files of a folder (all), as '*.py'")
    parser.add_argument("--format", default="bin", choices=["bin", "shards"])
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard (100,000,000)")
    parser.add_argument("--name", help="of the data set (the last part of --out)")
    parser.add_argument("--report", default="full", choices=["full", "short"],
                        help="short: without copies and 13-grams, for which the text is read again")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one a core)")
    return parser.parse_args()


def check_used(args, sources: list) -> None:
    """Raise UserError for an option that no input uses."""
    if args.field is not None and not any(hasattr(source, "field") for source in sources):
        raise UserError(f"--field={args.field} is for JSON lines, parquet files and the hub, and no input is "
                        f"one: leave it out")
    if args.separator is not None and not any(hasattr(source, "separator") for source in sources):
        raise UserError(f"--separator={shown(args.separator)} ends documents of a text, and no input is "
                        f"a text: leave it out")


def main() -> None:
    args = parse_arguments()
    if not args.input or not args.out:
        raise UserError("give --input=FILE, FOLDER or hf:NAME, and --out=FOLDER (--help lists the options)")
    if args.shard_tokens < 1 or args.workers < 1:
        raise UserError("--shard_tokens and --workers must be at least 1")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise UserError(f"--val_share={args.val_share} must be above 0 and below 1")
    if args.separator == "":
        raise UserError("--separator is empty: leave it out, or give the text that ends a document")
    weights = parse_weights(args.weights, len(args.input))
    out = os.path.realpath(args.out)
    name = args.name or os.path.basename(out)
    ambiguous = args.format == "shards" and any(word in f"{name}_" for word in WORDS)
    if os.sep in name or name[:1] in ("", ".") or ambiguous:
        raise UserError(f"--name={shown(name)} cannot be the name of shards: give another --name")
    for spec in args.input + args.val_input:
        if not spec.startswith(HUB) and not os.path.exists(spec):
            raise UserError(f"{spec!r} does not exist: an input is a file, a folder or hf:NAME")
        if os.path.isdir(spec) and not args.files and f"{out}/".startswith(f"{os.path.realpath(spec)}/"):
            raise UserError(f"--out={args.out} is inside --input={spec}, whose files are all read: choose "
                            f"another --out, or name the files with --files")
    kind, vocab_size = check_tokenizer(args.tokenizer)
    check_out(args.out, name, kind, args.format)
    field, separator = args.field or FIELD, args.separator or SEPARATOR
    inputs, val_inputs = ([open_input(spec, field, separator, args.files) for spec in specs]
                          for specs in (args.input, args.val_input))
    check_used(args, [source for sources in inputs + val_inputs for source in sources])
    source = {"inputs": args.input, "weights": weights, "val_inputs": args.val_input, "field": field,
              "separator": separator, "format": args.format, "report": args.report}
    if tokenizer_path(args.tokenizer):
        source["tokenizer_sha256"] = sha256_of(tokenizer_path(args.tokenizer))
    plan = Plan(name, args.out, args.tokenizer, inputs, weights, source, val_inputs, args.val_share,
                vocab_size, args.shard_tokens if args.format == "shards" else None, args.workers,
                args.report == "full")
    prepare_corpus(plan)


if __name__ == "__main__":
    main()
