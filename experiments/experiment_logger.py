"""The folder of an experiment: its configuration, the result and curve of each run, and their statistics.

    experiment_logs/<name>_<timestamp>/
        experiment.log    the printed lines of the runner, with times
        config.json       the experiment as it was run, n_runs, parallel; environment: machine, versions;
                          script: its SHA-256; git_info, gpu_info
        results.jsonl     a line a run: run_id, seed, final_val_loss, final_train_loss, time_seconds (of
                          training, by the script's clock), wall_seconds, gpus, final_step, success; for a
                          failed run also error, ended_by (see supervise.py), output_tail (its last lines)
        metrics.jsonl     run_id, step (updates done), val_loss or train_loss, train_time_ms, step_avg_ms
        summary.json      statistics of the successful runs, git_info, gpu_info
        git_diff.patch    changes since the commit
        <script>          a copy of the script
        runs/run_0_seed_42/{stdout.log, report.json, out/}
        probe/            the same for the probe of a campaign
        LOCK              see nanosync/folder_lock.py

`python experiment_logger.py` checks that an installation has all that experiments need. Files are replaced
completely, so a program that reads them while runs train never finds an incomplete file.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time

if __name__ == "__main__":
    import root_path  # noqa: F401

from configurator import Parser
from experiments.experiment_config import (
    DEFAULTS,
    MAX_NUMBER,
    MAX_RUNS,
    NUMBER,
    SCHEMA,
    check_keys,
    check_stored,
    check_values,
    finite,
    in_range,
    read_json,
    script_path,
    stage_name,
)
from experiments.experiment_statistics import describe, p_at_most
from nanosync.errors import UserError, shown
from nanosync.files import (
    ROOT,
    first_line,
    json_text,
    made_folder,
    open_regular,
    os_error_as_user_error,
    read_file,
    replace_file,
    sha256_of,
    unused_path,
)

MAX_LINES = 2**30  # bytes of a JSON Lines file
NONE = type(None)
RESULT = {"run_id": int, "seed": int, "success": bool, "final_val_loss": (*NUMBER, NONE),
          "time_seconds": NUMBER, "wall_seconds": NUMBER}
OPTIONAL = {"final_train_loss": (*NUMBER, NONE), "final_step": int, "gpus": int, "error": str,
            "ended_by": str}  # of a result
RANGES = {"run_id": (0, 2**31), "seed": (0, 2**32), "step": (0, 2**53), "final_step": (0, 2**53),
          "gpus": (1, 2**31), "time_seconds": (0, MAX_NUMBER), "wall_seconds": (0, MAX_NUMBER),
          "train_time_ms": (0, MAX_NUMBER)}  # least and most; of other numbers -MAX_NUMBER and MAX_NUMBER
METRICS = {"run_id", "step", "val_loss", "train_loss", "train_time_ms", "step_avg_ms"}  # numbers
DESCRIBED = {"script": {"path": str, "sha256": str}, "git_info": {"commit": (str, NONE),
             "diff_sha256": (str, NONE)}, "gpu_info": {"gpus": list}}  # in config.json, if present
GPU_FIELDS = ("name", "memory.total", "driver_version")


class ExperimentLogger:
    """The folder of an experiment, new or resumed."""

    def __init__(self, folder: str, config: dict, results: dict[int, dict], metrics: dict[int, list[dict]],
                 say=print):
        """Called by `create` and `reopen`. results, metrics: by run_id; say: prints a line."""
        self.folder, self.config, self.results, self.metrics, self.say = folder, config, results, metrics, say
        self.lock = None  # the descriptor from runner.lock
        self._git = git_info()
        self._gpus = gpu_info()

    @classmethod
    def create(cls, config: dict, parent: str, n_runs: int, parallel: int = 1, say=print
               ) -> "ExperimentLogger":
        """Make a folder in `parent`, named after the experiment and the time, completely or not at all.
        Raises UserError."""
        stem = os.path.join(parent, f"{config['experiment_name']}_{time.strftime('%Y%m%d_%H%M%S')}")
        with made_folder(parent), os_error_as_user_error(f"cannot make {stem}"):
            log = cls(unused_path(os.path.join(parent, f".new-{os.getpid()}")), config, {}, {}, say)
            try:
                log._begin(n_runs, parallel)
                folder = unused_path(stem)
                os.rename(log.folder, folder)
            except BaseException:
                shutil.rmtree(log.folder, ignore_errors=True)
                raise
            log.folder = folder
        return log

    def _begin(self, n_runs: int, parallel: int) -> None:
        """Write the files of a folder without runs."""
        os.makedirs(self.path("runs"))
        script = script_path(self.config)
        described = {"config": self.config, "n_runs": n_runs, "parallel": parallel,
                     "environment": environment(), "git_info": self._git, "gpu_info": self._gpus,
                     "script": {"path": script, "sha256": digest(script)}}
        self._write("git_diff.patch", git_diff())
        shutil.copyfile(script, self.path(os.path.basename(script)))
        self.write_summary()
        self._write("config.json", json_text(described))

    @classmethod
    def reopen(cls, folder: str, parallel: int = 1, say=print) -> "ExperimentLogger":
        """Resume an experiment; warn of a changed commit, GPU or --parallel. Raises UserError, also if the
        script has changed."""
        described, results, metrics = read_folder(folder)
        log = cls(folder, described["config"], results, metrics, say)
        for run_id, result in results.items():
            if result["seed"] != log.config["base_seed"] + run_id:
                raise UserError(f"{folder}: run {run_id} had the seed {result['seed']}, and config.json has "
                                f"base_seed={log.config['base_seed']} now: put that back")
        script = script_path(log.config)
        if digest(script) != described["script"].get("sha256"):
            raise UserError(f"{script} has changed since {folder} began: its runs would not be comparable; "
                            f"start a new experiment, or use the copy in that folder")
        now = described | {"git_info": log._git, "gpu_info": log._gpus, "parallel": parallel}
        for name, (before, current) in differences(made_by(described), made_by(now)).items():
            log.line(f"warning: {name} is {current} and was {before}: its runs may not be comparable")
        return log

    def raise_n_runs(self, n_runs: int) -> int:
        """Raise n_runs in config.json if it is lower; return its value then. Raises UserError."""
        described = read_json(self.path("config.json"))
        if n_runs > described.get("n_runs", 0):
            self._write("config.json", json_text(described | {"n_runs": n_runs}))
        return max(n_runs, described.get("n_runs", 0))

    def path(self, *names: str) -> str:
        """Return the path of a file in the folder."""
        return os.path.join(self.folder, *names)

    def run_folder(self, run_id: int) -> str:
        """Return the folder of a run."""
        return self.path("runs", f"run_{run_id}_seed_{self.config['base_seed'] + run_id}")

    def fresh_run_folder(self, run_id: int) -> str:
        """Make the folder of a run; that of an earlier attempt is renamed and kept."""
        folder = self.run_folder(run_id)
        with os_error_as_user_error(f"cannot make {folder}"):
            if os.path.exists(folder):
                os.rename(folder, unused_path(folder + "_unfinished"))
            os.makedirs(folder)
        return folder

    def missing(self, n_runs: int, retry_failed: bool = False) -> list[int]:
        """Return those of the first n runs that have no result; with retry_failed, failed runs as well."""
        return [i for i in range(n_runs) if i not in self.results
                or (retry_failed and not self.results[i]["success"])]

    def line(self, text: str) -> None:
        """Print a line, and write it to experiment.log with the time."""
        self.say(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Write a line to experiment.log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
        with contextlib.suppress(OSError), open_regular(self.path("experiment.log"), "a", encoding="utf-8",
                                                        errors="backslashreplace") as f:
            f.writelines(stamp + part + "\n" for part in text.splitlines())

    def record(self, result: dict, metrics: list[dict]) -> None:
        """Write the result and the curve of an ended run."""
        self.results[result["run_id"]] = result
        self.metrics[result["run_id"]] = [{"run_id": result["run_id"], **row} for row in metrics]
        self._write("metrics.jsonl", lines_of(row for i in sorted(self.metrics) for row in self.metrics[i]))
        self._write("results.jsonl", lines_of(self.results[i] for i in sorted(self.results)))
        self.write_summary()

    def write_summary(self) -> None:
        """Write summary.json. Raises UserError."""
        summary = {"experiment_name": self.config["experiment_name"],
                   "end_time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                   "statistics": statistics_of(list(self.results.values()), self.config["target_val_loss"]),
                   "git_info": self._git, "gpu_info": self._gpus}
        self._write("summary.json", json_text(summary))

    def _write(self, name: str, text: str) -> None:
        """Replace a file. Raises UserError: a runner that cannot record results must not start more runs."""
        with os_error_as_user_error(f"cannot write {self.path(name)}"):
            replace_file(self.path(name), text.encode(errors="backslashreplace"))


def made_by(described: dict) -> dict:
    """Return what the losses and times of an experiment depend on besides its settings.

    described: its config.json.
    """
    git, gpus = described.get("git_info") or {}, described.get("gpu_info") or {}
    names = sorted({gpu["name"] for gpu in gpus.get("gpus", [])})
    return {"commit": git.get("commit"), "git diff": git.get("diff_sha256"),
            "GPU": ", ".join(names) or "none", "--parallel": described.get("parallel")}


def differences(before: dict, now: dict) -> dict[str, tuple]:
    """Return (before, now) of each entry that is known in both and differs."""
    both = {key: (before[key], now.get(key)) for key in before}
    return {key: (ours, its) for key, (ours, its) in both.items() if ours != its and None not in (ours, its)}


def statistics_of(results: list[dict], target: float | None) -> dict:
    """Return statistics of the successful runs, and the number of failed ones."""
    good = [result for result in results if result["success"]]
    times = [result["time_seconds"] for result in good]
    time_ = describe(times)
    wall = [result["wall_seconds"] for result in results]
    losses = [result["final_val_loss"] for result in good]
    return {"n_runs": len(results), "successful_runs": len(good), "failed_runs": len(results) - len(good),
            "val_loss": describe(losses),
            "time": {"mean": time_["mean"], "std": time_["std"], "total": math.fsum(times)},
            "wall_time": {"mean": describe(wall)["mean"], "total": math.fsum(wall)},
            "target": {"val_loss": target, "p_value": p_at_most(losses, target)}}


def lines_of(rows) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read_lines(path: str, appended: bool = False) -> list[dict]:
    """Return the objects of a JSON Lines file, none if the file does not exist. Raises UserError.

    appended: leave out a last line without its end, which a process left that was killed while it appended.
    """
    if not os.path.exists(path):
        return []
    try:
        content = read_file(path, MAX_LINES)
        lines = content[:content.rfind(b"\n") + 1 if appended else None].decode().split("\n")
        rows = [json.loads(text) for text in lines if text]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON Lines: {first_line(e)}") from None
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path} has a line that is no JSON object")
        check_stored(row, path)
    return rows


def read_folder(folder: str) -> tuple[dict, dict[int, dict], dict[int, list[dict]]]:
    """Return config.json, and results and metrics by run_id. Raises UserError."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder} is no experiment: it has no config.json (name one in experiment_logs/)")
    described = read_json(path)
    if not isinstance(described, dict) or not isinstance(described.get("script"), dict):
        raise UserError(f"{path} is not of an experiment: it has no config and script")
    check_keys(described.get("config"), SCHEMA, path)
    described["config"] = DEFAULTS | described["config"]
    described["config"]["stage"] = stage_name(described["config"]["stage"])
    check_values(described["config"], path)
    check_described(described, path)
    results, metrics = {}, {}
    path = os.path.join(folder, "results.jsonl")
    for row in read_lines(path):
        check_result(row, path)
        results[row["run_id"]] = row
    path = os.path.join(folder, "metrics.jsonl")
    for row in read_lines(path):
        if not {"run_id", "step"} <= set(row):
            raise UserError(f"{path} has a row without run_id and step")
        for key in METRICS & set(row):
            if row[key] is not None or key in ("run_id", "step"):
                check_number(row, key, path, "a row")
        metrics.setdefault(row["run_id"], []).append(row)
    return described, results, metrics


