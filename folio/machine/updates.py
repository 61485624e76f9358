"""Gradients and updates of one process: operation by operation, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from folio.machine import shares
from folio.machine.graphs import StepGraphs
from folio.machine.guard import Guard


class Updates:
    """Backward, clip and update on one device; in float16 with a scaler.

    ``graphed``: the choices allow CUDA graphs, which ``use_graphs`` then makes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, graphed: bool) -> None:
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._graphs: StepGraphs | None = None
        self._rate = torch.zeros((), device=device) if graphed else None  # the learning rate, where graphs read it
        self.guard = Guard(device, self.scaler.is_enabled())
        # 1 if the last update was left out, else 0; None if no update can follow one that is left out
        self.left_out: Tensor | None = None
        self._measured: list[nn.Parameter] = []  # those with a gradient in the last update

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

    def drop_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Forgets what micro steps have added to the gradients since the last update."""
        if self._graphs and self._graphs.active:
            self._graphs.begin_step()
        else:
            optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, rate: float, max_norm: float, sums: Tensor) -> Tensor:
        """Clips the gradients, and updates at the learning rate unless the ``guard`` leaves the update out.

        ``sums``, (2,), are the nats and the tokens counted of this step, over all ranks. ``max_norm`` is that of
        ``clip``, and graphs keep that of the first call.

        Returns [1 if the update was left out, else 0; the norm of all gradients; the norm of each parameter's
        gradient], on the device. The next call may overwrite it.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate if self._rate is None or not _recordable(optimizer) else self._rate.fill_(rate)

        def run(sums: Tensor, max_norm: float = max_norm) -> Tensor:
            norm, norms = self.clip(optimizer, max_norm)
            left_out = self._update(optimizer, sums, norm)
            return torch.cat([left_out[None], norm[None], norms])

        def warm_up(sums: Tensor) -> None:
            self.guard.closed.fill_(1)  # nothing is updated
            run(sums, 0.0)  # nor clipped
            self.guard.closed.zero_()

        if self._graphs and self._graphs.active:
            result = self._graphs.update(run, sums, warm_up)
        else:
            result = run(sums)
            optimizer.zero_grad(set_to_none=True)
        self.left_out = result[0] if self.guard.continues else None
        return result

    def clip(self, optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[Tensor, Tensor]:
        """Scales the gradients down to the global norm ``max_norm`` (0: no limit).

        Returns the norm before, and the norm of each parameter's gradient, (n,).
        """
        self.scaler.unscale_(optimizer)
        self._measured = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in self._measured if p.grad is not None]
        if shares.is_sharded(grads[0]):
            norms = shares.full_tensor(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
            norm = torch.linalg.vector_norm(norms)
            nn.utils.clip_grads_with_norm_(self._measured, max_norm or float("inf"), norm)
            return norm, norms
        # the same without torch's search for devices and dtypes, which takes as long as the arithmetic of a small model
        norms = torch.stack(torch._foreach_norm(grads))
        norm = torch.linalg.vector_norm(norms)
        if max_norm:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm, norms

    def _update(self, optimizer: torch.optim.Optimizer, sums: Tensor, norm: Tensor) -> Tensor:
        """One step of the optimizer, or none; returns 1 if it was left out, else 0, on the device.

        The fused kernels change nothing if ``found_inf`` is 1, except on MPS, where torch 2.11 ignores it (pytorch's
        pull request 186360). There, and for other optimizers, the host waits for the decision.
        """
        left_out = self.guard.leaves_out(sums, norm)
        if optimizer.defaults.get("fused") and self.device.type != "mps":
            optimizer.found_inf = left_out  # type: ignore[attr-defined]
            optimizer.step()
        elif not left_out.item():
            optimizer.step()
        self.scaler.update()
        return left_out


def _recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels can be recorded, and skip an update whose gradients are not finite."""
    return bool(optimizer.defaults.get("fused")) and "capturable" in optimizer.defaults
