"""AdamW with GPT-2's parameter groups, and the learning rate at a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from folio.config.options import Optimizer

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


def learning_rate(step: int, config: Optimizer) -> float:
    """The rate of the update that follows ``step`` updates: a pure function of the two.

    Linear warm-up to ``learning_rate``, cosine to ``min_lr`` at ``lr_decay_iters``, then ``min_lr``; all of it anew
    every ``restart_interval`` steps (Loshchilov and Hutter, "SGDR", 2017).
    ``warmup="nanogpt"`` divides by ``warmup_iters + 1``, as nanoGPT's ``get_lr`` does.
    """
    if not config.decay_lr:
        return config.learning_rate
    step %= config.restart_interval or step + 1
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + (config.warmup == "nanogpt"))
    if step >= config.lr_decay_iters:
        return config.min_lr
    done = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (config.learning_rate - config.min_lr)
