"""A signal at any moment: the process ends soon, with 128 plus the signal's number, and the next start continues."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from by_hand import by_hand_variables, free_port
from children import Child, Spawn, reached, to_its_end
from conftest import LINUX, SMALL, require_posix
from run_results import timeless
from torture.faulty import SCRIPT

from folio.checkpoints import find
from folio.records import run_folder

require_posix()
pytestmark = pytest.mark.slow

SOON = 10.0  # seconds in which a tiny run must end
RUN = [*SMALL, "--init_from=auto", "--log_interval=1", "--dropout=0.1", "--learning_rate=1e-2"]
# Trains; ``fault`` replaces a function before
FAULTY = """
import sys, time
from folio import cli
from folio.training import loop
{fault}
cli.main("train")
"""
SLOW = """
from itertools import count
calls, micro_step = count(), loop.micro_step
def slow(*args):
    time.sleep(1 if next(calls) >= {calls} else 0)
    return micro_step(*args)
loop.micro_step = slow
"""


def faulty(fault: str) -> list[str]:
    return ["-c", FAULTY.replace("{fault}", fault)]


@pytest.fixture
def run(story: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The options of a run into a folder of this name."""
    return lambda name, *flags: [*RUN, *flags, f"--data_dir={story}", f"--out_dir={tmp_path / name}"]


def ends_soon(child: Child, pid: int, number: signal.Signals, code: int) -> str:
    """Sends a signal, checks how the process ends and how soon, and returns its output."""
    began = time.monotonic()
    child.kill([pid], number)
    assert child.end(60) == code, child.output()
    assert time.monotonic() - began < SOON, child.output()
    assert "Traceback" not in child.output()
    return child.output()


