"""The loss over a split."""

from __future__ import annotations

import numpy as np
import torch

from folio.model import GPT
from folio.runtime import Loss, Runtime
from folio.token_files import Split
from folio.tokenizer import from_json
from folio.tokens import Tokens

_WINDOWS = 1024  # read at a time


@torch.no_grad()
def evaluate(
    model: GPT, loss: Loss, tokens: Tokens, split: Split, windows: int, batch_size: int, runtime: Runtime
) -> float:
    """Mean nats per token over ``windows`` windows spread evenly over the split; 0: every token once.

    The ranks take batches in turn, and the mean is weighted by tokens. The last batches are filled up with
    targets of −1, so that every rank runs as many batches, all of one shape.
    """
    starts = tokens.spread(split, windows)
    exact = torch.float32 if runtime.device.type == "mps" else torch.float64
    total = torch.zeros(2, device=runtime.device, dtype=exact)
    share = batch_size * runtime.world
    model.eval()
    for first in range(0, len(starts), share):
        mine = starts[first + runtime.rank * batch_size : first + (runtime.rank + 1) * batch_size]
        rows = np.full((batch_size, tokens.block_size + 1), -1)
        rows[: len(mine)] = tokens.windows(split, mine)
        documents = runtime.move(torch.from_numpy(tokens.documents(rows))) if tokens.documents else None
        here = runtime.move(torch.from_numpy(rows))
        nats, counted = loss(here[:, :-1].clamp(min=0), here[:, 1:], documents)
        total += torch.stack([nats, counted]).to(total.dtype)
    model.train()
    nats, counted = runtime.reduce(total).tolist()
    return nats / counted


def text_size(tokens: Tokens, split: Split, windows: int) -> tuple[int, int]:
    """The targets that ``evaluate`` counts, and the bytes of text that they stand for; an end-of-text has none."""
    counts = np.zeros(0, dtype=np.int64)
    starts = tokens.spread(split, windows)
    for first in range(0, len(starts), _WINDOWS):
        targets = tokens.windows(split, starts[first : first + _WINDOWS])[:, 1:]
        here = np.bincount(targets[targets >= 0])
        counts = np.pad(counts, (0, max(0, len(here) - len(counts))))
        counts[: len(here)] += here
    if tokens.tokenizer()["kind"] in ("ids", "datatrove"):  # nothing here says what text they stand for
        return int(counts.sum()), 0
    tokenizer = from_json(tokens.tokenizer())
    sizes = np.array([len(tokenizer.bytes([i])) if i < tokenizer.size else 0 for i in range(len(counts))])
    if tokenizer.eot is not None:
        sizes[tokenizer.eot : tokenizer.eot + 1] = 0
    return int(counts.sum()), int(counts @ sizes)
