"""Do the runs of records/sync-frontier on a machine whose commands may last minutes only, in its background.

    python experiments/frontier_background.py begin pilot --minutes=26 --commit=HASH
    python experiments/frontier_background.py wait 560 --out=FOLDER    # again and again

begin pilot does the first 20 runs of protocol_regime.json and freezes protocol.json. If they show too little,
it does the longer pilot before; with --accept it freezes all the same, and the protocol says so. Then it does
the frozen protocol. begin next does only the last, of any --folder with a protocol.json and a data.json. Both
work in a folder outside of the checkout, with a copy of the code, the data, and the protocols and runs of
--folder. A run that is in a runs*.jsonl, here or there, is not repeated. wait prints what is new in the log.
Every few seconds it copies runs, frozen protocols, data.json and logs to --out.

data.json has the packages whose Python files are the data. With other packages than those of earlier runs,
begin ends before it makes the data.
"""

import argparse
import contextlib
import glob
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.experiment_config import check_keys, check_options, read_json
from experiments.experiment_logger import git_info
from experiments.frontier_protocol import Protocol, data_digests
from experiments.frontier_runs import merge, read_runs
from experiments.runner import SUPERVISOR, read_report, visible_gpus
from nanosync.errors import UserError, shown
from nanosync.files import os_error_as_user_error, replace_file, write_json
from nanosync.folder_lock import lock_folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, "records", "sync-frontier")
PILOT, LONG, FROZEN = "protocol_regime.json", "protocol_regime_long.json", "protocol.json"
DATA = {"roots": (str, True), "tokenizer": (str, True), "files": (int, False), "packages": (dict, False)}
FIRST = {PILOT: 20, LONG: 4, FROZEN: None}  # runs that a protocol does, None for all
ESTIMATE = {PILOT: 150}  # seconds of a run while none is measured
PLANS = "pilot", "next"
OPTIONS = {"begin": ("minutes", "commit", "per_gpu", "folder", "accept"), "wait": ("out",)}  # besides --work
DATASET = os.path.join("data", "python_source_gpt2")
RESULTS = (*(name.replace("protocol", "runs") + "l" for name in FIRST), LONG, FROZEN, "data.json", "log.txt",
           "failed.txt")
RESERVE = 20.0  # seconds between the end of the last run and that of the minutes
ENDS = 5.0  # seconds after which a command that should have ended is ended
SHORTEST = 30.0  # seconds: with less left nothing is started
KEPT = 20_000  # bytes of the output of a failed run
FAILURES = 50  # failed runs whose output is kept
COPY = 5.0  # seconds between two copies of the results
SKIPPED = ".git", ".venv", "__pycache__", "*.bin", "*.npy", ".prepare", "experiment_logs", "out", "out-*", \
    os.path.basename(DATASET)
WORK = os.path.join(tempfile.gettempdir(), "sync-frontier")
STARTED = time.time()


