"""Documents from any file: the same whatever holds them and however they are cut, or refused by file and line."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, STORY, python

from folio.preparation import compressed, sources, text_files
from folio.preparation import documents as reading
from folio.preparation.documents import Flaw, Work, documents, place
from folio.preparation.finding import find
from folio.preparation.hub import Hub
from folio.preparation.sources import Block, Source, Texts
from folio.preparation.text_files import Files
from folio.preparation.workers import Tokenize

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
AS_TEXT = [io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8").read() for text in DOCS]  # of a text file
WORK = Work({"kind": "bytes"}, "none")


def lines(texts: Iterable[str], key: str = "text", end: str = "\n", ascii: bool = True) -> bytes:
    """JSON lines."""
    return "".join(json.dumps({"id": 7, key: t}, ensure_ascii=ascii) + end for t in texts).encode()


def table(path: Path, texts: Sequence[Any], group: int, key: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), key: texts}), path, row_group_size=group)


def packed(pack: Callable[[bytes], bytes], raw: bytes, step: int = 700) -> bytes:
    """Members or frames that end wherever it may be."""
    return b"".join(pack(raw[i : i + step]) for i in range(0, len(raw), step))


def each(end: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for i, text in enumerate(DOCS):
            (folder / f"{i:02}{end}").write_bytes(text.encode())

    return write


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


@pytest.fixture(scope="session")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with an end of text, made by the library alone."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([STORY.read_text(encoding="utf-8")], trainer)
    path = tmp_path_factory.mktemp("tok") / "tok.json"
    fast.save(str(path))
    return path


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


def read(blocks: Iterable[Block]) -> list[str]:
    """The documents of blocks, put together again."""
    found: list[str] = []
    for block in blocks:
        for span in block.spans:
            for _, text in documents(span, WORK):
                assert isinstance(text, str), text
                found[-1:] = [*found[-1:], text] if not span.continues else [found[-1] + text]
    return found


def assert_cut_and_joined(source: Source, texts: list[str], parts: Sequence[int] = (2, 3, 7, 50)) -> None:
    """Whole, begun again after any block, and in parts that are begun again, a source has these documents."""
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
def test_a_text_is_read_as_python_reads_it(corpus, monkeypatch, end, mark) -> None:
    """However it is cut: a line end is never torn, and a byte order mark is text but at the beginning."""
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


def test_texts_in_hand() -> None:
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


# Names

NAMED: dict[str, list[str]] = {
    "c": ["c/a.txt", "c/b/1.jsonl", "c/b/2.md", "c/c.parquet"],
    "c/*.txt": ["c/a.txt"],
    "c/**/*.md c/a.txt": ["c/b/2.md", "c/a.txt"],
    "c/c.parquet c/b": ["c/c.parquet", "c/b/1.jsonl", "c/b/2.md"],
    "c/a.txt c c/../c/a.txt link.txt": ["c/a.txt", "c/b/1.jsonl", "c/b/2.md", "c/c.parquet"],
    "c/.hidden.txt": ["c/.hidden.txt"],
}


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/1.jsonl", "b/2.md", "c.parquet", "notes.pdf", "b/run.log", ".hidden.txt", ".git/x.txt"):
        path = Path("c", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    Path("link.txt").symlink_to("c/a.txt")
    Path("empty").mkdir()
    Path("odd").mkdir()
    for end in ("csv", "tsv", "txt.gz", "json"):
        Path(f"odd/a.{end}").write_text("text")
    os.mkfifo("pipe.txt")
    Path("only").mkdir()
    os.mkfifo("only/pipe.txt")
    Path("zero.jsonl").symlink_to("/dev/zero")
    Path("gone.txt").symlink_to("nowhere.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.txt")


@pytest.mark.parametrize("names", NAMED)
def test_folders_globs_and_files(named, capsys, names) -> None:
    """In the order in which they were named, then of their names; each once, and hidden ones only by name."""
    paths, _ = find(names.split())
    assert [p.relative_to(Path.cwd()).as_posix() for p in paths] == NAMED[names]
    said = capsys.readouterr().out
    assert ("c: other files, left out: 2 (1 .log, 1 .pdf)\n" in said) == ("c" in names.split())


def test_folders_behind_links(named, capsys) -> None:
    """Each is read once, under the name of its own place if it has one below; no loop and no parent is followed."""
    Path("far/deep").mkdir(parents=True)
    Path("far/far.txt").write_text("far")
    Path("far/deep/deep.md").write_text("deep")
    Path("c/1-inside").symlink_to("b")
    Path("c/2-far").symlink_to(Path("far").resolve())
    Path("c/3-deep").symlink_to("../far/deep")
    Path("c/loop").symlink_to(".")
    Path("c/up").symlink_to("..")
    Path("far/back").symlink_to("../c")
    Path("c/endless").symlink_to("endless")
    paths, names = find(["c"])
    assert names == ("2-far/deep/deep.md", "2-far/far.txt", "a.txt", "b/1.jsonl", "b/2.md", "c.parquet")
    assert [p.read_text() for p in paths[:2]] == ["deep", "far"]
    assert "left out: 3 (1 .log, 1 .pdf, 1 broken link)" in capsys.readouterr().out
    Path("to-c").symlink_to("c")
    assert find(["to-c"])[0] == find(["c"])[0]


def test_what_is_left_out_of_a_folder_is_told(named, capsys) -> None:
    for name in ("x.csv", "y.CSV", "z.txt.gz", "README", "a.json"):
        Path("c", name).write_text("x")
    Path("c/gone.txt").symlink_to("nowhere.txt")
    Path("c/zero.txt").symlink_to("/dev/zero")
    os.mkfifo("c/pipe.txt")
    find(["c"])
    told = capsys.readouterr().out
    assert told.startswith("c: other files, left out: 10 (2 pipe, socket or device, ")
    for kind in ("1 .csv", "1 .CSV", "1 .txt.gz", "1 .json", "1 broken link"):
        assert kind in told


SPELT = ["A.TXT", "b.Md", "c.JSONL", "d.ndjson", "e.NDJSON.GZ", "f.ndjson.zst", "g.json.gz", "h.Json.Zst", "i.PARQUET"]


def test_names_in_capitals_and_other_names_of_json_lines(folio, corpus, tok, tmp_path) -> None:
    texts = [f"This is the text of {name}." for name in SPELT]
    for name, text in zip(SPELT, texts, strict=True):
        end = name.lower()
        if end.endswith(".parquet"):
            table(corpus / name, [text], 1)
            continue
        raw = text.encode() if end.endswith((".txt", ".md")) else lines([text])
        pack = {"gz": gzip.compress, "st": zstandard.compress}.get(end[-2:], bytes)
        (corpus / name).write_bytes(pack(raw))
    out = tmp_path / "out"
    assert folio("prepare", corpus, f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1").code == 0
    assert ids(out, "val") + ids(out) == expected(tok, texts)


def test_names_that_are_not_utf8(folio, tok, tmp_path, monkeypatch) -> None:
    """Of the folder and of its files, in Latin-1: prepared like any other; a flaw in one is a line."""
    monkeypatch.chdir(tmp_path)
    folder = Path(os.fsdecode(b"caf\xe9"))
    folder.mkdir()
    for n, text in enumerate(GOOD):
        (folder / os.fsdecode(b"%d-\xe9.txt" % n)).write_text(text)
    (folder / os.fsdecode(b"\xe9.pdf")).write_text("")
    code, out, err = folio("prepare", folder, f"--tokenizer={tok}", "--val_documents=1")
    assert (code, err) == (0, "")
    assert "caf\\udce9: other files, left out: 1 (1 .pdf)" in out
    assert ids(Path("data/caf"), "val") + ids(Path("data/caf")) == expected(tok, GOOD)
    (folder / os.fsdecode(b"x-\xe9.jsonl")).write_bytes(b"{")
    code, _, err = folio("prepare", folder, f"--tokenizer={tok}", "--data_dir=out", "--workers=2")
    assert (code, err.count("\n")) == (2, 1), err
    assert ".jsonl:1: not JSON" in err
    assert not Path("out").exists()
    code, _, err = folio("tokenizer", "train", folder, "--vocab_size=300", "--out=t.json", "--on_error=skip")
    assert (code, err) == (0, "")


NOT_THERE = {
    "c/notes.pdf": ["c/notes.pdf", ".jsonl.zst", ".parquet"],
    "odd/a.csv": ["odd/a.csv", "pandas.read_csv", "to_json"],
    "odd/a.tsv": ["odd/a.tsv", "sep='\\t'"],
    "odd/a.txt.gz": ["odd/a.txt.gz", "unpack it"],
    "odd/a.json": ["odd/a.json", "jq"],
    "odd": ["none of its 4 files (1 .csv, 1 .json, 1 .tsv, 1 .txt.gz) is", "pandas"],
    "odd/*.gz": ["none of its 1 files (1 .txt.gz) is", "unpack it"],
    "only": ["none of its 1 files (1 pipe, socket or device) is", ".txt"],
    "pipe.txt": ["pipe.txt is a pipe"],
    "zero.jsonl": ["zero.jsonl is a device"],
    "socket.txt": ["socket.txt is a socket"],
    "gone.txt": ["gone.txt: no such file"],
    "empty": ["empty", ".txt"],
    "c/*.md": ["c/*.md", "no such file"],
    "c/b/*.log": ["c/b/*.log", ".txt"],
    "no/such.txt": ["no/such.txt", "no such file"],
    "./nothing": ["./nothing", "no such file"],
    "hf:nobody/nothing": ["hf:nobody/nothing"],
    "hf:c/b": ["c/b", "parquet or JSON lines"],
}


@pytest.mark.parametrize("source", NOT_THERE)
def test_a_source_that_is_not_there(named, offline, folio, source) -> None:
    code, _, err = folio("prepare", source, "--tokenizer=bytes", "--data_dir=out")
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in NOT_THERE[source]), err
    assert not Path("out").exists()


# Flaws

GOOD = ["First of all.", "Two – 渡し船.\nWith two lines.", "three " * 50]
A, B, C = (lines([text]) for text in GOOD)
WRONG_LINES = {
    "not UTF-8": b'{"text": "a\xffb"}\n',
    "an empty document": lines([""]),
    "no text under the key 'text'": lines(["x"], key="content"),
    "no text under the key 'text' (null)": b'{"text": null}\n',
    "no text under the key 'text' (number)": b'{"text": 3.5}\n',
    "no text under the key 'text' (list)": b'["text"]\n',
    "not JSON": b'{"text": "a\n',
    "not JSON (deep)": b"[" * 100_000 + b"\n",
    "half of a surrogate pair": b'{"text": "a \\ud800 b"}\n',
}
JSONL = {".jsonl": lambda raw: raw, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def parquet(texts: Sequence[Any], key: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({key: texts}), sink, row_group_size=1)
    return sink.getvalue().to_pybytes()


# name → content, what stands after the file's name, the reason, good documents in it
FLAWS: dict[str, tuple[bytes, str, str, list[str]]] = {
    **{
        f"{reason}{end}": (pack(A + b"\r\n" + wrong + B), ":3: ", reason.split(" (")[0], GOOD[:2])
        for reason, wrong in WRONG_LINES.items()
        for end, pack in JSONL.items()
    },
    "cut short.jsonl.gz": (gzip.compress(A + B)[:-9], ":1: ", "corrupt gzip", []),
    "cut short.jsonl.zst": (zstandard.compress(A + B)[:-3], ":1: ", "corrupt zstandard", []),
    "between frames.jsonl.zst": (
        zstandard.compress(A) + zstandard.compress(B)[:9],
        ":2: ",
        "corrupt zstandard",
        GOOD[:1],
    ),
    "no gzip.jsonl.gz": (A + B, ":1: ", "corrupt gzip", []),
    "no zst.jsonl.zst": (A + B, ":1: ", "corrupt zstandard", []),
    "empty.txt": (b"", ":1: ", "an empty document", []),
    "empty.md": (b"", ":1: ", "an empty document", []),
    "latin.txt": ("one\ntwo\ncafé".encode("latin-1"), ":3: ", "not UTF-8", []),
    "latin.md": ("café".encode("latin-1"), ":1: ", "not UTF-8", []),
    "null.parquet": (parquet([GOOD[0], None]), ": row 1: ", "no text under the key 'text'", GOOD[:1]),
    "empty.parquet": (parquet([GOOD[0], "", GOOD[1]]), ": row 1: ", "an empty document", GOOD[:2]),
    "numbers.parquet": (parquet([1]), ": row 0: ", "no text under the key 'text'", []),
    "bytes.parquet": (parquet([b"a"]), ": row 0: ", "no text under the key 'text'", []),
    "column.parquet": (parquet(GOOD, "content"), ": ", "no column 'text': it has content", []),
    "garbage.parquet": (b"PAR1 and no more than that", ": ", "unreadable parquet", []),
    "cut short.parquet": (parquet(GOOD)[:-20], ": ", "unreadable parquet", []),
    "nothing.parquet": (b"", ": ", "unreadable parquet", []),
}


@pytest.mark.parametrize("name", FLAWS)
def test_a_document_that_cannot_be_taken(folio, corpus, tok, tmp_path, name) -> None:
    """Is one line that says where, and leaves nothing behind; or is left out and counted, and the rest is the same."""
    content, where, reason, good = FLAWS[name]
    flawed = corpus / re.sub(r"[^\w.]", "", name)
    flawed.write_bytes(content)
    (corpus / "~.jsonl").write_bytes(A + B + C)
    argv = ["prepare", corpus, f"--tokenizer={tok}", f"--data_dir={tmp_path / 'out'}", "--val_documents=1"]
    code, _, err = folio(*argv)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{flawed}{where}" in err
    assert reason in err
    assert "--on_error=skip" in err
    assert not (tmp_path / "out").exists()

    code, out, err = folio(*argv, "--on_error=skip")
    assert (code, err) == (0, "")
    skipped = json.loads((tmp_path / "out" / "meta.json").read_text())["skipped"]
    assert sum(skipped.values()) == 1
    assert next(iter(skipped)).startswith(reason)
    assert f"; documents that could not be taken: 1 (1 with {reason}" in out
    assert ids(tmp_path / "out", "val") + ids(tmp_path / "out") == expected(tok, [*good, *GOOD])


MISSING: dict[str, tuple[Any, str]] = {
    "content": ({"content": "x", "id": 7}, ": its keys are 'content', 'id': --text_key names another"),
    "many keys": ({f"key {n}": n for n in range(99)}, "'key 7' …: --text_key names another"),
    "a huge key": ({"k" * 10**6: 1}, f"'{'k' * 40}': --text_key names another"),
    "an odd key": ({"\n\x1b[31m": 1}, "'\\n\\x1b[31m': --text_key names another"),
    "no key": ({}, "'text' (--on_error=skip"),
    "a list": (["text"], ": the line is not an object but a list"),
    "a text": ("text", ": the line is not an object but a text"),
    "a number": (3.5, ": the line is not an object but a number"),
    "null": ({"text": None}, " but null"),
    "true": ({"text": True}, " but true or false"),
    "an object": ({"text": {}}, " but an object"),
    "texts": ({"text": ["a", "b"]}, " but a list"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_text_that_is_not_where_it_is_looked_for(folio, corpus, tmp_path, case) -> None:
    """The line says what is there instead; left out, all are counted as one kind."""
    value, words = MISSING[case]
    (corpus / "a.jsonl").write_text(f"{json.dumps(value)}\n" * 3)
    argv = ("prepare", corpus, "--tokenizer=bytes", f"--data_dir={tmp_path / 'out'}")
    code, _, err = folio(*argv)
    assert (code, err.count("\n")) == (2, 1), err
    assert "a.jsonl:1: no text under the key 'text'" in err
    assert words in err
    assert len(err) < 1000
    assert "3 (3 with no text under the key 'text')" in folio(*argv, "--on_error=skip").err


UTF16 = {"a.txt": "some text", "a.md": "\n" * 9, "large.txt": "words " * 10**6, "a.jsonl": lines(GOOD).decode()}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", UTF16)
def test_utf16_is_named(folio, corpus, tmp_path, name, encoding) -> None:
    """As some editors and shells write it; with the way to UTF-8."""
    (corpus / name).write_bytes(f"\ufeff{UTF16[name]}".encode(encoding))
    code, _, err = folio("prepare", corpus / name, "--tokenizer=bytes", f"--data_dir={tmp_path / 'out'}")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{name}:1: not UTF-8 but UTF-16: iconv -f UTF-16 -t UTF-8" in err


def test_json_lines_with_marks_and_other_line_ends(folio, corpus, tok, tmp_path) -> None:
    """Each line may begin with a mark, as where files were put together; a text in JSON keeps its own line ends."""
    mark = "\ufeff".encode()
    (corpus / "a.jsonl").write_bytes(mark + lines(DOCS[:3], end="\r\n") + mark + lines(DOCS[3:]))
    out = tmp_path / "out"
    assert folio("prepare", corpus, f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1").code == 0
    assert ids(out, "val") + ids(out) == expected(tok, DOCS)


@pytest.mark.parametrize("block", [7, 1000, 2**22])
@pytest.mark.parametrize("end", JSONL)
def test_a_line_that_is_too_long(corpus, monkeypatch, end, block) -> None:
    """Is a flaw like any other, whatever the block; a line of just the length is a document."""
    for module in (compressed, reading):
        monkeypatch.setattr(module, "LONGEST_LINE", 3000)
    monkeypatch.setattr(sources, "BLOCK", block)
    long = "x" * (3000 - len(lines([""])) + 1)
    whole = lines([long])
    assert len(whole) == 3001  # with its end
    for rest in (b"\n" + A, b"\n", b""):
        (corpus / f"a{end}").write_bytes(JSONL[end](A + whole + b"\n" + b"y" * 9000 + rest))
        spans = [span for block in Files(*find([str(corpus)])).blocks() for span in block.spans]
        found = [(place(span, i), text) for span in spans for i, text in documents(span, WORK)]
        flaws = [(where, text) for where, text in found if isinstance(text, Flaw)]
        assert flaws == [(f"{corpus / 'a'}{end}:4", Flaw("a line of more than 3,000 bytes"))]
        assert [text for _, text in found if isinstance(text, str)] == [GOOD[0], long, *[GOOD[0]] * (len(rest) > 1)]


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31,) * 2); from folio import cli; cli.main()"


@pytest.mark.slow
@pytest.mark.parametrize("end", JSONL)
def test_bombs(corpus, tmp_path, end) -> None:
    """A gigabyte of one line in a small file: one line, within bounded memory and time."""
    path = corpus / f"a{end}"
    if end == ".jsonl":
        path.touch()
        os.truncate(path, 2**30)
    else:
        path.write_bytes(JSONL[end](bytes(2**27)) * 8)
    argv = ["prepare", path, "--tokenizer=bytes", f"--data_dir={tmp_path / 'out'}", "--workers=1"]
    done = python("-c", LIMITED, *argv, "--on_error=skip", OPENBLAS_NUM_THREADS="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-3000:]
    assert "a line of more than 134,217,728 bytes" in done.stderr


def test_a_text_without_a_place_to_cut_is_searched_once(corpus, monkeypatch) -> None:
    """However many blocks it has."""
    monkeypatch.setattr(sources, "BLOCK", 10)
    (corpus / "a.txt").write_text("渡" * 10**6)
    begun = time.process_time()
    assert len(list(Files(*find([str(corpus)])).blocks())) == 1
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("block", [7, 100, 1000, 2**22])
@pytest.mark.parametrize("end", [*JSONL, ".txt", ".parquet"])
def test_errors_name_the_line_whatever_the_block(corpus, monkeypatch, end, block) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    good = [lines(["渡" * (n % 90)]) if n % 5 else b"\r\n" for n in range(1, 60)]
    for n in (0, 1, 29, 30, 59):
        path = corpus / f"it{end}"
        if end == ".parquet":
            table(path, [*["x"] * n, None, *["x"] * (59 - n)], 7)
        else:
            raw = b"".join([*good[:n], b'"\xff"\n', *good[n:]])
            path.write_bytes(JSONL.get(end, bytes)(raw))
        source = Files(*find([str(path)]), val_fraction=0.1)
        place = f"{path}: row {n}: " if end == ".parquet" else f"{path}:{n + 1}: "
        job = Tokenize(WORK)
        with pytest.raises(ValueError, match=re.escape(place)):
            [job(block.spans) for block in source.blocks()]


def test_a_file_that_vanishes(corpus, monkeypatch) -> None:
    """Before it is read or while its blocks wait: an error that names it."""
    each(".txt")(corpus)
    monkeypatch.setattr(sources, "BLOCK", 1000)
    source = Files(*find([str(corpus)]))
    blocks = source.blocks()
    first = next(blocks)
    for path in source.paths:
        path.unlink()
    for read_on in (lambda: Tokenize(WORK)(first.spans), lambda: list(blocks), source.describe):
        with pytest.raises(OSError, match="No such file") as error:
            read_on()
        assert Path(str(error.value.filename)).parent == corpus


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(folio, corpus) -> None:
    (corpus / "a.txt").write_text("a b")
    (corpus / "a.txt").chmod(0)
    code, _, err = folio("prepare", corpus, "--tokenizer=bytes", f"--data_dir={corpus.parent / 'out'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "a.txt: Permission denied" in err


# Workers


def test_many_ids_are_uint32(folio, corpus, tmp_path) -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "words.json"))
    for n, text in enumerate(("w1 w2", "w65535 w65536 w69999", "w3 unheard")):
        (corpus / f"{n}.txt").write_text(text)
    out = tmp_path / "out"
    argv = (corpus, f"--tokenizer={tmp_path / 'words.json'}", f"--data_dir={out}", "--val_documents=1")
    assert folio("prepare", *argv).code == 0
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["eot"]) == ("uint32", 70_000, "none")
    assert ids(out, "train", np.uint32) == [65535, 65536, 69999, 3, 0]


def session(leader: int) -> dict[int, str]:
    """The processes that live in a session, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            *_, stat = (path / "stat").read_text().rpartition(")")
            if int(stat.split()[3]) == leader and stat.split()[0] != "Z":
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_worker_that_is_killed(corpus, tok, tmp_path) -> None:
    """One line and no orphans; the next run ends with the ids of one that nothing happened to."""
    texts = [DOCS[4] * 400, *[DOCS[4] * 80] * 40, "end"]  # the first is cut, the others are not
    for n, text in enumerate(texts):
        (corpus / f"{n:02}.txt").write_bytes(text.encode())
    out = tmp_path / "out"
    small_blocks = "from folio import cli; from folio.preparation import sources; sources.BLOCK = 2**18; cli.main()"
    argv = ["prepare", str(corpus), f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1", "--workers=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", small_blocks, *argv]
    run = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers: list[int] = []
    end = time.monotonic() + 60
    while not (workers and (out / ".preparing" / "state.json").exists()):
        assert run.poll() is None, "it ended before it could be harmed"
        assert time.monotonic() < end
        time.sleep(0.02)
        workers = [pid for pid, command in session(run.pid).items() if "spawn_main" in command]
    os.kill(workers[0], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert (run.returncode, err.count("\n")) == (2, 1), err
    assert "a worker process was killed" in err
    end = time.monotonic() + 5
    while session(run.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert session(run.pid) == {}
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (0, "")
    assert "going on after" in again.stdout
    cache = {text: expected(tok, [text]) for text in set(texts)}
    assert ids(out, "val") == cache[texts[0]]
    assert ids(out) == [i for text in texts[1:] for i in cache[text]]
