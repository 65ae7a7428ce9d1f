"""Convert models between this repository's checkpoints and the files of other programs.

nanoGPT's checkpoint becomes an out_dir that train.py resumes; its meta.pkl becomes a meta.json:
$ python convert.py nanoGPT/out/ckpt.pt out-mine --dataset=shakespeare_char
$ python train.py out-mine/settings.py --out_dir=out-mine --resume=latest
$ python convert.py nanoGPT/data/mine/meta.pkl data/mine

A checkpoint becomes a folder of Hugging Face's transformers, and the other way round:
$ python convert.py out-mine my-gpt2
$ python convert.py my-gpt2 out-again

No code of a file runs: ckpt.pt is loaded with weights_only=True, and meta.pkl may hold dict, str and int
only. models/conversion.py has the table of formats, docs/converting.md what is kept.
"""

import os

from configurator import Parser
from nanosync.errors import UserError
from nanosync.files import check_can_write, made_folder, os_error_as_user_error, write_json


def convert_vocabulary(path: str, folder: str) -> None:
    """Write the meta.json of a meta.pkl. Raises UserError."""
    from nanosync.nanogpt_files import read_vocabulary

    meta, target = read_vocabulary(path), os.path.join(folder, "meta.json")
    if os.path.lexists(target):
        raise UserError(f"{target} exists: remove it first, or name another folder")
    check_can_write(folder, "OUT")
    with made_folder(folder), os_error_as_user_error(f"cannot write {target}"):
        write_json(target, meta)
    print(f"written: {target}, {meta['vocab_size']} characters")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("input", metavar="INPUT", help="what to convert: its format is told from its name")
    parser.add_argument("out", metavar="OUT", help="a new folder; of a meta.pkl also an existing one")
    parser.add_argument("--to", metavar="FORMAT", help="'huggingface' or 'checkpoint'; by default the "
                        "other of these two")
    parser.add_argument("--step", help="of an out_dir with checkpoints: 'best' (default), 'latest' or a step")
    parser.add_argument("--dataset", help="data set that the model was trained on: a folder in data/, or a "
                        "path; it has the tokenizer")
    parser.add_argument("--moments", choices=("keep", "new"), help="'new': leave AdamW's moments of "
                        "nanoGPT out")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("step", "dataset", "moments")}
    given = {name: value for name, value in options.items() if value is not None}
    if args.input.endswith(".pkl"):
        if args.to is not None or given:
            raise UserError(f"{args.input} is a vocabulary, which becomes a meta.json: give INPUT and OUT "
                            f"only")
        return convert_vocabulary(args.input, args.out)

    from models import conversion  # after the arguments are checked, as PyTorch takes seconds to import

    writable = [name for name, known in conversion.FORMATS.items() if known.write is not None]
    if args.to not in (None, *writable):
        raise UserError(f"--to={args.to} is not a format that is written: use {' or '.join(writable)}")
    to, notes = conversion.convert(args.input, args.out, args.to, conversion.Options(**given))
    print("\n".join(notes))
    print(f"written: {args.out}, {conversion.FORMATS[to].title}")


if __name__ == "__main__":
    main()
