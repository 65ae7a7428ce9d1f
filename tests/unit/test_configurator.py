"""Settings: defaults, config files, --key=value, their errors and --help. No torch; seconds.

    python -m pytest tests/unit/test_configurator.py
"""

import ast
import sys
import textwrap

import pytest
from helpers import ROOT

from configurator import (
    Parser,
    Setting,
    check_seed,
    configure,
    evaluate,
    run_config_file,
    script_defaults,
)
from nanosync.errors import UserError, one_line, shown
from nanosync.files import check_can_write, dataset_folder
from nanosync.setting_hints import ELSEWHERE, form, name_here

SCRIPT = '''
"""A script."""
# ----------------
# I/O
out_dir = "out"  # where results go
steps = 5 * 8  # how many
lr = 6e-4
compile = True  # faster
# model
block_types: list | None = None  # one a layer
top_p: float | None = None
dtype = "a" if steps else "b"
# ----------------
config = configure(globals())
after = 1
'''


@pytest.fixture
def settings(tmp_path):
    """settings(*argv, file="...") -> the Config of SCRIPT, a config file with that content before argv."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*argv, file=None):
        namespace = {"__file__": str(tmp_path / "script.py"), "__doc__": "A script."}
        exec(SCRIPT.split("config =")[0], namespace)
        if file is not None:
            path = tmp_path / "a_config.py"
            path.write_text(textwrap.dedent(file))
            argv = (str(path), *argv)
        config = configure(namespace, list(argv))
        assert all(namespace[key] == value for key, value in config.items())
        return config

    return run


def test_defaults(settings):
    config = settings()
    assert list(config) == ["out_dir", "steps", "lr", "compile", "block_types", "top_p", "dtype"]
    assert config["steps"] == 40 and set(config.origin.values()) == {""}


def test_settings_of_other_scripts(tmp_path):
    """A script may take those of others, which are not run."""
    (tmp_path / "own.py").write_text("steps = 1\nprice = 2.0  # of a step\nconfig = configure(globals())\n")
    (tmp_path / "other.py").write_text(SCRIPT + "\nraise SystemExit\n")
    (tmp_path / "file.py").write_text("lr = 1e-3\nprice = 3\n")
    namespace = {"__file__": str(tmp_path / "own.py"), "steps": 1, "price": 2.0}

    def run(*argv):
        return configure(namespace, [str(tmp_path / "file.py"), *argv], others=(str(tmp_path / "other.py"),))

    config = run("--compile=False")
    assert (config["price"], config["steps"], config["lr"], config["compile"]) == (3.0, 40, 1e-3, False)
    assert config.origin["lr"].endswith("file.py") and config.origin["compile"] == "command line"
    assert namespace["price"] == 3.0 and namespace["steps"] == 40 and "lr" not in namespace
    with pytest.raises(UserError, match="unknown key 'comple' in the command line: did you mean 'compile'"):
        run("--comple")


@pytest.mark.parametrize("argument, key, value", [
    ("--steps=3", "steps", 3),
    ("--steps=5*8+1", "steps", 41),
    ("--lr=1", "lr", 1.0),
    ("--lr=-2.5e-3", "lr", -2.5e-3),
    ("--out_dir=a=b", "out_dir", "a=b"),
    ("--out_dir=2026", "out_dir", "2026"),
    ("--out_dir=", "out_dir", ""),
    ("--out-dir='x y'", "out_dir", "x y"),
    ("--compile", "compile", True),
    ("--compile=False", "compile", False),
    ("--block_types=['spd']*2+['tp']", "block_types", ["spd", "spd", "tp"]),
    ("--block_types=None", "block_types", None),
    ("--top_p=1", "top_p", 1.0),
    ("--top_p=None", "top_p", None),
])
def test_command_line(settings, argument, key, value):
    config = settings(argument)
    assert config[key] == value and type(config[key]) is type(value)
    assert config.origin[key] == "command line"


@pytest.mark.parametrize("argv, key, value", [
    (["--steps", "3"], "steps", 3),
    (["--steps", "-3"], "steps", -3),
    (["--lr", "-1e-3"], "lr", -1e-3),
    (["--out_dir", "x"], "out_dir", "x"),
    (["--out-dir", "x"], "out_dir", "x"),
    (["--compile", "True"], "compile", True),
    (["--compile", "false"], "compile", False),
    (["--compile", "--steps", "3"], "compile", True),
    (["--block_types", "['spd']*2"], "block_types", ["spd", "spd"]),
    (["--block_types", "None"], "block_types", None),
    (["--top_p", "none"], "top_p", None),
    (["--top_p=null"], "top_p", None),
    (["--compile=TRUE"], "compile", True),
    (["--steps=1e3"], "steps", 1000),
    (["--steps", "4.0"], "steps", 4),
])
def test_values_as_users_type_them(settings, argv, key, value):
    config = settings(*argv)
    assert config[key] == value and type(config[key]) is type(value)
    assert config.origin[key] == "command line"


def test_a_flag_does_not_take_the_config_file_after_it(settings, tmp_path):
    (tmp_path / "other.py").write_text("steps = 5\n")
    config = settings("--compile", str(tmp_path / "other.py"))
    assert config["compile"] is True and config["steps"] == 5


def test_home_in_paths(settings, tmp_path, monkeypatch):
    """From the command line, the environment and files; a text that is no path keeps its ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings("--out_dir=~/x")["out_dir"] == f"{tmp_path}/x"
    assert settings("--out_dir", "~")["out_dir"] == str(tmp_path)
    assert settings(file="out_dir = '~/y'")["out_dir"] == f"{tmp_path}/y"
    assert settings("--dtype=~/x")["dtype"] == "~/x"
    (tmp_path / "mine.py").write_text("steps = 5\n")
    assert settings("~/mine.py")["steps"] == 5
    (tmp_path / "data" / "set").mkdir(parents=True)
    for name in ("~/data/set", "~/data/set/", str(tmp_path / "data" / "set") + "//"):
        assert dataset_folder(name) == f"{tmp_path}/data/set"
    monkeypatch.chdir(tmp_path)
    assert all(dataset_folder(name) == "data/set" for name in ("set", "set/", "data/set/"))


