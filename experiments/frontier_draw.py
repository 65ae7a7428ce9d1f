"""Draw the frontier of a protocol: the loss against the dense model's over the time of a token.

Losses are compared as log ratios against the baseline. The effect of the seed, which all arms share, is
removed (frontier_fit.py). The spread is pooled over all arms, and intervals are Student's at 95%. An arm with
fewer than PRELIMINARY runs that compare is preliminary, as is every arm while the baseline is.

Times are those of `bench.py --mode=decode`: of the row that has the name of the arm's strategy, or "6 syncs",
with as many processes as the arm has ranks, smallest batch. The loss of some arms does not depend on the
ranks, so they have a time for each number of processes. A dense model of 8 layers has the time of
`--n_layer=8`, on as many GPUs and on one. If that is missing for some number of processes, its share of the
time of all layers is an estimate, taken from another number of processes, else from the layers. The time of
syncs between two numbers is another.
"""

import math
import os
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from experiments.experiment_config import in_range, read_json
from experiments.experiment_statistics import differ, pooled_std
from experiments.frontier_fit import Fit, interval
from experiments.frontier_picture import EXCHANGES, LINEAR, PRELIMINARY, draw, percent
from experiments.frontier_protocol import Protocol
from experiments.frontier_runs import UNSTABLE, unstable
from experiments.report import table, without_nan, write
from experiments.search_plan import SCHEDULE
from nanosync.errors import UserError
from nanosync.files import json_text

DROPPING = "standard", "spd", "selective", "grouped", "custom"  # strategies that drop syncs and do no more
ONE_GPU = "TP=1"  # name of the row of the dense model on one GPU
ANY_RANKS = "standard", "palm", "ladder"  # whose loss does not depend on the TP ranks
UNSTABLE_NOTE = f"Unstable: after the warm-up more than {UNSTABLE:.0%} of the gradient norms are above " \
                "five times their lower quartile. A pooled spread does not describe such runs, and several " \
                "of an arm widen it for all: name their arms in spread_groups."


@dataclass
class Tables:
    """The µs of a token: (exchange, processes) -> name of a row -> µs; and the width of their model.
    one_gpu: name of a row -> µs, of dense models on one GPU."""

    us: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    width: int | None = None
    devices: tuple[str, ...] = ()
    one_gpu: dict[str, float] = field(default_factory=dict)

    def of(self, exchange: str, processes: int, row: dict) -> tuple[float, bool] | None:
        """Return the time of an arm's row, and True if it is estimated; None if it is unknown."""
        times = self.us[exchange, processes]
        if row["latency_row"] in times:
            return times[row["latency_row"]], False
        if row["shallow"]:
            base = f"{2 * row['all_layers']} syncs"
            shares = {n: other[row["latency_row"]] / other[base] for (name, n), other in self.us.items()
                      if name == exchange and row["latency_row"] in other and base in other}
            nearest = min(shares, key=lambda n: (abs(math.log(n / processes)), n), default=None)
            share = shares.get(nearest, row["layers"] / row["all_layers"])
            return (times[base] * share, True) if base in times else None
        if not row["plain"] or row["syncs"] is None:
            return None
        counts = sorted((int(name.split()[0]), us) for name, us in times.items() if is_count(name))
        if not counts or not counts[0][0] <= row["syncs"] <= counts[-1][0]:
            return None
        return float(np.interp(row["syncs"], *zip(*counts))), True


def is_count(name: str) -> bool:
    """Return True for the name of a row such as '6 syncs'."""
    words = name.split()
    return len(words) == 2 and words[0].isascii() and words[0].isdigit() and words[1] == "syncs"


