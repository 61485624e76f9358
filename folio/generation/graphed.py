"""Sampling with fixed shapes: a token is one function of static tensors, which a GPU replays as a CUDA graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from folio.machine.graphs import Recorder, RecordingError, Replay, read_later
from folio.model.attention import KVCache
from folio.model.gpt import GPT

FEW = 16  # tokens for which a recording, about four steps, does not pay
Draw = Callable[[Tensor, Tensor], Tensor]  # logits (B, V), uniform numbers (B, 1) → ids (B, 1)
_AHEAD = 2  # tokens that the device computes while the host reads an earlier one


def columns(
    model: GPT, idx: Tensor, uniform: Tensor, draw: Draw, track: Callable[[Sequence[int]], Iterable[int]] = iter
) -> Iterator[Tensor]:
    """Yields what ``sampling.stream`` does, on the CPU; ``draw`` must not wait for the device.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    rows = _Sequence(model, idx, uniform, draw).rows()
    waiting: list[Callable[[], list[int]]] = []
    for _ in track(range(uniform.size(1))):
        while len(waiting) <= _AHEAD and (row := next(rows, None)) is not None:
            waiting.append(read_later(row))
        *ids, finite = waiting.pop(0)()
        if not finite:
            raise FloatingPointError("the model's logits are not finite")
        yield torch.tensor(ids)[:, None]


class _StaticCache(KVCache):
    """A cache where a token's keys and values go to ``place`` (1,), and which returns all of its capacity."""

    def __init__(self, filled: KVCache, place: Tensor) -> None:
        super().__init__(filled.capacity)
        self._buffers, self.last, self._place = filled._buffers, filled.last, place
        for buffer in (buffer for pair in self._buffers.values() for buffer in pair):
            buffer[:, :, filled.length :] = 0  # the mask hides finite numbers only

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[block]
        return keys.index_copy_(2, self._place, k), values.index_copy_(2, self._place, v)


class _Sequence:
    """Token ids on the device, and the functions that draw the next column.

    ``uniform`` (B, N) has the draws for (B, T) ids. Each token is computed over a cache, and beyond ``block_size`` from
    the last ``block_size`` tokens.
    """

    def __init__(self, model: GPT, idx: Tensor, uniform: Tensor, draw: Draw) -> None:
        self._model, self._prompt, self._uniform, self._draw = model, idx, uniform, draw
        (B, T), device = idx.shape, idx.device
        self._ids = torch.cat([idx, idx.new_zeros(B, uniform.size(1))], dim=1)
        self._place = torch.full((1,), T - 1, device=device)  # of the last token
        self._count = torch.zeros(1, dtype=torch.long, device=device)  # columns drawn
        self._finite = torch.ones(1, dtype=torch.bool, device=device)  # whether all logits were
        self._window = torch.arange(1 - model.config.block_size, 1, device=device)
        self._changed = [self._ids, self._place, self._count, self._finite]  # by a column

    def rows(self) -> Iterator[Tensor]:
        """For each column its ids and whether all logits were finite, (B + 1,) on the device; the next overwrites."""
        T, N, block_size = self._prompt.size(1), self._uniform.size(1), self._model.config.block_size
        fits, capacity = block_size >= T, min(block_size, T + N)
        cache = KVCache(-(-capacity // 8) * 8)  # CUDA's kernels want masks of a multiple of 8
        yield self._next(self._model.hidden(self._prompt, cache=cache) if fits else self._over_window())
        cached = min(N, max(1, block_size - T + 1))
        if fits:
            static = _StaticCache(cache, self._place)
            self._changed += [static.last] if static.last is not None else []
            places = torch.arange(cache.capacity, device=self._place.device)
            yield from self._repeat(lambda: self._next(self._over_cache(static, places)), cached - 1)
        yield from self._repeat(lambda: self._next(self._over_window()), N - cached)

    def _over_cache(self, cache: KVCache, places: Tensor) -> Tensor:
        dtype = self._model.lm_head.weight.dtype
        mask = torch.zeros(1, len(places), dtype=dtype, device=places.device)
        mask = mask.masked_fill(places > self._place, -math.inf)
        last = self._ids.index_select(1, self._place)
        return self._model.hidden(last, positions=self._place, mask=mask, cache=cache)

    def _over_window(self) -> Tensor:
        return self._model.hidden(self._ids.index_select(1, self._place + self._window))

    def _next(self, x: Tensor) -> Tensor:
        """Draws a column from the states (B, T, C) of the last tokens."""
        logits = self._model.logits(x[:, -1])
        ids = self._draw(logits, self._uniform.index_select(1, self._count))
        self._finite.logical_and_(logits.isfinite().all())
        self._place.add_(1)
        self._count.add_(1)
        self._ids.index_copy_(1, self._place, ids)
        return torch.cat([ids.flatten(), self._finite.long()])

    def _repeat(self, function: Callable[[], Tensor], times: int) -> Iterator[Tensor]:
        """Calls the function so often; on a GPU as a graph, if that pays."""
        replay = Replay(function)
        if times >= FEW:
            before = [t.clone() for t in self._changed]

            def restore() -> None:
                for t, value in zip(self._changed, before, strict=True):
                    t.copy_(value)

            def warm_up() -> None:
                replay.run()
                restore()

            try:
                Recorder(self._ids.device).record(replay, warm_up)
            except RecordingError as error:
                warnings.warn(f"CUDA graphs failed, continuing without them: {error}", stacklevel=2)
        for _ in range(times):
            yield replay()
