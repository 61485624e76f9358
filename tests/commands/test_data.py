"""folio data, folio tokenizer, and the scripts that prepare data."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STORY, python

from folio.data import meta_files
from folio.data.tokenizers import named
from folio.doors import tokenize_documents_parallel
from folio.preparation import sources
from folio.preparation.recipes import KNOWN

tokenizers = pytest.importorskip("tokenizers")


# folio data info


@pytest.fixture
def shards(folio, tok, tmp_path) -> Path:
    """Forty documents in shards of 1,000 tokens, and two that were left out."""
    story = STORY.read_text(encoding="utf-8")
    texts = [story[i : i + 480] for i in range(0, 480 * 40, 480)]
    records = [*({"text": text} for text in texts), {"text": None}, {"text": ""}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    argv = ("--shard_size=1000", "--on_error=skip", f"--data_dir={tmp_path / 'shards'}", f"--tokenizer={tok}")
    assert folio("prepare", tmp_path / "texts.jsonl", *argv).code == 0
    return Path(tmp_path / "shards")


def split_line(split: str, files: list[Path], tokens: int, documents: str = "") -> str:
    last = f" … {files[-1].name}" if len(files) > 1 else ""
    plural = "s" if len(files) > 1 else ""
    return f"{split:11} {tokens:,} tokens{documents}, {len(files)} file{plural}: {files[0].name}{last}"


def test_info_of_bin_files(folio, story) -> None:
    code, out, err = folio("data", "info", story, "--verify")
    assert (code, err) == (0, "")
    text = STORY.read_text(encoding="utf-8")
    train, val = (len(np.fromfile(story / f"{split}.bin", np.uint16)) for split in ("train", "val"))
    assert train + val == len(text)
    assert out.splitlines() == [
        f"{story}",
        "tokenizer   characters",
        f"vocabulary  {len(set(text))} ids, uint16",
        "end-of-text none",
        split_line("train", [story / "train.bin"], train, ", 1 document"),
        split_line("val", [story / "val.bin"], val, ", 1 document"),
        f"text        {len(text.encode()):,} bytes, {len(text) / len(text.encode()):.3f} tokens per byte",
        "checksums   all 2 files match meta.json",
        f"begins with {text[:64]!r}",
    ]


def test_info_of_shards(folio, shards, tok) -> None:
    code, out, err = folio("data", "info", shards)
    assert (code, err) == (0, "")
    said = out.splitlines()
    assert said[1:4] == ["tokenizer   tokenizers", "vocabulary  500 ids, uint16", "end-of-text before each document"]
    files = {split: sorted(shards.glob(f"*_{split}_*.npy")) for split in ("train", "val")}
    loaded = {split: np.concatenate([np.load(f) for f in found]) for split, found in files.items()}
    documents = {split: int((ids == named(str(tok)).eot).sum()) for split, ids in loaded.items()}
    assert sum(documents.values()) == 40
    assert len(files["train"]) > 2
    for n, split in enumerate(("train", "val"), 4):
        assert said[n] == split_line(split, files[split], len(loaded[split]), f", {documents[split]} documents")
    assert "left out    1 document: an empty document" in said
    assert "left out    1 document: no text under the key 'text'" in said
    assert said[-1] == f"begins with {named(str(tok)).bytes(loaded['train'][:64].tolist()).decode()!r}"
    assert not any(line.startswith("checksums") for line in said)


def flip(path: Path, later: float) -> None:
    """Flips one bit of the last token, and sets the file's time ``later`` seconds after it was written."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(later * 1e9)))


def test_verify_finds_a_flipped_bit(folio, shards, monkeypatch) -> None:
    """Exit code 1 and the file's name, in a data set that is too large to be hashed whenever it is opened."""
    monkeypatch.setattr(meta_files, "_REHASH", 0)
    assert folio("data", "info", shards, "--verify").code == 0
    first, *_, last = sorted(shards.glob("*_train_*.npy"))
    flip(last, later=0)
    code, out, err = folio("data", "info", shards)
    assert (code, err) == (0, "")
    code, out, err = folio("data", "info", shards, "--verify")
    assert (code, err) == (1, "")
    assert f"checksums   {last.name} does not match meta.json" in out
    flip(first, later=0)
    assert f"{first.name}, {last.name} do not match" in folio("data", "info", shards, "--verify").out


