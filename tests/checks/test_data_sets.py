"""What folio doctor finds out about data sets."""

from __future__ import annotations

import shutil

import numpy as np

from folio.checks import data_sets
from folio.data.folders import open_folder
from folio.data.token_files import SPLITS, UNFINISHED

pytest_plugins = ["doctoring"]


def test_data_sets_and_their_states(look, story, tmp_path, monkeypatch) -> None:
    clone = tmp_path / "clone"
    for folder in ("data/whole", "data/cut", "data/shakespeare", "data/unmade", "data/stdlib", "edu_fineweb10B"):
        (tmp_path / folder).mkdir(parents=True)
    (clone / "data" / "other").mkdir(parents=True)
    for file in story.iterdir():
        shutil.copy2(file, tmp_path / "data" / "whole")
    for split, count in zip(SPLITS, (5000, 700), strict=True):
        np.save(tmp_path / "edu_fineweb10B" / f"edufineweb_{split}_000001.npy", np.zeros(count, np.uint16))
        np.zeros(count, np.uint16).tofile(clone / "data" / "other" / f"{split}.bin")
        (tmp_path / "data" / "cut" / f"{split}.bin").write_bytes(b"123")
    (tmp_path / "data" / "shakespeare" / "train.bin").write_bytes(b"12")
    (tmp_path / "data" / "unmade" / "prepare.py").touch()
    (tmp_path / "data" / "stdlib" / UNFINISHED).mkdir()
    (clone / "data" / "openwebtext" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "data" / "readme.md").touch()
    monkeypatch.setattr(data_sets, "CLONE", clone)
    rows = {row.text.split()[0].rstrip(":"): row for row in look()["data"]}
    sizes = {split: sum(file.tokens for file in open_folder(story).splits[split]) for split in SPLITS}
    assert rows.pop("data/whole").text == f"data/whole: {sizes['train']:,} train and {sizes['val']:,} val tokens"
    assert rows.pop("edu_fineweb10B").text == "edu_fineweb10B: 5,000 train and 700 val tokens"
    assert rows.pop(str(clone / "data" / "other")).mark == "ok"
    cut = rows.pop("data/cut/train.bin")
    assert (cut.mark, cut.remedy) == ("missing", "")
    assert "is cut short" in cut.text
    lone = rows.pop("data/shakespeare/val.bin")
    assert lone.mark == "missing"
    assert lone.remedy.endswith(" -m folio prepare shakespeare --overwrite")
    half = rows.pop("data/stdlib")
    assert (half.mark, half.remedy.split()[-2:]) == ("note", ["prepare", "stdlib"])
    away = clone / "data" / "openwebtext"
    assert rows.pop(str(away)).remedy.endswith(f" -m folio prepare openwebtext --data_dir={away}")
    assert rows == {}


def test_a_data_set_of_the_clone_is_listed_once_in_it(look, story, tmp_path, monkeypatch) -> None:
    shutil.copytree(story, tmp_path / "data" / "story")
    monkeypatch.setattr(data_sets, "CLONE", tmp_path)
    assert [row.text.split(":")[0] for row in look()["data"]] == ["data/story"]


def test_no_data_set(one, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data_sets, "CLONE", tmp_path / "clone")
    row = one("data")
    assert row.mark == "missing"
    assert row.remedy.endswith(" -m folio prepare stdlib")
