"""The progress of a run, as a checkpoint's ``state.json`` has it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any

from folio.errors import UserError
from folio.model.config import GPTConfig


@dataclass
class State:
    """The progress of a run. A run resumes from this, the weights and the optimizer's tensors alone."""

    step: int = 0  # updates done
    rows: int = 0  # rows that they consumed, in the order of the run
    tokens: int = 0  # targets in those rows
    seconds: float = 0.0  # wall time
    train_loss: float | None = None  # of the last evaluation
    val_loss: float | None = None
    best: dict[str, float] | None = None  # {"step", "loss"} of the best evaluation
    evaluations_without_improvement: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> State:
        """Reads a ``state.json``. Raises ValueError for a value that is missing or impossible."""
        try:
            state = cls(**{f.name: values[f.name] for f in fields(cls)})
            best = (state.best["step"], state.best["loss"]) if state.best else ()
            counts = (state.step, state.rows, state.tokens, state.evaluations_without_improvement)
            if not all(type(n) is int and 0 <= n < 2**63 for n in counts):
                raise UserError("its counts are not all whole numbers of at least 0")
            losses = (loss for loss in (state.train_loss, state.val_loss) if loss is not None)
            if not all(map(math.isfinite, (state.seconds, *losses, *best))):
                raise UserError("its losses or seconds are not finite")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"not the state of a run: {error}") from None
        return state


@dataclass
class Skipped:
    """The updates that a run has left out."""

    updates: int = 0
    in_a_row: int = 0  # since the last loss and gradient that were finite
    losses: list[float] = field(default_factory=list)  # the guard's window of recent losses

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Skipped:
        """Reads ``skipped`` of a ``state.json``, {} in older ones. Raises ValueError for an impossible value."""
        skipped = cls(**values)
        counts = (skipped.updates, skipped.in_a_row)
        known = all(type(loss) is float and math.isfinite(loss) for loss in skipped.losses)
        if not known or not all(type(n) is int and n >= 0 for n in counts):
            raise UserError("its count of skipped updates, or a loss beside it, is impossible")
        return skipped


_NUMBER, _SCALAR = (int, float), (bool, int, float, str)
_ENTRIES: dict[str, Any] = {  # entry of a state.json → its type, as ``_fits`` reads it
    "run": str,
    "optimizer": str,
    "objective": str,
    "row": int,
    "tokenizer": (dict, NoneType),
    "data": (dict, str, NoneType),
    "owed": [str],
    "scaler": {"": _NUMBER},
    "resolved": {"": _SCALAR},
    "facts": {"": str},
    "sources": [{"name": str, "share": _NUMBER, "tokens": int}],
}
_REQUIRED = ("run", "tokenizer", "data", "scaler", "resolved")  # older files may lack the others


def check_entries(values: Mapping[str, Any]) -> None:
    """Raises ValueError if an entry of a ``state.json`` that ``State`` does not read is missing, or of a wrong type."""
    if missing := [name for name in _REQUIRED if name not in values]:
        raise UserError(f"it has no {missing[0]}")
    for name, kind in _ENTRIES.items():
        if name in values and not _fits(values[name], kind):
            raise UserError(f"its {name} is not that of a run")
    if "row" in values and not 0 < values["row"] < 2**53:
        raise UserError(f"its row is {values['row']}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has a type: [T] is a list of T, {"": T} an object of T, {"a": T} an object with T at "a"."""
    match kind:
        case [part]:
            return isinstance(value, list) and all(_fits(inner, part) for inner in value)
        case {"": part}:
            return isinstance(value, dict) and all(_fits(inner, part) for inner in value.values())
        case dict():
            return isinstance(value, dict) and all(_fits(value.get(name), part) for name, part in kind.items())
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def foreign_state(config: GPTConfig, tokenizer: dict[str, Any] | None, state: State | None = None) -> dict[str, Any]:
    """The content of a ``state.json`` for a model that another program wrote."""
    return {
        "run": secrets.token_hex(6),
        **asdict(state or State()),
        "model": asdict(config),
        "tokenizer": tokenizer,
        "data": None,
        "scaler": {},
        "resolved": {},
    }
