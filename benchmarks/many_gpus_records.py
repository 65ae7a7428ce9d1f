"""Records of the jobs of many_gpus.py, and the tables made of them.

The stem of a job is the path of its files in `out`, without ending. A reader gets the stem and what the job
printed, and returns the figures of its record. It raises OSError, ValueError, KeyError or IndexError if there
are none. A table gets the settings and the records by name of job, and returns its lines, and True if no
check has failed.
"""

import os
import re

import torch

from nanosync.errors import UserError
from nanosync.files import read_json, sha256_of
from nanosync.hardware import environment
from nanosync.run_log import read_log

BARS = {"124M": 0.98, "XL": 0.95}  # least share of N times one GPU
ELASTIC = 0.05  # largest difference of a loss on fewer processes; two runs in bf16 differ by up to 0.02
GB = 2**30


def missing(problem: str) -> dict:
    """Make the record of a job that has not run."""
    return {"problem": problem, "figures": None}


def finished(stem: str, command: str) -> dict | None:
    """Return the record of a job that has succeeded, None without one. Raises UserError."""
    try:
        record = read_json(f"{stem}.json") if os.path.exists(f"{stem}.json") else missing("not run")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {stem}.json: {e}: delete it to run the job again") from None
    if record["problem"] is not None:
        return None
    if record["command"] != command:
        raise UserError(f"{stem}.json is the result of other settings: name another folder with --out=...")
    return record


def record_of(part: str, stem: str, command: str, report: dict) -> dict:
    """Make the record of a job that has ended. report: of experiments/supervise.py."""
    with open(f"{stem}.log", encoding="utf-8", errors="replace") as f:
        text = f.read()
    problem, figures = None, None
    if report["ended_by"] != "itself":
        problem = f"ended after {report['seconds']:.0f} s by {report['ended_by']}"
    elif report["code"] != 0:
        lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
        # PyTorch puts the rank before a traceback; torchrun's own error comes after all ranks'
        begin = re.compile(r"(\[rank\d+\]: )?(error\b|\w[\w.]*Error(: |$))")
        errors = [line for line in lines if begin.match(line)]
        problem = f"exit code {report['code']}: {(errors or lines[-1:])[0]}"
    else:
        try:
            figures = READERS[part](stem, text)
        except (OSError, ValueError, KeyError, IndexError) as e:
            problem = f"no figures in {os.path.basename(stem)}.log: {type(e).__name__}: {e}"
    versions = {key: value for key, value in environment(torch.device("cpu")).items() if key != "device"}
    return {"command": command, "seconds": report["seconds"], "problem": problem, "figures": figures,
            "environment": versions}


def read_speedrun(stem: str, text: str) -> dict:
    """Read the lines that the speedrun scripts and modded-nanogpt's scripts print."""
    line = r"step:(\d+)/\d+ val_loss:([\d.]+) train_time:([\d.]+)ms step_avg:([\d.]+|nan)ms"
    found = re.findall(line, text)
    sent = re.search(r"each process sent ([\d,]+) bytes a step", text)
    peak = re.search(r"peak memory[^:\n]*: (\d+) MiB", text)
    return {"steps": int(found[-1][0]), "ms": float(found[-1][3]),
            "evaluations": [[int(step), float(loss), float(ms) / 1e3] for step, loss, ms, _ in found],
            "bytes_a_step": int(sent[1].replace(",", "")) if sent else None,
            "peak_mib": int(peak[1]) if peak else None}


def read_bench(stem: str, text: str) -> dict:
    """Read the JSON file of bench.py."""
    return read_json(f"{stem}.bench.json")


def read_resume(stem: str, text: str) -> dict:
    """Read the losses of a run, and hash the files of its last checkpoint."""
    losses = {str(e["step"]): e["loss"] for e in read_log(stem) if e["event"] == "iter"}
    last = os.path.join(stem, "ckpt", max(os.listdir(os.path.join(stem, "ckpt"))))
    return {"losses": losses, "checkpoint": os.path.basename(last),
            "sha256": {name: sha256_of(os.path.join(last, f"{name}.safetensors"))
                       for name in ("model", "optim", "rng")}}


