"""A disk that is full, broken or read-only, at each change of the file system, in real processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import require_posix, tree
from torture import disturbing
from torture.disturbing import go, whole
from torture.starts import RUNS, Ended, Server, results

from folio.records import run_folder

require_posix()

server = disturbing.server
undisturbed = disturbing.undisturbed

UNSAVED = "training continues, and the next checkpoint tries again"


def refusal(ended: Ended, *words: object) -> str:
    """Exit code 2 of the first rank, and all these words in its line about it."""
    assert ended.codes[0] == 2, ended.said
    own = (line for line in ended.said.splitlines() if line.startswith("folio: "))
    (line,) = [line for line in own if "does not answer (" not in line]
    for word in words:
        assert str(word) in line
    return line


# Checkpoints


@pytest.mark.parametrize(
    "change",
    [
        "make_folder checkpoints/.step-00000010.unfinished 1",
        "write_with .step-00000010.unfinished/model.safetensors 1",
        "write_with .step-00000010.unfinished/optimizer.safetensors 1",
        "write_to .step-00000010.unfinished/.state.json.unfinished 1",
        "sync .step-00000010.unfinished/model.safetensors 1",
        "rename checkpoints/step-00000010 1",
        "sync out/checkpoints 2",
        "write_to out/.best.json.unfinished 2",
        "rename out/best.json 2",
    ],
)
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_checkpoint_that_fails_once(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, change: str, error: str
) -> None:
    """The run says so, keeps the checkpoint before, and writes the next one."""
    out = tmp_path / "out"
    ended = go(server, "alone", out, f"{change} {error}")
    why = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[error]
    assert [doing for _, doing in ended.faults] == ["checkpoint"]
    assert ended.codes == [0]
    what = "best.json" if "best.json" in change else "step 10"
    assert f"warning: {what} could not be saved ({why}): {UNSAVED}\n" in ended.said
    assert whole(out)[-1] == 30
    assert results(RUNS["alone"], out) == undisturbed["alone"]


@pytest.mark.parametrize("name", ["alone", "two ranks"])
def test_a_disk_that_stays_full(server: Server, undisturbed: dict[str, Any], tmp_path: Path, name: str) -> None:
    """The old checkpoint stays, and the run ends with one line; with room, the same command ends in the same bits."""
    out = tmp_path / "out"
    ended = go(server, name, out, "write_with */optimizer.safetensors 2+ ENOSPC")
    refusal(ended, run_folder.checkpoint_folder(out, 30), "could not be written (No space left on device)", "make room")
    assert ended.said.count(UNSAVED) == 4
    assert whole(out) == [5]
    assert f"resuming {out} at step 5" in go(server, name, out).said
    assert results(RUNS[name], out) == undisturbed[name]


def test_a_signal_after_a_checkpoint_that_failed(server: Server, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """Between two micro steps: the checkpoint is tried again before the run ends."""
    out, folder = tmp_path / "out", ".step-00000010.unfinished"
    faults = f"write_with {folder}/model.safetensors 1 SIGTERM", f"write_with {folder}/optimizer.safetensors 1 ENOSPC"
    ended = go(server, "alone", out, *faults)
    assert ended.codes == [143], ended.said
    assert "step 10 could not be saved" in ended.said
    assert whole(out)[-1] == 10
    assert go(server, "alone", out).codes == [0]
    assert results(RUNS["alone"], out) == undisturbed["alone"]


def test_a_limit_of_file_sizes(server: Server, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """The kernel refuses to write more: the run ends, and what was there stays."""
    out = tmp_path / "out"
    assert go(server, "alone", out, more=("--max_iters=10",)).codes == [0]
    before = tree(out / "checkpoints")
    size = (run_folder.checkpoint_folder(out, 10) / run_folder.OPTIMIZER).stat().st_size
    ended = go(server, "alone", out, limit=size - 1)
    refusal(ended, run_folder.checkpoint_folder(out, 30), "File too large")
    assert tree(out / "checkpoints") == before
    assert go(server, "alone", out).codes == [0]
    assert results(RUNS["alone"], out) == undisturbed["alone"]


# Metrics


@pytest.mark.parametrize("name", ["alone", "two ranks"])
@pytest.mark.parametrize("change", ["write_to out/metrics.jsonl 17", "sync_open out/metrics.jsonl 3"])
def test_metrics_that_cannot_be_written(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, name: str, change: str
) -> None:
    """The run ends, since lines would be missing; the next one makes them again, each once."""
    out = tmp_path / "out"
    ended = go(server, name, out, f"{change} ENOSPC")
    refusal(ended, out / "metrics.jsonl", "could not be written (No space left on device)", "make room")
    assert whole(out)
    assert not any(go(server, name, out).codes)
    assert results(RUNS[name], out) == undisturbed[name]


def test_a_log_txt_that_cannot_be_written(server: Server, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = go(server, "alone", out, "write_to out/log.txt 9 ENOSPC", more=("--log_txt",))
    refusal(ended, out / "log.txt", "could not be written (No space left on device)", "make room")
    assert go(server, "alone", out).codes == [0]
    assert results(RUNS["alone"], out) == undisturbed["alone"]


# Folders that cannot be written


@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_of_a_run(server: Server, tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        assert go(server, "alone", out, more=("--max_iters=5",)).codes == [0]
    before = tree(tmp_path)
    refusal(go(server, "alone", out, "* * 1+ EROFS"), f"out_dir={out} cannot be written (Read-only file system)")
    assert tree(tmp_path) == before


def test_a_folder_that_becomes_read_only(server: Server, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """As Linux makes it after an error of the disk: the run ends with one line."""
    out = tmp_path / "out"
    refusal(go(server, "alone", out, "* * 60+ EROFS"), "Read-only file system")
    assert go(server, "alone", out).codes == [0]
    assert results(RUNS["alone"], out) == undisturbed["alone"]


def test_a_read_only_folder_of_a_data_set(server: Server, tmp_path: Path) -> None:
    refusal(go(server, "shards", tmp_path / "out", "* * 1+ EROFS"), tmp_path / "out", "Read-only file system")
    assert tree(tmp_path) == {}


# Pruning


@pytest.mark.parametrize("change", ["rename checkpoints/.step-00000005.gone", "remove checkpoints/.step-00000005.gone"])
def test_an_old_checkpoint_that_cannot_be_removed(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, change: str
) -> None:
    """A warning; the newer ones are whole, and the next checkpoint removes the old one."""
    out = tmp_path / "out"
    number = 1 if change.startswith("rename") else 2  # the first removes what a killed process left
    ended = go(server, "alone", out, f"{change} {number} EIO")
    assert ended.codes == [0]
    assert ended.said.count("could not be removed (Input/output error), and takes up disk space\n") == 1
    assert 5 not in whole(out)
    assert results(RUNS["alone"], out) == undisturbed["alone"]


def test_checkpoints_that_are_never_removed(server: Server, tmp_path: Path) -> None:
    ended = go(server, "alone", tmp_path / "out", "rename checkpoints/.step-*.gone 1+ EACCES")
    assert ended.codes == [0]
    for step in (5, 10):
        path = run_folder.checkpoint_folder(tmp_path / "out", step)
        assert ended.said.count(f"warning: {path} could not be removed (Permission denied)") == 1
    assert run_folder.steps(tmp_path / "out") == [5, 10, 15, 20, 25, 30]


# Token files


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_preparation_whose_disk_fails(
    server: Server, undisturbed: dict[str, Any], tmp_path: Path, error: str
) -> None:
    """At each kind of change: one line, and the same command makes the same files."""
    for number, change in enumerate(CHANGES_OF_A_PREPARATION):
        out = tmp_path / str(number)
        ended = go(server, "shards", out, f"{change} {error}")
        assert len(ended.faults) == 1, change
        refusal(ended, out)
        assert go(server, "shards", out).codes == [0], change
        assert results(RUNS["shards"], out) == undisturbed["shards"], change
        shutil.rmtree(out)


CHANGES_OF_A_PREPARATION = (
    "make_folder */.preparing 1",
    "open_to_write .preparing/*.npy 2",
    "write_to .preparing/*.npy 5",
    "sync_open .preparing/*.npy 3",
    "write_to .preparing/.state.json.unfinished 4",
    "rename .preparing/state.json 5",
    "sync */.preparing 2",
    "rename */story_train_*.npy 2",
    "rename */meta.json 1",
)
