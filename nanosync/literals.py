"""Literals on the command line and in the environment, with + - * / // and bounded in size."""

import ast
import types

MAX_LITERAL = 10_000  # characters of a literal
MAX_VALUES = 100_000  # values in the lists of a literal, and characters of its texts
MAX_NESTING = 100  # operations and lists of a literal inside each other
MAX_BITS = 4096  # of an integer; 401 digits have 1330
NESTED = f"it has more than {MAX_NESTING} operations or lists inside each other"
DIGITS = "its numbers have too many digits"


class TooLarge(ValueError):
    """A literal that is too long, too deeply nested, or that would make too large a value."""


def evaluate(text: str):
    """Return the value of a literal that may contain + - * / //, such as "['spd']*6" or "5*8".

    Raises TooLarge before it makes a value above the limits at the top of this file.
    """
    if len(text) > MAX_LITERAL:
        raise TooLarge(f"it has {len(text):,} characters, and a literal may have {MAX_LITERAL:,}")
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (RecursionError, MemoryError):
        raise TooLarge(NESTED) from None
    except SyntaxError as e:
        if "too many nested" in str(e):
            raise TooLarge(NESTED) from None
        if "integer string conversion" in str(e):  # Python's own limit
            raise TooLarge(DIGITS) from None
        raise
    return _evaluate(body, 0)


def _evaluate(node, depth: int):
    if depth > MAX_NESTING:
        raise TooLarge(NESTED)
    if isinstance(node, ast.BinOp):
        a, b = _evaluate(node.left, depth + 1), _evaluate(node.right, depth + 1)
        return _operate(node.op, a, b)
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_evaluate(item, depth + 1) for item in node.elts]
        _check_values(sum(map(_values, items)))
        return items
    return _bounded(ast.literal_eval(node))


def _operate(op, a, b):
    """Return a op b. Raises TooLarge without making a value that is too large."""
    operations = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
                  ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b}
    if type(op) not in operations:
        raise ValueError("an operator that literals do not have")
    if type(op) is ast.Mult:
        for many, times in ((a, b), (b, a)):
            if isinstance(many, (list, str, bytes)) and isinstance(times, int):
                _check_values(_values(many) * max(times, 0))
        if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS:
            raise TooLarge(DIGITS)
    elif type(op) is ast.Add and isinstance(a, (list, str, bytes)):
        _check_values(_values(a) + _values(b))
    return _bounded(operations[type(op)](a, b))


def _values(value) -> int:
    """Return the number of values in a list and in the lists in it, of characters in a text, 1 for others."""
    if isinstance(value, list):
        return max(sum(map(_values, value)), 1)
    return len(value) if isinstance(value, (str, bytes)) else 1


def _check_values(number: int) -> None:
    if number > MAX_VALUES:
        raise TooLarge(f"it makes {number:,} values, and a setting may have {MAX_VALUES:,}"
                       if number < 10**15 else "it makes too many values")


def _bounded(value):
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TooLarge(DIGITS)
    return value


def annotated_type(node: ast.AST):
    """Return the type of an annotation of built-in types such as `list | None`, else None, for any type."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = annotated_type(node.left), annotated_type(node.right)
        return None if left is None or right is None else left | right
    if isinstance(node, ast.Constant) and node.value is None:
        return types.NoneType
    name = node.value if isinstance(node, ast.Subscript) else node  # list[int]: the items are not checked
    known = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, tuple)}
    return known.get(name.id) if isinstance(name, ast.Name) else None
