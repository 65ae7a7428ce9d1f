"""The runs of a protocol: runs.jsonl, which is only appended to, a line a run.

    {"protocol": "<digest>", "data": "<digest>", "arm": "drop_6_r4", "seed": 1, "status": "finished",
     "val_loss": 1.93, "curve": [[step, val_loss, train_loss], ...], "syncs": 6,
     "seconds": {"wall": 44.1, "start": 12.0, "training": 29.9, "evaluation": 2.2}, "parallel": 2,
     "spikes": 0.0006, "card": "NVIDIA H200", "torch": "2.11.0", "commit": "...", "time": 1795938660}

status is finished, or non_finite for a run whose loss became infinite or NaN, which has no val_loss. A run
that failed otherwise, or was killed, has no line. seconds.start is what is neither training nor evaluation:
start, compilation, end. parallel: runs at a time on the same GPU. spikes: share of the updates after the
warm-up whose gradient norm is above five times its lower quartile; null if the run logs no norms or ends
within the warm-up; older lines lack it. A run that another protocol has with the same settings can be taken
from it (`merge` with `of`). Then ran_as has the digest of the other.
"""

import json
import os
from collections.abc import Iterable

from experiments.campaign_folder import cut_torn_line
from experiments.experiment_config import NUMBER, check_keys, in_range
from experiments.experiment_logger import lines_of, read_lines
from experiments.frontier_protocol import DIGEST, Protocol, digest_of
from nanosync.errors import UserError, shown
from nanosync.files import open_regular, os_error_as_user_error

NONE = type(None)
FINISHED, NON_FINITE = "finished", "non_finite"
RUN = {"protocol": (str, True), "data": (str, True), "arm": (str, True), "seed": (int, True),
       "status": (str, True), "val_loss": ((*NUMBER, NONE), True), "curve": (list, True),
       "syncs": ((int, NONE), True), "seconds": (dict, True), "parallel": (int, True), "card": (str, True),
       "torch": ((str, NONE), True), "commit": ((str, NONE), True), "time": (NUMBER, True),
       "spikes": ((*NUMBER, NONE), False), "ran_as": (str, False)}
SECONDS = {"wall": (NUMBER, True), "start": (NUMBER, True), "training": (NUMBER, True),
           "evaluation": (NUMBER, True)}
MOST_PARALLEL = 1000
UNSTABLE = 0.01  # a run with more spikes is unstable


def read_runs(path: str, protocol: Protocol) -> dict[tuple[str, int], dict]:
    """Return the runs of a file by (arm, seed), none if it does not exist. Raises UserError, also for runs of
    another protocol, for two runs of an arm and a seed that differ, and for runs on different data."""
    runs = {}
    for number, run in enumerate(read_lines(path, appended=True), 1):
        where = f"{path}, run {number}"
        check_run(run, where, protocol)
        add_run(runs, run, where)
    return runs


def add_run(runs: dict[tuple[str, int], dict], run: dict, where: str) -> bool:
    """Add a run; return False if it is there already. Raises UserError if it contradicts the others."""
    key = run["arm"], run["seed"]
    known = runs.get(key)
    if known is not None and ("spikes" in known) != ("spikes" in run):  # one of them is an older line
        one = known.get("spikes", run.get("spikes"))
        known, run = known | {"spikes": one}, run | {"spikes": one}
    if known is not None and known != run:
        other = next(name for name in RUN if known.get(name) != run.get(name))
        raise UserError(f"{where}: {run['arm']} with seed {run['seed']} is there already with "
                        f"{other}={shown(known.get(other), 40)} and not {shown(run.get(other), 40)}: "
                        f"remove one of both lines")
    data = next(iter(runs.values()), run)["data"]
    if data != run["data"]:
        raise UserError(f"{where} is of the data {run['data']}, and the other runs of {data}: their losses "
                        f"do not compare")
    runs.setdefault(key, run)
    return known is None


