"""What a step of a run needs, computed before it runs: parameters, memory, arithmetic, messages, time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from folio.config.options import Data
from folio.machine.devices import Device
from folio.machine.flops import flops_per_token
from folio.machine.memory import Memory, Step, bytes_sent, needed
from folio.model.config import GPTConfig
from folio.model.gpt import GPT


class Estimate(NamedTuple):
    """``memory`` and ``sent`` are bytes of each device; ``tokens`` and ``flops`` are of a step on all devices.

    ``without_positions`` counts the parameters without the position embeddings.
    """

    parameters: int
    without_positions: int
    memory: Memory
    sent: int
    tokens: int
    flops: float

    def hours(self, steps: int, device: Device, count: int, mfu: float) -> float | None:
        """The time of so many steps on ``count`` devices; None if their peak is unknown."""
        return self.flops * steps / (mfu * device.peak * count) / 3600 if device.peak else None


def estimate(shape: GPTConfig, data: Data, step: Step) -> Estimate:
    """The needs of a model of this shape; ``step`` is one device's part."""
    context = data.row(shape.block_size)
    with torch.device("meta"):
        model = GPT(shape)
    tokens = data.gradient_accumulation_steps * data.batch_size * context
    return Estimate(
        model.get_num_params(False),
        model.get_num_params(),
        needed(shape, step),
        bytes_sent(shape, step),
        tokens,
        float(flops_per_token(model, context)) * tokens,
    )
