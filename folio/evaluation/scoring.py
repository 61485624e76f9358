"""The log-likelihood of continuations of a context; the context is computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from folio.machine.runtime import Runtime
from folio.model.gpt import GPT

# by device type, and for all others: GPUs need larger batches
_TOKENS, _MOST_TOKENS = {"cpu": 2048}, 16384  # in a batch, padding included
_ROWS, _MOST_ROWS = {"cpu": 16}, 1024  # of logits at a time: few enough to stay in the cache of a CPU


class Query(NamedTuple):
    """Token ids: a context of at least one token, and continuations that each directly follow the context."""

    context: Sequence[int]
    continuations: list[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens in the model's input: the last token of a continuation is only predicted."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


class Scores(NamedTuple):
    """One value per continuation, in the order of the queries."""

    nats: NDArray[np.float64]  # −log p(continuation | context)
    likeliest: NDArray[np.bool_]  # whether greedy decoding would give this continuation


def cut_to_context(query: Query, block_size: int) -> list[Query]:
    """Cuts the query to the model's context: if context and continuation are too long, their beginning is dropped.

    As in the lm-evaluation-harness, each continuation is cut no more than necessary, so a long query becomes one query
    per continuation. A continuation of more than ``block_size`` tokens keeps its last ones; the harness refuses it.
    """
    room = block_size + 1  # the last token is only predicted
    if len(query.context) + max(map(len, query.continuations)) <= room:
        return [query]
    queries = []
    for continuation in query.continuations:
        whole = [*query.context, *continuation][-room:]
        begin = max(1, len(whole) - len(continuation))
        queries.append(Query(whole[:begin], [whole[begin:]]))
    return queries


def score(
    model: GPT,
    queries: Sequence[Query],
    runtime: Runtime,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Scores:
    """The scores of all queries, the same on every rank; a query of several continuations is one row.

    In a row the continuations follow the context one after the other. A mask hides them from each other, and the
    positions of each begin after the context. A model with a token shift, which no mask stops, has a row for each
    continuation. Rows of similar length share a batch; the ranks take batches in turn,
    and the number of ranks does not change the batches. Logits are computed only where a continuation is predicted.
    ``track`` wraps the iteration over batches, as ``rich.progress.track`` does.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    if model.config.token_shift:
        queries = [Query(q.context, [continuation]) for q in queries for continuation in q.continuations]
    batches = _batches(queries, _TOKENS.get(runtime.device.type, _MOST_TOKENS))
    first = np.cumsum([0, *(len(q.continuations) for q in queries)])
    exact = torch.float32 if runtime.device.type == "mps" else torch.float64
    totals = torch.zeros(2, int(first[-1]), dtype=exact)

    def run() -> None:
        for turn in track(range(0, len(batches), runtime.world)):
            mine = turn + runtime.rank
            here = batches[min(mine, len(batches) - 1)]  # every rank runs the same number, as sharded models need
            nats, missed, lengths = _score(model, [queries[i] for i in here], runtime)
            if mine < len(batches):
                ends = np.cumsum(lengths)[:-1]
                where = np.concatenate([np.arange(first[i], first[i + 1]) for i in here])
                for kind, values in enumerate((nats, missed)):
                    sums = [part.sum() for part in np.split(values.cpu().double().numpy(), ends)]
                    totals[kind, where] = torch.tensor(np.array(sums), dtype=exact)

    runtime.infer(run)
    nats, missed = runtime.reduce(totals.to(runtime.device)).cpu().double().numpy()
    if not np.isfinite(nats).all():
        raise FloatingPointError("the model's logits are not finite")
    return Scores(nats, missed == 0)


def _batches(queries: Sequence[Query], most: int) -> list[list[int]]:
    """Indices of queries in batches, the longest first, so that a lack of memory shows in the first batch.

    A batch has at most ``most`` tokens, padding included. Once it has a quarter of them, it takes no row that would
    be padded by more than a tenth.
    """
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(queries)), key=lambda i: -queries[i].length):
        rows = len(batches[-1]) if batches else 0
        short = longest * rows >= most // 4 and queries[i].length < 0.9 * longest
        if not batches or short or longest * (rows + 1) > most:
            batches.append([])
            longest = queries[i].length
        batches[-1].append(i)
    return batches


def _score(model: GPT, queries: Sequence[Query], runtime: Runtime) -> tuple[Tensor, Tensor, list[int]]:
    """For every predicted token: its nats, and whether another is likelier; then the length of each continuation."""
    shape = len(queries), max(q.length for q in queries)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    numbers = np.full(shape, -1, dtype=np.int64)  # 0: the context, then each continuation; −1: padding
    places: list[NDArray[np.int64]] = []
    targets: list[Sequence[int]] = []
    for row, (context, continuations) in enumerate(queries):
        end = len(context)
        ids[row, :end], positions[row, :end], numbers[row, :end] = context, np.arange(end), 0
        for number, continuation in enumerate(continuations, 1):
            begin, end = end, end + len(continuation) - 1
            ids[row, begin:end] = continuation[:-1]
            positions[row, begin:end] = len(context) + np.arange(end - begin)
            numbers[row, begin:end] = number
            places.append(row * shape[1] + np.array([len(context) - 1, *range(begin, end)]))
            targets.append(continuation)

    def move(array: NDArray[np.int64]) -> Tensor:
        return runtime.move(runtime.pin(array))

    part = move(numbers)
    seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    mask = (seen & torch.ones(shape[1], shape[1], dtype=torch.bool, device=seen.device).tril())[:, None]
    x = model.hidden(move(ids), positions=move(positions), mask=mask)  # (B, T, C)
    logits = model.logits(x.flatten(0, 1)[move(np.concatenate(places))])  # (N, V)
    target = move(np.concatenate(targets).astype(np.int64))
    rows = _ROWS.get(runtime.device.type, _MOST_ROWS)
    parts = map(_nats, torch.split(logits, rows), torch.split(target, rows))
    nats, missed = map(torch.cat, zip(*parts, strict=True))
    return nats, missed, [len(t) for t in targets]


def _nats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) and (N) → the nats of each target, and whether another is likelier."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    found = log_p.gather(1, target[:, None])[:, 0]
    return -found, found < log_p.amax(-1)
