"""Freeze the protocol of a frontier: a template, with the settings that a pilot chooses.

A template is a protocol without tokens, data set and the settings of its pilot:

    {"name": "sync-frontier", "description": "...", "seeds": [11, 12, 13, 14], "baseline": "dense_12",
     "settings": {"n_layer": 12, "eval_interval": 500}, "arms": {"...": {}}, "latency_rows": {},
     "shallow": "dense_8", "depth": 3, "spread": 0.0025}

A pilot is a protocol with runs. A group is its arms that differ in schedule and layers only: a learning rate
with its warm-up. A group with a diverged run is never chosen. The others are compared by the mean log loss,
over the arms and seeds that all of them have. The lowest is chosen.

A pilot is good enough if the loss of the model `shallow` is at least `depth` standard deviations between
seeds above the baseline's, and if this standard deviation of the log loss is at most `spread`. A template
without these three keys asks for nothing. It is for a further pilot, and may have other tokens.

The seeds must be new ones: losses that were chosen for being low are no fair sample.
"""

import json
import math

from experiments.experiment_config import NUMBER, check_keys, in_range, read_json
from experiments.experiment_statistics import differ, pooled_std
from experiments.frontier_protocol import (
    OF_ARMS,
    PROTOCOL,
    Protocol,
    check_strategies,
    data_digests,
    digest_of,
)
from experiments.frontier_runs import FINISHED, read_runs
from nanosync.errors import UserError, shown
from nanosync.files import json_text

FROM_PILOT = "script", "dataset", "data_sha256", "tokens", "seconds_per_run"  # parts that the pilot decides
TEMPLATE = {key: value for key, value in PROTOCOL.items() if key not in FROM_PILOT} | {
    "tokens": (int, False), "shallow": (str, False), "depth": (NUMBER, False), "spread": (NUMBER, False)}
ASKED = "shallow", "depth", "spread"  # all or none
LOGGING = "eval_interval", "eval_iters", "log_interval"  # settings that may differ from the pilot's


