"""Converts a value from the command line, a file or a call to its option's type, and checks its bounds."""

from __future__ import annotations

import ast
import math
import operator
import os
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from folio.config.names import unknown
from folio.config.table import table
from folio.errors import UserError
from folio.model.config import AUTO

COMMAND_LINE = "the command line"
LONGEST = 1 << 16  # characters of a value or a config file, at most


def convert(path: Path | str, name: str, value: Any, options: type) -> Any:
    """A value converted to the option's type, as nanoGPT converts it.

    A whole float becomes an int, an int a float, 0 and 1 become False and True; None becomes auto or empty, if the
    option has such a value.

    Raises:
        UserError: the value does not fit the type, or there is no such option; names the file.
    """
    known = table(options)
    if name not in known:
        raise UserError(f"{path}: {unknown(name, options)}")
    kind, metadata = known[name].type, known[name].metadata
    choices = _choices(kind)
    if value is None:
        stands_for = "auto" if AUTO in choices else "" if known[name].field.default == "" else None
        value = metadata.get("none", stands_for)
    fits = not isinstance(value, str) or _can_be_passed_on(value)
    for choice in choices if fits else ():
        if (found := _as(choice, value)) is not MISSING:
            return found
    shown = ascii(value) if isinstance(value, str) and not fits else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    given = f"--{name}={shown}" if path == COMMAND_LINE else f"{path}: {name} = {shown}"
    raise UserError(f"{given}: must be {_wanted(kind) if fits else 'text without null characters and lone surrogates'}")


def _can_be_passed_on(text: str) -> bool:
    """Whether a text can be a path or an argument: one without null characters and lone surrogates."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def parse_text(name: str, text: str, options: type) -> Any:
    """The value of an option from text, as nanoGPT reads it: a Python literal, else the text itself.

    Raises:
        UserError: as ``convert``.
    """
    kind = table(options)[name].type
    if get_origin(kind) is tuple:
        return text
    value = _literal(text)
    return convert(
        COMMAND_LINE, name, text if all(_as(c, value) is MISSING for c in _choices(kind)) else value, options
    )


def check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Raises UserError, which names the option and its bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    rules: list[tuple[str, Callable[[Any, Any], bool], str]] = [
        ("min", operator.ge, "at least"),
        ("max", operator.le, "at most"),
        ("above", operator.gt, "above"),
        ("below", operator.lt, "below"),
    ]
    huge = isinstance(value, int) and abs(value) >= 2**63
    shown = f"{'-' * (value < 0)}2**63 or more" if huge else value
    for rule, holds, words in rules:
        if rule in bounds and not holds(value, bounds[rule]):
            raise UserError(f"{name}={shown}: must be {words} {bounds[rule]}")
    if huge or not math.isfinite(value):
        raise UserError(f"{name}={shown}: must be {'below 2**63' if huge else 'a finite number'}")


def _literal(text: str) -> Any:
    if len(text) > LONGEST:
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a SyntaxWarning about unknown escapes
        for read in (ast.literal_eval, int, float):
            try:
                return read(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                pass
    return text


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _as(kind: Any, value: Any) -> Any:
    """The value as one of this type, or MISSING."""
    number = type(value) in (int, float)
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else MISSING
    if kind is bool and (type(value) is bool or (number and value in (0, 1))):
        return bool(value)
    if kind is int and number and (type(value) is int or value.is_integer()):
        return int(value)
    if kind is float and number and (type(value) is float or abs(value) < 2.0**1023):
        return float(value)
    return value if kind is str and type(value) is str else MISSING


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if kind is bool:
        return "True or False"
    return " or ".join(map(_wanted, get_args(kind))) if get_args(kind) else str(kind.__name__)
