"""The steps in the files that wandb writes without a network: a killed run's newest steps are not in them.

A .wandb file is a log in the format of LevelDB: blocks of 32 KB with records, each with a header of 7 bytes
(CRC, length, kind). A record that does not fit into a block is divided. The first block begins with 7 bytes
of wandb's own.
"""

import glob
import os
import struct

from nanosync.files import open_regular

BLOCK, HEADER, MAGIC = 1 << 15, 7, b":W&B"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # kinds of a piece of a record


def next_step(out_dir: str, run_id: str) -> int | None:
    """Return the first step that the files of a wandb run lack, None if the files cannot be read."""
    pattern = os.path.join(glob.escape(out_dir), "wandb", f"*run-*-{run_id}", f"run-{run_id}.wandb")
    steps = [-1]
    try:
        from wandb.proto.wandb_internal_pb2 import Record

        for path in glob.glob(pattern):
            for data in records(path):
                record = Record.FromString(data)
                if record.WhichOneof("record_type") == "history":
                    steps.append(record.history.step.num)
    except Exception:  # any type; the format is wandb's own and may change
        return None
    return max(steps) + 1


def records(path: str):
    """Yield the records of a .wandb file, up to one that a kill cut off. Raises OSError or ValueError."""
    with open_regular(path) as f:
        head = f.read(HEADER)
        if head and not head.startswith(MAGIC):
            raise ValueError(f"{path} is not a .wandb file")
        record = b""
        while True:
            left = BLOCK - f.tell() % BLOCK
            if left < HEADER:
                f.seek(left, os.SEEK_CUR)  # padding
            header = f.read(HEADER)
            if len(header) < HEADER:
                return
            _, length, kind = struct.unpack("<IHB", header)
            piece = f.read(length)
            if len(piece) < length or kind not in (WHOLE, FIRST, MIDDLE, LAST):
                return
            record = piece if kind in (WHOLE, FIRST) else record + piece
            if kind in (WHOLE, LAST):
                yield record
