"""A preparation that is killed and repeated makes the same files as one that is not killed."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from pathlib import Path

import preparing
import pytest
from conftest import STORY, make_pipe
from preparing import (
    DIED,
    ENDED,
    OFTEN,
    PLAIN,
    REAL,
    Dying,
    Folio,
    Start,
    arrays,
    assert_whole,
    committed,
    gone,
    is_past,
    large,
    made,
    processes,
    refused,
    tree,
    until,
    write,
)

from folio.data.token_files import UNFINISHED

_places = preparing._places
articles = preparing.articles
dying = preparing.dying
servers = preparing.servers
start = preparing.start


STEPS: dict[str, tuple[str, list[str], str]] = {  # → kind of source, flags, content of the folder before
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
    """At each change of the file system: no half files, no document twice, and the same bytes at the end."""
    kind, flags, there = STEPS[case]
    texts = articles[:20]
    out, old, new, base = (tmp_path / name for name in ("out", "old", "new", "base"))
    source, other = write(tmp_path / "source", kind, texts), write(tmp_path / "other", kind, texts[::-1])
    argv = ["prepare", source, *flags, "--workers=1", "--name=x", "--data_dir"]
    assert dying("", *argv, new)[0] == ENDED
    assert dying("", "prepare", other, *argv[2:], old)[0] == ENDED
    base.mkdir()
    if there == "another":
        base, argv = old, [*argv[:2], "--overwrite", *argv[2:]]
    elif there == "parts":
        assert [dying("", *argv, base, f"--shard_of={i}/3")[0] for i in (0, 2)] == [ENDED] * 2
        argv = [*argv[:2], "--shard_of=1/3", *argv[2:]]
    for step in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        code, said = dying(f"* * {step} kill", *argv, out)
        if code == ENDED:
            break
        assert code == DIED, said
        assert_whole(out, new, *([old] if there == "another" else []))
        tokens, documents = committed(out / UNFINISHED)
        code, said = dying("", *argv, out)
        assert code == ENDED, f"after step {step}: {said}"
        found = {name: content for name, content in tree(out).items() if name != ".preparing/lock"}
        assert found == tree(new), f"after step {step}"
        if documents and "continuing" in said:
            assert f"continuing after {tokens:,} tokens of {documents:,} documents" in said
    assert step > 25


WHOLE, JOINING = "rename .preparing/state.json 5 kill", "write_to .preparing/train.bin 2 kill"
WAYS: dict[str, list[tuple[str, str]]] = {  # the fault by which it dies, part
    "whole, then in parts": [(WHOLE, ""), ("", "0/3"), ("", "1/3"), ("", "2/3")],
    "in parts, then whole": [("", "0/3"), ("", "1/3"), (JOINING, "2/3"), ("", "")],
    "in other parts": [("", "0/3"), ("", "1/3"), (JOINING, "2/3"), ("", "1/2"), ("", "0/2")],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_and_divided_into_other_parts(dying: Dying, articles: list[str], tmp_path: Path, way: str) -> None:
    """Unfinished parts of one division do not affect another division."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    assert dying("", *argv, tmp_path / "new")[0] == ENDED
    for fault, part in WAYS[way]:
        code, said = dying(fault, *argv, tmp_path / "out", f"--shard_of={part}")
        assert code == (DIED if fault else ENDED), said
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [([], ["--streaming"]), (["--streaming"], [])])
def test_killed_and_repeated_with_or_without_streaming(
    dying: Dying, articles: list[str], tmp_path: Path, first: list[str], then: list[str]
) -> None:
    """The second run makes the same bytes, or is refused with the difference."""
    source = write(tmp_path / "source", "parquet", articles * 20)
    argv = ["prepare", f"hf:{source}", "--workers=1", "--name=x", "--data_dir"]
    assert dying("", *argv, tmp_path / "new", *first)[0] == ENDED
    assert dying("rename .preparing/state.json 4 kill", *argv, tmp_path / "out", *first)[0] == DIED
    assert committed(tmp_path / "out" / UNFINISHED)[0] > 0
    code, said = dying("", *argv, tmp_path / "out", *then)
    if code == ENDED:
        assert arrays(tmp_path / "out") == arrays(tmp_path / "new")
    assert code == ENDED or (code == 2 and "streaming: " in said), said


def test_damaged_after_a_kill(dying: Dying, articles: list[str], tmp_path: Path) -> None:
    """An unfinished file that was cut short is refused, and the remedy in the line works."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    work = tmp_path / "out" / UNFINISHED
    assert dying("", *argv, tmp_path / "new")[0] == ENDED
    assert dying("rename .preparing/state.json 3 kill", *argv, tmp_path / "out")[0] == DIED
    os.truncate(work / "train.bin", 99)
    code, said = dying("", *argv, tmp_path / "out")
    assert (code, str(work / "train.bin") in said, f"remove {work} " in said) == (2, True, True), said
    shutil.rmtree(work)
    assert dying("", *argv, tmp_path / "out")[0] == ENDED
    assert tree(tmp_path / "out") == tree(tmp_path / "new")


def damaged(path: Path, how: str) -> None:
    """Damages a JSON file."""
    content = path.read_bytes()
    if how == "pipe":
        path.unlink()
        make_pipe(path)
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
    """A damaged state of a killed process is refused, and the remedy in the line works."""
    argv = ["prepare", write(tmp_path / "source", "jsonl", articles), "--workers=1", "--data_dir"]
    flags = ["--shard_of=0/2"] if part else []
    work = tmp_path / "out" / UNFINISHED / ("part-0-of-2" if part else "")
    assert dying("rename */state.json 3 kill", *argv, tmp_path / "out", *flags)[0] == DIED
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
    assert (part.with_name("part-1-of-2") / "ids").stat().st_size > 0  # the other part is kept
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


@pytest.mark.slow
@pytest.mark.parametrize("case", REAL)
def test_killed_at_random(start: Start, articles: list[str], tmp_path: Path, case: str) -> None:
    """SIGKILL at random moments: no worker is left, and the same command continues to the same bytes."""
    kind, flags, before = REAL[case]
    source, out, chance = large(tmp_path / "source", kind, articles, 36), tmp_path / "out", random.Random(case)
    argv = ["prepare", f"{before}{source}", *flags, "--workers=2", "--name=x"]
    assert (whole := start(*argv, f"--data_dir={tmp_path / 'new'}")).wait(60) == 0, whole.output()
    kept = [0]
    for how, wait in [(PLAIN, 2.0), *[(OFTEN, 0.1)] * 2]:
        process = start(*argv, f"--data_dir={out}", how=how)
        if how == OFTEN:
            until(is_past, process, out / UNFINISHED, kept[-1])
        time.sleep(chance.uniform(0, wait))
        children = processes(process.pid)
        process.kill()
        process.wait()
        until(gone, children, timeout=5)
        assert_whole(out, tmp_path / "new")
        if (out / "meta.json").exists():
            break
        if kept[-1]:
            assert f"continuing after {kept[-1]:,} tokens" in process.output()
        kept.append(committed(out / UNFINISHED)[0])
    assert kept == sorted(kept)
    assert len(set(kept)) > 1
    assert (last := start(*argv, f"--data_dir={out}")).wait(60) == 0, last.output()
    assert tree(out) == tree(tmp_path / "new")
