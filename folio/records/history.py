"""The measurements of a run, read from its ``metrics.jsonl`` as curves for the plot and the report."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from folio.errors import UserError
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.records.record import measured, number
from folio.records.run_folder import METRICS

GPT2_LOSS = 3.2924  # nats per token of GPT-2 124M over FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = {"completion": 0.2955, "harness": 0.3114}  # its acc_norm: build-nanogpt, lm-evaluation-harness
UNITS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}

_MOST = 32  # measurements, besides Folio's own, that are drawn

Records: TypeAlias = dict[str, list[dict[str, Any]]]  # by kind; an empty list for a kind without records
Points: TypeAlias = NDArray[np.float64]  # (2, N): steps, values


class History(NamedTuple):
    """The measurements of a run. Values that were NaN or infinite, null in the file, are left out."""

    name: str
    train: Points
    validation: Points
    hellaswag: dict[str, NDArray[np.float64]]  # style → (3, N): steps, acc_norm, its standard error
    others: dict[str, Points]  # "kind/field" → the values of a measurement that is not Folio's own
    tokens: Points  # (2, N): steps, tokens trained on until then
    fineweb: bool  # the data is FineWeb-Edu, by its name

    def along(self, steps: NDArray[np.float64], unit: float | None) -> NDArray[np.float64]:
        """Where steps (N,) are on the x axis: the steps themselves, or the tokens trained on until then, in ``unit``.

        NaN if the run recorded no tokens.
        """
        if unit is None:
            return steps
        return np.interp(steps, *self.tokens) / unit if self.tokens.size else np.full_like(steps, np.nan)

    @property
    def best(self) -> tuple[float, float]:
        """Step and loss of the best validation."""
        step, loss = self.validation[:, self.validation[1].argmin()].tolist()
        return step, loss


def read(out_dir: Path) -> Records:
    """The records of a run, by kind.

    Raises:
        FileNotFoundError: no run in ``out_dir``.
        ValueError: a run that has not begun.
    """
    path = out_dir / METRICS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train with --out_dir={out_dir} first")
    records: Records = defaultdict(list)
    found = sorted(read_metrics(path), key=lambda r: r["step"])
    # of two records of one step, the later counts
    for record in {tuple(map(str, map(r.get, ("kind", "step", "style", "number")))): r for r in found}.values():
        records[record["kind"]].append(record)
    if not records:
        raise UserError(f"{path} holds nothing yet: let the run get to its first loss")
    return records


def options_of(out_dir: Path) -> dict[str, Any]:
    """The options of a run; empty if its ``config.json`` cannot be read."""
    with suppress(ValueError, OSError):
        return run_folder.read_config(out_dir).options
    return {}


def history(name: str, records: Records, options: dict[str, Any]) -> History:
    """Sorts the records of a run by what they measure."""
    hellaswag = {}
    scored = [
        r for r in records["hellaswag"] if isinstance(r.get("style"), str) and 0 <= number(r.get("acc_norm")) <= 1
    ]
    for style in sorted({r["style"] for r in scored}):
        found = [r for r in scored if r["style"] == style]
        steps, accuracy, total = points(found, "step", "acc_norm", "total")
        hellaswag[style] = np.stack([steps, accuracy, np.sqrt(accuracy * (1 - accuracy) / np.maximum(total, 1))])
    updates = points(records["train"], "step", "tokens")
    updates[0] += 1  # a train line counts its own step's tokens
    seen = np.hstack([updates, points(records["eval"], "step", "tokens")])
    seen = seen[:, seen.min(axis=0) > 0]
    source = "" if options.get("data_mixture") else options.get("data_dir") or options.get("dataset") or ""
    return History(
        name,
        points(records["train"], "step", "loss"),
        points(records["eval"], "step", "val_loss"),
        hellaswag,
        _others(records),
        np.unique(np.hstack([np.zeros((2, 1)), seen]), axis=1) if seen.size else seen,
        "fineweb" in "/".join(Path(source).parts[-2:]).lower(),  # data/fineweb_edu, edu_fineweb10B/*.npy
    )


def _others(records: Records) -> dict[str, Points]:
    """The values of measurements that are not Folio's own, by ``kind/field``; warns if there are too many to draw."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in itertools.chain(*records.values()):
        for name, value in measured(record).items():
            found[_printable(name)].append((record["step"], value))
    if left_out := list(found)[_MOST:]:
        warnings.warn(f"only {_MOST} measurements are drawn: left out are {', '.join(left_out)}", stacklevel=2)
    return {name: np.array(found[name]).T for name in list(found)[:_MOST]}


