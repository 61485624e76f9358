"""Fast paths of the model on a CPU; ``machine.wrap`` sets them. The plain functions are their oracles, by test.

Causal attention in blocks of queries: a block attends to the keys up to its end only, so nearly half of the products
and of the softmax is never computed, as in FlashAttention (Dao, "FlashAttention-2", 2023). The probabilities are kept
for the backward, which is faster on a CPU than computing them again. torch's fused kernel
(``F.scaled_dot_product_attention``) has a slow backward there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from folio.model.attention import Mask, attend


class BlockedAttention:
    """``attend`` with queries in blocks of ``block`` tokens: set it as a module's ``attend``.

    It differs from ``attend`` by rounding only. With a mask, dropout, a cache or no gradient it is ``attend``.
    """

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float) -> Tensor:
        if mask is not None or dropout or not q.requires_grad or q.size(2) != k.size(2):
            return attend(q, k, v, mask, dropout)
        B, H, T, D = q.shape
        y: Tensor = _Blocked.apply(*(t.reshape(B * H, T, D) for t in (q, k, v)), self.block)  # type: ignore[no-untyped-call]
        return y.view(B, H, T, D)


class _Blocked(torch.autograd.Function):
    """Causal attention, (N, T, D) each, where N is batch × heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
        T = q.size(1)
        size = min(block, T)
        after = torch.full((size, size), -math.inf, dtype=q.dtype).triu_(1)  # keys that a query must not attend to
        q = q * (1.0 / math.sqrt(q.size(-1)))
        y, probabilities = torch.empty_like(q), []
        for start in range(0, T, block):
            end = min(start + block, T)
            scores = q[:, start:end] @ k[:, :end].transpose(1, 2)  # (N, block, end)
            scores[:, :, start:] += after[: end - start, : end - start]
            probabilities.append(scores.softmax(-1))
            y[:, start:end] = probabilities[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.block = block
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        (dy,) = gradients
        T, block = q.size(1), ctx.block
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, start in zip(probabilities, range(0, T, block), strict=True):
            end = min(start + block, T)
            dp = dy[:, start:end] @ v[:, :end].transpose(1, 2)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:end] = ds @ k[:, :end]
            dk[:, :end] += ds.transpose(1, 2) @ q[:, start:end]
            dv[:, :end] += p.transpose(1, 2) @ dy[:, start:end]
        return dq.mul_(1.0 / math.sqrt(q.size(-1))), dk, dv, None