def check_described(described: dict, path: str) -> None:
    """Raise UserError for a config.json whose n_runs, script, git_info or gpu_info cannot be used."""
    n_runs = described.get("n_runs", 1)
    if type(n_runs) is not int or not 1 <= n_runs <= MAX_RUNS:
        raise UserError(f"{path}: n_runs={shown(n_runs)} must be an integer from 1 to {MAX_RUNS}")
    if not isinstance(described.get("parallel"), (int, NONE)):
        raise UserError(f"{path}: parallel={shown(described['parallel'])} must be an integer")
    for name, entries in DESCRIBED.items():
        found = described.get(name) or {}
        if not isinstance(found, dict):
            raise UserError(f"{path}: {name}={shown(found)} must be an object")
        for key, kinds in entries.items():
            if key in found and not isinstance(found[key], kinds):
                raise UserError(f"{path}: {name} has {key}={shown(found[key])}, which is of another type")
    for gpu in (described.get("gpu_info") or {}).get("gpus", []):
        if not isinstance(gpu, dict) or not isinstance(gpu.get("name"), str):
            raise UserError(f"{path}: gpu_info has a GPU without a name: {shown(gpu)}")


def check_result(row: dict, path: str) -> None:
    """Raise UserError for a row of results.jsonl that lacks a field, or has one of another type or range."""
    for key, kinds in (RESULT | OPTIONAL).items():
        if key not in row and key in RESULT:
            raise UserError(f"{path}: a run has no {key}")
        if key in row and not isinstance(row[key], kinds):
            raise UserError(f"{path}: a run has {key}={shown(row[key])}")
        if row.get(key) is not None and kinds not in (bool, str):
            check_number(row, key, path, "a run")
    if row["success"] and row["final_val_loss"] is None:
        raise UserError(f"{path}: run {row['run_id']} succeeded without a val loss")