def markdown(header: list, rows: list[list]) -> list[str]:
    """Return the lines of a table, none without rows."""
    rows = [header, ["---"] * len(header), *rows, []] if rows else []
    return ["| " + " | ".join(map(str, row)) + " |" if row else "" for row in rows]


def figures_of(records: dict, name: str) -> dict | None:
    return records[name]["figures"] if name in records else None


def speedrun_table(config: dict, records: dict) -> tuple[list[str], bool]:
    """Make the table of the scripts, with the time of a step relative to the peer's."""
    rows, peer = [], figures_of(records, "peer")
    for name, f in ((name, record["figures"]) for name, record in records.items() if record["figures"]):
        _, loss, seconds = f["evaluations"][-1]
        reached = [s for _, val_loss, s in f["evaluations"] if val_loss <= config["target"]]
        rows.append([name, f["steps"], f"{loss:.4f}", f"{f['ms']:.2f}",
                     f"{f['ms'] / peer['ms']:.3f}" if peer else "n/a", f"{seconds:.1f}",
                     f"{reached[0]:.1f}" if reached else "not reached",
                     "n/a" if f["bytes_a_step"] is None else f"{f['bytes_a_step'] / 1e6:.1f}",
                     "n/a" if f["peak_mib"] is None else f["peak_mib"]])
    return markdown(["script", "steps", "val loss", "ms a step", "of the peer's", "training, s",
                     f"s to {config['target']:g}", "MB sent a step", "peak, MiB"], rows), True


def decode_table(config: dict, records: dict) -> tuple[list[str], bool]:
    """Make the table of µs a token, each with its ratio to the best smaller TP at full sync."""
    found, rows, counts = {}, [], []  # found: (C, B, TP) -> (schedule, exchange) -> row of bench.py
    for f in (record["figures"] for record in records.values() if record["figures"]):
        counts = [entry for entry in f["config"]["syncs"] if type(entry) is int]
        for row in f["rows"]:
            key = row["n_embd"], row["batch_size"], row["processes"]
            found.setdefault(key, {})[row["name"], row["tp_allreduce"] or ""] = row
    for (C, B, tp), mine in sorted(found.items()):
        smaller = {n: min(row["us"] for (name, _), row in found[c, b, n].items()
                          if name in ("TP=1", f"{counts[0]} syncs"))
                   for c, b, n in found if (c, b) == (C, B) and n < tp}
        if tp == 1:
            continue
        best = min(smaller, key=smaller.get)
        for exchange, delay in ((e, d) for e in ("oneshot", "nccl") for d in ("", ", delay 1")):
            cells = [mine.get((f"{n} syncs{delay}", exchange)) for n in counts]
            did = "/".join(sorted({row["allreduce"] for row in cells if row}))  # nccl if oneshot cannot work
            cells.append(mine["0 syncs", ""])
            cells = [f"{row['us']:.1f} ({row['us'] / smaller[best]:.3f})" if row else "" for row in cells]
            rows.append([C, B, tp, exchange if did == exchange else f"{exchange} ({did})",
                         "delayed" if delay else "dropped", *cells, f"{smaller[best]:.1f} (TP={best})"])
    header = ["C", "B", "TP", "exchange", "syncs", *counts, 0, "best smaller TP, all syncs"]
    return markdown(header, rows), True


