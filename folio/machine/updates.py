"""Gradients and updates of one process: operation by operation, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from folio.machine import shares
from folio.machine.graphs import StepGraphs


class Updates:
    """Backward, clip and update on one device; in float16 with a scaler.

    ``graphed``: the choices allow CUDA graphs, which ``use_graphs`` then makes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, graphed: bool) -> None:
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._graphs: StepGraphs | None = None
        self._rate = torch.zeros((), device=device) if graphed else None  # the learning rate, where graphs read it
        self._stuck = torch.zeros((), device=device)  # 1 after a loss or gradient that is not finite

    def use_graphs(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets micro steps and updates run as CUDA graphs, if the choices and the optimizer allow it."""
        if self._rate is not None and _recordable(optimizer):
            self._graphs = StepGraphs(self.device, [p for group in optimizer.param_groups for p in group["params"]])
            for group in optimizer.param_groups:
                group["capturable"] = True

    def stop_graphs(self) -> None:
        """From here on operations are launched one by one, so that each can be timed."""
        if self._graphs:
            self._graphs.stop()

    def differentiate(
        self,
        loss: Callable[..., tuple[Tensor, Tensor]],
        idx: Tensor,
        targets: Tensor,
        documents: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Forward and backward: adds the gradients of ``scale`` × the loss.

        Returns [nats, tokens counted], (2,), on the device, which the next call may overwrite. Graphs keep the ``loss``
        and the ``scale`` of the first call.
        """

        def run(*arguments: Tensor | None) -> Tensor:
            nats, counted = loss(*arguments)
            self.backward(nats * scale)
            return torch.stack([nats.detach(), counted])

        if self._graphs and self._graphs.active:
            return self._graphs.micro_step(run, idx, targets)
        return run(idx, targets, documents)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, rate: float, max_norm: float, loss: Tensor) -> Tensor:
        """Clips the gradients, updates at the learning rate, and returns the norm that the gradients had.

        ``max_norm`` is that of ``clip``, and graphs keep that of the first call. After a ``loss`` or gradient that is
        not finite nothing is updated any more.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate if self._rate is None or not _recordable(optimizer) else self._rate.fill_(rate)

        def run(loss: Tensor, max_norm: float = max_norm) -> Tensor:
            norm = self.clip(optimizer, max_norm)
            self._update(optimizer, loss, norm)
            return norm

        def warm_up(loss: Tensor) -> None:
            self._stuck.fill_(1)  # nothing is updated
            run(loss, 0.0)  # nor clipped
            self._stuck.zero_()

        if self._graphs and self._graphs.active:
            return self._graphs.update(run, loss, warm_up)
        norm = run(loss)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def clip(self, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Scales the gradients down to the global norm ``max_norm`` (0: no limit); returns the norm before."""
        self.scaler.unscale_(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        if shares.is_sharded(grads[0]):
            norm = shares.full_tensor(nn.utils.get_total_norm(grads))
            nn.utils.clip_grads_with_norm_(params, max_norm or float("inf"), norm)
            return norm
        # the same without torch's search for devices and dtypes, which takes as long as the arithmetic of a small model
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if max_norm:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> None:
        """One step of the optimizer. After a loss or gradient that is not finite, no later call updates anything.

        The check stays on the device: the fused kernels skip their update if ``found_inf`` is set. In float16 the
        scaler skips single steps instead, since overflowing gradients are normal there.
        """
        if optimizer.defaults.get("fused") and not self.scaler.is_enabled():
            torch.maximum(self._stuck, (~torch.isfinite(loss + norm)).float(), out=self._stuck)
            optimizer.found_inf = self._stuck  # type: ignore[attr-defined]
        self.scaler.step(optimizer)
        self.scaler.update()


def _recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels can be recorded, and skip an update whose gradients are not finite."""
    return bool(optimizer.defaults.get("fused")) and "capturable" in optimizer.defaults
