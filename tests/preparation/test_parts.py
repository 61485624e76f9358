"""Parts prepared by several processes make the whole."""

from __future__ import annotations

import signal
from pathlib import Path

import preparing
import pytest
from conftest import STORY
from preparing import HELD, OFTEN, Folio, Start, gone, is_past, large, made, refused, tree, until, write

from folio.data.token_files import UNFINISHED

_places = preparing._places
articles = preparing.articles
start = preparing.start


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
    """In any order, one part twice: the files and meta.json are those of one process."""
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
    """Three processes, one of which is killed and started again; all succeed."""
    kind, flags, before = PARTS[case]
    argv = ["prepare", f"{before}{large(tmp_path / 'source', kind, articles, 24)}", *flags, "--name=x", "--workers=1"]
    assert start(*argv, f"--data_dir={tmp_path / 'new'}").wait(60) == 0
    out = tmp_path / "out"
    parts = [start(*argv, f"--data_dir={out}", f"--shard_of={i}/3", how=OFTEN) for i in range(3)]
    until(is_past, parts[1], out / UNFINISHED / "part-1-of-3", 0)
    parts[1].kill()
    assert parts[1].wait() == -signal.SIGKILL
    parts[1] = start(*argv, f"--data_dir={out}", "--shard_of=1/3", how=OFTEN)
    for part in parts:
        assert part.wait(60) == 0, part.output()
    assert "continuing after" in parts[1].output()
    assert tree(out) == tree(tmp_path / "new")


def test_the_last_parts_at_once(folio: Folio, start: Start, articles: list[str], tmp_path: Path) -> None:
    """Two processes find all parts complete: only one joins them."""
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


def test_a_stream_has_no_more_parts_than_files(folio: Folio, articles: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "parquet", articles)
    argv = ["prepare", f"hf:{source}", "--streaming", f"--data_dir={tmp_path / 'out'}", "--shard_of=0/6"]
    refused(folio(*argv), "5 files", "--shard_of")
    assert not (tmp_path / "out").exists()
