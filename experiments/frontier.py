"""Fill and draw a frontier: the loss of sync schedules against the time of a token, by a frozen protocol.

    python experiments/frontier.py next --minutes=28 [--parallel=2]
    python experiments/frontier.py merge runs_of_another_machine.jsonl
    python experiments/frontier.py draw --latency=decode_oneshot.json --latency=decode_nccl.json
    python experiments/frontier.py freeze --template=template.json --pilot=protocol_regime.json
    python experiments/frontier.py tiers --larger=protocol_4x.json --larger=protocol_124m.json

next trains what is missing, seed by seed, and starts no run that does not fit into the minutes. Each finished
run is a line of runs.jsonl, at once and completely or not at all. So the same command resumes after any
interruption. It runs as many runs at a time as there are GPUs; --parallel=2 on one GPU has two share it.
merge adds the runs of other files. Runs of another protocol are an error, unless --of names it: then those
with the same settings count. draw writes frontier.png and frontier.md beside runs.jsonl: the loss against the
dense model's with 95% intervals, over the µs a token from bench.py --mode=decode --json=FILE. freeze writes a
protocol from a template, with the settings that the runs of a pilot choose. tiers compares the arms of a
protocol with those of larger ones, and predicts the largest from the two before it. frontier_protocol.py
describes the protocol, frontier_freeze.py template and pilot, frontier_runs.py the runs, frontier_tiers.py
the prediction.
"""

import argparse
import math
import os
import sys
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.campaign_folder import cut_torn_line
from experiments.experiment_config import MAX_RUNS, check_options
from experiments.experiment_logger import git_info
from experiments.frontier_freeze import freeze, text_of
from experiments.frontier_next import Session, most_starting, places_for
from experiments.frontier_picture import EXCHANGES
from experiments.frontier_protocol import Protocol, check_strategies, data_digests, digest_of
from experiments.frontier_runs import merge, read_runs
from experiments.report import write
from experiments.runner import end_on_signals, lock
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write

PROTOCOL = os.path.join("records", "sync-frontier", "protocol.json")
COMMANDS = "next", "merge", "draw", "freeze", "tiers"
MOST_MINUTES = 1e6
STARTED = time.monotonic()