def points(records: list[dict[str, Any]], *keys: str) -> NDArray[np.float64]:
    """The values of these keys, (keys, N), from all records that have all of them."""
    columns = np.array([[number(r.get(key)) for r in records] for key in keys], dtype=np.float64)
    return columns[:, np.isfinite(columns).all(axis=0)]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of all values (N,), each weighted by exp(−distance / horizon), with N / 100 as the horizon.

    It averages over both sides, so that the curve does not lag behind the evaluations. The weights of each mean sum to
    one, so that the ends are not pulled to zero.
    """
    decay = math.exp(-1 / max(1.0, len(values) / 100))

    def before(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = itertools.accumulate(terms.tolist(), lambda total, term: decay * total + term)
        return np.fromiter(sums, np.float64, len(terms))

    def around(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        return before(terms) + before(terms[::-1])[::-1] - terms

    return around(values) / around(np.ones_like(values))


def thin(points: Points, bins: int = 1000) -> Points:
    """The first, last, lowest and highest point of each bin. A line through these looks like a line through all.

    This is M4 (Jugel et al., VLDB 2014).
    """
    if points.shape[1] <= 4 * bins:
        return points
    edges = np.linspace(0, points.shape[1], bins + 1).astype(int).tolist()
    values = points[1]
    kept = {
        i
        for a, b in itertools.pairwise(edges)
        for i in (a, a + int(values[a:b].argmin()), a + int(values[a:b].argmax()), b - 1)
    }
    return points[:, sorted(kept)]


def span(histories: Sequence[History]) -> tuple[float, float]:
    """The lowest and highest loss to show.

    Losses of the first twentieth of a run are cut off at the top if they would take more than two thirds of the height.
    The highest hundredth of the later train losses may be cut off too.
    """
    shown, highest = [GPT2_LOSS] * any(h.fineweb for h in histories), -math.inf
    for h in histories:
        steps = h.train[0] if h.train.size else h.validation[0]
        begin = steps[len(steps) // 20] if steps.size else 0.0
        train, validation = (losses[at >= begin] for at, losses in (h.train, h.validation))
        shown += [train.min(), np.quantile(train, 0.99)] if train.size else []
        shown += validation.tolist()
        highest = max([highest, *shown, *h.train[1, :1], *h.validation[1, :1]])
    low, high = min(shown), max(shown)
    high = low + 2 * (high - low) if highest - low > 3 * (high - low) > 0 else highest
    margin = 0.04 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: the last parts of its path, as few as make the names differ, in printable characters."""
    depths = range(1, max(len(path.parts) for path in folders) + 1)
    ends = ([Path(*path.parts[-depth:]).as_posix() for path in folders] for depth in depths)
    apart = next(end for end in ends if len(set(end)) == len(folders))
    return [_printable(name) for name in apart]


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def unit_of(histories: Sequence[History]) -> tuple[float, str]:
    """The unit in which to count the tokens of the runs, and its name; (1, "") for fewer than a thousand."""
    most = max((h.tokens[1].max() for h in histories if h.tokens.size), default=0.0)
    return next(((unit, word) for unit, word in UNITS.items() if most >= unit), (1.0, ""))
