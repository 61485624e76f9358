"""Each kind of source gives its documents, whatever the block size and the number of parts."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import corpora
import pytest
from conftest import STORY
from corpora import DOCS, WORK, each, expected, ids, lines, table, zstandard

from folio.preparation import sources, text_files
from folio.preparation.documents import documents
from folio.preparation.finding import find
from folio.preparation.hub import Hub
from folio.preparation.sources import Block, Source, Texts
from folio.preparation.text_files import Files
from folio.preparation.workers import Tokenize

corpus = corpora.corpus
offline = corpora.offline


AS_TEXT = [io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8").read() for text in DOCS]  # of a text file


def packed(pack: Callable[[bytes], bytes], raw: bytes, step: int = 700) -> bytes:
    """Members or frames that end at any byte."""
    return b"".join(pack(raw[i : i + step]) for i in range(0, len(raw), step))


def threes(folder: Path) -> None:
    for i in range(0, len(DOCS), 3):
        (folder / f"{i:02}.jsonl").write_bytes(lines(DOCS[i : i + 3]))


def mixture(folder: Path) -> None:
    (folder / "0.txt").write_bytes(DOCS[0].encode())
    (folder / "1.jsonl.zst").write_bytes(zstandard.compress(lines(DOCS[1:3])))
    (folder / "2").mkdir()
    table(folder / "2" / "a.parquet", DOCS[3:5], 1)
    (folder / "2" / "b.md").write_bytes(DOCS[5].encode())
    (folder / "3.jsonl").write_bytes(lines(DOCS[6:8]).rstrip())
    (folder / "4.jsonl.gz").write_bytes(gzip.compress(lines(DOCS[8:])))


KINDS: dict[str, Callable[[Path], Any]] = {
    "txt": each(".txt"),
    "md": each(".md"),
    "jsonl": lambda f: (f / "all.jsonl").write_bytes(lines(DOCS, ascii=False)),
    "jsonl, three a file": threes,
    "jsonl, blank lines and CRLF": lambda f: (f / "all.jsonl").write_bytes(b"\n" + lines(DOCS, end="\r\n\r\n \t\r\n")),
    "jsonl, no last line end": lambda f: (f / "all.jsonl").write_bytes(lines(DOCS).rstrip()),
    "gz": lambda f: (f / "all.jsonl.gz").write_bytes(gzip.compress(lines(DOCS))),
    "gz of members": lambda f: (f / "all.jsonl.gz").write_bytes(packed(gzip.compress, lines(DOCS))),
    "zst": lambda f: (f / "all.jsonl.zst").write_bytes(zstandard.compress(lines(DOCS).rstrip())),
    "zst of frames": lambda f: (f / "all.jsonl.zst").write_bytes(packed(zstandard.compress, lines(DOCS))),
    "parquet": lambda f: table(f / "all.parquet", DOCS, 100),
    "parquet of row groups": lambda f: table(f / "all.parquet", DOCS, 1),
    "mixture": mixture,
}


def read(blocks: Iterable[Block]) -> list[str]:
    """The documents of blocks, joined."""
    found: list[str] = []
    for block in blocks:
        for span in block.spans:
            for _, text in documents(span, WORK):
                assert isinstance(text, str), text
                found[-1:] = [*found[-1:], text] if not span.continues else [found[-1] + text]
    return found


def assert_cut_and_joined(source: Source, texts: list[str], parts: Sequence[int] = (2, 3, 7, 50)) -> None:
    """A source has these documents: read at once, resumed after any block, and in parts, also resumed."""
    whole = list(source.blocks())
    assert read(whole) == texts
    job = Tokenize(WORK)
    made = [job(block.spans) for block in whole]
    assert sum(len(m.lengths) - m.continues for m in made) == len(texts)  # as the writer counts them
    for n in range(0, len(whole), 1 + len(whole) // 15):
        again = source.blocks(json.loads(json.dumps(whole[n].after)))
        assert read([*whole[: n + 1], *again]) == texts, n
    for count in parts:
        shares = [list(source.blocks(None, (i, count))) for i in range(count)]
        assert read(block for share in shares for block in share) == texts, count
        for i, share in enumerate(shares):
            if share:
                rest = list(source.blocks(json.loads(json.dumps(share[0].after)), (i, count)))
                assert [b.spans for b in rest] == [b.spans for b in share[1:]], (i, count)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_librarys_ids(folio, corpus, tok, tmp_path, kind) -> None:
    KINDS[kind](corpus)
    out, texts = tmp_path / "out", AS_TEXT if kind in ("txt", "md") else DOCS
    code, _, err = folio("prepare", corpus, f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1")
    assert (code, err) == (0, "")
    assert ids(out, "val") == expected(tok, texts[:1])
    assert ids(out) == expected(tok, texts[1:])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["text_bytes"] == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("block", [7, 100, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_depend_on_the_blocks(corpus, monkeypatch, kind, block) -> None:
    KINDS[kind](corpus)
    monkeypatch.setattr(sources, "BLOCK", block)
    assert_cut_and_joined(Files(*find([str(corpus)])), AS_TEXT if kind in ("txt", "md") else DOCS)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\n\r\n", "\n\r", "\r\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
def test_a_text_is_read_as_by_python(corpus, monkeypatch, end, mark) -> None:
    """Wherever it is cut. No cut divides a line end; a byte order mark is text except at the beginning."""
    for n, words in enumerate((["渡し船"], ["a", "ship", "left."], ["a ship", "and\ufeff two", "渡し船は朝、出た。"])):
        text = mark + end.join(words * 30)
        (corpus / f"{n}.txt").write_bytes(text.encode())
    expected = [path.read_text(encoding="utf-8-sig") for path in sorted(corpus.iterdir())]
    for block in range(1, 40):
        monkeypatch.setattr(sources, "BLOCK", block)
        assert read(Files(*find([str(corpus)])).blocks()) == expected
        for n, text in enumerate(expected):
            one = Files(*find([str(corpus / f"{n}.txt")]), val_fraction=block / 40)
            assert "".join(read(one.blocks())) == text, (block, n)


def test_large_row_groups_are_read_in_pieces(corpus, monkeypatch) -> None:
    many = [f"{i} {'x' * (i % 50)}" for i in range(1000)]
    table(corpus / "all.parquet", many, 700)
    monkeypatch.setattr(text_files, "_HELD_ROW_GROUP", 0)
    source = Files(*find([str(corpus)]))
    assert max(len(list(documents(span, WORK))) for b in source.blocks() for span in b.spans) < 700
    assert_cut_and_joined(source, many)


@pytest.mark.parametrize(
    "text", [STORY.read_text(encoding="utf-8"), "渡し船は朝に出た。\n\n" * 300], ids=["words", "kana"]
)
@pytest.mark.parametrize("block", [7, 100, 1000, 10**6])
def test_one_text_is_cut_for_validation(corpus, monkeypatch, block, text) -> None:
    raw = text.encode()
    (corpus / "story.txt").write_bytes(raw)
    monkeypatch.setattr(sources, "BLOCK", block)
    source = Files(*find([str(corpus)]), val_fraction=0.25)
    for parts in (1, 3, 8):
        blocks = [b for i in range(parts) for b in source.blocks(None, (i, parts))]
        train, val = (read(b for b in blocks if b.split == split) for split in ("train", "val"))
        assert (len(train), len(val)) == (1, 1)
        assert (train[0] + val[0]).encode() == raw
        assert len(val[0].encode()) / len(raw) == pytest.approx(0.25, abs=0.01)


def test_texts_in_memory() -> None:
    assert_cut_and_joined(Texts({}, {"train": DOCS[:4], "val": DOCS[4:]}), DOCS)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_the_datasets_library(corpus, offline, kind, streaming) -> None:
    many = [f"{i} {'x' * (i % 50)}" for i in range(2000)]
    for i in range(4):
        some = many[500 * i : 500 * i + 500]
        table(corpus / f"{i}.parquet", some, 130) if kind == "parquet" else None
        (corpus / f"{i}.jsonl").write_bytes(lines(some)) if kind == "jsonl" else None
    parts = (2, 3) if streaming else (2, 7)
    assert_cut_and_joined(Hub(str(corpus), streaming=streaming), many, parts)
    if streaming:
        with pytest.raises(ValueError, match="4 files: --shard_of"):
            list(Hub(str(corpus), streaming=True).blocks(None, (0, 5)))
