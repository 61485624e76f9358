"""A model whose architecture was changed is not exported as GPT-2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_refused, tree
from exports import (
    _quiet,  # noqa: F401
)
from small_checkpoints import save_random
from torch import Tensor, nn
from torch.nn import functional as F

from folio.checkpoints import find, gpt2
from folio.data.tokenizers import Bytes
from folio.model import gpt


class RMSNorm(nn.Module):
    """CONTRIBUTING's example."""

    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


class NormWithOffset(gpt.LayerNorm):
    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__(ndim, bias)
        self.offset = nn.Parameter(torch.zeros(ndim))


class WideMLP(gpt.MLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.c_fc = nn.Linear(config.n_embd, 8 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(8 * config.n_embd, config.n_embd, bias=config.bias)


class SmallerEpsilon(gpt.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


def squared_relu(self: gpt.MLP, x: Tensor) -> Tensor:
    return self.c_proj(F.relu(self.c_fc(x)).square())


def norm_after(self: gpt.Block, x: Tensor, *how: Any) -> Tensor:
    x = self.ln_1(x + self.attn(x, *how))
    return self.ln_2(x + self.mlp(x))


def rotated(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Rotary position embeddings, of one frequency."""

    def rotate(x: Tensor) -> Tensor:
        angle = torch.arange(x.size(2), dtype=x.dtype)[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    return ATTEND(rotate(q), rotate(k), v, mask, dropout)


def windowed(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    """Each token attends to itself and the 24 before it."""
    near = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril().triu(-24)
    return ATTEND(q, k, v, near, dropout)


def sharper(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> Tensor:
    return ATTEND(q * 1.01, k, v, mask, dropout)


def capped(self: gpt.GPT, *args: Any, **named: Any) -> Any:
    logits, loss = FORWARD(self, *args, **named)
    return 30 * torch.tanh(logits / 30), loss


ATTEND, FORWARD = gpt.attend, gpt.GPT.forward
CHANGES: dict[str, tuple[Any, str, Callable[..., Any] | type, str]] = {
    "RMSNorm": (gpt, "LayerNorm", RMSNorm, "logits differ"),
    "an additional parameter": (gpt, "LayerNorm", NormWithOffset, "ln_1.offset"),
    "another width": (gpt, "MLP", WideMLP, "c_fc.weight"),
    "another epsilon": (gpt, "LayerNorm", SmallerEpsilon, "logits differ"),
    "another activation": (gpt.MLP, "forward", squared_relu, "logits differ"),
    "norm after the residual": (gpt.Block, "forward", norm_after, "logits differ"),
    "rotary positions": (gpt, "attend", rotated, "logits differ"),
    "sliding window": (gpt, "attend", windowed, "logits differ"),
    "another scale": (gpt, "attend", sharper, "logits differ"),
    "capped logits": (gpt.GPT, "forward", capped, "logits differ"),
}


@pytest.mark.parametrize(("to", "bias"), [("hf", True), ("model.gguf", False)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_architecture_is_not_exported(folio, tmp_path, monkeypatch, change, to, bias) -> None:
    """Even with GPT-2's parameter names and shapes: other programs would run the weights as GPT-2's."""
    where, name, value, word = CHANGES[change]
    monkeypatch.setattr(where, name, value)
    out = save_random(tmp_path / "out", Bytes(), bias=bias, activation="gelu_tanh")
    before = tree(tmp_path)
    assert_refused(folio("export", f"--out_dir={out}", "--to", tmp_path / to), out, word, "cannot be exported")
    assert tree(tmp_path) == before


def test_a_missing_parameter(folio, tmp_path, monkeypatch) -> None:
    """A norm without GPT-2's scale."""

    class Unscaled(nn.Module):
        def __init__(self, ndim: int, bias: bool) -> None:
            super().__init__()

    monkeypatch.setattr(gpt, "LayerNorm", Unscaled)
    out = save_random(tmp_path / "out", Bytes())
    assert_refused(folio("export", f"--out_dir={out}", "--to", tmp_path / "hf"), out, "lacks", "ln_1.weight")


@torch.no_grad()
def test_the_definition_is_transformers(tmp_path: Path) -> None:
    """``gpt2.logits`` is what transformers computes from the same weights."""
    transformers = pytest.importorskip("transformers")
    config = find.in_folder(save_random(tmp_path / "out")).config()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",
        )
    )
    theirs = theirs.double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in theirs.parameters():
        p.normal_(0.5, 0.5, generator=generator)
    weights = {
        name: p.t() if ".c_" in name and p.dim() > 1 else p  # their Conv1D is transposed
        for name, p in theirs.named_parameters()
    }
    assert {name: p.shape for name, p in weights.items()} == gpt2.shapes(config)
    idx = torch.randint(config.vocab_size, (2, config.block_size), generator=generator)
    expected = theirs(idx).logits
    assert (gpt2.logits(weights, config, idx) - expected).abs().max() < 1e-9 * expected.abs().max()
