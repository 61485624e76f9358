"""Token files that are damaged, of another kind or hostile: refused in one line, with nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, assert_refused, tree

from folio.config.options import Data
from folio.data.rows import Tokens
from folio.errors import UserError


@pytest.fixture
def data(story: Path, tmp_path: Path) -> Path:
    """The small data set, to be damaged."""
    return Path(shutil.copytree(story, tmp_path / "data"))


def _cut(folder: Path, size: int, name: str = "train.bin") -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(size)


def _without_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def _flip(folder: Path) -> None:
    content = np.fromfile(folder / "val.bin", dtype=np.uint16)
    content[0] ^= 1
    content.tofile(folder / "val.bin")
    later = (folder / "meta.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(folder / "val.bin", ns=(later, later))


def _meta(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]
    path.write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda d: (d / "train.bin").unlink(), ["train.bin is missing", "prepare"], id="no train.bin"),
        pytest.param(lambda d: (d / "val.bin").unlink(), ["val.bin is missing", "prepare"], id="no val.bin"),
        pytest.param(partial(_cut, size=0), ["train.bin is empty", "prepare"], id="empty"),
        pytest.param(partial(_cut, size=1001), ["train.bin: 1001 bytes", "uint16", "prepare"], id="odd length"),
        pytest.param(partial(_cut, size=1000), ["train.bin: 500 tokens", "meta.json says", "prepare"], id="cut short"),
        pytest.param(_flip, ["val.bin is not what its meta.json describes", "prepare"], id="changed"),
        pytest.param(
            lambda d: (_without_meta(d), _cut(d, 32, "val.bin")),
            ["val.bin: 16 tokens", "block_size + 1 = 17", "lower --block_size"],
            id="too short",
        ),
        pytest.param(lambda d: (d / "meta.json").write_text("{"), ["meta.json", "prepare"], id="meta cut short"),
        pytest.param(lambda d: (d / "meta.json").write_text("[]"), ["meta.json", "prepare"], id="meta a list"),
        pytest.param(lambda d: (d / "meta.json").write_bytes(b"\xff"), ["meta.json", "prepare"], id="meta no text"),
        pytest.param(lambda d: (d / "meta.json").write_text("[" * 100_000), ["meta.json", "prepare"], id="meta deep"),
        pytest.param(partial(_meta, splits={}), ["meta.json", "splits", "prepare"], id="meta without splits"),
        pytest.param(partial(_meta, dtype="float64"), ["meta.json", "dtype", "prepare"], id="meta of floats"),
        pytest.param(partial(_meta, vocab_size=-5), ["meta.json", "vocab", "prepare"], id="meta of no vocabulary"),
        pytest.param(partial(_meta, tokenizer=None), ["meta.json", "prepare"], id="meta without tokenizer"),
    ],
)
def test_a_data_set_that_is_damaged(folio, data, tmp_path, damage, words) -> None:
    damage(data)
    before = tree(data)
    assert_refused(folio("train", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'new'}"), data, *words)
    assert not (tmp_path / "new").exists()
    assert tree(data) == before


def test_an_id_outside_the_vocabulary(folio, data, tmp_path) -> None:
    """Without a meta file, ids are checked only when they are read."""
    _without_meta(data)
    outcome = folio("train", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'new'}", "--vocab_size=10")
    assert_refused(outcome, data / "train.bin", "token id", "vocabulary of 10", "--vocab_size")
    assert not (tmp_path / "new" / "checkpoints").exists()


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_would_run_code(folio, data, tmp_path, protocol) -> None:
    _without_meta(data)
    mark = tmp_path / "mark"
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": _Hostile(mark)}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    outcome = folio("train", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'new'}")
    assert_refused(outcome, data / "meta.pkl", "open, which would run code", "prepare")
    assert not mark.exists()
    assert not (tmp_path / "new").exists()
    pickle.loads((data / "meta.pkl").read_bytes())["stoi"].close()
    assert mark.exists(), "an ordinary unpickler would have run it"


@pytest.mark.parametrize(
    "meta",
    [
        5,
        {"itos": {0: "a"}},
        {"vocab_size": "many", "itos": {0: "a"}},
        {"vocab_size": None},
        {"vocab_size": True},
        {"vocab_size": 0},
        {"vocab_size": 10**12},
        {"vocab_size": 1e12},
        {"vocab_size": 64.5},
        {"vocab_size": np.array([65, 66])},
        {"vocab_size": [[65]]},
    ],
    ids=str,
)
def test_a_pickle_that_is_not_nanogpts(folio, data, tmp_path, meta) -> None:
    """Of another kind, or with no number of token ids that can be."""
    _without_meta(data)
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    outcome = folio("train", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'new'}")
    assert_refused(outcome, data / "meta.pkl", "not nanoGPT's meta.pkl")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"Nr\xff\xff\xff\xff.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"})" + b"2\x86" * 60 + b"Ns.",
        b"\x80\x04.",
        b"]" * 99_999,
    ],
    ids=["34 GB of memo", "a terabyte", "doubled tuples", "nothing", "deep"],
)
def test_a_pickle_that_asks_for_much(folio, data, tmp_path, content) -> None:
    """A few bytes that would fill memory, or be hashed for ever."""
    _without_meta(data)
    (data / "meta.pkl").write_bytes(content)
    assert_refused(folio("train", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'new'}"), data / "meta.pkl")
    assert_refused(folio("data", "info", data), data / "meta.pkl")
    assert not (tmp_path / "new").exists()


def test_nanogpts_own_pickle_is_read(folio, data, tmp_path) -> None:
    characters = json.loads((data / "meta.json").read_text())["tokenizer"]["characters"]
    _without_meta(data)
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    out = f"--out_dir={tmp_path / 'new'}"
    code, said, err = folio("train", *SMALL, f"--data_dir={data}", out, "--max_iters=1")
    assert (code, err) == (0, "")
    assert f"vocab_size = {len(characters)}" in said
    code, said, err = folio("sample", out, "--device=cpu", "--start=The ", "--num_samples=2", "--max_new_tokens=5")
    assert (code, err) == (0, "")
    assert set(said) <= set(characters) | set("-\n")


def test_a_file_that_is_cut_while_it_is_read(data: Path) -> None:
    """Reading the rest of its map would end the process by SIGBUS."""
    tokens = Tokens.open(Data(data_dir=str(data)), 16, seed=1)
    tokens.rows("train", 0, 100)
    _cut(data, 1 << 12)
    with pytest.raises(UserError, match=r"train.bin became shorter while it was in use: prepare the data set again"):
        tokens.rows("train", 0, 100)
