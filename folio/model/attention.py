"""Attention: the kernels, the masks, the cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask = Union[Tensor, "BlockMask"]
Rotation = tuple[Tensor, Tensor]
_BASE = 1024.0  # of the angles
EPS = 1e-5  # of the norm of queries and keys
QUERIES = math.sqrt(2)  # the root mean square of normalized queries
_SHORT = 256  # tokens; up to this length, training on a CPU does not use the fused kernel


class KVCache:
    """Keys and values of the tokens seen so far, for each block: two (B, n_head, capacity, head) buffers.

    ``last`` has the states of the last tokens, (B, n, C), if the model has a token shift.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.last: Tensor | None = None
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values, (B, n_head, T, head) each, and returns all that are stored."""
        if block not in self._buffers:
            B, H, _, D = k.shape
            self._buffers[block] = (k.new_empty(B, H, self.capacity, D), v.new_empty(B, H, self.capacity, D))
        keys, values = self._buffers[block]
        T = k.size(2)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)

    def with_last(self, x: Tensor, n: int) -> Tensor:
        """States (B, T, C) with those of the n tokens before them, (B, n + T, C), zeros where there are none."""
        if self.last is None:
            self.last = x.new_zeros(x.size(0), n, x.size(2))
        states = torch.cat([self.last, x], dim=1)
        self.last.copy_(states[:, -n:])
        return states


def split_heads(qkv: Tensor, n_head: int, rotation: Rotation | None, qk_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 C) → the queries, keys and values, (B, n_head, T, head) each, turned and normalized as asked."""
    B, T, C = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C // (3 * n_head)).permute(2, 0, 3, 1, 4)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    if qk_norm:
        q, k = normalize(q, k)
    return q, k, v


def rotation_at(positions: Tensor, width: int, dtype: torch.dtype) -> Rotation:
    """Two factors for ``rotate``, (T, width) or (B, 1, T, width) each, for positions (T) or (B, T).

    They are computed in ``dtype``, but at least in float32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    steps = _BASE ** (-torch.arange(0, width, 2, dtype=dtype, device=positions.device) / width)
    angles = (positions if positions.dim() == 1 else positions[:, None])[..., None] * steps
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns queries or keys (B, n_head, T, head) by their positions, so that products depend on the distance only.

    The channels i and head / 2 + i are a pair, which turns clockwise by 1024^(−2 i / head) radians for each position.
    Su et al., "RoFormer", 2021, section 3.2.2; the pairs, the direction and the base as in modded-nanogpt's records.
    """
    cos, sin = (factor.to(x.dtype) for factor in rotation)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def normalize(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, n_head, T, head) each, whose products are at most √2 · head (Henry et al., 2020).

    The root mean square of keys becomes 1, that of queries √2, so the scale of the scores is √(2 / head) where
    ``attend`` has √(1 / head): 0.25 for heads of 32, and 0.125 for heads of 128, where modded-nanogpt has 0.12.
    """
    head = q.shape[-1:]  # autocast makes float32 of the result
    return (
        (F.rms_norm(q, head, eps=EPS) * QUERIES).to(q.dtype),
        F.rms_norm(k, head, eps=EPS).to(k.dtype),
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float) -> Tensor:
    """Scaled dot-product attention, (B, n_head, T, head) each; causal where ``mask`` is None.

    With a cache, k and v hold S ≥ T tokens and the queries are the last T of them. ``mask`` is boolean, True
    where a query may attend, and broadcasts to (B, n_head, T, S), or FlexAttention's. On CUDA the flash
    kernel runs. On a CPU the fused kernel's backward is slow for short contexts, so attention that needs gradients is
    computed there from matmuls and a softmax (benchmarks/attention.py).
    """
    T, S = q.size(2), k.size(2)
    if mask is not None and not isinstance(mask, Tensor):
        return _flex_attention(q.device.type)(q, k, v, block_mask=mask)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if q.device.type != "cpu" or not q.requires_grad or S > _SHORT:
        causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    scores = (q * (1.0 / math.sqrt(q.size(-1)))) @ k.transpose(-2, -1) + bias
    return F.dropout(F.softmax(scores, dim=-1), dropout) @ v


def flex_attends(device: torch.device, head: int, dropout: float) -> bool:
    """Whether FlexAttention is to compute a mask: on CUDA, without dropout and with heads at least 16 wide."""
    return device.type == "cuda" and head >= 16 and not dropout


def within_documents(documents: Tensor, flex: bool = False) -> tuple[Tensor, Mask]:
    """(B, T) document numbers → (B, T) positions from 0 in each document, and a causal mask within documents.

    The mask is dense, (B, 1, T, T), or with ``flex`` FlexAttention's, which skips most blocks.
    """
    B, T = documents.shape
    t = torch.arange(T, device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = t - torch.where(begins, t, 0).cummax(dim=1).values
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (documents[b, q] == documents[b, k])

        return positions, create_block_mask(visible, B, None, T, T, device=documents.device)
    same = documents[:, :, None] == documents[:, None, :]
    return positions, (same & (t[:, None] >= t))[:, None]


@cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """FlexAttention; compiled on CUDA, without which it is slow there."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention  # type: ignore[return-value]
