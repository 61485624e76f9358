"""Sampling: a pass over the prompt, then one token at a time over cached keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folio import rng
from folio.config.options import Sampling
from folio.data import decoding
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.files import read_text
from folio.generation.graphed import FEW, columns
from folio.model.attention import KVCache
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

LINE = "-" * 15


def generate(model: GPT, idx: Tensor, max_new_tokens: int, **how: Any) -> Tensor:
    """(B, T) token ids → (B, T + max_new_tokens); further arguments as ``stream``'s."""
    return torch.cat([idx, *(column.to(idx.device) for column in stream(model, idx, max_new_tokens, **how))], dim=1)


@torch.no_grad()
def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: Tensor | None = None,
    vocab_size: int | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Iterator[Tensor]:
    """Continues (B, T) token ids, and yields each next column (B, 1) as it is drawn; on the CPU if CUDA graphs draw it.

    ``uniform`` (B, max_new_tokens) has the random numbers in [0, 1) that select the tokens; by default they come
    from torch's global generator. Ids from ``vocab_size`` on are never drawn. ``temperature`` 0 picks
    the likeliest token. ``track`` wraps the iteration, as ``rich.progress.track`` does.

    Up to ``block_size`` tokens, each new token costs one token's work. After that the context is the last
    ``block_size`` tokens, as in nanoGPT; their positions change with each token, so nothing can be cached and a new
    token costs ``block_size`` tokens' work.

    Raises:
        FloatingPointError: the logits are not finite. UserError: ``temperature`` or ``top_k`` is too small.
    """
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}: must be at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if uniform is None:
        uniform = torch.rand(idx.size(0), max_new_tokens, dtype=torch.float64)
    uniform = uniform.to(idx.device, torch.float32 if idx.device.type == "mps" else torch.float64)
    if idx.device.type == "cuda" and max_new_tokens > FEW and not torch.are_deterministic_algorithms_enabled():

        def draw(logits: Tensor, uniform: Tensor) -> Tensor:
            return pick(logits[:, :vocab_size], uniform, temperature, top_k, top_p, wait=False)

        yield from columns(model, idx, uniform, draw, track)
        return
    block_size = model.config.block_size
    cache = KVCache(min(block_size, idx.size(1) + max_new_tokens))
    window, fresh = idx[:, -block_size:], idx
    for i in track(range(max_new_tokens)):
        cached = idx.size(1) + i <= block_size
        logits = (model.next_logits(fresh, cache) if cached else model.next_logits(window))[:, :vocab_size]
        if not _finite(logits):
            raise FloatingPointError("the model's logits are not finite")
        fresh = pick(logits, uniform[:, i : i + 1], temperature, top_k, top_p)
        window = torch.cat([window, fresh], dim=1)[:, -block_size:]
        yield fresh


def _finite(logits: Tensor) -> bool:
    """Whether all are finite; NaN and infinity survive the sum, and finite numbers of 32 bits do not overflow it."""
    if logits.device.type == "mps":  # which has no float64
        return bool(logits.isfinite().all())
    return math.isfinite(logits.sum(dtype=torch.float64).item())


def pick(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    wait: bool = True,
) -> Tensor:
    """(B, V) logits and (B, 1) draws in [0, 1) → (B, 1) ids, by inverting the cumulative distribution.

    ``top_k`` keeps the k likeliest; ``top_p`` then the fewest that together reach probability p (Holtzman et
    al., "The Curious Case of Neural Text Degeneration", 2020). Without ``wait`` nothing waits for the device: of more
    than 64 logits that equal the k-th some are dropped, and logits of NaN draw any id.
    """
    if temperature < torch.finfo(uniform.dtype).tiny:  # 0, or too small to divide by
        return logits.argmax(-1, keepdim=True)
    device, ids = logits.device, None
    if torch.are_deterministic_algorithms_enabled():  # CUDA has no deterministic cumulative sum
        logits, uniform = logits.cpu(), uniform.cpu()
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = _likeliest(logits, top_k, wait)
    logits = logits.to(uniform.dtype)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest stays 0 if the others overflow
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probs = probs.masked_fill(torch.empty_like(before).scatter_(1, order, before) >= top_p, 0.0)
    total = probs.cumsum(-1)
    last = total[:, -1:]
    below = torch.minimum(uniform * last, last.nextafter(torch.zeros_like(last)))
    found = torch.searchsorted(total, below, right=True).clamp_(max=total.size(-1) - 1)
    return (found if ids is None else ids.gather(1, found)).to(device)


