"""Options of the architecture beside GPT-2's: each alone and all together, against an independent reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, assert_refused
from tiny_gpt import SHAPE, causal, ids, reference, reference_loss, tiny
from torch import Tensor

from folio import rng
from folio.config.compose import model_config
from folio.config.options import Data, System
from folio.evaluation.scoring import Query, score
from folio.generation.graphed import columns
from folio.generation.sampling import draws, generate, pick
from folio.machine.choices import resolve
from folio.machine.estimate import estimate
from folio.machine.memory import Step
from folio.machine.runtime import Runtime
from folio.machine.wrap import set_attention
from folio.model.attention import attend, rotate, rotation_at, split_heads, within_documents
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.model.kernels import BlockedAttention, NextLogits, set_next_logits, split_heads_at_once

ALL: dict[str, Any] = {"position": "rope", "norm": "unweighted", "activation": "relu2", "qk_norm": True}
ALL |= {"token_shift": 3, "logit_softcap": 1.5, "zero_init": True, "tie_weights": False}
each = pytest.mark.parametrize("option", [*({name: value} for name, value in ALL.items()), ALL], ids=str)


@each
@pytest.mark.parametrize("grad", [True, False])
def test_logits_and_loss(option: dict[str, Any], grad: bool) -> None:
    """Those of an independent float64 computation, by both paths of attention."""
    model, x, y = tiny(**option), ids(2, 9), ids(2, 9, seed=1)
    y[0, 3] = -1
    logits = reference(model, x)
    nats, counted = reference_loss(logits, y)
    with torch.set_grad_enabled(grad):
        found, mean = model(x, y)
        total, _ = model.loss(x, y)
        torch.testing.assert_close(model(x)[0], found[:, [-1]])
    torch.testing.assert_close(found.detach(), logits, rtol=1e-10, atol=1e-12)
    assert total.item() == pytest.approx(nats, rel=1e-6)  # the loss itself is taken in float32
    assert mean is not None
    assert mean.item() == pytest.approx(nats / counted, rel=1e-6)


@each
@pytest.mark.parametrize("masked", [True, False])
def test_no_token_sees_a_later_one(option: dict[str, Any], masked: bool) -> None:
    model, x = tiny(**option), ids(2, 12)
    mask = causal(12) if masked else None
    before = model.hidden(x, mask=mask)
    for t in (1, 6, 11):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 17
        after = model.hidden(changed, mask=mask)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        assert ((after - before)[:, t:].abs().amax(-1) > 1e-9).all()


@each
@pytest.mark.parametrize(
    "kernels",
    [(attend, split_heads), (BlockedAttention(5), split_heads_at_once)],
    ids=["plain", "fast"],
)
def test_gradients_by_every_kernel(option: dict[str, Any], kernels: tuple[Callable[..., Any], ...]) -> None:
    """Those of differences, and each parameter has one."""
    model, x = tiny(**option), ids(2, 12)
    set_attention(model, *kernels)
    weights = torch.randn(2, 12, 17, dtype=torch.float64, generator=rng.generator("weights"))

    def total() -> Tensor:
        return (model(x, x)[0] * weights).sum()

    gradients = torch.autograd.grad(total(), list(model.parameters()))
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        step = 1e-5 * torch.randn(p.shape, dtype=p.dtype, generator=rng.generator(name, "step"))
        with torch.no_grad():
            p += step
            above = total()
            p -= 2 * step
            difference = (above - total()).item() / 2
            p += step
        assert gradient.abs().max() > 0, name
        assert (gradient * step).sum().item() == pytest.approx(difference, rel=1e-4), name


@each
def test_cached_sampling_is_uncached(option: dict[str, Any]) -> None:
    """Within the context and beyond it, with static tensors too; and one token's kernel draws the same."""
    model = tiny(**option).eval()
    for T in (1, 5, 12, 15):
        idx, uniform = ids(2, T), draws(1, 2, 20)
        tokens = idx
        for i in range(20):
            with torch.no_grad():
                logits = model(tokens[:, -12:])[0][:, -1]
            tokens = torch.cat([tokens, pick(logits, uniform[:, i : i + 1], 1.0)], dim=1)
        assert torch.equal(generate(model, idx, 20, uniform=uniform), tokens)
        with torch.no_grad():
            static = columns(model, idx, uniform, partial(pick, temperature=1.0, wait=False))
            assert torch.equal(torch.cat([idx, *static], dim=1), tokens)
    set_next_logits(model)
    assert isinstance(model.next_logits, NextLogits)
    assert torch.equal(generate(model, idx, 20, uniform=uniform), tokens)