def check_number(row: dict, key: str, path: str, what: str) -> None:
    """Raise UserError unless an entry is a number within its range."""
    if finite(row[key]) is None:
        raise UserError(f"{path}: {what} has {key}={shown(row[key])}, which must be a number")
    if not in_range(row[key], *RANGES.get(key, (-MAX_NUMBER, MAX_NUMBER))):
        raise UserError(f"{path}: {what} has {key}={shown(row[key])}, which is out of range")


def digest(path: str) -> str:
    """Return the SHA-256 of a file. Raises UserError."""
    with os_error_as_user_error(f"cannot read {path}"):
        return sha256_of(path)


def environment() -> dict:
    """Return versions and machine, without starting CUDA."""
    from importlib import metadata

    versions = {}
    for package in ("torch", "numpy", "scipy", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"python": platform.python_version(), **versions, "machine": platform.machine(),
            "cores": os.cpu_count(), "host": platform.node()}


def _git(*args: str) -> str | None:
    """Return the output of git; None if git fails."""
    try:
        return subprocess.run(["git", *args], cwd=ROOT, timeout=30, capture_output=True, check=True,
                              text=True, errors="backslashreplace").stdout
    except (OSError, subprocess.SubprocessError):
        return None


def git_info() -> dict:
    """Return commit, branch, dirty (tracked files differ from it) and diff_sha256; all None without git or
    without history."""
    commit, branch = _git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD")
    diff, status = _git("diff", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit and commit.strip(), "branch": branch and branch.strip(),
            "dirty": None if commit is None or status is None else bool(status.strip()),
            "diff_sha256": None if diff is None else
            hashlib.sha256(diff.encode(errors="backslashreplace")).hexdigest()[:12]}