def read_tables(paths: list[str], protocol: Protocol, width: int | None, exchanges=(*EXCHANGES,)) -> Tables:
    """Read latency tables. Of a table for other layers only the dense model counts. width: n_embd of their
    rows; None: the model's, else the smallest that they have. exchanges: those that count. Raises
    UserError."""
    rows, alone, devices, of_base = [], [], [], protocol.settings[protocol.baseline]
    for path in paths:
        content = read_json(path)
        found = content.get("rows") if isinstance(content, dict) else None
        found = [row for row in found if is_row(row)] if isinstance(found, list) else []
        config = content.get("config") if found else None
        layers = config.get("n_layer") if isinstance(config, dict) else None
        shallow = type(layers) is int and layers != of_base.get("n_layer")
        dense = f"{layers} layers" if shallow else f"{2 * of_base.get('n_layer', 0)} syncs"
        alone += [row | {"name": dense} for row in found if row["name"] == ONE_GPU]
        found = [row for row in found if row["allreduce"] in EXCHANGES]
        if shallow:
            found = [row | {"name": dense} for row in found if row["name"] == f"{2 * layers} syncs"]
        if not found:
            raise UserError(f"{path} has no times of exchanges: use the JSON of bench.py --mode=decode with "
                            f"--tp_allreduce=oneshot, fused or nccl")
        found = [row for row in found if row["allreduce"] in exchanges]
        rows += found
        environment = content.get("environment")
        if found:
            devices.append(str(environment.get("device") if isinstance(environment, dict) else "unknown"))
    if paths and not rows:
        raise UserError(f"the latency tables have no times of {', '.join(exchanges)}: give other "
                        f"--exchanges, or tables that have them")
    widths = {row["n_embd"] for row in rows}
    own = of_base.get("n_embd")
    chosen = width or (own if own in widths else min(widths, default=None))
    if rows and chosen not in widths:
        raise UserError(f"--width={width}: the latency tables have {', '.join(map(str, sorted(widths)))}")
    tables = Tables(width=chosen, devices=tuple(dict.fromkeys(devices)))
    batch = min((row["batch_size"] for row in rows if row["n_embd"] == chosen), default=None)
    for row in rows + alone:
        if (row["n_embd"], row["batch_size"]) == (chosen, batch):
            times = tables.one_gpu if row["allreduce"] is None else tables.us.setdefault(
                (row["allreduce"], row["processes"]), {})
            times.setdefault(row["name"], row["us"])
    return tables


def is_row(row) -> bool:
    """Return True for a row of a latency table with an exchange, or of the dense model on one GPU."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    exchange = row.get("allreduce")
    alone = exchange is None and row["name"] == ONE_GPU and row.get("processes") == 1
    return (alone or (isinstance(exchange, str) and exchange in EXCHANGES)) \
        and in_range(row.get("us")) and row["us"] > 0 \
        and all(type(row.get(key)) is int and row[key] > 0 for key in ("n_embd", "batch_size", "processes"))


def rows_of(protocol: Protocol, runs: dict[tuple[str, int], dict], fit: Fit) -> list[dict]:
    """Return what the runs say of each arm that has one, in the protocol's order."""
    of_base, rows = protocol.settings[protocol.baseline], []
    compared, all_layers = fit.compared.get(protocol.baseline, 0), of_base.get("n_layer")
    for arm in protocol.arms:
        sample = fit.logs.get(arm, [])
        of_arm = [run for (name, _), run in runs.items() if name == arm]
        if not of_arm:
            continue
        settings, syncs, is_base = protocol.settings[arm], of_arm[0]["syncs"], arm == protocol.baseline
        layers = settings.get("n_layer")
        dense = all(settings.get(key) == of_base.get(key) for key in SCHEDULE)
        shallow = dense and layers != all_layers
        ratio = None if is_base else fit.contrast({arm: 1.0, protocol.baseline: -1.0})
        strategy = settings.get("sync_strategy", DROPPING[0])
        dropping = syncs is not None and strategy in DROPPING
        default = f"{layers} layers" if shallow else f"{syncs} syncs" if dropping else strategy
        named = protocol.values["latency_rows"].get(arm)
        kind = strategy.partition(":")[0]
        rows.append({
            "arm": arm, "baseline": is_base, "runs": len(sample), "diverged": len(of_arm) - len(sample),
            "unstable": unstable(runs, arm),
            "syncs": syncs, "ranks": settings.get("tp_size"), "layers": layers, "all_layers": all_layers,
            "dense": dense, "shallow": shallow, "any_ranks": dense or kind in ANY_RANKS,
            "latency_row": named or default, "plain": kind in DROPPING and named is None,
            "loss": math.exp(math.fsum(sample) / len(sample)) if sample else None,
            "ratio": 0.0 if is_base and sample else ratio and ratio.mean,
            "interval": interval(ratio),
            "preliminary": min(fit.compared.get(arm, 0), compared) < PRELIMINARY})
    return rows


def add_times(rows: list[dict], tables: Tables) -> None:
    """Add to each row its times, [{"exchange", "processes", "us", "estimated"}], and as "one_gpu" the µs of a
    dense model on one GPU, else None."""
    for row in rows:
        row["times"], row["one_gpu"] = [], tables.one_gpu.get(row["latency_row"]) if row["dense"] else None
        for exchange, processes in sorted(tables.us):
            if row["any_ranks"] or row["ranks"] == processes:
                found = tables.of(exchange, processes, row)
                if found is not None:
                    row["times"].append({"exchange": exchange, "processes": processes, "us": found[0],
                                         "estimated": found[1]})