CODES = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 128 + signal.SIGUSR1)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_training(
    spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """While rank 0 waits, in C code, for a rank that never starts; it removes its lock and its new folder."""
    child = spawn("train.py", *run("out"), threads=1, **by_hand_variables(0, 2, free_port()))
    child.wait_until((tmp_path / "out").exists)
    time.sleep(1)
    said = ends_soon(child, child.process.pid, number, code)
    assert said.count("\n") == 1, said
    assert ("interrupted" if number == signal.SIGINT else number.name) in said
    assert not (tmp_path / "out").exists()


def test_before_training_as_the_first_process_of_a_container(
    spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The kernel ignores a signal to process 1 unless the program handles it."""
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs unshare and user namespaces")
    child = spawn("train.py", *run("out"), threads=1, before=inside, **by_hand_variables(0, 2, free_port()))
    child.wait_until((tmp_path / "out").exists)
    time.sleep(1)
    ends_soon(child, child.family()[1], signal.SIGTERM, 143)
    assert not (tmp_path / "out").exists()


@LINUX
@pytest.mark.parametrize("after", [0, 0.5])
@pytest.mark.parametrize(("number", "code"), CODES[:2])
def test_while_it_starts(
    spawn: Spawn, run: Callable[..., list[str]], number: signal.Signals, code: int, after: float
) -> None:
    """While torch is imported."""
    child = spawn("train.py", *run("out", "--max_iters=100000"), threads=1)
    child.wait_until(lambda: "torch" in Path(f"/proc/{child.process.pid}/maps").read_text())
    time.sleep(after)
    ends_soon(child, child.process.pid, number, code)


def test_while_it_compiles(spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path) -> None:
    """With a compiler that takes 20 s; the next start, without it, trains."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path / 'compiling'}\nexec sleep 20\n")
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    child = spawn("train.py", *run("out"), "--compile=True", threads=1, **env)
    child.wait_until((tmp_path / "compiling").exists)
    assert "SIGTERM: ended at once" in ends_soon(child, child.process.pid, signal.SIGTERM, 143)
    to_its_end(spawn("train.py", *run("out"), threads=1))


@pytest.mark.parametrize(("number", "code"), CODES)
def test_while_it_only_evaluates(
    spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Nothing is saved, since nothing is new."""
    large = ["--eval_iters=9999", "--n_embd=256", "--n_layer=4", "--batch_size=1"]
    child = spawn("train.py", *run("out", "--eval_only", *large), threads=1)
    child.wait_until(lambda: "device cpu" in child.output())
    time.sleep(0.5)
    ends_soon(child, child.process.pid, number, code)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("interval", "number", "code"), [(4, *CODES[0]), (3, *CODES[1])])
def test_between_two_micro_steps(
    spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path, interval: int, number: signal.Signals, code: int
) -> None:
    """Of a long step, which is not finished: the step before is saved, and its evaluation is not made twice."""
    flags = [f"--eval_interval={interval}", "--gradient_accumulation_steps=20"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    to_its_end(spawn("train.py", *run("whole", *flags), threads=1))
    child = spawn(*faulty(SLOW.format(calls=4 * 20 + 1)), *run("out", *flags), threads=1)
    child.wait_until(reached(out, 2))  # step 3 is made, and its line comes with step 4
    time.sleep(2)
    said = ends_soon(child, child.process.pid, number, code)
    assert f"\nstep 4 of 10 ({number.name})" in said
    assert run_folder.steps(out)[-1] == 4
    assert [r["step"] for r in timeless(out) if r["kind"] == "train"] == [0, 1, 2, 3]
    assert find.choose(out, "latest").state["owed"] == []
    assert f"resuming {out} at step 4" in to_its_end(spawn("train.py", *run("out", *flags), threads=1))
    assert timeless(out) == timeless(whole)
    last = [(run_folder.checkpoint_folder(folder, 10) / "model.safetensors").read_bytes() for folder in (out, whole)]
    assert last[0] == last[1]


def test_between_two_micro_steps_of_one_rank(spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Only the second rank gets the signal; both leave after the same micro step, before the update."""
    flags = ["--eval_interval=3", "--gradient_accumulation_steps=40"]
    whole, out = tmp_path / "whole", tmp_path / "out"

    def both(name: str, *script: str) -> list[Child]:
        port = free_port()
        words = [*(script or ["train.py"]), *run(name, *flags)]
        return [spawn(*words, threads=1, **by_hand_variables(rank, 2, port)) for rank in (0, 1)]

    for child in both("whole"):
        to_its_end(child)
    first, second = both("out", *faulty(SLOW.format(calls=4 * 20 + 1)))
    first.wait_until(reached(out, 2))
    time.sleep(2)
    ends_soon(second, second.process.pid, signal.SIGTERM, 143)
    assert first.end(SOON) == 143
    assert "\nstep 4 of 10 (SIGTERM)" in first.output()
    assert run_folder.steps(out)[-1] == 4
    for child in both("out"):
        to_its_end(child)
    assert timeless(out) == timeless(whole)


def test_a_second_interrupt_of_a_rank_that_waits(spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path) -> None:
    """In C code, for another rank that hangs: it exits at once and releases its lock."""
    out, port = tmp_path / "out", free_port()
    words = ["train.py", *run("out", "--max_iters=100000")]
    first, second = [spawn(*words, threads=1, **by_hand_variables(rank, 2, port)) for rank in (0, 1)]
    first.wait_until(reached(out, 7))
    second.kill([second.process.pid], signal.SIGSTOP)
    time.sleep(0.5)
    first.kill([first.process.pid], signal.SIGINT)
    time.sleep(0.5)
    assert first.process.poll() is None
    first.kill([first.process.pid], signal.SIGINT)
    assert first.end(SOON) == 130
    assert "Traceback" not in first.output()
    run_folder.hold(out).release()


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_second_interrupt_while_a_checkpoint_is_written(
    spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path, meanwhile: bool
) -> None:
    """To a disk that hangs, by the main thread or another one."""
    flags = ["--eval_interval=3", f"--async_checkpoint={meanwhile}"]
    hangs = (str(SCRIPT), "write_with */model.safetensors 1 hang", "train")
    child = spawn(*hangs, *run("out", *flags, "--max_iters=100000"), threads=1)
    child.wait_until(lambda: any(tmp_path.glob("out/checkpoints/.*.unfinished")))
    for _ in range(2):
        time.sleep(0.5)
        child.kill([child.process.pid], signal.SIGINT)
    assert child.end(SOON) == 130
    assert "Traceback" not in child.output()
    assert run_folder.steps(tmp_path / "out") == []
    to_its_end(spawn("train.py", *run("out", *flags), threads=1))


def test_a_forked_child_dies_of_a_signal(spawn: Spawn, run: Callable[..., list[str]], tmp_path: Path) -> None:
    """Such as a library's worker; the run does not handle the signal as one to itself."""
    fork = (
        "import os, signal\nmicro_step = loop.micro_step\nforked = []\n"
        "def once(*args):\n"
        "    if not forked:\n"
        "        forked.append(os.fork())\n"
        "        if not forked[0]:\n"
        "            time.sleep(600)\n"
        "        time.sleep(0.2)\n"
        "        os.kill(forked[0], signal.SIGTERM)\n"
        "        assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == -signal.SIGTERM\n"
        "    return micro_step(*args)\n"
        "loop.micro_step = once"
    )
    assert "SIGTERM" not in to_its_end(spawn(*faulty(fork), *run("out"), threads=1))
