"""The layout of the repository: imports go one way, files and functions are short, training scripts share
settings and the training step only. CPU; a second.

    python -m pytest tests/unit/test_layout.py
"""

import ast
import difflib
import functools
import itertools
import subprocess
import sys

from helpers import ROOT

SCRIPTS = ("train.py", "train_reduced_sync.py", "train_gpt.py", "train_gpt_fast.py", "sample.py", "bench.py",
           "hellaswag.py", "evaluate.py",
           "visualize_training.py", "estimate_training_time.py", "convert.py")
TRAINING = SCRIPTS[:4]
BELOW = {  # folder or file -> what of the repository it may import
    "kernels": {"kernels"},
    "nanosync": {"kernels", "nanosync", "configurator"},
    "configurator": {"nanosync"},
    "model": {"kernels", "nanosync"},
    "tensor_parallel_model": {"kernels", "nanosync", "model"},
    "reduced_sync_model": {"nanosync", "model", "tensor_parallel_model"},
    "models": {"kernels", "nanosync", "model", "tensor_parallel_model", "reduced_sync_model", "models"},
    "data": {"nanosync", "configurator", "data"},
}
LONGEST = {"train.py": 300, "train_reduced_sync.py": 310, "train_gpt.py": 560, "train_gpt_fast.py": 600,
           "nanosync/run.py": 300}


FOLDERS = ("kernels", "nanosync", "models", "benchmarks", "data", "experiments")


@functools.cache
def python_files() -> list[str]:
    """Return the paths of all Python files but those of tests, records and configuration."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@functools.cache
def imported(path: str) -> set[str]:
    """Return the first parts of the modules of this repository that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    ours = {path.split("/")[0].removesuffix(".py") for path in python_files()}
    return {name.split(".")[0] for name in names} & ours


def test_imports_go_one_way():
    for path in python_files():
        place = path.split("/")[0].removesuffix(".py")
        if place in BELOW:
            assert imported(path) <= BELOW[place], f"{path} imports {imported(path) - BELOW[place]}"
        scripts = {script.removesuffix(".py") for script in SCRIPTS}
        assert not imported(path) & scripts, f"{path} imports a script"


def test_only_the_registry_imports_a_script():
    """Files that import a module by a name that is a value are these, each for its reason."""
    reasons = {
        "models/registry.py": "a speedrun script has its model, which inference with its checkpoint needs; "
                              "tests/unit/test_speedrun_inference.py: it imports for no other checkpoint",
        "benchmarks/peers.py": "the user's file of another project",
        "experiments/experiment_logger.py": "versions of packages",
        "nanosync/log_sinks.py": "optional packages",
        "nanosync/lm_eval_adapter.py": "a package with the name of a script",
    }
    calls = ("import_module", "__import__", "run_path", "run_module", "spec_from_file_location")
    for path in python_files():
        nodes = ast.walk(parsed(path))
        names = {node.attr if isinstance(node, ast.Attribute) else node.id for node in nodes
                 if isinstance(node, (ast.Name, ast.Attribute))}
        assert path in reasons or not names & set(calls), path


def test_logs_are_read_without_torch():
    code = "import sys; import nanosync.run_log; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_and_functions_are_short():
    for path in python_files():
        text = (ROOT / path).read_text()
        assert text.count("\n") <= LONGEST.get(path, 10**6 if path.startswith("kernels/") else 450), path
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and not path.startswith("kernels/"):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
    assert len(list(ROOT.glob("*.py"))) <= 15


def test_training_scripts_share_settings_and_the_training_step_only():
    texts = {script: (ROOT / script).read_text().splitlines() for script in TRAINING}
    parts = {}
    for script, lines in texts.items():
        rulers = [i for i, line in enumerate(lines) if line.startswith("# ------")]
        step = next(i for i, line in enumerate(lines) if line.strip().startswith("# forward and backward"))
        head = [line for line in lines[:rulers[0]] if not line.startswith(("import ", "from "))]
        parts[script] = head, lines[rulers[1]:step]
    for (a, ours), (b, theirs) in itertools.combinations(parts.items(), 2):
        for one, other in itertools.product(ours, theirs):
            blocks = difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
            longest = max(blocks, key=lambda block: block.size)
            assert longest.size <= 8, (a, b, one[longest.a:longest.a + longest.size])


def test_names_of_test_files_are_unique():
    """pytest imports them by their names, and refuses a second one of a name."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
