"""The learning rate at a step."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from folio.records.log import counted

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
    """One line if the warm-up or the decay ends after the run, and not all lengths were set on purpose; else none.

    ``sources``: what set each option; without an entry it is at its default.
    """
    c, last = config, config.max_iters - 1
    at_default = {"max_iters", "warmup_iters", "lr_decay_iters"} - sources.keys()
    if not c.decay_lr or c.restart_interval or last < 0 or not at_default:
        return []
    if max(c.warmup_iters, c.lr_decay_iters) <= c.max_iters:
        return []
    rate, steps = learning_rate(last, c), partial(counted, thing="step")
    if c.warmup_iters > last:
        what = f"rises to only {rate:.2g} of {c.learning_rate:g}: its warm-up has {steps(c.warmup_iters)}"
    else:
        what = f"ends at {rate:.2g}, not {c.min_lr:g}: its decay has {steps(c.lr_decay_iters)}"
    warm_up = c.warmup_iters if "warmup_iters" in sources and c.warmup_iters <= last else c.max_iters // 50
    return [
        f"the learning rate {what}. For a run of {steps(c.max_iters)}, set --warmup_iters={warm_up} "
        f"--lr_decay_iters={c.max_iters}"
    ]
