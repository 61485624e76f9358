"""The peak speed of a CPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from folio.machine import flops


@pytest.mark.parametrize(("seconds", "n"), [(2**-1, 256), (2**-10, 1024)])
def test_a_slow_cpu_multiplies_small_matrices_only(monkeypatch: pytest.MonkeyPatch, seconds: float, n: int) -> None:
    """If each product takes so many seconds; a peak of bfloat16 that is emulated took twenty seconds otherwise."""
    now = itertools.count(step=seconds)
    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert flops.peak.__wrapped__(torch.device("cpu"), torch.float32) == 2 * n**3 / seconds
