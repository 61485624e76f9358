"""The fast paths compute what the plain ones do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from folio import rng
from folio.generation.sampling import draws, generate
from folio.model.attention import KVCache, Mask, Rotation, rotation_at, split_heads
from folio.model.config import GPTConfig
from folio.model.gpt import GPT, Block, cross_entropy
from folio.model.kernels import (
    BlockedAttention,
    ChunkedCrossEntropy,
    NextLogits,
    has_fbgemm,
    pack,
    set_next_logits,
    split_heads_at_once,
)


@pytest.fixture
def model() -> GPT:
    config = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    return GPT(config, lambda name: rng.generator(1, name)).eval()


@pytest.mark.skipif(not has_fbgemm(), reason="torch without FBGEMM")
@pytest.mark.parametrize("T", [1, 8, 64])
def test_packed_weights(model: GPT, T: int) -> None:
    """As near to float32 as bfloat16 is, with few rows and many; the float32 weights of the Linears are released."""
    idx = torch.randint(65, (1, T), generator=rng.generator("idx"))
    packed, half = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    pack(packed)
    fast = NextLogits(packed)
    with torch.inference_mode():
        wanted, found, rounded = (m.lm_head(m.hidden(idx)).float() for m in (model, packed, half))
        last = fast(idx)
    assert (found - wanted).abs().max() <= (rounded - wanted).abs().max()
    assert (last - wanted[:, -1]).abs().max() <= (rounded - wanted).abs().max()
    assert all(
        name.startswith(("transformer.w", "transformer.ln")) or "ln_" in name or name.endswith("bias")
        for name, _ in packed.named_parameters()
    )


def test_weights_that_float16_cannot_hold(model: GPT) -> None:
    """They stay in float32."""
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    pack(model)
    x = torch.randn(1, 32)
    assert torch.equal(model.lm_head(x), torch.nn.functional.linear(x, model.lm_head.weight))


@pytest.mark.parametrize("B", [1, 3])
def test_next_logits(model: GPT, B: int) -> None:
    """What the model computes: of a prompt, token by token over its cache, and of a window."""
    idx = torch.randint(65, (B, 64), generator=rng.generator("idx"))
    fast, caches = NextLogits(model), (KVCache(64), KVCache(64))
    with torch.inference_mode():
        for part in (idx[:, :5], idx[:, 5:8], *idx[:, 8:].split(1, dim=1)):
            found, wanted = (one(part, cache) for one, cache in zip((fast, model.next_logits), caches, strict=True))
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(fast(idx), wanted)
    assert caches[0].length == 64


def test_float32_cached_is_uncached(model: GPT) -> None:
    """In float32, neither a cache nor ``NextLogits`` changes a token, up to block_size and beyond."""
    idx, uniform = torch.zeros(1, 1, dtype=torch.long), draws(1, 1, 90)
    tokens = idx
    for i in range(90):
        tokens = torch.cat([tokens, generate(model, tokens, 1, uniform=uniform[:, i : i + 1])[:, -1:]], dim=1)
    assert torch.equal(generate(model, idx, 90, uniform=uniform), tokens)
    before = torch.get_float32_matmul_precision()
    set_next_logits(model)
    assert isinstance(model.next_logits, NextLogits)
    assert torch.equal(generate(model, idx, 90, uniform=uniform), tokens)
    assert torch.get_float32_matmul_precision() == before


def test_another_architecture_keeps_its_own_logits(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block was changed, the fast path, which knows GPT-2's, is not set."""

    def parallel(self: Block, x: Tensor, mask: Mask | None, cache: KVCache | None, rotation: Rotation | None) -> Tensor:
        normalized = self.ln_1(x)
        y: Tensor = x + self.attn(normalized, mask, cache, rotation) + self.mlp(normalized)
        return y

    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    monkeypatch.setattr(Block, "forward", parallel)
    set_next_logits(model)
    assert not isinstance(model.next_logits, NextLogits)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("tokens", [(3, 40), (2, 16), (1, 5)])
def test_the_loss_in_chunks(tokens: tuple[int, int], cap: float, compiled: bool) -> None:
    """Its value and both gradients, over chunks of 32 tokens, some without a target."""
    x = torch.randn(*tokens, 24, generator=rng.generator("x"), requires_grad=True)
    weight = torch.randn(65, 24, generator=rng.generator("weight"), requires_grad=True)
    targets = torch.randint(-1, 65, tokens, generator=rng.generator("targets"))
    chunked = ChunkedCrossEntropy(65 * 50)
    found, wanted = (torch.compile(chunked) if compiled else chunked), cross_entropy
    results = [
        (nats := loss(x, weight, targets, cap), *torch.autograd.grad(nats * 0.01, (x, weight)))
        for loss in (found, wanted)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x, weight, targets, cap), wanted(x, weight, targets, cap))


def test_the_loss_in_chunks_under_autocast() -> None:
    """The products are in 16 bits, the rest in float32."""
    x, weight = torch.randn(64, 24, requires_grad=True), torch.randn(65, 24, requires_grad=True)
    targets = torch.randint(65, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (loss(x, weight, targets) for loss in (ChunkedCrossEntropy(65 * 16), cross_entropy))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize(("turned", "qk_norm"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_heads_split_at_once(turned: bool, qk_norm: bool, dtype: torch.dtype, within: float, T: int) -> None:
    """Queries, keys, values and the gradient are those of the plain function."""
    rotation = rotation_at(torch.arange(T), 16, dtype) if turned else None
    qkv = torch.randn(2, T, 96, dtype=dtype, generator=rng.generator("qkv"), requires_grad=True)
    gradients = torch.randn(3, 2, 2, T, 16, dtype=dtype, generator=rng.generator("gradients")).unbind()
    results = []
    for split in (split_heads_at_once, split_heads):
        parts = split(qkv, 2, rotation, qk_norm)
        results.append([*parts, *torch.autograd.grad(parts, qkv, gradients)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=within, atol=within)


def test_heads_split_at_once_are_as_near_to_the_exact_ones() -> None:
    """In bfloat16, those of the plain function in float64."""
    qkv = torch.randn(4, 40, 96, generator=rng.generator("qkv")).bfloat16().requires_grad_()
    rotation, exact = (
        rotation_at(torch.arange(40), 16, torch.bfloat16),
        rotation_at(torch.arange(40), 16, torch.float64),
    )
    wanted = split_heads(qkv.double(), 2, exact, True)
    for fast, plain, true in zip(
        split_heads_at_once(qkv, 2, rotation, True), split_heads(qkv, 2, rotation, True), wanted, strict=True
    ):
        assert (fast - true).square().mean() <= 1.1 * (plain - true).square().mean()


def test_a_second_derivative_is_refused() -> None:
    """The kernels have none; a wrong one would pass unseen."""
    qkv = torch.randn(1, 8, 48, generator=rng.generator("qkv"), requires_grad=True)
    q, k, v = qkv.view(1, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
    for y in (BlockedAttention(4)(q, k, v, None, 0.0), split_heads_at_once(qkv, 2, None, True)[0]):
        (first,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()
