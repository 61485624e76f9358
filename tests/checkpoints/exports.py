"""Checkpoints to export, and what transformers makes of an export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from folio.checkpoints import find

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


def theirs(folder: Path, **how: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@torch.no_grad()
def logits_of(out_dir: Path, idx: Tensor) -> Tensor:
    model = find.in_folder(out_dir).model().eval()
    return model.logits(model.hidden(idx))


@torch.no_grad()
def assert_the_same_logits(folder: Path, out_dir: Path) -> None:
    """To 1e-5 of the largest, in float32, for all the ids that the folder has."""
    model = theirs(folder)
    size = model.config.vocab_size
    idx = torch.randint(size, (3, model.config.max_position_embeddings), generator=torch.Generator().manual_seed(1))
    wanted, found = logits_of(out_dir, idx)[..., :size], model(idx).logits
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
