"""The fast paths compute what the plain ones do."""

from __future__ import annotations

import copy

import pytest
import torch

from folio import rng
from folio.generation.sampling import draws, generate
from folio.model.attention import attend
from folio.model.config import GPTConfig
from folio.model.gpt import GPT, cross_entropy
from folio.model.kernels import ChunkedCrossEntropy, attend_one, has_fbgemm, pack


@pytest.fixture
def model() -> GPT:
    config = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    return GPT(config, lambda name: rng.generator(1, name)).eval()


@pytest.mark.parametrize("S", [1, 7, 256, 300])
def test_one_query(S: int) -> None:
    q, k, v = (torch.randn(3, 2, T, 16, generator=rng.generator("qkv", T)) for T in (1, S, S))
    torch.testing.assert_close(attend_one(q, k, v, None, 0.0), attend(q, k, v, None, 0.0))


@pytest.mark.skipif(not has_fbgemm(), reason="torch without FBGEMM")
@pytest.mark.parametrize("T", [1, 8, 64])
def test_packed_weights(model: GPT, T: int) -> None:
    """As near to float32 as bfloat16 is, with few rows and many; the weights in the state stay the same."""
    idx = torch.randint(65, (1, T), generator=rng.generator("idx"))
    packed, half = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    pack(packed)
    with torch.inference_mode():
        wanted, found, rounded = (m.lm_head(m.hidden(idx)).float() for m in (model, packed, half))
    assert (found - wanted).abs().max() <= (rounded - wanted).abs().max()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), packed.parameters(), strict=True))


def test_weights_that_float16_cannot_hold(model: GPT) -> None:
    """They stay in float32."""
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    pack(model)
    x = torch.randn(1, 32)
    assert torch.equal(model.lm_head(x), torch.nn.functional.linear(x, model.lm_head.weight))


def test_float32_cached_is_uncached(model: GPT) -> None:
    """In float32, a cache changes no token."""
    idx, uniform = torch.zeros(1, 1, dtype=torch.long), draws(1, 1, 60)
    tokens = idx
    for i in range(60):
        tokens = torch.cat([tokens, generate(model, tokens, 1, uniform=uniform[:, i : i + 1])[:, -1:]], dim=1)
    assert torch.equal(generate(model, idx, 60, uniform=uniform), tokens)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [(3, 40), (2, 16), (1, 5)])
def test_the_loss_in_chunks(tokens: tuple[int, int], compiled: bool) -> None:
    """Its value and both gradients, over chunks of 32 tokens, some without a target."""
    x = torch.randn(*tokens, 24, generator=rng.generator("x"), requires_grad=True)
    weight = torch.randn(65, 24, generator=rng.generator("weight"), requires_grad=True)
    targets = torch.randint(-1, 65, tokens, generator=rng.generator("targets"))
    chunked = ChunkedCrossEntropy(65 * 50)
    found, wanted = (torch.compile(chunked) if compiled else chunked), cross_entropy
    results = [
        (nats := loss(x, weight, targets), *torch.autograd.grad(nats * 0.01, (x, weight))) for loss in (found, wanted)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x, weight, targets), wanted(x, weight, targets))


def test_the_loss_in_chunks_under_autocast() -> None:
    """The products are in 16 bits, the rest in float32."""
    x, weight = torch.randn(64, 24, requires_grad=True), torch.randn(65, 24, requires_grad=True)
    targets = torch.randint(65, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (loss(x, weight, targets) for loss in (ChunkedCrossEntropy(65 * 16), cross_entropy))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32
