"""A picture of runs: losses, HellaSwag accuracies and other measurements, over steps, tokens or time."""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from folio import files
from folio.errors import UserError
from folio.records.history import (
    COLORS,
    HELLASWAG,
    LOSS,
    Axis,
    Counted,
    History,
    axis_of,
    history,
    named,
    options_of,
    read,
    references,
    smooth,
    span,
    thin,
    within_reach,
)
from folio.records.labels import Label, add_labels, lines_of, spread_labels
from folio.records.run_folder import METRICS

FORMATS = (".png", ".svg", ".pdf")
SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.parse_math": False,  # a folder's name may contain $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "folio",  # the same bytes again
}
WIDTH, DPI = 6.0, 200  # inches; legible at 390 pixels, the width of a phone
EVERY_STEP: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.25, "zorder": 1}
THIN: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.85, "marker": "", "zorder": 1.5}
BOLD: dict[str, Any] = {"linewidth": 2.0, "markersize": 4, "zorder": 2}
RING: dict[str, Any] = {"markersize": 7, "markerfacecolor": "white", "markeredgewidth": 1.6, "zorder": 3}
REFERENCE: dict[str, Any] = {"color": "0.35", "linestyle": (0, (5, 3)), "linewidth": 0.9, "zorder": 0.5}


class View(NamedTuple):
    """How curves are drawn: the x axis, and the share of the run over which train losses are smoothed."""

    axis: Axis
    log: bool
    smoothing: float

    def place(self, h: History, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows of steps and values, (K, N), with places on the x axis instead of steps; those on it."""
        at = h.along(found[0], self.axis)
        return np.vstack([at, found[1:]])[:, (at > 0) | (not self.log)]


Look: TypeAlias = dict[str, Any]  # color, linestyle and marker of a run
Curves: TypeAlias = Callable[[Any, History, View, Look], list[Label]]  # draws into axes


def draw(
    out_dirs: Sequence[Path], picture: Path, x: Counted = "step", *, log: bool = False, smoothing: float = 0.01
) -> None:
    """Draws the losses of runs, their HellaSwag accuracies and other measurements; the suffix says the format.

    Args:
        out_dirs: Folders of runs. Each run has a color, a marker, and its name at the end of its curves.
        picture: The file.
        x: What the x axis counts.
        log: A logarithmic x axis. Step 0 is not on it.
        smoothing: The horizon over which train losses are averaged, as a share of the run; 0: they are not.

    Raises:
        FileNotFoundError: no run in one of ``out_dirs``.
        ValueError: nothing to draw yet; a run that did not record what the axis counts; an unknown format.
        OSError: the picture cannot be written.
    """
    if picture.suffix.lower() not in FORMATS:
        raise UserError(f"{picture}: its suffix must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    import matplotlib
    from matplotlib.figure import Figure

    runs = named(out_dirs)
    histories = [history(name, read(path), options_of(path)) for name, path in runs]
    for h, (_, path) in zip(histories, runs, strict=True):
        _check(h, path / METRICS, x, log)

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a folder's name: it is drawn as a box
        fig = Figure(layout="constrained", dpi=DPI)
        spread_labels(fig, _draw_panels(fig, histories, View(axis_of(x, histories), log, smoothing)))
        drawn = io.BytesIO()
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(picture.suffix.lower())
        fig.savefig(drawn, format=picture.suffix[1:].lower(), metadata=undated)
    write(picture, drawn.getvalue())


def write(path: Path, content: bytes) -> None:
    """Replaces a file, or leaves it unchanged. Raises OSError that names it."""
    try:
        files.write(path, content)
    except OSError as error:
        raise files.UnwrittenError(path, error.strerror or str(error), "choose another with --output") from None


def _check(h: History, path: Path, x: Counted, log: bool) -> None:
    """Raises UserError, a ValueError, if the run has nothing to draw on this axis."""
    curves = [h.train, h.validation, *h.hellaswag.values(), *h.others.values()]
    if not any(found.size for found in curves):
        raise UserError(f"{path} holds nothing to draw yet: let the run get to its first loss")
    if x != "step" and not (h.tokens if x == "tokens" else h.seconds).size:
        what = "tokens" if x == "tokens" else "seconds"
        raise UserError(f"{path} does not say the {what} of any step, which --x={x} needs: draw it with --x=step")
    if log and not any((found[0] > 0).any() for found in curves):
        raise UserError(f"{path} has only step 0, which is not on a logarithmic axis: draw it without --log")


def _draw_panels(fig: Any, histories: list[History], view: View) -> list[tuple[Any, list[Any]]]:
    """Panels one above the other; returns the axes of each with the labels beside its curves."""
    looks = line_styles(len(histories))
    panels = _panels(histories)
    lines = sum(lines_of(h.name) for h in histories) * (len(histories) > 1)
    heights = [max(3.3 if title == LOSS else 1.7, 0.2 * lines) for title in panels]
    fig.set_size_inches(WIDTH, 0.9 + sum(heights) + 0.35 * len(heights))
    grid = fig.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    labeled = []
    for ax, (title, draw_curves) in zip(grid, panels.items(), strict=True):
        ax.set_title(title)
        ax.margins(x=0.02)
        labels = [label for h, look in zip(histories, looks, strict=True) for label in draw_curves(ax, h, view, look)]
        if title == LOSS:
            if lost := sum(h.lost for h in histories):
                ax.set_title(f"{title}, without {lost:,} that are not finite")
            ax.set_ylim(span(histories, view.log))
            _note_first(ax, histories, view, looks)
        _add_references(ax, title, histories)
        labeled.append((ax, add_labels(ax, labels)))
        ax.grid(alpha=0.25)
    _set_ticks(grid[-1], view)
    if len(histories) == 1:
        fig.suptitle(textwrap.fill(histories[0].name, 60), fontweight="bold", x=0.02, ha="left")
    if LOSS in panels:
        _add_legend(fig, histories, view)
    return labeled


def _panels(histories: list[History]) -> dict[str, Curves]:
    """What each panel draws, by its title; only those for which a run has values."""
    panels: dict[str, Curves] = {}
    several = len(histories) > 1
    if any(h.train.size or h.validation.size for h in histories):
        panels[LOSS] = partial(_draw_losses, several)
    if any(found.size for h in histories for found in h.hellaswag.values()):
        panels[HELLASWAG] = partial(_draw_hellaswag, several)
    return panels | {name: partial(_draw_other, several, name) for h in histories for name in h.others}


def _set_ticks(ax: Any, view: View) -> None:
    """Ticks of the x axis, which all panels share."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    ax.set_xlabel(view.axis.label)
    if view.log:
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif len(places := {*ax.dataLim.intervalx}) == 1:
        ax.set_xticks([*places])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=view.axis.counted == "step"))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def line_styles(count: int) -> list[Look]:
    """The looks of runs. They differ in color and marker; after as many as there are colors, in line too."""
    lines, markers = ("-", "--", "-.", ":"), itertools.cycle("osD^v")
    looks = ((line, color) for line in itertools.cycle(lines) for color in COLORS)
    return [
        {"color": color, "linestyle": line, "marker": marker}
        for (line, color), marker, _ in zip(looks, markers, range(count), strict=False)
    ]


