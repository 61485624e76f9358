"""Every random choice of a run, as a pure function of (seed, what it is for).

Nothing here keeps state, so nothing has to be stored to continue a run exactly, and no choice depends on the
number of processes that make it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

UInts = NDArray[np.uint64]

_ROUNDS = 8


def key(*parts: int | str) -> int:
    """A 63-bit integer from any parts: the same on every machine, unlike Python's ``hash``."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator that is seeded by ``key(*parts)``."""
    return torch.Generator().manual_seed(key(*parts))


def mix(x: UInts) -> UInts:
    """A bijection of 64-bit integers that looks random: the finalizer of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(index: UInts, n: int, seed: int) -> UInts:
    """For each index a number below ``n``, with replacement; ``n`` ≪ 2⁶⁴, so the modulo's bias is negligible."""
    return mix(mix(index + np.uint64(1)) ^ np.uint64(seed)) % np.uint64(n)


def permute(index: UInts, n: int, seed: int) -> UInts:
    """Where a permutation of 0 … n − 1, chosen by ``seed``, sends each index; no memory beyond the arrays.

    A Feistel network over the next even power of two, applied again until its output is below ``n`` ("cycle walking":
    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        x = out[walking]
        left, right = x >> half, x & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(right + np.uint64(key(seed, turn))) & mask)
        out[walking] = (left << half) | right
        walking = out >= np.uint64(n)
    return out
