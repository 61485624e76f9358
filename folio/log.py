"""What a run says: the console, ``metrics.jsonl``, ``log.txt``, and the trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from folio.tokenizer import printable
from folio.trackers import Identity, Record, Trackers

METRICS = "metrics.jsonl"
LOG_TXT = "log.txt"


def record_files(log_txt: bool) -> tuple[str, ...]:
    """Names of the files in a run's folder that have a line for each record."""
    return (METRICS, LOG_TXT) if log_txt else (METRICS,)


class Log:
    """Records of a run, to everything that listens; on any rank but the first, to nothing.

    On a terminal a progress bar lives below the lines. Elsewhere the lines are nanoGPT's.
    """

    def __init__(self, main: bool, total: int) -> None:
        self.main = main
        self.total = total
        self._tokens_per_step = 0
        self._files: list[_File] = []
        self._trackers = Trackers()
        self._progress: Progress | None = None
        self._console = Console(highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        self._trackers.close()
        for file in self._files:
            file.close()

    def open(self, out_dir: Path, log_txt: bool = False) -> None:
        """From here on records go to ``out_dir/metrics.jsonl`` as well, and to build-nanogpt's ``log.txt``.

        Raises:
            OSError: one of them cannot be written, now or later; names it.
        """
        if self.main:
            self._files = [_File(out_dir / name) for name in record_files(log_txt)]

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
        """From here on records go to these trackers as well; one warning for each that cannot, now or later."""
        if self.main:
            self._trackers.open(names, Identity(out_dir, project, name, run_id, step, config))

    def say(self, line: str) -> None:
        """A line for the reader alone."""
        if not self.main:
            return
        if self._progress:
            self._progress.console.print(line, markup=False, emoji=False)
        else:
            print(line, flush=True)

    def start(self, step: int, tokens_per_step: int) -> None:
        """Begins the progress bar, on a terminal."""
        self._tokens_per_step = tokens_per_step
        if self.main and self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("", total=self.total, completed=step, figures="")
            self._progress.start()

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Moves the progress bar."""
        if self._progress:
            self._progress.update(
                self._task, completed=step, figures=f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
            )

    def write(self, record: Record) -> None:
        """One record: a line of each file, one for the reader, and the trackers."""
        if not self.main:
            return
        for file in self._files:
            file.write(record)
        self._trackers.write(record)
        if line := self._line(record):
            self.say(line)

    def _line(self, record: Record) -> str:
        match record:
            case {"kind": "train", "step": step, "loss": loss, "mfu": mfu} if not self._progress:
                share = "" if math.isnan(mfu) else f", mfu {mfu * 100:.2f}%"
                time = 1000 * self._tokens_per_step / record["tokens_per_second"]
                return f"iter {step}: loss {loss:.4f}, time {time:.2f}ms{share}"
            case {"kind": "eval", "step": step, "train_loss": train_loss, "val_loss": val_loss}:
                return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            case {"kind": "hellaswag", "step": step, "acc": acc, "acc_norm": acc_norm, "total": total}:
                share = f"{acc_norm:.4f} ({round(acc_norm * total)}/{total})"
                return f"step {step}: HellaSwag acc_norm {share}, acc {acc:.4f}, {record['style']}"
            case {"kind": "sample", "step": step, "number": number, "text": text}:
                return f"step {step}: sample {number}: {printable(text)}"
        return ""

    def sync(self) -> None:
        """Everything written so far survives a loss of power."""
        for file in self._files:
            file.sync()


class _Format(NamedTuple):
    """How a file holds records: the line of one, "" for none; and (step, kind) of a line, ValueError if it was cut."""

    line: Callable[[Record], str]
    place: Callable[[bytes], tuple[int, str]]


def _json(record: Record) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


def _json_place(line: bytes) -> tuple[int, str]:
    match json.loads(line):
        case {"step": int(step), "kind": str(kind)}:
            return step, kind
    raise ValueError


def _build_nanogpt(record: Record) -> str:
    match record:
        case {"kind": "train", "step": step, "loss": loss}:
            return f"{step} train {loss:.6f}"
        case {"kind": "eval", "step": step, "val_loss": loss}:
            return f"{step} val {loss:.4f}"
        case {"kind": "hellaswag", "step": step, "acc_norm": acc_norm}:
            return f"{step} hella {acc_norm:.4f}"
    return ""


def _build_nanogpt_place(line: bytes) -> tuple[int, str]:
    step, kind, _ = line.decode().split()
    return int(step), kind


_FORMATS = {METRICS: _Format(_json, _json_place), LOG_TXT: _Format(_build_nanogpt, _build_nanogpt_place)}


class _File:
    """Records, a line each; unlike with a tracker, what cannot be written is an error."""

    def __init__(self, path: Path) -> None:
        self._line = _FORMATS[path.name].line
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        if line := self._line(record):
            try:
                self._file.write(f"{line}\n")
                self._file.flush()
            except OSError as error:
                with suppress(OSError):
                    self._file.close()  # later it would try to write again, and its error would hide this one
                raise OSError(
                    f"{self._file.name} could not be written ({error.strerror}): make room, or choose another --out_dir"
                ) from None

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, up to a line that was cut."""
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def rewind(out_dir: Path, step: int, log_txt: bool = False) -> None:
    """Drops what a run that continues at ``step`` writes again: later lines, train and start of this step, cut ones."""
    for name in record_files(log_txt):
        path, unfinished = out_dir / name, out_dir / f".{name}.unfinished"
        if not path.exists():
            continue
        with path.open("rb") as old, unfinished.open("wb") as new:
            new.writelines(_before(step, old, _FORMATS[name].place))
            new.flush()
            os.fsync(new.fileno())
        unfinished.replace(path)


def _before(step: int, lines: Iterable[bytes], place: Callable[[bytes], tuple[int, str]]) -> Iterator[bytes]:
    for line in lines:
        try:
            at, kind = place(line)
        except ValueError:
            return
        if line.endswith(b"\n") and (at < step or (at == step and kind not in ("train", "start"))):
            yield line
