"""The benchmark that runs where a GPU is, small and on a CPU."""

from __future__ import annotations

import json

import pytest
from conftest import python


@pytest.mark.slow
def test_the_rows_of_a_gpu() -> None:
    """Each row has a result, printed before the JSON of all."""
    done = python("benchmarks/gpu.py", "--smoke=True")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert [name for name, row in found["rows"].items() if "failed" in row] == []
    assert found["rows"]["exact"]["exact"]
    assert [line.split(":")[0] for line in done.stdout.splitlines()[1:7]] == list(found["rows"])
