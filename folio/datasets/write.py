"""Token files on disk: both splits and the meta file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from folio.tokenizer import Tokenizer
from folio.tokens import sha256


def write(
    folder: Path, splits: Mapping[str, NDArray[np.integer[Any]]], tokenizer: Tokenizer, eot: str, made: dict[str, Any]
) -> None:
    """Writes <split>.bin (uint16, or uint32 where the vocabulary needs it) and meta.json into ``folder``.

    Everything is complete under another name before anything is renamed, the meta file last.

    Raises:
        ValueError: a split is empty.
        OSError: the folder cannot be written.
    """
    dtype = np.dtype(np.uint16 if tokenizer.size <= 2**16 else np.uint32)
    counts = {}
    if empty := [split for split, ids in splits.items() if not len(ids)]:
        raise ValueError(f"{folder / empty[0]}.bin would be empty: the text is too short to split")
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        ids.astype(dtype).tofile(_unfinished(folder, f"{split}.bin"))
        counts[split] = {"tokens": len(ids), "sha256": sha256(_unfinished(folder, f"{split}.bin"))}
    meta = {
        "vocab_size": tokenizer.size,
        "dtype": dtype.name,
        "tokenizer": tokenizer.to_json(),
        "eot": eot,
        "splits": counts,
        "made": made,
    }
    _unfinished(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for name in (*(f"{split}.bin" for split in splits), "meta.json"):
        with _unfinished(folder, name).open("rb") as file:
            os.fsync(file.fileno())
        _unfinished(folder, name).replace(folder / name)
    for split, ids in splits.items():
        print(f"{split} has {len(ids):,} tokens")
    print(f"wrote {folder}")


def _unfinished(folder: Path, name: str) -> Path:
    return folder / f".{name}.unfinished"
