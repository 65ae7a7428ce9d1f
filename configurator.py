"""Settings of a script: its own globals, then Python config files, then --key=value.

    python train.py config/train_gpt2.py --batch_size=32 --compile=False

A script lists its settings at the top, one assignment a line with a comment, and then calls

    config = configure(globals())

A setting is every name assigned at the top level before that call. Config files are Python, run with the
settings as they are so far in their namespace; they are the user's own code and trusted. Values on the
command line are literals. Whatever the script does not define is an error, in a file as on the command line:
a misspelt key must not train another model than the one meant. After nanoGPT's configurator.py, with which
config files are interchangeable.
"""

import ast
import atexit
import contextlib
import difflib
import glob
import io
import math
import os
import select
import signal
import sys
import tempfile
import time
import tokenize
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass

before_exit = []  # functions to call when an error ends the process


class UserError(ValueError):
    """An error that the user can mend. Scripts print it as one line and exit with code 2."""


@dataclass
class Setting:
    """A line of a script's settings."""

    name: str
    type: object  # the annotated type or union of types, else the default's; None, for any, if that is None
    comment: str
    heading: str  # the comment lines above it


class Config(dict):
    """The resolved settings, name to value; `origin` has for each where its value came from."""

    def __init__(self, values: dict, origin: dict[str, str]):
        super().__init__(values)
        self.origin = origin

    def table(self) -> str:
        """One line a setting: name, value and, where it is not the script's default, its origin."""
        width = max(map(len, self), default=0)
        lines = (f"  {name:{width}} = {value!r}" + (f"  ({origin})" if (origin := self.origin[name]) else "")
                 for name, value in self.items())
        return "\n".join(lines)


def configure(namespace: dict, argv: list[str] | None = None, rank: int = 0, others: tuple[str, ...] = (),
              environment: str = "") -> Config:
    """Apply config files and --key=value to the settings in `namespace`, a script's globals(); return them.

    argv defaults to the command line. `--help` prints the settings and exits. `others` are paths of scripts
    whose settings may be given as well; they are only in what is returned, and the last script that has a
    setting says its default. `environment`, if given, is a prefix: variables <prefix><KEY> count, after the
    files and before the command line. Raises UserError; installs the hook that ends the script on one with a
    line on stderr and exit code 2 (`rank` is who says it first, see there).
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {setting.name: setting for setting in read_settings(namespace)}
    install_error_hook(rank, settings)
    if "--help" in argv or "-h" in argv:
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end as `cat` does where `| head` has seen enough
        if rank == 0:
            print(help_text(namespace, settings))
        sys.exit(0)
    own, values = list(settings), {name: namespace[name] for name in settings}
    for other in map(script_defaults, others):
        settings |= {setting.name: setting for setting in read_settings(other)}
        values |= {name: other[name] for name in settings if name in other}
    origin = dict.fromkeys(settings, "")
    for path in (arg for arg in argv if not arg.startswith("-")):
        for name, value in run_config_file(path, values, settings).items():
            values[name], origin[name] = value, path
    for variable in sorted(v for v in os.environ if environment and v.startswith(environment)):
        name, where = variable.removeprefix(environment).lower(), f"the environment's {variable}"
        if name not in settings:
            raise unknown_key(name, settings, where)
        values[name], origin[name] = read_value(settings[name], os.environ[variable], where), variable
    for arg in (arg for arg in argv if arg.startswith("-")):
        name, value = parse_argument(arg, settings)
        values[name], origin[name] = value, "command line"
    namespace.update({name: values[name] for name in own})
    return Config(values, origin)


def read_settings(namespace: dict) -> list[Setting]:
    """The settings of a script, in order: its top-level assignments before the call of `configure`."""
    source, assignments = _read_assignments(namespace["__file__"])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}
    settings = []
    for node in assignments:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            default = namespace[target.id]
            kind = None if default is None else type(default)
            if isinstance(node, ast.AnnAssign):
                kind = eval(ast.unparse(node.annotation), {})  # the script's own code, not the user's input
            settings.append(Setting(target.id, kind, comments.get(node.end_lineno, ""),
                                    _heading(comments, source.splitlines(), node.lineno)))
    return settings


def script_defaults(path: str) -> dict:
    """What `read_settings` needs of a script's globals, without running more of it than its settings. Raises
    UserError for one that needs more."""
    namespace = {"__file__": path}
    for node in _read_assignments(path)[1]:
        try:
            exec(compile(ast.Module([node], []), path, "exec"), namespace)
        except Exception as e:
            raise UserError(f"{path}, line {node.lineno}: {type(e).__name__}: {e}: assignments above the "
                            f"call of configure are settings, which are read without the imports: move this "
                            f"below that call") from None
    return namespace


def literal_defaults(path: str) -> dict:
    """Of a script's settings, the defaults that are literals; nothing of it is executed."""
    found = {}
    for node in _read_assignments(path)[1]:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and node.value is not None:
            with contextlib.suppress(ValueError, SyntaxError):
                found[target.id] = evaluate(ast.unparse(node.value))
    return found


