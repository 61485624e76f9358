"""Where labels stand."""

from __future__ import annotations

import numpy as np
import pytest

from folio.records.labels import lines_of, spread


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_apart_in_their_order_and_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centers, heights = rng.uniform(-20, 120, size=8), rng.uniform(5, 12, size=8)
    placed = np.array(spread(centers.tolist(), heights.tolist(), 0, 100))
    order = np.argsort(centers)
    low, high = (placed - heights / 2)[order], (placed + heights / 2)[order]
    assert (low[1:] >= high[:-1] - 1e-9).all()
    assert low[0] >= -1e-9
    assert high[-1] <= 100 + 1e-9


def test_labels_that_are_apart_stay_and_others_move_to_both_sides() -> None:
    assert spread([50, 10, 90], [10, 10, 10], 0, 100) == [50, 10, 90]
    assert spread([52, 48, 10], [10, 10, 10], 0, 100) == [55, 45, 10]
    assert spread([1, 99], [10, 10], 0, 100) == [5, 95]
    assert spread([50, 50], [80, 80], 0, 100) == [40, 120]
    assert spread([], [], 0, 100) == []


def test_long_names_have_several_lines() -> None:
    assert [lines_of(text) for text in ("", "a-run 1.2345", "a" * 40, "name " * 9)] == [1, 1, 2, 3]
