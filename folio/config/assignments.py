"""Runs the assignments, conditions and imports of a Python file from its syntax tree; the file is never executed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from folio.config.expressions import MODULES, RefusedError, Scope, shortened, unsupported
from folio.errors import UserError


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
        scope = Scope(names)
        _run(path, tree.body, scope)
    except (SyntaxError, ValueError, MemoryError) as error:  # MemoryError: nested too deep
        raise UserError(f"{path}: not Python: {error or 'nested too deep'}") from None
    except RecursionError:
        raise UserError(f"{path}: it is nested too deep to be a config file") from None
    except RefusedError as refused:
        raise UserError(f"{path}:{refused.line}: {refused.reason}") from None
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    return Assignments(scope.assigned, scope.lines, used)


def _run(path: Path, body: list[ast.stmt], scope: Scope) -> None:
    for node in body:
        _run_statement(path, node, scope)


def _run_statement(path: Path, node: ast.stmt, scope: Scope) -> None:
    match node:
        case ast.Assign(targets=targets, value=expression):
            value = scope.value(expression)
            for target in targets:
                scope.assign(target, value)
        case ast.AnnAssign(target=target, value=expression):
            if expression:
                scope.assign(target, scope.value(expression))
        case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=expression):
            before = ast.copy_location(ast.Name(name, ast.Load()), target)
            scope.assign(target, scope.value(ast.copy_location(ast.BinOp(before, op, expression), node)))
        case ast.If(test=test, body=body, orelse=otherwise):
            _run(path, body if scope.value(test) else otherwise, scope)
        case ast.Delete(targets=[ast.Name(id=name)]) if name in scope.assigned and name not in scope.before:
            del scope.assigned[name], scope.names[name]
        case ast.Import(names=aliases) if all(alias.name in MODULES for alias in aliases):
            scope.modules |= {alias.asname or alias.name: MODULES[alias.name] for alias in aliases}
        case ast.ImportFrom(module=("math" | "time") as module, names=aliases, level=0) if all(
            alias.name in MODULES[module] for alias in aliases
        ):
            scope.add({alias.asname or alias.name: MODULES[module][alias.name] for alias in aliases})
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            line = ast.unparse(node).splitlines()[0]
            warnings.warn(
                f"{path}:{node.lineno}: {shortened(line)} prints nothing: the file is never run", stacklevel=2
            )
        case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.ImportFrom(module="__future__"):
            pass
        case _:
            raise unsupported(node)
