"""Every random choice is a pure function of what it is for, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from folio import rng


def _all(n: int) -> rng.UInts:
    return np.arange(n, dtype=np.uint64)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
@pytest.mark.parametrize("seed", [0, 1337, 2**63 - 1])
def test_permute_is_a_bijection(n: int, seed: int) -> None:
    """Every number below n is hit once, also where n is no power of two."""
    assert np.array_equal(np.sort(rng.permute(_all(n), n, seed)), _all(n))


def test_permute_depends_on_the_seed_and_shuffles() -> None:
    """Other seeds give other orders, and hardly an index stays where it was."""
    orders = [rng.permute(_all(1000), 1000, seed) for seed in range(5)]
    assert len({order.tobytes() for order in orders}) == 5
    assert all((order == _all(1000)).sum() < 10 for order in orders)


def test_permute_works_on_scattered_indices() -> None:
    """An index is sent to the same place, whichever others are asked for with it."""
    index = np.array([4096, 0, 17, 17, 999], dtype=np.uint64)
    assert np.array_equal(rng.permute(index, 4097, 3), rng.permute(_all(4097), 4097, 3)[index])
    assert len(rng.permute(_all(0), 10, 3)) == 0


def test_the_choices_are_pinned() -> None:
    """A checkpoint of an older version resumes with the same data: these values never change."""
    assert rng.key(1337, "train", 0) == 7332775478000334554
    assert rng.permute(_all(10), 10, 7).tolist() == [6, 1, 5, 4, 9, 2, 0, 7, 8, 3]
    assert rng.permute(_all(5), 1_000_003, rng.key(1337, "train", 0)).tolist() == [
        177507,
        822575,
        507140,
        311895,
        277471,
    ]
    assert rng.draw(_all(6), 1000, rng.key(1337, "train")).tolist() == [510, 183, 207, 669, 135, 450]
    # SplitMix64's first output from seed 0 is the finaliser of its increment
    assert int(rng.mix(np.array([0x9E3779B97F4A7C15], dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_keys_tell_their_parts_apart() -> None:
    """A number is not its text, and neither order nor grouping of the parts is lost."""
    keys = [rng.key(1), rng.key("1"), rng.key(1, 2), rng.key(2, 1), rng.key("1, 2"), rng.key(12)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_draw_is_in_range_and_covers_it() -> None:
    """With replacement below n, each value about as often as the others."""
    drawn = rng.draw(_all(70_000), 7, 5)
    counts = np.bincount(drawn.astype(np.int64), minlength=7)
    assert len(counts) == 7
    assert abs(counts - 10_000).max() < 400
    assert not np.array_equal(drawn, rng.draw(_all(70_000), 7, 6))


def test_generator_is_seeded_by_the_key() -> None:
    """Two generators for the same purpose give the same numbers."""
    assert rng.generator("sample", 1, 0).initial_seed() == rng.key("sample", 1, 0)
