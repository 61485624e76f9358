"""What a run says: the console, ``metrics.jsonl``, ``log.txt``, and the trackers."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from folio.records.console import accompanying, printable, say
from folio.records.run_folder import LOG_TXT, METRICS
from folio.records.trackers import Identity, Record, Trackers

AGAIN = ("train", "start")  # kinds of records that a resumed run writes of the step it begins at
_BEGINNING = b'{"kind": '  # of a record, and of nothing within one, where quotes are escaped
_LONGEST = 1 << 24  # bytes of a line


class Log:
    """Records of a run, to everything that listens; on any rank but the first, to nothing.

    On a terminal a progress bar lives below the lines. Elsewhere the lines are nanoGPT's. Without ``monitor`` records
    go to files and trackers alone.
    """

    def __init__(self, main: bool, total: int, monitor: bool = True) -> None:
        self.main, self.monitor = main, monitor
        self.total = total
        self._tokens_per_step = 0
        self._files: list[_File] = []
        self._trackers = Trackers()
        self._progress: Progress | None = None
        self._console = Console(file=accompanying(sys.stdout), highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        self._trackers.close()
        for file in self._files:
            file.close()

    def open(self, out_dir: Path, log_txt: bool | Literal["gpt-from-scratch"] = False, epoch: int = 1) -> None:
        """From here on records go to ``out_dir/metrics.jsonl`` as well, and to a ``log.txt``.

        That is build-nanogpt's, or GPT-from-scratch's with its epochs of so many steps, and is made anew of the records
        that are there already.

        Raises:
            OSError: one of them cannot be written, now or later; names it.
        """
        if not self.main:
            return
        before = read_metrics(out_dir / METRICS) if log_txt and (out_dir / METRICS).exists() else []
        self._files = [_File(out_dir / METRICS, "a", to_json)]
        if log_txt:
            line = partial(_gpt_from_scratch, epoch) if log_txt == "gpt-from-scratch" else _build_nanogpt
            self._files.append(_File(out_dir / LOG_TXT, "w", line))
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
        """From here on records go to these trackers as well; one warning for each that cannot, now or later."""
        if not self.main or not names:
            return
        before = read_metrics(out_dir / METRICS) if step else []
        measured = [r for r in before if r["step"] == step and r["kind"] not in AGAIN]
        self._trackers.open(names, Identity(out_dir, project, name, run_id, step, config, measured))

    def say(self, line: str) -> None:
        """A line for the reader alone."""
        if not self.main:
            return
        if self._progress:
            self._progress.console.print(printable(line), markup=False, emoji=False)
        else:
            say(line)

    def start(self, step: int, tokens_per_step: int) -> None:
        """Begins the progress bar, on a terminal."""
        self._tokens_per_step = tokens_per_step
        if self.main and self.monitor and self._console.is_terminal:
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

    def busy(self, what: str) -> None:
        """Shows at the progress bar what is done between steps, such as ``evaluating, batch 37 of 400``."""
        if self._progress:
            self._progress.update(self._task, figures=what)

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
        if self.monitor and (line := self._line(record)):
            self.say(line)

    def _line(self, record: Record) -> str:
        match record:
            case {"kind": "train", "step": step, "loss": loss, "mfu": mfu} if not self._progress:
                share = "" if math.isnan(mfu) else f", mfu {mfu * 100:.2f}%"
                time = 1000 * self._tokens_per_step / record["tokens_per_second"]
                return f"iter {step}: loss {loss:.4f}, time {time:.2f}ms{share}"
            case {"kind": "eval", "step": step, "train_loss": train_loss, "val_loss": val_loss}:
                return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            case {"kind": "hellaswag", "step": step}:
                return f"step {step}: {hellaswag_line(record)}"
            case {"kind": "sample", "step": step, "number": number, "text": text}:
                return f"step {step}: sample {number}: " + text.replace("\n", "\n  ")
        return ""

    def sync(self) -> None:
        """Everything written so far survives a loss of power."""
        for file in self._files:
            file.sync()


def counted(count: int, thing: str) -> str:
    """``"1 thread"``, ``"2 threads"``, ``"2 processes"``."""
    return f"{count:,} {thing}{('es' if thing.endswith('s') else 's') * (count != 1)}"


def hellaswag_line(record: Record) -> str:
    """An evaluation of HellaSwag in words."""
    acc_norm, total = record["acc_norm"], record["total"]
    share = f"{acc_norm:.4f} ({round(acc_norm * total)}/{total})"
    return f"HellaSwag acc_norm {share}, acc {record['acc']:.4f}, {record['style']}"


def to_json(record: Record) -> str:
    """A line of ``metrics.jsonl``, or another file of records; what is not finite becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


def _build_nanogpt(record: Record) -> str:
    match record:
        case {"kind": "train", "step": step, "loss": float(loss)}:
            return f"{step} train {loss:.6f}"
        case {"kind": "eval", "step": step, "val_loss": float(loss)}:
            return f"{step} val {loss:.4f}"
        case {"kind": "hellaswag", "step": step, "acc_norm": float(acc_norm)}:
            return f"{step} hella {acc_norm:.4f}"
    return ""


