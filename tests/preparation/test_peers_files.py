"""Prepared files are byte for byte those of nanoGPT, build-nanogpt and GPT-from-scratch."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import preparing
import pytest
from conftest import STORY, python
from preparing import EOT, NANOGPT, ODD, Folio, arrays, encoded, made, refused, tree, write

_places = preparing._places
articles = preparing.articles


def test_shakespeare_is_nanogpts(folio: Folio, shared_data: Path, tmp_path: Path) -> None:
    """train.bin and val.bin, byte by byte; also against nanoGPT's script if FOLIO_NANOGPT names a checkout."""
    text, out = shared_data / "tinyshakespeare.txt", tmp_path / "out"
    said = made(folio("prepare", "shakespeare", "--source", text, f"--data_dir={out}"))
    assert "train has 301,966 tokens\nval has 36,059 tokens\n" in said
    assert {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in NANOGPT} == NANOGPT
    if clone := os.environ.get("FOLIO_NANOGPT"):
        shutil.copytree(Path(clone) / "data" / "shakespeare", tmp_path / "theirs")
        shutil.copyfile(text, tmp_path / "theirs" / "input.txt")
        assert python(tmp_path / "theirs" / "prepare.py").returncode == 0
        for name in NANOGPT:
            assert (out / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
@pytest.mark.parametrize("end", ["\r\n", "\r", "mixed", "mark"])
def test_line_ends_are_read_as_nanogpt_reads_them(folio: Folio, tmp_path: Path, name: str, end: str) -> None:
    """The ids of nanoGPT's prepare.py, which reads in text mode, where a byte order mark is a character."""
    text, path = STORY.read_text(encoding="utf-8"), tmp_path / "input.txt"
    if end == "mixed":
        text = "".join(
            line + next_end for line, next_end in zip(text.split("\n"), itertools.cycle(["\r\n", "\r", "\n"]))
        )
    path.write_bytes(
        ("\ufeff" + text if end == "mark" else text if end == "mixed" else text.replace("\n", end)).encode()
    )
    with path.open(encoding="utf-8") as file:
        data = file.read()
    made(folio("prepare", name, f"--source={path}", f"--data_dir={tmp_path / 'out'}"))
    if name == "shakespeare_char":
        chars = sorted(set(data))
        assert json.loads((tmp_path / "out" / "meta.json").read_text())["vocab_size"] == len(chars)
        ids = [chars.index(c) for c in data]
        expected = {"train": ids[: int(len(data) * 0.9)], "val": ids[int(len(data) * 0.9) :]}
    else:
        halves = {"train": data[: int(len(data) * 0.9)], "val": data[int(len(data) * 0.9) :]}
        expected = {split: encoded([half], "after")[0][:-1].tolist() for split, half in halves.items()}
    assert {k: np.frombuffer(v, np.uint16).tolist() for k, v in arrays(tmp_path / "out").items()} == expected


@pytest.mark.parametrize("text", ["plain\ntext " * 40, "two\r\nlines " * 40, "\ufeff" + "with a mark " * 40])
def test_what_was_prepared_byte_by_byte(folio: Folio, tmp_path: Path, text: str) -> None:
    """A data set of a version that kept every line end and mark is still finished where the text has none."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_bytes(text.encode())
    argv = ["prepare", source, "--tokenizer=bytes", f"--data_dir={out}"]
    made(folio(*argv))
    meta = json.loads((out / "meta.json").read_text())
    del meta["made"]["source"]["line_ends"], meta["sha256"]
    (out / "meta.json").write_text(json.dumps(meta))
    if text.startswith("plain"):
        assert "nothing to do" in made(folio(*argv))
    else:
        refused(folio(*argv), out, "source.line_ends: None", "--overwrite")
        made(folio(*argv, "--overwrite"))
        assert b"".join(arrays(out)[split] for split in ("train", "val")).decode("utf-16-le") == source.read_text(
            encoding="utf-8-sig"
        )


@pytest.mark.parametrize("eot", ["after", "before"])
def test_every_document_is_tiktokens(folio: Folio, articles: list[str], tmp_path: Path, eot: str) -> None:
    """One after another, with an end-of-text each; one that the text itself names stays text."""
    documents = [*articles[:4], *ODD, *articles[4:], *ODD]
    source, out = write(tmp_path / "source", "jsonl", documents), tmp_path / "out"
    size = "--shard_size=50_000" if eot == "before" else "--shard_size=0"
    made(folio("prepare", source, f"--data_dir={out}", "--val_documents=7", size))
    expected = encoded(documents, eot)
    for split, own in (("val", expected[:7]), ("train", expected[7:])):
        ids = np.frombuffer(arrays(out)[split], np.uint16)
        ends = np.flatnonzero(ids == EOT)[1:] if eot == "before" else np.flatnonzero(ids == EOT)[:-1] + 1
        for found, ours in zip(np.split(ids, ends), own, strict=True):
            assert np.array_equal(found, ours)
        meta = json.loads((out / "meta.json").read_text())["splits"][split]
        assert [meta["documents"]] * 2 == [len(own), sum(f["documents"] for f in meta["files"])]


PEERS = [("fineweb_edu", 2_000), ("fineweb_edu", 90_000), ("fineweb_edu", 100_000), ("script", 2_000)]


@pytest.mark.parametrize(("program", "size"), PEERS)
def test_shards_are_the_peers(folio: Folio, articles: list[str], tmp_path: Path, program: str, size: int) -> None:
    """The names and bytes of build-nanogpt's fineweb.py and GPT-from-scratch's script, which np.save shards.

    In shards of 2,000 documents span many; 100,000 divides the number of tokens.
    """
    documents = [*articles, "", *ODD, ""]
    total = sum(map(len, encoded(documents, "before")))
    tokens = np.concatenate(encoded([*documents, " a" * (-(total + 1) % 100_000)], "before"))
    assert len(tokens) % 100_000 == 0
    source = write(tmp_path / "source", "jsonl", [*documents, " a" * (-(total + 1) % 100_000)])
    out, theirs = tmp_path / "out", tmp_path / "theirs"
    if program == "script":
        argv = [f"--local_dir={out}", f"--shard_size={size}", "--dataset_path", source]
        done = python("scripts/tokenize_documents_parallel.py", *argv)
        assert done.returncode == 0, done.stderr
    else:
        made(folio("prepare", program, "--source", source, f"--shard_size={size}", f"--data_dir={out}", "--workers=1"))
    theirs.mkdir()
    for i, at in enumerate(range(0, len(tokens), size)):
        before = "" if program == "script" else "edufineweb_"
        np.save(theirs / f"{before}{'train' if i else 'val'}_{i:06d}", tokens[at : at + size])
    assert {name: content for name, content in tree(out).items() if name != "meta.json"} == tree(theirs)
    assert arrays(out) == {"val": tokens[:size].tobytes(), "train": tokens[size:].tobytes()}


def test_openwebtext_is_nanogpts(folio: Folio, shared_data: Path, tmp_path: Path) -> None:
    """The split and the order of the datasets library, as nanoGPT's data/openwebtext/prepare.py asks for them."""
    import datasets

    source = shared_data / "wikitext2_valid.jsonl"
    made(folio("prepare", "openwebtext", "--source", source, f"--data_dir={tmp_path / 'out'}", "--workers=1"))
    data = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(tmp_path / "cache"))
    both = data.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for name, half in (("val.bin", "test"), ("train.bin", "train")):
        ids = np.concatenate(encoded(both[half]["text"][:], "after"))
        assert (tmp_path / "out" / name).read_bytes() == ids.tobytes()


def test_hub_and_files_are_the_same(folio: Folio, articles: list[str], tmp_path: Path) -> None:
    """A file or a folder through the datasets library, streamed or not, gives the bytes of the same files read here."""
    file = write(tmp_path / "file", "jsonl", articles + ODD)
    folder = write(tmp_path / "folder", "parquet", articles + ODD)
    ways = [[place, *how] for place in (f"hf:{file}", f"hf:{folder}") for how in ([], ["--streaming"])]
    for i, way in enumerate([[file], [folder], *ways]):
        made(folio("prepare", *way, "--val_documents=6", f"--data_dir={tmp_path / str(i)}", "--workers=1"))
        assert arrays(tmp_path / str(i)) == arrays(tmp_path / "0"), way
