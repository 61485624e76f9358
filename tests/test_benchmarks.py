"""Benchmarks that use the parts of a run, small and on a CPU."""

from __future__ import annotations

import json

import pytest
from conftest import python


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gpu.py", "--smoke=True", "--work=folio step 2"], "JSON {}"),
        (["gpu.py", "--smoke=True", "--work=folio sampling 2"], "JSON {}"),
        (["gpu_recipe.py", "--smoke=True", "--seeds=1"], '"reached": false'),
        (["host.py", "--rounds=1", "--steps=2"], "Folio host time"),
    ],
)
def test_the_parts_of_a_run(argv: list[str], said: str) -> None:
    """They are called as a run calls them."""
    done = python(f"benchmarks/{argv[0]}", *argv[1:])
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


@pytest.mark.slow
def test_the_rows_of_a_gpu() -> None:
    """Each row has a result, printed before the JSON of all."""
    done = python("benchmarks/gpu.py", "--smoke=True")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert [name for name, row in found["rows"].items() if "failed" in row] == []
    assert all(found["rows"][name]["exact"] for name in ("exact", "exact recipe"))
    lines = done.stdout.splitlines()[1 : len(found["rows"]) + 1]
    assert [line.split(":")[0] for line in lines] == list(found["rows"])
