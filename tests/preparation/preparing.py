"""Prepares data sets in processes that tests watch, stop and kill."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Outcome
from torture.faulty import SCRIPT
from torture.starts import Server

from folio.data.folders import open_folder

EOT = 50256
NANOGPT = {  # what nanoGPT's data/shakespeare/prepare.py writes, at its commit 3adf61e
    "train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
}
ODD = ["<|endoftext|>", "text<|endoftext|>more <|endoftext|>", " ", "\n\n  naïve – 渡し船, 🚢\r\n", "'" * 99]
PLAIN = ("-m", "folio")
OFTEN = ("-c", "from folio import cli; from folio.preparation import job; job.COMMIT_EVERY = 0.0; cli.main()")
HELD = (str(SCRIPT), "remove */meta.json 1 SIGSTOP")  # stops itself before it moves the finished files
DIED, ENDED = -9, 0  # by SIGKILL, which Windows lacks


class Process(subprocess.Popen[str]):
    log: Path

    def output(self) -> str:
        return self.log.read_text()


Folio = Callable[..., Outcome]
Start = Callable[..., Process]
Dying = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _places(shared_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """tiktoken finds its tables, and the datasets library has its own cache."""
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
    """Starts ``folio`` in a process, which is killed after the test."""
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


@pytest.fixture(scope="session")
def servers() -> Iterator[list[Server]]:
    """The server that ``dying`` has started, if any."""
    made: list[Server] = []
    yield made
    for server in made:
        server.__exit__()


@pytest.fixture
def dying(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Dying:
    """``dying(fault, *argv)``: exit code and output of a process that a fault kills; with "" nothing kills it."""

    def go(fault: str, *argv: object) -> tuple[int, str]:
        if not servers:
            servers.append(Server(tmp_path_factory.mktemp("server"), "gpt2"))
        ended = servers[0].start(*map(str, argv), faults=[fault] if fault else [], block=2**17)
        return ended.codes[0], ended.said

    return go


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
    """The real articles, repeated, each time with a small change."""
    return write(place, kind, [f"{i}: {text[i % 97 :]}" for i in range(megabytes) for text in articles])


def encoded(texts: list[str], eot: str) -> list[Any]:
    """Each document as tiktoken alone encodes it."""
    import tiktoken

    ids = [tiktoken.get_encoding("gpt2").encode_ordinary(text) for text in texts]
    return [np.array([EOT, *i] if eot == "before" else [*i, EOT], dtype=np.uint16) for i in ids]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def arrays(folder: Path) -> dict[str, bytes]:
    """All tokens of each split, as training opens them."""
    return {split: b"".join(f.map().tobytes() for f in files) for split, files in open_folder(folder).splits.items()}


def assert_whole(out: Path, *wholes: Path) -> None:
    """Every file in its place is whole. If the folder can be opened or has a meta.json, it is one of ``wholes``."""
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
    """Exit code 2 and one line on stderr with all these words."""
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert str(word) in outcome.err


def committed(work: Path) -> tuple[int, int]:
    """Tokens and documents that are done by state.json."""
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
    """Living processes, or the children of one. ``without``: states to leave out, Z for zombies, T for stopped ones."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    return {int(pid) for pid, of, stat in rows if parent in (None, int(of)) and stat[0] not in without}


def gone(pids: set[int], without: str = "Z") -> bool:
    return not pids & processes(without=without)


def is_past(process: Process, work: Path, tokens: int) -> bool:
    """Whether more tokens than these are committed, or the process has ended."""
    return process.poll() is not None or committed(work)[0] > tokens


REAL: dict[str, tuple[str, list[str], str]] = {  # → kind of source, flags, prefix of its name
    "bin": ("jsonl", [], ""),
    "shards": ("jsonl", ["--shard_size=700_000"], ""),
    "packed": ("jsonl.gz", [], ""),
    "one text": ("txt", [], ""),
    "stream": ("parquet", ["--streaming", "--shard_size=1_000_000"], "hf:"),
    "characters": ("jsonl", ["--tokenizer=char"], ""),
}
