"""The optimizer: AdamW with GPT-2's parameter groups, or Muon; and what a checkpoint requires of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from folio.errors import UserError
from folio.training.muon import Muon

if TYPE_CHECKING:
    from folio.config.options import Optimizer

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay for tensors of two and more dimensions, embeddings too, as in nanoGPT.

    Uses torch's fused kernel where there is one, which includes the CPU.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    fused = params[0].device.type in _FUSED
    return torch.optim.AdamW(_groups(params, weight_decay), lr=learning_rate, betas=betas, fused=fused)


def muon(model: nn.Module, config: Optimizer, dtype: torch.dtype) -> Muon:
    """Muon for the matrices of the blocks; AdamW for embeddings, head, norms and biases.

    The queries', keys' and values' matrices, which the model stores as one, are orthogonalized separately.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if ".h." in name and p.dim() == 2}
    joined = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
    single = [p for name, p in matrices.items() if not name.endswith("c_attn.weight")]
    others = _groups([p for name, p in params.items() if name not in matrices], config.weight_decay)
    if config.adam_learning_rate != "auto":
        others = [{**group, "rate": config.adam_learning_rate / config.learning_rate} for group in others]
    return Muon(
        [{"params": joined, "parts": 3}, {"params": single}],
        others,
        config.learning_rate,
        config.momentum,
        (config.beta1, config.beta2),
        config.weight_decay,
        dtype if dtype == torch.bfloat16 else torch.float32,  # float16 has too few exponents
    )


def _groups(params: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight decay for tensors of two and more dimensions."""
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def optimizer(config: Optimizer, model: nn.Module, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer of a run with arithmetic in ``dtype``. To train with another one, return it here."""
    if config.optimizer == "muon":
        return muon(model, config, dtype)
    return adamw(model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay)


def check_first_update(made: torch.optim.Optimizer) -> None:
    """Checks, after the first update, that checkpoints hold all that this optimizer keeps from step to step.

    They hold the tensors of ``state[parameter]``. The update raises UserError if there is anything else in ``state``,
    or if a value of ``param_groups`` changed: a resumed run would continue without it.
    """
    before = _settings(made)

    def check(made: torch.optim.Optimizer, *_: Any) -> None:
        handle.remove()
        params = {p for group in made.param_groups for p in group["params"]}
        lost = [str(owner) for owner in made.state if owner not in params]
        lost += [slot for p in params for slot, value in made.state.get(p, {}).items() if not isinstance(value, Tensor)]
        lost += [
            name for old, new in zip(before, _settings(made), strict=True) for name in new if old[name] != new[name]
        ]
        if lost:
            raise UserError(
                f"{type(made).__name__} keeps {lost[0]!r} outside of what checkpoints save: keep it as a tensor in "
                "state[parameter]"
            )

    handle = made.register_step_post_hook(check)


def _settings(made: torch.optim.Optimizer) -> list[dict[str, str]]:
    """The values of each parameter group, without the learning rate, which the loop sets."""
    return [{k: repr(v) for k, v in group.items() if k not in ("params", "lr")} for group in made.param_groups]
