"""Sampling as CUDA graphs draws the tokens of sampling without. On a CPU the functions run without the recording."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from folio import rng
from folio.generation import graphed
from folio.generation.graphed import columns
from folio.generation.sampling import draws, generate, pick
from folio.machine import graphs
from folio.machine.graphs import RecordingError, Replay
from folio.model.config import GPTConfig
from folio.model.gpt import GPT


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights in float64, where a row of a product is the same row in a batch to many digits."""
    model = GPT(GPTConfig(block_size=24, vocab_size=211, n_layer=2, n_head=2, n_embd=8))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.5, generator=rng.generator(name))
    return model.double().eval()


def prompt(B: int, T: int) -> Tensor:
    return torch.randint(211, (B, T), generator=rng.generator("prompt", T))


@torch.no_grad()
def static(model: GPT, idx: Tensor, uniform: Tensor, **how: Any) -> Tensor:
    """``generate`` by static tensors, on any device."""
    draw = partial(pick, **{"temperature": 1.0, "wait": False, **how})
    return torch.cat([idx, *columns(model, idx, uniform, draw)], dim=1)


@pytest.mark.parametrize("T", [1, 7, 23, 24, 30])
@pytest.mark.parametrize("new", [1, 5, 40])
def test_static_tensors_draw_the_same_tokens(model: GPT, T: int, new: int) -> None:
    """Within block_size, over it and beyond."""
    idx, uniform = prompt(3, T), draws(1, 3, new)
    assert torch.equal(static(model, idx, uniform), generate(model, idx, new, uniform=uniform))


@pytest.mark.parametrize(
    "how",
    [
        *({"top_k": k} for k in (1, 5, 180, 300)),
        {"top_p": 0.7},
        {"top_k": 20, "top_p": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 7},
    ],
    ids=str,
)
def test_the_options_draw_the_same_tokens(model: GPT, how: dict[str, Any]) -> None:
    idx, uniform = prompt(4, 3), draws(1, 4, 30)
    assert torch.equal(static(model, idx, uniform, **how), generate(model, idx, 30, uniform=uniform, **how))


def test_equal_logits_are_kept(model: GPT) -> None:
    """All that equal the k-th, as without graphs."""
    logits = torch.randn(64, 211, generator=rng.generator("logits")).mul(2).round().double()
    uniform = draws(1, 64, 1)
    found, expected = (pick(logits, uniform, 1.0, top_k=10, wait=wait) for wait in (False, True))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weight", ["lm_head.weight", "transformer.wpe.weight"])
def test_logits_that_are_not_finite(model: GPT, weight: str) -> None:
    """The columns before come; ids stay in the vocabulary, so that the device can compute ahead."""
    broken = GPT(model.config).double().eval()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.get_parameter(weight)[11:] = torch.nan
    draw = partial(pick, temperature=1.0, top_k=5, wait=False)
    seen = columns(broken, prompt(1, 3), draws(1, 1, 20), draw)
    before: list[int] = []
    with torch.no_grad(), pytest.raises(FloatingPointError):
        before.extend(map(int, seen))
    assert len(before) == (0 if weight == "lm_head.weight" else 9)
    assert all(0 <= token < 211 for token in before)


def test_the_device_computes_ahead(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next columns are computed before the first is read, and none that is not asked for."""
    computed = 0

    def read_later(row: Tensor) -> Any:
        nonlocal computed
        computed += 1
        return row.clone().tolist

    monkeypatch.setattr(graphed, "read_later", read_later)
    draw = partial(pick, temperature=1.0, wait=False)
    with torch.no_grad():
        found = columns(model, prompt(1, 3), draws(1, 1, 20), draw)
        next(found)
        assert computed == 3
        assert len(list(found)) == 19
    assert computed == 20


def test_a_recording_that_fails_warns(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up leaves no trace, and the tokens are the same."""
    record = graphs.Recorder.record

    def fail(self: Any, replay: Replay, warm_up: Any) -> None:
        record(self, replay, warm_up)
        warm_up()
        raise RecordingError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs.Recorder, "record", fail)
    idx, uniform = prompt(2, 3), draws(1, 2, 20)
    with pytest.warns(UserWarning, match="CUDA graphs failed, continuing without them: operation not"):
        found = static(model, idx, uniform)
    assert torch.equal(found, generate(model, idx, 20, uniform=uniform))


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
def test_graphs_draw_the_same_tokens(model: GPT, B: int, how: dict[str, Any]) -> None:
    """On a GPU, within block_size and beyond, those of a CPU, without a warning."""
    here = GPT(model.config).double().eval()
    here.load_state_dict(model.state_dict())
    idx, uniform = prompt(B, 3), draws(1, B, 60)
    found = generate(here.to("cuda"), idx.to("cuda"), 60, uniform=uniform, **how)
    assert found.is_cuda
    assert torch.equal(found.cpu(), generate(model, idx, 60, uniform=uniform, **how))
