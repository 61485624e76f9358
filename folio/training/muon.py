"""Muon: orthogonalized momentum for the matrices of the blocks, and AdamW for all other parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from folio.machine import shares

Polynomials = tuple[tuple[float, float, float], ...]
NEWTON_SCHULZ: Polynomials = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan et al., and torch.optim.Muon


def orthogonalize(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """(n, A, B) → (n, A, B) in ``dtype``: for each matrix U S Vᵀ, about U Vᵀ.

    Each (a, b, c) maps the singular values s, at most 1, to a s + b s³ + c s⁵. All matrices are multiplied in one call,
    which for small ones is faster than one at a time (benchmarks/muon.py).
    """
    tall = matrices.size(-2) > matrices.size(-1)
    X = matrices.mT if tall else matrices
    X = (X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-7)).to(dtype)
    for a, b, c in polynomials:
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Muon for ``matrices``, AdamW for ``others``: both are parameter groups.

    A group of matrices may have ``parts``: each of its matrices is that many, stacked by rows. A group of others may
    have ``rate``, a multiple of the learning rate.

    The updates are those of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``: their root mean square is about
    AdamW's, so that learning rate and weight decay mean the same (Liu et al., "Muon is Scalable for LLM Training",
    2025, section 2.2). Matrices of a shape are orthogonalized in one stack, in ``dtype``; several processes share them.
    Where ``found_inf`` is set, nothing is updated, as in torch's fused AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype = torch.bfloat16,
        polynomials: Polynomials = NEWTON_SCHULZ,
    ) -> None:
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self._dtype, self._polynomials = dtype, polynomials
        mine = [{"parts": 1, "momentum": momentum, **group} for group in matrices]
        super().__init__([*mine, *others], {**self._adamw.defaults, "rate": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if "parts" in group:
                for params in _by_shape(group["params"]):
                    self._update(params, group, found_inf)
        rest = [{**group, "lr": group["lr"] * group["rate"]} for group in self.param_groups if "parts" not in group]
        self._adamw.state, self._adamw.param_groups, self._adamw.found_inf = self.state, rest, found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def _update(self, params: list[nn.Parameter], group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Updates matrices of one shape."""
        lr, parts, momentum = group["lr"], group["parts"], group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [shares.local_part(p) for p in params]
        means = [shares.local_part(self.state[p]["momentum_buffer"]) for p in params]
        grads = torch.stack([shares.local_part(p.grad) for p in params if p.grad is not None])
        if found_inf is not None:
            grads = torch.where(found_inf > 0, torch.stack(means), grads)  # the means stay as they are
            lr = lr * (1 - found_inf)
        torch._foreach_lerp_(means, grads.unbind(), 1 - momentum)
        directions = grads.lerp_(torch.stack(means), momentum)  # Nesterov's
        rows, columns = params[0].size(0) // parts, params[0].size(1)

        def orthogonal(matrices: Tensor) -> Tensor:
            split = matrices.reshape(-1, rows, columns)
            return orthogonalize(split, self._polynomials, self._dtype).reshape(matrices.shape)

        updates = shares.share_out(orthogonal, directions, params[0]).to(grads.dtype)
        updates = updates * (-0.2 * math.sqrt(max(rows, columns)) * lr)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, updates.unbind())


def _by_shape(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that have a gradient, in lists of one shape."""
    found: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for p in params:
        if p.grad is not None:
            found[p.shape].append(p)
    return list(found.values())
