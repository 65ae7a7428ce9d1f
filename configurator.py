"""Settings of a script: its own globals, then Python config files, then --key=value.

    python train.py config/train_gpt2.py --batch_size=32 --compile=False

A script lists its settings at the top, one assignment a line with a comment, and then calls

    config = configure(globals())

Every name assigned at the top level before that call is a setting. Config files are Python code of the user
and trusted. They run in a namespace that holds the values so far. Values on the command line are literals. A
key that the script does not define is an error, in a config file as on the command line, because a misspelt
key would silently train another model. The design follows nanoGPT's configurator.py; config files work with
both.
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

from nanosync.errors import UserError, install_error_hook, one_line, shortened, shown
from nanosync.files import ROOT, check_json, expand_path, expand_paths, is_utf8, nearest_file, read_file
from nanosync.literals import TooLarge, annotated_type, evaluate
from nanosync.setting_hints import LAUNCHER, form, name_here

MAX_CONFIG_FILE = 2**24  # bytes
HELP = ("--help", "-help", "-h", "-?")
PATHS = ("out_dir", "init_from", "resume", "dataset", "hellaswag_input", "input", "json", "peer", "plot",
         "run_log", "against", "lm_eval_path")  # settings that may be paths: ~ is the user's home in them
NOT_UTF8 = "is not UTF-8" if sys.getfilesystemencoding() == "utf-8" else \
    f"cannot be read in a locale of {sys.getfilesystemencoding()}: set LC_ALL=C.UTF-8"
NUMBER_OR_AUTO = (int, str)  # the types of a setting that is a number or 'auto', and no other text
WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass
class Setting:
    """A line of a script's settings."""

    name: str
    type: object  # annotated type or union; else the type of the default; None (any type) if that is None
    comment: str
    heading: str  # comment lines above the setting


class Config(dict):
    """Resolved settings, name -> value. `origin`: name -> source of the value, '' for the script's default.
    `replaced`: name -> the value before the last assignment by a file or the command line.

    Assigning to a setting also assigns to the script's global of the same name.
    """

    def __init__(self, values: dict, origin: dict[str, str], namespace: dict | None = None,
                 settings: dict[str, Setting] | None = None, replaced: dict | None = None):
        """Store values and origins. namespace: globals() of the script; settings: by name, for their types.
        """
        super().__init__(values)
        self.origin, self._namespace = origin, {} if namespace is None else namespace
        self.settings, self.replaced = settings or {}, replaced or {}

    def __setitem__(self, name: str, value) -> None:
        super().__setitem__(name, value)
        self._namespace[name] = value

    def table(self) -> str:
        """Return one line per setting: name, value, and the origin unless it is the script's default."""
        width = max(map(len, self), default=0)
        lines = (f"  {name:{width}} = {value!r}" + (f"  ({origin})" if (origin := self.origin[name]) else "")
                 for name, value in self.items())
        return "\n".join(lines)


