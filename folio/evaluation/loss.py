"""The loss over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from folio.data import decoding, tokenizers
from folio.data.rows import Tokens
from folio.data.token_files import Split
from folio.machine.runtime import Runtime
from folio.machine.wrap import Loss
from folio.model.gpt import GPT

_WINDOWS = 1024  # read at a time


@torch.no_grad()
def evaluate(
    model: GPT,
    loss: Loss,
    tokens: Tokens,
    split: Split,
    windows: int,
    batch_size: int,
    runtime: Runtime,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> float:
    """Mean nats per token over ``windows`` windows spread evenly over the split; 0: every token once.

    The ranks take batches in turn, and the mean is weighted by tokens. The last batches are padded with targets of
    −1, so that every rank runs the same number of batches of the same shape. ``track`` wraps the iteration over
    batches, as ``rich.progress.track`` does; an exception that it raises ends the evaluation.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    starts = tokens.spread(split, windows)
    exact = torch.float32 if runtime.device.type == "mps" else torch.float64
    total = torch.zeros(2, device=runtime.device, dtype=exact)
    share = batch_size * runtime.world
    model.eval()
    try:
        for first in track(range(0, len(starts), share)):
            mine = starts[first + runtime.rank * batch_size : first + (runtime.rank + 1) * batch_size]
            rows = np.full((batch_size, tokens.block_size + 1), -1)
            rows[: len(mine)] = tokens.windows(split, mine)
            documents = runtime.move(torch.from_numpy(tokens.documents(rows))) if tokens.documents else None
            here = runtime.move(torch.from_numpy(rows))
            nats, counted = loss(here[:, :-1].clamp(min=0), here[:, 1:], documents)
            total += torch.stack([nats, counted]).to(total.dtype)
    finally:
        model.train()
    nats, counted = runtime.reduce(total).tolist()
    if not math.isfinite(nats):
        raise FloatingPointError(f"the {split} loss is not finite")
    return float(nats / counted)


def measure(
    model: GPT,
    loss: Loss,
    tokens: Tokens,
    split: Split,
    windows: int,
    batch_size: int,
    runtime: Runtime,
    spec: dict[str, Any] | None,
) -> dict[str, Any]:
    """The loss over a split, as ``evaluate`` measures it, with what follows from it and what it was measured over.

    ``spec`` as in ``text_size``. Bits per byte do not depend on the tokenizer; they are NaN if the text is unknown.
    """
    nats = evaluate(model, loss, tokens, split, windows, batch_size, runtime)
    counted, size = text_size(tokens, split, windows, spec)
    return {
        "split": split,
        "data": tokens.name,
        "loss": nats,
        "perplexity": math.exp(min(nats, 700.0)),
        "bits_per_byte": nats * counted / (math.log(2) * size) if size else math.nan,
        "tokens": counted,
        "bytes": size,
    }


def text_size(tokens: Tokens, split: Split, windows: int, spec: dict[str, Any] | None) -> tuple[int, int]:
    """The number of targets that ``evaluate`` counts, and the bytes of text that they add to the tokens before them.

    ``spec`` is the tokenizer as JSON; without one, or with one that only datatrove can make, the bytes are 0.
    """
    tokenizer = tokenizers.from_json(spec) if spec and spec["kind"] != "datatrove" else None
    counted = size = 0
    starts = tokens.spread(split, windows)
    for first in range(0, len(starts), _WINDOWS):
        for row in tokens.windows(split, starts[first : first + _WINDOWS]):
            ids = row[row >= 0]
            counted += len(ids) - 1
            size += decoding.text_size(tokenizer, ids) - decoding.text_size(tokenizer, ids[:1]) if tokenizer else 0
    return counted, size
