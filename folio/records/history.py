"""The measurements of a run, read from its ``metrics.jsonl`` as curves for the plot and the report."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from folio.errors import UserError
from folio.records import run_folder
from folio.records.metrics import read_metrics
from folio.records.record import measured, number
from folio.records.run_folder import METRICS

LOSS, HELLASWAG = "loss (nats per token)", "HellaSwag accuracy (acc_norm)"  # titles of panels
GPT2_LOSS = 3.2924  # nats per token of GPT-2 124M over FineWeb-Edu's validation shard (build-nanogpt, play.ipynb)
GPT2_HELLASWAG = {"completion": 0.2955, "harness": 0.3114}  # its acc_norm: build-nanogpt, lm-evaluation-harness
UNITS = {1e12: "trillions", 1e9: "billions", 1e6: "millions", 1e3: "thousands"}
# Okabe and Ito's colors, which color-blind readers tell apart, in another order and darker: on white each has a
# contrast of 3 or more, and neighbors differ in lightness, so in gray too.
COLORS = ("#0062A3", "#D07D00", "#008A63", "#B83C00", "#3095CE", "#B3568C", "#000000")

_DURATIONS = {86400.0: "days", 3600.0: "hours", 60.0: "minutes", 1.0: "seconds"}
_LEAST = 1e-12  # of a horizon, as a share of the run: two values of one step have no distance
_MOST = 32  # measurements, besides Folio's own, that are drawn

Records: TypeAlias = dict[str, list[dict[str, Any]]]  # by kind; an empty list for a kind without records
Points: TypeAlias = NDArray[np.float64]  # (2, N): steps, values
Counted: TypeAlias = Literal["step", "tokens", "time"]  # by an x axis


class Axis(NamedTuple):
    """An x axis: what it counts, in which unit, and its label."""

    counted: Counted
    unit: float  # tokens or seconds
    label: str


class History(NamedTuple):
    """The measurements of a run. Values that were NaN or infinite, null in the file, are left out."""

    name: str
    train: Points
    validation: Points
    hellaswag: dict[str, NDArray[np.float64]]  # style → (3, N): steps, acc_norm, its standard error
    others: dict[str, Points]  # "kind/field" → the values of a measurement that is not Folio's own
    tokens: Points  # (2, N): steps, tokens trained on until then
    seconds: Points  # (2, N): steps, seconds from the run's start until then
    fineweb: bool  # the data is FineWeb-Edu, by its name
    lost: int  # train and validation losses that were NaN or infinite

    def along(self, steps: NDArray[np.float64], axis: Axis) -> NDArray[np.float64]:
        """Where steps (N,) are on an x axis; NaN if the run did not record what the axis counts."""
        if axis.counted == "step":
            return steps
        known = self.tokens if axis.counted == "tokens" else self.seconds
        return np.interp(steps, *known) / axis.unit if known.size else np.full_like(steps, np.nan)

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
    source = "" if options.get("data_mixture") else options.get("data_dir") or options.get("dataset") or ""
    return History(
        name,
        points(records["train"], "step", "loss"),
        points(records["eval"], "step", "val_loss"),
        hellaswag,
        _others(records),
        _until(records, "tokens"),
        _until(records, "seconds"),
        "fineweb" in "/".join(Path(source).parts[-2:]).lower(),  # data/fineweb_edu, edu_fineweb10B/*.npy
        sum(r.get(key, 0) is None for kind, key in (("train", "loss"), ("eval", "val_loss")) for r in records[kind]),
    )


def _until(records: Records, key: str) -> Points:
    """What train lines and evaluations counted until each step, from zero at step 0; of two counts, the lower."""
    updates = points(records["train"], "step", key)
    updates[0] += 1  # a train line counts its own step's
    seen = np.hstack([updates, points(records["eval"], "step", key)])
    seen = seen[:, seen.min(axis=0) > 0]
    if not seen.size:
        return seen
    steps, values = np.unique(np.hstack([np.zeros((2, 1)), seen]), axis=1)
    steps, first = np.unique(steps, return_index=True)
    return np.stack([steps, values[first]])


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


def smooth(
    values: NDArray[np.float64], share: float = 0.01, at: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The mean of all values (N,), each weighted by exp(−distance / horizon), with a share of the run as the horizon.

    ``at`` (N,) says where the values are, in ascending order; they are evenly spaced if it is missing. The mean is over
    both sides, so that the curve does not lag behind the evaluations. The weights of each mean sum to one, so that the
    ends are not pulled to zero. The horizon is at most a quarter of the way from the start, so that the fall of the
    loss is not flattened.
    """
    at = np.arange(len(values), dtype=np.float64) if at is None else at
    if len(values) < 2 or share == 0 or at[-1] == at[0]:
        return values
    horizons = np.minimum(share * (at[-1] - at[0]), (at[1:] - at[0]) / 4).clip(_LEAST * (at[-1] - at[0]))
    decays = np.exp(-np.diff(at) / horizons).tolist()

    def before(terms: list[float], decays: list[float]) -> NDArray[np.float64]:
        pairs = zip([0.0, *decays], terms, strict=True)
        sums = itertools.accumulate(pairs, lambda total, pair: pair[0] * total + pair[1], initial=0.0)
        return np.fromiter(itertools.islice(sums, 1, None), np.float64, len(terms))

    def around(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        forward, backward = before(terms.tolist(), decays), before(terms[::-1].tolist(), decays[::-1])
        return forward + backward[::-1] - terms

    return around(values) / around(np.ones_like(values))


def thin(points: Points, bins: int = 1000, log: bool = False) -> Points:
    """The first, last, lowest and highest point of each bin. A line through these looks like a line through all.

    The bins are as wide as each other on a linear axis, or on a logarithmic one. This is M4 (Jugel et al., VLDB 2014).
    """
    count = points.shape[1]
    if count <= 4 * bins:
        return points
    edges = np.geomspace(1, count + 1, bins + 1) - 1 if log else np.linspace(0, count, bins + 1)
    values = points[1]
    kept = {
        i
        for a, b in itertools.pairwise(np.unique(edges.round().astype(int)).tolist())
        for i in (a, a + int(values[a:b].argmin()), a + int(values[a:b].argmax()), b - 1)
    }
    return points[:, sorted(kept)]


def span(histories: Sequence[History], log: bool = False) -> tuple[float, float]:
    """The lowest and highest loss to show.

    On a linear axis, losses of the first twentieth of the longest run, and of the first half of another, are cut off at
    the top if they would take more than half of the height; the highest hundredth of the later train losses may be cut
    off too. A logarithmic axis, which gives the beginning its room, shows all. GPT-2's loss is included if it is within
    reach.
    """
    shown, highest = [], -math.inf
    drawn = [h.train[0] if h.train.size else h.validation[0] for h in histories]
    twentieth = max(steps[-1] for steps in drawn if steps.size) / 20
    for h, steps in zip(histories, drawn, strict=True):
        begin = min(twentieth, steps[len(steps) // 2]) if steps.size and not log else 0.0
        train, validation = (losses[at >= begin] for at, losses in (h.train, h.validation))
        shown += [train.min(), np.quantile(train, 0.99)] if train.size else []
        shown += validation.tolist()
        highest = max([highest, *shown, *h.train[1, :1], *h.validation[1, :1]])
    low, high = min(shown), max(shown)
    high = low + 1.25 * (high - low) if highest - low > 2 * (high - low) > 0 and not log else highest
    if any(h.fineweb for h in histories) and within_reach(GPT2_LOSS, low, high):
        low, high = min(low, GPT2_LOSS), max(high, GPT2_LOSS)
    margin = 0.04 * (high - low) or 0.1
    return float(low - margin), float(high + margin)


def within_reach(value: float, low: float, high: float) -> bool:
    """Whether curves between ``low`` and ``high`` keep two thirds of the height if a value is shown with them."""
    return low - (high - low) / 2 <= value <= high + (high - low) / 2


def references(title: str, histories: Sequence[History]) -> list[tuple[str, float]]:
    """GPT-2 124M's own values for a panel of these runs: what each was measured on, and the value."""
    if title == LOSS:
        return [("on FineWeb-Edu", GPT2_LOSS)] * any(h.fineweb for h in histories)
    styles = sorted({style for h in histories for style, found in h.hellaswag.items() if found.size})
    return [(style, GPT2_HELLASWAG[style]) for style in styles if style in GPT2_HELLASWAG and title == HELLASWAG]


def named(out_dirs: Sequence[Path]) -> list[tuple[str, Path]]:
    """The folders with a name for each; one that is given twice counts once."""
    folders = {path.resolve(): path for path in out_dirs}
    return list(zip(names(list(folders)), folders.values(), strict=True))


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


def axis_of(counted: Counted, histories: Sequence[History]) -> Axis:
    """The x axis that counts steps, tokens or time, in the unit that fits the longest of the runs."""
    if counted == "step":
        return Axis(counted, 1.0, "step")
    if counted == "tokens":
        unit, word = unit_of(histories)
        return Axis(counted, unit, f"tokens ({word})" if word else "tokens")
    most = max((h.seconds[1].max() for h in histories if h.seconds.size), default=0.0)
    unit, word = next(((unit, word) for unit, word in _DURATIONS.items() if most >= 2 * unit), (1.0, "seconds"))
    return Axis(counted, unit, f"time ({word})")
