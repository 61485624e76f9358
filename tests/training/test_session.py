"""A run in a program: built, trained in pieces, used in between; it holds its folder only while it trains or saves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tree
from run_results import assert_same_bits, records
from small_runs import TINY

import folio
from folio.checkpoints import checkpoint
from folio.locks import InUseError
from folio.records import run_folder
from folio.training import loop

Build = Callable[..., folio.Run]
LOCK = ".folio.lock"
RESUMABLE = {**TINY, "dropout": 0.1, "learning_rate": 1e-2, "eval_interval": 4, "max_iters": 12}

# Trains twice, the first time until a signal comes to rank 0 in the middle of a step
CUT = """
import os, signal, sys
from itertools import count
import folio
from folio.training import loop
micro_step, calls = loop.micro_step, count(1)
def disturbed(*args):
    if next(calls) == int(sys.argv[1]) and os.environ["RANK"] == "0":
        signal.raise_signal(signal.SIGINT)
    return micro_step(*args)
loop.micro_step = disturbed
with folio.build(**{options!r}, gradient_accumulation_steps=4) as run:
    why = folio.fit(run)
    print(why, folio.fit(run) if why == "SIGINT" else "", run.generate(num_samples=1, max_new_tokens=3))
try:
    run.evaluate()
except ValueError as error:
    print(error)
"""


@pytest.fixture
def build(story: Path, tmp_path: Path) -> Build:
    """Builds a small run into a folder of this name."""
    torch.set_num_threads(1)
    return lambda name, **options: folio.build(
        **{**RESUMABLE, "data_dir": story, "out_dir": tmp_path / name, **options}
    )


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets Ctrl-C come in the micro steps of these numbers, from 1; a step has two."""

    def at(*numbers: int) -> None:
        micro_step, calls = loop.micro_step, count(1)

        def disturbed(*args: Any) -> Any:
            if next(calls) in numbers:
                signal.raise_signal(signal.SIGINT)
            return micro_step(*args)

        monkeypatch.setattr(loop, "micro_step", disturbed)

    return at


@pytest.fixture
def whole(build: Build) -> folio.Run:
    """A run that was never stopped, in a folder of its own."""
    run = build("whole")
    assert folio.fit(run) == "max_iters"
    return run


