"""Which files of a folder are the data set, and which are ignored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import written
from conftest import SMALL, Outcome
from written import IDS, PAIR, SHARDS, lay, npy

from folio.data.folders import open_folder
from folio.files import sha256, write_sealed

shards = written.shards


# files of the data set, other files, and words of the note
BESIDE: dict[str, tuple[str, str, str]] = {
    "mask": (PAIR, "train_mask.bin", "left alone: train_mask.bin"),
    "copies": (PAIR, "old_train.bin,train (1).bin,train_copy.bin,val2.bin", "left alone: old_train.bin, train (1).bin"),
    "both words": (PAIR, "train_val.bin", "left alone: train_val.bin"),
    "shards beside nanoGPT's": (PAIR, SHARDS, "left alone: edufineweb_train_000001.npy"),
    "nanoGPT's own shards": (PAIR, "train_000001.bin", "left alone: train_000001.bin"),
    "backup": (PAIR, "train.bin.bak", ""),
    "mask of a shard": (SHARDS, "edufineweb_train_mask_000001.npy", "left alone: edufineweb_train_mask_000001.npy"),
    "copy of a shard": (SHARDS, "edufineweb_train_000001 (1).npy", "left alone: edufineweb_train_000001 (1).npy"),
    "half another family": (SHARDS, "tiny_train_000001.npy", "left alone: tiny_train_000001.npy"),
    "no split": (SHARDS, "embeddings.npy,a.bin,b.bin,c.bin", "left alone: a.bin, b.bin, c.bin and 1 more"),
    "GPT-from-scratch": ("train_000001.npy,val_000000.npy", "train_lengths_000001.npy", "train_lengths_000001.npy"),
    "of": ("t-train-00000-of-00002.npy,t-train-00001-of-00002.npy,t-val-00000-of-00001.npy", "", ""),
    "number first": ("0_train.npy,1_train.npy,2_val.npy", "fold_1_train.npy", "left alone: fold_1_train.npy"),
    "datatrove": ("train/0_a.ds,train/1_a.ds,val/0_a.ds", "val/0_b.ds", "left alone: 0_b.ds"),
    "gap": ("train_000001.npy,train_000003.npy,val_000000.npy", "", "1 shard is missing from the sequence: 2"),
    "large gap": (
        "train_1.npy,train_4000000000.npy,val_0.npy",
        "",
        "3,999,999,998 shards are missing from the sequence: 2, 3",
    ),
    "fewer than of": (
        "train-0-of-3.npy,train-1-of-3.npy,val-0-of-1.npy",
        "",
        "1 shard is missing from the sequence: 2",
    ),
    "validation between": ("train_0.npy,train_2.npy,val_1.npy", "", ""),
    "each counted": ("train_0.npy,train_1.npy,val_0.npy,val_2.npy", "", "1 shard is missing from the sequence: 1"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_one_data_set_is_taken_and_the_rest_named(tmp_path: Path, case: str) -> None:
    """nanoGPT's two names, else one family of shards. A note of one line names the other files."""
    own, beside, words = BESIDE[case]
    lay(tmp_path, own)
    if beside:
        lay(tmp_path, beside, IDS[::-1])
    folder = open_folder(tmp_path)
    taken = [file.path for split in ("train", "val") for file in folder.splits[split]]
    assert sorted(taken) == sorted(tmp_path / name for name in own.split(","))
    assert words in folder.note
    assert "\n" not in folder.note
    assert bool(words) == bool(folder.note)