@each
def test_documents_do_not_see_each_other(option: dict[str, Any]) -> None:
    """Each has the states that it has alone, with positions from 0."""
    model, x, lengths = tiny(**option), ids(2, 12), (5, 4, 3)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions, mask = within_documents(numbers)
    alone = torch.cat([model.hidden(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model.hidden(x, positions=positions, mask=mask), alone)


@each
def test_context_and_vocabulary_change(option: dict[str, Any]) -> None:
    """Shorter contexts and known tokens have the logits that they had."""
    model, x = tiny(**option), ids(2, 5)
    before = model(x, x)[0]
    model.crop_block_size(5)
    model.grow_vocab_size(20)
    assert (model.config.block_size, model.config.vocab_size) == (5, 20)
    torch.testing.assert_close(model(x, x)[0][..., :17], before)


@each
def test_the_plan_counts_its_parameters(option: dict[str, Any]) -> None:
    config = GPTConfig(**{**SHAPE, **option})
    model, step = GPT(config), Step(2, 1, torch.float32, gpu=False)
    found = estimate(config, Data(batch_size=2), step)
    learned = 0 if option.get("position") == "rope" else 12 * 8
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.without_positions == found.parameters - learned
    assert found.memory.weights == 4 * found.parameters
    product = found.without_positions - (0 if config.tie_weights else 17 * 8)
    assert found.flops == found.tokens * (6 * product + 12 * 2 * 8 * 12)


def test_an_older_checkpoint_is_gpt2() -> None:
    """Its state.json has none of these fields."""
    values = {name: value for name, value in asdict(GPTConfig(**SHAPE)).items() if name not in ALL}
    assert model_config(Path("state.json"), values) == GPTConfig(**SHAPE)


@each
def test_scores_of_continuations(option: dict[str, Any]) -> None:
    """As HellaSwag has them: those of the plain loss, with a context computed once for its endings."""
    model = tiny(**option)
    asked = Query([3, 1, 4], [[1, 5], [9, 2, 6]])
    runtime = Runtime(resolve(System(device="cpu", dtype="float32")))
    runtime.wrap(model, None)
    found = score(model, [asked], runtime)
    for nats, ending in zip(found.nats, asked.continuations, strict=True):
        idx = torch.tensor([[*asked.context, *ending]])
        targets = idx[:, 1:].clone()
        targets[:, :2] = -1
        assert nats == pytest.approx(model.loss(idx[:, :-1], targets)[0].item(), rel=1e-5)


# Initial weights


def initial_stds(**shape: Any) -> dict[str, float]:
    """By parameter, rounded; of a model that is 64 wide."""
    config = GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=2, n_embd=64, bias=False, **shape)
    model = GPT(config, lambda name: rng.generator(name))
    return {name.split("transformer.")[-1]: round(p.std().item(), 3) for name, p in model.named_parameters()}


def test_outputs_start_at_zero() -> None:
    """Exactly; the other matrices at width^-0.5, an untied embedding at 1, so that the first loss is uniform's."""
    found = initial_stds(zero_init=True, tie_weights=False, norm="unweighted")
    assert found == {
        "wte.weight": pytest.approx(1, rel=0.05),
        "wpe.weight": pytest.approx(1, rel=0.05),
        "h.0.attn.c_attn.weight": pytest.approx(0.125, rel=0.05),
        "h.0.attn.c_proj.weight": 0.0,
        "h.0.mlp.c_fc.weight": pytest.approx(0.125, rel=0.05),
        "h.0.mlp.c_proj.weight": 0.0,
        "lm_head.weight": 0.0,
    }
    tied = initial_stds(zero_init=True, position="rope", norm="unweighted")
    assert tied == {
        "wte.weight": pytest.approx(0.02, rel=0.05),
        **{name: std for name, std in found.items() if name.startswith("h.")},
    }
    model = GPT(GPTConfig(**{**SHAPE, **ALL}))
    nats, counted = model.loss(ids(2, 12), ids(2, 12, seed=1))
    assert (nats / counted).item() == pytest.approx(math.log(17))


def test_all_weights_leave_zero() -> None:
    """The head's first, then the outputs of the blocks, and with them all others."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**SHAPE, **ALL}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    for _ in range(4):
        optimizer.zero_grad()
        model(ids(2, 12), ids(2, 12, seed=1))[1].backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.dim() > 1 and (p == before[name]).all()] == []


# Rotary positions


def test_products_of_queries_and_keys_depend_on_the_distance() -> None:
    """At any two positions that are equally far apart they are the same, and at others they are not."""
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64, generator=rng.generator(s)) for s in "qk")

    def product(t: int, s: int) -> float:
        q_t, k_s = (rotate(x, rotation_at(torch.tensor([n]), 16, x.dtype)) for x, n in ((q, t), (k, s)))
        return float((q_t * k_s).sum())

    assert product(7, 3) == pytest.approx(product(1007, 1003), rel=1e-9)
    assert product(7, 3) != pytest.approx(product(8, 3), rel=1e-3)
    assert product(5, 5) == pytest.approx(float((q * k).sum()))


def test_a_model_with_rotary_positions_sees_distances_only() -> None:
    model, x = tiny(position="rope"), ids(2, 12)
    torch.testing.assert_close(model.hidden(x, positions=torch.arange(100, 112)), model.hidden(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_are_not_in_16_bits(dtype: torch.dtype) -> None:
    """Which have no 4,097."""
    cos, sin = rotation_at(torch.tensor([4097]), 4, dtype)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, torch.tensor([[4097.0, 4097.0 / 32]]).cos().repeat(1, 2))
    x = torch.ones(1, 1, 1, 4, dtype=dtype)
    assert rotate(x, (cos, sin)).dtype == dtype


def test_pairs_need_an_even_head(folio: Callable[..., Outcome]) -> None:
    with pytest.raises(ValueError, match=r"position=rope .* n_embd=6 and n_head=2 give heads of 3: choose n_embd=8"):
        GPT(GPTConfig(**{**SHAPE, "n_embd": 6, "position": "rope"}))
    outcome = folio("plan", "--n_embd=6", "--n_head=2", "--position=rope")
    assert_refused(outcome, "position=rope", "choose n_embd=8")
