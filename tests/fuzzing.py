"""Machinery of the fuzz tests: mutations of files, and a reader in a forked child with a time limit.

tests/fuzz.py and tests/fuzz_experiments.py have the good files and their readers.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from nanosync.errors import MAX_MESSAGE, UserError, one_line

SECONDS = 60.0  # limit of a case, also on a busy machine
REFUSED = "refused"
ODD_VALUES = [None, True, False, 0, -1, 1, 1.5, 2**31, 2**40, -2**70, 10**30, 10**400, 1e308, -0.0, "", "6",
              "\x00", "\x1b[2J", "\ud800", "x" * 10**5, [], [1], [[]] * 3, {}, {"a": {}}, [0] * 10**5]
ODD_TEXTS = [b"NaN", b"-Infinity", b"1e999", b"[" * 10**5, b"[" * 60 + b"]" * 60, b'{"a":1,"a":2}',
             b"9" * 5000, b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"\x00" * 100]


def mutate_bytes(content: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """Change some bytes: flip, overwrite, insert, delete, repeat, cut off. head: change the first bytes only.
    """
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        end = max(min(len(content), head or len(content)), 1)
        at, size = draw.randrange(end), draw.choice((1, 1, 2, 4, 8, 100))
        how = draw.randrange(7)
        if how == 0 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        elif how == 1:
            content[at:at + size] = draw.randbytes(size)
        elif how == 2:
            content[at:at] = draw.choice(ODD_TEXTS)
        elif how == 3:
            del content[at:at + size]
        elif how == 4:
            content[at:at] = content[at:at + size]
        elif how == 5:
            del content[draw.randrange(len(content) + 1):]
        else:
            number = draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            content[at:at + 8] = number.to_bytes(8, "little")
    return bytes(content)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """Change the text, or a value at any place of the structure: replace, delete, rename or add an entry."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places, stack = [], [value]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
        if not places:
            break
        node, key = draw.choice(places)
        how = draw.random()
        if how < 0.7:
            odd = [*ODD_VALUES, float("nan"), float("inf"), draw.randint(-10, 10**6)]
            node[key] = copy.deepcopy(draw.choice(odd))  # a later mutation may change it
        elif how < 0.8:
            del node[key]
        elif isinstance(node, dict):
            node[draw.choice(("x", "\x07", "step", "config", key + "s"))] = node.pop(key)
    text = json.dumps(value, indent=1)
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(ODD_TEXTS).decode("latin-1") + text[at:]
    return text.encode("utf-8", "surrogatepass")


def mutate_lines(content: bytes, draw: random.Random) -> bytes:
    """Change one line of JSON Lines, swap or repeat lines, or change the bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(content, draw)
    lines = content.splitlines(keepends=True)
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    if draw.random() < 0.8:
        changed = mutate_json(lines[i], draw)
        with contextlib.suppress(ValueError, RecursionError):
            changed = json.dumps(json.loads(changed.decode("utf-8", "surrogatepass"))).encode()
        lines[i] = changed + b"\n"
    else:
        lines[i], lines[j] = lines[j], lines[draw.randrange(len(lines))]
    return b"".join(lines)


def in_child(read: Callable, folder: Path, report: Path, seconds: float = SECONDS) -> str:
    """Read in a forked child; return '' if it was read, REFUSED, or else the finding."""
    child = os.fork()
    if child == 0:
        result = ""
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the child, also inside C code
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                read(folder)
        except (UserError, MemoryError) as e:
            long = len(one_line(str(e))) > MAX_MESSAGE
            result = f"a message of several lines: {e!r:.1000}" if "\n" in str(e) or long else REFUSED
        except SystemExit:
            result = REFUSED
        except BaseException:
            result = traceback.format_exc()
        report.write_text(result)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"hang of {seconds} s" if number == signal.SIGALRM else signal.Signals(number).name
    return report.read_text()


def fuzz(kinds: dict, names: list[str], n: int, seed: int, folder: Path, keep: Path | None = None,
         also: tuple[str, ...] = ()) -> list[str]:
    """Try n mutations of each kind; return the findings.

    kinds: name -> file in `folder` that is mutated, function that mutates, function that reads the folder.
    also: further files in `folder` that readers change; they are restored as well.
    """
    say = functools.partial(print, flush=True)
    findings, report = [], folder / "report.txt"
    for kind in names:
        name, mutate, read = kinds[kind]
        path, began, found, refused = folder / name, time.monotonic(), 0, 0
        good = path.read_bytes()
        spare = {folder / other: (folder / other).read_bytes() for other in (name, *also)}
        assert (said := in_child(read, folder, report)) == "", f"a good file is refused: {said}"
        for i in range(n):
            content = mutate(good, random.Random(f"{kind} {seed} {i}"))
            path.write_bytes(content)
            finding = in_child(read, folder, report)
            refused += finding == REFUSED
            if finding not in ("", REFUSED):
                found += 1
                findings.append(f"{kind} {i}: {finding}")
                say(findings[-1])
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{kind}-{i}-{path.name}").write_bytes(content)
            for other, kept in spare.items():
                other.write_bytes(kept)
        say(f"{kind}: {n} mutations, {refused} refused, {found} findings, {time.monotonic() - began:.0f} s")
    return findings


def main(description: str, kinds: dict, fuzz_kinds: Callable) -> None:
    """Run a fuzz test from the command line; exit with 1 if it has findings.

    fuzz_kinds(names, n, seed, folder, keep): returns the findings.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--n", type=int, default=500, help="mutations of each kind")
    parser.add_argument("--kinds", default=",".join(kinds), help="some of them, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of the findings")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        findings = fuzz_kinds(args.kinds.split(","), args.n, args.seed, folder, args.keep)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(findings)} findings")
    sys.exit(bool(findings))