def read_arguments() -> argparse.Namespace:
    """Return the command and its options. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("command", choices=("begin", "wait", "sequence"), help="sequence is for begin")
    parser.add_argument("what", help=f"begin: {' or '.join(PLANS)}; wait: seconds")
    parser.add_argument("--minutes", type=float, default=26, help="begin: in which all ends (26)")
    parser.add_argument("--commit", help="begin: of this code, where git does not know it")
    parser.add_argument("--per_gpu", type=int, default=6, help="begin: runs at a time on each GPU (6)")
    parser.add_argument("--accept", action="store_true", help="begin pilot: freeze a protocol in any case")
    parser.add_argument("--folder", default=FOLDER, help="begin: protocols, templates, data.json, earlier "
                        "runs (records/sync-frontier)")
    parser.add_argument("--work", default=WORK, help=f"folder to work in ({WORK})")
    parser.add_argument("--out", help="wait: folder for the results")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command != "wait" and args.what not in PLANS:
        raise UserError(f"{args.command} {shown(args.what)} is unknown: use {' or '.join(PLANS)}")
    if args.command == "sequence" and args.until is None:
        raise UserError("sequence is for begin: use begin")
    if args.accept and args.what != "pilot":
        raise UserError("--accept is for begin pilot: leave it out")
    if args.command != "sequence":
        check_options(OPTIONS, args.command, sys.argv[1:])
    args.work = os.path.realpath(args.work)
    if not (0 < args.minutes < 1e6 and 1 <= args.per_gpu <= 100):
        raise UserError(f"--minutes={args.minutes} must be above 0, --per_gpu={args.per_gpu} from 1 to 100")
    return args


# begin

def begin(args: argparse.Namespace) -> None:
    """Prepare the folder to work in, and start the sequence. Raises UserError."""
    commit = args.commit or commit_of_git()
    if os.path.commonpath([os.path.realpath(ROOT), args.work]) in (os.path.realpath(ROOT), args.work):
        raise UserError(f"--work={args.work} is inside of the checkout or above it: name a folder beside it")
    if not os.path.isdir(args.folder):
        raise UserError(f"--folder={args.folder} is no folder: name one with protocols and data.json")
    with os_error_as_user_error(f"cannot write to {args.work}"):
        os.makedirs(args.work, exist_ok=True)
    descriptor = lock_folder(args.work, "work")
    code, folder = os.path.join(args.work, "code"), os.path.join(args.work, "frontier")
    with os_error_as_user_error(f"cannot copy to {args.work}"):
        for parent, folders, files in os.walk(code):  # links of the last begin, which copytree cannot replace
            for path in (os.path.join(parent, name) for name in folders + files):
                if os.path.islink(path):
                    os.remove(path)
        shutil.copytree(ROOT, code, symlinks=True, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(*SKIPPED))
        os.makedirs(folder, exist_ok=True)
    take_over(args.folder, folder, args.what)
    prepare_data(folder, os.path.join(code, DATASET))
    check_data(folder, code)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(args.work, "ended.json"))
    with open(os.path.join(args.work, "log.txt"), "ab") as log:
        sequence = subprocess.Popen(
            [sys.executable, os.path.join(code, os.path.relpath(__file__, ROOT)), "sequence", args.what,
             f"--until={STARTED + 60 * args.minutes - RESERVE}", f"--per_gpu={args.per_gpu}",
             f"--work={args.work}", f"--commit={commit}", *["--accept"] * args.accept],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True, pass_fds=[descriptor], env=os.environ | {"PYTHONUNBUFFERED": "1"})
    print(f"process {sequence.pid} started after {time.time() - STARTED:.0f} s; it ends within "
          f"{args.minutes:g} minutes", flush=True)


def commit_of_git() -> str:
    """Return the commit of this code. Raises UserError where git does not know it."""
    git = git_info()
    if git["commit"] is None:
        raise UserError("git does not know this code, and runs name its commit: give --commit=HASH")
    return git["commit"] + "-dirty" * bool(git["dirty"])


def take_over(source: str, folder: str, what: str) -> None:
    """Copy protocols, templates and data.json to the folder, and merge the runs. Raises UserError, also for
    files that the plan `what` needs."""
    for name in (PILOT, LONG, FROZEN, "template.json", "template_long.json", "data.json"):
        ours, theirs = (os.path.join(parent, name) for parent in (folder, source))
        if not os.path.exists(theirs):
            continue
        if name in FIRST and os.path.exists(ours):
            if Protocol.read(ours).digest != Protocol.read(theirs).digest:
                raise UserError(f"{ours} is another protocol than {theirs}: remove one, or name "
                                f"another --work")
        elif name != "data.json" or not os.path.exists(ours) or "packages" in read_data(theirs):
            with os_error_as_user_error(f"cannot copy {theirs}"):
                shutil.copyfile(theirs, ours)
        if name in FIRST:
            protocol = Protocol.read(ours)
            runs = os.path.join(source, os.path.basename(protocol.runs_path))
            if os.path.exists(runs):
                merge(protocol.runs_path, [runs], protocol)
    needed = (PILOT, "template.json", "template_long.json") if what == "pilot" else (FROZEN,)
    for name in (*needed, "data.json"):
        if not os.path.exists(os.path.join(folder, name)):
            fix = "begin pilot freezes one" if name == FROZEN else "name a folder that has it, --folder=DIR"
            raise UserError(f"{source} has no {name}: {fix}")


def read_data(path: str) -> dict:
    """Read data.json. Raises UserError."""
    data = read_json(path)
    check_keys(data, DATA, path)
    return data


def prepare_data(folder: str, out: str) -> None:
    """Make the data set of data.json, which names its files from then on. Raises UserError."""
    from data.corpus_encoding import check_tokenizer
    from data.python_source.prepare import find_documents, find_roots, make

    path = os.path.join(folder, "data.json")
    data = read_data(path)
    check_tokenizer(data["tokenizer"])
    documents, packages = find_documents(find_roots(data["roots"])), {}
    for document in documents:
        top = "/".join(document.name.split("/")[:2]) if not document.name.startswith("stdlib/") else "stdlib"
        packages.setdefault(top, hashlib.sha256()).update(f"{document.name}\0{document.digest}\n".encode(
            errors="surrogateescape"))
    found = {name: digest.hexdigest()[:16] for name, digest in sorted(packages.items())}
    before = data.get("packages")
    if before is not None and found != before:
        other = [name for name in sorted(found.keys() | before.keys()) if found.get(name) != before.get(name)]
        raise UserError(f"these packages are not as in the earlier runs, whose losses would not compare: "
                        f"{', '.join(other[:8])}{', …' * (len(other) > 8)}. Use a machine with the same, or "
                        f"begin anew: remove the runs, and \"packages\" from {os.path.basename(path)}")
    make(documents, data["roots"], data["tokenizer"], out, os.cpu_count() or 1)
    write_json(path, data | {"files": len(documents), "packages": found})


def check_data(folder: str, code: str) -> None:
    """Raise UserError if the token files are not those of a frozen protocol."""
    for name in FIRST:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            protocol = Protocol.read(path)
            if protocol.values["data_sha256"] is not None:
                protocol.values["dataset"] = os.path.join(code, DATASET)
                data_digests(protocol)


# sequence

class Sequence:
    """The commands of a plan, one after the other, in the current folder."""

    def __init__(self, args: argparse.Namespace):
        self.until, self.commit, self.report, self.accept = args.until, args.commit, args.work, args.accept
        self.parallel = args.per_gpu * max(len(visible_gpus()), 1)
        self.succeeded = True  # the last command

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.until - time.time()

    def frontier(self, command: str, *options: str) -> bool:
        """Run frontier.py; return True if it succeeds. It ends with this process."""
        script = os.path.join(ROOT, "experiments", "frontier.py")
        print(f"\n{self.left:.0f} s left: frontier.py {command} {' '.join(options)}", flush=True)
        with contextlib.suppress(FileNotFoundError):  # of the command before, if this supervisor is killed
            os.remove(os.path.join(self.report, "report.json"))
        with subprocess.Popen([sys.executable, SUPERVISOR, os.path.join(self.report, "report.json"),
                               str(max(self.left, 1.0) + ENDS), sys.executable, script, command, *options],
                              stdin=subprocess.PIPE) as supervisor:
            supervisor.wait()
        report = read_report(self.report)
        self.succeeded = report is not None and report["code"] == 0
        return self.succeeded

    def missing(self, name: str) -> int:
        """Return the number of runs of a protocol that are to be done."""
        protocol = Protocol.read(name)
        runs = read_runs(protocol.runs_path, protocol)
        return sum(key not in runs for key in protocol.runs[:FIRST[name]])

    def next(self, name: str) -> bool:
        """Do the runs of a protocol; return True if none is missing. A run that failed is tried once more."""
        options = [f"--protocol={name}", f"--parallel={self.parallel}", f"--commit={self.commit}"]
        options += [f"--first={FIRST[name]}"] if FIRST[name] else []
        options += [f"--estimate={ESTIMATE[name]}"] if name in ESTIMATE else []
        for _ in range(2):
            if not self.missing(name) or self.left < SHORTEST \
                    or self.frontier("next", *options, f"--minutes={self.left / 60:.3f}"):
                break
        return not self.missing(name)

    def freeze(self, name: str, template: str, pilot: str, *options: str) -> bool:
        """Freeze a protocol, unless it is there; return True if it is there then."""
        return os.path.exists(name) or self.frontier("freeze", f"--protocol={name}", f"--template={template}",
                                                     f"--pilot={pilot}", *options)

    def pilot(self) -> bool:
        """Do the pilot, and a longer one if the first is not good enough; return True if one is frozen."""
        if os.path.exists(FROZEN):
            return True
        if not os.path.exists(LONG):
            if not self.next(PILOT):
                return False
            if self.freeze(FROZEN, "template.json", PILOT, *["--accept"] * self.accept):
                return True
        return (self.freeze(LONG, "template_long.json", PILOT) and self.next(LONG)
                and self.freeze(FROZEN, "template.json", LONG, *["--accept"] * self.accept))

    def go(self, plan: str) -> bool:
        """Do a plan as far as the minutes allow; return False if something other than the time stopped it."""
        complete = (plan != "pilot" or self.pilot()) and self.next(FROZEN)
        for name in filter(os.path.exists, FIRST):
            of = len(Protocol.read(name).runs[:FIRST[name]])
            print(f"{name}: {self.missing(name)} runs are missing of {of}", flush=True)
        return complete or self.succeeded or self.left < SHORTEST


def sequence(args: argparse.Namespace) -> None:
    """Do a plan, and leave a note that it ended."""
    success = False
    try:
        success = Sequence(args).go(args.what)
    finally:
        print(f"the sequence ended{'' if success else ', and not for lack of time: see above'}", flush=True)
        write_json(os.path.join(args.work, "ended.json"), {"success": success})


# wait

def wait(args: argparse.Namespace) -> int:
    """Print what is new in the log until the sequence ends or the seconds are over; return an exit code."""
    try:
        seconds = float(args.what)
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds):
        raise UserError(f"wait {shown(args.what)}: give the seconds, as in wait 560")
    until = time.time() + seconds
    if not os.path.isfile(os.path.join(args.work, "log.txt")):
        raise UserError(f"nothing was begun in {args.work}")
    copied = 0.0
    while True:
        ended = not is_locked(args.work)
        print_new(args.work)
        if over := ended or time.time() >= until or time.time() - copied >= COPY:
            copy_results(args.work, args.out)
            copied = time.time()
        if ended:
            break
        if over and time.time() >= until:
            print(f"{gpu_use()}the sequence goes on: wait again", flush=True)
            return 0
        time.sleep(0.5)
    try:
        success = read_json(os.path.join(args.work, "ended.json"))["success"]
    except UserError:
        print("the sequence was killed: begin again", flush=True)
        return 1
    return int(not success)


def gpu_use() -> str:
    """Return a line on the memory and the use of each GPU; '' without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used,utilization.gpu", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, timeout=20, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "".join(f"GPU {line}\n" for line in done.stdout.splitlines())