def _read_assignments(path: str) -> tuple[str, list]:
    """The source of a script, and its top-level assignments before the call of `configure`."""
    with open(path, encoding="utf-8") as f:
        source = f.read()
    nodes = []
    for node in ast.parse(source).body:
        if any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node)):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            nodes.append(node)
    return source, nodes


def _heading(comments: dict[int, str], lines: list[str], lineno: int) -> str:
    """The whole-line comments right above a line, rulers left out."""
    above = []
    while lineno > 1 and lines[lineno - 2].lstrip().startswith("#"):
        lineno -= 1
        if comments[lineno].strip("- "):
            above.append(comments[lineno])
    return "\n".join(reversed(above))


def help_text(namespace: dict, settings: dict[str, Setting]) -> str:
    """The script's docstring and its settings, with headings, defaults and comments."""
    script = os.path.basename(namespace["__file__"])
    lines = [(namespace.get("__doc__") or "").strip(), "",
             f"usage: python {script} [CONFIG_FILE.py ...] [--key=value ...]", ""]
    width = max(len(f"--{name}={namespace[name]!r}") for name in settings)
    for name, setting in settings.items():
        if setting.heading:
            lines += ["", *("# " + line for line in setting.heading.splitlines())]
        default = f"--{name}={namespace[name]!r}"
        lines.append(f"  {default:{min(width, 44)}}  {setting.comment}".rstrip())
    return "\n".join(lines)


def run_config_file(path: str, values: dict, settings: dict[str, Setting]) -> dict:
    """Run a config file on top of `values`; return the settings it assigned. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
    except OSError as e:
        hint = "; settings are given as --key=value" if not path.endswith(".py") else \
            nearest_file(path, ".py", "config")
        raise UserError(f"cannot read config file {path}: {e.strerror}{hint}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"cannot read config file {path}: byte {e.start} is not UTF-8") from None
    names = dict(values) | {"__file__": path, "__name__": "__config__"}
    before = dict(names)
    try:
        exec(compile(source, path, "exec"), names)
    except Exception as e:
        line = getattr(e, "lineno", None) or _line_in(e, path)
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {getattr(e, 'msg', None) or e}") from None
    assigned = {node.id for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    result = {}
    for name, value in names.items():
        if name in settings:
            if name in assigned or value is not before[name]:
                result[name] = check_type(settings[name], value, path)
        elif not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType)):
            raise unknown_key(name, settings, path)
    return result


def _line_in(error: Exception, path: str) -> int | str:
    """The line of the config file that an error passed through last."""
    line, tb = "?", error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def nearest_file(path: str, ending: str, *folders: str) -> str:
    """A hint, if there is one, at the file of a similar name in the same folder or in others."""
    there = {os.path.basename(found): found for folder in (os.path.dirname(path), *folders)
             for found in sorted(glob.glob(os.path.join(glob.escape(folder), "*" + ending)))}
    near = difflib.get_close_matches(os.path.basename(path), there, 1)
    return f"; did you mean {there[near[0]]}?" if near else ""


def parse_argument(arg: str, settings: dict[str, Setting]) -> tuple[str, object]:
    """`--key=value`, or `--key` alone for a setting that is True or False. Raises UserError."""
    key, equals, text = arg.partition("=")
    name = key[2:]
    if not key.startswith("--") or not name:
        raise UserError(f"cannot read argument {arg!r}: settings are given as --key=value")
    name = name if name in settings else name.replace("-", "_")
    if name not in settings:
        raise unknown_key(key[2:], settings, "the command line")
    if not equals:
        if bool not in _allowed(settings[name]):
            raise UserError(f"--{name} needs a value: --{name}=...")
        return name, True
    return name, read_value(settings[name], text, "the command line")


def read_value(setting: Setting, text: str, where: str):
    """The value that a text stands for: a literal, or itself where that is meant. Raises UserError."""
    allowed = _allowed(setting)
    try:
        value = evaluate(text)
    except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError):
        value = text
    if str in allowed and type(value) not in allowed:
        value = text  # --out_dir=2026
    return check_type(setting, value, where)


def evaluate(text: str):
    """The value of a literal, in which + - * / // may stand too: "['spd']*6", "5*8"."""
    return _evaluate(ast.parse(text.strip(), mode="eval").body)


def _evaluate(node):
    operations = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
                  ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b}
    if isinstance(node, ast.BinOp) and type(node.op) in operations:
        return operations[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item) for item in node.elts]
    return ast.literal_eval(node)


def _allowed(setting: Setting) -> tuple[type, ...]:
    """The types a setting may have, () for any."""
    if setting.type is None:
        return ()
    types_ = typing.get_args(setting.type) or (setting.type,)
    return tuple(typing.get_origin(t) or t for t in types_)


