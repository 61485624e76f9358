"""A tiny model with random weights, and GPT-2's logits and loss computed without it."""

from __future__ import annotations

import cmath
import itertools
import math

import torch
from torch import Tensor

from folio import rng
from folio.model.config import GPTConfig
from folio.model.gpt import GPT

SHAPE = {"block_size": 12, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 8}


def tiny(**shape: object) -> GPT:
    """A model whose every parameter is random and large enough to matter."""
    model = GPT(GPTConfig(**{**SHAPE, **shape}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.3, generator=rng.generator(name))
    return model.double()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(17, shape, generator=rng.generator("ids", seed))


def causal(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def reference(model: GPT, idx: Tensor) -> Tensor:
    """Logits of GPT-2 and of the options, one row, one head and one query at a time, from the weights alone."""
    c, w = model.config, {name: p.detach() for name, p in model.named_parameters()}
    head_size = c.n_embd // c.n_head

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        if c.norm == "unweighted":
            return scaled
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def activation(x: Tensor) -> Tensor:
        if c.activation == "relu2":
            return torch.where(x > 0, x * x, 0.0)
        if c.activation == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def turned(x: Tensor) -> Tensor:
        """(T, head), each pair of channels as a complex number times exp(−i · angle)."""
        pairs = torch.complex(x[:, : head_size // 2], x[:, head_size // 2 :])
        for t, i in itertools.product(range(len(x)), range(head_size // 2)):
            pairs[t, i] *= cmath.exp(-1j * t / 1024 ** (2 * i / head_size))
        return torch.cat([pairs.real, pairs.imag], dim=1)

    rows = []
    for row in idx:
        x = w["transformer.wte.weight"][row]
        if c.position == "learned":
            x = x + w["transformer.wpe.weight"][: len(row)]
        if c.norm == "unweighted":
            x = norm(x, "the embedding's")
        shifts = w.get("transformer.shift.weight", [])
        x = x + sum(
            (torch.cat([torch.zeros_like(x[:i]), x[:-i]]) * weight for i, weight in enumerate(shifts, 1)),
            torch.zeros_like(x),
        )
        for n in range(c.n_layer):
            block = f"transformer.h.{n}"
            q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(c.n_embd, dim=-1)
            mixed = torch.zeros_like(x)
            for h in range(c.n_head):
                part = slice(h * head_size, (h + 1) * head_size)
                queries, keys = q[:, part], k[:, part]
                if c.position == "rope":
                    queries, keys = turned(queries), turned(keys)
                scale = math.sqrt(1 / head_size)
                if c.qk_norm:
                    queries, keys = (x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() for x in (queries, keys))
                    scale = math.sqrt(2 / head_size)
                for t in range(len(row)):
                    scores = keys[: t + 1] @ queries[t] * scale
                    weights = scores.exp() / scores.exp().sum()
                    mixed[t, part] = weights @ v[: t + 1, part]
            x = x + linear(mixed, f"{block}.attn.c_proj")
            x = x + linear(activation(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
        head = w["lm_head.weight" if "lm_head.weight" in w else "transformer.wte.weight"]
        logits = norm(x, "transformer.ln_f") @ head.T
        rows.append(c.logit_softcap * torch.tanh(logits / c.logit_softcap) if c.logit_softcap else logits)
    return torch.stack(rows)


def reference_loss(logits: Tensor, targets: Tensor) -> tuple[float, int]:
    """Sum of nats and count over the targets that are not −1, one by one."""
    nats = [
        float(row.logsumexp(0) - row[t])
        for row, t in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True)
        if t != -1
    ]
    return math.fsum(nats), len(nats)
