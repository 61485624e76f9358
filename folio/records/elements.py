"""The HTML elements of a report. All text in them is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def section(title: str, content: str) -> str:
    """Content under its title; "" without content."""
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f"<section>\n{heading}{content}\n</section>\n" if content else ""


def folded(title: str, content: str, opened: bool = False) -> str:
    """Content that a click shows."""
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>{content}</details>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """Rows of any values as text; "" where there are none. ``kind`` is a class of the style sheet."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>\n" for row in rows)
    name = f" class={kind}" if kind else ""
    return f"<div class=wide><table{name}><tr>{titles}</tr>\n{body}</table></div>\n" if body else ""


class Html(str):
    """Text that is HTML already, and stays as it is in a cell."""


def cell(value: Any) -> str:
    match value:
        case Html():
            return value
        case bool() | str():
            return escape(str(value)) or "–"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4f}" if abs(value) >= 0.001 else f"{value:.3g}"
        case None:
            return "–"
    return escape(json.dumps(value))


def cards(facts: Iterable[tuple[str, str, str]]) -> str:
    """A card for each name, value and note."""
    each = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{with_note(value, note)}</dd></div>\n" for name, value, note in facts
    )
    return f"<dl>\n{each}</dl>" if each else ""


def with_note(value: str, note: str) -> Html:
    return Html(escape(value) + (f" <small>{escape(note)}</small>" if note else ""))
