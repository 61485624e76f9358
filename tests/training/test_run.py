"""The clock of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from folio.training.run import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which a test changes."""
    times = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times[0])
    yield times
    monkeypatch.undo()


def test_the_speed_leaves_out_pauses(now: list[float]) -> None:
    clock = Clock(started=now[0])
    assert math.isnan(clock.steps_per_second)
    clock.begin_lap(10)
    with clock.pause():
        now[0] += 30
    clock.end_lap(15, now[0] + 10)
    assert clock.steps_per_second == 0.5
    now[0] += 12
    clock.end_lap(17, now[0])  # the next lap has no pause
    assert clock.steps_per_second == 1.0
    assert clock.seconds() == 42


def test_the_limit_counts_from_when_it_is_set(now: list[float]) -> None:
    clock = Clock(started=now[0])
    clock.started -= 500  # of an earlier process
    clock.limit(minutes=2)
    assert (clock.seconds(), clock.expired) == (500, False)
    now[0] += 121
    assert (clock.seconds(), clock.expired) == (621, True)
