"""The learning rate at a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folio.config.options import Optimizer


def learning_rate(step: int, config: Optimizer) -> float:
    """The rate of the update that follows ``step`` updates: a pure function of the two.

    Linear warm-up to ``learning_rate``, the ``schedule`` from there to ``min_lr`` at ``lr_decay_iters``, then
    ``min_lr``; restarted every ``restart_interval`` steps (Loshchilov and Hutter, "SGDR", 2017).
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
    return config.min_lr + _height(done, config) * (config.learning_rate - config.min_lr)


def _height(done: float, config: Optimizer) -> float:
    """The height of the schedule, from 1 to 0, after this share of it.

    wsd: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024, section 3.
    """
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return min(1.0, (1.0 - done) / (config.decay_share if config.schedule == "wsd" else 1.0))
