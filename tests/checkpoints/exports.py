"""Checkpoints to export, and what transformers makes of an export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from folio.checkpoints import checkpoint, find
from folio.checkpoints.state import State, foreign_state
from folio.data.tokenizers import Tokenizer
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

SHAPES: dict[str, dict[str, Any]] = {
    "all biases": {},
    "no biases": {"bias": False},
    "only qkv biases": {"bias": False, "qkv_bias": True},
    "all but qkv biases": {"bias": True, "qkv_bias": False},
    "tanh": {"activation": "gelu_tanh"},
    "own head": {"tie_weights": False},
    "padded": {"vocab_size": 300},
    "padded own head": {"vocab_size": 300, "tie_weights": False, "bias": False},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def saved(out_dir: Path, tokens: Tokenizer | None = None, seed: int = 0, **shape: Any) -> Path:
    """An out_dir with a model whose every parameter, biases too, is drawn at random."""
    config = GPTConfig(**{"block_size": 32, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16, **shape})
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1 and name.endswith("weight"))
        for name, p in model.named_parameters()
    }
    state = foreign_state(config, tokens and tokens.to_json(), State(step=7, tokens=1234))
    checkpoint.save(out_dir, 7, weights, {}, state)
    return out_dir


def theirs(folder: Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@torch.no_grad()
def logits_of(out_dir: Path, idx: Tensor) -> Tensor:
    model = find.in_folder(out_dir).model().eval()
    return model.lm_head(model.hidden(idx))


@torch.no_grad()
def assert_the_same_logits(folder: Path, out_dir: Path) -> None:
    """To 1e-5 of the largest, in float32, for all the ids that the folder has."""
    model = theirs(folder)
    size = model.config.vocab_size
    idx = torch.randint(size, (3, model.config.n_positions), generator=torch.Generator().manual_seed(1))
    wanted, found = logits_of(out_dir, idx)[..., :size], model(idx).logits
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
