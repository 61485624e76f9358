"""Hugging Face folders of small GPT-2 models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from folio.model.gpt import GPT

transformers = pytest.importorskip("transformers")
filter_repo_objects = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 97}  # SMALL's, but for the context
SAMPLE = ("sample", "--device=cpu", "--compile=False", "--dtype=float32", "--temperature=0", "--num_samples=1")
TRAIN = ("train", *(flag for flag in SMALL if not flag.startswith("--n_")))
PYTHON = ("-W", "error::FutureWarning", "-m", "folio")


def random_gpt2(**shape: Any) -> Any:
    """A model of transformers whose every parameter is random, in numbers that bfloat16 has."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{"bos_token_id": None, "eos_token_id": None, **TINY, **shape})
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float("ln_" in name and name.endswith("weight")), 0.3)
            p.copy_(p.bfloat16())
    return model


def saved(folder: Path, **shape: Any) -> Any:
    model = random_gpt2(**shape)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: GPT, idx: Tensor) -> Tensor:
    return model.eval().lm_head(model.hidden(idx))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs: Any, tolerance: float = 1e-5) -> None:
    c = theirs.config
    idx = torch.randint(c.vocab_size, (2, c.n_positions), generator=torch.Generator().manual_seed(2))
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    assert (logits(ours, idx) - expected).abs().max() <= tolerance * expected.abs().max()


def configured(folder: Path, **changes: Any) -> Path:
    """The folder, with other values in its config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder
