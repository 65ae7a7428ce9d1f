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

import argparse
import ast
import contextlib
import difflib
import io
import math
import os
import signal
import sys
import tokenize
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass

from nanosync.errors import UserError, install_error_hook
from nanosync.files import is_utf8, nearest_file


@dataclass
class Setting:
    """A line of a script's settings."""

    name: str
    type: object  # the annotated type or union of types, else the default's; None, for any, if that is None
    comment: str
    heading: str  # the comment lines above it


class Config(dict):
    """The resolved settings, name to value; `origin` has for each where its value came from.

    A value that is set later, such as one that a checkpoint decides, is written through to the script's
    globals.
    """

    def __init__(self, values: dict, origin: dict[str, str], namespace: dict | None = None):
        """namespace: the script's globals()."""
        super().__init__(values)
        self.origin, self._namespace = origin, {} if namespace is None else namespace

    def __setitem__(self, name: str, value) -> None:
        super().__setitem__(name, value)
        self._namespace[name] = value

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
    return Config(values, origin, namespace)


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
    if type(value) is str and not is_utf8(value):
        raise UserError(f"{setting.name}={value!r} ({where}) is not UTF-8")
    if not allowed or type(value) in allowed:
        return value
    names = {bool: "True/False", type(None): "None"}
    expected = " or ".join(names.get(t, t.__name__) for t in allowed)
    raise UserError(f"{setting.name}={value!r} ({where}) is of type {type(value).__name__}; "
                    f"it must be {expected}")


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


def check_choice(config: dict, name: str, choices: Collection[str]) -> None:
    """Raise UserError if a setting is none of the choices."""
    if config[name] not in choices:
        *most, last = choices
        known = f"{', '.join(most)} or {last}" if len(choices) == 2 else ", ".join(choices)
        raise UserError(f"{name}={config[name]!r} is unknown: use {known}")


def check_seed(config: dict) -> None:
    """Raise UserError for a seed that PyTorch's generators cannot take."""
    if not -2**63 <= config["seed"] < 2**63:
        raise UserError(f"seed={config['seed']} does not fit into 64 bits: use one from -2**63 to 2**63 - 1")


def unknown_key(name: str, settings: dict[str, Setting], where: str) -> UserError:
    near = difflib.get_close_matches(name, settings, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown key {name!r} in {where}{hint} (--help lists all)")


class Parser(argparse.ArgumentParser):
    """Arguments of a prepare.py: `--help` as usual, an error as one line with exit code 2, and Ctrl-C as one
    with 130.
    """

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        install_error_hook(forks=True)

    def parse_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            if not is_utf8(arg):  # it could be neither printed nor written to meta.json
                self.error(f"argument {arg!r} is not valid UTF-8")
        return super().parse_args(args, namespace)

    def error(self, message):
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