def configure(namespace: dict, argv: list[str] | None = None, rank: int = 0, others: tuple[str, ...] = (),
              environment: str = "", takes: str = "") -> Config:
    """Apply config files and --key=value to the settings in `namespace`; return the resolved settings.

    Print the settings and exit on `--help`. Install the hook that ends the script on a UserError with one
    line on stderr and exit code 2. Raises UserError.

    namespace: globals() of the script.
    argv: arguments, by default those of the command line.
    rank: global rank of this process, for install_error_hook.
    others: paths of further scripts whose settings are accepted. Their values are only in the returned
        Config. If several scripts define a setting, the last script decides its default.
    environment: prefix of environment variables. <prefix><KEY> overrides config files, and the command line
        overrides <prefix><KEY>. '' ignores the environment.
    takes: setting that an argument without dashes sets, unless it ends in .py.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = {setting.name: setting for setting in read_settings(namespace)}
    install_error_hook(rank, settings)
    if asks_for_help(argv):
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently when `| head` closes the pipe
        if rank == 0:
            print(help_text(namespace, settings, takes))
        sys.exit(0)
    own, values = list(settings), {name: namespace[name] for name in settings}
    for other in map(script_defaults, others):
        settings |= {setting.name: setting for setting in read_settings(other)}
        values |= {name: other[name] for name in settings if name in other}
    origin, replaced = dict.fromkeys(settings, ""), {}
    argv = join_values(argv, settings)
    without = [arg for arg in argv if not arg.startswith("-")]
    taken = [arg for arg in without if takes and not arg.endswith(".py")]
    if len(taken) > 1:
        raise UserError(f"{', '.join(taken)}: give one of them")
    arguments = [*(f"--{takes}={arg}" for arg in taken), *(arg for arg in argv if arg.startswith("-"))]
    given = [parse_argument(arg, settings) for arg in arguments]  # before a value is taken for a file
    for path in (arg for arg in without if arg not in taken):
        for name, value in run_config_file(path, values, settings).items():
            replaced[name], values[name], origin[name] = values[name], value, path
    for variable in sorted(v for v in os.environ if environment and v.startswith(environment)):
        name, where = variable.removeprefix(environment).lower(), f"the environment's {variable}"
        if name not in settings:
            raise unknown_key(name, settings, where)
        values[name], origin[name] = read_value(settings[name], os.environ[variable], where), variable
    for name, value in given:
        replaced[name], values[name], origin[name] = values[name], value, "command line"
    namespace.update({name: values[name] for name in own})
    return Config(values, origin, namespace, settings, replaced)


def asks_for_help(argv: list[str]) -> bool:
    """Return True if a command line asks for help, in any of the usual spellings."""
    return any(arg in HELP for arg in argv) or (argv == ["help"] and not os.path.exists("help"))


def join_values(argv: list[str], settings: dict[str, Setting]) -> list[str]:
    """Return a command line with `--key=value` for each `--key value`, and all else as it is."""
    joined, rest = [], list(argv)
    while rest:
        arg = rest.pop(0)
        setting = settings.get(arg[2:]) or settings.get(arg[2:].replace("-", "_"))
        if arg.startswith("--") and "=" not in arg and rest and _takes(setting, rest[0]):
            arg += "=" + rest.pop(0)
        joined.append(arg)
    return joined


def _takes(setting: Setting | None, text: str) -> bool:
    """Return True if the argument after `--key` is the key's value.

    setting: None for an unknown key. A bool takes only what looks like its value: `--key` alone is True.
    """
    if text.startswith("-"):
        try:
            float(text)
        except ValueError:
            return False
    if setting is None:
        return not text.endswith(".py")
    allowed = _allowed(setting)
    if bool not in allowed:
        return True
    return text.lower() in (*WORDS, "0", "1", "yes", "no", "on", "off") or \
        (str in allowed and not text.endswith(".py"))


def read_settings(namespace: dict) -> list[Setting]:
    """Return the settings of a script, in order: its top-level assignments before the call of `configure`."""
    source, assignments = _read_assignments(namespace["__file__"])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}
    settings = []
    for node in assignments:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            default = namespace.get(target.id)  # literal_defaults lacks what is no literal
            kind = None if default is None else type(default)
            if isinstance(node, ast.AnnAssign):
                kind = annotated_type(node.annotation)
            settings.append(Setting(target.id, kind, comments.get(node.end_lineno, ""),
                                    _heading(comments, source.splitlines(), node.lineno)))
    return settings


def script_defaults(path: str) -> dict:
    """Return the globals of a script that `read_settings` needs, by running only its settings.

    Raises UserError if a setting needs an import or another statement.
    """
    namespace = {"__file__": path}
    for node in _read_assignments(path)[1]:
        try:
            exec(compile(ast.Module([node], []), path, "exec"), namespace)
        except Exception as e:
            raise UserError(f"{path}, line {node.lineno}: {type(e).__name__}: {e}. Assignments above the "
                            f"call of configure are settings and are read without the imports. Move this "
                            f"assignment below that call") from None
    return namespace


def literal_defaults(path: str) -> dict:
    """Return the literal defaults of a script's settings, without executing the script."""
    found = {}
    for node in _read_assignments(path)[1]:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and node.value is not None:
            with contextlib.suppress(ValueError, SyntaxError, RecursionError):
                found[target.id] = evaluate(ast.unparse(node.value))
    return found


def _read_assignments(path: str) -> tuple[str, list]:
    """Return the source of a script, and its top-level assignments before the call of `configure`."""
    source, nodes = read_file(path, MAX_CONFIG_FILE).decode("utf-8-sig"), []
    try:
        tree = ast.parse(source)
    except (RecursionError, MemoryError):
        raise SyntaxError("it is nested too deeply") from None
    for node in tree.body:
        if any(isinstance(n, ast.Name) and n.id == "configure" for n in ast.walk(node)):
            break
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            nodes.append(node)
    return source, nodes


