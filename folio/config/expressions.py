"""Evaluates the expressions of a config file from their syntax trees, with bounds on the size of every value.

Supported are constants, lists, tuples and dicts of them, arithmetic, comparisons, conditions, subscripts, f-strings,
names assigned above, and the few functions listed here. So time and memory are bounded too.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from folio.errors import UserError

BITS, CHARACTERS, EXPONENT, WIDTH = 1024, 4096, 64, 64  # limits of one value

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
MODULES: dict[str, dict[str, Any]] = {
    "math": {name: getattr(math, name) for name in _MATH.split()},
    "time": {"time": time.time},
}


class RefusedError(Exception):
    """A part of the file is refused, for the ``reason`` and at the ``line``."""

    def __init__(self, node: ast.AST, reason: str) -> None:
        self.line, self.reason = getattr(node, "lineno", 1), reason


class Scope:
    """The names of one file while it is evaluated: those ``before`` it, and those that it has ``assigned``."""

    def __init__(self, before: Mapping[str, Any]) -> None:
        self.before, self.names = before, dict(before)
        self.assigned: dict[str, Any] = {}
        self.lines: dict[str, int] = {}  # of the last assignment of each name
        self.modules: dict[str, dict[str, Any]] = {}
        self.functions = dict(_FUNCTIONS)

    def add(self, imported: dict[str, Any]) -> None:
        """Adds functions and constants of a module."""
        self.functions |= {name: value for name, value in imported.items() if callable(value)}
        self.names |= {name: value for name, value in imported.items() if not callable(value)}

    def assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id=name):
                self.assigned[name] = self.names[name] = value
                self.lines[name] = target.lineno
            case ast.Tuple(elts=targets) | ast.List(elts=targets) if not any(
                isinstance(t, ast.Starred) for t in targets
            ):
                if not isinstance(value, (list, tuple, str)) or len(value) != len(targets):
                    raise RefusedError(
                        target, f"{ast.unparse(target)}: there are not {len(targets)} values for these names"
                    )
                for inner, part in zip(targets, value, strict=True):
                    self.assign(inner, part)
            case _:
                raise unsupported(target)

    def value(self, node: ast.expr) -> Any:
        """An expression's value. Raises RefusedError if it cannot be evaluated, or its value is too large."""
        try:
            return self._evaluate(node) if isinstance(node, ast.Name) else _bounded(self._evaluate(node))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise RefusedError(node, f"{shortened(ast.unparse(node))}: {error}") from None

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.List(elts=parts):
                return [self.value(part) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple(self.value(part) for part in parts)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.value(k): self.value(v) for k, v in zip(keys, values, strict=True)}  # type: ignore[arg-type]
            case ast.NamedExpr(target=target, value=inner):
                self.assign(target, value := self.value(inner))
                return value
            case ast.JoinedStr(values=parts):
                return "".join(self._text(part) for part in parts)
            case ast.Call(args=args, keywords=keywords) if all(k.arg for k in keywords):
                called = self._function(node)
                given = [self.value(arg) for arg in args]
                named = {str(k.arg): self.value(k.value) for k in keywords}
                if called is round and any(n and abs(n) > WIDTH for n in [*given[1:], named.get("ndigits")]):
                    raise UserError(f"more than {WIDTH} digits")
                return called(*given, **named)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if isinstance(
                constant := self.modules.get(module, {}).get(name), float
            ):
                return constant
            case ast.Subscript(value=whole, slice=index):
                return self.value(whole)[self._index(index)]
            case _:
                return self._operation(node)

    def _operation(self, node: ast.expr) -> Any:
        match node:
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = self.value(left), self.value(right)
                _check_size(op, a, b)
                return _BINARY[type(op)](a, b)
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    value = self.value(part)
                    if bool(value) is isinstance(op, ast.Or):
                        break
                return value
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                return self.value(body if self.value(test) else otherwise)
            case ast.Compare(left=left, ops=ops, comparators=others):
                a = self.value(left)
                for comparison, other in zip(ops, others, strict=True):
                    b = self.value(other)
                    if not _COMPARISONS[type(comparison)](a, b):
                        return False
                    a = b
                return True
            case _:
                raise unsupported(node)

    def _function(self, node: ast.Call) -> Callable[..., Any]:
        match node.func:
            case ast.Name(id=name) if name in self.functions and name not in self.names:
                return self.functions[name]
            case ast.Attribute(value=ast.Name(id=module), attr=name) if callable(
                found := self.modules.get(module, {}).get(name)
            ):
                return found
        raise unsupported(node)

    def _index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Slice):
            return slice(*(part and self.value(part) for part in (node.lower, node.upper, node.step)))
        return self.value(node)

    def _text(self, node: ast.expr) -> str:
        if not isinstance(node, ast.FormattedValue):
            return str(self.value(node))
        spec = str(self.value(node.format_spec)) if node.format_spec else ""
        _check_widths(spec)
        return format(_CONVERSIONS[node.conversion](self.value(node.value)), spec)


def unsupported(node: ast.AST) -> RefusedError:
    """The error for code that is not supported, with a remedy."""
    if isinstance(node, ast.Name):
        return RefusedError(node, f"the name {node.id!r} is not assigned above: write its value, or assign it first")
    code = shortened(ast.unparse(node).splitlines()[0])
    remedy = "write the value itself, or give it on the command line"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        remedy = "remove it, and write the values that it was for"
    elif code.startswith("exec("):
        remedy = "name the other file before this one on the command line"
    return RefusedError(
        node,
        f"{code!r} is not read: a config file holds assignments of constants, arithmetic and names set above, and is "
        f"never run: {remedy}",
    )


def shortened(code: str) -> str:
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
