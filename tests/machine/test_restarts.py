"""A launcher restarts a job: the run resumes automatically, and ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from by_hand import by_hand_variables, free_port
from children import Spawn, group, reached, to_its_end
from conftest import require_posix
from launches import go, saved
from run_results import assert_same_bits, timeless

from folio.machine import launch
from folio.machine.runtime import Runtime
from folio.records import run_folder

require_posix()

STANDALONE = ("--standalone", "--nproc_per_node=3")
JOBS: list[launch.Job] = []  # the jobs of this process, whose groups must not be destroyed (see Ranks.close)


@pytest.mark.slow
@pytest.mark.parametrize("before_a_checkpoint", [False, True])
def test_a_group_resumes_automatically(
    spawn: Spawn, undisturbed: Callable[[str], Path], story: Path, tmp_path: Path, before_a_checkpoint: bool
) -> None:
    """Ranks are killed one after the other. The command line is always the same, and so are the final bits."""
    out = tmp_path / "out"
    flags = ("--init_from=scratch", "--check_replicas_every=9")
    child = spawn(*group(out, story, *flags, launcher=(*STANDALONE, "--max_restarts=2")), threads=1)
    for step, rank in ((7, 0), (24, 2)) if before_a_checkpoint else ((24, 1), (47, 0)):
        child.wait_until(lambda: reached(out, step)() and (step < 20 or run_folder.steps(out) != []))  # noqa: B023
        child.kill([sorted(child.family()[1:])[rank]])
    said = to_its_end(child)
    assert child.left() == []
    assert said.count(f"resuming {out} at step ") == (1 if before_a_checkpoint else 2)
    assert_same_bits(out, undisturbed("group"))
    aside = sorted(p.name for p in out.iterdir() if p.name.startswith("previous"))
    assert aside == (["previous-1"] if before_a_checkpoint else [])


@pytest.mark.slow
def test_launchers_of_two_machines_resume(spawn: Spawn, story: Path, tmp_path: Path) -> None:
    """One launcher counts the restart and the other does not; the processes still meet and resume their run."""
    out, port = tmp_path / "out", free_port()
    common = ("--nnodes=2", "--nproc_per_node=1", "--max_restarts=2", "--rdzv_id=9", "--rdzv_backend=c10d")
    launcher = (*common, f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1")
    flags = ("--init_from=scratch", "--gradient_accumulation_steps=2", "--log_interval=1")
    children = [spawn(*group(out, story, *flags, launcher=launcher), threads=1) for _ in range(2)]
    children[0].wait_until(lambda: reached(out, 24)() and run_folder.steps(out) != [])
    children[1].kill(children[1].family()[1:])
    said = "".join(to_its_end(child) for child in children)
    assert said.count(f"resuming {out} at step ") == 1
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(70))
    assert not (out / "previous-1").exists()


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets a launcher's variables for a job of one process, which dies in step ``dies_in``; job "" has no launcher."""
    update, stores = Runtime.step, {}

    def begin(job: str, restarts: int = 0, dies_in: int | None = None) -> None:
        JOBS.append(launch.Job())  # of a process that has just started
        monkeypatch.setattr(launch, "JOB", JOBS[-1])
        for name in (*by_hand_variables(0, 1, 0), "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        if job:
            if job not in stores:
                stores[job] = launch.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for name, value in by_hand_variables(0, 1, stores[job].port).items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        steps = count()

        def die(self: Runtime, *args: Any) -> Any:
            norm = update(self, *args)
            if next(steps) == dies_in:
                raise KeyboardInterrupt
            return norm

        monkeypatch.setattr(Runtime, "step", die)

    return begin


@pytest.mark.parametrize("begin", ["scratch", "another run"])
def test_a_restart_resumes_its_own_run(attempt: Callable[..., None], story: Path, tmp_path: Path, begin: str) -> None:
    """It does not start again from scratch, or from the other run's weights."""
    if begin == "another run":
        begin = str(tmp_path / "other")
        go(story, tmp_path / "other", "--seed=5")
    argv = (f"--init_from={begin}",)
    go(story, tmp_path / "undisturbed", *argv)
    for restarts, dies_in in enumerate((9, 1, None)):  # the second dies in step 9 too
        attempt("a", restarts, dies_in)
        if dies_in is None:
            go(story, tmp_path / "out", *argv)
        else:
            with pytest.raises(KeyboardInterrupt):
                go(story, tmp_path / "out", *argv)
    assert_same_bits(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / "out" / "previous-1").exists()


def test_a_count_of_restarts_is_enough(
    attempt: Callable[..., None], story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a store that has the run's id."""
    out = tmp_path / "out"
    attempt("", dies_in=9)
    with pytest.raises(KeyboardInterrupt):
        go(story, out)
    attempt("")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    go(story, out)
    assert not (out / "previous-1").exists()
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(12))


@pytest.mark.parametrize(("older", "restarts"), [("b", 1), ("b", 0), ("", 1)])
def test_a_run_of_an_older_job_is_not_resumed(
    attempt: Callable[..., None], story: Path, tmp_path: Path, older: str, restarts: int
) -> None:
    """Neither by a restart whose first attempt died before it owned the folder, nor by a first attempt."""
    out = tmp_path / "out"
    attempt(older, dies_in=9)
    with pytest.raises(KeyboardInterrupt):
        go(story, out)
    left = saved(out)
    attempt("a", restarts)
    go(story, out)
    assert saved(out / "previous-1") == left
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == list(range(12))