AMBIGUOUS: dict[str, tuple[str, str]] = {
    "two families": (f"{SHARDS},tiny_train_1.npy,tiny_val_0.npy", "/edufineweb_*.npy'"),
    "versions": ("o_v1_train.bin,o_v1_val.bin,o_v2_train.bin,o_v2_val.bin", "/o_v1_*.bin'"),
    "shuffled": ("00000_shuffled.ds,00000_unshuffled.ds", "/*_shuffled.ds'"),
    "half of nanoGPT's": (f"{SHARDS},train.bin", "/edufineweb_*.npy'"),
    "padding": ("train_1.npy,train_000001.npy,val_0.npy", "cannot both be in one data set"),
    "whole and shards": ("train.npy,train_000001.npy,val.npy", "cannot both be in one data set"),
    "two words": ("train.npy,val.npy,validation.npy", "cannot both be in one data set"),
    "two stems": ("tiny_train.bin,owt_val.bin", "not of one data set"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_data_sets_in_a_folder_are_refused(tmp_path: Path, case: str) -> None:
    """The glob that the error suggests can be read."""
    names, words = AMBIGUOUS[case]
    lay(tmp_path, names)
    with pytest.raises(ValueError, match=r"glob") as refused:
        open_folder(tmp_path)
    assert words in str(refused.value)
    if named := re.search(r"--data_dir='(.*)'", str(refused.value)):
        assert open_folder(Path(named[1])).note in (
            "",
            f"{named[1]}: the last 10 tokens of 00000_shuffled.ds are for validation",
        )


def test_a_glob_means_every_file_that_it_finds(tmp_path: Path) -> None:
    """Also files of several families, with a note. Files without a split are left out."""
    lay(tmp_path, f"{SHARDS},tiny_train_1.npy,tiny_val_0.npy,x.npy")
    folder = open_folder(tmp_path / "*.npy")
    assert [len(folder.splits[split]) for split in ("train", "val")] == [3, 2]
    assert "several names are used as one data set: edufineweb_*.npy, tiny_*.npy" in folder.note
    assert "left alone: x.npy" in folder.note
    assert open_folder(tmp_path / "tiny_*").note == ""


def test_a_glob_of_listed_and_other_files(shards: Path, tmp_path: Path) -> None:
    """A folder's own files are listed in meta.json; a glob may not mix them with others."""
    folder = shutil.copytree(shards, tmp_path / "data")
    npy(folder / "story_train_mask.npy", IDS)
    found = open_folder(folder)
    assert (found.tokenizer, len(found.splits["train"])) == ({"kind": "bytes"}, 4)
    assert "left alone: story_train_mask.npy" in found.note
    with pytest.raises(ValueError, match=r"story_train_mask\.npy is not in .*meta\.json"):
        open_folder(folder / "*.npy")


def test_a_glob_of_a_wide_data_set(shards: Path, tmp_path: Path) -> None:
    """Its meta.json states type and tokenizer, for globs too."""
    folder = shutil.copytree(shards, tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        for file in meta["splits"][split]["files"]:
            path = folder / file["name"]
            np.load(path).astype(np.uint32).tofile(path.with_suffix(".bin"))
            path.unlink()
            file |= {"name": path.with_suffix(".bin").name, "sha256": sha256(path.with_suffix(".bin"))}
    write_sealed(folder / "meta.json", meta | {"dtype": "uint32"})
    for place in (folder, folder / "*.bin", folder / "*_00000[012].bin"):
        found = open_folder(place, "uint32")
        assert found == open_folder(place)
        assert (found.tokenizer, found.splits["train"][0].dtype) == ({"kind": "bytes"}, np.uint32)
    with pytest.raises(FileNotFoundError, match=r"val is missing"):
        open_folder(folder / "*train*")


def test_training_names_what_it_leaves_alone(folio: Callable[..., Outcome], tmp_path: Path) -> None:
    """A mask beside the ids changes no loss; train and data info name it."""
    lay(tmp_path / "alone", PAIR)
    lay(tmp_path / "beside", f"{PAIR}")
    lay(tmp_path / "beside", "train_mask.bin", IDS % 2)
    losses = []
    for name in ("alone", "beside"):
        out = f"--out_dir={tmp_path / 'out' / name}"
        code, said, err = folio("train", *SMALL, "--max_iters=2", f"--data_dir={tmp_path / name}", out)
        assert (code, err) == (0, "")
        assert ("left alone: train_mask.bin" in said) == (name == "beside")
        losses.append(re.findall(r"iter \d+: loss ([\d.]+)", said))
    assert losses[0] == losses[1] != []
    assert "left alone: train_mask.bin" in folio("data", "info", tmp_path / "beside").out
