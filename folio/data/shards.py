"""One split of one data set as a range of positions, and the order in which its rows are read.

Each file becomes a memmap when it is first read, and the maps used last stay open. No row crosses the end of a file.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from folio import rng
from folio.data.folders import Folder
from folio.data.token_files import Array, Split, TokenFile
from folio.errors import UserError
from folio.machine import probe

Rows = NDArray[np.int64]
Order = Literal["epoch", "random", "sequential"]

_MAPPED = 4096  # files at once, at most, since the system limits maps as well


class Maps:
    """Memmaps of the files that were read last. Each keeps a file open, and a process may open only so many."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[TokenFile, Array] = OrderedDict()
        self._lock = threading.Lock()  # rows are read ahead while an evaluation reads too
        self._most = int(max(1, min(_MAPPED, probe.open_files() // 4)))

    def __getitem__(self, file: TokenFile) -> Array:
        with self._lock:
            array = self._arrays.pop(file, None)
            if array is None:
                self._drop_all_but(self._most - 1)
                array = self._map(file)
            self._arrays[file] = array
            return array

    def _map(self, file: TokenFile) -> Array:
        """Maps a file; if the process has too many files open, half of the maps are closed first."""
        try:
            return file.map()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._arrays:
                raise
        self._most = max(1, len(self._arrays) // 2)
        self._drop_all_but(self._most - 1)
        return file.map()

    def _drop_all_but(self, count: int) -> None:
        while len(self._arrays) > count:
            self._arrays.popitem(last=False)


class Shards:
    """One split of one data set: its files as one range of positions, and the order in which they are read."""

    def __init__(self, folder: Folder, split: Split, block_size: int, sampling: Order, seed: int, maps: Maps) -> None:
        self.files, self.maps = folder.splits[split], maps
        self.split, self.block_size, self.sampling, self.seed = split, block_size, sampling, seed
        self.sizes = np.array([file.tokens for file in self.files], dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes  # position of each file's first token
        if self.sizes.max() <= block_size:
            raise UserError(
                f"{self.files[0].path}: {self.sizes.max()} tokens are fewer than block_size + 1 = {block_size + 1}: "
                "lower --block_size or prepare more text"
            )
        self._windows = rows_per_epoch(self.sizes, block_size)
        self._windows_before = np.cumsum(self._windows) - self._windows

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def positions(self, index: rng.UInts, batch_size: int, world: int) -> Rows:
        """The positions (n) at which the rows of these numbers (n) begin."""
        if self.sampling == "random":
            fitting = self._fitting()
            drawn = rng.draw(index, int(fitting.sum()), rng.key(self.seed, self.split)).astype(np.int64)
            return self._at(drawn, fitting)
        if self.sampling == "sequential":
            return self._sequential(index, batch_size, world)
        T, per_epoch = self.block_size, int(self._windows.sum())
        epochs = index // np.uint64(per_epoch)
        out = np.empty(index.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            seed = rng.key(self.seed, self.split, int(epoch))
            window = rng.permute(index[here] % np.uint64(per_epoch), per_epoch, seed).astype(np.int64)
            shard = np.searchsorted(self._windows_before, window, side="right") - 1
            # an epoch's first window in a file begins at one of the first ``slack`` tokens
            slack = np.minimum(T, self.sizes[shard] - self._windows[shard] * T)
            out[here] = self.starts[shard] + seed % slack + (window - self._windows_before[shard]) * T
        return out

    def _sequential(self, index: rng.UInts, batch_size: int, world: int) -> Rows:
        """The order of build-nanogpt's ``DataLoaderLite``: batch g of all ranks is the next one of rank g % world.

        A rank begins at ``B·T·rank`` in each shard, and leaves it when the next batches of all ranks no longer fit.
        """
        T = self.block_size
        batch, row = np.divmod(index.astype(np.int64), batch_size)
        rank, turn = batch % world, batch // world
        out = np.empty(index.shape, dtype=np.int64)
        share = batch_size * T
        if self.sizes.max() <= share * world:  # less than a batch for each rank, for which DataLoaderLite fails
            windows = (self.sizes - 1) // T
            number = index.astype(np.int64) % windows.sum()
            shard = np.searchsorted(np.cumsum(windows), number, side="right")
            return self.starts[shard] + (number - (np.cumsum(windows) - windows)[shard]) * T
        for r in np.unique(rank):
            here = rank == r
            turns = np.maximum(1, (self.sizes - 1 - share * r) // (share * world))
            turns[self.sizes <= share * (r + 1)] = 0
            number = turn[here] % turns.sum()
            shard = np.searchsorted(np.cumsum(turns), number, side="right")
            inside = number - (np.cumsum(turns) - turns)[shard]
            out[here] = self.starts[shard] + (inside * world + r) * share + row[here] * T
        return out

    def spread(self, count: int) -> Rows:
        """The positions (n) of ``count`` windows spread evenly.

        If ``count`` is 0 or more than there are: all windows, with the shorter ones at the ends of files.
        """
        T = self.block_size
        whole = np.maximum(0, -(-(self.sizes - 1) // T))
        if count == 0 or count >= whole.sum():
            return np.concatenate(
                [start + np.arange(n, dtype=np.int64) * T for start, n in zip(self.starts, whole, strict=True)]
            )
        fitting = self._fitting()
        return self._at(np.linspace(0, fitting.sum() - 1, count).astype(np.int64), fitting)

    def _fitting(self) -> Rows:
        """The number of positions of each file at which a whole row can begin."""
        return np.maximum(0, self.sizes - self.block_size)

    def _at(self, number: Rows, counts: Rows) -> Rows:
        """The positions (n) of these numbers (n), if the first ``counts[i]`` tokens of each file are numbered."""
        shard = np.searchsorted(np.cumsum(counts), number, side="right")
        return self.starts[shard] + number - (np.cumsum(counts) - counts)[shard]

    def read(self, positions: Rows, width: int, vocab_size: int | None) -> Rows:
        """``width`` tokens from each of these positions (n) on, (n, width), −1 beyond the end of a file.

        Raises:
            ValueError: an id is outside the vocabulary, if its size is given, or a file was cut since it was opened.
        """
        out = np.full((len(positions), width), -1, dtype=np.int64)
        shards = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shards):
            data = self.maps[self.files[shard]]
            self.files[shard].require_whole(data)
            here = np.flatnonzero(shards == shard)
            local = positions[here] - self.starts[shard]
            inside = local <= len(data) - width
            if inside.any():
                whole = np.lib.stride_tricks.sliding_window_view(data, width)[local[inside]]
                out[here[inside]] = self._checked(shard, whole, vocab_size)
            for i, start in zip(here[~inside], local[~inside], strict=True):
                tail = self._checked(shard, data[start:], vocab_size)
                out[i, : len(tail)] = tail
        return out

    def _checked(self, shard: int, ids: Array, vocab_size: int | None) -> Array:
        if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            remedy = "prepare the data again" if wrong < 0 else "set --vocab_size above it, or prepare the data again"
            raise UserError(
                f"{self.files[shard].path}: token id {wrong} is outside the vocabulary of {vocab_size}: {remedy}"
            )
        return ids


def rows_per_epoch(tokens: Any, block_size: int) -> Any:
    """The number of windows of each file in an epoch: those that fit at any offset, or one if only one can fit."""
    return np.where(np.asarray(tokens) > block_size, np.maximum(1, (tokens - block_size) // block_size), 0)
