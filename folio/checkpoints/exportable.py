"""Whether a model can be exported: its architecture, its tokenizer and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.safetensors_files import Tensors
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

_FREE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "tie_weights", "zero_init")
_LONGEST, _HEADS, _HEAD = 2048, 2, 8  # of the model that is compared: most tokens, heads, channels of a head
_TOLERANCE = 1e-6  # of the largest logit, in float64


@dataclass(frozen=True)
class Architecture:
    """A model that other programs run, by what is known of it here.

    ``only`` has the values that it supports of a field of ``GPTConfig``. It supports every value of the fields in
    ``free``, and of all others the default. ``shapes`` gives its parameters by our names; biases may be missing.
    ``logits`` computes (B, T) token ids → (B, T, V) from our parameters, by the other programs' definition.

    For transformers, ``settings`` gives the keys of the config of its ``model_type``, and ``converted`` turns our
    parameters into those of its class.
    """

    name: str
    free: tuple[str, ...]
    only: Mapping[str, tuple[Any, ...]]
    shapes: Callable[[GPTConfig], dict[str, torch.Size]]
    logits: Callable[[Mapping[str, Tensor], GPTConfig, Tensor], Tensor]
    model_type: str
    settings: Callable[[GPTConfig], dict[str, Any]]
    converted: Callable[[Tensors], Tensors]

    def lacks(self, config: GPTConfig) -> dict[str, Any]:
        """The fields whose values it does not support, each with a value that it does."""
        lacking = {}
        for f in fields(config):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            supported = self.only.get(f.name, (default,))
            if f.name not in _FREE + self.free and getattr(config, f.name) not in supported:
                lacking[f.name] = supported[0]
        return lacking


def require(found: Checkpoint, architecture: Architecture, remedy: str = "") -> GPTConfig:
    """The model's config, after a check that the architecture computes the same logits from its weights.

    The check covers the model as ``folio.model.gpt`` has it now, so it refuses a model whose code was changed, for
    example to another norm. It compares parameter names and shapes, then the logits of a narrow model of the same
    config, all of whose weights are random, with those of ``architecture.logits``. ``remedy`` is what to do about
    options that the architecture lacks, by default to train with others.

    Raises:
        ValueError: the architecture cannot express the model; names the option, parameter or difference.
    """
    config = found.config()
    if lacking := architecture.lacks(config):
        named = ", ".join(f"{name}={getattr(config, name)!r}" for name in lacking)
        raise UserError(
            f"{found.path}: {named}: other programs' {architecture.name} does not support "
            f"{'it' if len(lacking) == 1 else 'them'}, so the model cannot be exported: "
            + (remedy or "train with " + " ".join(f"--{name}={value}" for name, value in lacking.items()))
        )
    if reason := _unknown_parameter(found, architecture) or _difference(config, architecture):
        raise UserError(f"{found.path}: {reason}, so it cannot be exported")
    return config


def _unknown_parameter(found: Checkpoint, architecture: Architecture) -> str:
    ours, theirs = found.parameters(), architecture.shapes(found.config())
    for name, shape in ours.items():
        if (expected := theirs.pop(name, None)) != shape:
            other = "no such parameter" if expected is None else f"one of the shape {tuple(expected)}"
            return f"its model has {name} of the shape {tuple(shape)}, {architecture.name} has {other}"
    lacking = [name for name in theirs if not name.endswith(".bias")]
    return f"its model lacks {architecture.name}'s parameter {lacking[0]}" if lacking else ""


@torch.no_grad()
def _difference(config: GPTConfig, architecture: Architecture) -> str:
    """Compares a narrow model of this config, all of whose parameters are random; "" if its logits are equal."""
    length, heads = min(config.block_size, _LONGEST), min(config.n_head, _HEADS)
    width = heads * min(config.n_embd // config.n_head, _HEAD)
    narrow = replace(config, block_size=length, vocab_size=64, n_head=heads, n_embd=width, dropout=0.0)
    model, generator = GPT.empty(narrow).double().eval(), torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        std = 0.1 if name.endswith(("wte.weight", "wpe.weight")) else p.size(-1) ** -0.5 if p.dim() > 1 else 0.3
        p.normal_(float(p.dim() == 1 and name.endswith(".weight")), std, generator=generator)
    idx = torch.randint(64, (1, length), generator=generator)
    found, expected = model(idx, idx)[0], architecture.logits(dict(model.named_parameters()), narrow, idx)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference <= _TOLERANCE:  # a NaN is not
        return ""
    return (
        f"the model in folio/model/gpt.py is not {architecture.name} (for random weights its logits differ by "
        f"{difference:.1g} of the largest), and other programs would run its weights as {architecture.name}'s"
    )


def complete_weights(found: Checkpoint, architecture: Architecture, vocab_size: int) -> Tensors:
    """The weights as other programs need them: with all biases (zeros if it has none), and ``vocab_size`` ids.

    Raises:
        ValueError: a number is not finite; names the parameter.
    """
    wanted = architecture.shapes(replace(found.config(), vocab_size=vocab_size))
    for name, weight in found.weights():
        kept = weight[: wanted.pop(name)[0]]
        if not (finite := kept.isfinite()).all():
            raise UserError(
                f"{found.path}: {(~finite).sum():,} numbers of {name} are not finite: export an earlier checkpoint"
            )
        yield name, kept
    for name, shape in wanted.items():
        yield name, torch.zeros(shape)


def cast(found: Checkpoint, name: str, weight: Tensor, dtype: str) -> Tensor:
    """A parameter in another dtype; raises ValueError if one of its numbers is not finite there."""
    made = weight.to(getattr(torch, dtype))
    if made.isfinite().all():
        return made
    raise UserError(
        f"{found.path}: {name} has a value of {weight.abs().max():g}, beyond {dtype}'s largest, "
        f"{torch.finfo(made.dtype).max:g}: export in another --dtype"
    )


def fitting_tokenizer(found: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer, None if it is unknown; raises ValueError if the model has too few ids for it."""
    spec, size = found.tokenizer_spec, found.config().vocab_size
    assert isinstance(size, int)
    if spec is None or spec.get("kind") == "datatrove":
        return None
    tokenizer = found.tokenizer()
    if tokenizer.size > size:
        raise UserError(
            f"{found.path}: its tokenizer has {tokenizer.size} token ids, but its model {size}: "
            "they are of different runs, so it cannot be exported"
        )
    return tokenizer
