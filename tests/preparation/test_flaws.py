"""Unusable documents are named by file and line, or counted."""

from __future__ import annotations

import gzip
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import pytest
from conftest import IS_ROOT, POSIX, python
from corpora import DOCS, GOOD, WORK, each, expected, ids, lines, pa, pq, table, zstandard

from folio.preparation import compressed, sources
from folio.preparation import documents as reading
from folio.preparation.documents import Flaw, documents, place
from folio.preparation.finding import find
from folio.preparation.text_files import Files
from folio.preparation.workers import Tokenize

corpus = corpora.corpus


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


# name → content, what follows the file's name in the error, the reason, its good documents
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
def test_an_unusable_document(folio, corpus, tok, tmp_path, name) -> None:
    """It is an error of one line with the place, and nothing is written; or it is skipped and counted."""
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
    assert f"; documents that could not be used: 1 (1 with {reason}" in out
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
def test_a_record_without_the_text(folio, corpus, tmp_path, case) -> None:
    """The error says what the record has instead. Skipped ones are counted as one kind."""
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
    """The error gives the command that converts it to UTF-8."""
    (corpus / name).write_bytes(f"\ufeff{UTF16[name]}".encode(encoding))
    code, _, err = folio("prepare", corpus / name, "--tokenizer=bytes", f"--data_dir={tmp_path / 'out'}")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{name}:1: not UTF-8 but UTF-16: iconv -f UTF-16 -t UTF-8" in err


def test_json_lines_with_marks_and_other_line_ends(folio, corpus, tok, tmp_path) -> None:
    """Any line may begin with a byte order mark, since files are concatenated. Texts in JSON keep their line ends."""
    mark = "\ufeff".encode()
    (corpus / "a.jsonl").write_bytes(mark + lines(DOCS[:3], end="\r\n") + mark + lines(DOCS[3:]))
    out = tmp_path / "out"
    assert folio("prepare", corpus, f"--tokenizer={tok}", f"--data_dir={out}", "--val_documents=1").code == 0
    assert ids(out, "val") + ids(out) == expected(tok, DOCS)


@pytest.mark.parametrize("block", [7, 1000, 2**22])
@pytest.mark.parametrize("end", JSONL)
def test_a_line_that_is_too_long(corpus, monkeypatch, end, block) -> None:
    """It is a flaw like any other, whatever the block size. A line of exactly the limit is a document."""
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
    """A small file that unpacks to a line of a gigabyte is refused in bounded memory and time."""
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


def test_a_text_without_a_place_to_cut_is_searched_in_linear_time(corpus, monkeypatch) -> None:
    """And its blocks are as large as others."""
    monkeypatch.setattr(sources, "BLOCK", 4000)
    monkeypatch.setattr(reading, "_SEARCHED", 1000)
    (corpus / "a.txt").write_text("渡" * 10**6)
    begun = time.process_time()
    blocks = list(Files(*find([str(corpus)])).blocks())
    assert 700 <= len(blocks) <= 800
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
    """The error names it, whether it vanished before its first block or later."""
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


@POSIX
@pytest.mark.skipif(IS_ROOT, reason="root reads everything")
def test_a_file_without_permission(folio, corpus) -> None:
    (corpus / "a.txt").write_text("a b")
    (corpus / "a.txt").chmod(0)
    code, _, err = folio("prepare", corpus, "--tokenizer=bytes", f"--data_dir={corpus.parent / 'out'}")
    assert (code, err.count("\n")) == (2, 1)
    assert "a.txt: Permission denied" in err
