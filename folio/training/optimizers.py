"""The optimizer: AdamW with GPT-2's parameter groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from folio.config.options import Optimizer

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay for tensors of two and more dimensions, embeddings too, as in nanoGPT.

    Uses torch's fused kernel where there is one, which includes the CPU.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=params[0].device.type in _FUSED)


def optimizer(config: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run. To train with another ``torch.optim.Optimizer``, return it here."""
    return adamw(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)
