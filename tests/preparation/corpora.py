"""Texts, and the kinds of files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STORY

from folio.preparation.documents import WorkerSettings

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")
tokenizers = pytest.importorskip("tokenizers")


DOCS = [
    "A short one.",
    "Every width: é – 渡 🚢 \U0010ffff \x00 \ufeff end",
    "line one\r\nline two\r\n\r\n\n\nline six\rstill six\n",
    " ",
    STORY.read_text(encoding="utf-8")[:5000],
    f"{'a' * 180} {'b' * 22} {'c' * 10}",
    "渡し船" * 300,  # no place where it can be cut
    '{"text": "JSON in a text"}\n' * 20,
    "\n",
    "no line end, and\u2028others",
]
WORK = WorkerSettings({"kind": "bytes"}, "none")


def lines(texts: Iterable[str], key: str = "text", end: str = "\n", ascii: bool = True) -> bytes:
    """JSON lines."""
    return "".join(json.dumps({"id": 7, key: t}, ensure_ascii=ascii) + end for t in texts).encode()


def table(path: Path, texts: Sequence[Any], group: int, key: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=group)


def each(end: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for i, text in enumerate(DOCS):
            (folder / f"{i:02}{end}").write_bytes(text.encode())

    return write


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The datasets library without a network and with a cache of its own."""
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub").constants, "HF_HUB_OFFLINE", True)


def expected(tok: Path, texts: Sequence[str]) -> list[int]:
    """The library's ids, an end of text after each document."""
    fast = tokenizers.Tokenizer.from_file(str(tok))
    return [i for text in texts for i in (*fast.encode(text).ids, 0)]


def ids(folder: Path, split: str = "train", dtype: Any = np.uint16) -> list[int]:
    return np.fromfile(folder / f"{split}.bin", dtype).tolist()


GOOD = ["First of all.", "Two – 渡し船.\nWith two lines.", "three " * 50]
