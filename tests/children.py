"""Starts runs in processes of their own, watches them and kills them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL

from folio.records.metrics import read_metrics

RUN = [*SMALL, "--init_from=auto", "--dropout=0.1", "--learning_rate=1e-2", "--checkpoint_interval=20"]
ALONE = [*RUN, "--max_iters=230", "--lr_decay_iters=230", "--eval_interval=50", "--log_interval=1"]
# more than one of DDP's buckets, and rows that three processes can share
GROUP = [*RUN, "--max_iters=70", "--lr_decay_iters=70", "--eval_interval=35", "--n_embd=160"]
GROUP += ["--gradient_accumulation_steps=3"]

Spawn = Callable[..., "Child"]


class Child:
    """A Python process in its own session, with its output; ``before`` are words before Python on its command line."""

    def __init__(self, argv: list[str], log: Path, threads: int, before: Sequence[str] = (), **more: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        self.log = log
        self.out = next((word for word in argv if word.startswith("--out_dir=")), "")
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*before, sys.executable, *argv],
                cwd=ROOT,
                env=env | more,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def family(self) -> list[int]:
        """The ids of this process and its children, which may have sessions of their own."""
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
        return [self.process.pid, *(pid for pid, parent in pairs if parent == self.process.pid)]

    def left(self) -> list[int]:
        """The ids of all processes with this one's out_dir, children or not."""
        table = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout
        rows = (line.split() for line in table.splitlines())
        return [int(pid) for pid, *words in rows if self.out and self.out in words]

    def kill(self, pids: list[int] | None = None, number: int = signal.SIGKILL) -> None:
        for pid in self.family() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, true: Callable[[], bool], timeout: float = 120) -> None:
        """Polls until the condition is true; fails if the process ends before."""
        end = time.monotonic() + timeout
        while not true():
            assert self.process.poll() is None, f"the process ended before:\n{self.output()}"
            assert time.monotonic() < end, f"not within {timeout} s:\n{self.output()}"
            time.sleep(0.002)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts processes, and kills those that are left after the test."""
    children: list[Child] = []

    def start(*argv: str, threads: int = 2, **how: Any) -> Child:
        children.append(Child(list(argv), tmp_path / f"log-{len(children)}.txt", threads, **how))
        return children[-1]

    yield start
    for child in children:
        if child.process.poll() is None:
            child.kill()
            child.end()
        child.kill(child.left())


def to_its_end(child: Child) -> str:
    assert child.end() == 0, child.output()
    return child.output()


@pytest.fixture(scope="session")
def undisturbed(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run, of one process ("alone") or three ("group"); each is run once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def made(which: str) -> Path:
        out = folder / which
        if not out.exists():
            argv = alone(out, story) if which == "alone" else group(out, story)
            to_its_end(Child(argv, folder / f"{which}.txt", 2 if which == "alone" else 1))
        return out

    return made


def alone(out: Path, data: Path) -> list[str]:
    return ["-m", "folio", "train", *ALONE, f"--data_dir={data}", f"--out_dir={out}"]


def group(
    out: Path,
    data: Path,
    *flags: str,
    launcher: Sequence[str] = ("--standalone", "--nproc_per_node=3"),
    script: Sequence[object] = ("train.py",),
) -> list[str]:
    """The command of a run on three ranks, or as the launcher's options say; by ``train.py`` or another script."""
    command = ["-m", "torch.distributed.run", *launcher, *map(str, script)]
    return [*command, *GROUP, *flags, f"--data_dir={data}", f"--out_dir={out}"]


def reached(out: Path, step: int) -> Callable[[], bool]:
    """A function that tells whether a run has written its train line of this step."""

    def look() -> bool:
        lines = []
        with contextlib.suppress(FileNotFoundError):  # before a run begins, and while one begins anew
            lines = read_metrics(out / "metrics.jsonl")
        return any(r["kind"] == "train" and r["step"] >= step for r in lines)

    return look
