"""NanoChat as transformers runs it, and weights of ours that give it the same logits.

Its norms divide by the root mean square; ours, LayerNorms without parameters, subtract the mean before. Both are equal
where the mean is 0, so what enters the residual stream is centered: the embedding of each token, and the outputs of
attention and MLP. The head then needs no change, even if it is tied to the embedding: the states that it multiplies
have the mean 0, so they do not see the mean of its rows.

Its scores are q · k / √head, ours √2 · q · k / √head. So its heads are twice as wide, with a zero after each channel:
for queries and keys with a root mean square of 1, q · k doubles and √head grows by √2 only. Of its frequencies, twice
as many, ours are each second. The matrices of queries and keys are multiplied by √2, since the zeros halve the mean
square to which the norm adds its epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from folio.checkpoints.exportable import Architecture
from folio.checkpoints.safetensors_files import Tensors
from folio.model.config import GPTConfig

_BASE, _EPSILON = 1024.0, 1e-5


def settings(config: GPTConfig) -> dict[str, Any]:
    """The keys of transformers' ``NanoChatConfig`` for a model of this shape."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "head_dim": 2 * config.n_embd // config.n_head,
        "rope_parameters": {"rope_type": "default", "rope_theta": _BASE},
        "rms_norm_eps": _EPSILON,
        "final_logit_softcapping": config.logit_softcap or None,
        "attention_dropout": config.dropout,
        "pad_token_id": None,
    }


def converted(weights: Tensors) -> Tensors:
    """Our parameters under NanoChat's names, as the module's text says."""
    for name, weight in weights:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        match name.split("."):
            case ["transformer", "wte", _]:
                yield "model.embed_tokens.weight", weight - weight.mean(1, keepdim=True)
            case ["transformer", "h", n, "attn", "c_attn", _]:
                q, k, v = _widened(weight, 0).chunk(3)
                for kind, part in {"q": math.sqrt(2) * q, "k": math.sqrt(2) * k, "v": v}.items():
                    yield f"model.layers.{n}.self_attn.{kind}_proj.weight", part
            case ["transformer", "h", n, "attn", "c_proj", _]:
                yield f"model.layers.{n}.self_attn.o_proj.weight", _widened(weight - weight.mean(0), 1)
            case ["transformer", "h", n, "mlp", "c_fc", _]:
                yield f"model.layers.{n}.mlp.fc1.weight", weight
            case ["transformer", "h", n, "mlp", "c_proj", _]:
                yield f"model.layers.{n}.mlp.fc2.weight", weight - weight.mean(0)
            case _:
                yield name, weight  # lm_head.weight


def _widened(weight: Tensor, dim: int) -> Tensor:
    """A matrix with zeros after each row (``dim`` 0) or column (1)."""
    return torch.stack([weight, torch.zeros_like(weight)], dim + 1).flatten(dim, dim + 1)


def logits(weights: Mapping[str, Tensor], config: GPTConfig, idx: Tensor) -> Tensor:
    """NanoChat's logits by the definition, (B, T) token ids → (B, T, V), of our weights.

    Source: ``NanoChatForCausalLM`` of transformers.
    """
    theirs = dict(converted(iter(weights.items())))
    head = 2 * config.n_embd // config.n_head
    steps = _BASE ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    angles = torch.arange(idx.size(1))[:, None] * steps  # (T, head / 2)

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=_EPSILON)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()], dim=-1)

    x = norm(theirs["model.embed_tokens.weight"][idx])  # (B, T, C)
    for n in range(config.n_layer):
        block, y = f"model.layers.{n}", norm(x)
        q, k, v = (
            F.linear(y, theirs[f"{block}.self_attn.{kind}_proj.weight"]).view(*idx.shape, -1, head).transpose(1, 2)
            for kind in "qkv"
        )  # (B, n_head, T, head)
        y = F.scaled_dot_product_attention(norm(turned(q)), norm(turned(k)), v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), theirs[f"{block}.self_attn.o_proj.weight"])
        y = F.relu(F.linear(norm(x), theirs[f"{block}.mlp.fc1.weight"])).square()
        x = x + F.linear(y, theirs[f"{block}.mlp.fc2.weight"])
    output = "model.embed_tokens.weight" if config.tie_weights else "lm_head.weight"
    found, cap = F.linear(norm(x), theirs[output]), config.logit_softcap
    return torch.tanh(found / cap) * cap if cap else found


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """The parameters of a model that is one, by our names."""
    C, V = config.n_embd, config.vocab_size
    assert isinstance(V, int)
    block = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    found = {"transformer.wte.weight": torch.Size((V, C))}
    found |= {
        f"transformer.h.{n}.{name}.weight": torch.Size(shape)
        for n in range(config.n_layer)
        for name, shape in block.items()
    }
    return found if config.tie_weights else {**found, "lm_head.weight": torch.Size((V, C))}


NANOCHAT = Architecture(
    name="NanoChat",
    free=("logit_softcap",),
    only={
        "bias": (False,),
        "qkv_bias": ("auto", False),
        "position": ("rope",),
        "norm": ("unweighted",),
        "activation": ("relu2",),
        "qk_norm": (True,),
    },
    shapes=shapes,
    logits=logits,
    model_type="nanochat",
    settings=settings,
    converted=converted,
)
