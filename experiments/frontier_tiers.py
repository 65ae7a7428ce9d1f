"""Compare the tiers of a frontier: the same arms with more tokens, or in a larger model.

The abscissa of a tier is the logarithm of its training FLOPs without attention and head, 6 x parameters of
the layers x tokens. An arm's log ratio against the baseline is assumed to be linear in it. Two tiers give the
line's slope, and a prediction for a third, larger one, which its runs can refute. With the same model in both
the slope is that in log tokens. All intervals are Student's at 95%; each tier has a spread of its own
(frontier_fit.py).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from experiments.experiment_statistics import welch_error
from experiments.frontier_draw import UNSTABLE_NOTE, shown_interval
from experiments.frontier_fit import Fit, interval
from experiments.frontier_picture import percent
from experiments.frontier_protocol import REST, Protocol
from experiments.frontier_runs import unstable
from experiments.report import table, without_nan, write
from experiments.search_evidence import Ratio
from nanosync.errors import UserError, shown
from nanosync.files import json_text


def combined(v: float, one: Ratio, w: float, other: Ratio) -> Ratio:
    """Return v * one + w * other, of independent ratios. Its error is NaN if one of theirs is."""
    error, df = map(float, welch_error([v * one.error, w * other.error], (one.df + 1, other.df + 1)))
    return Ratio(v * one.mean + w * other.mean, error, df, min(one.runs, other.runs))


@dataclass
class Tier:
    """A protocol with its runs. log_flops: see above. spread: of the arms in no group, see Fit. ratios: arm
    -> log ratio. unstable: arm -> unstable runs, None if unknown.

    Raises UserError if the settings of the baseline do not have the size of the model.
    """

    protocol: Protocol
    runs: dict[tuple[str, int], dict]

    def __post_init__(self):
        settings = self.protocol.settings[self.protocol.baseline]
        sizes = {name: settings.get(name) for name in ("n_layer", "n_embd")}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise UserError(f"{self.protocol.path}: {name}={shown(size)} of the baseline must be an "
                                f"integer of at least 1: it gives the parameters of the tier")
        self.parameters = 12 * sizes["n_layer"] * sizes["n_embd"]**2  # of the layers
        self.log_flops = math.log(6 * self.parameters) + math.log(self.protocol.values["tokens"])
        fit, baseline = Fit(self.runs, self.protocol.values["spread_groups"]), self.protocol.baseline
        self.spread = fit.spreads.get(REST)
        ratios = {arm: fit.contrast({arm: 1.0, baseline: -1.0}) for arm in self.protocol.arms
                  if arm != baseline}
        self.ratios = {arm: ratio for arm, ratio in ratios.items() if ratio is not None}
        self.unstable = {arm: unstable(self.runs, arm) for arm in self.protocol.arms}


def check_tiers(tiers: list[Tier]) -> None:
    """Raise UserError unless tiers can be compared: of the same data, against the same baseline, in order of
    size, each but the last with runs."""
    data = {run["data"] for tier in tiers for run in tier.runs.values()}
    if len(data) > 1:
        raise UserError(f"the tiers are of different data, {' and '.join(sorted(data))}: their ratios are on "
                        f"no common line")
    for small, large in pairwise(tiers):
        if small.protocol.baseline != large.protocol.baseline:
            raise UserError(f"{small.protocol.path} has the baseline {small.protocol.baseline}, and "
                            f"{large.protocol.path} {large.protocol.baseline}: their ratios are on no common "
                            f"line")
        if not small.ratios:
            raise UserError(f"{small.protocol.path} has no run of another arm with a seed of its "
                            f"baseline yet: do some with next")
        if large.log_flops <= small.log_flops:
            raise UserError(f"{large.protocol.path} is no larger tier than {small.protocol.path}: name them "
                            f"in order of parameters x tokens")
        if not set(small.protocol.arms) & set(large.protocol.arms) - {large.protocol.baseline}:
            raise UserError(f"{small.protocol.path} and {large.protocol.path} have no arm in common")


def compare(tiers: list[Tier]) -> list[dict]:
    """Return for each arm of the last tier what the tiers say, in its order.

    {"arm", "ratios": [{"ratio", "interval", "runs", "unstable"} or None for each tier], "slope",
    "slope_interval": of the line through the two largest tiers with runs, "predicted",
    "predicted_interval": of the last tier from the two before it, "difference", "difference_interval":
    measured less predicted}
    """
    rows, last = [], tiers[-1]
    for arm in last.protocol.arms:
        if arm == last.protocol.baseline:
            continue
        found = [tier.ratios.get(arm) for tier in tiers]
        row = {"arm": arm, "ratios": [None if one is None else {
            "ratio": one.mean, "interval": interval(one), "runs": one.runs,
            "unstable": tier.unstable[arm]} for tier, one in zip(tiers, found)]}
        known = [(tier.log_flops, one) for tier, one in zip(tiers, found) if one is not None]
        if len(known) > 1:
            (x, before), (y, after) = known[-2:]
            add(row, "slope", combined(1 / (y - x), after, -1 / (y - x), before))
        earlier = [(tier.log_flops, one) for tier, one in zip(tiers[:-1], found) if one is not None]
        if len(earlier) > 1:
            (x, before), (y, after) = earlier[-2:]
            share = (last.log_flops - y) / (y - x)
            predicted = combined(1 + share, after, -share, before)
            add(row, "predicted", predicted)
            if found[-1] is not None:
                add(row, "difference", combined(1.0, found[-1], -1.0, predicted))
        rows.append(row)
    return rows


def add(row: dict, name: str, ratio: Ratio) -> None:
    """Add a ratio and its interval to a row."""
    row[name], row[f"{name}_interval"] = ratio.mean, interval(ratio)


def verdict(row: dict) -> str:
    """Say whether the last tier is as predicted."""
    if "predicted" not in row:
        return "-"
    if "difference" not in row:
        return "not run"
    if row["difference_interval"] is None:
        return "unknown"
    low, high = row["difference_interval"]
    return "higher than predicted" if low > 0 else "lower than predicted" if high < 0 else "as predicted"


def text_of(tiers: list[Tier], rows: list[dict]) -> str:
    """Return the comparison as Markdown."""
    sizes = [[str(n), tier.protocol.name, f"{tier.parameters / 1e6:.1f}M",
              f"{tier.protocol.values['tokens']:,}", f"{len(tier.runs)} of {len(tier.protocol.runs)}",
              "-" if tier.spread is None else f"{tier.spread[0]:.2%}"] for n, tier in enumerate(tiers, 1)]
    header = ["arm", *(f"tier {n}" for n in range(1, len(tiers) + 1)), "slope a doubling of FLOPs", "95% CI"]
    third = len(tiers) > 2
    cells = []
    for row in rows:
        slope = row.get("slope_interval")
        cells.append([row["arm"], *map(shown_ratio, row["ratios"])])
        if any(one and one["unstable"] for one in row["ratios"]):  # such runs are on no line
            cells[-1] += ["unstable", "-"] + ["unstable", "-", "-"] * third
            continue
        cells[-1] += ["-" if "slope" not in row else f"{percent(math.log(2) * row['slope']):+.3f}%",
                      "-" if slope is None else "{:+.3f} to {:+.3f}%".format(
                          *(percent(math.log(2) * end) for end in slope))]
        if third:
            cells[-1] += ["-" if "predicted" not in row else f"{percent(row['predicted']):+.2f}%",
                          shown_interval(row.get("predicted_interval")), verdict(row)]
    header += [f"predicted for tier {len(tiers)}", "95% CI", "measured"] if third else []
    of_sizes = table(["tier", "protocol", "parameters of layers", "tokens", "runs", "spread"], sizes)
    notes = [f"{count} runs of {tier.protocol.baseline} are unstable in tier {n}: all differences in it are "
             "in doubt." for n, tier in enumerate(tiers, 1)
             if (count := tier.unstable[tier.protocol.baseline])]
    if notes or any(one and one["unstable"] for row in rows for one in row["ratios"]):
        notes.append(UNSTABLE_NOTE)
    return f"# Tiers\n\n{of_sizes}\nLosses against the baseline's, with 95% intervals, and the runs of the " \
           f"arm or of the baseline, whichever are fewer.\n\n{table(header, cells)}" \
           + "".join(f"\n{note}\n" for note in notes)


def shown_ratio(one: dict | None) -> str:
    if one is None:
        return "-"
    unstable_runs = f", {one['unstable']} unstable" if one["unstable"] else ""
    return f"{percent(one['ratio']):+.2f}% ({shown_interval(one['interval'])}; {one['runs']}{unstable_runs})"


def write_tiers(tiers: list[Tier], stem: str) -> str:
    """Write STEM.md and STEM.json; return the Markdown. Raises UserError."""
    check_tiers(tiers)
    rows = compare(tiers)
    text = text_of(tiers, rows)
    write(stem + ".json", json_text(without_nan({
        "tiers": [{"protocol": tier.protocol.digest, "name": tier.protocol.name,
                   "parameters": tier.parameters, "tokens": tier.protocol.values["tokens"],
                   "runs": len(tier.runs), "spread": tier.spread and tier.spread[0],
                   "baseline_unstable": tier.unstable[tier.protocol.baseline]} for tier in tiers],
        "arms": rows})))
    write(stem + ".md", text)
    return text
