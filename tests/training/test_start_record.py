"""What a run records about itself when it starts."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import STORY
from run_results import Train, records

from folio.checkpoints import find
from folio.config.options import Data
from folio.data.rows import Tokens
from folio.machine.probe import processor_name
from folio.training.start_record import bytes_per_token, commit


def test_each_start_records_date_size_data_and_processor(train: Train, story: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    out = train("out", "--max_iters=3")
    train("out", "--max_iters=5", "--init_from=resume")
    first, second = records(out, "start", "time", "seconds")
    assert before <= datetime.fromisoformat(first[0]) <= datetime.fromisoformat(second[0]) <= datetime.now(UTC)
    assert 0 < first[1] < records(out, "eval", "seconds")[1] < second[1]
    splits = json.loads((story / "meta.json").read_text())["splits"]
    counts = (splits["train"]["tokens"], splits["val"]["tokens"])
    names = ("dataset", "train_tokens", "val_tokens", "hardware")
    assert records(out, "start", *names) == 2 * [(str(story), *counts, processor_name())]
    model = find.choose(out).model(0.0)
    assert records(out, "start", "parameters") == 2 * [sum(p.numel() for p in model.parameters())]
    assert records(out, "start", "bytes_per_token") == 2 * [STORY.stat().st_size / sum(counts)]


def test_bytes_per_token_is_unknown_without_meta_files(story: Path, tmp_path: Path) -> None:
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes((story / name).read_bytes())
    assert bytes_per_token(Tokens.open(Data(data_dir=str(tmp_path)), 16, 0)) is None


def test_the_commit_is_that_of_the_checkout_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=clone, capture_output=True, text=True, check=True).stdout

    clone = tmp_path / "clone"
    (clone / "inner").mkdir(parents=True)
    (clone / "train.py").write_text("1")
    assert commit(clone) is None
    git("init", "-q")
    assert commit(clone) is None  # nothing is committed
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "-a", "v1", "-m", "v1")
    head = git("rev-parse", "HEAD")[:12]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    assert commit(clone) == head
    (clone / "out").mkdir()
    (clone / "out" / "metrics.jsonl").write_text("{}")
    assert commit(clone) == head
    (clone / "train.py").write_text("2")
    assert commit(clone) == f"{head}-dirty"
    assert commit(clone / "inner") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(clone) is None


def test_gits_words_in_no_encoding_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats the name of a folder that another user owns."""
    (tmp_path / ".git").mkdir()
    git = tmp_path / "git"
    git.write_bytes(b"#!/bin/sh\necho 'fatal: dubious ownership of \xff' >&2\nexit 128\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert commit(tmp_path) is None
