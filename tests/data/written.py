"""Token files of every format, written for the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STORY
from numpy.typing import NDArray

from folio.preparation.job import prepare
from folio.preparation.recipes import named_by_user

Ids = NDArray[np.integer[Any]]
Write = Callable[[Path, Ids], None]
IDS = np.arange(100, dtype=np.uint16)
MAGIC = {"uint16": 20240520, "uint32": 20240801}


def bare(path: Path, ids: Ids) -> None:
    """nanoGPT's file: the ids and nothing else."""
    ids.tofile(path)


def npy(path: Path, ids: NDArray[Any], version: tuple[int, int] = (1, 0)) -> None:
    """numpy's file, of any version of the format."""
    with path.open("wb") as file:
        np.lib.format.write_array(file, ids, version)


def headed(path: Path, ids: Ids) -> None:
    """llm.c's file: 256 int32 before the ids."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC[ids.dtype.name], 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


def ds(path: Path, ids: Ids, tokenizer: str = "gpt2") -> None:
    """datatrove's file of documents of at most 10 tokens, with its .index and .metadata."""
    path.parent.mkdir(exist_ok=True)
    ids.tofile(path)
    ends = np.append(np.arange(10, len(ids), 10), len(ids))
    ends.astype("<u8").tofile(path.with_name(f"{path.name}.index"))
    path.with_name(f"{path.name}.metadata").write_text(f"{tokenizer}|{ids.dtype.itemsize}\n{len(ids)}\n{len(ids)}")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of Folio: 20 kB of text as bytes, in five shards."""
    folder = tmp_path_factory.mktemp("shards") / "story"
    prepare(named_by_user([str(STORY)], "story", tokenizer="bytes", shard_size=5000), folder)
    assert len(list(folder.glob("story_*_00000*.npy"))) == 5
    return folder


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def lay(folder: Path, names: str, ids: Ids = IDS) -> None:
    """Files of the format that each name says, all of the same ids."""
    for name in names.split(","):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        {".npy": npy, ".ds": ds}.get(path.suffix, bare)(path, ids)


PAIR, SHARDS = "train.bin,val.bin", "edufineweb_train_000001.npy,edufineweb_train_000002.npy,edufineweb_val_000000.npy"


def described(path: Path, header: bytes, version: int = 2) -> None:
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(4, "little") + header)
