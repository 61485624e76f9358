"""Which updates the guard leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from folio import rng
from folio.machine.guard import WINDOW, Guard

CPU = torch.device("cpu")


def decisions(guard: Guard, losses: Sequence[float], norm: float = 1.0) -> list[bool]:
    """Whether it leaves out each update, for these mean losses over ten tokens."""
    norms = torch.tensor(norm)
    return [bool(guard.leaves_out(torch.tensor([10 * loss, 10.0]), norms)) for loss in losses]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(loss: float) -> None:
    """It ends all updates; with ``skips``, it leaves out its own update only; in float16 too."""
    for scaled in (False, True):
        assert decisions(Guard(CPU, scaled), [1.0, loss, 1.0]) == [False, True, True]
        assert decisions(Guard(CPU, scaled, skips=True), [1.0, loss, 1.0]) == [False, True, False]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(norm: float) -> None:
    """As such a loss, except that in float16 it leaves out its own update only."""
    for scaled, skips in [(False, False), (False, True), (True, False), (True, True)]:
        guard = Guard(CPU, scaled, skips)
        assert decisions(guard, [1.0], norm) == [True]
        assert decisions(guard, [1.0]) == [not (scaled or skips)]
        assert guard.continues == (scaled or skips)


def test_spikes_by_their_definition() -> None:
    """Computed independently: each loss against the 128 before, in which a spike counts as its limit."""
    noise = torch.randn(600, generator=rng.generator("losses"), dtype=torch.float64)
    losses = [3 + 0.1 * x + 2 * (n % 97 == 0) for n, x in enumerate(noise.tolist())]
    window: list[float] = []
    wanted = []
    for loss in losses:
        limit = np.mean(window) + 4 * np.std(window, ddof=1) if len(window) == WINDOW else math.inf
        wanted.append(bool(loss > limit))
        window = [*window, min(loss, limit)][-WINDOW:]
    guard = Guard(CPU, False, max_z=4.0)
    assert decisions(guard, losses) == wanted
    assert [n for n, out in enumerate(wanted) if out] == [194, 291, 388, 485, 582]
    assert guard.losses() == pytest.approx(window)


def test_a_spike_does_not_hide_the_next() -> None:
    usual = (3 + 0.1 * torch.randn(WINDOW, generator=rng.generator("losses"))).tolist()
    assert decisions(Guard(CPU, False, max_z=6.0), [*usual, 1e6, 1e6, 3.0, 1e6]) == [False] * WINDOW + [1, 1, 0, 1]


def test_a_loss_that_stays_high_is_accepted() -> None:
    """Each update that is left out raises the limit, so training continues after some."""
    usual = (3 + 0.1 * torch.randn(WINDOW, generator=rng.generator("losses"))).tolist()
    high = decisions(Guard(CPU, False, max_z=6.0), [*usual, *[10.0] * 40])[WINDOW:]
    assert high[0]
    assert high == sorted(high, reverse=True)
    assert sum(high) < 25


def test_a_loss_that_is_not_finite_is_not_in_the_window() -> None:
    """A window that is not full yet leaves out no update for a high loss."""
    guard = Guard(CPU, False, skips=True, max_z=3.0)
    assert decisions(guard, [1.0, 2.0, math.nan, 900.0, math.inf]) == [False, False, True, False, True]
    assert guard.losses() == [1.0, 2.0, 900.0]


def test_a_window_is_restored() -> None:
    """To the same decisions: an empty, a short, and a full window, also from more losses than it holds."""
    losses = (3 + torch.randn(300, generator=rng.generator("losses"))).tolist()
    for cut in (0, 50, 200):
        whole, restored = Guard(CPU, False, max_z=1.0), Guard(CPU, False, max_z=1.0)
        decisions(whole, losses[:cut])
        restored.restore([9.0] * (cut == 200) + whole.losses())
        assert len(whole.losses()) == min(cut, WINDOW)
        assert decisions(restored, losses[cut:]) == decisions(whole, losses[cut:])