def test_arguments_of_other_scripts_expand_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    parser = Parser("A script.")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--out")
    parsed = parser.parse_args(["~/a", "b", "--out", "~/c"])
    assert parsed.paths == [f"{tmp_path}/a", "b"] and parsed.out == f"{tmp_path}/c"
    assert parser.parse_args(["~/a", "--out=x", "b"]).paths == [f"{tmp_path}/a", "b"]
    assert parser.parse_args(["--", "-a", "~/b"]).paths == ["-a", f"{tmp_path}/b"]
    for wrong in (["a", "--other=x", "b"], ["a", "\udcff"]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(wrong)
        assert ended.value.code == 2


def test_config_files_of_the_repository_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = Setting("n_layer", int, "", "")
    names = [name for name in ast_names(ROOT / "config" / "train_python_char.py") if name != "n_layer"]
    known = {name: Setting(name, None, "", "") for name in names} | {"n_layer": kind}
    values = run_config_file("config/train_python_char.py", {}, known)
    assert values["n_layer"] == 4


def ast_names(path):
    return [node.targets[0].id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]


def test_an_argument_that_is_the_value_of_a_setting(tmp_path):
    (tmp_path / "s.py").write_text("out_dir = 'out'\nsteps = 1\nconfig = configure(globals())\n")
    (tmp_path / "file.py").write_text("steps = 2\n")

    def run(*argv):
        namespace = {"__file__": str(tmp_path / "s.py"), "out_dir": "out", "steps": 1}
        return configure(namespace, list(argv), takes="out_dir")

    config = run("mine", "--steps", "3")
    assert (config["out_dir"], config["steps"], config.origin["out_dir"]) == ("mine", 3, "command line")
    config = run(str(tmp_path / "file.py"), "mine")
    assert (config["out_dir"], config["steps"]) == ("mine", 2)
    with pytest.raises(UserError, match="a, b: give one of them"):
        run("a", "b")


def test_file_then_command_line(settings):
    config = settings("--steps=7", file="""
        import time
        from math import sqrt
        _helper = 2
        def double(x): return 2 * x
        steps = double(_helper)
        out_dir = "run-" + str(int(time.time()))
        lr = lr / 2  # on top of the default
        block_types = ("tp", "spd")
    """)
    assert config["steps"] == 7 and config.origin["steps"] == "command line"
    assert config["lr"] == 3e-4 and config.origin["lr"].endswith("a_config.py")
    assert config["out_dir"].startswith("run-") and config["block_types"] == ["tp", "spd"]
    assert "a_config.py" in config.table() and "command line" in config.table()


@pytest.mark.parametrize("argv, file, words", [
    (["--step=3"], None, "unknown key 'step' in the command line: did you mean 'steps'?"),
    (["--after=3"], None, "unknown key 'after'"),
    (["--steps=3.5"], None, "steps=3.5 (the command line) is of type float; it must be int"),
    (["--steps=True"], None, "it must be int"),
    (["--lr=1e999"], None, "lr=inf (the command line) must be a finite number"),
    (["--lr=1" + 400 * "0"], None, "lr=inf (the command line) must be a finite number"),
    (["--steps=" + "9" * 400], None, "99999 (the command line) does not fit into 64 bits"),
    (["--steps=9223372036854775808"], None, "steps=9223372036854775808 (the command line) does not fit into"),
    (["--steps=" + "9" * 8000], None, "its numbers have too many digits"),
    (["--steps=" + "1+" * 4000 + "1"], None, "more than 100 operations or lists inside each other"),
    (["--steps=" + "1+" * 200 + "1"], None, "more than 100 operations or lists inside each other"),
    (["--steps=" + "1+" * 30000 + "1"], None, "it has 60,001 characters, and a literal may have 10,000"),
    (["--steps=" + "*".join(["9" * 1000] * 9)], None, "its numbers have too many digits"),
    (["--block_types=[0]*900000000"], None, "it makes 900,000,000 values, and a setting may have 100,000"),
    (["--block_types=['x']*99999+['x']*99999"], None, "it makes 199,998 values"),
    (["--block_types=[['x']*9000]*9000"], None, "it makes 81,000,000 values"),
    (["--block_types=[" + "[0]*90000," * 3 + "]"], None, "it makes 270,000 values"),
    (["--block_types=['x'*10**9]"], None, "is of type str; it must be list or None"),
    (["--block_types=['x'*10000*10000]"], None, "it makes 100,000,000 values"),
    (["--block_types=" + "[" * 150 + "]" * 150], None, "more than 100 operations or lists inside each other"),
    (["--block_types=" + "(" * 9000], None, "more than 100 operations or lists inside each other"),
    (["--block_types=" + "-" * 9000 + "1"], None, "block_types="),
    (["--block_types=" + "not " * 2400 + "1"], None, "block_types="),
    (["--block_types=a" + "()" * 4900], None, "block_types="),
    (["--" + "x" * 10**5], None, "unknown key 'xxx"),
    (["x" * 10**5 + "=3"], None, "File name too long; settings are given as --key=value"),
    (["--block_types=[1e999]"], None, "'block_types' is not a finite number (the command line)"),
    (["--block_types=[" + "9" * 99 + "]"], None, "which does not fit into 64 bits (the command line)"),
    (["--out_dir='a\\x1b[2J'"], None, "'out_dir' has control characters: 'a\\x1b[2J' (the command line)"),
    ([], "steps = 10**5000", "steps=<int> ("),
    (["--out_dir=\udcff"], None, "out_dir='\\udcff' (the command line) is not UTF-8"),
    ([], "lr = float('nan')", "lr=nan ("),
    (["--lr=fast"], None, "lr='fast' (the command line) is of type str; it must be float"),
    (["--compile=1"], None, "it must be True/False"),
    (["--top_p=x"], None, "it must be float or None"),
    (["--steps"], None, "--steps needs a value"),
    (["--steps", "--compile"], None, "--steps needs a value"),
    (["--compile", "0"], None, "it must be True/False: write --compile=False"),
    (["--compile=yes"], None, "it must be True/False: write --compile=True"),
    ([], "compile = 1", "it must be True/False: write compile = True"),
    (["--block_types=spd"], None, """it must be list or None: write --block_types="['spd']*12\""""),
    (["--block_types=spd,tp"], None, """write --block_types="['spd', 'tp']\""""),
    (["--block_types=[spd]*6"], None, """write --block_types="['spd']*6\""""),
    (["--block_types=7"], None, 'write --block_types="[7]"'),
    ([], "block_types = 'spd'", "write block_types = ['spd']*12"),
    (["--steps=10k"], None, "it must be int: write --steps=10_000"),
    (["--steps=10,000"], None, "it must be int: write ten thousand as 10_000 or 1e4"),
    (["--steps=1e30"], None, "is of type float; it must be int"),
    (["steps=3"], None, "settings are given as --key=value: --steps=3"),
    (["--n_epochs", "3"], None, "unknown key 'n_epochs' in the command line"),
    (["--max_lr", "3"], None, "unknown key 'max_lr'"),
    (["--output_dir=x"], None, "unknown key 'output_dir' in the command line: here it is 'out_dir'"),
    (["--checkpoint_dir", "x"], None, "here it is 'out_dir', where results go"),
    ([], "torch_compile = True", ": here it is 'compile', faster"),
    (["--num-gpus", "4"], None, ": start N processes with torchrun --standalone --nproc_per_node=N"),
    (["-b", "3"], None, "cannot read argument '-b'"),
    (["-steps=3"], None, "cannot read argument '-steps=3'"),
    (["no_such.py"], None, "cannot read config file no_such.py"),
    (["steps=3"], None, "settings are given as --key=value"),
    ([], "stepz = 3", "unknown key 'stepz' in"),
    ([], "steps = 'many'", "is of type str; it must be int"),
    ([], "steps = 1 +", "line 1: SyntaxError"),
    ([], "steps = 1\nlr = nothing", "line 2: NameError"),
])
def test_errors(settings, argv, file, words):
    with pytest.raises(UserError) as error:
        settings(*argv, file=file)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(one_line(str(error.value))) < 2100


@pytest.mark.parametrize("name, types, value", [
    ("steps", (int,), [1]), ("lr", (float,), []), ("stage_shares", (list,), "abc"),
    ("sync_points", (list, type(None)), "[a]")])
def test_no_hint_where_none_fits(name, types, value):
    """`10,000` is a list for Python, `[1]` is no number of thousands; lists of numbers hold no words."""
    assert form(name, types, value, True) == ""


def test_long_texts_are_no_literals(settings):
    assert settings("--out_dir=[0]*900000000")["out_dir"] == "[0]*900000000"
    assert settings("--out_dir=" + "1+" * 30000)["out_dir"] == "1+" * 30000
    assert settings("--block_types=['spd']*9999")["block_types"] == ["spd"] * 9999


def test_an_error_is_one_printable_line():
    assert one_line("a\nb\x1b[2J \u2028é\udcff") == "a\\nb\\x1b[2J \\u2028é\udcff"
    assert len(one_line("x" * 10**6)) < 2100 and shown([0] * 10**6, 20).startswith("[0, 0, ")
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert shown(deep) == "<list>"


def test_config_file_of_a_similar_name(settings, tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train_letters.py").touch()
    (tmp_path / "out-letters").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("train_letters.py", "config/train_leters.py", "trainletters.py"):
        with pytest.raises(UserError, match=r"; did you mean config/train_letters\.py\?$"):
            settings(path)
    with pytest.raises(UserError, match=r"No such file or directory$"):
        settings("speedrun.py")


def test_config_file_that_is_not_utf8(settings, tmp_path):
    (tmp_path / "latin1.py").write_bytes(b"# a caf\xe9\nsteps = 3\n")
    with pytest.raises(UserError, match=r"cannot read config file .*latin1\.py: byte 7 is not UTF-8"):
        settings(str(tmp_path / "latin1.py"))


def test_names_of_settings_elsewhere():
    """Each name is of one row, and each row has a setting of a training script."""
    names = [name for _, elsewhere in ELSEWHERE for name in elsewhere.lower().split()]
    assert len(names) == len(set(names))
    scripts = [script_defaults(str(ROOT / f"{name}.py")) for name in ("train", "train_gpt", "sample")]
    for row, _ in ELSEWHERE:
        assert any(name in script for name in row.split() for script in scripts), row
    train = set(scripts[0])
    for name, here in (("mini_batch_size", "batch_size"), ("max_steps", "max_iters"),
                       ("seq_len", "block_size"), ("logdir", "out_dir"),
                       ("grad_accum_steps", "gradient_accumulation_steps")):
        assert name_here(name, train) == here
    assert name_here("mini_batch_size", set(scripts[1])) == "device_batch_size"
    assert name_here("block_size", set(scripts[1])) == "sequence_length"
    assert name_here("sequence_length", train) == "block_size" and name_here("colour", train) == ""


@pytest.mark.parametrize("seed", [-2**63, 0, 2**63 - 1])
def test_seeds(seed):
    check_seed({"seed": seed})
    for other in (seed + 2**64, seed - 2**64):
        with pytest.raises(UserError, match="does not fit into 64 bits"):
            check_seed({"seed": other})


def test_where_files_can_be_made(tmp_path):
    check_can_write(str(tmp_path), "a")
    check_can_write(str(tmp_path / "new" / "newer"), "a")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "file/x", "dangling", "x" * 300, "nul\0"):
        with pytest.raises(UserError, match="a='"):
            check_can_write(str(tmp_path / path), "a")


def test_nothing_on_the_command_line_is_executed(tmp_path):
    for text in (f"open('{tmp_path}/x', 'w')", "().__class__", "[i for i in range(3)]", "__import__('os')"):
        with pytest.raises((ValueError, SyntaxError)):
            evaluate(text)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("argument", ["--help", "-h", "-help", "-?", "help"])
def test_help(settings, capsys, argument):
    with pytest.raises(SystemExit) as exit_:
        settings(argument)
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for part in ("A script.", "# I/O", "--out_dir='out'", "where results go", "--steps=40", "# model"):
        assert part in text
    assert "after" not in text
