"""A picture of runs: losses, HellaSwag accuracies and other measurements, over steps and over tokens."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from folio import files
from folio.errors import UserError
from folio.records.history import (
    GPT2_HELLASWAG,
    GPT2_LOSS,
    History,
    history,
    names,
    options_of,
    read,
    smooth,
    span,
    thin,
    unit_of,
)
from folio.records.run_folder import METRICS

LOSS, HELLASWAG = "loss (nats per token)", "HellaSwag accuracy\n(acc_norm)"  # labels of panels
FORMATS = (".png", ".svg", ".pdf")
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.parse_math": False,  # a folder's name may contain $
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "folio",  # the same bytes again
}
EVERY_STEP: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.22, "zorder": 1}
SMOOTHED: dict[str, Any] = {"linewidth": 1.3, "alpha": 0.55, "marker": "", "zorder": 1.5}


def draw(out_dirs: Sequence[Path], picture: Path) -> None:
    """Draws the losses of runs, their HellaSwag accuracies and other measurements; the suffix says the format.

    The axes are linear: a logarithmic x axis would hide how the loss falls at the end, where the learning rate decays.
    The axis at the top counts tokens. If the runs differ in tokens per step, a second column of panels is drawn over
    tokens. Runs differ in line, marker and lightness, so also in grayscale.

    Raises:
        FileNotFoundError: no run in one of ``out_dirs``.
        ValueError: nothing to draw yet; an unknown format.
        OSError: the picture cannot be written.
    """
    if picture.suffix.lower() not in FORMATS:
        raise UserError(f"{picture}: its suffix must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    import matplotlib
    from matplotlib.figure import Figure

    folders = {path.resolve(): path for path in out_dirs}
    named = zip(names(list(folders)), folders.values(), strict=True)
    histories = [history(name, read(path), options_of(path)) for name, path in named]
    for h, path in zip(histories, folders.values(), strict=True):
        if not (h.train.size or h.validation.size or any(p.size for p in h.hellaswag.values()) or h.others):
            raise UserError(f"{path / METRICS} holds nothing to draw yet: let the run get to its first loss")

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a folder's name: it is drawn as a box
        fig = Figure(layout="constrained")
        _draw_panels(fig, histories)
        drawn = io.BytesIO()
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(picture.suffix.lower())
        fig.savefig(drawn, format=picture.suffix[1:].lower(), dpi=150, metadata=undated)
    write(picture, drawn.getvalue())


def write(path: Path, content: bytes) -> None:
    """Replaces a file, or leaves it unchanged. Raises OSError that names it."""
    try:
        files.write(path, content)
    except OSError as error:
        raise files.UnwrittenError(path, error.strerror or str(error), "choose another with --output") from None


Curves: TypeAlias = Callable[[Any, History, float | None, dict[str, Any]], None]  # axes, run, unit of tokens, look


def _draw_panels(fig: Any, histories: list[History]) -> None:
    """Panels one above the other over the steps; where the runs need it, a second column over tokens."""
    lines = line_styles(len(histories))
    panels = _panels(histories)
    rates = set(np.hstack([h.tokens[1, 1:] / h.tokens[0, 1:] for h in histories]).tolist())
    unit, word = unit_of(histories)
    tokens = f"tokens ({word})" if word else "tokens"
    rows, columns = len(panels), 1 + (len(rates) > 1)
    fig.set_size_inches(7 * columns, 4.2 + 2.2 * (rows - 1) + 0.2 * (len(histories) - 1))
    shares = [3] + [2] * (rows - 1)
    grid = fig.subplots(rows, columns, squeeze=False, sharex="col", sharey="row", height_ratios=shares)

    for axes, (label, draw_curves) in zip(grid, panels.items(), strict=True):
        for ax, scale in zip(axes, (None, unit), strict=False):
            for h, look in zip(histories, lines, strict=True):
                draw_curves(ax, h, scale, look)
            _set_ticks(ax, scale)
        axes[0].set_ylabel(label)
        _add_references(axes, label, histories)
    for ax, label in zip(grid[-1], ("step", tokens), strict=False):
        ax.set_xlabel(label)
    if LOSS in panels:
        grid[0, 0].set_ylim(span(histories))
    if len(rates) == 1:
        rate = rates.pop() / unit
        top = grid[0, 0].secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
        top.set_xlabel(tokens)
    _add_legend(fig, grid[0, 0], histories, lines)


def _panels(histories: list[History]) -> dict[str, Curves]:
    """What each panel draws, by its label; only those for which a run has values."""
    panels: dict[str, Curves] = {}
    if any(h.train.size or h.validation.size for h in histories):
        panels[LOSS] = _draw_losses
    if any(found.size for h in histories for found in h.hellaswag.values()):
        panels[HELLASWAG] = _draw_hellaswag
    return panels | {name: partial(_draw_other, name) for h in histories for name in h.others}


def _set_ticks(ax: Any, scale: float | None) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    ax.grid(alpha=0.25)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=scale is None))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if scale is None else "{x:g}"))


def line_styles(count: int) -> list[dict[str, Any]]:
    """Lines and markers that differ in grayscale too: the lightness of inferno rises evenly."""
    from matplotlib import colormaps

    look = {"linewidth": 1.3, "markersize": 4, "markerfacecolor": "white"}
    lines, markers = itertools.cycle(["-", "--", "-.", ":"]), itertools.cycle("os^Dv")
    colors = colormaps["inferno"](np.linspace(0, 0.72, count)).tolist()
    return [
        {"color": color, "linestyle": line, "marker": marker, **look}
        for color, line, marker in zip(colors, lines, markers, strict=False)
    ]


def _draw_losses(ax: Any, h: History, unit: float | None, look: dict[str, Any]) -> None:
    steps, losses = thin(h.train)
    ax.plot(h.along(steps, unit), losses, color=look["color"], **EVERY_STEP)
    steps, losses = thin(np.stack([h.train[0], smooth(h.train[1])]))
    ax.plot(h.along(steps, unit), losses, **{**look, **SMOOTHED})
    steps, losses = h.validation
    ax.plot(h.along(steps, unit), losses, **look, markevery=max(1, len(steps) // 20))


def _draw_hellaswag(ax: Any, h: History, unit: float | None, look: dict[str, Any]) -> None:
    for steps, accuracy, error in h.hellaswag.values():
        every = max(1, len(steps) // 20)
        bars = {"yerr": error, "errorevery": every, "markevery": every, "elinewidth": 0.8}
        ax.errorbar(h.along(steps, unit), accuracy, **bars, **look)


def _draw_other(name: str, ax: Any, h: History, unit: float | None, look: dict[str, Any]) -> None:
    if name in h.others:
        steps, values = thin(h.others[name])
        ax.plot(h.along(steps, unit), values, **look, markevery=max(1, len(steps) // 20))


def _add_legend(fig: Any, ax: Any, histories: list[History], lines: list[dict[str, Any]]) -> None:
    """Adds the legend. It gives the best validation loss of each of several runs; that of one run is at its point."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color="black", label="train, each step that was logged", **EVERY_STEP),
        Line2D([], [], color="black", label="train, smoothed", **SMOOTHED),
    ] * any(h.train.size for h in histories)
    for h, look in zip(histories, lines, strict=True):
        step, best = h.best if h.validation.size else (0, math.nan)
        label = f"{h.name}: validation, best {best:.4f} at step {step:,.0f}" if h.validation.size else h.name
        if len(histories) == 1:
            fig.suptitle(h.name)
            label = "validation"
        if len(histories) == 1 and h.validation.size:
            pale = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
            ax.annotate(f"{best:.4f}", (step, best), (0, 7), textcoords="offset points", ha="center", bbox=pale)
        if len(histories) > 1 or h.validation.size:
            keys.append(Line2D([], [], label=label, **look))
    fig.legend(handles=keys, loc="outside lower center", frameon=False, ncols=3 if len(histories) == 1 else 1)


def _add_references(axes: Any, label: str, histories: list[History]) -> None:
    """Draws GPT-2's own values across a row of panels."""
    if label == LOSS and any(h.fineweb for h in histories):
        _reference(axes, GPT2_LOSS, "", "center")
    if label == HELLASWAG:
        for style in sorted({style for h in histories for style, found in h.hellaswag.items() if found.size}):
            if style in GPT2_HELLASWAG:
                align = "top" if style == "completion" else "bottom"  # the lower of the two
                _reference(axes, GPT2_HELLASWAG[style], f"{style} ", align)


def _reference(axes: Any, value: float, name: str, align: str) -> None:
    """A dashed line across a row of panels, with its label to the right, where it covers nothing."""
    for ax in axes:
        ax.axhline(value, color="0.35", linestyle=(0, (5, 3)), linewidth=0.9)
    look = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
    ax.annotate(f"GPT-2 124M\n{name}{value}", (1, value), (4, 0), va=align, fontsize=7.5, **look)
