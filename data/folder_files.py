"""The files of a folder by a pattern, each once."""

import os
from fnmatch import fnmatchcase

from nanosync.files import os_error_as_user_error


def files_of(folder: str, pattern: str) -> list[str]:
    """Return the paths of the files of a folder that match a pattern, sorted. Raises UserError.

    Links are followed. A file that has several paths is returned once, and a link to a folder above does not
    lead in circles. Hidden files need a pattern that names them.

    pattern: of the last parts of a path, such as *.py, src/*.py or src/**/*.py.
    """
    patterns, hidden = ["**", *pattern.split("/")], pattern.startswith(".") or "/." in pattern
    patterns += ["*"] * (patterns[-1] == "**")
    folders, links, seen, paths = [folder], [], set(), {}
    while folders or links:
        where = folders.pop() if folders else links.pop()  # links last: a file keeps its path without links
        if (real := os.path.realpath(where)) in seen:
            continue
        seen.add(real)
        with os_error_as_user_error(f"cannot read {where}"), os.scandir(where) as found:
            entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            if entry.is_dir():
                if hidden or not entry.name.startswith("."):
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.is_file() and _matches(os.path.relpath(entry.path, folder).split(os.sep), patterns):
                paths.setdefault(os.path.realpath(entry.path), entry.path)
    return sorted(paths.values())


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Return True if the parts of a path match patterns, of which ** stands for any number of parts."""
    if not parts or not patterns:
        return not parts and not patterns
    visible = not parts[0].startswith(".")
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (visible and _matches(parts[1:], patterns))
    return (visible or patterns[0].startswith(".")) and fnmatchcase(parts[0], patterns[0]) \
        and _matches(parts[1:], patterns[1:])
