"""``metrics.jsonl``, and other files of records: one JSON object a line, each with its ``kind`` and ``step``."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from folio import files
from folio.errors import UserError
from folio.records.record import Record

REWRITTEN = ("train", "start", "skipped")  # kinds of records that a resumed run writes again for its first step
_BEGINNING = b'{"kind": '  # how a record begins; it cannot occur inside one, where quotes are escaped
_LONGEST = 1 << 24  # bytes of a line
_MOST_DAMAGED = 1 << 28  # bytes in which a longer line, which is damaged, must end


def to_json(record: Record) -> str:
    """A line of ``metrics.jsonl``, or another file of records; NaN and infinity become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


class _Lines(NamedTuple):
    """The content of a file of records: whole lines with their records, numbers of damaged lines, a half last line."""

    whole: list[tuple[bytes, Record]]
    damaged: list[int]
    half: bytes


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``, or another file of records.

    Damaged lines are left out, with one warning; so is an unfinished last line, without one.
    """
    lines = _lines(path)
    if lines.damaged:
        warnings.warn(f"{_damage(path, lines.damaged)}, and ignored", stacklevel=2)
    return [record for _, record in lines.whole]


def holds_records(path: Path) -> bool | None:
    """Whether a file begins with a record; None if it is empty, or its beginning cannot be read."""
    with files.open_regular(path) as file:
        line = file.readline(_LONGEST)
    if _record(line) is not None:
        return True
    with suppress(ValueError):
        files.parse_json(line)
        return False
    return None


def rewind(path: Path, step: int, owed: Collection[str] = (), interval: int = 1) -> list[str]:
    """Removes the lines that a run resumed at ``step`` writes again, and returns notes about lines that are lost.

    Written again are the lines of later steps, ``train`` and ``start`` of this step, and the kinds of measurements of
    this step that were not finished when its checkpoint was written (``owed``). An unfinished last line and damaged
    lines are removed too; if there are damaged lines, a copy of the original file is kept beside it. Lines are missing
    if the last one is older than a run that writes a train line every ``interval`` steps (0: none) would have it.
    """
    if not path.exists():
        return [f"{path} is missing: all measurements before step {step} are lost"] if step and interval else []
    lines = _lines(path)
    dropped = {*REWRITTEN, *owed}
    kept = [
        (line, r) for line, r in lines.whole if r["step"] < step or (r["step"] == step and r["kind"] not in dropped)
    ]
    notes = []
    if lines.damaged:
        beside = (path.with_name(f"{path.name}.damaged{f'-{n}' * (n > 1)}") for n in itertools.count(1))
        original = next(other for other in beside if not os.path.lexists(other))
        files.write_with(original, partial(shutil.copyfile, path))
        notes.append(f"{_damage(path, lines.damaged)}, and left out; the original is kept as {original.name}")
    reached = max((record["step"] for _, record in kept), default=-1)
    if interval and reached < (step - 1) // interval * interval:
        until = f"ends at step {reached}" if kept else "has nothing from before"
        notes.append(f"{path} {until}, but the run resumes at step {step}")
    if len(kept) < len(lines.whole) or lines.damaged or lines.half:
        files.write(path, b"".join(line for line, _ in kept))
    return notes


def _damage(path: Path, damaged: list[int]) -> str:
    numbers = ", ".join(f"{n:,}" for n in damaged[:5]) + (" …" if len(damaged) > 5 else "")
    return (
        f"{path}: "
        + (f"line {numbers} is" if len(damaged) == 1 else f"{len(damaged):,} lines ({numbers}) are")
        + " damaged"
    )


def _lines(path: Path) -> _Lines:
    """Reads a file of records. If a line is half a record followed by a whole one, the whole one is kept."""
    whole: list[tuple[bytes, Record]] = []
    damaged, number, line = [], 0, b""
    with files.open_regular(path) as file:
        while (line := file.readline(_LONGEST)).endswith(b"\n") or len(line) == _LONGEST:
            number, begin = number + 1, file.tell()
            while not line.endswith(b"\n") and (more := file.readline(_LONGEST)):
                line = more
                if file.tell() - begin > _MOST_DAMAGED:
                    raise UserError(f"{path}: line {number:,} has no end: remove the line, or the file")
            record = _record(line)
            if record is None and line.strip():
                damaged.append(number)
                line = line[max(0, line.rfind(_BEGINNING)) :]
                record = _record(line)
            if record is not None:
                whole.append((line, record))
    return _Lines(whole, damaged, line)


def _record(line: bytes) -> Record | None:
    """The record in a line; None if it is not one."""
    try:
        record = files.parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int and 0 <= record["step"] < 1 << 53 else None
