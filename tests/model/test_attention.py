"""Attention: its kernels agree, and its masks, positions and caches keep tokens apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_gpt import causal, ids, tiny
from torch import nn

from folio import rng
from folio.machine.memory import Step, needed
from folio.model.attention import attend
from folio.model.config import GPTConfig
from folio.model.gpt import GPT, Block, CausalSelfAttention


@pytest.mark.parametrize("masked", [True, False])
def test_both_attention_paths_agree(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of the attention that is written out are those of torch's own."""
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=rng.generator(s)) for s in "qkv")
    mask = None
    if masked:
        mask = causal(7) & (torch.rand(7, 7, generator=rng.generator("mask")) > 0.4) | torch.eye(7, dtype=torch.bool)
    written = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*written, mask, 0.0)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=mask is None)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attend(q, k, v, mask, 0.0), expected.detach())
    weights = torch.randn(out.shape, dtype=torch.float64, generator=rng.generator("weights"))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, other in zip(written, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("T", [1, 3])
def test_attention_to_cached_keys(T: int) -> None:
    """The last T queries over S keys give the same as among all S queries."""
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=rng.generator(s)) for s in "qkv")
    torch.testing.assert_close(attend(q[:, :, -T:], k, v, None, 0.0), attend(q, k, v, None, 0.0)[:, :, -T:])


def test_documents_that_do_not_see_each_other() -> None:
    """With a block-diagonal mask and positions from 0, each document has the states that it has alone."""
    model, lengths = tiny(), (5, 4, 3)
    x = ids(2, 12)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = causal(12) & (document[:, None] == document)
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = model.hidden(x, mask=mask, positions=positions)
    alone = torch.cat([model.hidden(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)
    rows = model.hidden(x, mask=mask.expand(2, 1, 12, 12), positions=positions.expand(2, 12))  # for each row its own
    torch.testing.assert_close(rows, alone)


def test_a_kernel_is_set_on_the_modules_of_one_model() -> None:
    """Another model, and what the module ``attention`` defines, stay as they are; the plain kernel is the oracle."""
    model, other, x = tiny(), tiny(), ids(2, 12)
    calls: list[int] = []

    def kernel(*args: Any) -> torch.Tensor:
        calls.append(1)
        return attend(*args)

    expected = model.hidden(x)
    for block in model.transformer.h:
        block.attn.attend = kernel
    assert torch.equal(model.hidden(x), expected)
    assert len(calls) == model.config.n_layer
    other.hidden(x)
    assert len(calls) == model.config.n_layer
    assert all(block.attn.attend is attend for block in [*other.transformer.h, *tiny().transformer.h])


@pytest.mark.parametrize("gpu", [False, True])
def test_counting_the_memory_of_a_step_changes_no_module(gpu: bool) -> None:
    """``machine.memory`` sets a GPU's kernels on a model of its own."""
    step = Step(rows=1, micro_steps=1, dtype=torch.bfloat16, gpu=gpu, recompute=True)
    before = {kind: dict(vars(kind)) for kind in (nn.Dropout, CausalSelfAttention, Block, GPT)}
    needed(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, dropout=0.1), step)
    assert {kind: dict(vars(kind)) for kind in before} == before
    assert tiny().transformer.h[0].attn.attend is attend
