"""The texts of a program: a list, or an iterable that is read once, as a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import python, tree

import folio
from folio.preparation import sources

DOCS = [f"document {i}, which says {i * i}" for i in range(60)]
HOW: dict[str, Any] = {"name": "mine", "tokenizer": "bytes", "val_documents": 6}
HERE = Path("data/mine")


def ids(split: str) -> list[int]:
    return np.fromfile(HERE / f"{split}.bin", np.uint16).tolist()


def of(docs: list[str]) -> list[int]:
    return [byte for text in docs for byte in text.encode()]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("block", [40, sources.BLOCK])
def test_each_text_is_a_document(monkeypatch: pytest.MonkeyPatch, once: bool, block: int) -> None:
    """In order, whatever the size of a block, with one process and several."""
    monkeypatch.setattr(sources, "BLOCK", block)
    assert folio.prepare(texts=iter(DOCS) if once else DOCS, workers=2, **HOW) == HERE
    assert (ids("val"), ids("train")) == (of(DOCS[:6]), of(DOCS[6:]))
    assert json.loads((HERE / "meta.json").read_text())["splits"]["train"]["documents"] == 54


def test_a_list_that_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    """The same texts: nothing to do. Others are refused, and replace it if asked."""
    folio.prepare(texts=DOCS, **HOW)
    before = tree(HERE)
    folio.prepare(texts=tuple(DOCS), **HOW)
    assert "nothing to do" in capsys.readouterr().out
    for others in (DOCS[1:], ["".join(DOCS[:2]), *DOCS[2:]]):
        with pytest.raises(ValueError, match="was made with other settings"):
            folio.prepare(texts=others, **HOW)
    assert tree(HERE) == before
    folio.prepare(texts=DOCS[1:], overwrite=True, **HOW)
    assert ids("val") == of(DOCS[1:7])


def test_an_iterable_never_counts_as_finished() -> None:
    """Whether it has the same texts cannot be known."""
    folio.prepare(texts=iter(DOCS), **HOW)
    before = tree(HERE)
    with pytest.raises(ValueError, match="is a data set already, and an iterable cannot be compared with it"):
        folio.prepare(texts=iter(DOCS[1:]), **HOW)
    assert tree(HERE) == before
    folio.prepare(texts=iter(DOCS[1:]), overwrite=True, **HOW)
    assert ids("val") == of(DOCS[1:7])


def test_an_iterable_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error arrives, nothing is left, and the next call begins again."""
    monkeypatch.setattr(sources, "BLOCK", 40)
    monkeypatch.setattr("folio.preparation.job.COMMIT_EVERY", 0.0)

    def broken() -> Iterator[str]:
        yield from DOCS
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        folio.prepare(texts=broken(), **HOW)
    assert not HERE.exists()
    folio.prepare(texts=iter(DOCS[1:]), **HOW)
    assert ids("val") == of(DOCS[1:7])


def test_a_stream_is_read_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded number of texts is ahead of those that are written."""
    monkeypatch.setattr(sources, "BLOCK", 100)
    given = sources.Given(read := Counting())
    blocks = given.blocks()
    ahead = [read.count - next(blocks).after for _ in range(200)]
    assert max(ahead) <= 4 * 10
    assert given.size is None


class Counting(Iterator[str]):
    count = 0

    def __next__(self) -> str:
        self.count += 1
        return "ten bytes."


@pytest.mark.parametrize(
    ("texts", "more", "words"),
    [
        (["a", 3], {}, "texts: item 1 is of type int: each must be a str"),
        (iter(["a", "b", None]), {}, "texts: item 2 is of type NoneType"),
        ("one text", {}, "texts is of type str: must be a list of documents"),
        (5, {}, "texts is of type int"),
        ({"a": "text"}, {}, "texts is of type dict"),
        ([], {}, "no document is left for train, of 0 in all"),
        (DOCS, {"name": ""}, "texts have no name"),
        (DOCS, {"shard_of": "0/2"}, "shard_of is for files"),
        (iter(DOCS), {"tokenizer": "char"}, "tokenizer=char reads the texts twice, and an iterable only once"),
    ],
)
def test_what_is_wrong_is_one_line(texts: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        folio.prepare(texts=texts, **{**HOW, "val_documents": 0, **more})
    assert "\n" not in str(raised.value)
    assert not HERE.exists()


def test_files_and_texts_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"texts and a\.txt exclude each other"):
        folio.prepare("a.txt", texts=DOCS, **HOW)


@pytest.mark.slow
def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Its worker processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import folio\nprint('once')\n"
        "folio.prepare(texts=('x' * 1000 for _ in range(15000)), name='x', tokenizer='bytes', workers=2)\n"
    )
    done = python(script, cwd=tmp_path)
    assert (done.returncode, done.stdout.count("once")) == (0, 1), done.stderr