def _gpt_from_scratch(epoch: int, record: Record) -> str:
    step: int = record["step"]
    match record:
        case {"kind": "train", "loss": float(loss)}:
            number, step = divmod(step, epoch)
            return f"Epoch {number} | iter {step} | train loss: {loss:.6f}"
        case {"kind": "eval", "val_loss": float(loss)}:
            what = f"validation loss: {loss:.3f}"
        case {"kind": "hellaswag", "acc_norm": float(acc_norm)}:
            what = f"Hellaswag accuracy: {acc_norm:.3f}"
        case _:
            return ""
    number = max(0, step - 1) // epoch  # weights after an epoch's last step are still that epoch's
    return f"Epoch {number} | iter {step - number * epoch} | {what}"


class _File:
    """Records, a line each; unlike with a tracker, what cannot be written is an error."""

    def __init__(self, path: Path, mode: Literal["a", "w"], line: Callable[[Record], str]) -> None:
        self._line = line
        self._file = path.open(mode, encoding="utf-8")

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


class _Lines(NamedTuple):
    """What a file of records holds: whole lines with their records, the numbers of damaged ones, half a last one."""

    whole: list[tuple[bytes, Record]]
    damaged: list[int]
    half: bytes


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``, or another file of records.

    Damaged lines are left out, with one warning; a last line that was not finished is none yet.
    """
    lines = _lines(path)
    if lines.damaged:
        warnings.warn(f"{_told(path, lines.damaged)}, and ignored", stacklevel=2)
    return [record for _, record in lines.whole]


def holds_records(path: Path) -> bool | None:
    """Whether a file begins with a record; None where it is empty, or begins with nothing that can be read."""
    with files.require_file(path).open("rb") as file:
        line = file.readline(_LONGEST)
    if _record(line) is not None:
        return True
    with suppress(ValueError):
        files.parse_json(line)
        return False
    return None


def rewind(path: Path, step: int, owed: Collection[str] = (), interval: int = 1) -> list[str]:
    """Drops what a run that continues at ``step`` writes again: later lines, train and start of this step, half a line.

    So do measurements of this step that the checkpoint says are ``owed``. Damaged lines are dropped too; the file as it
    was then stays beside it. Returns a line for the reader about each loss: of those, and of lines that a run with a
    train line every ``interval`` steps has written, and are not there (0: it has written none).
    """
    if not path.exists():
        return [f"{path} is missing: what was measured before step {step} is lost"] if step and interval else []
    lines = _lines(path)
    again = {*AGAIN, *owed}
    kept = [(line, r) for line, r in lines.whole if r["step"] < step or (r["step"] == step and r["kind"] not in again)]
    told = []
    if lines.damaged:
        beside = (path.with_name(f"{path.name}.damaged{f'-{n}' * (n > 1)}") for n in itertools.count(1))
        original = next(other for other in beside if not other.exists())
        shutil.copyfile(path, original)
        told.append(f"{_told(path, lines.damaged)}, and left out; the original is kept as {original.name}")
    reached = max((record["step"] for _, record in kept), default=-1)
    if interval and reached < (step - 1) // interval * interval:
        until = f"ends at step {reached}" if kept else "has nothing from before"
        told.append(f"{path} {until}, but the run resumes at step {step}")
    if len(kept) < len(lines.whole) or lines.damaged or lines.half:
        files.write(path, b"".join(line for line, _ in kept))
    return told


def _told(path: Path, damaged: list[int]) -> str:
    numbers = ", ".join(f"{n:,}" for n in damaged[:5]) + (" …" if len(damaged) > 5 else "")
    return (
        f"{path}: "
        + (f"line {numbers} is" if len(damaged) == 1 else f"{len(damaged):,} lines ({numbers}) are")
        + " damaged"
    )


def _lines(path: Path) -> _Lines:
    """Of a line that is half a record and a whole one behind it, as a loss of power leaves it, the latter is kept."""
    whole: list[tuple[bytes, Record]] = []
    damaged, number, line = [], 0, b""
    with files.require_file(path).open("rb") as file:
        while (line := file.readline(_LONGEST)).endswith(b"\n") or len(line) == _LONGEST:
            number += 1
            while not line.endswith(b"\n") and (more := file.readline(_LONGEST)):
                line = more
            record = _record(line)
            if record is None and line.strip():
                damaged.append(number)
                line = line[max(0, line.rfind(_BEGINNING)) :]
                record = _record(line)
            if record is not None:
                whole.append((line, record))
    return _Lines(whole, damaged, line)


def _record(line: bytes) -> Record | None:
    """What a line says, if it is a record of a step."""
    try:
        record = files.parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int and 0 <= record["step"] < 1 << 53 else None


@contextmanager
def silent_stderr() -> Iterator[None]:
    """What C++ code and other processes write there is dropped too."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
