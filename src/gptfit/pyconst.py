"""Python source read as data: assignments of constants and of arithmetic on them. Nothing is executed.

What cannot be worked out is remembered with its line and text, so that the reader can say whether it matters.
"""

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptfit.config import shown
from gptfit.errors import GptfitError

MAX_BITS = 256  # of an integer on the way; a run's own numbers have 40
MAX_TEXT = 4096
MAX_DEPTH = 100

# Names whose call can assign any key unseen.
_SNEAKY = frozenset({"exec", "eval", "compile", "globals", "locals", "vars", "setattr", "__import__"})


class NotConstant(Exception):
    """An expression whose value needs execution, or is too large to be meant."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What a name holds after the file: a value, or None with `computed` where execution would tell."""

    value: Any
    line: int
    text: str
    computed: bool = False


@dataclass(slots=True)
class Source:
    """A file's bindings in order of assignment, and the names that its expressions read."""

    bindings: dict[str, Binding] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    local: set[str] = field(default_factory=set)  # bound by imports, loops, functions


def parse_constants(text: str, name: str, known: Mapping[str, Any]) -> Source:
    """The bindings that the source `text` makes, with `known` names readable from the start.

    Raises GptfitError with file and line for source that is not Python, or that could set any key
    unseen (exec, a star import).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in some string is none of our business
            tree = ast.parse(text)
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise GptfitError(f"{name}{line}: not Python: {shown(error.msg, 120)}", _HINT) from None
    except (RecursionError, MemoryError, ValueError):
        raise GptfitError(f"{name}: nested too deeply", _HINT) from None
    source = Source()
    try:
        _Reader(name, text.splitlines(), dict(known), source).block(tree.body)
    except RecursionError:  # thousands of elif
        raise GptfitError(f"{name}: nested too deeply", _HINT) from None
    return source


_HINT = "a .py config is read as data, not executed: write NAME = constant, one a line"


@dataclass(slots=True)
class _Reader:
    name: str
    lines: list[str]
    values: dict[str, Any]
    source: Source

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.source.used.update(
                node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
            )
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        """One statement: its bindings where they can be worked out; else what it may assign is unknown."""
        self._refuse_sneaky(node)
        if isinstance(node, ast.Assign):
            # A walrus inside the value assigns too.
            self._forget(node, _stored(node.value))
            for target in node.targets:
                self._assign(target, node.value, node)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, node.value, node)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            read = ast.Name(node.target.id, ast.Load())
            self.source.used.add(node.target.id)
            self._assign(node.target, ast.BinOp(read, node.op, node.value), node)
        elif isinstance(node, ast.If):
            try:
                self.block(node.body if evaluate(node.test, self.values) else node.orelse)
            except NotConstant:
                self._forget(node, _stored(node))
        else:
            self._forget(node, _stored(node))

    def _assign(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        try:
            result = evaluate(value, self.values)
        except NotConstant:
            self._forget(node, _stored(target), assigned=True)
            return
        pairs: list[tuple[ast.expr, Any]] = [(target, result)]
        if isinstance(target, ast.Tuple | ast.List):
            if not isinstance(result, tuple) or len(result) != len(target.elts):
                self._forget(node, _stored(target), assigned=True)
                return
            pairs = list(zip(target.elts, result, strict=True))
        for to, given in pairs:
            if isinstance(to, ast.Name):
                self.values[to.id] = given
                self.source.local.discard(to.id)
                self.source.bindings.pop(to.id, None)
                self.source.bindings[to.id] = Binding(given, node.lineno, self._text(node))
            else:  # os.environ["X"] = "1" binds no name
                self._forget(node, _stored(to), assigned=True)

    def _forget(self, node: ast.stmt, names: set[str], assigned: bool = False) -> None:
        for name in names:
            self.values.pop(name, None)
            self.source.bindings[name] = Binding(None, node.lineno, self._text(node), computed=True)
            if not assigned:
                self.source.local.add(name)

    def _refuse_sneaky(self, node: ast.stmt) -> None:
        """Raises GptfitError for what could assign any key without naming it."""
        star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
        calls = (part.func for part in ast.walk(node) if isinstance(part, ast.Call))
        if star or any(isinstance(func, ast.Name) and func.id in _SNEAKY for func in calls):
            place = f"{self.name}:{node.lineno}: "
            raise GptfitError(f"{place}{shown(self._text(node), 80)} could set any key and would have to be run", _HINT)

    def _text(self, node: ast.stmt) -> str:
        """The statement's first line, without its comment where that is easy to tell."""
        line = self.lines[node.lineno - 1] if node.lineno <= len(self.lines) else ""
        if getattr(node, "end_lineno", None) == node.lineno and node.end_col_offset is not None:
            line = line.encode()[node.col_offset : node.end_col_offset].decode(errors="replace")
        return line.strip()


