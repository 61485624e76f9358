"""Checkpoints that are written while training continues."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Spawn, group, reached, to_its_end
from conftest import Outcome, assert_refused, require_posix
from launches import RUN, go, said_at_its_end, saved
from run_results import assert_same_bits, timeless
from torture.faulty import SCRIPT

from folio.checkpoints import checkpoint
from folio.records import run_folder

require_posix()


@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_checkpoint_that_is_written_slowly(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: bool
) -> None:
    """Training continues, or waits; either way the checkpoint is of the step in its name."""
    flags = ("--keep_checkpoints=9", f"--async_checkpoint={meanwhile}")
    go(story, tmp_path / "fast", "--keep_checkpoints=9", "--async_checkpoint=False")
    out, save, continued = tmp_path / "slow", checkpoint.save, []

    def slowly(*args: Any) -> None:
        before = len(timeless(out))
        time.sleep(0.5)
        continued.append(len(timeless(out)) > before)
        save(*args)

    monkeypatch.setattr(checkpoint, "save", slowly)
    go(story, out, *flags)
    assert continued == [meanwhile, meanwhile, False]  # the run waits for the last one
    assert run_folder.steps(out) == [4, 8, 12]
    assert saved(out) == saved(tmp_path / "fast")
    assert timeless(out) == timeless(tmp_path / "fast")
    for step in (4, 8, 12):
        slow, fast = (
            json.loads((run_folder.checkpoint_folder(folder, step) / "state.json").read_text())
            for folder in (out, tmp_path / "fast")
        )
        for state in (slow, fast):
            state |= {"run": "", "seconds": 0}
            del state["sha256"]["state.json"]  # a hash of these fields too
        assert slow == fast


@pytest.mark.parametrize(("fails", "kept"), [(4, [8, 12]), (8, [4, 12]), (12, [4, 8])])
def test_a_write_that_fails_in_the_thread(
    folio: Callable[..., Outcome],
    story: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
    kept: list[int],
) -> None:
    """A warning says so and the run continues, or ends after its last one; other checkpoints stay as they are."""
    out, save_file = tmp_path / "out", checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == run_folder.OPTIMIZER and path.parent.name == f".step-{fails:08d}.unfinished":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    outcome = folio("train", *RUN, f"--data_dir={story}", f"--out_dir={out}", "--async_checkpoint=True")
    if fails == 12:
        assert_refused(outcome, run_folder.checkpoint_folder(out, fails), "No space left", "--out_dir")
    else:
        assert outcome.code == 0
        assert f"warning: step {fails} could not be saved (No space left on device): training continues" in outcome.out
    assert run_folder.steps(out) == kept
    assert all(checkpoint.verify(run_folder.checkpoint_folder(out, step)) for step in kept)
    saved(out)
    assert timeless(out)[-1]["step"] == 12


@pytest.mark.slow
def test_a_failed_write_ends_all_ranks(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """Every write fails on rank 0. Training continues after the first, and all ranks end after the last."""
    out = tmp_path / "out"
    script = (SCRIPT, "write_with */model.safetensors 1+ ENOSPC", "train")
    said = said_at_its_end(spawn(*group(out, story, script=script), threads=1))
    assert len(said) == 1, said
    assert said[0].startswith(f"folio: {run_folder.checkpoint_folder(out, 70)} could not be written")
    assert saved(out) == {}
    assert timeless(out)[-1]["step"] == 70


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written(
    spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path
) -> None:
    """The run resumes from the previous checkpoint, which was written while training was steps ahead."""
    out = tmp_path / "out"
    script = (SCRIPT, "sync checkpoints/.step-00000040.unfinished 1 hang", "train")
    child = spawn(*group(out, story, "--log_interval=1", script=script), threads=1)
    unfinished = out / "checkpoints" / ".step-00000040.unfinished"
    child.wait_until(lambda: unfinished.exists() and reached(out, 44)())
    child.kill()
    assert child.end() == -signal.SIGKILL
    assert unfinished.exists()
    assert run_folder.steps(out) == [20, 35]
    said = to_its_end(spawn(*group(out, story, "--log_interval=1"), threads=1))
    assert f"resuming {out} at step 35" in said
    assert_same_bits(out, undisturbed("group"))
