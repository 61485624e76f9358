"""Another checkpoint of the same step replaces one: wherever the process dies, a whole one is found afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import save

from folio import files
from folio.checkpoints import checkpoint, find
from folio.records import run_folder

CHANGES = ("rename", "remove", "discard", "remove_empty", "sync", "sync_open")  # of the file system, in folio.files


class Killed(BaseException):
    """The process dies: nothing of the program catches this."""


def dying_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Dies before the change of this number, from 1 on; tells how many changes were begun."""
    count = 0

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise Killed
            change(*args)

        return changed

    for name in CHANGES:
        monkeypatch.setattr(files, name, dying(getattr(files, name)))
    return lambda: count


def replacements(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders in which the checkpoint of run a1 was being replaced by one of run b2: one for each place to die at."""
    number, complete = 0, False
    while not complete:
        number += 1
        out = tmp_path / str(number)
        save(out, 5, seed=0)
        with monkeypatch.context() as patch:
            begun = dying_at(number, patch)
            try:
                save(out, 5, run="b2", seed=seed)
                complete = begun() < number
            except Killed:
                pass
        yield out
    assert number > 8


@pytest.mark.parametrize("seed", [0, 1], ids=["the same tensors", "other tensors"])
def test_a_whole_checkpoint_is_there_after_any_death(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former one, and from some moment on the new one; the next run's start puts the folder in order."""
    runs = []
    for out in replacements(seed, tmp_path, monkeypatch):
        run_folder.hold(out).release()
        assert run_folder.steps(out) == [5]
        runs.append(checkpoint.verify(run_folder.checkpoint_folder(out, 5)).state["run"])
        assert not list(out.glob(f"checkpoints/*{run_folder.REPLACED}"))
        find.prune(out, 1)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert runs == sorted(runs)
    assert set(runs) == {"a1", "b2"}


def test_the_next_run_may_die_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it puts the folder in order; the run after it finds the same checkpoint."""
    for out in replacements(1, tmp_path, monkeypatch):
        for number in range(1, 5):
            with monkeypatch.context() as patch, suppress(Killed):
                dying_at(number, patch)
                run_folder._put_back_checkpoints(out)  # without the lock, which the kernel would release
        run_folder.hold(out).release()
        assert checkpoint.verify(run_folder.checkpoint_folder(out, 5)).state["run"] in ("a1", "b2")


def test_a_save_after_a_death_replaces_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out in replacements(1, tmp_path, monkeypatch):
        run_folder.hold(out).release()
        assert checkpoint.verify(save(out, 5, run="c3", seed=2)).state["run"] == "c3"
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_rename_that_fails_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = save(tmp_path, 5), files.rename

    def fail(source: Path, target: Path) -> None:
        if source.name.endswith(".unfinished") and source.is_dir():
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "rename", fail)
    with pytest.raises(OSError, match=r"step-00000005 could not be written \(Input/output error\): make room"):
        save(tmp_path, 5, run="b2", seed=1)
    assert checkpoint.verify(path).state["run"] == "a1"
    assert [path.name for path in path.parent.iterdir()] == ["step-00000005"]


def test_a_damaged_checkpoint_of_the_same_tensors_is_replaced_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint.verify(save(tmp_path, 5, run="c3")).state["run"] == "c3"


def test_reading_is_not_disturbed(tmp_path: Path) -> None:
    """Whoever opened the former checkpoint reads it to its end."""
    found = checkpoint.verify(save(tmp_path, 5))
    weights = dict(found.weights())
    save(tmp_path, 5, run="b2", seed=1)
    assert all(torch.equal(weights[name], weight) for name, weight in found.weights())
    assert json.loads((found.path / "state.json").read_text())["run"] == "b2"
