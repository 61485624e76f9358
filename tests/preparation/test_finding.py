"""Names, folders and globs of a user → files."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import corpora
import pytest
from conftest import make_pipe
from corpora import GOOD, expected, ids, lines, table, zstandard

from folio.preparation.finding import find

corpus = corpora.corpus
offline = corpora.offline


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
    make_pipe("pipe.txt")
    Path("only").mkdir()
    make_pipe("only/pipe.txt")
    Path("zero.jsonl").symlink_to("/dev/zero")
    Path("gone.txt").symlink_to("nowhere.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.txt")


@pytest.mark.parametrize("names", NAMED)
def test_folders_globs_and_files(named, capsys, names) -> None:
    """In the order of the arguments, then by name. Each file once; hidden files only if they are named."""
    paths, _ = find(names.split())
    assert [p.relative_to(Path.cwd()).as_posix() for p in paths] == NAMED[names]
    said = capsys.readouterr().out
    assert ("c: other files, left out: 2 (1 .log, 1 .pdf)\n" in said) == ("c" in names.split())


def test_folders_behind_links(named, capsys) -> None:
    """Each folder is read once, under its own place rather than a link's. Links to parents are not followed."""
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


def test_files_that_are_left_out_are_reported(named, capsys) -> None:
    for name in ("x.csv", "y.CSV", "z.txt.gz", "README", "a.json"):
        Path("c", name).write_text("x")
    Path("c/gone.txt").symlink_to("nowhere.txt")
    Path("c/zero.txt").symlink_to("/dev/zero")
    make_pipe("c/pipe.txt")
    find(["c"])
    said = capsys.readouterr().out
    assert said.startswith("c: other files, left out: 10 (2 pipe, socket or device, ")
    for kind in ("1 .csv", "1 .CSV", "1 .txt.gz", "1 .json", "1 broken link"):
        assert kind in said


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
    """A folder and files with names in Latin-1 are prepared like any others, and errors name them."""
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
