"""The learning rate at a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folio.config.options import Optimizer


def learning_rate(step: int, config: Optimizer) -> float:
    """The rate of the update that follows ``step`` updates: a pure function of the two.

    Linear warm-up to ``learning_rate``, cosine to ``min_lr`` at ``lr_decay_iters``, then ``min_lr``; restarted
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