def scaling_table(config: dict, records: dict) -> tuple[list[str], bool]:
    """Make three tables: tokens/s, memory of XL, the largest models. On a CPU no bar counts."""
    speed, memory, largest, missed = [], [], [], False
    for size, bar in BARS.items():
        turns, others = (figures_of(records, f"{size}-{kind}") for kind in ("ddp", "strategies"))
        if turns and others:
            one, ddp = (turns["contenders"][name]["tokens_per_second"] for name in ("one GPU", "DDP"))
            named = others.get("contenders") or {row["name"]: row for row in others["rows"]}
            speed.append([size, "one GPU", f"{one:,.0f}", "", ""])
            for name, row in named.items():  # relative to DDP, which both jobs measured by turns
                tokens = row["tokens_per_second"]
                share = tokens / named["ddp"]["tokens_per_second"] * ddp / (turns["world_size"] * one)
                missed |= share < bar
                speed.append([size, name, f"{tokens:,.0f}", f"{share:.3f}",
                              f">= {bar}" + ": missed" * (share < bar)])
    for row in (figures_of(records, "XL-strategies") or {"rows": []})["rows"]:
        held, peak, formula = row["bytes"]["held"], row["bytes"]["peak"], row["predicted"]
        if held:  # PyTorch counts on GPUs only
            memory.append([row["name"], f"{held / GB:.2f}", f"{formula / GB:.2f}", f"{held / formula:.3f}",
                           f"{peak / GB:.2f}"])
    for name in (name for name in records if name.startswith("largest-")):
        row = (figures_of(records, name) or {"rows": [{"largest": {"layers": None}}]})["rows"][0]
        best = row["largest"]
        if best["layers"] is not None:
            largest.append([row["name"], best["layers"], f"{best['parameters'] / 1e9:.2f}B",
                            f"{best['peak'] / GB:.1f} of {best['limit'] / GB:.1f}"])
    share = f"of {config['gpus']} x one GPU"
    lines = [*markdown(["size", "strategy", "tokens/s", share, "bar"], speed),
             *markdown(["XL", "held, GB", "formula, GB", "held / formula", "peak, GB"], memory),
             *markdown(["largest", "layers", "parameters", "peak, GB"], largest)]
    return lines, config["device"] == "cpu" or not missed


def resume_table(config: dict, records: dict) -> tuple[list[str], bool]:
    """Make the table of comparisons with the whole runs."""
    rows, good = [], True
    for name, f in ((name, record["figures"]) for name, record in records.items() if record["figures"]):
        strategy, _, kind = name.partition("-")
        whole = figures_of(records, f"{strategy}-whole")
        if kind == "whole" or whole is None:
            continue
        differ = [abs(loss - whole["losses"][step]) for step, loss in f["losses"].items()]
        largest = max(differ, default=float("inf"))
        if kind == "again":
            unequal = [file for file, digest in whole["sha256"].items() if f["sha256"][file] != digest]
            fine = not unequal and largest == 0 and f["checkpoint"] == whole["checkpoint"]
            says = f"{len(differ)} losses, weights, moments, random states: equal bits" if fine else \
                f"{', '.join(unequal) or 'no file'} differs, losses by up to {largest:.2e}"
        else:
            fine = largest <= ELASTIC
            says = f"{len(differ)} losses differ by up to {largest:.2e}"
        good &= fine
        rows.append([strategy, kind, says, "ok" if fine else "FAILED"])
    return markdown(["strategy", "resumed", "against the whole run", ""], rows), good


READERS = {"speedrun": read_speedrun, "decode": read_bench, "scaling": read_bench, "resume": read_resume}
TABLES = {"speedrun": speedrun_table, "decode": decode_table, "scaling": scaling_table,
          "resume": resume_table}


def summary(config: dict, records: dict) -> tuple[str, bool]:
    """Return the table of a part with the problems of its jobs, and True if there is none and no check has
    failed."""
    lines, good = TABLES[config["part"]](config, records)
    problems = {}  # problem -> names of jobs
    for name, record in records.items():
        if record["problem"] is not None:
            problems.setdefault(record["problem"], []).append(name)
    lines += [f"{', '.join(names)}: {problem}" for problem, names in problems.items()]
    return "\n".join([*lines, ""]), good and not problems