def against_shallow(protocol: Protocol, rows: list[dict], fit: Fit, one_gpu: bool = False) -> list[dict]:
    """Compare each arm with the dense model of the same time of a token, for each exchange and number of
    processes: [{"arm", "exchange", "processes", "us", "ratio", "interval"}].

    The log loss of this dense model is interpolated between the two dense models of the arm's settings whose
    times are next to the arm's. A slower arm compares with the slowest of them, a faster one with none.
    one_gpu: True to give dense models the time of one GPU if that is shorter.
    """
    found = []
    for key in sorted({(t["exchange"], t["processes"]) for row in rows for t in row["times"]}):
        at = {row["arm"]: min(t["us"], (one_gpu and row["one_gpu"]) or t["us"]) for row in rows
              if row["loss"] is not None for t in row["times"] if (t["exchange"], t["processes"]) == key}
        for row in rows:
            if row["dense"] or row["arm"] not in at:
                continue
            settings = protocol.setting_group(row["arm"])
            dense = {at[other["arm"]]: other["arm"] for other in rows if other["dense"] and other["arm"] in at
                     and protocol.setting_group(other["arm"]) == settings}
            times = sorted(dense)
            if len(times) < 2 or at[row["arm"]] < times[0]:
                continue
            us = min(at[row["arm"]], times[-1])
            left, right = next(pair for pair in pairwise(times) if us <= pair[1])
            share = (us - left) / (right - left)
            ratio = fit.contrast({row["arm"]: 1.0, dense[left]: share - 1, dense[right]: -share})
            if ratio is not None:
                found.append({"arm": row["arm"], "exchange": key[0], "processes": key[1],
                              "us": at[row["arm"]], "ratio": ratio.mean, "interval": interval(ratio),
                              "preliminary": ratio.runs < PRELIMINARY})
    return found


def verdict(row: dict) -> str:
    """Say what is decided about an arm."""
    if row["baseline"]:
        text = "baseline"
    elif row["interval"] is None:
        text = "unknown"
    else:
        low, high = row["interval"]
        text = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
    counts = [f", {row[name]} {name}" for name in ("diverged", "unstable") if row[name]]
    return text + ", preliminary" * row["preliminary"] + "".join(counts)


def rows_table(rows: list[dict], tables: Tables) -> str:
    """Return the arms as a Markdown table."""
    columns = sorted(tables.us, key=lambda key: (list(EXCHANGES).index(key[0]), key[1]))
    header = ["arm", "syncs", "TP ranks", "layers", "runs", "val loss", "against dense", "95% CI",
              *(f"µs, {EXCHANGES[exchange]}, {n} GPUs" for exchange, n in columns),
              *["µs, one GPU"] * bool(tables.one_gpu), "decided"]
    cells = []
    for row in rows:
        times = {(t["exchange"], t["processes"]): f"{t['us']:.0f}" + " (estimated)" * t["estimated"]
                 for t in row["times"]}
        alone = ["-" if row["one_gpu"] is None else f"{row['one_gpu']:.0f}"] * bool(tables.one_gpu)
        cells.append([
            row["arm"], shown_number(row["syncs"]), "any" if row["any_ranks"] else shown_number(row["ranks"]),
            shown_number(row["layers"]), str(row["runs"]),
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            shown_percent(row["ratio"]),
            shown_interval(row["interval"]),
            *(times.get(column, "-") for column in columns), *alone, verdict(row)])
    return table(header, cells)


def shallow_table(controls: list[dict]) -> str:
    """Return the comparisons of against_shallow as a Markdown table."""
    cells = []
    for one in controls:
        interval = one["interval"]
        exchange = f"{EXCHANGES[one['exchange']]}, {one['processes']} GPUs"
        text = "unknown" if interval is None else "better" if interval[1] < 0 else "worse" \
            if interval[0] > 0 else "not told apart"
        cells.append([one["arm"], exchange, f"{one['us']:.0f}", shown_percent(one["ratio"]),
                      shown_interval(interval), text + ", preliminary" * one["preliminary"]])
    return table(["arm", "exchange", "µs", "against dense", "95% CI", "decided"], cells)


def shown_percent(log_ratio: float | None) -> str:
    return "-" if log_ratio is None else f"{round(percent(log_ratio), 2) + 0.0:+.2f}%"  # + 0.0: no -0.00


def shown_interval(interval: list[float] | None) -> str:
    return "-" if interval is None else "{:+.2f} to {:+.2f}%".format(*map(percent, interval))


