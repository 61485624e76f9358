"""A checkpoint is replaced by another of the same step: wherever the process dies, a whole one is found afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Outcome, tree
from small_checkpoints import save

from folio import files
from folio.checkpoints import checkpoint, find
from folio.records import run_folder

CHANGES = ("rename", "remove", "discard", "remove_empty", "sync", "sync_open")  # of the file system, in folio.files


class Killed(BaseException):
    """The process dies: the program never catches this."""


def dying_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Dies before change ``number``, counted from 1; returns a function that counts the changes begun."""
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
    """The former one, or after some change the new one; the start of the next run tidies the folder."""
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


@pytest.mark.parametrize("which", ["best", "latest", "5"])
def test_a_reader_finds_it_after_any_death(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the next run tidies the folder, and without writing to it, since a run may be training there."""
    aside = 0
    for out in replacements(1, tmp_path, monkeypatch):
        before = tree(out)
        found = find.choose(out, which)
        assert (found.step, found.state["run"] in ("a1", "b2")) == (5, True)
        found.model()
        latest, lines = find.latest(out, aside=False)
        assert (latest and latest.path, lines) == (found.path, [])
        assert tree(out) == before
        aside += found.path.name.startswith(".")
    assert aside == 1  # the death between the two renames


def test_commands_read_it_between_the_two_renames(folio: Callable[..., Outcome], story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick = ("--device=cpu", "--compile=False", f"--out_dir={out}")
    assert folio("train", *SMALL, *quick, f"--data_dir={story}", "--max_iters=2", "--eval_iters=1").code == 0
    files.rename(run_folder.checkpoint_folder(out, 2), run_folder.replaced_folder(out, 2))
    before = tree(out / "checkpoints")
    assert folio("sample", *quick, "--num_samples=1", "--max_new_tokens=3").code == 0
    assert folio("eval", *quick, "--checkpoint=2", "--eval_iters=1").code == 0
    assert folio("export", f"--out_dir={out}", f"--to={tmp_path / 'hf'}").code == 0
    assert folio("train", *quick, "--init_from=resume", "--eval_only").code == 0
    assert tree(out / "checkpoints") == before


def test_a_reader_never_sees_half_a_replacement(tmp_path: Path) -> None:
    """While one thread replaces the checkpoint again and again, another reads it."""
    save(tmp_path, 5)
    done = threading.Event()

    def replace() -> None:
        seed = 0
        while not done.is_set():
            save(tmp_path, 5, seed=(seed := 1 - seed))

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        assert all(find.choose(tmp_path, which).step == 5 for which in ["5", "latest"] * 50)
    finally:
        done.set()
        thread.join()


def test_the_next_run_may_die_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it tidies the folder; the run after it finds the same checkpoint."""
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


def test_an_open_checkpoint_stays_readable(tmp_path: Path) -> None:
    """The former checkpoint, once opened, is read to its end."""
    found = checkpoint.verify(save(tmp_path, 5))
    weights = dict(found.weights())
    save(tmp_path, 5, run="b2", seed=1)
    assert all(torch.equal(weights[name], weight) for name, weight in found.weights())
    assert json.loads((found.path / "state.json").read_text())["run"] == "b2"
