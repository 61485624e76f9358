"""The data of a step: which rows a rank reads, and its micro batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from folio import rng
from folio.config.options import Data
from folio.errors import UserError
from folio.records.log import counted
from folio.training.run import Run


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
    """This rank's micro batches, step after step; a thread reads those of the next step meanwhile."""
    runtime, state = run.runtime, run.state
    share = micro_batches(run.config.data, runtime.rank, runtime.world)
    restart = run.config.optimizer.restart_interval

    def read(step: int, row: int) -> list[tuple[Tensor, Tensor | None, int]]:
        found = []
        if restart:
            row = step % restart * run.rows_per_step
        for first, count, micro in share:
            rows = run.tokens.rows("train", row + first, count)
            documents = runtime.pin(run.tokens.documents(rows)) if run.tokens.documents else None
            found.append((runtime.pin(rows), documents, rng.key(run.config.system.seed, "dropout", step, micro)))
        return found

    def move(rows: Tensor, documents: Tensor | None, seed: int) -> MicroBatch:
        here = runtime.move(rows)
        return MicroBatch(here[:, :-1], here[:, 1:], None if documents is None else runtime.move(documents), seed)

    with ThreadPoolExecutor(1, "batches") as pool:

        def forever() -> Iterator[list[MicroBatch]]:
            ahead = pool.submit(read, state.step, state.rows)
            while True:
                here = ahead.result()
                ahead = pool.submit(read, state.step + 1, state.rows + run.rows_per_step)
                yield [move(*parts) for parts in here]

        yield forever()
