"""Stop requests of several ranks, as numbers that are summed."""

from __future__ import annotations

import itertools

import pytest
import torch

from folio.training.stopping import STOP_REQUESTS, as_numbers, most_urgent, requested

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_most_urgent_request_of_any_rank_counts(ranks: int) -> None:
    """Whatever the other ranks request, in any order."""
    for requests in itertools.product(["", *STOP_REQUESTS], repeat=ranks):
        counts = sum(as_numbers(request, CPU) for request in requests)
        assert isinstance(counts, torch.Tensor)
        first = next((name for name in STOP_REQUESTS if name in requests), "")
        assert requested(counts.tolist()) == most_urgent(requests) == first


def test_a_million_ranks_are_counted_too() -> None:
    counts = 1e6 * as_numbers("max_minutes", CPU) + as_numbers("SIGTERM", CPU)
    assert requested(counts.tolist()) == "SIGTERM"
    assert requested((1e6 * as_numbers("max_minutes", CPU)).tolist()) == "max_minutes"