def git_diff() -> str:
    """Return the patch from the commit to the code that runs, or a comment without git."""
    diff = _git("diff", "HEAD")
    return "# not known: git or its history is not there\n" if diff is None else diff


def gpu_info() -> dict:
    """Return count and gpus: name, memory and driver of each GPU of nvidia-smi, without starting CUDA."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"],
                              timeout=30, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"count": 0, "gpus": []}
    gpus = [dict(zip(("name", "memory", "driver"), map(str.strip, text.split(","))))
            for text in done.stdout.splitlines() if text.strip()]
    return {"count": len(gpus), "gpus": gpus}


def check_installation() -> list[tuple[str, bool, str]]:
    """Return (name, usable, description) of each requirement of experiments."""
    found = []
    for package in ("torch", "numpy", "scipy", "matplotlib", "tqdm"):
        try:
            found.append((package, True, importlib.import_module(package).__version__))
        except ImportError as e:
            found.append((package, False, f"{e}: pip install -r requirements-extras.txt"))
    script = os.path.join(ROOT, "train_gpt.py")
    found.append(("train_gpt.py", os.path.isfile(script), script))
    git, gpus = git_info(), gpu_info()
    commit = git["commit"]
    found.append(("git", True, f"commit {commit}" if commit else "none: runs cannot name a commit"))
    names = {gpu["name"] for gpu in gpus["gpus"]}
    found.append(("GPUs", True, f"{gpus['count']} ({', '.join(names)})" if names else "none: runs need "
                  "--device=cpu --compile=False and small sizes"))
    try:
        found.append(("logging", True, _try_logging()))
    except (UserError, AssertionError, OSError) as e:
        found.append(("logging", False, str(e)))
    return found


def _try_logging() -> str:
    """Write an experiment of three runs, one of them failed, and read it again."""
    with tempfile.TemporaryDirectory() as folder:
        config = DEFAULTS | {"experiment_name": "check", "script": os.path.abspath(__file__), "n_gpus": 1,
                             "stage": "stage_a_screening", "base_seed": 1, "target_val_loss": 3.28,
                             "stage_config": {"num_iterations": 1}}
        log = ExperimentLogger.create(config, folder, 3, 1, lambda text: None)
        for i, loss in enumerate((3.0, None, 4.0)):
            log.record({"run_id": i, "seed": 1 + i, "final_val_loss": loss, "final_train_loss": loss,
                        "time_seconds": 1.0, "wall_seconds": 2.0, "final_step": 1,
                        "success": loss is not None},
                       [] if loss is None else [{"step": 1, "val_loss": loss}])
        again = ExperimentLogger.reopen(log.folder)
        summary = read_json(log.path("summary.json"))["statistics"]
        assert again.results == log.results and again.metrics[0][0]["val_loss"] == 3.0, "read otherwise"
        assert summary["val_loss"]["mean"] == 3.5 and summary["failed_runs"] == 1, summary
        return "an experiment is written, summarised and read again"


def main() -> None:
    Parser(__doc__).parse_args()
    found = check_installation()
    for name, fine, text in found:
        print(f"{'ok' if fine else 'MISSING':<8}{name:<14}{text}")
    if not all(fine for _, fine, _ in found):
        raise UserError("this installation cannot run experiments: see what is missing above")
    print("experiments can be run here")


if __name__ == "__main__":
    main()
