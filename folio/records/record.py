"""A record: what a run measured at one step, as a dictionary with its ``kind`` and ``step``."""

from __future__ import annotations

import math
from typing import Any

Record = dict[str, Any]

KINDS = ("start", "train", "eval", "hellaswag", "sample")  # those of Folio itself
OWN_KINDS = (*KINDS, "ema", "skipped")  # with those that are shown as if they were a user's
_LARGEST = 1e18  # of tokens, steps, losses


def number(value: Any) -> float:
    """The value as a float; NaN if it is not a number, or out of range."""
    return float(value) if type(value) in (int, float) and abs(value) <= _LARGEST else math.nan


def measured(record: Record) -> dict[str, float]:
    """The numbers in a record of any kind but Folio's own, named ``kind/field``."""
    kind = record["kind"]
    if kind in KINDS:
        return {}
    values = {f"{kind}/{field}": number(value) for field, value in record.items() if field not in ("kind", "step")}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def hellaswag_scores(record: Record) -> str:
    """The scores of an evaluation of HellaSwag, and its style."""
    acc_norm, total = record["acc_norm"], record["total"]
    share = f"{acc_norm:.4f} ({round(acc_norm * total)}/{total})"
    return f"acc_norm {share}, acc {record['acc']:.4f}, {record['style']}"
