"""Functions of a user that are called between updates, and what they may return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from folio.errors import UserError
from folio.records.metrics import to_json
from folio.records.record import OWN_KINDS, Record
from folio.training.objective import name_of
from folio.training.run import Run, Work
from folio.training.stopping import ENDS, finished
from folio.training.work import owing, scheduled

Due: TypeAlias = int | Callable[[Run], bool]
Results: TypeAlias = Mapping[str, Any] | Iterable[Mapping[str, Any]] | None
Callback: TypeAlias = tuple[Due, Callable[[Run], Results]]


def work_of(number: int, callback: Callback) -> Work:
    """The work that calls ``callback``, which is the one of this number.

    A number of steps as ``due``: at step 0, at its multiples, and when the training is complete. A function: when it
    returns true; rank 0 asks it once at each step, for all ranks.

    Raises:
        UserError: it is not a pair of these two.
    """
    where = f"callbacks[{number}]"
    try:
        due, function = callback
    except (TypeError, ValueError):
        raise UserError(f"{where} is {_short(callback)}: must be a pair (due, function)") from None
    if not callable(function):
        raise UserError(f"{where}: its function is {_short(function)}: must be a function of the run")
    name = f"{where} ({name_of(function)})"
    for part, called in (("its function", function), ("due", due)):
        if callable(called) and not _takes_one(called):
            raise UserError(f"{name}: {part} must take one argument, the run")
    if not callable(due) and (type(due) is not int or due < 1):
        raise UserError(
            f"{name}: due is {_short(due)}: must be a number of steps of at least 1, or a function of the run"
        )

    def do(run: Run) -> list[Record]:
        found = function(run)
        made = [] if found is None else [found] if isinstance(found, Mapping) or not _is_iterable(found) else found
        return [_record(run, name, each) for each in made]

    return Work(_asked_once(due, name) if callable(due) else _at_multiples(due, name), owing(name, do))


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # one that is written in C may have no signature
        return True
    return True


def _at_multiples(interval: int, name: str) -> Callable[[Run], bool]:
    def is_scheduled(run: Run) -> bool:
        at_end = run.stop in ENDS or bool(finished(run))
        return scheduled(run, interval, at_end=at_end, again=name in run.owed)

    return is_scheduled


def _asked_once(due: Callable[[Run], bool], name: str) -> Callable[[Run], bool]:
    """The loop asks twice, but the function may answer otherwise the second time."""
    step, answer = -1, False

    def is_scheduled(run: Run) -> bool:
        nonlocal step, answer
        if name in run.owed:
            return True
        if not scheduled(run, 1, at_end=False):
            return False
        if step != run.state.step:
            step, answer = run.state.step, run.runtime.broadcast(lambda: bool(due(run)))
        return answer

    return is_scheduled


def _is_iterable(found: Any) -> bool:
    return isinstance(found, Iterable) and not isinstance(found, (str, bytes))


def _record(run: Run, name: str, made: Any) -> Record:
    """A record with its step. Raises UserError, which names the callback."""
    if not isinstance(made, Mapping):
        raise UserError(
            f"{name} returned {_short(made)}: must be a dict with 'kind' and values, several of them, or None"
        )
    kind, step = made.get("kind"), run.state.step
    if not isinstance(kind, str) or not kind:
        raise UserError(f"{name} returned {_short(dict(made))}: its 'kind' must be a text, such as 'kind': 'norms'")
    if kind in OWN_KINDS:
        raise UserError(f"{name} returned a record of the kind {kind!r}, which is Folio's own: choose another")
    if made.get("step", step) != step:
        raise UserError(f"{name} returned a record of step {_short(made['step'])} at step {step}: leave the step out")
    record = {"kind": kind, "step": step, **{field: made[field] for field in made if field not in ("kind", "step")}}
    for field, value in record.items():
        try:
            to_json({field: value})
        except (TypeError, ValueError, RecursionError):
            what = f"{_short(field)}: {_short(value)}, of the type {type(value).__name__}"
            raise UserError(
                f"{name} returned {what}, which JSON lacks: give a number (value.item() of a tensor) or a text"
            ) from None
        if not isinstance(field, str):
            raise UserError(f"{name} returned a record with the key {_short(field)}: must be a text")
    return record


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:79]}…"
