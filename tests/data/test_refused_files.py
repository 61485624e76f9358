"""Damaged files, and files that do not fit together, are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import written
from conftest import SMALL, Outcome
from written import IDS, Ids, Write, bare, cut, ds, headed, npy

from folio.data.folders import open_folder
from folio.files import write_sealed

shards = written.shards


def three(d: Path, write: Write = npy, suffix: str = ".npy", ids: Ids = IDS) -> None:
    """Two shards to train on and one to validate."""
    for name in ("train_000001", "train_000002", "val_000000"):
        write(d / f"{name}{suffix}", ids)


def garbled(d: Path, header: bytes) -> None:
    three(d)
    (d / "train_000002.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def relisted(d: Path, name: str) -> None:
    """Has meta.json list its first training shard under another name."""
    path = d / "meta.json"
    meta = json.loads(path.read_text())
    (d / meta["splits"]["train"]["files"][0]["name"]).rename(d / name)
    meta["splits"]["train"]["files"][0]["name"] = name
    write_sealed(path, meta)


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    later = path.with_name("meta.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))


class Hostile:
    """Its pickle makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def hostile(d: Path) -> None:
    """Makes d/mark if anything unpickles it."""
    three(d)
    np.save(d / "train_000002.npy", np.array([Hostile(d / "mark")], dtype=object), allow_pickle=True)


# what is done to an empty folder, and words of the error
FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "formats": (
        lambda d: (three(d), bare(d / "train.bin", IDS)),
        ["holds several data sets (train_000001.npy, train.bin)", "--data_dir=", "/*.npy'"],
    ),
    "types": (lambda d: (three(d), npy(d / "train_000002.npy", IDS.astype("<i4"))), ["train_000002.npy int32"]),
    "types of headed": (
        lambda d: (three(d, headed, ".bin"), headed(d / "val_000000.bin", IDS.astype("<u4"))),
        ["train_000001.bin holds uint16", "val_000000.bin uint32"],
    ),
    "some headers": (
        lambda d: (three(d, headed, ".bin"), bare(d / "train_000002.bin", IDS)),
        ["train_000002.bin has no header", "train_000001.bin has one"],
    ),
    "npy cut": (lambda d: (three(d), cut(d / "train_000002.npy", 228)), ["000002.npy: 50 tokens", "says 100"]),
    "npy cut in header": (lambda d: (three(d), cut(d / "train_000002.npy", 60)), ["000002.npy: not a .npy"]),
    "npy empty": (lambda d: (three(d), cut(d / "train_000002.npy", 0)), ["000002.npy: not a .npy"]),
    "npy open brace": (lambda d: garbled(d, b"{'descr': '<u2', 'shape': ("), ["000002.npy: not a .npy"]),
    "npy open quote": (lambda d: garbled(d, b"'''"), ["000002.npy: not a .npy"]),
    "npy of nothing": (lambda d: (three(d), npy(d / "val_000000.npy", IDS[:0])), ["val_000000.npy is empty"]),
    "npy of rows": (lambda d: (three(d), npy(d / "val_000000.npy", IDS.reshape(10, 10))), ["val_000000.npy", "2 dim"]),
    "npy of floats": (lambda d: (three(d), npy(d / "val_000000.npy", IDS / 2)), ["val_000000.npy", "float64"]),
    "npy of objects": (hostile, ["train_000002.npy", "object"]),
    "headed cut": (
        lambda d: (three(d, headed, ".bin"), cut(d / "val_000000.bin", 1124)),
        ["val_000000.bin: 50 tokens", "its header says 100"],
    ),
    "headed cut in header": (
        lambda d: [(headed(d / name, IDS), cut(d / name, 1000)) for name in ("train.bin", "val.bin")],
        ["train.bin", "cut short"],
    ),
    "bin of odd length": (lambda d: (three(d, bare, ".bin"), cut(d / "val_000000.bin", 99)), ["bin: 99 bytes"]),
    "bin empty": (lambda d: (three(d, bare, ".bin"), cut(d / "val_000000.bin", 0)), ["val_000000.bin is empty"]),
    "ds cut": (lambda d: (ds(d / "0.ds", IDS), cut(d / "0.ds", 150)), ["0.ds: 150 bytes for the 100 tokens"]),
    "ds empty": (lambda d: (ds(d / "0.ds", IDS), cut(d / "0.ds", 0)), ["0.ds: 0 bytes for the 100 tokens"]),
    "ds without index": (lambda d: (ds(d / "0.ds", IDS), (d / "0.ds.index").unlink()), ["0.ds.index is missing"]),
    "no train": (lambda d: (three(d), [p.unlink() for p in d.glob("train*")]), ["train is missing"]),
    "no val": (lambda d: (three(d, headed, ".bin"), (d / "val_000000.bin").unlink()), ["val is missing", "val_000000"]),
    "no val.bin": (lambda d: bare(d / "train.bin", IDS), ["val.bin is missing"]),
    "no names": (lambda d: npy(d / "tokens.npy", IDS), ["train is missing"]),
    "both names": (lambda d: npy(d / "train_without_val.npy", IDS), ["has both train and val in its name"]),
    "unfinished": (lambda d: (d / ".preparing").mkdir(), ["not finished", "prepare"]),
}
OWN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "elsewhere": (lambda d: relisted(d, "../x.npy"), ["meta.json", "outside the folder"]),
    "shard missing": (lambda d: (d / "story_train_000003.npy").unlink(), ["story_train_000003.npy is missing"]),
    "shard changed": (lambda d: changed(d / "story_train_000003.npy"), ["000003.npy is not what its meta.json"]),
    "shard cut": (lambda d: cut(d / "story_train_000003.npy", 3000), ["000003.npy", "its header says 5,000"]),
    "shard another": (
        lambda d: npy(d / "story_train_000003.npy", IDS),
        ["000003.npy: 100 tokens, but its meta.json says 5,000"],
    ),
}
REMEDY = re.compile("prepare|--data_dir=|rename|give files of one|name a file|save_index=True")


