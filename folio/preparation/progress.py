"""The progress of a preparation: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from folio.preparation.parts import PartWriter
from folio.preparation.writer import Writer
from folio.records.console import best_effort, say

_SAY_EVERY = 10.0  # seconds, if there is no terminal for a progress bar


@contextlib.contextmanager
def progress(total: int | None, writer: Writer | PartWriter) -> Iterator[Callable[[], None]]:
    """Shows tokens, MB of text per second and the time left, whenever the yielded function is called."""
    began, text, disk = time.perf_counter(), writer.text_bytes, writer.disk_bytes
    said = began
    console = Console(file=best_effort(sys.stdout))
    bar = Progress(
        TextColumn("{task.fields[figures]}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, completed=disk, figures="")

    def show() -> None:
        nonlocal said
        now = time.perf_counter()
        speed = (writer.text_bytes - text) / (now - began) / 1e6
        figures = f"{writer.tokens:,} tokens  {speed:.1f} MB/s"
        bar.update(task, completed=writer.disk_bytes, figures=figures)
        if not console.is_terminal and now - said > _SAY_EVERY:
            said = now
            read = writer.disk_bytes - disk
            left = f", {(total - writer.disk_bytes) * (now - began) / read:,.0f} s left" if total and read else ""
            say(f"{writer.tokens:,} tokens, {speed:.1f} MB/s{left}")

    with bar:
        yield show
