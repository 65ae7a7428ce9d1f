"""Draw kernels_16384.png and kernels_65536.png from kernels.json and print the README's tables."""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
from benchmarks.kernels import OPERATIONS, plot  # noqa: E402

with open(os.path.join(HERE, "kernels.json")) as f:
    run = json.load(f)
# copies of 512 MB, and most larger ones, go at 2.7 TB/s in a CUDA graph: they are no scale
figures = [r for r in run["rows"] if r["name"] != "copy" or r["gb_per_second"] > 3000]
for rows in sorted({r["rows"] for r in figures}):
    part = [r for r in figures if r["rows"] == rows]
    plot(part, os.path.join(HERE, f"kernels_{rows}.png"),
         f"LayerNorm, {run['environment']['device']}, bf16")
    for operation in OPERATIONS:
        for C in sorted({r["width"] for r in part}):
            of = {r["name"]: r for r in part if (r["operation"], r["width"]) == (operation, C)}
            peers = [of[n]["us"] for n in ("eager", "inductor", "Liger") if n in of]
            cells = [f"{100 * of[n]['of_copy']:.0f}" if n in of else "" for n in
                     ("ours", "eager", "inductor", "Liger", "copy")]
            print(f"| {operation}, {rows} x {C} | {of['ours']['us']:.1f} | **{cells[0]}** | "
                  + " | ".join(cells[1:]) + f" | {min(peers) / of['ours']['us']:.2f} |")
