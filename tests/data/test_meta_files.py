"""What meta.json and meta.pkl state."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import written
from conftest import SMALL, Outcome, assert_refused
from written import IDS, PAIR, lay

from folio.data.folders import open_folder
from folio.data.tokenizers import IDS_ONLY

shards = written.shards


ITOS = dict(enumerate("abc"))
SIZES: dict[str, tuple[Any, int, str | None]] = {
    "characters": ({"vocab_size": 3, "itos": ITOS}, 3, "abc"),
    "a list": ({"vocab_size": 3, "itos": ["a", "b", "c"]}, 3, "abc"),
    "numpy": ({"vocab_size": np.int64(3), "itos": {np.int32(i): np.str_(c) for i, c in ITOS.items()}}, 3, "abc"),
    "arrays": ({"vocab_size": np.array([3]), "itos": np.array(["a", "b", "c"])}, 3, "abc"),
    "a whole float": ({"vocab_size": 3.0, "source": Path("input.txt"), "seen": {1, 2}}, 3, None),
    "the size alone": ({"vocab_size": 3}, 3, None),
    "words": ({"vocab_size": 3, "itos": {0: "the", 1: "cat", 2: "."}}, 3, None),
    "a word among characters": ({"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "[PAD]"}}, 3, None),
    "too few": ({"vocab_size": 3, "itos": {0: "a"}}, 3, None),
    "two alike": ({"vocab_size": 3, "itos": dict(enumerate("aba"))}, 3, None),
    "half a pair": ({"vocab_size": 3, "itos": dict(enumerate("ab\ud800"))}, 3, None),
    "keys of text": ({"vocab_size": 3, "itos": {"0": "a", "1": "b", "2": "c"}}, 3, None),
    "merges": ({"vocab_size": 3, "merges": {(97, 98): 256}}, 3, None),
}


@pytest.mark.parametrize("protocol", [0, 4, 5])
@pytest.mark.parametrize("case", SIZES)
def test_what_meta_pkl_says(tmp_path: Path, case: str, protocol: int) -> None:
    """The number of ids, and the characters if each id has one."""
    value, size, found = SIZES[case]
    try:
        content = pickle.dumps(value, protocol)
    except UnicodeEncodeError:
        content = pickle.dumps(value, 0)
    lay(tmp_path, PAIR, IDS % 3)
    (tmp_path / "meta.pkl").write_bytes(content)
    folder = open_folder(tmp_path)
    assert folder.vocab_size == size
    assert folder.tokenizer == ({"kind": "characters", "characters": found} if found else IDS_ONLY)
    assert ("not what they mean" in folder.note) == (found is None)


def test_a_run_on_ids_alone(folio: Callable[..., Outcome], tmp_path: Path) -> None:
    """Training and evaluation work. Sampling is refused in one line, with the reason."""
    lay(tmp_path, PAIR, IDS % 3)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": np.int64(3)}))
    out = f"--out_dir={tmp_path / 'out'}"
    code, said, err = folio("train", *SMALL, "--max_iters=2", f"--data_dir={tmp_path}", out)
    assert (code, err) == (0, "")
    assert "found vocab_size = 3" in said
    assert "meta.pkl says how many token ids there are, but not what they mean" in said
    assert_refused(folio("sample", out, "--device=cpu"), "nothing says what")
    refused = folio("train", *SMALL, "--sample_interval=1", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'two'}")
    assert_refused(refused, "nothing says what")
    code, said, err = folio("eval", out, "--eval_iters=1", "--device=cpu")
    assert (code, err) == (0, "")
    assert "nats per token" in said
    assert "tokenizer   unknown" in folio("data", "info", tmp_path).out


META: dict[str, tuple[Any, str]] = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep below a key": ('{"made": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "infinite": ({"text_bytes": "1e999"}, "1e999 is not a finite number"),
    "many ids": ({"vocab_size": "1e12"}, "vocab_size=1,000,000,000,000 is not a whole number from 1 to 65,536"),
    "half an id": ({"vocab_size": "64.5"}, "vocab_size"),
    "truth": ({"vocab_size": "true"}, "vocab_size=bool"),
    "a huge number": ({"vocab_size": "9" * 4000}, "vocab_size=int"),
    "dtype a list": ({"dtype": '["uint16"]'}, "dtype"),
    "dtype of objects": ({"dtype": '"O"'}, "dtype"),
    "eot a dict": ({"eot": "{}"}, "eot"),
    "documents text": ({"text_bytes": '"many"'}, "text_bytes=str"),
    "skipped a list": ({"skipped": "[1, 2]"}, "meta.json"),
    "skipped text": ({"skipped": '{"too long": "a few"}'}, "skipped too long=str"),
}


@pytest.mark.parametrize("case", META)
def test_an_odd_meta_json(folio: Callable[..., Outcome], shards: Path, tmp_path: Path, case: str) -> None:
    """train and data info refuse it in one line."""
    folder = shutil.copytree(shards, tmp_path / "data")
    change, words = META[case]
    path = folder / "meta.json"
    if isinstance(change, dict):
        ((key, value),) = change.items()
        meta = json.loads(path.read_text())
        del meta["sha256"]
        change = json.dumps(meta | {key: "HERE"}).replace('"HERE"', value)
    path.write_text(change)
    for argv in (("data", "info", folder), ("train", *SMALL, f"--data_dir={folder}", f"--out_dir={tmp_path / 'out'}")):
        assert_refused(folio(*argv), path, words)
    assert not (tmp_path / "out").exists()
