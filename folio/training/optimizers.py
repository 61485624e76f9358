"""AdamW with GPT-2's parameter groups, and the learning rate at a step."""

from __future__ import annotations

import torch
from torch import nn

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays tensors of two and more dimensions, embeddings too, as nanoGPT does.

    The fused kernel is used wherever torch has one, which includes the CPU.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=params[0].device.type in _FUSED)
