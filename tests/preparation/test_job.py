"""The documents for validation, and the memory of a job."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import preparing
import pytest
from conftest import LINUX, STORY
from preparing import EOT, REAL, Folio, Process, Start, arrays, encoded, large, made, processes, refused, tree, write

from folio.preparation import sources

_places = preparing._places
articles = preparing.articles
start = preparing.start


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
    """Each split has whole documents, for any number of workers, also if all are less than a shard."""
    monkeypatch.setattr(sources, "BLOCK", 2**18)  # so small that there is work for two
    source = write(tmp_path / "source", "jsonl", articles)
    each = encoded(articles, "before" if "shard" in str(flags) else "after")
    expected = {"val": [each[i] for i in val], "train": [each[i] for i in range(60) if i not in val]}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        made(folio("prepare", source, f"--data_dir={out}", f"--workers={workers}", *flags))
        assert arrays(out) == {split: np.concatenate(ids).tobytes() for split, ids in expected.items()}
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_one_text_is_divided_within(folio: Folio, tmp_path: Path) -> None:
    """Validation is the last tenth of a single .txt file, or --val_fraction. A single JSON document is refused."""
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


def peak(process: Process) -> int:
    """The peak memory of a process and its children, in bytes; shared pages count once."""
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
@LINUX
@pytest.mark.parametrize("case", ["bin", "packed", "one text", "stream"])
def test_memory_stays_flat(start: Start, articles: list[str], tmp_path: Path, case: str) -> None:
    """135 MB of text need hardly more memory than 45 MB, workers included."""
    kind, flags, before = REAL[case]
    peaks = []
    for size in (45, 135):
        source, out = large(tmp_path / str(size), kind, articles, size), tmp_path / f"out-{size}"
        process = start("prepare", f"{before}{source}", *flags, "--workers=2", f"--data_dir={out}")
        peaks.append(peak(process))
        assert process.returncode == 0, process.output()
    assert peaks[1] < min(1.5 * 2**30, 1.15 * peaks[0]), peaks