def check_run(run: dict, where: str, protocol: Protocol) -> None:
    """Raise UserError for a line that is no run of the protocol."""
    check_keys(run, RUN, where)
    check_keys(run["seconds"], SECONDS, f"seconds of {where}")
    if run["protocol"] != protocol.digest:
        raise UserError(f"{where} is of the protocol {shown(run['protocol'], 20)}, and {protocol.path} is "
                        f"{protocol.digest}: a changed protocol is a new file with runs of its own")
    if run["arm"] not in protocol.arms or run["seed"] not in protocol.seeds:
        raise UserError(f"{where}: {protocol.path} has no arm {shown(run['arm'])} with seed {run['seed']}")
    if len(run["data"]) != DIGEST or not run["card"].isprintable():
        raise UserError(f"{where} has data={shown(run['data'])} and card={shown(run['card'])}, which this "
                        f"command does not write")
    frozen = protocol.values["data_sha256"]
    if frozen is not None and run["data"] != digest_of(frozen):
        raise UserError(f"{where} is of the data {run['data']}, and {protocol.path} of {digest_of(frozen)}: "
                        f"their losses do not compare")
    finished = run["status"] == FINISHED
    if run["status"] not in (FINISHED, NON_FINITE) or finished != (run["val_loss"] is not None):
        raise UserError(f"{where} has status={shown(run['status'])} and val_loss={shown(run['val_loss'])}: "
                        f"only a finished run has a loss")
    if finished and not (in_range(run["val_loss"]) and run["val_loss"] > 0):
        raise UserError(f"{where} has val_loss={shown(run['val_loss'])}, which must be above 0")
    for point in run["curve"]:
        if not isinstance(point, list) or len(point) != 3 or type(point[0]) is not int \
                or not all(value is None or in_range(value) for value in point):
            raise UserError(f"{where}: curve has {shown(point)}: it needs [step, val_loss, train_loss]")
    last = run["curve"][-1][:2] if run["curve"] else None
    if finished and last != [protocol.steps(run["arm"]), run["val_loss"]]:
        raise UserError(f"{where}: its curve ends with {shown(last)} and not with step "
                        f"{protocol.steps(run['arm'])} and its val_loss")
    for name, value in {**run["seconds"], "time": run["time"]}.items():
        if not in_range(value):
            raise UserError(f"{where}: {name}={shown(value)} must be a number that is not below 0")
    if not 1 <= run["parallel"] <= MOST_PARALLEL or not in_range(run["syncs"] or 0, most=10**6):
        raise UserError(f"{where} has parallel={run['parallel']} and syncs={run['syncs']}, which cannot be")
    if not in_range(run.get("spikes") or 0, most=1):
        raise UserError(f"{where}: spikes={shown(run['spikes'])} must be a share, from 0 to 1")


def unstable(runs: dict[tuple[str, int], dict], arm: str) -> int | None:
    """Return how many finished runs of an arm are unstable, of those with `spikes`; None if none has it."""
    shares = [run["spikes"] for (name, _), run in runs.items()
              if name == arm and run["status"] == FINISHED and run.get("spikes") is not None]
    return sum(share > UNSTABLE for share in shares) if shares else None


def append_runs(path: str, runs: Iterable[dict]) -> None:
    """Append runs, and flush them to the disk. A killed process leaves at most an incomplete last line, which
    the next call removes. Raises UserError."""
    with os_error_as_user_error(f"cannot write {path}"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        cut_torn_line(path)
        with open_regular(path, "a", encoding="utf-8") as f:
            f.write(lines_of(runs))
            f.flush()
            os.fsync(f.fileno())


def merge(path: str, others: list[str], protocol: Protocol,
          of: Protocol | None = None) -> tuple[int, int, int]:
    """Append the runs of other files that are not there yet; return how many were new, how many known, and
    how many the protocol does not have. Raises UserError, and then writes nothing.

    of: the protocol of the other files, None for the same. Of its runs those count that the protocol has with
    the same settings and seed, under whatever name.
    """
    runs, new, known, foreign = read_runs(path, protocol), [], 0, 0
    names = same_arms(of, protocol) if of is not None and of.digest != protocol.digest else None
    for other in others:
        if not os.path.isfile(other):
            raise UserError(f"cannot read {other}: there is no such file")
        for number, run in enumerate(read_lines(other, appended=True), 1):
            where = f"{other}, run {number}"
            check_run(run, where, of or protocol)
            if names is not None:
                if run["arm"] not in names or run["seed"] not in protocol.seeds:
                    foreign += 1
                    continue
                run = {"ran_as": of.digest} | run | {"protocol": protocol.digest, "arm": names[run["arm"]]}
                check_run(run, where, protocol)
            if add_run(runs, run, where):
                new.append(run)
            else:
                known += 1
    if new:
        append_runs(path, new)
    return len(new), known, foreign


def same_arms(of: Protocol, protocol: Protocol) -> dict[str, str]:
    """Return the arms of a protocol -> their names in another, if it has them with the same settings."""
    def kinds(one: Protocol) -> dict[str, str]:
        return {json.dumps([one.values["script"], settings], sort_keys=True): arm
                for arm, settings in one.settings.items()}

    theirs, ours = kinds(of), kinds(protocol)
    return {arm: ours[kind] for kind, arm in theirs.items() if kind in ours}
