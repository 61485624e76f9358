"""What a run records about itself when it starts, for its report: date, size, data, code, processor."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from folio.data.rows import Tokens
from folio.data.token_files import CLONE
from folio.machine import probe
from folio.training.run import Run


def start_facts(run: Run) -> dict[str, Any]:
    """Facts of this start that are neither options nor choices of the machine; None if they are not known."""
    device = run.runtime.device.type
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(run.clock.seconds(), 3),
        "parameters": run.model.get_num_params(non_embedding=False),
        "dataset": run.tokens.name,
        **{f"{split}_tokens": run.tokens.length(split) for split in ("train", "val")},
        "bytes_per_token": bytes_per_token(run.tokens),
        "commit": commit(CLONE),
        "hardware": run.runtime.resolved["processor"] if device == "cuda" else probe.processor_name(),
    }


def bytes_per_token(tokens: Tokens) -> float | None:
    """Bytes of text for each token of the data sets, both splits together; None if one of them does not say."""
    metas = [folder.meta for folder in tokens.folders]
    sizes = [meta.get("text_bytes") or 0 for meta in metas]
    if not all(sizes):
        return None
    files = (file for meta in metas for split in meta["splits"].values() for file in split["files"])
    return sum(sizes) / sum(file["tokens"] for file in files)


def commit(clone: Path) -> str | None:
    """The commit of a checkout, with "-dirty" if its tracked files were changed; None outside a checkout of its own.

    A folder that another repository contains, such as a venv inside a project, is not a checkout.
    """
    if not (clone / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(clone), "describe", "--always", "--dirty", "--exclude=*"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run([*command, "--abbrev=12"], env=outside, capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode(errors="replace").strip() or None
