"""Runs that are killed at random moments end as undisturbed ones; more kills: ``make torture KILLS=1000``."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, python, require_posix
from torture import disturbing
from torture.disturbing import go, whole
from torture.starts import RUNS, Server, results

from folio.records import run_folder

require_posix()

server = disturbing.server
undisturbed = disturbing.undisturbed


def tortured(*argv: str) -> tuple[int, str]:
    done = python("-m", "torture", *argv, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()[-1]


MOMENTS = [  # and the newest checkpoint that counts then; each process begins at the one before
    ("write_with .step-00000010.unfinished/optimizer.safetensors 1 kill", 5),  # which step 10 lacks
    ("write_with .step-00000010.unfinished/model.safetensors 1 half", 5),
    ("rename checkpoints/step-00000010 1 kill", 5),  # all of its files are there
    ("sync out/checkpoints 1 kill", 10),  # it is renamed, and nothing else is done
    ("open_to_write out/.best.json.unfinished 1 kill", 15),
    ("rename checkpoints/.step-*.gone 1 kill", 20),  # nothing old is gone yet
    ("remove checkpoints/.step-*.gone 2 half", 25),  # half of it is
    ("write_to out/metrics.jsonl 3 half", 25),
]


def test_killed_within_a_checkpoint(server: Server, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """While files are written, before they count, after that, before and after pruning, and in a line."""
    out = tmp_path / "out"
    for fault, kept in MOMENTS:
        assert go(server, "alone", out, fault).codes == [-signal.SIGKILL], fault
        assert run_folder.steps(out)[-1] == kept, fault
    assert go(server, "alone", out).codes == [0]
    assert whole(out)[-2:] == [25, 30]
    assert results(RUNS["alone"], out) == undisturbed["alone"]


@pytest.mark.slow
def test_twenty_kills() -> None:
    code, line = tortured("--kills=20", "--seed=18")
    assert code == 0, line
    assert re.match(r"20 kills \(.*\) and \d+ errors of the disk in \d+ runs, seed 18: the weights, metrics and", line)


def test_named_faults_are_repeated() -> None:
    faults = "write_with */model.safetensors 2 half; sync out/checkpoints 1 kill; write_to out/metrics.jsonl 3 kill"
    code, line = tortured(f"--replay=alone: {faults}")
    assert code == 0, line
    assert line.startswith("3 kills (")
    assert "2 in checkpoint, 1 in step" in line


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--replay=nobody: rename * 1 kill", "there is no run 'nobody': there are alone, two ranks"),
        ("--replay=alone: rename", "'rename' is no fault"),
        ("--replay=alone: rename * 0 kill", "is no fault"),
        ("--replay=alone: rename * 1 ENOTHING", "is no fault"),
        ("--kills=0", "must be at least 1"),
    ],
)
def test_what_cannot_be_tried(option: str, words: str) -> None:
    """A typing error must not look like a promise that was held, or broken."""
    ended = python("-m", "torture", option, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    assert ended.returncode == 2
    assert words in ended.stderr