def test_a_file_that_was_changed_later(folio, shards) -> None:
    """It is refused as in training, with or without --verify."""
    first = min(shards.glob("*_train_*.npy"))
    flip(first, later=3600)
    for argv in ([], ["--verify"]):
        code, _, err = folio("data", "info", shards, *argv)
        assert (code > 0, err.count("\n")) == (True, 1)
        assert f"{first} is not what its meta.json describes" in err


def bare(folder: Path, ids: list[int]) -> None:
    np.array(ids, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(ids[:9], dtype=np.uint16).tofile(folder / "val.bin")


def npy(folder: Path, ids: list[int]) -> None:
    for name, some in (("val_000000", ids[:9]), ("train_000001", ids), ("train_000002", ids[9:])):
        np.save(folder / f"edufineweb_{name}.npy", np.array(some, dtype=np.uint16))


@pytest.mark.parametrize("write", [bare, npy])
def test_info_without_a_meta_file(folio, gpt2, tmp_path, write: Callable[[Path, list[int]], None]) -> None:
    """nanoGPT's and build-nanogpt's files: GPT-2's tokenizer is assumed, the rest is unknown."""
    ids = gpt2.encode("The ferry left – at ten.\n" * 9).tolist()
    write(tmp_path, ids)
    code, out, err = folio("data", "info", tmp_path, "--verify")
    assert (code, err) == (0, "")
    assert "tokenizer   gpt2, assumed since no meta file names one" in out
    assert "vocabulary  unknown" in out
    assert "end-of-text unknown" in out
    names = ["train.bin"] if write is bare else ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    count = len(ids) if write is bare else 2 * len(ids) - 9
    assert split_line("train", [tmp_path / name for name in names], count) in out.splitlines()
    assert "checksums   unknown" in out
    assert f"begins with {gpt2.bytes(ids[:64]).decode()!r}" in out


def test_info_with_nanogpts_pickle(folio, tmp_path) -> None:
    bare(tmp_path, [0, 1, 2, 1] * 30)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "itos": {0: "x", 1: "é", 2: "\n"}}))
    code, out, err = folio("data", "info", tmp_path)
    assert (code, err) == (0, "")
    assert "tokenizer   characters\nvocabulary  3 ids, uint16\nend-of-text none\n" in out
    assert f"begins with {'xé_é'.replace('_', chr(10)) * 16!r}" in out


@pytest.mark.parametrize("pickled", [False, True], ids=["gpt2", "meta.pkl"])
def test_ids_beyond_the_vocabulary_are_shown_as_numbers(folio, tmp_path, request, pickled) -> None:
    """The other lines are still printed."""
    bare(tmp_path, [60000, 1, 2] * 30)
    if pickled:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "b"}}))
    else:
        request.getfixturevalue("gpt2")
    code, out, err = folio("data", "info", tmp_path)
    assert (code, err) == (0, "")
    assert "train       90 tokens" in out
    assert "begins with [60000, 1, 2, 60000" in out


