"""A loss that a user gives to train on, in place of cross entropy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folio.errors import UserError
from folio.machine.runtime import Runtime
from folio.model.config import GPTConfig
from folio.model.gpt import soft_cap

_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class UserLoss:
    """``function`` in the place of ``gpt.cross_entropy``: the sum over the targets that count, not their mean.

    The name of the function's first parameter says what it gets: ``logits`` (B, T, V) in float32, or ``hidden``
    (B, T, C), the states after the last norm. Then come the targets (B, T), −1 where nothing counts, and for
    ``hidden``, if there is a third parameter, the head's weight (V, C).

    Raises:
        UserError: it is not such a function.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.name = function, name_of(function)
        try:
            called = function.forward if isinstance(function, nn.Module) else function
            parameters = [p for p in inspect.signature(called).parameters.values() if p.kind in _KINDS]
        except (TypeError, ValueError):
            raise UserError(f"loss={self.name}: must be a function of (logits, targets) or (hidden, targets)") from None
        names = [p.name for p in parameters]
        if names[:1] not in (["logits"], ["hidden"]):
            raise UserError(
                f"loss={self.name}: its parameters are ({', '.join(names)}): the first must be named logits or hidden, "
                "which says what it gets"
            )
        self.of_hidden = names[0] == "hidden"
        self.takes_head = self.of_hidden and len(names) > 2
        required = [p.name for p in parameters if p.default is inspect.Parameter.empty]
        if len(names) < 2 or len(required) > 2 + self.takes_head:
            raise UserError(
                f"loss={self.name}: its parameters are ({', '.join(names)}): must be (logits, targets), "
                "(hidden, targets) or (hidden, targets, head)"
            )

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
        return self._mean(x, weight, targets, cap).float() * (targets != -1).sum()

    def _mean(self, x: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
        if self.takes_head:
            return self.function(x, targets, weight)
        return self.function(x if self.of_hidden else soft_cap(F.linear(x, weight).float(), cap), targets)

    def check(self, config: GPTConfig, batch: tuple[int, int], runtime: Runtime) -> None:
        """Calls the function once, with states of zero of this batch (B, T). Raises UserError for a wrong result."""
        device, dtype = runtime.device, runtime.dtype
        x = torch.zeros(*batch, config.n_embd, device=device, requires_grad=True)
        weight = torch.zeros(int(config.vocab_size), config.n_embd, device=device, requires_grad=True)
        targets = torch.zeros(batch, dtype=torch.long, device=device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            found: Any = self._mean(x, weight, targets, config.logit_softcap)
        if not isinstance(found, Tensor):
            raise UserError(
                f"loss={self.name} returned {type(found).__name__}: must be a tensor, the mean of the batch"
            )
        if found.dim() or not found.is_floating_point():
            kind = str(found.dtype).removeprefix("torch.")
            raise UserError(
                f"loss={self.name} returned a tensor of the shape {tuple(found.shape)} and type {kind}: must be a "
                "scalar, the mean over the targets that are not -1"
            )
        if not found.requires_grad:
            raise UserError(f"loss={self.name} returned a tensor without a gradient: compute it by torch's operations")
        if not any(g is not None for g in torch.autograd.grad(found, (x, weight), allow_unused=True)):
            raise UserError(f"loss={self.name} does not depend on its first argument, so there is nothing to train")


def name_of(function: Any) -> str:
    """The qualified name of a function; that of a partial one with its arguments."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(given)})"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def require_same(before: str, now: str, out_dir: Path) -> None:
    """Raises UserError unless a run resumes with its loss; by name, "" for cross entropy."""
    if before == now:
        return
    afresh = "or start afresh with --init_from=scratch"
    if not now:
        raise UserError(
            f"the run in {out_dir} was trained with loss={before}: resume it in Python, with "
            f"folio.train(loss={before}, init_from='resume', out_dir={str(out_dir)!r}), {afresh}"
        )
    theirs, remedy = (f"loss={before}", "give that one") if before else ("cross entropy", "leave the loss out")
    raise UserError(f"loss={now}: the run in {out_dir} was trained with {theirs}: {remedy}, {afresh}")
