"""The interactive figure of a report: curves of a run over its steps, drawn by plotly in a browser."""

from __future__ import annotations

from html import escape
from typing import Any, TypeAlias

import numpy as np

from folio.records.history import (
    GPT2_HELLASWAG,
    GPT2_LOSS,
    History,
    Points,
    Records,
    points,
    smooth,
    span,
    thin,
)

LOSS, HELLASWAG = "loss (nats per token)", "HellaSwag accuracy (acc_norm)"  # titles of panels
BLUE, ORANGE, GRAY, FAINT = "#3a86c8", "#d9731a", "#808080", "rgba(128,128,128,.4)"  # on white and on black

Curve: TypeAlias = tuple[str, Points, str]  # name, values, color


def curves(h: History, records: Records) -> str:
    """HTML of one panel above the other over the steps, with the script that draws them; "" if there is nothing."""
    panels = _panels(h, records)
    if not panels:
        return ""
    from plotly import io, subplots

    shares = [2.0 if title == LOSS else 1.0 for title in panels]
    height = 155 + 165 * sum(shares)
    figure = subplots.make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=shares,
        vertical_spacing=50 / height,
        subplot_titles=list(panels),
    )
    for row, (title, drawn) in enumerate(panels.items(), 1):
        _draw(figure, row, drawn)
        _add_references(figure, row, title, h)
        if title == LOSS:
            figure.update_yaxes(range=span([h]), row=row)
    _style(figure, height)
    figure.update_xaxes(title_text="step", row=len(panels))
    buttons = ["zoom2d", "pan2d", "resetScale2d", "toImage"]
    config = {"responsive": True, "displaylogo": False, "displayModeBar": True, "modeBarButtons": [buttons]}
    return str(io.to_html(figure, config=config, include_plotlyjs=True, full_html=False, div_id="curves"))


def _panels(h: History, records: Records) -> dict[str, list[Curve]]:
    """The curves of each panel, by its title; only those that have values."""
    train = records["train"]
    panels: dict[str, list[Curve]] = {
        LOSS: [*_noisy("train", h.train), ("validation", h.validation, ORANGE)],
        HELLASWAG: [(f"HellaSwag, {escape(style)}", found[:2], ORANGE) for style, found in h.hellaswag.items()],
        "learning rate": [("learning rate", thin(points(train, "step", "lr")), BLUE)],
        "gradient norm": _noisy("gradient norm", points(train, "step", "grad_norm")),
        "tokens per second": _noisy("tokens per second", points(train, "step", "tokens_per_second")),
        **{escape(name): [(escape(name), thin(found), BLUE)] for name, found in h.others.items()},
    }
    return {title: drawn for title, found in panels.items() if (drawn := [c for c in found if c[1].size])}


def _noisy(name: str, found: Points) -> list[Curve]:
    """Each step's value in gray, and a smoothed curve in color."""
    return [(name, thin(found), FAINT), (f"{name}, smoothed", thin(np.stack([found[0], smooth(found[1])])), BLUE)]


def _draw(figure: Any, row: int, drawn: list[Curve]) -> None:
    from plotly import graph_objects

    for name, (steps, values), color in drawn:
        line = {"color": color, "width": 0.7 if color == FAINT else 1.6}
        mode = "lines+markers" if len(steps) <= 50 else "lines"
        curve = graph_objects.Scatter(
            x=steps, y=values, name=name, mode=mode, line=line, marker={"size": 5}, showlegend=row == 1
        )
        figure.add_trace(curve, row=row, col=1)


def _add_references(figure: Any, row: int, title: str, h: History) -> None:
    """Draws GPT-2's own values across a panel."""
    gpt2 = {}
    if title == LOSS and h.fineweb:
        gpt2 = {"loss": GPT2_LOSS}
    elif title == HELLASWAG:
        gpt2 = {style: GPT2_HELLASWAG[style] for style in h.hellaswag if style in GPT2_HELLASWAG}
    for name, value in gpt2.items():
        label = {"text": f"GPT-2 124M, {name} {value}", "font": {"size": 11}}
        side = "bottom left" if title == LOSS else "top left"  # away from the curves
        dash = {"dash": "dash", "width": 1, "color": GRAY}
        figure.add_hline(value, row=row, col=1, line=dash, annotation=label, annotation_position=side)


def _style(figure: Any, height: float) -> None:
    """Colors for light and dark pages, numbers, the legend and the buttons."""
    number, clear, grid = ",.4~r", "rgba(0,0,0,0)", {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False}
    figure.update_xaxes(tickformat=",", hoverformat=",", showspikes=True, spikethickness=1, **grid)
    figure.update_yaxes(tickformat=number, hoverformat=number, nticks=6, **grid)
    figure.update_layout(
        template="none",
        hovermode="x unified",
        hoverlabel={"bgcolor": "#333", "font": {"color": "#fff"}, "namelength": -1},
        dragmode=False,  # a finger scrolls the page; the buttons zoom
        height=height,
        margin={"l": 60, "r": 8, "t": 60, "b": 95},
        legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
        modebar={"bgcolor": clear, "color": GRAY, "activecolor": BLUE},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={"color": GRAY, "family": "system-ui, sans-serif"},
    )