def _heading(comments: dict[int, str], lines: list[str], lineno: int) -> str:
    """Return the whole-line comments directly above a line, without rulers."""
    above = []
    while lineno > 1 and lines[lineno - 2].lstrip().startswith("#"):
        lineno -= 1
        if comments[lineno].strip("- "):
            above.append(comments[lineno])
    return "\n".join(reversed(above))


def help_text(namespace: dict, settings: dict[str, Setting], takes: str = "") -> str:
    """Return the script's docstring and its settings, with headings, defaults and comments."""
    script = os.path.basename(namespace["__file__"])
    taken = f"[{takes.upper()}] " * bool(takes)
    lines = [(namespace.get("__doc__") or "").strip(), "",
             f"usage: python {script} {taken}[CONFIG_FILE.py ...] [--key=value ...]", ""]
    width = max(len(f"--{name}={namespace[name]!r}") for name in settings)
    for name, setting in settings.items():
        if setting.heading:
            lines += ["", *("# " + line for line in setting.heading.splitlines())]
        default = f"--{name}={namespace[name]!r}"
        lines.append(f"  {default:{min(width, 44)}}  {setting.comment}".rstrip())
    return "\n".join(lines)


def run_config_file(path: str, values: dict, settings: dict[str, Setting]) -> dict:
    """Run a config file on top of `values`; return the settings it assigned. Raises UserError.

    path: a path that does not exist may be relative to the root of the repository.
    """
    path = expand_path(path)
    if not os.path.exists(path) and os.path.isfile(os.path.join(ROOT, path)):
        path = os.path.join(ROOT, path)
    try:
        source = read_file(path, MAX_CONFIG_FILE).decode("utf-8-sig")
    except OSError as e:
        name = path.partition("=")[0].lstrip("-")
        hint = f"; settings are given as --key=value{f': --{path}' if name in settings else ''}" \
            if not path.endswith(".py") else \
            nearest_file(path, ".py", "config", os.path.join(ROOT, "config"))
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
    """Return the number of the innermost line of the config file in an error's traceback, '?' if none."""
    line, tb = "?", error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename == path:
            line = tb.tb_lineno
        tb = tb.tb_next
    return line


def parse_argument(arg: str, settings: dict[str, Setting]) -> tuple[str, object]:
    """Parse `--key=value`, or `--key` alone for a setting of type bool. Raises UserError."""
    key, equals, text = arg.partition("=")
    name = key[2:]
    if not key.startswith("--") or not name:
        raise UserError(f"cannot read argument {shown(arg)}: settings are given as --key=value")
    name = name if name in settings else name.replace("-", "_")
    if name not in settings:
        raise unknown_key(key[2:], settings, "the command line")
    if not equals:
        if bool not in _allowed(settings[name]):
            raise UserError(f"--{name} needs a value: --{name}=...")
        return name, True
    return name, read_value(settings[name], text, "the command line")


def read_value(setting: Setting, text: str, where: str):
    """Return the value of a text: a literal, or the text itself if the setting takes text. Raises UserError.

    where: source of the text, for the error message.
    """
    allowed = _allowed(setting)
    word = WORDS.get(text.strip().lower(), text)  # --compile=true
    if type(word) in allowed and (type(word) is bool or str not in allowed):
        return word
    try:
        value = evaluate(text)
    except TooLarge as e:
        if str not in allowed:
            raise UserError(f"{setting.name}={shortened(text, 80)} ({where}): {e}") from None
        value = text
    except (ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError, RecursionError):
        value = text
    if str in allowed and type(value) not in allowed and allowed != NUMBER_OR_AUTO:
        value = text  # --out_dir=2026
    return check_type(setting, value, where)


def _allowed(setting: Setting) -> tuple[type, ...]:
    """Return the types that a setting may have, () for any type."""
    if setting.type is None:
        return ()
    types_ = typing.get_args(setting.type) or (setting.type,)
    return tuple(typing.get_origin(t) or t for t in types_)


