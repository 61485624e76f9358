"""Fast paths against the plain functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from folio.model.attention import attend
from folio.model.kernels import BlockedAttention


def with_gradients(attention, dtype: torch.dtype, T: int) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The output, and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, dy = (torch.randn(2, 3, T, 16, generator=generator, dtype=dtype) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    y = attention(*inputs, None, 0.0)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("T", [1, 7, 64, 100, 256])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-2)])
def test_blocked_attention_equals_attention(block: int, T: int, dtype: torch.dtype, within: float) -> None:
    for fast, plain in zip(
        with_gradients(BlockedAttention(block), dtype, T), with_gradients(attend, dtype, T), strict=True
    ):
        torch.testing.assert_close(fast, plain, rtol=within, atol=within)


def test_blocked_attention_is_causal() -> None:
    q, k, v = (torch.randn(1, 1, 50, 8, requires_grad=True) for _ in range(3))
    y = BlockedAttention(16)(q, k, v, None, 0.0)
    for t in range(50):
        for gradient in torch.autograd.grad(y[:, :, t].sum(), (k, v), retain_graph=True):
            assert not gradient[:, :, t + 1 :].any()


@pytest.mark.parametrize("case", ["mask", "dropout", "cache", "no gradient"])
def test_blocked_attention_leaves_other_cases_to_attention(case: str) -> None:
    """The same bits, so the same draws for dropout."""
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=case != "no gradient") for _ in range(3))
    q = q[:, :, -1:] if case == "cache" else q
    mask = torch.ones(40, 40, dtype=torch.bool).tril() if case == "mask" else None
    found = []
    for attention in (BlockedAttention(16), attend):
        torch.manual_seed(0)
        found.append(attention(q, k, v, mask, 0.5 if case == "dropout" else 0.0))
    assert found[0].equal(found[1])
