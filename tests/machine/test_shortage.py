"""Out of memory: one line with options that need less, and no unfinished files."""

from __future__ import annotations

import mmap
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LINUX, NO_POSIX, SMALL, Outcome, assert_refused

from folio import cli
from folio.machine import shortage

resource = pytest.importorskip("resource", reason=NO_POSIX)
pytestmark = LINUX

Folio = Callable[..., Outcome]
TOO_MUCH: dict[str, Callable[[], Any]] = {
    "Python": lambda: bytearray(10**15),
    "numpy": lambda: np.empty(10**15),
    "torch": lambda: torch.empty(10**15),
    "torch, beyond 2⁶³": lambda: torch.empty(2**40, 2**40),
    "a mapping": lambda: mmap.mmap(-1, 10**15),
}


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Limits this process to so many bytes more than it has, as ``ulimit -v`` does."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("who", TOO_MUCH)
def test_every_kind_of_error_is_recognized(who: str) -> None:
    """The command line turns it into one line too."""
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised:
        TOO_MUCH[who]()
    assert shortage.is_shortage(raised.value)
    line = r"^out of memory while trying.*: do less$"
    with pytest.raises(ValueError, match=line), shortage.explained("trying", lambda: "do less"):
        TOO_MUCH[who]()
    code, line = cli._line_about(raised.value)  # type: ignore[arg-type]
    assert (code, "\n" in line, "Traceback" in line) == (2, False, False)


def test_other_errors_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), shortage.explained("adding", str):
        torch.zeros(2) + torch.zeros(3)
    with pytest.raises(FileNotFoundError), shortage.explained("reading", str):
        Path("nowhere").read_text()


def test_advice_that_runs_out_of_memory_too() -> None:
    with pytest.raises(ValueError, match="folio plan computes"), shortage.explained("x", TOO_MUCH["torch"]):
        TOO_MUCH["Python"]()


def test_the_room_is_at_most_the_limit() -> None:
    with little_memory(300_000_000):
        assert shortage.room(torch.device("cpu")) == resource.getrlimit(resource.RLIMIT_AS)[0]
    assert shortage.room(torch.device("cpu")) > 0


@pytest.mark.parametrize(
    "shape", [["--n_embd=100000", "--n_layer=1000"], ["--n_layer=500", "--n_embd=32768"]], ids=" ".join
)
def test_a_model_that_is_too_large(folio: Folio, story: Path, tmp_path: Path, shape: list[str]) -> None:
    """Also a model of many small parts, each of which the system grants, until it kills the process."""
    outcome = folio("train", *SMALL, *shape, f"--data_dir={story}", f"--out_dir={tmp_path / 'out'}")
    assert_refused(outcome, "out of memory while building the model", "parameters take", "--n_layer")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--total_batch_size=640000"]], ids=["accumulated", "total"])
def test_a_step_that_is_too_large(folio: Folio, story: Path, tmp_path: Path, flags: list[str]) -> None:
    """The line names a smaller batch that keeps the rows of a step."""
    small = [flag for flag in SMALL if not flag.startswith(("--batch_size", "--gradient"))]
    argv = ["train", *small, f"--data_dir={story}", "--max_iters=1", "--eval_iters=1", "--n_embd=64", *flags]
    argv += [] if flags else ["--gradient_accumulation_steps=1"]
    with little_memory(700_000_000):
        outcome = folio(*argv, "--batch_size=40000", f"--out_dir={tmp_path / 'out'}")
        assert_refused(
            outcome, "out of memory while training", "as folio plan computes it, a step needs", "--batch_size="
        )
        remedy = re.split("what fits: |to need less: ", outcome.err.rstrip())[1].split(", or ")[0]
        assert "gradient_accumulation_steps" not in remedy or not flags
    assert remedy
    size = int(shlex.split(remedy)[0].removeprefix("--batch_size="))
    assert 40000 % size == 0
    assert size < 40000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sample", "--num_samples=10000", "--max_new_tokens=1000000"], ["while sampling", "--num_samples"]),
        (["eval", "--batch_size=1000000"], ["while measuring", "--batch_size"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("sample", "eval") else "",
)
def test_commands_that_need_too_much(folio: Folio, finished: Path, argv: list[str], words: list[str]) -> None:
    with little_memory(300_000_000):
        outcome = folio(*argv, f"--out_dir={finished}", "--device=cpu", "--dtype=float32")
    assert_refused(outcome, "out of memory", *words)