def check_type(setting: Setting, value, where: str):
    """Return `value`, converted between int and float if the setting is the other, with ~ in paths expanded.

    where: source of the value, for the error message. Raises UserError for a wrong type, a float that is not
    finite, or text that is not Unicode.
    """
    allowed = _allowed(setting)
    if isinstance(value, tuple) and list in allowed:
        value = list(value)
    if float in allowed and type(value) is int and int not in allowed:
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if int in allowed and float not in allowed and type(value) is float and value.is_integer() \
            and abs(value) < 2**53:
        value = int(value)  # --max_iters=1e3
    if float in allowed and type(value) is float and not math.isfinite(value):
        raise UserError(f"{setting.name}={value!r} ({where}) must be a finite number")
    if type(value) is int and not -2**63 <= value < 2**63:
        raise UserError(f"{setting.name}={shown(value)} ({where}) does not fit into 64 bits: use a number "
                        f"from -2**63 to 2**63 - 1")
    if type(value) is str and not is_utf8(value):
        raise UserError(f"{setting.name}={shown(value)} ({where}) {NOT_UTF8}")
    try:
        check_json(value, setting.name)  # logs and checkpoints keep it
    except ValueError as e:
        raise UserError(f"{e} ({where})") from None
    if type(value) is str and setting.name in PATHS:
        value = expand_path(value)
    wrong_text = allowed == NUMBER_OR_AUTO and type(value) is str and value != "auto"
    if not allowed or (type(value) in allowed and not wrong_text):
        return value
    names = {bool: "True/False", type(None): "None", str: "'auto'" if allowed == NUMBER_OR_AUTO else "str"}
    expected = " or ".join(names.get(t, t.__name__) for t in allowed)
    raise UserError(f"{setting.name}={shown(value)} ({where}) is of type {type(value).__name__}; "
                    f"it must be {expected}{form(setting.name, allowed, value, where == 'the command line')}")


def check_at_least(config: dict, minimum: float, *names: str) -> None:
    """Raise UserError if a named setting is below the minimum."""
    for name in names:
        if config[name] < minimum:
            raise UserError(f"{name}={config[name]} must be at least {minimum}")


def check_at_most(config: dict, maximum: float, *names: str) -> None:
    """Raise UserError if a named setting is above the maximum."""
    for name in names:
        if config[name] > maximum:
            raise UserError(f"{name}={config[name]} must be at most {maximum:g}")


def check_choice(config: dict, name: str, choices: Collection[str]) -> None:
    """Raise UserError if a setting has none of the allowed values."""
    if config[name] not in choices:
        *most, last = choices
        known = f"{', '.join(most)} or {last}" if len(choices) == 2 else ", ".join(choices)
        raise UserError(f"{name}={shown(config[name])} is unknown: use {known}")


def check_seed(config: dict) -> None:
    """Raise UserError for a seed that PyTorch's generators cannot take."""
    if not -2**63 <= config["seed"] < 2**63:
        raise UserError(f"seed={config['seed']} does not fit into 64 bits: use one from -2**63 to 2**63 - 1")


def unknown_key(name: str, settings: dict[str, Setting], where: str) -> UserError:
    """Make the error for a key that is no setting; it names the nearest setting."""
    near = difflib.get_close_matches(name[:80], settings, 1)
    here = name_here(name.replace("-", "_"), settings)
    hint = f": did you mean {near[0]!r}?" if near else ""
    if here:
        hint = f": here it is {here!r}, {settings[here].comment or 'see --help'}"
    elif name.replace("-", "_") in LAUNCHER:
        hint = ": start N processes with torchrun --standalone --nproc_per_node=N"
    return UserError(f"unknown key {shown(name)} in {where}{hint} (--help lists all)")


class Parser(argparse.ArgumentParser):
    """Argument parser of the prepare.py scripts. An error is one line and exit code 2, Ctrl-C code 130."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        install_error_hook(forks=True)

    def parse_args(self, args=None, namespace=None):
        args = self._checked(args)  # names of files may stand on both sides of an option, if no -- is there
        parse = super().parse_args if "--" in args else self.parse_intermixed_args
        return argparse.Namespace(**expand_paths(vars(parse(args, namespace))))

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(self._checked(args), namespace)
        return argparse.Namespace(**expand_paths(vars(parsed))), rest

    def _checked(self, args: list[str] | None) -> list[str]:
        args = sys.argv[1:] if args is None else args
        for arg in args:
            if not is_utf8(arg):  # cannot be printed or written to meta.json
                self.error(f"argument {shown(arg)} {NOT_UTF8}")
        return ["--help"] if asks_for_help(args) else args

    def error(self, message):
        print(f"error: {one_line(message)} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
