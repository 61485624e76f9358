"""The 16-bit copy of the weights that a model computes in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from folio import rng
from folio.config.options import System
from folio.machine.choices import resolve
from folio.machine.runtime import Runtime
from folio.machine.wrap import WeightCopy
from folio.model.config import GPTConfig
from folio.model.gpt import GPT, LayerNorm
from folio.training.batches import MicroBatch
from folio.training.loop import micro_step
from folio.training.optimizers import adamw

SHAPE = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
BFLOAT16 = replace(resolve(System(device="cpu", dtype="bfloat16")), weight_copy=True)


def model_of(shape: GPTConfig = SHAPE) -> GPT:
    return GPT(shape, lambda name: rng.generator("wrap", name))


def losses(choices, steps: int = 30) -> list[float]:  # type: ignore[no-untyped-def]
    """Of training on one batch."""
    model, runtime, found = model_of(), Runtime(choices), []
    loss = runtime.wrap(model, (4, 16))
    optimizer = adamw(model, 1e-2, (0.9, 0.95), 0.1)
    rows = torch.randint(31, (4, 17), generator=rng.generator("rows"))
    for _ in range(steps):
        sums = micro_step(runtime, loss, MicroBatch(rows[:, :-1], rows[:, 1:], None, 0), 64)
        runtime.step(optimizer, 1e-2, 1.0, sums)
        found.append((sums[0] / sums[1]).item())
    runtime.close()
    return found


def test_it_trains_like_float32() -> None:
    exact = losses(resolve(System(device="cpu", dtype="float32")))
    assert exact[-1] < exact[0] - 2
    torch.testing.assert_close(torch.tensor(losses(BFLOAT16)), torch.tensor(exact), rtol=0, atol=0.05)


def test_weights_and_gradients_stay_float32() -> None:
    model = model_of()
    copy = WeightCopy(model, torch.bfloat16)
    rows = torch.randint(31, (4, 17), generator=rng.generator("rows"))
    with copy.used():
        inside = {
            p.dtype
            for m in model.modules()
            if not isinstance(m, LayerNorm)
            for p in m._parameters.values()
            if p is not None
        }
        nats, _ = model.loss(rows[:, :-1], rows[:, 1:])
    nats.backward()
    assert inside == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert model.transformer.wte.weight is model.lm_head.weight


@pytest.mark.parametrize("how", ["in place", "fused"])
def test_it_follows_the_weights(how: str) -> None:
    """Also when a checkpoint is loaded, or a fused optimizer changes them, of which autograd sees nothing."""
    model = model_of()
    copy = WeightCopy(model, torch.bfloat16)
    with copy.used(), torch.no_grad():
        model.hidden(torch.zeros(1, 4, dtype=torch.long))
    weight = model.transformer.h[1].mlp.c_fc.weight
    if how == "in place":
        with torch.no_grad():
            weight.mul_(2)
    else:
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=1.0, fused=True).step()
        copy.update()
    with copy.used(), torch.no_grad():
        assert model.transformer.h[1].mlp.c_fc.weight.equal(weight.bfloat16())


def test_the_weights_are_back_after_an_error() -> None:
    model = model_of()
    weights = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), WeightCopy(model, torch.bfloat16).used():
        raise ZeroDivisionError
    assert all(p is weights[name] for name, p in model.named_parameters())
