"""The examples, which do not import the package, compute the same losses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, python
from golden import GOLDEN, GOLDEN_OPTIONS

MINIMAL = ROOT / "examples" / "minimal.py"


def test_minimal_reaches_the_golden_losses(story: Path) -> None:
    """An independent implementation of model, data order, optimizer and schedule gives the trainer's losses."""
    known = re.findall(r'"(\w+)":', MINIMAL.read_text(encoding="utf-8").partition("}")[0])
    shared = [flag for flag in SMALL if flag[2:].partition("=")[0] in known]
    done = python(MINIMAL, f"--data_dir={story}", "--beta2=0.95", *shared, *GOLDEN_OPTIONS)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^iter \d+: loss (.*)$", done.stdout, re.MULTILINE)]
    assert losses == pytest.approx(GOLDEN, abs=1e-4), losses


def test_minimal_fits_in_150_lines_and_imports_torch_and_numpy_alone() -> None:
    text = MINIMAL.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported == {"argparse", "hashlib", "json", "math", "pathlib", "numpy", "torch"}
