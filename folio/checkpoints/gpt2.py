"""GPT-2 as other programs run it: transformers and llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from folio.checkpoints.exportable import Architecture
from folio.checkpoints.safetensors_files import Tensors
from folio.model.config import GPTConfig

# Parameter names are the same in both; Hugging Face stores these (of its Conv1D) as (in, out)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def settings(config: GPTConfig) -> dict[str, Any]:
    """The keys of transformers' ``GPT2Config`` for a model of this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def converted(weights: Tensors) -> Tensors:
    """Our parameters in transformers' layout, or its own in ours."""
    for name, weight in weights:
        yield name, weight.t() if name.endswith(_TRANSPOSED) else weight


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


GPT2 = Architecture(
    name="GPT-2",
    free=("bias", "qkv_bias"),
    only={"activation": ("gelu", "gelu_tanh")},
    shapes=shapes,
    logits=logits,
    model_type="gpt2",
    settings=settings,
    converted=converted,
)
