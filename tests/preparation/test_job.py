"""Preparing data sets: the peers' files, byte by byte; the same ones after any kill; anything else is refused."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, STORY, Outcome, python

from folio.data.token_files import UNFINISHED, open_folder
from folio.preparation import job, sources

EOT = 50256
NANOGPT = {  # what nanoGPT's data/shakespeare/prepare.py writes, at its commit 3adf61e
    "train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
}
ODD = ["<|endoftext|>", "text<|endoftext|>more <|endoftext|>", " ", "\n\n  naïve – 渡し船, 🚢\r\n", "'" * 99]

PLAIN = ("-m", "folio")
OFTEN = ("-c", "from folio import cli; from folio.preparation import job; job.COMMIT_EVERY = 0.0; cli.main()")
HELD = (  # stands still before it moves the finished files
    "-c",
    """
import os, signal
from folio import cli
from folio.preparation import job
def held(*args, move=job.move):
    os.kill(os.getpid(), signal.SIGSTOP)
    move(*args)
job.move = held
cli.main()
""",
)
# Prepares in a fork of itself for each line of stdin, [n, log, *argv]; the n-th change of the file system never happens
DYING = """
import json, os, sys, traceback
from folio import cli
import folio.config.arguments
from folio.commands import prepare as _
from folio.preparation import job, sources, workers
from folio.data.tokenizers import Tiktoken
Tiktoken("gpt2")
job.COMMIT_EVERY, job.BLOCK, sources.BLOCK = 0.0, 2**17, 2**17  # many steps in a small text
left = documents = 0
def dying(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        return call(*args, **kwargs) if left else os._exit(9)
    return counted
def tokenise(self, spans, call=workers.Tokenise.__call__):
    global documents
    found = call(self, spans)
    documents += len(found.lengths)
    return found
for line in sys.stdin:
    left, log, *sys.argv[1:] = json.loads(line)
    if (child := os.fork()) == 0:
        os.dup2(file := os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1), os.dup2(file, 2)
        workers.Tokenise.__call__ = tokenise
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        code = 1
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        print(f"tokenised {documents} documents", flush=True)
        os._exit(code)  # at once: the interpreter takes half a second to clear itself away
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
DIED, ENDED = 9, 0


class Process(subprocess.Popen[str]):
    log: Path

    def output(self) -> str:
        return self.log.read_text()


Folio = Callable[..., Outcome]
Start = Callable[..., Process]
Dying = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _places(shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where tiktoken finds its tables, and the datasets library may write."""
    cache = tmp_path_factory.getbasetemp() / "huggingface"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")


@pytest.fixture(scope="session")
def articles(shared_data: Path) -> list[str]:
    lines = (shared_data / "wikitext2_valid.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``folio`` in a process of its own; leaves none behind."""
    begun: list[Process] = []

    def go(*argv: object, how: tuple[str, ...] = PLAIN) -> Process:
        log = tmp_path / f"log-{len(begun)}.txt"
        with log.open("w") as file:
            begun.append(Process([sys.executable, *how, *map(str, argv)], stdout=file, stderr=file, text=True))
        begun[-1].log = log
        return begun[-1]

    yield go
    for process in begun:
        process.kill()
        process.wait()


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Dying]:
    """``dying(n, *argv)``: the exit code and the output of a process that dies in its n-th step; 0: in none."""
    servers: list[subprocess.Popen[str]] = []

    def go(n: int, *argv: object) -> tuple[int, str]:
        if not servers:
            pipe = subprocess.PIPE
            servers.append(subprocess.Popen([sys.executable, "-c", DYING], stdin=pipe, stdout=pipe, text=True))
        log = tmp_path / "dying.txt"
        assert servers[0].stdin is not None
        assert servers[0].stdout is not None
        print(json.dumps([n, str(log), *map(str, argv)]), file=servers[0].stdin, flush=True)
        return int(servers[0].stdout.readline()), log.read_text()

    yield go
    for server in servers:
        server.communicate()


def write(place: Path, kind: str, documents: list[str]) -> Path:
    """The documents as a source: a file, or a folder of five."""
    lines = [json.dumps({"text": text, "title": text[:9]}) + "\n" for text in documents]
    path = place.with_name(f"{place.name}.{kind}")
    if kind == "txt":
        path.write_text("\n".join(documents), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(lines))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    else:
        import pyarrow
        from pyarrow import parquet

        place.mkdir()
        for i, some in enumerate(np.array_split(np.arange(len(documents)), 5)):
            if kind == "parquet":
                table = pyarrow.table({"text": [documents[n] for n in some]})
                parquet.write_table(table, place / f"{i}.parquet", row_group_size=max(4, len(some) // 6))
            else:
                (place / f"{i}.jsonl").write_text("".join(lines[n] for n in some))
        return place
    return path


def large(place: Path, kind: str, articles: list[str], megabytes: int) -> Path:
    """The real articles over and over, each time a little different."""
    return write(place, kind, [f"{i}: {text[i % 97 :]}" for i in range(megabytes) for text in articles])


def encoded(texts: list[str], eot: str) -> list[Any]:
    """Each document as tiktoken alone encodes it."""
    import tiktoken

    ids = [tiktoken.get_encoding("gpt2").encode_ordinary(text) for text in texts]
    return [np.array([EOT, *i] if eot == "before" else [*i, EOT], dtype=np.uint16) for i in ids]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def arrays(folder: Path) -> dict[str, bytes]:
    """All tokens of each split, as training opens them."""
    return {split: b"".join(f.map().tobytes() for f in files) for split, files in open_folder(folder).splits.items()}


def nothing_by_halves(out: Path, *wholes: Path) -> None:
    """Every file in its place is whole, and what can be opened, or has a meta.json, is all of one data set."""
    here = {path.name: path.read_bytes() for path in out.glob("*") if path.suffix in (".bin", ".npy")}
    trees = [tree(whole) for whole in wholes]
    for name, content in here.items():
        assert content in [there.get(name) for there in trees]
    if (out / "meta.json").exists():
        assert any(there.items() <= {**here, "meta.json": (out / "meta.json").read_bytes()}.items() for there in trees)
    try:
        found = arrays(out)
    except (FileNotFoundError, ValueError):
        return
    assert found in [arrays(whole) for whole in wholes], sorted(here)


def made(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome
    return outcome.out


def refused(outcome: Outcome, *words: object) -> None:
    """Exit code 2 and one line on stderr, which holds all these words."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert str(word) in outcome.err


def committed(work: Path) -> tuple[int, int]:
    """Tokens and documents that a state.json says are done."""
    try:
        state = json.loads((work / "state.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    streams = state.get("streams", {}).values()
    tokens = sum(s["tokens"] + sum(f["tokens"] for f in s["done"]) for s in streams)
    return state.get("tokens", tokens), state.get("documents", 0)


def until(true: Callable[..., Any], *args: Any, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not true(*args):
        assert time.monotonic() < end, f"not within {timeout} s"
        time.sleep(0.002)


def processes(parent: int | None = None, without: str = "Z") -> set[int]:
    """Those that live, or the children of one; ``without``: Z for the dead, T for those that stand still."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return {int(pid) for pid, of, stat in rows if parent in (None, int(of)) and stat[0] not in without}


def gone(pids: set[int], without: str = "Z") -> bool:
    return not pids & processes(without=without)


def goes_on(process: Process, work: Path, tokens: int) -> bool:
    """Whether more tokens are committed than these, or will never be."""
    return process.poll() is not None or committed(work)[0] > tokens


# The peers' files


def test_shakespeare_is_nanogpts(folio: Folio, shared_data: Path, tmp_path: Path) -> None:
    """train.bin and val.bin byte by byte; against nanoGPT's own script where FOLIO_NANOGPT names a checkout."""
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
    """The ids of nanoGPT's prepare.py, which opens a text in Python's text mode: in that a mark is a character."""
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
    del meta["made"]["source"]["line_ends"]
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


# Which documents are for validation


SHARES: list[tuple[list[str], range]] = [
    (["--shard_size=1_000_000"], range(0, 60, 10)),
    (["--shard_size=1_000_000", "--val_fraction=0.25"], range(0, 60, 4)),
    (["--shard_size=1_000_000", "--val_documents=3"], range(3)),
    (["--val_fraction=0.25"], range(0, 60, 4)),
    ([], range(0, 60, 10)),
]


@pytest.mark.parametrize(("flags", "val"), SHARES)
def test_a_small_corpus_is_divided_by_document(
    folio: Folio, articles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], val: range
) -> None:
    """Whole documents in each split, whoever tokenises, also where all is less than a shard."""
    for module in (job, sources):
        monkeypatch.setattr(module, "BLOCK", 2**18)  # so small that there is work for two
    source = write(tmp_path / "source", "jsonl", articles)
    each = encoded(articles, "before" if "shard" in str(flags) else "after")
    expected = {"val": [each[i] for i in val], "train": [each[i] for i in range(60) if i not in val]}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        made(folio("prepare", source, f"--data_dir={out}", f"--workers={workers}", *flags))
        assert arrays(out) == {split: np.concatenate(ids).tobytes() for split, ids in expected.items()}
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_one_text_is_divided_within(folio: Folio, tmp_path: Path) -> None:
    """A .txt file alone: its last tenth, or the share asked for; one JSON document alone is refused with a remedy."""
    import tiktoken

    text = STORY.read_text(encoding="utf-8")
    for share in (0.1, 0.3):
        out = tmp_path / str(share)
        made(folio("prepare", STORY, f"--data_dir={out}", *([f"--val_fraction={share}"] if share > 0.1 else [])))
        found = {split: np.frombuffer(ids, np.uint16).tolist() for split, ids in arrays(out).items()}
        assert all(ids.index(EOT) == len(ids) - 1 for ids in found.values())
        train, val = (tiktoken.get_encoding("gpt2").decode(found[split][:-1]) for split in ("train", "val"))
        assert train + val == text
        assert abs(len(val) / len(text) - share) < 0.01
    one = write(tmp_path / "one", "jsonl", [text])
    for size in (0, 100_000):
        refused(folio("prepare", one, f"--data_dir={tmp_path / 'out'}", f"--shard_size={size}"), "train", ".txt file")
        assert not (tmp_path / "out").exists()


# What is finished, and what differs


BPE = ["--tokenizer=tok.json"]
CHANGES: dict[str, tuple[list[str], list[str], str]] = {  # → flags before, after, and what the refusal says
    "document": ([], [], "source.bytes: "),
    "time": ([], [], "source.names_sizes_times: "),
    "tokenizer": ([], ["--tokenizer=bytes"], "tokenizer.kind: tiktoken → bytes"),
    "merges": (BPE, BPE, "tokenizer."),
    "shard_size": ([], ["--shard_size=9_000"], "layout.shard_size: 50000 → 9000"),
    "text_key": ([], ["--text_key=title"], "text_key: text → title"),
    "val_documents": ([], ["--val_documents=9"], "layout.val_documents: 0 → 9"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("begun", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["finished", "killed"])
def test_what_differs_is_refused(
    folio: Folio, dying: Dying, articles: list[str], tmp_path: Path, change: str, begun: bool
) -> None:
    """With what differs in one line, and nothing changed; --overwrite makes it anew, as if nothing had been there."""
    source, out, tok = write(tmp_path / "source", "jsonl", articles), tmp_path / "out", tmp_path / "tok.json"
    was, now, words = CHANGES[change]
    was, now = ([flag.replace("tok.json", str(tok)) for flag in flags] for flags in (was, now))
    argv = ["prepare", source, "--shard_size=50_000", "--workers=1", f"--data_dir={out}"]
    if change == "merges":
        made(folio("tokenizer", "train", STORY, "--vocab_size=300", "--out", tok))
    if begun:
        assert dying(18, *argv, *was)[0] == DIED
        assert committed(out / UNFINISHED)[0] > 0
    else:
        made(folio(*argv, *was))
    if change == "document":
        source.write_text(source.read_text() + '{"text": "One more."}\n')
    elif change == "time":
        os.utime(source, (1, 1))
    elif change == "merges":  # others, and as many
        made(folio("tokenizer", "train", source, "--vocab_size=300", "--out", tok))
    (out / UNFINISHED / "lock").unlink(missing_ok=True)  # of the process that was killed
    before = tree(out)
    refused(folio(*argv, *now), out, words, "→", "--overwrite")
    assert tree(out) == before
    if begun:  # and killed again
        assert dying(18, *argv, *now, "--overwrite")[0] == DIED
        tokens = committed(out / UNFINISHED)[0]
        code, said = dying(0, *argv, *now, "--overwrite")
        assert (code, f"going on after {tokens:,} tokens" in said) == (ENDED, True), said
    else:
        made(folio(*argv, *now, "--overwrite"))
    made(folio(*argv, *now, f"--data_dir={tmp_path / 'fresh'}"))
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_finished_is_left_as_it_is(folio: Folio, articles: list[str], tmp_path: Path, kind: str) -> None:
    """The same command says that there is nothing to do; with another share for validation it is refused."""
    source, out = write(tmp_path / "source", kind, articles), tmp_path / "out"
    argv = ["prepare", source, f"--data_dir={out}", "--val_fraction=0.2"]
    made(folio(*argv))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    tokens = {split: len(ids) // 2 for split, ids in arrays(out).items()}
    said = f"is finished: train has {tokens['train']:,} tokens, val has {tokens['val']:,}; nothing to do"
    assert said in made(folio(*argv))
    refused(folio(*argv, "--val_fraction=0.4"), "val_fraction: 0.2 → 0.4", "--overwrite")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["train.bin", "edufineweb_train_000001.npy"])
def test_files_of_other_programs_are_refused(folio: Folio, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(200))
    refused(folio("prepare", STORY, f"--data_dir={tmp_path}"), tmp_path, "another program wrote", "--overwrite")
    assert tree(tmp_path) == {name: bytes(200)}
    made(folio("prepare", STORY, f"--data_dir={tmp_path}", "--overwrite"))
    assert open_folder(tmp_path).vocab_size == EOT + 1


def test_two_at_once(folio: Folio, start: Start, articles: list[str], tmp_path: Path) -> None:
    """The second is refused, and the first ends well; a killed one holds nothing."""
    source, out = write(tmp_path / "source", "jsonl", articles), tmp_path / "out"
    argv = ["prepare", source, f"--data_dir={out}"]
    first = start(*argv, how=HELD)
    until(gone, {first.pid}, "ZT")
    before = tree(out)
    refused(folio(*argv), out, "another process is preparing")
    assert tree(out) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0, first.output()
    finished = tree(out)
    assert list(finished) == ["meta.json", "train.bin", "val.bin"]
    second = start(*argv, "--overwrite", how=HELD)
    until(gone, {second.pid}, "ZT")
    second.kill()
    second.wait()
    made(folio(*argv, "--overwrite"))
    assert tree(out) == finished


# Killed


STEPS: dict[str, tuple[str, list[str], str]] = {  # → kind of source, flags, and what is there before
    "bin": ("jsonl", [], "nothing"),
    "bin over another": ("jsonl", [], "another"),
    "shards": ("jsonl.gz", ["--shard_size=20_000"], "nothing"),
    "shards over others": ("jsonl.gz", ["--shard_size=20_000"], "another"),
    "less than a shard": ("jsonl", ["--shard_size=1_000_000"], "nothing"),
    "one text": ("txt", ["--tokenizer=char"], "nothing"),
    "parts": ("files", ["--shard_size=20_000"], "parts"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_killed_at_every_step(dying: Dying, articles: list[str], tmp_path: Path, case: str) -> None:
    """Before each change of the file system in turn: no halves, nothing twice, and the same bytes in the end."""
    kind, flags, there = STEPS[case]
    texts = articles[:20]
    out, old, new, base = (tmp_path / name for name in ("out", "old", "new", "base"))
    source, other = write(tmp_path / "source", kind, texts), write(tmp_path / "other", kind, texts[::-1])
    argv = ["prepare", source, *flags, "--workers=1", "--name=x", "--data_dir"]
    assert dying(0, *argv, new)[0] == ENDED
    assert dying(0, "prepare", other, *argv[2:], old)[0] == ENDED
    base.mkdir()
    if there == "another":
        base, argv = old, [*argv[:2], "--overwrite", *argv[2:]]
    elif there == "parts":
        assert [dying(0, *argv, base, f"--shard_of={i}/3")[0] for i in (0, 2)] == [ENDED] * 2
        argv = [*argv[:2], "--shard_of=1/3", *argv[2:]]
    for step in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        code, said = dying(step, *argv, out)
        if code == ENDED:
            break
        assert code == DIED, said
        nothing_by_halves(out, new, *([old] if there == "another" else []))
        tokens, documents = committed(out / UNFINISHED)
        code, said = dying(0, *argv, out)
        assert code == ENDED, f"after step {step}: {said}"
        found = {name: content for name, content in tree(out).items() if name != ".preparing/lock"}
        assert found == tree(new), f"after step {step}"
        if documents and "going on" in said:
            assert f"going on after {tokens:,} tokens of {documents:,} documents" in said
            assert f"tokenised {len(texts) - documents} documents" in said or kind in ("txt", "files")
    assert step > 25


WAYS: dict[str, list[tuple[int, str]]] = {  # steps until it dies, part
    "whole, then in parts": [(30, ""), (0, "0/3"), (0, "1/3"), (0, "2/3")],
    "in parts, then whole": [(0, "0/3"), (0, "1/3"), (60, "2/3"), (0, "")],
    "in other parts": [(0, "0/3"), (0, "1/3"), (60, "2/3"), (0, "1/2"), (0, "0/2")],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_and_shared_out_otherwise(dying: Dying, articles: list[str], tmp_path: Path, way: str) -> None:
    """What one way of sharing out has begun does not spoil another's."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    assert dying(0, *argv, tmp_path / "new")[0] == ENDED
    for step, part in WAYS[way]:
        code, said = dying(step, *argv, tmp_path / "out", f"--shard_of={part}")
        assert code == (DIED if step else ENDED), said
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [([], ["--streaming"]), (["--streaming"], [])])
def test_killed_and_streamed_otherwise(
    dying: Dying, articles: list[str], tmp_path: Path, first: list[str], then: list[str]
) -> None:
    """Goes on to the same bytes, or is refused with what differs."""
    source = write(tmp_path / "source", "parquet", articles * 20)
    argv = ["prepare", f"hf:{source}", "--workers=1", "--name=x", "--data_dir"]
    assert dying(0, *argv, tmp_path / "new", *first)[0] == ENDED
    assert dying(14, *argv, tmp_path / "out", *first)[0] == DIED
    assert committed(tmp_path / "out" / UNFINISHED)[0] > 0
    code, said = dying(0, *argv, tmp_path / "out", *then)
    if code == ENDED:
        assert arrays(tmp_path / "out") == arrays(tmp_path / "new")
    assert code == ENDED or (code == 2 and "streaming: " in said), said


def test_damaged_after_a_kill(dying: Dying, articles: list[str], tmp_path: Path) -> None:
    """What a killed process left and somebody cut short is refused, with a remedy that is one."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    work = tmp_path / "out" / UNFINISHED
    assert dying(0, *argv, tmp_path / "new")[0] == ENDED
    assert dying(20, *argv, tmp_path / "out")[0] == DIED
    os.truncate(work / "train.bin", 99)
    code, said = dying(0, *argv, tmp_path / "out")
    assert (code, str(work / "train.bin") in said, f"remove {work} " in said) == (2, True, True), said
    shutil.rmtree(work)
    assert dying(0, *argv, tmp_path / "out")[0] == ENDED
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


def damaged(path: Path, how: str) -> None:
    """A file of JSON, no longer what was written."""
    content = path.read_bytes()
    if how == "pipe":
        path.unlink()
        os.mkfifo(path)
        return
    digit = next(i for i in range(content.index(b'"tokens"'), len(content)) if content[i : i + 1] in b"2345678")
    path.write_bytes(
        {
            "empty": b"",
            "cut": content[:-40],
            "list": b"[1, 2]",
            "object": b"{}",
            "deep": b"[" * 100_000,
            "bit": content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :],
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "cut", "list", "object", "deep", "bit", "pipe"])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_a_damaged_state(folio: Folio, dying: Dying, articles: list[str], tmp_path: Path, how: str, part: bool) -> None:
    """What a killed process committed, and is no longer that, is refused with a remedy that is one."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    flags = ["--shard_of=0/2"] if part else []
    work = tmp_path / "out" / UNFINISHED / ("part-0-of-2" if part else "")
    assert dying(20, *argv, tmp_path / "out", *flags)[0] == DIED
    assert committed(work)[0] > 0
    damaged(work / "state.json", how)
    refused(folio(*argv, tmp_path / "out", *flags), work / "state.json", "is damaged", f"remove {work} to begin again")
    shutil.rmtree(work)
    made(folio(*argv, tmp_path / "out", *flags))


@pytest.mark.parametrize("name", ["ids", "lengths", "blocks"])
def test_a_part_that_was_cut_short(folio: Folio, articles: list[str], tmp_path: Path, name: str) -> None:
    argv = ["prepare", write(tmp_path / "source", "files", articles), "--workers=1", f"--data_dir={tmp_path / 'out'}"]
    made(folio(*argv, "--shard_of=0/2"))
    part = tmp_path / "out" / UNFINISHED / "part-0-of-2"
    os.truncate(part / name, (part / name).stat().st_size - 8)
    refused(folio(*argv, "--shard_of=1/2"), part / name, "is damaged", f"remove {part} ")
    assert (part.with_name("part-1-of-2") / "ids").stat().st_size > 0  # which is not lost with it
    shutil.rmtree(part)
    made(folio(*argv, "--shard_of=0/2"))
    made(folio("data", "info", tmp_path / "out", "--verify"))


@pytest.mark.parametrize("how", ["empty", "cut", "list", "object", "deep", "pipe"])
def test_a_damaged_meta_file(folio: Folio, tmp_path: Path, how: str) -> None:
    argv = ["prepare", STORY, "--tokenizer=bytes", f"--data_dir={tmp_path}"]
    made(folio(*argv))
    damaged(tmp_path / "meta.json", how)
    refused(folio(*argv), tmp_path / "meta.json", "damaged", "--overwrite")
    made(folio(*argv, "--overwrite"))
    assert "nothing to do" in made(folio(*argv))


REAL: dict[str, tuple[str, list[str], str]] = {  # → kind of source, flags, what stands before its name
    "bin": ("jsonl", [], ""),
    "shards": ("jsonl", ["--shard_size=700_000"], ""),
    "packed": ("jsonl.gz", [], ""),
    "one text": ("txt", [], ""),
    "stream": ("parquet", ["--streaming", "--shard_size=1_000_000"], "hf:"),
    "characters": ("jsonl", ["--tokenizer=char"], ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_killed_at_random(start: Start, articles: list[str], tmp_path: Path, case: str) -> None:
    """SIGKILL at any moment, again and again: no worker is left, and the same command goes on to the same bytes."""
    kind, flags, before = REAL[case]
    source, out, chance = large(tmp_path / "source", kind, articles, 36), tmp_path / "out", random.Random(case)
    argv = ["prepare", f"{before}{source}", *flags, "--workers=2", "--name=x"]
    assert (whole := start(*argv, f"--data_dir={tmp_path / 'new'}")).wait(60) == 0, whole.output()
    kept = [0]
    for how, wait in [(PLAIN, 2.0), *[(OFTEN, 0.1)] * 2]:
        process = start(*argv, f"--data_dir={out}", how=how)
        if how == OFTEN:
            until(goes_on, process, out / UNFINISHED, kept[-1])
        time.sleep(chance.uniform(0, wait))
        children = processes(process.pid)
        process.kill()
        process.wait()
        until(gone, children, timeout=5)
        nothing_by_halves(out, tmp_path / "new")
        if (out / "meta.json").exists():
            break
        if kept[-1]:
            assert f"going on after {kept[-1]:,} tokens" in process.output()
        kept.append(committed(out / UNFINISHED)[0])
    assert kept == sorted(kept)
    assert len(set(kept)) > 1
    assert (last := start(*argv, f"--data_dir={out}")).wait(60) == 0, last.output()
    assert tree(out) == tree(tmp_path / "new")


# Shared out


PARTS: dict[str, tuple[str, list[str], str]] = {
    "bin": ("files", [], ""),
    "shards": ("files", ["--shard_size=40_000"], ""),
    "characters": ("files", ["--tokenizer=char"], ""),
    "stream": ("parquet", ["--streaming", "--shard_size=40_000"], "hf:"),
    "table": ("parquet", ["--val_documents=5"], "hf:"),
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_parts_make_the_whole(
    folio: Folio, articles: list[str], tmp_path: Path, case: str, order: tuple[int, ...]
) -> None:
    """In any order, one of them twice: the files and the meta.json of one process."""
    kind, flags, before = PARTS[case]
    argv = ["prepare", f"{before}{write(tmp_path / 'source', kind, articles)}", *flags, "--workers=1", "--name=x"]
    made(folio(*argv, f"--data_dir={tmp_path / 'new'}"))
    for i in (*order[:2], order[0], order[2]):
        assert not (tmp_path / "out" / "meta.json").exists()
        said = made(folio(*argv, f"--data_dir={tmp_path / 'out'}", f"--shard_of={i}/3"))
    assert "wrote " in said
    assert tree(tmp_path / "out") == tree(tmp_path / "new")
    assert "nothing to do" in made(folio(*argv, f"--data_dir={tmp_path / 'out'}", "--shard_of=1/3"))


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS)
def test_parts_at_once(start: Start, articles: list[str], tmp_path: Path, case: str) -> None:
    """Three processes, of which one is killed and started again; all end well."""
    kind, flags, before = PARTS[case]
    argv = ["prepare", f"{before}{large(tmp_path / 'source', kind, articles, 24)}", *flags, "--name=x", "--workers=1"]
    assert start(*argv, f"--data_dir={tmp_path / 'new'}").wait(60) == 0
    out = tmp_path / "out"
    parts = [start(*argv, f"--data_dir={out}", f"--shard_of={i}/3", how=OFTEN) for i in range(3)]
    until(goes_on, parts[1], out / UNFINISHED / "part-1-of-3", 0)
    parts[1].kill()
    assert parts[1].wait() == -signal.SIGKILL
    parts[1] = start(*argv, f"--data_dir={out}", "--shard_of=1/3", how=OFTEN)
    for part in parts:
        assert part.wait(60) == 0, part.output()
    assert "going on after" in parts[1].output()
    assert tree(out) == tree(tmp_path / "new")


def test_the_last_parts_at_once(folio: Folio, start: Start, articles: list[str], tmp_path: Path) -> None:
    """Two processes each find all parts complete: one puts them together, the other leaves it to it."""
    source, out = write(tmp_path / "source", "files", articles), tmp_path / "out"
    argv = ["prepare", source, f"--data_dir={out}"]
    for i in (0, 1):
        made(folio(*argv, f"--shard_of={i}/3"))
    last = start(*argv, "--shard_of=2/3", how=HELD)
    until(gone, {last.pid}, "ZT")
    before = tree(out)
    made(folio(*argv, "--shard_of=1/3"))
    assert tree(out) == before
    last.send_signal(signal.SIGCONT)
    assert last.wait(60) == 0, last.output()
    made(folio("data", "info", out, "--verify"))


@pytest.mark.parametrize("text", ["3/3", "-1/3", "x", "1", "1/0", "/", "1/2/3", "0.5/2"])
def test_bad_parts_are_refused(folio: Folio, tmp_path: Path, text: str) -> None:
    refused(folio("prepare", STORY, f"--data_dir={tmp_path / 'out'}", f"--shard_of={text}"), text, "I/N")
    assert not (tmp_path / "out").exists()


def test_a_stream_of_few_files_is_not_shared_out(folio: Folio, articles: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "parquet", articles)
    argv = ["prepare", f"hf:{source}", "--streaming", f"--data_dir={tmp_path / 'out'}", "--shard_of=0/6"]
    refused(folio(*argv), "5 files", "--shard_of")
    assert not (tmp_path / "out").exists()


# Memory


def peak(process: Process) -> int:
    """The most bytes that a process and its children held at once, each page counted once, until it ends."""
    most = 0
    while process.poll() is None:
        held = 0
        for pid in (process.pid, *processes(process.pid)):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            held += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        most = max(most, held)
        time.sleep(0.05)
    return most


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux to look at the memory")
@pytest.mark.parametrize("case", ["bin", "packed", "one text", "stream"])
def test_memory_stays_flat(start: Start, articles: list[str], tmp_path: Path, case: str) -> None:
    """150 MB of text need hardly more than 50 MB do, workers and all."""
    kind, flags, before = REAL[case]
    peaks = []
    for size in (45, 135):
        source, out = large(tmp_path / str(size), kind, articles, size), tmp_path / f"out-{size}"
        process = start("prepare", f"{before}{source}", *flags, "--workers=2", f"--data_dir={out}")
        peaks.append(peak(process))
        assert process.returncode == 0, process.output()
    assert peaks[1] < min(1.5 * 2**30, 1.15 * peaks[0]), peaks