def _stored(node: ast.AST) -> set[str]:
    """Names that running `node` may bind or delete at the top level."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = {name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names}
        return inner | {node.name}
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            names.add(part.id)
        elif isinstance(part, ast.alias):
            names.add((part.asname or part.name).partition(".")[0])
        elif isinstance(part, ast.ExceptHandler) and part.name:
            names.add(part.name)
    return names


def evaluate(node: ast.expr, names: Mapping[str, Any], depth: int = 0) -> Any:
    """The value of a constant expression: bool, int, float, str, None, or a tuple of them.

    Operators are + - * / // % ** << >>, comparisons, and / or / not and conditional expressions. Raises
    NotConstant for anything else and for results that no config means (integers above 2**256, long texts).
    """
    if depth > MAX_DEPTH:
        raise NotConstant
    below = depth + 1
    match node:
        case ast.Constant(value=value):
            result = value
        case ast.Name(id=name) if name in names:
            result = names[name]
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            result = tuple(evaluate(part, names, below) for part in parts)
            if any(isinstance(part, tuple) for part in result):  # shared parts would multiply when printed
                raise NotConstant
        case ast.UnaryOp(op=op, operand=operand):
            result = _unary(op, evaluate(operand, names, below))
        case ast.BinOp(left=left, op=op, right=right):
            result = _binary(op, evaluate(left, names, below), evaluate(right, names, below))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            result = evaluate(body if evaluate(test, names, below) else orelse, names, below)
        case ast.BoolOp(op=op, values=parts):
            result = evaluate(parts[0], names, below)
            for part in parts[1:]:
                if bool(result) is isinstance(op, ast.Or):
                    break
                result = evaluate(part, names, below)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            result = _compare(op, evaluate(left, names, below), evaluate(right, names, below))
        case _:
            raise NotConstant
    return _bounded(result)


def _bounded(value: Any) -> Any:
    plain = value is None or isinstance(value, bool | float)
    short = isinstance(value, int) and value.bit_length() <= MAX_BITS
    if plain or short or (isinstance(value, str) and len(value) <= MAX_TEXT) or isinstance(value, tuple):
        return value
    raise NotConstant


def _unary(op: ast.unaryop, value: Any) -> Any:
    if isinstance(op, ast.Not):
        return not value
    if isinstance(value, int | float) and isinstance(op, ast.USub | ast.UAdd):
        return -value if isinstance(op, ast.USub) else +value
    raise NotConstant


def _binary(op: ast.operator, left: Any, right: Any) -> Any:
    """`left op right` on numbers, or + on two texts; sizes are checked before anything large is made."""
    if isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add):
        return left + right
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        raise NotConstant
    whole = isinstance(left, int) and isinstance(right, int)
    try:
        match op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
            case ast.FloorDiv():
                return left // right
            case ast.Mod():
                return left % right
            case ast.Pow() if not whole or abs(right) * max(int(left).bit_length(), 1) <= 2 * MAX_BITS:
                return left**right
            case ast.LShift() if whole and 0 <= right <= MAX_BITS:
                return int(left) << int(right)
            case ast.RShift() if whole and 0 <= right <= MAX_BITS:
                return int(left) >> int(right)
    except (ArithmeticError, ValueError):  # division by zero, overflow of a float
        pass
    raise NotConstant


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    """`left op right`; numbers with numbers and texts with texts, where order is asked for."""
    try:
        match op:
            case ast.Eq():
                return left == right
            case ast.NotEq():
                return left != right
            case ast.Lt():
                return left < right
            case ast.LtE():
                return left <= right
            case ast.Gt():
                return left > right
            case ast.GtE():
                return left >= right
    except TypeError:
        pass
    raise NotConstant
