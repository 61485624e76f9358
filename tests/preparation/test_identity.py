"""A finished data set is not changed, and one with other settings is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import preparing
import pytest
from conftest import STORY
from preparing import (
    DIED,
    ENDED,
    EOT,
    HELD,
    Dying,
    Folio,
    Start,
    arrays,
    committed,
    gone,
    made,
    refused,
    tree,
    until,
    write,
)

from folio.data.folders import open_folder
from folio.data.token_files import UNFINISHED

_places = preparing._places
articles = preparing.articles
dying = preparing.dying
servers = preparing.servers
start = preparing.start


BPE = ["--tokenizer=tok.json"]
CHANGES: dict[str, tuple[list[str], list[str], str]] = {  # → flags before, flags after, words of the error
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
def test_other_settings_are_refused(
    folio: Folio, dying: Dying, articles: list[str], tmp_path: Path, change: str, begun: bool
) -> None:
    """One line names the difference, and nothing changes. With --overwrite the data set is made from the beginning."""
    source, out, tok = write(tmp_path / "source", "jsonl", articles), tmp_path / "out", tmp_path / "tok.json"
    was, now, words = CHANGES[change]
    was, now = ([flag.replace("tok.json", str(tok)) for flag in flags] for flags in (was, now))
    argv = ["prepare", source, "--shard_size=50_000", "--workers=1", f"--data_dir={out}"]
    if change == "merges":
        made(folio("tokenizer", "train", STORY, "--vocab_size=300", "--out", tok))
    if begun:
        assert dying("rename .preparing/state.json 3 kill", *argv, *was)[0] == DIED
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
        assert dying("rename .preparing/state.json 3 kill", *argv, *now, "--overwrite")[0] == DIED
        tokens = committed(out / UNFINISHED)[0]
        code, said = dying("", *argv, *now, "--overwrite")
        assert (code, f"continuing after {tokens:,} tokens" in said) == (ENDED, True), said
    else:
        made(folio(*argv, *now, "--overwrite"))
    made(folio(*argv, *now, f"--data_dir={tmp_path / 'fresh'}"))
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_finished_data_set_is_not_changed(folio: Folio, articles: list[str], tmp_path: Path, kind: str) -> None:
    """The same command says that there is nothing to do; with another --val_fraction it is refused."""
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
    """The second process is refused, and the first succeeds. A killed process holds no lock."""
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
