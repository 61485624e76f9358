"""A run that is killed anywhere and resumed ends in the same bits as an uninterrupted one."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Spawn, alone, group, reached, to_its_end
from conftest import SMALL, require_posix
from run_results import assert_same_bits, timeless

from folio import cli
from folio.checkpoints import find
from folio.commands import train
from folio.machine.runtime import Runtime
from folio.records import run_folder
from folio.training import start

require_posix()


@pytest.mark.slow
def test_killed_at_three_moments(spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    """SIGKILL before the first checkpoint, between two, and late; every time the same command resumes."""
    out = tmp_path / "out"
    for step in (7, 93, 171):
        child = spawn(*alone(out, story))
        child.wait_until(reached(out, step))
        child.kill()
        assert child.end() == -signal.SIGKILL
    assert f"resuming {out} at step " in child.output()
    said = to_its_end(spawn(*alone(out, story)))
    assert f"resuming {out} at step " in said
    assert "exact to rounding" not in said
    assert_same_bits(out, undisturbed("alone"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1)],
)
def test_signals_save_first(
    spawn: Spawn,
    undisturbed: Callable[[str], Path],
    story: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    """The step is finished and saved, the exit code names the signal, and the run resumes exactly from there."""
    out = tmp_path / "out"
    child = spawn(*alone(out, story))
    child.wait_until(reached(out, 66))
    child.kill([child.process.pid], number)
    assert child.end() == code
    step = run_folder.steps(out)[-1]
    assert step > 66
    assert f"step {step} of 230 ({number.name}), folio train --init_from=resume --out_dir=" in child.output()
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(step))
    assert f"resuming {out} at step {step}" in to_its_end(spawn(*alone(out, story)))
    assert timeless(out) == timeless(undisturbed("alone"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (run_folder.checkpoint_folder(folder, 230) / name for folder in (out, undisturbed("alone")))
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_a_hangup_that_nohup_ignores(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = spawn(*alone(out, story), before=["nohup"])
    child.wait_until(reached(out, 20))
    child.kill([child.process.pid], signal.SIGHUP)
    assert "step 230 of 230" in to_its_end(child)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["alone", "first rank", "last rank"])
def test_a_signal_in_a_long_evaluation(spawn: Spawn, story: Path, tmp_path: Path, who: str) -> None:
    """To any rank: all ranks abandon it at once and save the step; the resumed run makes the evaluation."""
    out = tmp_path / "out"
    flags = ["--eval_interval=6", "--log_interval=1", "--n_embd=256", "--n_layer=4", "--batch_size=1"]
    argv = [*(alone(out, story) if who == "alone" else group(out, story)), *flags]
    to_its_end(spawn(*argv, "--max_iters=6", "--eval_iters=1", threads=1))
    child = spawn(*argv, "--max_iters=12", "--eval_iters=9999", threads=1)
    child.wait_until(reached(out, 11))
    time.sleep(0.3)  # into the evaluation at the end
    ranks = [child.process.pid] if who == "alone" else sorted(child.family()[1:])
    began = time.monotonic()
    child.kill([ranks[-1 if who == "last rank" else 0]], signal.SIGTERM)
    assert child.end(60) == (143 if who == "alone" else 1), child.output()
    assert time.monotonic() - began < 20
    assert "step 12 of 12 (SIGTERM)" in child.output()
    assert find.choose(out, "latest").state["owed"] == ["eval"]
    assert "step 12: train loss" in to_its_end(spawn(*argv, "--max_iters=12", "--eval_iters=1", threads=1))
    assert find.choose(out, "latest").state["owed"] == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_the_last_step(story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The run, or the one that resumes it, makes the same last evaluation as an uninterrupted one."""
    torch.set_num_threads(1)
    argv = [*SMALL, f"--data_dir={story}", "--learning_rate=1e-2", "--max_iters=7", "--init_from=auto"]

    def go(out: Path) -> int:
        return train.main(cli.parse(train.Options, [*argv, f"--out_dir={out}"], "folio train", files=True))

    assert go(tmp_path / "undisturbed") == 0
    build, update = start.build, Runtime.step

    def disturbed(config: Any) -> Any:
        run = build(config)

        def last(self: Runtime, *args: Any) -> Any:
            norm = update(self, *args)
            if run.state.step == 6:
                run.signal = name
            return norm

        monkeypatch.setattr(Runtime, "step", last)
        return run

    monkeypatch.setattr(start, "build", disturbed)
    go(tmp_path / "out")
    monkeypatch.undo()
    assert go(tmp_path / "out") == 0
    assert timeless(tmp_path / "out") == timeless(tmp_path / "undisturbed")


# Three processes


@pytest.mark.slow
def test_a_group_that_is_killed(spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path) -> None:
    """All three ranks at once, then one, after which the launcher ends the others: resuming stays exact."""
    out = tmp_path / "out"
    child = spawn(*group(out, story), threads=1)
    child.wait_until(reached(out, 24))
    family = child.family()
    assert len(family) == 4
    child.kill(family)
    assert child.end() == -signal.SIGKILL
    child = spawn(*group(out, story), threads=1)
    child.wait_until(reached(out, 47))
    child.kill(child.family()[-1:])
    assert child.end() != 0
    assert (kept := run_folder.steps(out)[-1]) in (35, 40)  # the later one may not have been written yet
    said = to_its_end(spawn(*group(out, story), threads=1))
    assert f"resuming {out} at step {kept}" in said
    assert "exact to rounding" not in said
    assert_same_bits(out, undisturbed("group"))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["launcher", "first rank", "last rank"])
def test_a_group_that_is_asked_to_end(
    spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path, who: str
) -> None:
    """SIGTERM to the launcher or to any one rank: all leave after the same step, with a checkpoint of it."""
    out = tmp_path / "out"
    child = spawn(*group(out, story), threads=1)
    child.wait_until(reached(out, 5))
    launcher, *ranks = child.family()
    child.wait_until(reached(out, 28))
    child.kill([{"launcher": launcher, "first rank": min(ranks), "last rank": max(ranks)}[who]], signal.SIGTERM)
    assert child.end(60) != 0
    step = run_folder.steps(out)[-1]
    assert 28 < step < 70
    assert f"step {step} of 70 (SIGTERM), folio train --init_from=resume --out_dir=" in child.output()
    assert f"resuming {out} at step {step}" in to_its_end(spawn(*group(out, story), threads=1))
    assert timeless(out) == timeless(undisturbed("group"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (run_folder.checkpoint_folder(folder, 70) / name for folder in (out, undisturbed("group")))
        assert a.read_bytes() == b.read_bytes()
