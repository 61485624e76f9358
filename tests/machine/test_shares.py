"""The ranks whose weights differ, from hashes of their tensors."""

from __future__ import annotations

import pytest
import torch

from folio.machine import shares


@pytest.mark.parametrize(
    ("hashes", "shards", "found"),
    [
        ([[1, 2], [1, 2]], 1, ([], -1)),
        ([[1, 2], [1, 3]], 1, ([1], 1)),
        ([[9, 2], [1, 2], [1, 2]], 1, ([0], 0)),
        ([[1, 2], [3, 4], [1, 2], [3, 5]], 2, ([3], 1)),
        ([[1, 2], [3, 4]], 2, ([], -1)),
    ],
    ids=["equal", "the second of two copies", "one of three copies", "a shard of the second copy", "one copy"],
)
def test_differences_between_copies(hashes: list[list[int]], shards: int, found: tuple[list[int], int]) -> None:
    assert shares.find_differences(torch.tensor(hashes), shards) == found