class Pilot:
    """A protocol with runs, and the group of its arms that they choose."""

    def __init__(self, path: str):
        """Raises UserError, also for a pilot without the runs of its first seed."""
        self.protocol = Protocol.read(path)
        self.path, self.runs = path, read_runs(self.protocol.runs_path, self.protocol)
        self.groups: dict[str, list[str]] = {}  # settings as JSON -> arms
        for arm in self.protocol.arms:
            self.groups.setdefault(self.protocol.setting_group(arm), []).append(arm)
        missing = [arm for arm in self.protocol.arms if (arm, self.protocol.seeds[0]) not in self.runs]
        if missing:
            raise UserError(f"{path} has no run of {', '.join(missing)} with its first seed, "
                            f"{self.protocol.seeds[0]}: do them with next --protocol={path}")
        diverged = {arm for (arm, _), run in self.runs.items() if run["status"] != FINISHED}
        self.usable = [group for group, arms in self.groups.items() if not diverged & set(arms)]
        if not self.usable:
            raise UserError(f"{path}: a run diverged in each group of arms: choose lower learning rates")
        self.means = self._means()
        self.chosen = min(self.means, key=self.means.get)
        self.settings = json.loads(self.chosen)

    def _kind(self, arm: str) -> str:
        """Return what an arm has in common with its counterparts in other groups, as JSON."""
        settings = self.protocol.settings[arm]
        return json.dumps([settings.get(key) for key in OF_ARMS])

    def _means(self) -> dict[str, float]:
        """Return the mean log loss of each usable group, over the arms and seeds that all of them have.
        Raises UserError."""
        losses = {group: {(self._kind(arm), seed): math.log(run["val_loss"])
                          for (arm, seed), run in self.runs.items() if arm in self.groups[group]}
                  for group in self.usable}
        common = set.intersection(*map(set, losses.values()))
        if not common:
            raise UserError(f"{self.path}: its groups of arms have no arm in common, so their losses do not "
                            f"compare: give each learning rate the same arms")
        return {group: math.fsum(found[key] for key in common) / len(common)
                for group, found in losses.items()}

    def logs(self, arm: str) -> list[float]:
        """Return the log losses of an arm."""
        return [math.log(run["val_loss"]) for (name, _), run in self.runs.items()
                if name == arm and run["status"] == FINISHED]

    def spread(self) -> tuple[float, int] | None:
        """Return the standard deviation of the log loss between seeds, pooled over the chosen arms, else over
        all, and its degrees of freedom; None if no arm has two runs that differ."""
        for arms in (self.groups[self.chosen], self.protocol.arms):
            samples = [sample for sample in map(self.logs, arms) if sample]
            if any(map(differ, samples)):
                return pooled_std(*samples)
        return None

    def seconds(self) -> float:
        """Return the seconds of the longest run, of those with as many at a time as the newest."""
        newest = max(self.runs.values(), key=lambda run: run["time"])
        return max(run["seconds"]["wall"] for run in self.runs.values()
                   if run["parallel"] == newest["parallel"])

    def described(self) -> list[str]:
        """Return lines on the groups: which was chosen, and by what."""
        lines = []
        for group, arms in self.groups.items():
            mean = self.means.get(group)
            text = "diverged" if mean is None else f"mean loss {math.exp(mean):.4f}"
            name = ", ".join(f"{key}={value}" for key, value in json.loads(group).items()) or "all arms"
            lines.append(f"{name}: {text}, {len(arms)} arms{', chosen' * (group == self.chosen)}")
        rates = [json.loads(group).get("learning_rate") for group in self.groups]
        if len(rates) > 2 and all(in_range(rate) for rate in rates) \
                and self.settings["learning_rate"] in (min(rates), max(rates)):
            lines.append("the chosen learning rate is the lowest or highest of the pilot: a better one may "
                         "lie beyond")
        return lines

    def evidence(self, protocol: Protocol, template: dict) -> tuple[bool, str]:
        """Return True if the pilot is good enough for a protocol made from it, and its figures in words.
        Raises UserError if it lacks an arm that the template compares."""
        if "shallow" not in template:
            return True, "no evidence asked for"
        base, shallow = (self._counterpart(protocol, arm) for arm in (protocol.baseline, template["shallow"]))
        pooled = self.spread()
        means = [math.fsum(logs) / len(logs) for logs in map(self.logs, (base, shallow))]
        gap = means[1] - means[0]
        text = f"{template['shallow']} is {100 * math.expm1(gap):+.2f}% of {protocol.baseline}"
        if pooled is None:
            return False, f"{text}; the spread between seeds is unknown, as no arm has two seeds"
        spread, freedom = pooled
        return gap >= template["depth"] * spread and spread <= template["spread"], \
            f"{text}, {gap / spread:+.1f} standard deviations between seeds (at least " \
            f"{template['depth']:g} asked for), each of {spread:.2%} (at most {template['spread']:.2%}; " \
            f"{freedom} degrees of freedom)"

    def _counterpart(self, protocol: Protocol, arm: str) -> str:
        """Return the chosen arm with the settings of an arm of another protocol. Raises UserError."""
        def compared(settings: dict) -> dict:
            return {key: value for key, value in settings.items() if key not in LOGGING}

        for own in self.groups[self.chosen]:
            if compared(self.protocol.settings[own]) == compared(protocol.settings[arm]):
                return own
        raise UserError(f"{self.path} has no arm in {self.chosen} with the settings of {arm}, which the "
                        f"template compares: add it to the pilot")


