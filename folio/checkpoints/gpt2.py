"""GPT-2 as other programs run it: whether a model is one, and its weights as their formats store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from folio.checkpoints.checkpoint import Checkpoint
from folio.checkpoints.safetensors_files import Tensors
from folio.data.tokenizers import Tokenizer
from folio.errors import UserError
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

_ACTIVATIONS = ("gelu", "gelu_tanh")
_FIELDS = (  # of GPTConfig: those that the exporters can express
    *("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout"),
    *("bias", "qkv_bias", "activation", "tie_weights", "zero_init"),
)
_LONGEST, _HEADS, _HEAD = 2048, 2, 8  # of the model that is compared with GPT-2: most tokens, heads, channels of a head
_TOLERANCE = 1e-6  # of the largest logit, in float64


def require_gpt2(found: Checkpoint) -> GPTConfig:
    """The model's config, after a check that other programs' GPT-2 computes the same logits from its weights.

    The check covers the architecture as ``folio.model.gpt`` has it now, so it refuses a model whose code was changed,
    for example to another norm. It compares parameter names and shapes, then the logits of a narrow model of the same
    config, all of whose weights are random, with those of ``logits``.

    Raises:
        ValueError: other programs' formats cannot express the model; names the field, parameter or difference.
    """
    config = found.config()
    if reason := _unknown_field(config) or _unknown_parameter(found) or _difference(config):
        raise UserError(f"{found.path}: {reason}, so it cannot be exported")
    return config


def _unknown_field(config: GPTConfig) -> str:
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        known = f.name in _FIELDS and (f.name != "activation" or value in _ACTIVATIONS)
        if not known and value != default:
            return f"{f.name}={value!r}: other programs' GPT-2 does not support it"
    return ""


def _unknown_parameter(found: Checkpoint) -> str:
    ours, theirs = found.parameters(), shapes(found.config())
    for name, shape in ours.items():
        if (expected := theirs.pop(name, None)) != shape:
            other = "no such parameter" if expected is None else f"one of the shape {tuple(expected)}"
            return f"its model has {name} of the shape {tuple(shape)}, GPT-2 has {other}"
    lacking = [name for name in theirs if not name.endswith(".bias")]
    return f"its model lacks GPT-2's parameter {lacking[0]}" if lacking else ""


@torch.no_grad()
def _difference(config: GPTConfig) -> str:
    """Compares a narrow model of this config, all of whose parameters are random, with GPT-2; "" if they are equal."""
    length, heads = min(config.block_size, _LONGEST), min(config.n_head, _HEADS)
    width = heads * min(config.n_embd // config.n_head, _HEAD)
    narrow = replace(config, block_size=length, vocab_size=64, n_head=heads, n_embd=width, dropout=0.0)
    model, generator = GPT.empty(narrow).double().eval(), torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        std = 0.1 if name.endswith(("wte.weight", "wpe.weight")) else p.size(-1) ** -0.5 if p.dim() > 1 else 0.3
        p.normal_(float(p.dim() == 1 and name.endswith(".weight")), std, generator=generator)
    idx = torch.randint(64, (1, length), generator=generator)
    found, expected = model(idx, idx)[0], logits(dict(model.named_parameters()), narrow, idx)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if difference <= _TOLERANCE:  # a NaN is not
        return ""
    return (
        f"the model in folio/model/gpt.py is not GPT-2 (for random weights its logits differ by {difference:.1g} of "
        "the largest), and other programs would run its weights as GPT-2's"
    )


def logits(weights: Mapping[str, Tensor], config: GPTConfig, idx: Tensor) -> Tensor:
    """GPT-2's logits by the definition, (B, T) token ids → (B, T, V), without the classes of ``folio.model``.

    Source: ``GPT2LMHeadModel`` of transformers; llama.cpp computes the same.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    approximate = "tanh" if config.activation == "gelu_tanh" else "none"
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][: idx.size(1)]  # (B, T, C)
    for n in range(config.n_layer):
        block = f"transformer.h.{n}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (part.view(*idx.shape, config.n_head, -1).transpose(1, 2) for part in qkv)  # (B, n_head, T, head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{block}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=approximate)
        x = x + linear(y, f"{block}.mlp.c_proj")
    head = "transformer.wte.weight" if config.tie_weights else "lm_head.weight"
    return F.linear(norm(x, "transformer.ln_f"), weights[head])


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """GPT-2's parameters, with all biases, by nanoGPT's names."""
    C, V = config.n_embd, config.vocab_size
    assert isinstance(V, int)
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    modules: dict[str, tuple[int, ...]] = {
        f"transformer.h.{n}.{name}": shape for n in range(config.n_layer) for name, shape in block.items()
    }
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, C)}
    found["transformer.wpe.weight"] = (config.block_size, C)
    for name, shape in {**modules, "transformer.ln_f": (C,)}.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if not config.tie_weights:
        found["lm_head.weight"] = (V, C)
    return {name: torch.Size(shape) for name, shape in found.items()}


def complete_weights(found: Checkpoint, vocab_size: int) -> Tensors:
    """The weights as other programs need them: with all biases (zeros if it has none), and ``vocab_size`` ids."""
    wanted = shapes(replace(found.config(), vocab_size=vocab_size))
    for name, weight in found.weights():
        yield name, weight[: wanted.pop(name)[0]]
    for name, shape in wanted.items():
        yield name, torch.zeros(shape)


def cast(found: Checkpoint, name: str, weight: Tensor, dtype: str) -> Tensor:
    """A parameter in another dtype; raises ValueError if one of its numbers is not finite there."""
    made = weight.to(getattr(torch, dtype))
    if made.isfinite().all():
        return made
    if not weight.isfinite().all():
        raise UserError(
            f"{found.path}: {(~weight.isfinite()).sum():,} numbers of {name} are not finite: "
            "export an earlier checkpoint"
        )
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
