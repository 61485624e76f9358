"""The interactive figure of a report: curves of runs, drawn by uPlot in a browser (``page/curves.js``).

uPlot takes 50 kB of a page and has values at the cursor, zoom and logarithmic axes. Plotly's bundle takes 4.5 MB,
Bokeh's 1.3 MB. No Python package has uPlot, so its files are here, unchanged from npm's ``uplot`` 1.6.32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from folio.records.facts import AVERAGED, Recorded
from folio.records.history import (
    HELLASWAG,
    LOSS,
    History,
    Points,
    points,
    references,
    smooth,
    span,
    thin,
)

_POINTS = 60_000  # of all curves together, about a megabyte
_FIRST = 100  # points that are always kept, since a logarithmic axis gives them much room
_KNOTS = 300  # at which tokens and seconds are given; between them they grow evenly
_REACH = 0.05  # of GPT-2's accuracy above the best


class Curve(NamedTuple):
    """A line of one run."""

    run: int
    name: str  # within its panel; "" if it is the only one of its run
    points: Points
    noisy: bool = False  # drawn as it is and smoothed
    bold: bool = False
    dashed: bool = False
    apart: bool = False  # no line from the first point, of the untrained model, to the second
    error: NDArray[np.float64] | None = None


def figure(runs: Sequence[Recorded]) -> dict[str, Any] | None:
    """The data of all panels, as ``page/curves.js`` reads it; None if there is nothing to draw."""
    panels: dict[str, list[Curve]] = {}
    for number, run in enumerate(runs):
        for title, curves in _panels(number, run).items():
            panels.setdefault(title, []).extend(curve for curve in curves if curve.points.size)
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    most = max(100, min(2000, _POINTS // sum(1 + curve.noisy for curves in panels.values() for curve in curves)))
    histories = [run.history for run in runs]
    return {
        "runs": [{"name": run.history.name, **_axes(run)} for run in runs],
        "panels": [
            {
                "title": title,
                "range": _range(title, curves, histories),
                "falls": title == LOSS,  # a logarithmic axis has room for its beginning, which ``range`` may cut off
                "references": [(f"GPT-2 124M, {name}", value) for name, value in references(title, histories)],
                "curves": [_as_json(curve, most) for curve in curves],
            }
            for title, curves in panels.items()
        ],
    }


def script_data(value: Any) -> str:
    """JSON that may stand in a <script> element: no text in it can end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _panels(number: int, run: Recorded) -> dict[str, list[Curve]]:
    """The curves of a run in each panel, by its title; some may have no points."""
    h, train = run.history, run.records["train"]
    averaged = h.others.get(AVERAGED, np.empty((2, 0)))
    untrained = h.validation.shape[1] > 2 and h.validation[0, 0] == 0

    def of_train(key: str) -> list[Curve]:
        return [Curve(number, "", points(train, "step", key), noisy=True)]

    return {
        LOSS: [
            Curve(number, "train", h.train, noisy=True),
            Curve(number, "validation", h.validation, bold=True, apart=bool(untrained)),
            Curve(number, "averaged weights", averaged, bold=True, dashed=True),
        ],
        HELLASWAG: [
            Curve(number, style, scored[:2], bold=True, dashed=i > 0, error=scored[2])
            for i, (style, scored) in enumerate(h.hellaswag.items())
        ],
        **{name: [Curve(number, "", found)] for name, found in h.others.items() if name != AVERAGED},
        "learning rate": [Curve(number, "", points(train, "step", "lr"))],
        "gradient norm": of_train("grad_norm"),
        "tokens per second": of_train("tokens_per_second"),
    }


def _as_json(curve: Curve, most: int) -> dict[str, Any]:
    """A curve of at most ``most`` points, and its smoothed form as ``smooth``."""
    found = {key: value for key, value in curve._asdict().items() if key not in ("points", "noisy", "error")}
    if curve.error is None:
        found["x"], found["y"] = _numbers(_with_first(thin(curve.points, most // 4), curve.points))
    else:
        kept = _evenly(curve.points.shape[1], most)
        found["x"], found["y"] = _numbers(curve.points[:, kept])
        found["error"] = [_short(value) for value in curve.error[kept].tolist()]
    if curve.noisy:
        smoothed = np.stack([curve.points[0], smooth(curve.points[1])])
        some = smoothed[:, _evenly(smoothed.shape[1], most // 2)]
        found["smooth"] = _numbers(_with_first(some, smoothed))
    return found


def _with_first(some: Points, every: Points) -> Points:
    """Some points of a curve, and its first ones."""
    return np.unique(np.hstack([some, every[:, :_FIRST]]), axis=1)


def _axes(run: Recorded) -> dict[str, Any]:
    """Tokens and seconds at some steps, from which a browser computes those of every step."""
    found = {"tokens": run.history.tokens, "seconds": run.history.seconds}
    return {
        name: _numbers(knots[:, _evenly(knots.shape[1], _KNOTS)]) if knots.size else None
        for name, knots in found.items()
    }


def _range(title: str, curves: list[Curve], histories: list[History]) -> list[float] | None:
    """The values to show before anyone zooms; None: all of them."""
    if title == LOSS:
        found = [h for h in histories if h.train.size or h.validation.size]
        return list(span(found)) if found else None
    if title == HELLASWAG:
        bounds = np.hstack([c.points[1] + sign * c.error for c in curves if c.error is not None for sign in (-1, 1)])
        low, high = float(bounds.min()), float(bounds.max())
        shown = [value for _, value in references(title, histories) if low <= value <= high + _REACH]
        return _with_margin(low, max([high, *shown]))
    if all(curve.noisy for curve in curves):  # a few values may be much higher than the rest
        return _with_margin(*np.quantile(np.hstack([curve.points[1] for curve in curves]), (0.005, 0.995)).tolist())
    return None


def _with_margin(low: float, high: float) -> list[float]:
    margin = 0.05 * (high - low) or abs(low) / 10 or 1.0
    return [low - margin, high + margin]


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most so many places among ``count``, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _numbers(found: Points) -> list[list[float]]:
    steps, values = found.tolist()
    return [[int(step) for step in steps], [_short(value) for value in values]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