def _likeliest(logits: Tensor, k: int, wait: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row and all that equal the k-th, in the order of their ids, and their ids; others are −∞.

    In 16 bits many logits are equal, so a few more than k are selected at once.
    """
    n = k + 64
    values, ids = logits.topk(min(n, logits.size(-1)))
    while wait and n < logits.size(-1) and (values[:, -1] == values[:, k - 1]).any():
        n *= 2
        values, ids = logits.topk(min(n, logits.size(-1)))
    values = values.masked_fill(values < values[:, k - 1 : k], -math.inf)
    ids, order = ids.sort()
    return values.gather(1, order), ids


def draws(seed: int, samples: int, max_new_tokens: int, first: int = 0) -> Tensor:
    """(samples, max_new_tokens) float64: row i depends only on (seed, first + i)."""
    rows = [
        torch.rand(max_new_tokens, dtype=torch.float64, generator=rng.generator("sample", seed, i))
        for i in range(first, first + samples)
    ]
    return torch.stack(rows)


def samples(model: GPT, tokenizer: Tokenizer, o: Sampling, seed: int) -> Iterator[str]:
    """Yields the text of all samples, each followed by a line of dashes; a single sample is yielded token by token."""
    if o.num_samples > 1:
        yield from (f"{text}\n{LINE}\n" for text in continuations(model, tokenizer, o, seed))
        return
    yield from streamed(model, tokenizer, encode_prompt("start", o.start, tokenizer, model.config), o, seed)
    yield f"\n{LINE}\n"


def streamed(
    model: GPT, tokenizer: Tokenizer, encoded: tuple[str, list[int]], o: Sampling, seed: int, number: int = 0
) -> Iterator[str]:
    """Yields a prompt, given with its ids, and the text of each token as it is drawn, in whole characters.

    Together they are the text of sample ``number``, as ``continuations`` returns it.
    """
    prompt, ids = encoded
    yield prompt
    drawn = _drawn(model, tokenizer, ids, replace(o, num_samples=1), seed, number)
    yield from decoding.stream(tokenizer, map(int, drawn), ids)


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    o: Sampling,
    seed: int,
    first: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[str]:
    """The text of each sample, from number ``first`` on, with its prompt; ``track`` as in ``stream``."""
    prompt, ids = encode_prompt("start", o.start, tokenizer, model.config)
    rows = torch.cat(list(_drawn(model, tokenizer, ids, o, seed, first, track)), dim=1).tolist()
    return [prompt + "".join(decoding.stream(tokenizer, row, ids)) for row in rows]


def _drawn(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    o: Sampling,
    seed: int,
    first: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Iterator[Tensor]:
    return stream(
        model,
        torch.tensor(ids, device=next(model.parameters()).device).expand(o.num_samples, -1),
        o.max_new_tokens,
        o.temperature,
        o.top_k or None,
        o.top_p,
        draws(seed, o.num_samples, o.max_new_tokens, first),
        tokenizer.size,
        track,
    )


def encode_prompt(name: str, start: str, tokenizer: Tokenizer, shape: GPTConfig) -> tuple[str, list[int]]:
    """The prompt ``start``, or the text of FILE:path, and its token ids; special tokens are encoded by name.

    Raises:
        ValueError: the prompt is empty, or the model lacks one of its ids. FileNotFoundError: no such file. Both name
            the option ``name``.
    """
    prompt = _prompt(name, start)
    try:
        ids: list[int] = tokenizer.encode(prompt, special=True).tolist()
    except UnicodeEncodeError:
        raise UserError(f"{name} has bytes that are not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if not ids:
        raise UserError(f"{name} is empty: give at least one token to continue")
    if isinstance(shape.vocab_size, int) and max(ids) >= shape.vocab_size:
        raise UserError(f"{name}: its token id {max(ids)} is not among the model's {shape.vocab_size}")
    return prompt, ids


def _prompt(name: str, start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return read_text(path, most=1 << 28).removeprefix("\ufeff")
    except OSError as error:
        raise FileNotFoundError(f"{name}={start}: {path}: {error.strerror}") from None
