"""Labels of the curves of a picture: beside their ends, inside the axes, and not on top of each other."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_WIDEST = 22  # characters in a line
_PALE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}


class Label(NamedTuple):
    """A text beside a point, at its right."""

    x: float
    y: float
    text: str
    color: str


def lines_of(text: str) -> int:
    return len(_wrapped(text))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDEST) or [text]


def add_labels(ax: Any, labels: Sequence[Label]) -> list[Any]:
    """Adds labels to axes, each with a line to its point; returns their texts, for ``spread_labels``."""
    return [
        ax.annotate(
            "\n".join(_wrapped(label.text)),
            (label.x, label.y),
            (7, 0),
            textcoords="offset points",
            color=label.color,
            fontweight="bold",
            fontsize=9,
            linespacing=1.0,
            ha="left",
            va="center",
            bbox=_PALE,
            annotation_clip=False,
            zorder=2.5,
            arrowprops={"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 0},
        )
        for label in labels
    ]


def spread_labels(fig: Any, panels: Sequence[tuple[Any, list[Any]]]) -> None:
    """Moves the labels of each panel up or down a little, off the curves and off each other, inside their axes."""
    from matplotlib.text import Text

    fig.draw_without_rendering()
    for ax, texts in panels:
        frame = ax.get_window_extent()
        for column in _columns([(Text.get_window_extent(text), text) for text in texts]):  # without their lines
            heights = [1.15 * box.height for box, _ in column]
            free = [_free(ax, box) for box, _ in column]
            for (box, text), center in zip(column, spread(free, heights, frame.y0, frame.y1), strict=True):
                right, up = text.xyann
                text.xyann = right, up + (center - (box.y0 + box.y1) / 2) * 72 / fig.dpi


def _free(ax: Any, box: Any) -> float:
    """The height nearest to the box's own at which it covers no curve; its own if there is none."""
    at = np.linspace(box.x0, box.x1, 100)
    paths = [line.get_path().transformed(line.get_transform()).vertices for line in ax.lines]
    curves = [np.interp(at, path[:, 0], path[:, 1], left=np.nan, right=np.nan) for path in paths if len(path)]
    center, half, frame = (box.y0 + box.y1) / 2, box.height / 2, ax.get_window_extent()
    tried = sorted(np.arange(frame.y0 + half, frame.y1 - half, 2).tolist(), key=lambda y: abs(y - center))
    covered = np.hstack([*curves, np.nan])
    return next((y for y in [center, *tried] if not (np.abs(covered - y) < 1.1 * half).any()), center)


def _columns(boxes: list[tuple[Any, Any]]) -> list[list[tuple[Any, Any]]]:
    """The labels in groups that do not overlap along the x axis."""
    columns: list[list[tuple[Any, Any]]] = []
    right = -math.inf
    for box, text in sorted(boxes, key=lambda found: found[0].x0):
        if box.x0 > right:
            columns.append([])
        columns[-1].append((box, text))
        right = max(right, box.x1)
    return columns


def spread(centers: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centers of boxes that do not overlap, between ``low`` and ``high``, in the same order, near the given ones.

    This is least squares by pooling adjacent violators. Boxes that do not fit between the two extend above ``high``.
    """
    order = sorted(range(len(centers)), key=centers.__getitem__)
    below = dict(zip(order, itertools.accumulate((heights[i] for i in order), initial=0.0), strict=False))
    pools: list[tuple[float, int]] = []  # the lower end of boxes that touch, without the boxes below; their number
    for i in order:
        pools.append((centers[i] - heights[i] / 2 - below[i], 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    ends = [min(max(end, low), max(low, high - sum(heights))) for end, count in pools for _ in range(count)]
    placed = {i: end + below[i] + heights[i] / 2 for i, end in zip(order, ends, strict=True)}
    return [placed[i] for i in range(len(centers))]
