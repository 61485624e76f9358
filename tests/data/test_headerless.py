"""The type of ids in files without a header."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import written
from conftest import SMALL, STORY, Outcome, assert_refused
from numpy.typing import NDArray
from written import IDS, PAIR, Ids, Write, ds, headed, lay, npy

from folio.data.folders import open_folder

shards = written.shards


RANDOM = np.random.default_rng(1)
TEXT = np.frombuffer(STORY.read_bytes(), dtype=np.uint8)[:9000]
LETTERS = np.unique(TEXT, return_inverse=True)[1]
MANY = np.minimum(50256, RANDOM.zipf(1.2, 9000))
LABELS = np.where(np.arange(9000) % 7, MANY, -100)
# the ids, the type that they are written in, and the value of --token_dtype
OTHER: dict[str, tuple[NDArray[Any], str, str]] = {
    "uint32": (MANY, "<u4", "uint32"),
    "int64": (MANY, "<i8", "int64"),
    "uint32 of characters": (LETTERS, "<u4", "uint32"),
    "int32": (LABELS, "<i4", "int32"),
    "int64 with labels": (LABELS, "<i8", "int64"),
    "a wide vocabulary": (RANDOM.integers(0, 151_936, 9000), "<u4", "uint32"),
    "few": (LETTERS[:30], "<u4", "uint32"),
    "bytes": (TEXT, "u1", "uint8"),
    "characters in bytes": (LETTERS, "u1", "uint8"),
    "few bytes": (TEXT[:300], "u1", "uint8"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_type_is_refused_until_it_is_said(folio: Callable[..., Outcome], tmp_path: Path, case: str) -> None:
    """One line names the option. With it, the ids are read as written, and a run trains on them."""
    ids, dtype, name = OTHER[case]
    lay(tmp_path, PAIR, ids.astype(dtype))
    outcome = folio("data", "info", tmp_path)
    assert_refused(outcome, tmp_path / "train.bin", f"seems to hold {name}", f"--token_dtype={name}")
    found = open_folder(tmp_path, name)  # type: ignore[arg-type]
    assert np.array_equal(found.splits["train"][0].map(), ids)
    assert open_folder(tmp_path, "uint16").splits["val"][0].tokens == ids.astype(dtype).nbytes // 2
    if case == "uint32":
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 50257}))
        out = f"--out_dir={tmp_path / 'out'}"
        refused = folio("train", *SMALL, f"--data_dir={tmp_path}", out)
        assert_refused(refused, "--token_dtype=uint32")
        code, _, err = folio("train", *SMALL, "--max_iters=1", f"--data_dir={tmp_path}", out, "--token_dtype=uint32")
        assert (code, err) == (0, "")
        code, _, err = folio("train", "--init_from=resume", "--max_iters=2", out)
        assert (code, err) == (0, "")
        assert folio("eval", out, "--eval_iters=1").code == 0
        assert folio("plan", f"--data_dir={tmp_path}", "--token_dtype=uint32").code == 0


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i8", "<f4", "<f8"])
@pytest.mark.parametrize("ids", [MANY, LETTERS], ids=["many", "characters"])
def test_types_that_are_not_read(tmp_path: Path, dtype: str, ids: Ids) -> None:
    """The error gives code that converts them, and the code works."""
    lay(tmp_path, PAIR, ids.astype(dtype))
    with pytest.raises(ValueError, match=r"train\.bin seems to hold .*, which is not read") as refused:
        open_folder(tmp_path)
    remedy = re.search(r"np.fromfile\(FILE, '(.*?)'\)\.astype\('(.*?)'\)\.tofile", str(refused.value))
    assert remedy
    for name in PAIR.split(","):
        np.fromfile(tmp_path / name, remedy[1]).astype(remedy[2]).tofile(tmp_path / name)
    said = "uint32" if "--token_dtype=uint32" in str(refused.value) else "auto"
    assert np.array_equal(open_folder(tmp_path, said).splits["train"][0].map(), ids)  # type: ignore[arg-type]


ORDINARY: dict[str, NDArray[Any]] = {
    "words": MANY,
    "characters": LETTERS,
    "bytes": TEXT,
    "bases": RANDOM.integers(0, 4, 9000),
    "bits": RANDOM.integers(0, 2, 9000),
    "one": np.full(9000, 512),
    "zeros": np.zeros(9000),
    "nearly zeros": np.eye(1, 9000)[0],
    "all of 16 bits": RANDOM.integers(0, 2**16, 90_000),
    "counting": np.arange(9000),
    "few": np.array([5, 0, 7, 0, 9, 1]),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_uint16_stays_uint16(tmp_path: Path, case: str) -> None:
    """Ids below 256, whose every second byte is zero, and unusual data."""
    lay(tmp_path, PAIR, ORDINARY[case].astype("<u2"))
    assert open_folder(tmp_path).splits["train"][0].dtype == np.uint16


def test_zeros_in_every_second_place_can_be_meant(tmp_path: Path) -> None:
    """They are refused, and read with --token_dtype=uint16."""
    lay(tmp_path, PAIR, np.stack([LETTERS[:900], np.zeros(900)], axis=1).ravel().astype("<u2"))
    with pytest.raises(ValueError, match="--token_dtype=uint16"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, "uint16").splits["train"][0].tokens == 1800


def test_vocab_size_shows_another_type(tmp_path: Path) -> None:
    """Ids that are below vocab_size only as another type; a vocab_size above 65,536."""
    size = int(LETTERS.max()) + 1
    for ids, vocab_size, words in (
        (LETTERS.astype("u1"), size, "uint8"),
        (LETTERS[:40].astype(">u2"), size, "big-endian"),
        (MANY.astype("<u2"), 100_277, "100,277 token ids, for which nanoGPT's uint16 is too narrow"),
    ):
        lay(tmp_path, PAIR, ids)
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        with pytest.raises(ValueError, match=words):
            open_folder(tmp_path)


def test_val_of_another_type_than_train(tmp_path: Path) -> None:
    lay(tmp_path, "train.bin", LETTERS.astype("<u2"))
    lay(tmp_path, "val.bin", LETTERS.astype("<u4"))
    with pytest.raises(ValueError, match=r"val\.bin seems to hold uint32, and train\.bin uint16: write them again"):
        open_folder(tmp_path)


@pytest.mark.parametrize("write", [headed, npy, ds])
def test_the_option_does_not_overrule_what_a_file_says(tmp_path: Path, write: Write, shards: Path) -> None:
    suffix = {headed: ".bin", npy: ".npy", ds: ".ds"}[write]
    for name in ("x_train_0", "x_val_0"):
        write(tmp_path / f"{name}{suffix}", IDS)
    assert open_folder(tmp_path, "uint16").splits["train"][0].tokens == 100
    with pytest.raises(ValueError, match=r"token_dtype=uint32: .* states its own type, uint16"):
        open_folder(tmp_path, "uint32")
    with pytest.raises(ValueError, match=r"token_dtype=int64: .*meta\.json states the type of its files, uint16"):
        open_folder(shards, "int64")
