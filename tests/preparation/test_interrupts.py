"""A signal ends a preparation with its workers, and the same command continues."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import preparing
import pytest
from children import Spawn, to_its_end
from conftest import LINUX
from preparing import gone, large, tree, until

pytestmark = [
    LINUX,
    pytest.mark.slow,
]

_places = preparing._places
articles = preparing.articles
MOMENTS = [0, 0.1, 0.2, 0.4, 0.8, 1.5]  # seconds after the start


def test_a_signal_to_all_processes(spawn: Spawn, articles: list[str], tmp_path: Path) -> None:
    """As a terminal or a scheduler sends it: all end soon, without a traceback."""
    source = large(tmp_path / "source", "jsonl", articles, 12)
    argv = ["-m", "folio", "prepare", str(source), "--workers=2", "--name=x"]
    to_its_end(spawn(*argv, f"--data_dir={tmp_path / 'new'}"))
    for number in (signal.SIGINT, signal.SIGTERM):
        for moment in MOMENTS:
            child = spawn(*argv, f"--data_dir={tmp_path / 'out'}")
            numbers = Path(f"/proc/{child.process.pid}/maps")  # of numpy, which the command imports
            child.wait_until(lambda: "multiarray" in numbers.read_text())  # noqa: B023
            time.sleep(moment)
            family = set(child.family())
            os.killpg(child.process.pid, number)
            assert child.end(20) in (128 + number, -number), child.output()
            until(gone, family, timeout=20)
            assert "Traceback" not in child.output(), (number, moment, child.output())
            assert child.output().count("interrupted") <= 1
    to_its_end(spawn(*argv, f"--data_dir={tmp_path / 'out'}"))
    assert tree(tmp_path / "out") == tree(tmp_path / "new")
