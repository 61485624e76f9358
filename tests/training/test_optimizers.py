"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest
import torch

from folio.config.options import Optimizer
from folio.model.config import GPTConfig
from folio.model.gpt import GPT
from folio.training.optimizers import adamw, optimizer
from folio.training.schedule import learning_rate


def _model(**shape: object) -> GPT:
    return GPT(GPTConfig(**{"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 8, **shape}))


def _nanogpt(step: int, o: Optimizer) -> float:
    """nanoGPT's schedule, written anew."""
    if step < o.warmup_iters:
        return o.learning_rate * (step + 1) / (o.warmup_iters + 1)
    if step > o.lr_decay_iters:
        return o.min_lr
    share = (step - o.warmup_iters) / (o.lr_decay_iters - o.warmup_iters)
    return o.min_lr + (o.learning_rate - o.min_lr) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(tied: bool) -> None:
    """Embeddings and products decay, biases and norms do not, and a tied head is there once."""
    model = _model(tie_weights=tied)
    decayed, kept = adamw(model, 1e-3, (0.8, 0.9), 0.3).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {p: name for name, p in model.named_parameters()}
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(names[p].endswith("bias") or ".ln_" in names[p] for p in kept["params"])
    assert sorted(names[p] for p in decayed["params"] + kept["params"]) == sorted(names.values())


def test_the_fused_kernel_is_used_on_a_cpu() -> None:
    """With the options as given."""
    found = adamw(_model(), 1e-3, (0.8, 0.9), 0.3)
    assert found.defaults["fused"] is True
    assert (found.defaults["lr"], found.defaults["betas"]) == (1e-3, (0.8, 0.9))


def test_the_runs_optimizer_follows_its_options() -> None:
    made = optimizer(Optimizer(learning_rate=1e-2, beta1=0.8, beta2=0.9, weight_decay=0.3), _model())
    assert (made.defaults["lr"], made.defaults["betas"]) == (1e-2, (0.8, 0.9))
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]


def test_frozen_parameters_are_left_out() -> None:
    """What needs no gradient has no optimizer state."""
    model = _model()
    model.transformer.wpe.weight.requires_grad_(False)
    params = [p for group in adamw(model, 1e-3, (0.9, 0.95), 0.1).param_groups for p in group["params"]]
    assert not any(p is model.transformer.wpe.weight for p in params)


def test_an_update_is_adamws() -> None:
    """One step from zero moments: decay by lr · wd, then lr in the direction of the gradient's sign."""
    model = _model()
    found = adamw(model, 0.01, (0.9, 0.95), 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found.step()
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 0.01 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p, decayed - 0.01)


def test_the_schedule_at_chosen_steps() -> None:
    """Warm-up reaches the highest rate in its last step; the cosine starts there and ends at min_lr."""
    o = Optimizer(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 111: 0.1, 10**9: 0.1}
    assert {step: learning_rate(step, o) for step in expected} == pytest.approx(expected)
    rates = [learning_rate(step, o) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_nanogpts_schedule() -> None:
    """warmup=nanogpt is nanoGPT's formula at every step."""
    o = Optimizer(learning_rate=6e-4, min_lr=6e-5, warmup_iters=7, lr_decay_iters=40, warmup="nanogpt")
    assert [learning_rate(i, o) for i in range(60)] == pytest.approx([_nanogpt(i, o) for i in range(60)], rel=1e-12)


@pytest.mark.parametrize("warmup", ["folio", "nanogpt"])
@pytest.mark.parametrize(("warmup_iters", "lr_decay_iters"), [(5, 5), (0, 0), (0, 1), (6, 5)])
def test_no_schedule_divides_by_zero(warmup: str, warmup_iters: int, lr_decay_iters: int) -> None:
    """Also where warm-up ends as the decay does, or later."""
    o = Optimizer(warmup_iters=warmup_iters, lr_decay_iters=lr_decay_iters, warmup=warmup)  # type: ignore[arg-type]
    rates = [learning_rate(step, o) for step in range(10)]
    assert all(0 < rate <= o.learning_rate for rate in rates)
    assert rates[-1] == o.min_lr


def test_a_constant_rate() -> None:
    """decay_lr=False has neither warm-up nor decay."""
    o = Optimizer(decay_lr=False)
    assert {learning_rate(step, o) for step in (0, 1, 5000, 10**7)} == {o.learning_rate}
