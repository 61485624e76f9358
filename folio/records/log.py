"""The log of a run: the console, ``metrics.jsonl``, ``log.txt``, and the trackers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from folio import files
from folio.errors import UserError
from folio.records import notebook
from folio.records.console import best_effort, printable, say
from folio.records.log_txt import build_nanogpt, gpt_from_scratch
from folio.records.metrics import REWRITTEN, read_metrics, to_json
from folio.records.record import Record, hellaswag_scores, measured
from folio.records.run_folder import LOG_TXT, METRICS
from folio.records.trackers import Identity, Trackers


class Log:
    """Writes the records of a run to the console, files and trackers; does nothing on ranks other than 0 (``main``).

    A terminal and a notebook show a progress bar, and a notebook a curve; other outputs get nanoGPT's lines. Without
    ``monitor``, records go only to files and trackers.
    """

    def __init__(self, main: bool, total: int, monitor: bool = True) -> None:
        self.main, self.monitor = main, monitor
        self.total = total
        self._tokens_per_step = 0
        self._files: list[_File] = []
        self._trackers = Trackers()
        self._bar: _Bar | notebook.Bar | None = None
        self._console = Console(file=best_effort(sys.stdout), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the progress bar, and closes the trackers and files; ``open`` opens them again."""
        if self._bar:
            self._bar.stop()
            self._bar = None
        self._trackers.close()
        while self._files:
            self._files.pop().close()

    def open(self, out_dir: Path, log_txt: bool | Literal["gpt-from-scratch"] = False, epoch: int = 1) -> None:
        """Writes records to ``out_dir/metrics.jsonl`` from now on, and to ``log.txt`` if asked.

        The format of ``log.txt`` is build-nanogpt's, or GPT-from-scratch's with epochs of ``epoch`` steps. Its lines
        about earlier records are rewritten from ``metrics.jsonl``.

        Raises:
            OSError: a file cannot be written, now or later; names it.
        """
        if not self.main:
            return
        before = read_metrics(out_dir / METRICS) if log_txt and (out_dir / METRICS).exists() else []
        self._files = [_File(out_dir / METRICS, "ab", to_json)]
        if log_txt:
            line = partial(gpt_from_scratch, epoch) if log_txt == "gpt-from-scratch" else build_nanogpt
            self._files.append(_File(out_dir / LOG_TXT, "wb", line))
            for record in before:
                self._files[-1].write(record)

    def follow(
        self,
        names: Sequence[str],
        out_dir: Path,
        *,
        project: str,
        name: str,
        run_id: str,
        step: int,
        config: dict[str, Any],
    ) -> None:
        """Sends records to these trackers from now on; warns once about each that fails, now or later."""
        if not self.main:
            return
        if self.monitor and self._console.is_jupyter:
            self._trackers.add("the live curve", partial(notebook.Curve, out_dir))
        if not names:
            return
        before = read_metrics(out_dir / METRICS) if step else []
        measured = [r for r in before if r["step"] == step and r["kind"] not in REWRITTEN]
        self._trackers.open(names, Identity(out_dir, project, name, run_id, step, config, measured))

    def say(self, line: str) -> None:
        """Prints a line on the console, but writes it nowhere else."""
        if not self.main:
            return
        if isinstance(self._bar, _Bar):
            self._bar.say(line)
        else:
            say(line)

    def start(self, step: int, tokens_per_step: int) -> None:
        """Starts the progress bar, on a terminal or in a notebook."""
        self._tokens_per_step = tokens_per_step
        if self.main and self.monitor and self._console.is_jupyter:
            self._bar = notebook.Bar(self.total, step)
        elif self.main and self.monitor and self._console.is_terminal:
            self._bar = _Bar(self._console, self.total, step)

    def busy(self, work: str) -> None:
        """Shows the work between steps beside the progress bar, such as ``evaluating, batch 37 of 400``."""
        if self._bar:
            self._bar.show(work)

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress bar."""
        if self._bar:
            left = (self.total - step) * self._tokens_per_step / tokens_per_second
            self._bar.show(f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s", step, left)

    def write(self, record: Record) -> None:
        """Writes one record: a line to each file and to the console, and to the trackers."""
        if not self.main:
            return
        for file in self._files:
            file.write(record)
        self._trackers.write(record)
        if self.monitor and (line := self._line(record)):
            self.say(line)

    def _line(self, record: Record) -> str:
        match record:
            case {"kind": "train", "step": step, "loss": loss, "mfu": mfu} if not self._bar:
                share = "" if math.isnan(mfu) else f", mfu {mfu * 100:.2f}%"
                time = 1000 * self._tokens_per_step / record["tokens_per_second"]
                return f"iter {step}: loss {loss:.4f}, time {time:.2f}ms{share}"
            case {"kind": "eval", "step": step, "train_loss": train_loss, "val_loss": val_loss}:
                return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            case {"kind": "hellaswag", "step": step}:
                return f"step {step}: {hellaswag_line(record)}"
            case {"kind": "sample", "step": step, "number": number, "text": text}:
                return f"step {step}: sample {number}: " + text.replace("\n", "\n  ")
        values = ", ".join(f"{name} {value:.5g}" for name, value in measured(record).items())
        return f"step {record['step']}: {values}" if values else ""

    def sync(self) -> None:
        """Makes everything written so far durable."""
        for file in self._files:
            file.sync()


def counted(count: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``, ``"2 processes"``."""
    return f"{count:,} {thing}{('es' if thing.endswith('s') else 's') * (count != 1)}"


def hellaswag_line(record: Record) -> str:
    """A line about an evaluation of HellaSwag."""
    return f"HellaSwag {hellaswag_scores(record)}"


class _Bar:
    """A progress bar on a terminal, below the lines."""

    def __init__(self, console: Console, total: int, step: int) -> None:
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=total, completed=step, figures="")
        self._progress.start()

    def say(self, line: str) -> None:
        self._progress.console.print(printable(line), markup=False, emoji=False)

    def show(self, figures: str, step: int | None = None, left: float | None = None) -> None:
        """``figures`` beside the bar, which measures the time ``left`` itself."""
        self._progress.update(self._task, completed=step, figures=figures)

    def stop(self) -> None:
        self._progress.stop()


class _File:
    """A file with a line for each record. Its errors are raised, unlike a tracker's."""

    def __init__(self, path: Path, mode: Literal["ab", "wb"], line: Callable[[Record], str]) -> None:
        self._line = line
        self._path, self._file = path, files.open_to_write(path, mode)

    def write(self, record: Record) -> None:
        if line := self._line(record):
            self._require_there()
            with self._named():
                files.write_to(self._file, f"{line}\n".encode())

    def _require_there(self) -> None:
        if not files.is_same_file(self._path, self._file.fileno()):
            raise UserError(
                f"{self._path} was moved, removed or replaced while the run wrote to it, so training stopped: put it "
                "back, and --init_from=resume continues"
            )

    def sync(self) -> None:
        self._require_there()
        with self._named():
            files.sync_open(self._file)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Adds the file and the remedy to an error."""
        try:
            yield
        except OSError as error:
            remedy = "make room, or choose another --out_dir"
            raise files.UnwrittenError(self._path, files.reason(error), remedy) from None

    def close(self) -> None:
        self._file.close()