def read_template(path: str) -> dict:
    """Read and check a template. Raises UserError."""
    template = read_json(path)
    check_keys(template, TEMPLATE, path)
    given = [key for key in ASKED if key in template]
    if given and len(given) < len(ASKED):
        raise UserError(f"{path} has {given[0]!r} and no {next(k for k in ASKED if k not in given)!r}: give "
                        f"{', '.join(ASKED)}, or none of them")
    if given and template["shallow"] not in template["arms"]:
        raise UserError(f"{path}: shallow={shown(template['shallow'])} is not in arms")
    for key in given[1:]:
        if not (in_range(template[key]) and template[key] > 0):
            raise UserError(f"{path}: {key}={shown(template[key])} must be above 0")
    return template


def protocol_values(template: dict, path: str, pilot: Pilot) -> dict:
    """Return the values of the protocol that a template and a pilot make, as a draft. Raises UserError."""
    own, values = pilot.protocol.values["settings"] | pilot.settings, pilot.protocol.values
    for key, value in template["settings"].items():
        if key in own and own[key] != value and key not in LOGGING:
            raise UserError(f"{path} has {key}={shown(value)} and {pilot.path} {shown(own[key])}: a pilot "
                            f"decides only for its own settings")
    again = sorted({*map(repr, template["seeds"])} & {*map(repr, pilot.protocol.seeds)})
    if again:
        raise UserError(f"{path}: seeds has {', '.join(again)}, and {pilot.path} chose by the losses of "
                        f"these seeds: use others")
    tokens = template.get("tokens", values["tokens"])
    seconds = pilot.seconds() * tokens / values["tokens"]
    return {"name": template["name"], "description": template.get("description", ""),
            "script": values["script"], "dataset": values["dataset"], "data_sha256": None,
            "tokens": tokens, "seeds": template["seeds"], "settings": own | template["settings"],
            "baseline": template["baseline"], "arms": template["arms"],
            "latency_rows": template.get("latency_rows", {}),
            "seconds_per_run": math.ceil(seconds)}


def text_of(values: dict) -> str:
    """Return a protocol as JSON with an arm a line."""
    arms = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(own)}" for arm, own in values["arms"].items())
    return json_text(values | {"arms": {}}).replace('"arms": {}', f'"arms": {{\n{arms}\n }}')


def freeze(template_path: str, pilot_paths: list[str], path: str, accept: bool) -> tuple[dict, list[str]]:
    """Return the values of a protocol by the first pilot that is good enough, and lines on the choice. Raises
    UserError, also if none is and `accept` is False. With `accept` the last pilot then decides.

    path: of the protocol, for messages.
    """
    template, lines, failed = read_template(template_path), [], []
    for pilot_path in pilot_paths:
        pilot = Pilot(pilot_path)
        values = protocol_values(template, template_path, pilot)
        protocol = Protocol(values, path)
        check_strategies(protocol)
        good, text = pilot.evidence(protocol, template)
        lines += [f"{pilot_path}, {pilot.protocol.values['tokens']:,} tokens: {text}", *pilot.described()]
        if good:
            break
        failed.append(f"{pilot_path}: {text}")
    else:
        if not accept:
            raise UserError(f"no pilot is good enough for a protocol: {'; '.join(failed)}. Do more of its "
                            f"seeds or a longer pilot, or accept this with --accept")
        lines.append("accepted although it is less than was asked for")
    values["data_sha256"] = data_of(pilot)
    values["description"] = f"{values['description']} Chosen by {pilot_path}: {text}.".strip()
    return values, lines


def data_of(pilot: Pilot) -> dict[str, str]:
    """Return the SHA-256 of the pilot's data: those of its protocol, else of the data here. Raises
    UserError if the latter are other data."""
    digests = pilot.protocol.values["data_sha256"] or data_digests(pilot.protocol)
    of_runs = next(iter(pilot.runs.values()))["data"]
    if digest_of(digests) != of_runs:
        raise UserError(f"{pilot.protocol.values['dataset']} is here the data {digest_of(digests)}, and the "
                        f"runs of {pilot.path} are of {of_runs}: freeze where its data are")
    return digests
