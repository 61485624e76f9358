"""Evaluates the assignments of a Python file from its syntax tree; the file itself is never executed.

Supported are constants, lists, tuples and dicts of them, arithmetic, comparisons, conditions, subscripts, f-strings,
names assigned above, and the few functions listed here. The size of every value is bounded, and so are time and memory.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from folio.errors import UserError

BITS, CHARACTERS, EXPONENT, WIDTH = 1024, 4096, 64, 64  # of one value, at most

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CONVERSIONS: dict[int, Callable[[Any], Any]] = {
    -1: lambda value: value,
    ord("s"): str,
    ord("r"): repr,
    ord("a"): ascii,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (abs, bool, dict, float, int, len, max, min, round, str, sum)
}
_MATH = "ceil cos e exp fabs floor inf isqrt log log10 log2 nan pi pow sin sqrt tan tanh tau trunc"
_MODULES: dict[str, dict[str, Any]] = {
    "math": {name: getattr(math, name) for name in _MATH.split()},
    "time": {"time": time.time},
}


class _RefusedError(Exception):
    """A part of the file is refused, for the ``reason`` and at the ``line``."""

    def __init__(self, node: ast.AST, reason: str) -> None:
        self.line, self.reason = getattr(node, "lineno", 1), reason


class Assignments(NamedTuple):
    """A file's values by name, the line of each name's last assignment, and the names that the file uses."""

    values: dict[str, Any]
    lines: dict[str, int]
    used: set[str]


def read(path: Path, text: str, names: Mapping[str, Any]) -> Assignments:
    """The assignments of a file, in which ``names`` are already assigned.

    Raises:
        ValueError: it is not Python, or has something unsupported; names the file, the line and the remedy.
    """
    try:
        tree = ast.parse(text, str(path))
        file = _File(path, names)
        file.run(tree.body)
    except (SyntaxError, ValueError, MemoryError) as error:  # MemoryError: nested too deep
        raise UserError(f"{path}: not Python: {error or 'nested too deep'}") from None
    except RecursionError:
        raise UserError(f"{path}: it is nested too deep to be a config file") from None
    except _RefusedError as refused:
        raise UserError(f"{path}:{refused.line}: {refused.reason}") from None
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    return Assignments(file.assigned, file.lines, used)


class _File:
    """The names of one file while it is evaluated."""

    def __init__(self, path: Path, names: Mapping[str, Any]) -> None:
        self.path, self.before, self.names = path, names, dict(names)
        self.assigned: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.modules: dict[str, dict[str, Any]] = {}
        self.functions = dict(_FUNCTIONS)

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign(targets=targets, value=expression):
                value = self._value(expression)
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=expression):
                if expression:
                    self._assign(target, self._value(expression))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=expression):
                before = ast.copy_location(ast.Name(name, ast.Load()), target)
                self._assign(target, self._value(ast.copy_location(ast.BinOp(before, op, expression), node)))
            case ast.If(test=test, body=body, orelse=otherwise):
                self.run(body if self._value(test) else otherwise)
            case ast.Delete(targets=[ast.Name(id=name)]) if name in self.assigned and name not in self.before:
                del self.assigned[name], self.names[name]
            case ast.Import(names=aliases) if all(alias.name in _MODULES for alias in aliases):
                self.modules |= {alias.asname or alias.name: _MODULES[alias.name] for alias in aliases}
            case ast.ImportFrom(module=("math" | "time") as module, names=aliases, level=0) if all(
                alias.name in _MODULES[module] for alias in aliases
            ):
                self._import({alias.asname or alias.name: _MODULES[module][alias.name] for alias in aliases})
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
                line = ast.unparse(node).splitlines()[0]
                warnings.warn(
                    f"{self.path}:{node.lineno}: {_cut(line)} prints nothing: the file is never run", stacklevel=2
                )
            case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__"):
                pass
            case _:
                raise _not_known(node)

    def _import(self, found: dict[str, Any]) -> None:
        self.functions |= {name: value for name, value in found.items() if callable(value)}
        self.names |= {name: value for name, value in found.items() if not callable(value)}

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.assigned[name] = self.names[name] = value
                self.lines[name] = target.lineno
            case ast.Tuple(elts=targets) | ast.List(elts=targets) if not any(
                isinstance(t, ast.Starred) for t in targets
            ):
                if not isinstance(value, (list, tuple, str)) or len(value) != len(targets):
                    raise _RefusedError(
                        target, f"{ast.unparse(target)}: there are not {len(targets)} values for these names"
                    )
                for inner, part in zip(targets, value, strict=True):
                    self._assign(inner, part)
            case _:
                raise _not_known(target)

    def _value(self, node: ast.expr) -> Any:
        """An expression's value. Raises _RefusedError if it cannot be evaluated, or its value is too large."""
        try:
            return self._evaluate(node) if isinstance(node, ast.Name) else _bounded(self._evaluate(node))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _RefusedError(node, f"{_cut(ast.unparse(node))}: {error}") from None

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.List(elts=parts):
                return [self._value(part) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple(self._value(part) for part in parts)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self._value(k): self._value(v) for k, v in zip(keys, values, strict=True)}  # type: ignore[arg-type]
            case ast.NamedExpr(target=target, value=inner):
                self._assign(target, value := self._value(inner))
                return value
            case ast.JoinedStr(values=parts):
                return "".join(self._text(part) for part in parts)
            case ast.Call(args=args, keywords=keywords) if all(k.arg for k in keywords):
                called = self._function(node)
                given = [self._value(arg) for arg in args]
                named = {str(k.arg): self._value(k.value) for k in keywords}
                if called is round and any(n and abs(n) > WIDTH for n in [*given[1:], named.get("ndigits")]):
                    raise UserError(f"more than {WIDTH} digits")
                return called(*given, **named)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if isinstance(
                constant := self.modules.get(module, {}).get(name), float
            ):
                return constant
            case ast.Subscript(value=whole, slice=index):
                return self._value(whole)[self._index(index)]
            case _:
                return self._operation(node)

    def _operation(self, node: ast.expr) -> Any:
        match node:
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self._value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = self._value(left), self._value(right)
                _check_size(op, a, b)
                return _BINARY[type(op)](a, b)
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    value = self._value(part)
                    if bool(value) is isinstance(op, ast.Or):
                        break
                return value
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                return self._value(body if self._value(test) else otherwise)
            case ast.Compare(left=left, ops=ops, comparators=others):
                a = self._value(left)
                for comparison, other in zip(ops, others, strict=True):
                    b = self._value(other)
                    if not _COMPARISONS[type(comparison)](a, b):
                        return False
                    a = b
                return True
            case _:
                raise _not_known(node)

    def _function(self, node: ast.Call) -> Callable[..., Any]:
        match node.func:
            case ast.Name(id=name) if name in self.functions and name not in self.names:
                return self.functions[name]
            case ast.Attribute(value=ast.Name(id=module), attr=name) if callable(
                found := self.modules.get(module, {}).get(name)
            ):
                return found
        raise _not_known(node)

    def _index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Slice):
            return slice(*(part and self._value(part) for part in (node.lower, node.upper, node.step)))
        return self._value(node)

    def _text(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return str(self._value(node))
        spec = str(self._value(node.format_spec)) if node.format_spec else ""
        _check_widths(spec)
        return format(_CONVERSIONS[node.conversion](self._value(node.value)), spec)


def _not_known(node: ast.AST) -> _RefusedError:
    if isinstance(node, ast.Name):
        return _RefusedError(node, f"the name {node.id!r} is not assigned above: write its value, or assign it first")
    code = _cut(ast.unparse(node).splitlines()[0])
    remedy = "write the value itself, or give it on the command line"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        remedy = "remove it, and write the values that it was for"
    elif code.startswith("exec("):
        remedy = "name the other file before this one on the command line"
    return _RefusedError(
        node,
        f"{code!r} is not read: a config file holds assignments of constants, arithmetic and names set above, and is "
        f"never run: {remedy}",
    )


def _cut(code: str) -> str:
    return code if len(code) <= 80 else f"{code[:79]}…"


def _check_size(op: ast.operator, a: Any, b: Any) -> None:
    """Raises ValueError if an operation would take long, or its result would be too large."""
    if isinstance(op, ast.Pow) and not (isinstance(b, (int, float)) and abs(b) <= EXPONENT):
        raise UserError(f"an exponent above {EXPONENT}")
    if isinstance(op, ast.LShift) and isinstance(b, int) and b > BITS:
        raise UserError(f"a number above 2**{BITS}")
    if isinstance(op, ast.Mod) and isinstance(a, str):
        for spec in re.findall("%[^a-zA-Z%]*", a):
            if "*" in spec or "(" in spec:
                raise UserError("a format with * or names: an f-string does that")
            _check_widths(spec)
    if isinstance(op, ast.Mult):
        for many, count in ((a, b), (b, a)):
            if isinstance(many, (str, list, tuple)) and isinstance(count, int) and len(many) * count > CHARACTERS:
                raise UserError(f"more than {CHARACTERS} characters")


def _check_widths(text: str) -> None:
    if any(len(digits) > 4 or int(digits) > WIDTH for digits in re.findall("[0-9]+", text)):
        raise UserError(f"a width above {WIDTH}")


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > BITS:
        raise UserError(f"a number above 2**{BITS}")
    if not isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))):
        raise TypeError(f"a value of the type {type(value).__name__}")
    if _length(value) > CHARACTERS:
        raise UserError(f"more than {CHARACTERS} characters")
    return value


def _length(value: Any) -> int:
    """Characters of a text, or of all parts of a list or dict; the count may stop once it exceeds the limit."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, (list, tuple)):
        return 1
    total = 2
    for part in value:
        total += 1 + _length(part)
        if total > CHARACTERS:
            break
    return total