def _sparsely(found: NDArray[np.float64]) -> dict[str, int]:
    return {"markevery": max(1, found.shape[1] // 10)}


def _draw_losses(several: bool, ax: Any, h: History, view: View, look: Look) -> list[Label]:
    """Train thin, validation bold. No line joins the evaluation at step 0, before the fall of the loss, to the next."""
    train = h.train[:, (h.train[0] > 0) | (not view.log)]
    at = np.log(train[0]) if view.log else train[0]
    smoothed = np.stack([train[0], smooth(train[1], view.smoothing, at)])
    if view.smoothing and not several:
        ax.plot(*view.place(h, thin(train, log=view.log)), color=look["color"], **EVERY_STEP)
    drawn = view.place(h, thin(smoothed, log=view.log))
    alone = {"marker": "o", "markersize": 4} if drawn.shape[1] == 1 else {}
    ax.plot(*drawn, **{**look, **THIN, **alone})
    found = view.place(h, h.validation)
    later = view.place(h, h.validation[:, h.validation[0] > 0])
    ax.plot(*later, **look, **BOLD, **_sparsely(later))
    ax.plot(*found[:, : found.shape[1] - later.shape[1]], **look, **BOLD)
    if not found.size:
        return [Label(drawn[0, -1], drawn[1, -1], h.name, look["color"])] if several and drawn.size else []
    best = found[:, found[1].argmin()]
    ax.plot(*best, **{**look, **RING})
    value = f"{best[1]:.4f}"
    if several:
        end = max([*found[0, -1:], *drawn[0, -1:]])
        return [Label(end, found[1, -1], f"{h.name} {value}", look["color"])]
    return [Label(best[0], best[1], value, look["color"])]


def _draw_hellaswag(several: bool, ax: Any, h: History, view: View, look: Look) -> list[Label]:
    labels, lines = [], itertools.cycle([look["linestyle"], "--", ":"])
    for (style, found), line in zip(h.hellaswag.items(), lines, strict=False):
        at, accuracy, error = drawn = view.place(h, found)
        bars = {"yerr": error, "errorevery": max(1, len(at) // 20), "elinewidth": 0.8, "capsize": 2}
        ax.errorbar(at, accuracy, **bars, **{**look, **BOLD, "linewidth": 1.5, "linestyle": line}, **_sparsely(drawn))
        parts = [h.name] * several + [style] * (len(h.hellaswag) > 1)
        if parts and drawn.size:
            labels.append(Label(at[-1], accuracy[-1], ", ".join(parts), look["color"]))
    return labels


def _draw_other(several: bool, name: str, ax: Any, h: History, view: View, look: Look) -> list[Label]:
    if name not in h.others:
        return []
    found = view.place(h, h.others[name])
    drawn = thin(found, log=view.log)
    ax.plot(*drawn, **{**look, **BOLD, "linewidth": 1.5}, **_sparsely(drawn))
    return [Label(found[0, -1], found[1, -1], h.name, look["color"])] if several and found.size else []


def _note_first(ax: Any, histories: list[History], view: View, looks: list[Look]) -> None:
    """Notes the losses at step 0 that are not in the frame, where they would be."""
    first = [h.validation[1, 0] for h in histories if h.validation.size and h.validation[0, 0] == 0]
    _, high = ax.get_ylim()
    absent = [loss for loss in first if view.log or loss > high]
    if not absent:
        return
    low, high = f"{min(absent):.2f}", f"{max(absent):.2f}"
    losses = low if low == high else f"{low} to {high}"
    arrow, place = ("←", (0.02, 0.02)) if view.log else ("↑", (0.06, 1))
    look = {"xycoords": "axes fraction", "fontsize": 8.5, "color": "0.3", "va": "bottom" if view.log else "top"}
    ax.annotate(f"{arrow} validation at step 0: {losses}", place, **look)


def _add_references(ax: Any, title: str, histories: list[History]) -> None:
    """Draws GPT-2's own values that are within reach of the curves of a panel."""
    low, high = ax.dataLim.intervaly if title == HELLASWAG else ax.get_ylim()
    for name, value in references(title, histories):
        if low < value < high or (title == HELLASWAG and within_reach(value, low, high)):
            _reference(ax, value, name)


def _reference(ax: Any, value: float, name: str) -> None:
    """A dashed line across a panel, with its label above it, at the left, inside."""
    ax.axhline(value, **REFERENCE)
    look = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "color": REFERENCE["color"]}
    ax.annotate(f"GPT-2 124M, {name}: {value}", (0.02, value), (0, 2), va="bottom", fontsize=8.5, **look)


def _add_legend(fig: Any, histories: list[History], view: View) -> None:
    """Says what thin and bold lines are; the labels say the runs."""
    from matplotlib.lines import Line2D

    color = COLORS[0] if len(histories) == 1 else "0.25"
    keys = []
    if any(h.train.size for h in histories):
        keys.append(Line2D([], [], color=color, label="train, smoothed" if view.smoothing else "train", **THIN))
    if any(h.validation.size for h in histories):
        keys.append(Line2D([], [], color=color, label="validation", **BOLD))
        keys.append(Line2D([], [], color=color, label="best validation", marker="o", linestyle="", **RING))
    fig.legend(handles=keys, loc="outside lower center", frameon=False, ncols=3)