def check_type(setting: Setting, value, where: str):
    """`value`, as a float where that is meant and an int given.

    Raises UserError for another type, for a float that is infinite or no number, for what is not Unicode.
    """
    allowed = _allowed(setting)
    if isinstance(value, tuple) and list in allowed:
        value = list(value)
    if float in allowed and type(value) is int and int not in allowed:
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if float in allowed and type(value) is float and not math.isfinite(value):
        raise UserError(f"{setting.name}={value!r} ({where}) must be a finite number")
    if type(value) is str and not _is_unicode(value):
        raise UserError(f"{setting.name}={value!r} ({where}) is not UTF-8")
    if not allowed or type(value) in allowed:
        return value
    names = {bool: "True/False", type(None): "None"}
    expected = " or ".join(names.get(t, t.__name__) for t in allowed)
    raise UserError(f"{setting.name}={value!r} ({where}) is of type {type(value).__name__}; "
                    f"it must be {expected}")


def _is_unicode(text: str) -> bool:
    """Whether a string is text; bytes of the command line that are not UTF-8 become lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_at_least(config: dict, minimum: float, *names: str) -> None:
    """Raise UserError if one of these settings is below the minimum."""
    for name in names:
        if config[name] < minimum:
            raise UserError(f"{name}={config[name]} must be at least {minimum}")


def check_at_most(config: dict, maximum: float, *names: str) -> None:
    """Raise UserError if one of these settings is above the maximum."""
    for name in names:
        if config[name] > maximum:
            raise UserError(f"{name}={config[name]} must be at most {maximum:g}")


def check_seed(config: dict) -> None:
    """Raise UserError for a seed that PyTorch's generators cannot take."""
    if not -2**63 <= config["seed"] < 2**63:
        raise UserError(f"seed={config['seed']} does not fit into 64 bits: use one from -2**63 to 2**63 - 1")


def check_can_write(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, unless files can be made in a folder, which need not exist yet."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is no path"
        raise UserError(f"{setting}={path!r} cannot be a folder: {reason}") from None
    folder = path
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or os.curdir
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits alone do not tell
            pass
    except OSError as e:
        raise UserError(f"{setting}={path!r}: cannot write in {folder}: {e.strerror}; name another "
                        f"folder") from None


def check_output_file(path: str, setting: str) -> None:
    """Raise UserError, naming the setting, unless a file can be written there; its folder must exist."""
    folder = os.path.dirname(path) or os.curdir
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UserError(f"{setting}={path!r} names no file in a folder that is there: make the folder first")
    check_can_write(folder, setting)


def unknown_key(name: str, settings: dict[str, Setting], where: str) -> UserError:
    near = difflib.get_close_matches(name, settings, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown key {name!r} in {where}{hint} (--help lists all)")


def install_error_hook(rank: int = 0, settings: Collection[str] = ()) -> None:
    """End the process on a UserError, or when memory runs out, with one line on stderr and exit code 2, on
    Ctrl-C with 130, without a word where `| head` has seen enough; other errors keep their traceback.

    Most such errors meet every rank. Rank 0 speaks at once; the others wait, are ended meanwhile by the
    launcher that sees rank 0 go, and speak only if the error was theirs alone. settings: the names of those
    that the script has, for what it can be told to change.
    """
    previous = sys.excepthook
    atexit.register(_flush_stdout)

    def hook(kind, error, traceback):
        for function in before_exit:
            with contextlib.suppress(Exception):
                function()
        if issubclass(kind, BrokenPipeError) and _stdout_is_closed():
            os._exit(128 + 13)  # as SIGPIPE would have it
        text = _for_users(kind, error, settings)
        if text is None:
            return previous(kind, error, traceback)
        if rank != 0:
            time.sleep(3)
        who = "error" if rank == 0 else f"error on rank {rank}"
        _flush_stdout()
        # torch.distributed's own hook holds sys.stderr back; a file name need not be UTF-8
        os.write(2, f"{who}: {text}\n".encode(errors="backslashreplace"))
        # threads and process groups that are still up must not hold the exit back
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 2)

    sys.excepthook = hook


def _flush_stdout() -> None:
    """What is still to be printed; where nobody reads it, nothing more is said."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _stdout_is_closed() -> bool:
    """Whether nobody reads any more what is printed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _for_users(kind: type, error: BaseException, settings: Collection[str]) -> str | None:
    """What to say of an error that the user can mend, None for any other."""
    if issubclass(kind, UserError):
        return str(error)
    if issubclass(kind, KeyboardInterrupt):
        return "interrupted"
    # PyTorch's, known by name because it is not imported here: on a GPU, and on the CPU a RuntimeError
    if kind.__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        # of a step's sequences, device_batch_size are held at a time where there is such a setting
        sizes = ("device_batch_size", "sequence_length") if "device_batch_size" in settings else \
            ("batch_size", "block_size")
        smaller = " or ".join([*(name for name in sizes if name in settings), "model"])
        switches = [f"--{name}" for name in ("activation_checkpointing=block", "use_fsdp")
                    if name.partition("=")[0] in settings]
        others = f", or {' or '.join(switches)}" if switches else ""
        return f"out of memory: use a smaller {smaller}{others} ({str(error).splitlines()[0]})"
    return None