def damaged(case: str, folder: Path, shards: Path) -> list[str]:
    if case in OWN:
        shutil.copytree(shards, folder)
    else:
        folder.mkdir()
    spoil, words = {**FOREIGN, **OWN}[case]
    spoil(folder)
    return words


@pytest.mark.parametrize("case", [*FOREIGN, *OWN])
def test_flawed_folders_are_refused(tmp_path: Path, shards: Path, case: str) -> None:
    """One line names the file, the flaw and the remedy."""
    words = damaged(case, tmp_path / "data", shards)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        open_folder(tmp_path / "data")
    said = str(refused.value)
    assert "\n" not in said
    assert [word for word in [str(tmp_path), *words] if word not in said] == [], said
    assert REMEDY.search(said), f"no remedy: {said}"
    if case == "npy of objects":
        assert not (tmp_path / "data" / "mark").exists()
        np.load(tmp_path / "data" / "train_000002.npy", allow_pickle=True)
        assert (tmp_path / "data" / "mark").exists(), "a trusting reader would have run it"


TYPICAL = "formats,some headers,npy cut,npy open brace,npy of objects,ds without index,no val,unfinished,shard changed"


@pytest.mark.parametrize("case", [*TYPICAL.split(","), "elsewhere"])
def test_training_refuses_it_in_one_line(
    folio: Callable[..., Outcome], tmp_path: Path, shards: Path, case: str
) -> None:
    """Exit code 2; nothing is written, and no code in a pickle runs."""
    damaged(case, tmp_path / "data", shards)
    outcome = folio("train", *SMALL, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert str(tmp_path / "data") in outcome.err
    assert REMEDY.search(outcome.err)
    assert "Traceback" not in outcome.out + outcome.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "data" / "mark").exists()
