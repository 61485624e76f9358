"""The data of a step: which rows a rank reads, and its micro batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from folio import rng
from folio.config.options import Data
from folio.errors import UserError
from folio.records.log import counted
from folio.training.run import Run

_STEPS, _TOKENS = 64, 1 << 16  # that are read at once, at most, but at least one step


class MicroBatch(NamedTuple):
    """The input of one forward and backward: tensors (B, T), and the seed of its dropout."""

    idx: Tensor
    targets: Tensor
    documents: Tensor | None  # the number of each token's document
    seed: int


def micro_batches(data: Data, rank: int, world: int) -> list[tuple[int, int, int]]:
    """This rank's share of a step's rows: (first row, rows, global micro step) of each micro step.

    If the world size divides ``gradient_accumulation_steps``, the ranks take the micro steps of one process in turn.
    Else each rank takes an equal share of the rows, in micro batches of at most ``batch_size``.

    Raises:
        UserError: the world size does not divide the rows; names the nearest numbers that fit.
    """
    steps, size = data.gradient_accumulation_steps, data.batch_size
    rows = steps * size
    if steps % world == 0:
        return [(m * size, size, m) for m in range(rank, steps, world)]
    if rows % world:
        below = next(w for w in range(world, 0, -1) if rows % w == 0)
        near_world = next((w for w in range(world, 2 * world - below) if rows % w == 0), below)
        near_rows = max(1, round(rows / world)) * world
        raise UserError(
            f"gradient_accumulation_steps × batch_size = {steps} × {size} = {counted(rows, 'row')} cannot be shared by "
            f"{counted(world, 'process')}: {counted(near_world, 'process')} or {counted(near_rows, 'row')} would fit"
        )
    share = rows // world
    starts = range(rank * share, (rank + 1) * share, size)
    return [(first, min(size, (rank + 1) * share - first), rank * len(starts) + i) for i, first in enumerate(starts)]


@contextmanager
def batches(run: Run) -> Iterator[Iterator[list[MicroBatch]]]:
    """This rank's micro batches, step after step; a thread reads those of later steps meanwhile.

    It reads many short steps at once, since reading one and handing it over takes longer than training on it may.
    """
    runtime, optimizer, seed = run.runtime, run.config.optimizer, run.config.system.seed
    share = micro_batches(run.config.data, runtime.rank, runtime.world)
    mine = np.concatenate([np.arange(first, first + count) for first, count, _ in share])  # of a step's rows
    at_once = max(1, min(_STEPS, _TOKENS // (len(mine) * run.tokens.block_size)))

    def read(step: int, row: int, most: int = at_once) -> tuple[Tensor, Tensor | None, list[int]]:
        """Of the steps from this one on: rows (n, T + 1), the documents in them (n, T), and each micro step's seed.

        A step whose data is refused is read alone, after those before it.
        """
        steps = np.arange(step, step + max(1, min(most, optimizer.max_iters - step)))
        done = steps % optimizer.restart_interval if optimizer.restart_interval else steps - step
        first = 0 if optimizer.restart_interval else row
        numbers = first + done[:, None] * run.rows_per_step + mine
        try:
            rows = run.tokens.numbered("train", numbers.ravel())
        except UserError:
            if len(steps) == 1:
                raise
            return read(step, row, len(steps) // 2)
        documents = runtime.pin(run.tokens.documents(rows)) if run.tokens.documents else None
        seeds = [rng.key(seed, "dropout", s, micro) for s in steps.tolist() for _, _, micro in share]
        return runtime.pin(rows), documents, seeds

    with ThreadPoolExecutor(1, "batches") as pool:

        def forever(step: int, row: int) -> Iterator[list[MicroBatch]]:
            ahead = pool.submit(read, step, row)
            while True:
                rows, documents, seeds = ahead.result()
                count = len(seeds) // len(share)
                step, row = step + count, row + count * run.rows_per_step
                ahead = pool.submit(read, step, row)
                sizes = [size for _, size, _ in share] * count
                here = runtime.move(rows)
                masks = [None] * len(sizes) if documents is None else torch.split(runtime.move(documents), sizes)
                parts = zip(
                    torch.split(here[:, :-1], sizes), torch.split(here[:, 1:], sizes), masks, seeds, strict=True
                )
                for _ in range(count):
                    yield [MicroBatch(*part) for part in itertools.islice(parts, len(share))]

        yield forever(run.state.step, run.state.rows)
