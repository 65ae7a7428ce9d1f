"""The file of points for experiments/analyze_results.py --frontier, written by points.py of later records."""

import csv

FIELDS = "name", "seed", "seconds", "loss", "steps"


def write_points(path: str, rows: list[list]) -> None:
    """Write rows of FIELDS, in the order of names, steps and seeds."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(FIELDS)
        writer.writerows(sorted(rows, key=lambda row: (row[0], row[4], row[1])))
