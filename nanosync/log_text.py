"""The lines of log.txt: of an evaluation, and those that stay valid when a run resumes, as
run_log.events_until for events."""

import re

# name of a pattern -> lines that belong to a step or an epoch
LINES = {
    "update": re.compile(r"iter (\d+):"),
    "evaluation": re.compile(r"step (\d+): |step:(\d+)/\d+ val_loss:"),
    "updates done": re.compile(r"step:(\d+)/\d+ |saved checkpoint .*step-(\d{8,})$|"
                               r"interrupted at step (\d+):"),
    "completed": re.compile(r"Completed epoch (\d+)$"),
    "started": re.compile(r"(?:Shuffled \d+ training shards for|Starting) epoch (\d+)$"),
}


def shown_sample(text: str) -> str:
    """Return a generated text as a line of the log shows it: control characters are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def evaluation_line(step: int, train_loss: float, val_loss: float, bits_per_byte: float | None) -> str:
    """Return the line of an evaluation. bits_per_byte: None if unknown."""
    bits = "" if bits_per_byte is None else f", bits per byte {bits_per_byte:.4f}"
    return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{bits}"


def lines_until(lines: list[str], step: int, evaluated: bool, epoch: int, samples: dict[int, str]
                ) -> list[str]:
    """Return the lines that stay valid when a run resumes at `step`.

    evaluated: the step's evaluation was done before, and is not repeated.
    epoch: of the next update.
    samples: generated texts by step; in log.txt they are lines of any content.
    """
    last = {"update": step - 1, "evaluation": step if evaluated else step - 1, "updates done": step,
            "completed": epoch - 1, "started": epoch}
    kept, i = [], 0
    while i < len(lines):
        name, number = _kind_of(lines[i])
        sample = re.fullmatch(r"step (\d+): sample", lines[i])
        end = i + 1
        if sample and int(sample[1]) in samples:
            end += shown_sample(samples[int(sample[1])]).count("\n") + 1
        if name is None or number <= last[name]:
            kept += lines[i:end]
        i = end
    return kept


def _kind_of(line: str) -> tuple[str | None, int]:
    """Return the name of the first pattern that a line matches, and its number; (None, 0) without one."""
    for name, pattern in LINES.items():
        if found := pattern.match(line):
            return name, int(next(filter(None, found.groups())))
    return None, 0
