"""Data sets mixed by weight: number of a row in the mixture → its data set, and its number there.

In every 1,024 consecutive rows each data set has its share; a keyed permutation gives the order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from folio import rng
from folio.data.shards import Rows
from folio.errors import UserError

ROWS = 1024  # consecutive rows that have the proportions of the mixture


def place(index: rng.UInts, shares: Rows, seed: int, split: str) -> tuple[Rows, rng.UInts]:
    """For each row (n) of a mixture, its data set (n) and its number there (n). ``shares`` add up to ``ROWS``."""
    group, slot = index // np.uint64(ROWS), index % np.uint64(ROWS)
    placed = np.empty(index.shape, dtype=np.int64)
    for g in np.unique(group):
        here = group == g
        placed[here] = rng.permute(slot[here], ROWS, rng.key(seed, split, "mixture", int(g)))
    ends = np.cumsum(shares)
    source = np.searchsorted(ends, placed, side="right")
    inside = group.astype(np.int64) * shares[source] + placed - (ends - shares)[source]
    return source, inside.astype(np.uint64)


def parse(text: str) -> dict[str, float]:
    """``"a=0.7,b=0.3"`` → weights by name, which need not sum to 1.

    Raises:
        ValueError: it cannot be parsed, or a weight is too small to have one row in 1,024.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, weight = item.strip().rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = -1.0
        if not (equals and name and 0 < value < 1e9) or name in weights:
            raise UserError(f"data_mixture={text}: {item.strip()!r} must be NAME=WEIGHT, each name once")
        weights[name] = value
    shares = largest_remainders(list(weights.values()), ROWS)
    if not shares.all():
        name = list(weights)[int(shares.argmin())]
        raise UserError(f"data_mixture={text}: the weight of {name} is too small to have one row in {ROWS}")
    return weights


def largest_remainders(weights: Sequence[float] | Rows, total: int) -> Rows:
    """``total`` divided by weight into whole numbers (n); those with the largest remainders are rounded up."""
    exact = np.asarray(weights, dtype=np.float64) * total / np.sum(weights)
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - shares.sum()]] += 1
    return shares
