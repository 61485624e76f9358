"""The learning rate at a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def unreached(config: Optimizer, sources: Mapping[str, str]) -> list[str]:
    """One line about a warm-up or a decay that ends after the run, if not all their lengths were set on purpose.

    ``sources``: what set each option; without an entry it is at its default.
    """
    c, last = config, config.max_iters - 1
    at_default = {"max_iters", "warmup_iters", "lr_decay_iters"} - sources.keys()
    if not c.decay_lr or c.restart_interval or last < 0 or not at_default:
        return []
    if max(c.warmup_iters, c.lr_decay_iters) <= c.max_iters:
        return []
    rate = learning_rate(last, c)
    if c.warmup_iters > last:
        what = f"rises to only {rate:.2g} of {c.learning_rate:g}: its warm-up has {c.warmup_iters:,} steps"
    else:
        what = f"ends at {rate:.2g}, not {c.min_lr:g}: its decay has {c.lr_decay_iters:,} steps"
    warm_up = c.warmup_iters if "warmup_iters" in sources and c.warmup_iters <= last else c.max_iters // 50
    return [
        f"the learning rate {what}; --warmup_iters={warm_up} --lr_decay_iters={c.max_iters} fit a run of "
        f"{c.max_iters:,} steps"
    ]
