"""``evaluations.jsonl``: the results of ``folio eval`` for a run."""

from __future__ import annotations

import warnings
from pathlib import Path

from folio import files
from folio.errors import UserError
from folio.records.metrics import to_json
from folio.records.record import Record
from folio.records.run_folder import EVALUATIONS


def append(out_dir: Path, record: Record) -> None:
    """Adds a line to the file, after its last whole line; warns if the file cannot be written."""
    path = out_dir / EVALUATIONS
    try:
        before = files.read_bytes(path) if path.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        files.write(path, whole + f"{to_json(record)}\n".encode())
    except (OSError, UserError) as error:
        why = files.reason(error) or error
        warnings.warn(f"{path} could not be written ({why}): the result is not kept", stacklevel=2)
