"""No damaged file of a run or a data set is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import torture


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


def test_random_damages(room: Path) -> None:
    outcomes = torture(room, 60, seed=1)
    assert outcomes["Runs: the previous one is used"] > 5
    assert outcomes["Runs: refused"] > 1
    assert outcomes["DataSet: refused"] > 10
