"""Decides on the device whether an update is made, so that no step waits for the decision."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128  # losses with which one is compared: OLMo-core's rolling_interval_length


class Guard:
    """Leaves out an update whose loss or gradient is not finite, or whose loss is a spike.

    With ``skips``, updates resume with the next finite loss and gradient. Without it, the first loss or gradient that
    is not finite ends all updates. With ``scaled``, as in float16, a gradient that is not finite leaves out its own
    update only: the scaler then lowers its scale.

    A spike is a loss more than ``max_z`` (0: no limit) standard deviations above the mean of the last ``WINDOW``
    losses, once there are so many. The window stores a spike as the limit that it exceeded. So one spike does not hide
    the next, and a loss that stays high is accepted after some steps. OLMo-core (``SkipStepOptimizer``) leaves out such
    updates too, but starts after half a window, stores spikes as they are, and also checks the gradient's norm.
    """

    def __init__(self, device: torch.device, scaled: bool, skips: bool = False, max_z: float = 0.0) -> None:
        self.continues = skips or scaled or max_z > 0  # updates may follow one that is left out
        self.closed = torch.zeros((), device=device)  # 1: no update is made
        self._scaled, self._skips, self._max_z = scaled, skips, max_z
        self._losses = torch.full((WINDOW,), torch.nan, device=device)  # the newest is the last

    def leaves_out(self, sums: Tensor, norm: Tensor) -> Tensor:
        """1 if the update is left out, else 0; for sums [nats, tokens counted] and a gradient of this norm."""
        nats, tokens = sums.unbind()
        failed = _not_finite(nats if self._scaled else nats + norm)
        left_out = torch.maximum(self.closed, failed, out=None if self._skips else self.closed)
        if self._max_z:
            left_out = self._without_spike(nats / tokens, left_out)
        return torch.maximum(left_out, _not_finite(norm)) if self._scaled else left_out

    def _without_spike(self, loss: Tensor, left_out: Tensor) -> Tensor:
        """``left_out``, or 1 if the loss is a spike. While the window has NaN in it, no loss is."""
        deviation, mean = torch.std_mean(self._losses)
        limit = mean + self._max_z * deviation
        spike = loss > limit
        longer = torch.cat([self._losses[1:], torch.where(spike, limit, loss)[None]])
        self._losses.copy_(torch.where(left_out > 0, self._losses, longer))
        return torch.maximum(left_out, spike.float())

    def losses(self) -> list[float]:
        """The window, for a checkpoint."""
        return [loss for loss in self._losses.tolist() if loss == loss]  # without NaN

    def restore(self, losses: list[float]) -> None:
        """Takes the window of a checkpoint."""
        if self._max_z:
            recent = torch.tensor(losses[-WINDOW:])
            self._losses[WINDOW - len(recent) :] = recent


def _not_finite(value: Tensor) -> Tensor:
    return (~torch.isfinite(value)).float()
