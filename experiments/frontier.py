"""Fill and draw a frontier: the loss of sync schedules against the time of a token, by a frozen protocol.

    python experiments/frontier.py next --minutes=28 [--parallel=2]
    python experiments/frontier.py merge runs_of_another_machine.jsonl
    python experiments/frontier.py draw --latency=decode_oneshot.json --latency=decode_nccl.json

next trains what is missing, seed by seed, and starts no run that does not fit into the minutes. Each finished
run is a line of runs.jsonl, at once and completely or not at all. So the same command resumes after any
interruption. It runs as many runs at a time as there are GPUs; --parallel=2 on one GPU has two share it.
merge adds the runs of other files; runs of another protocol are an error. draw writes frontier.png and
frontier.md beside runs.jsonl: the loss against the dense model's with 95% intervals, over the µs a token from
bench.py --mode=decode --json=FILE. frontier_protocol.py describes the protocol, frontier_runs.py the runs.
"""

import argparse
import math
import os
import sys

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.campaign_folder import cut_torn_line
from experiments.experiment_config import MAX_RUNS
from experiments.frontier_next import Session, places_for
from experiments.frontier_protocol import Protocol, check_strategies, data_digests, digest_of
from experiments.frontier_runs import merge, read_runs
from experiments.runner import end_on_signals, lock
from nanosync.errors import UserError, shown
from nanosync.files import check_can_write

PROTOCOL = os.path.join("records", "sync-frontier", "protocol.json")
COMMANDS = "next", "merge", "draw"
MOST_MINUTES = 1e6


def read_arguments() -> argparse.Namespace:
    """Return the command and its options. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("files", nargs="*", metavar="OTHER", help="merge: files of runs to add")
    parser.add_argument("--protocol", default=PROTOCOL, metavar="FILE", help=f"default: {PROTOCOL}")
    parser.add_argument("--runs", metavar="FILE", help="default: runs.jsonl beside protocol.json")
    parser.add_argument("--minutes", type=float, help="next: in which to end")
    parser.add_argument("--parallel", type=int, help="next: runs at a time (default: one a GPU)")
    parser.add_argument("--estimate", type=float, metavar="SECONDS", help="next: of a run, while none is "
                        "measured here (default: the protocol's)")
    parser.add_argument("--log_dir", default="experiment_logs", help="next: parent of the folder with the "
                        "output of the runs")
    parser.add_argument("--cache", metavar="DIR", help="next: compiled code that all runs share (default: in "
                        "--log_dir)")
    parser.add_argument("--commit", help="next: of this code, where git does not know it")
    parser.add_argument("--dry_run", action="store_true", help="next: print what is missing, run nothing")
    parser.add_argument("--latency", action="append", default=[], metavar="FILE",
                        help="draw: JSON of bench.py --mode=decode; several times for several exchanges and "
                        "numbers of processes")
    parser.add_argument("--width", type=int, help="draw: n_embd of the rows of the latency tables (default: "
                        "the model's, else the smallest)")
    parser.add_argument("--out", metavar="STEM", help="draw: path of the files without ending (default: "
                        "frontier beside the runs)")
    args = parser.parse_args()
    check_arguments(args, sys.argv[1:])
    return args


def check_arguments(args: argparse.Namespace, given: list[str]) -> None:
    """Raise UserError for options that the command does not have, or out of range."""
    of = {"next": ("minutes", "parallel", "estimate", "log_dir", "cache", "commit", "dry_run"),
          "merge": (), "draw": ("latency", "width", "out")}
    for command, names in of.items():
        for name in names:
            if command != args.command and any(word.split("=")[0] == f"--{name}" for word in given):
                raise UserError(f"--{name} is for {command}: leave it out of {args.command}")
    if bool(args.files) != (args.command == "merge"):
        raise UserError(f"merge needs the files of runs to add, {args.command} takes none" if args.files
                        else "merge needs the files of runs to add: name them")
    if args.command == "next" and not args.dry_run and args.minutes is None:
        raise UserError("next needs the time in which to end: give --minutes=28")
    for name, most in (("minutes", MOST_MINUTES), ("estimate", MOST_MINUTES), ("width", 10**6),
                       ("parallel", MAX_RUNS)):
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
    session = Session(protocol, runs, path, folder, data, 60 * (args.minutes or 0), args.estimate,
                      args.commit)
    if protocol.values["data_sha256"] is None:
        print(f"{protocol.path} is a draft: its data_sha256 is null, and that of the data here is {digests}")
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
    print(f"{path}: {len(session.missing)} of {len(protocol.runs)} runs are missing; {len(places)} at a "
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


def main() -> None:
    args = read_arguments()
    protocol = Protocol.read(args.protocol)
    path = args.runs or protocol.runs_path
    if args.command == "next":
        do_next(args, protocol, path)
    elif args.command == "merge":
        new, known = merge(path, args.files, protocol)
        missing = len(protocol.runs) - len(read_runs(path, protocol))
        print(f"{path}: {new} runs added, {known} were there already, {missing} are missing")
    else:
        from experiments.frontier_draw import read_tables, write_frontier

        runs = read_runs(path, protocol)
        if not runs:
            raise UserError(f"{path} has no runs yet: do some with next")
        tables = read_tables(args.latency, protocol, args.width)
        stem = args.out or os.path.join(os.path.dirname(path), "frontier")
        print(write_frontier(protocol, runs, tables, stem))


if __name__ == "__main__":
    main()
