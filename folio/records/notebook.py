"""What a notebook shows of a run: a progress bar and a live curve, each a display that is replaced in place.

rich has a bar for Jupyter too, which needs ipywidgets and is lost when the notebook is saved.
"""

from __future__ import annotations

import html
import math
import time
from pathlib import Path
from typing import Any

from folio.files import read_bytes
from folio.records.facts import duration
from folio.records.plot import draw
from folio.records.record import Record
from folio.records.run_folder import PICTURE

_EVERY = 0.1  # seconds between two changes of the bar, at least
_SHARE = 0.1  # of the time, at most, in which the curve is drawn


def _display(content: dict[str, Any]) -> Any:
    """Shows content by its MIME types; returns a handle that replaces it."""
    from IPython.display import display

    return display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]


class Bar:
    """A progress bar in HTML. It is gone when the run ends."""

    def __init__(self, total: int, step: int) -> None:
        self._total, self._step, self._left, self._shown = total, step, math.nan, -math.inf
        self._handle = _display({"text/html": "", "text/plain": ""})
        self.show("")

    def show(self, figures: str, step: int | None = None, left: float | None = None) -> None:
        """``figures`` beside the bar; ``left``: seconds until the end."""
        self._step = self._step if step is None else step
        self._left = self._left if left is None else left
        if (now := time.monotonic()) - self._shown < _EVERY:
            return
        self._shown = now
        parts = [f"step {self._step:,} of {self._total:,}", *filter(None, [figures])]
        if math.isfinite(self._left):
            parts.append(f"{duration(self._left)} left")
        text = " · ".join(parts)
        bar = f'<progress value="{self._step}" max="{max(1, self._total)}" style="width: 16em"></progress>'
        self._handle.update({"text/html": f"<div>{bar} {html.escape(text)}</div>", "text/plain": text}, raw=True)

    def stop(self) -> None:
        self._handle.update({"text/html": "", "text/plain": ""}, raw=True)


class Curve:
    """A tracker: the run's picture, drawn again after an evaluation, unless drawing would take much of the time."""

    def __init__(self, out_dir: Path) -> None:
        import matplotlib  # noqa: F401  # without it there is no curve, which is said at once

        self._out_dir, self._behind = out_dir, False
        self._ended, self._took = -math.inf, 0.0
        self._handle = _display({"text/html": "", "text/plain": ""})

    def write(self, record: Record) -> None:
        if record["kind"] == "eval" and record["step"] > 0:
            self._behind = True
            if time.monotonic() - self._ended > self._took / _SHARE:
                self._draw()

    def close(self) -> None:
        if self._behind:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import Image

        began, picture = time.monotonic(), self._out_dir / PICTURE
        draw([self._out_dir], picture)
        self._handle.update(Image(data=read_bytes(picture), width=600))  # type: ignore[no-untyped-call]
        self._behind, self._ended = False, time.monotonic()
        self._took = self._ended - began