def is_locked(work: str) -> bool:
    """Return True while the sequence runs."""
    try:
        descriptor = lock_folder(work, "work", make=False)
    except UserError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def print_new(work: str) -> None:
    """Print the lines of the log that no call has printed."""
    note, done = os.path.join(work, "printed"), 0
    with contextlib.suppress(OSError, ValueError), open(note) as f:
        done = int(f.read())
    with open(os.path.join(work, "log.txt"), "rb") as f:
        f.seek(done)
        new = f.read()
    new = new[:new.rfind(b"\n") + 1]
    if new:
        print(new.decode(errors="replace"), end="", flush=True)
        replace_file(note, str(done + len(new)).encode())


def copy_results(work: str, out: str | None) -> None:
    """Copy what is to be kept, each file completely or not at all."""
    if out is None:
        return
    write_failures(work)
    for name in RESULTS:
        path = os.path.join(work, "" if name.endswith(".txt") else "frontier", name)
        if os.path.exists(path):
            with os_error_as_user_error(f"cannot copy {path} to {out}"), open(path, "rb") as f:
                os.makedirs(out, exist_ok=True)
                replace_file(os.path.join(out, name), f.read())


def write_failures(work: str) -> None:
    """Write the ends of the output of failed runs to failed.txt."""
    parts = []
    for path in sorted(glob.glob(os.path.join(work, "frontier", "experiment_logs", "*", "*", "runs", "*"))):
        report = read_report(path)
        if report is not None and report["ended_by"] == "itself" and report["code"] != 0:
            with open(os.path.join(path, "stdout.log"), "rb") as f:
                parts.append(f"{path}: {report}\n".encode() + f.read()[-KEPT:] + b"\n")
    if parts:
        replace_file(os.path.join(work, "failed.txt"), b"".join(parts[-FAILURES:]))


def main() -> int:
    args = read_arguments()
    return {"begin": begin, "wait": wait, "sequence": sequence}[args.command](args) or 0


if __name__ == "__main__":
    sys.exit(main())