def test_info_without_the_tables_of_the_tokenizer(folio, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    data = tmp_path / "data"
    data.mkdir()
    np.arange(40, dtype=np.uint16).tofile(data / "train.bin")
    np.arange(40, dtype=np.uint16).tofile(data / "val.bin")
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    code, out, err = folio("data", "info", data)
    assert (code, err) == (0, "")
    assert "begins with [0, 1, 2, 3, 4, 5, 6, 7] … (the tokenizer cannot be loaded" in out


NOTHING: dict[str, list[str]] = {
    "info empty": ["empty", "no token files"],
    "info nowhere": ["nowhere", "no token files"],
    "info damaged": ["damaged/meta.json", "not a meta file"],
    "info": ["FOLDER"],
    "show empty": ["show", "info"],
}


@pytest.mark.parametrize("argv", NOTHING)
def test_info_without_a_data_set(folio, tmp_path, monkeypatch, argv) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/meta.json").write_text("{")
    code, out, err = folio("data", *argv.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in NOTHING[argv]), err


def test_training_is_deterministic(tok, tmp_path, monkeypatch, folio) -> None:
    """The same bytes in another process, from other files with the same documents, and with other blocks."""
    text = STORY.read_text(encoding="utf-8")
    raw = json.dumps({"body": text}).encode()
    (tmp_path / "story.jsonl.gz").write_bytes(gzip.compress(raw))
    argv = ("tokenizer", "train", tmp_path / "story.jsonl.gz", "--text_key=body", "--vocab_size=500")
    for n, threads in enumerate(("1", "3")):
        env = {"PYTHONHASHSEED": str(n + 1), "RAYON_NUM_THREADS": threads}
        done = python("-m", "folio", *argv, "--out", tmp_path / f"{n}.json", **env)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / f"{n}.json").read_bytes() == tok.read_bytes()
    monkeypatch.setattr(sources, "BLOCK", 100)
    assert folio("tokenizer", "train", STORY, "--vocab_size=500", "--out", tmp_path / "cut.json").code == 0
    assert (tmp_path / "cut.json").read_bytes() == tok.read_bytes()


def test_a_text_that_yields_too_few_tokens(folio, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("aa aa aa")
    code, out, err = folio(
        "tokenizer", "train", tmp_path / "a.txt", "--vocab_size=5000", f"--out={tmp_path / 'a.json'}"
    )
    assert (code, err) == (0, "")
    size = named(str(tmp_path / "a.json")).size
    assert 257 < size < 270
    assert f"the text yields only {size} tokens" in out
    assert f"wrote {tmp_path / 'a.json'}: {size} tokens" in out


REFUSED: dict[str, list[str]] = {
    "train good.txt --vocab_size=256 --out=x.json": ["vocab_size=256", "at least 257"],
    "train good.txt --out=x.bin": ["out=x.bin", ".json"],
    "train --out=x.json": ["no text"],
    "train nowhere.txt --out=x.json": ["nowhere.txt"],
    "train latin.txt --out=x.json": ["latin.txt:2: not UTF-8", "--on_error=skip"],
    "train empty.jsonl --out=x.json": ["empty.jsonl:2: an empty document", "--on_error=skip"],
    "train half.jsonl --out=x.json": ["half.jsonl:1: half of a surrogate pair", "--on_error=skip"],
    f"train good.txt --out={'x' * 250}.json": ["x" * 250, "name too long"],
    "train good.txt --out=folder.json": ["folder.json", "directory"],
    "learn good.txt": ["learn"],
}


@pytest.mark.parametrize("argv", REFUSED)
def test_training_that_is_refused(folio, tmp_path, monkeypatch, argv) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("good words, good words")
    Path("latin.txt").write_bytes(b"one\n\xff")
    Path("empty.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n{"text": "aa aa"}\n')
    Path("folder.json").mkdir()
    before = sorted(Path().iterdir())
    code, _, err = folio("tokenizer", *argv.split())
    assert (code, err.count("\n")) == (2, 1), err
    assert all(word in err for word in REFUSED[argv]), err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["latin.txt", "half.jsonl"])
def test_training_skips_unreadable_documents(folio, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"one\n\xff")
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n')
    Path("good.txt").write_text("good words, good words")
    assert folio("tokenizer", "train", "good.txt", "--out=good.json").code == 0
    code, _, err = folio("tokenizer", "train", "good.txt", name, "--on_error=skip", "--out=skip.json")
    assert (code, err) == (0, "")
    assert Path("skip.json").read_bytes() == Path("good.json").read_bytes()


# Scripts


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts and the package of a clone, which is not installed."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("folio", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("data/*/prepare.py"):
        (folder / "data" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, folder / "data" / path.parent.name)
    return folder


def run(cwd: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", ["scripts/tokenize_documents_parallel.py", "data/shakespeare/prepare.py"])
@pytest.mark.parametrize("how", [["sh"], [sys.executable, "-I"]], ids=["sh", "python"])
def test_every_script_answers(clone, tmp_path, script, how) -> None:
    """From any folder, by a shell or by a Python with an isolated path."""
    done = run(tmp_path, *how, clone / script, "--help", VIRTUAL_ENV=sys.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {Path(script).name}")


def test_the_scripts_of_known_data_sets_are_the_same() -> None:
    """They differ only in the name of their folder."""
    scripts = {path.parent.name: path.read_text() for path in ROOT.glob("data/*/prepare.py")}
    assert {"shakespeare", "shakespeare_char", "openwebtext", "fineweb_edu", "stdlib"} <= scripts.keys() <= {*KNOWN}
    assert len({text.replace(f'"{name}"', '"NAME"') for name, text in scripts.items()}) == 1


def test_a_known_data_set_is_written_beside_its_script(clone, tmp_path) -> None:
    script = clone / "data" / "shakespeare_char" / "prepare.py"
    done = run(tmp_path, "sh", script, f"--source={STORY}", VIRTUAL_ENV=sys.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert {p.name for p in script.parent.iterdir()} == {"prepare.py", "train.bin", "val.bin", "meta.json"}
    assert list(tmp_path.iterdir()) == []


def test_the_flags_of_gpt_from_scratch() -> None:
    assert dataclasses.asdict(tokenize_documents_parallel.Options()) == {
        "local_dir": "edu_fineweb10B",
        "remote_name": "sample-10BT",
        "shard_size": 100_000_000,
        "dataset_path": "HuggingFaceFW/fineweb-edu",
        "tokenizer_model": "gpt2",
    }


@pytest.mark.parametrize("absolute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["relative", "absolute"])
def test_the_script_of_gpt_from_scratch(clone, tmp_path, shared_data, gpt2, absolute) -> None:
    """Its flags in its own spelling, its folder, its files, and an end-of-text before the ids of each document."""
    pytest.importorskip("datasets")
    records = (shared_data / "wikitext2_valid.jsonl").read_text(encoding="utf-8").splitlines()[:9]
    texts = [json.loads(record)["text"] for record in records]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = tmp_path / "made" if absolute else clone / "data" / "made"
    local_dir = folder if absolute else "made"
    script = clone / "scripts" / "tokenize_documents_parallel.py"
    argv = ["--local_dir", local_dir, "--shard_size", 10_000, "--dataset_path", tmp_path / "texts.jsonl"]
    done = run(tmp_path, sys.executable, "-I", script, *argv, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    ids = [i for text in texts for i in (50256, *gpt2.encode(text).tolist())]
    names = [f"{'train' if n else 'val'}_{n:06}.npy" for n in range(-(-len(ids) // 10_000))]
    assert len(names) > 2
    assert {p.name for p in folder.iterdir()} == {*names, "meta.json"}
    assert np.concatenate([np.load(folder / name) for name in names]).tolist() == ids
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("tables", [False, True], ids=["no tables", "tables"])
def test_the_bare_script_without_a_network(clone, tmp_path, request, tables) -> None:
    """One line, and no unfinished data set."""
    pytest.importorskip("datasets")
    shared = request.getfixturevalue("shared_data") if tables else tmp_path
    env = {"TIKTOKEN_CACHE_DIR": str(shared / "tiktoken"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    script = clone / "scripts" / "tokenize_documents_parallel.py"
    done = run(tmp_path, sys.executable, "-I", script, HF_HOME=str(tmp_path / "cache"), **env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("tokenize_documents_parallel.py: ")
    assert ("hf:HuggingFaceFW/fineweb-edu cannot be loaded" if tables else "TIKTOKEN_CACHE_DIR") in done.stderr
    assert not (clone / "data" / "edu_fineweb10B").exists()
