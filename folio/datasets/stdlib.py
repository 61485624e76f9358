"""The running Python's own standard library: about 12 MB of real text that every machine already has."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from folio.datasets.write import write
from folio.tokenizer import Bytes

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def prepare(folder: Path, source: Path | None = None) -> None:
    """Byte tokens of all sources in order of their path; every tenth file is for validation."""
    root = source or Path(sysconfig.get_path("stdlib"))
    files = list(_sources(root))
    if not files:
        raise ValueError(f"{root} holds no Python sources: give a folder that does as --source")
    print(f"{len(files):,} files of {root}, {sum(map(len, files)):,} bytes")
    val = [text for i, text in enumerate(files) if i % 10 == 9]
    train = [text for i, text in enumerate(files) if i % 10 != 9]
    splits = {s: np.frombuffer(b"".join(texts), np.uint8) for s, texts in (("train", train), ("val", val))}
    write(folder, splits, Bytes(), "none", {"dataset": "stdlib", "python": platform.python_version()})


def _sources(root: Path) -> Iterator[bytes]:
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            content = path.read_bytes()
            try:
                content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            yield content