def read_arguments() -> argparse.Namespace:
    """Return the command and its options. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("files", nargs="*", default=[], metavar="OTHER", help="merge: files of runs to add")
    parser.add_argument("--protocol", default=PROTOCOL, metavar="FILE", help=f"default: {PROTOCOL}")
    parser.add_argument("--runs", metavar="FILE", help="default: runs.jsonl beside protocol.json")
    parser.add_argument("--minutes", type=float, help="next: in which to end")
    parser.add_argument("--parallel", type=int, help="next: runs at a time (default: one a GPU)")
    parser.add_argument("--estimate", type=float, metavar="SECONDS", help="next: of a run, while none is "
                        "measured here (default: the protocol's)")
    parser.add_argument("--first", type=int, metavar="N", help="next: do only the protocol's first N runs")
    parser.add_argument("--log_dir", default="experiment_logs", help="next: parent of the folder with the "
                        "output of the runs")
    parser.add_argument("--cache", metavar="DIR", help="next: compiled code that all runs share (default: in "
                        "--log_dir)")
    parser.add_argument("--commit", help="next: of this code, where git does not know it")
    parser.add_argument("--of", metavar="FILE", help="merge: protocol of the files, if it is another: take "
                        "the runs that have the same settings and seed")
    parser.add_argument("--dry_run", action="store_true", help="next: print what is missing, run nothing")
    parser.add_argument("--latency", action="append", default=[], metavar="FILE",
                        help="draw: JSON of bench.py --mode=decode; several times for several exchanges and "
                        "numbers of processes")
    parser.add_argument("--exchanges", metavar="NAMES", help="draw: those of the latency tables that count "
                        f"(default: {','.join(EXCHANGES)})")
    parser.add_argument("--width", type=int, help="draw: n_embd of the rows of the latency tables (default: "
                        "the model's, else the smallest)")
    parser.add_argument("--out", metavar="STEM", help="draw, tiers: path of the files without ending "
                        "(default: frontier, or tiers, beside the runs)")
    parser.add_argument("--larger", action="append", default=[], metavar="FILE", help="tiers: protocol with "
                        "more parameters x tokens; several times in order of size")
    parser.add_argument("--template", metavar="FILE", help="freeze: protocol without what the pilot decides")
    parser.add_argument("--pilot", action="append", default=[], metavar="FILE", help="freeze: protocol with "
                        "runs; of several the first that is good enough decides")
    parser.add_argument("--accept", action="store_true", help="freeze: if none is, take the last")
    args = parser.parse_args()
    check_arguments(args, sys.argv[1:])
    return args


def check_arguments(args: argparse.Namespace, given: list[str]) -> None:
    """Raise UserError for options that the command does not have, or out of range."""
    of = {"next": ("minutes", "parallel", "estimate", "first", "log_dir", "cache", "commit", "dry_run"),
          "merge": ("of",), "draw": ("latency", "exchanges", "width", "out"),
          "freeze": ("template", "pilot", "accept"), "tiers": ("larger", "out")}
    check_options(of, args.command, given)
    if bool(args.files) != (args.command == "merge"):
        raise UserError(f"merge needs the files of runs to add, {args.command} takes none" if args.files
                        else "merge needs the files of runs to add: name them")
    if args.command == "next" and not args.dry_run and args.minutes is None:
        raise UserError("next needs the time in which to end: give --minutes=28")
    if args.command == "freeze" and not (args.template and args.pilot):
        raise UserError("freeze needs a template and a pilot: give --template=FILE --pilot=FILE")
    if args.exchanges is not None and not args.latency:
        raise UserError("--exchanges chooses from latency tables: give --latency=FILE")
    if args.exchanges is not None and set(args.exchanges.split(",")) - set(EXCHANGES):
        raise UserError(f"--exchanges={shown(args.exchanges)}: use some of {', '.join(EXCHANGES)}")
    if args.command == "tiers" and not args.larger:
        raise UserError("tiers needs a protocol with more parameters x tokens: give --larger=FILE")
    for name, most in (("minutes", MOST_MINUTES), ("estimate", MOST_MINUTES), ("width", 10**6),
                       ("parallel", MAX_RUNS), ("first", 10**6)):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and 0 < value <= most):
            raise UserError(f"--{name}={shown(value)} must be above 0 and at most {most:g}")


def do_next(args: argparse.Namespace, protocol: Protocol, path: str) -> None:
    """Train what is missing."""
    check_strategies(protocol)
    digests = data_digests(protocol)
    data = digest_of(digests)
    folder = os.path.join(args.log_dir, protocol.name)
    runs = read_runs(path, protocol)
    other = next((run["data"] for run in runs.values() if run["data"] != data), None)
    if other is not None:
        raise UserError(f"{protocol.values['dataset']} is here the data {data}, and {path} has runs of "
                        f"{other}: prepare the same data")
    on_cpu = protocol.settings[protocol.baseline].get("device") == "cpu"
    places, per_place = places_for(args.parallel, on_cpu)
    seconds = 60 * (args.minutes or 0) - (time.monotonic() - STARTED)
    session = Session(protocol, runs, path, folder, data, seconds, args.estimate, args.commit,
                      args.first)
    if protocol.values["data_sha256"] is None:
        print(f"{protocol.path} is a draft: its data_sha256 is null, and that of the data here is {digests}")
    if args.commit is None and git_info()["commit"] is None:
        print("git does not know this code, so the runs will not name its commit: give --commit=HASH")
    if args.dry_run:
        return print(session.described(per_place))
    check_can_write(folder, "--log_dir")
    check_can_write(os.path.dirname(path) or ".", "--runs")
    end_on_signals()
    descriptor = lock(folder)
    cut_torn_line(path)
    session.runs = read_runs(path, protocol)  # an earlier call may have added to them until it ended
    cache = os.path.abspath(args.cache or os.path.join(args.log_dir, "compile_cache"))
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    starting = len(set(places)) * most_starting(places, per_place)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // starting)))
    print(f"{path}: {len(session.missing)} of {len(session.asked)} runs are missing; {len(places)} at a "
          f"time, {per_place} on one device; compiled code in {cache}", flush=True)
    try:
        session.go(descriptor, places, per_place)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", flush=True)
        raise
    print(f"{session.done} runs done, {len(session.missing)} missing"
          + (f"; {session.first_unfit}" if session.first_unfit else ""))
    if session.failed:
        raise UserError(f"{len(session.failed)} runs failed and have no line: "
                        f"{', '.join(name for name, _ in session.failed)}; see stdout.log in "
                        f"{folder}/*/runs/")


def stem_beside(path: str) -> str:
    """Return the path of the picture beside runs, without ending: frontier for runs.jsonl, frontier_x for
    runs_x.jsonl."""
    folder, file = os.path.split(path)
    name = file.removesuffix(".jsonl")
    return os.path.join(folder, "frontier" + (name.removeprefix("runs") if name.startswith("runs") else ""))


def do_freeze(args: argparse.Namespace) -> None:
    """Write the protocol that a template and a pilot make."""
    path = args.protocol
    if os.path.exists(path):
        before = Protocol.read(path)
        if read_runs(args.runs or before.runs_path, before):
            raise UserError(f"{path} has runs, so it does not change: give another --protocol=FILE")
    values, lines = freeze(args.template, args.pilot, path, args.accept)
    frozen = Protocol(values, path)
    write(path, text_of(values))
    print("\n".join([*lines, f"written: {path}, {len(frozen.arms)} arms, {len(frozen.runs)} runs of "
                     f"{values['tokens']:,} tokens, protocol {frozen.digest}"]))


def do_tiers(args: argparse.Namespace, protocol: Protocol, path: str) -> None:
    """Compare a protocol with larger ones."""
    from experiments.frontier_tiers import Tier, write_tiers

    larger = [Protocol.read(name) for name in args.larger]
    tiers = [Tier(one, read_runs(runs, one)) for one, runs in
             [(protocol, path), *((one, one.runs_path) for one in larger)]]
    print(write_tiers(tiers, args.out or os.path.join(os.path.dirname(path), "tiers")))


def main() -> None:
    args = read_arguments()
    if args.command == "freeze":
        return do_freeze(args)
    protocol = Protocol.read(args.protocol)
    path = args.runs or protocol.runs_path
    if args.command == "next":
        do_next(args, protocol, path)
    elif args.command == "merge":
        of = None if args.of is None else Protocol.read(args.of)
        new, known, foreign = merge(path, args.files, protocol, of)
        missing = len(protocol.runs) - len(read_runs(path, protocol))
        print(f"{path}: {new} runs added, {known} were there already, {missing} are missing"
              + f"; {foreign} are not of this protocol" * (foreign > 0))
    elif args.command == "tiers":
        do_tiers(args, protocol, path)
    else:
        from experiments.frontier_draw import read_tables, write_frontier

        runs = read_runs(path, protocol)
        if not runs:
            raise UserError(f"{path} has no runs yet: do some with next")
        exchanges = args.exchanges.split(",") if args.exchanges else EXCHANGES
        tables = read_tables(args.latency, protocol, args.width, exchanges)
        stem = args.out or stem_beside(path)
        print(write_frontier(protocol, runs, tables, stem))


if __name__ == "__main__":
    main()