# A step in the middle, the first micro step after an evaluation, and the last one
@pytest.mark.parametrize("numbers", [(7,), (8, 15), (9, 10), (24,)])
def test_fit_continues_to_the_same_bits(
    build: Build, whole: folio.Run, interrupt: Callable[..., None], tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    """Stopped in the middle of a step, and at its end; and used in between, which changes nothing."""
    interrupt(*numbers)
    run = build("cut")
    for _ in numbers:
        assert folio.fit(run) == run.stop in ("SIGINT", "max_iters")
        assert not (tmp_path / "cut" / LOCK).exists()
        run.generate("The", num_samples=1, max_new_tokens=3)
        run.evaluate(eval_iters=1)
        assert run.save() == run_folder.checkpoint_folder(run.out_dir, run.state.step)
    assert folio.fit(run) == "max_iters"
    assert run.state == whole.state.__class__(**{**vars(whole.state), "seconds": run.state.seconds})
    for step in set(run_folder.steps(run.out_dir)) - set(run_folder.steps(whole.out_dir)):
        run_folder.remove_checkpoint(run_folder.checkpoint_folder(run.out_dir, step))
    assert_same_bits(run.out_dir, whole.out_dir)


def test_one_line_says_how_to_go_on(
    build: Build, interrupt: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(7)
    run = build("out")
    folio.fit(run)
    assert "step 3 of 12 (SIGINT), folio.fit(run) continues it" in capsys.readouterr().out.splitlines()[-1]


def test_a_complete_run_returns_at_once(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    run = build("out")
    folio.fit(run)
    before = tree(run.out_dir)
    capsys.readouterr()
    assert folio.fit(run) == "max_iters"
    assert capsys.readouterr().out == "nothing to do: the run is at step 12: raise --max_iters=12 above that\n"
    assert tree(run.out_dir) == before


def test_a_run_that_is_only_built_leaves_no_trace(build: Build, tmp_path: Path) -> None:
    """It neither makes nor holds the folder, so that the same cell of a notebook can run again."""
    first = build("out")
    assert first.state.step == 0
    assert len(first.generate(num_samples=2, max_new_tokens=3)) == 2
    assert not (tmp_path / "out").exists()
    second = build("out")
    folio.fit(second)
    with pytest.raises(
        ValueError, match="is not as this run left it, since another run was there: build the run again"
    ):
        folio.fit(first)
    assert records(second.out_dir, "eval", "step") == [0, 4, 8, 12]


def test_a_folder_that_another_run_has_changed(build: Build, interrupt: Callable[..., None]) -> None:
    """A run that was stopped does not continue over what another one has done since."""
    interrupt(7)
    run = build("out")
    folio.fit(run)
    folio.train(out_dir=run.out_dir, init_from="resume", max_iters=5)
    before = tree(run.out_dir)
    for call in (folio.fit, folio.Run.save):
        with pytest.raises(ValueError, match="another run was there"):
            call(run)
    assert tree(run.out_dir) == before


def test_it_holds_the_folder_while_it_trains(build: Build) -> None:
    held = []

    def other(run: folio.Run) -> None:
        with pytest.raises(InUseError, match="another run trains there"):
            build("out", init_from="resume")
        held.append((run.out_dir / LOCK).exists())

    def itself(run: folio.Run) -> None:
        with pytest.raises(ValueError, match="a callback cannot train it"):
            folio.fit(run)

    run = build("out", callbacks=[(6, itself), (6, other)])
    assert repr(run) == f"<Run {run.out_dir}: step 0 of 12>"
    folio.fit(run)
    assert held == [True, True, True]
    assert repr(run) == f"<Run {run.out_dir}: step 12 of 12, max_iters>"
    assert not (run.out_dir / LOCK).exists()


def test_max_minutes_counts_for_each_call(build: Build) -> None:
    """From its beginning, not from when the run was built."""
    run = build("out", max_minutes=10)
    run.clock.deadline = 0.0  # the limit of the time before has passed
    assert folio.fit(run) == "max_iters"


def test_the_seconds_leave_out_the_time_between(
    build: Build, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(7)
    run = build("out", log_interval=1)
    folio.fit(run)
    clock = loop.time.perf_counter
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock() + 1000)
    folio.fit(run)
    assert max(records(run.out_dir, "train", "seconds")) < 500


def test_save(build: Build) -> None:
    """At any step, also before the first; the model is that of the run."""
    run = build("out")
    for _ in range(2):
        found = checkpoint.verify(run.save())
        assert found.step == run.state.step
        for p, q in zip(found.model().parameters(), run.model.parameters(), strict=True):
            assert torch.equal(p, q)
        folio.fit(run)
    again = folio.train(out_dir=run.out_dir, init_from="resume", max_iters=13)
    assert (again.begun, again.state.step) == (12, 13)


def test_save_in_a_callback(build: Build, whole: folio.Run) -> None:
    """The checkpoint is there after the work of its step, and changes nothing."""
    saved = []

    def keep(run: folio.Run) -> None:
        saved.append(run.save())

    run = build("out", callbacks=[(lambda run: run.state.step == 6, keep)], keep_checkpoints=9)
    folio.fit(run)
    assert saved == [run_folder.checkpoint_folder(run.out_dir, 6)]
    assert checkpoint.verify(saved[0]).state["owed"] == []
    assert run_folder.steps(run.out_dir) == [4, 6, 8, 12]
    resumed = folio.train(out_dir=run.out_dir, init_from="resume", max_iters=12)
    assert resumed.state.val_loss == whole.state.val_loss


def test_after_an_error_only_a_checkpoint_continues(build: Build) -> None:
    """Since the error may have come in the middle of an update; files and lock are released."""

    def broken(run: folio.Run) -> None:
        raise KeyError("mine")

    run = build("out", callbacks=[(lambda run: run.state.step == 6, broken)])
    with pytest.raises(KeyError, match="mine"):
        folio.fit(run)
    assert not (run.out_dir / LOCK).exists()
    for call in (folio.fit, folio.Run.save):
        with pytest.raises(
            ValueError, match=r"KeyError ended this run at step 6: build it again, .* which continues from step 4"
        ):
            call(run)
    assert len(run.generate(num_samples=1, max_new_tokens=3)) == 1
    assert folio.train(out_dir=run.out_dir, init_from="resume").begun == 4


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes(story: Path, tmp_path: Path, parallel: str) -> None:
    """The same, where ranks keep gradients that they have not exchanged; a closed run says what it needs."""
    said = []
    for name, number in (("whole", 0), ("out", 14)):
        options = {**RESUMABLE, "data_dir": str(story), "out_dir": str(tmp_path / name), "parallel": parallel}
        del options["gradient_accumulation_steps"]
        (tmp_path / "script.py").write_text(CUT.replace("{options!r}", repr(options)))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(tmp_path / "script.py"), str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "SIGINT max_iters" in said[1]
    assert "this run is closed" in said[1]
    models = [run_folder.checkpoint_folder(tmp_path / name, 12) / "model.safetensors" for name in ("whole", "out")]
    assert models[0].read_bytes() == models[1].read_bytes()