def spreads_text(spreads: dict[str, tuple[float, float] | None]) -> str:
    """Return the spreads of groups in words."""
    words = ["unknown" if told is None else f"{told[0]:.2%} ({told[1]:.0f})" for told in spreads.values()]
    return words[0] if len(words) == 1 else ", ".join(map(" ".join, zip(spreads, words)))


def shown_number(value: int | None) -> str:
    return "-" if value is None else str(value)


def write_frontier(protocol: Protocol, runs: dict, tables: Tables, stem: str) -> str:
    """Write STEM.png, STEM.md and STEM.json; return what was written. Raises UserError."""
    fit = Fit(runs, protocol.values["spread_groups"])
    rows = rows_of(protocol, runs, fit)
    add_times(rows, tables)
    cards = ", ".join(sorted({run["card"] for run in runs.values()}))
    draft = " (draft)" if protocol.values["data_sha256"] is None else ""
    missing = [arm for arm in protocol.arms if all(row["arm"] != arm for row in rows)]
    timed, spreads = any(row["times"] for row in rows), {name: s for name, s in fit.spreads.items() if s}
    between = pooled_std(*fit.logs.values()) if any(map(differ, fit.logs.values())) else None
    text = f"# {protocol.name}{draft}\n\n{len(runs)} of {len(protocol.runs)} runs of protocol " \
           f"{protocol.digest}, {protocol.values['tokens']:,} tokens each, on {cards}. The " \
           f"effect of the seed, which all arms share, is removed. Intervals are Student's at 95%; the " \
           f"spread is pooled over {'the arms of each group' if len(fit.spreads) > 1 else 'all arms'}. " \
           f"Fewer than {PRELIMINARY} runs: preliminary.\n\n" \
           f"{rows_table(rows, tables)}"
    if len({frozenset(seed for name, seed in runs if name == arm) for arm in fit.logs}) > 1:
        text += "\nArms have different seeds, so *against dense* is not the quotient of two values of *val " \
                "loss*.\n"
    if between is not None:
        text += f"\nStandard deviation of the loss: {between[0]:.2%} between the seeds of an arm " \
                f"({between[1]} degrees of freedom)"
        text += f". After the effect of the seed is removed: {spreads_text(fit.spreads)}.\n" if spreads else \
            ". No intervals: they need two arms with two common seeds.\n"
    if any(row["unstable"] for row in rows):
        text += f"\n{UNSTABLE_NOTE}\n"
    apart = [row["arm"] for row in rows if row["ratio"] is None and row["runs"]]
    if apart and protocol.baseline in fit.logs:
        text += f"\nNo chain of common seeds connects these with {protocol.baseline}: {', '.join(apart)}.\n"
    controls = against_shallow(protocol, rows, fit)
    or_on_one = against_shallow(protocol, rows, fit, one_gpu=True) if tables.one_gpu else []
    for where, found in (("on as many GPUs", controls), ("on as many GPUs or on one", or_on_one)):
        if found:
            text += f"\n## Against a dense model of the same time {where}\n\n{shallow_table(found)}"
    if timed:
        width = protocol.settings[protocol.baseline].get("n_embd")
        text += f"\nµs a token: width {tables.width}, smallest batch, {', '.join(tables.devices)}."
        text += "\n" if width in (None, tables.width) else f" The losses are of width {width}.\n"
    untimed = [row["arm"] for row in rows if not row["times"]]
    if timed and untimed:
        text += f"\nWithout a time, so not in the picture: {', '.join(untimed)}.\n"
    if missing:
        text += f"\nWithout a run: {', '.join(missing)}.\n"
    write(stem + ".json", json_text(without_nan({"protocol": protocol.digest, "runs": len(runs),
                                                 "planned": len(protocol.runs),
                                                 "spreads": {name: {"spread": one[0], "df": one[1]}
                                                             for name, one in spreads.items()},
                                                 "spread_between_seeds": between and between[0], "arms": rows,
                                                 "against_shallow": controls,
                                                 "against_shallow_or_one_gpu": or_on_one})))
    draw(rows, list(tables.us), f"width {tables.width}, {', '.join(tables.devices)}", stem + ".png")
    text += f"\n![Frontier]({os.path.basename(stem)}.png)\n\nBars are 95% intervals. An axis of the loss " \
            f"that goes far beyond {LINEAR:g}% is logarithmic there.\n"
    write(stem + ".md", text)
    return f"written: {stem}.md, {stem}.json, {stem}.png; {len(runs)} of {len(protocol.runs)} runs"
