"""Print answers.jsonl as the table of README.md."""

import json
from pathlib import Path


def cell(code, line: str) -> str:
    text = line if len(line) <= 170 else line[:167] + "..."
    return f"{code}: {text}".replace("|", "\\|").replace("<", "\\<")


print("| item | typed | before | after |\n| --- | --- | --- | --- |")
for row in map(json.loads, Path(__file__).with_name("answers.jsonl").read_text().splitlines()):
    typed = row["typed"].replace("|", "\\|")
    print(f"| {row['item']} | `{typed}` | {cell(*row['before'])} | {cell(*row['after'])} |")
