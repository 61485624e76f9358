"""Tensors of which this process may hold a share only, as FSDP lays them out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a shared one, every process that has a share must call this."""
    return tensor.full_tensor() if _is_shared(tensor) else tensor  # type: ignore[attr-defined]


def laid_out_as(p: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, laid out as the parameter is: this process's share of it if the parameter is shared."""
    if not _is_shared(p) or p.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _is_shared(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes half a second to import


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor of floats."""
    return bool(finite(tensor))


def finite(tensor: Tensor) -> Tensor:
    """As ``is_finite``, a boolean scalar on the tensor's device."""
    if not tensor.numel():  # such as a process's share of a short parameter
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.aminmax()
    return low.isfinite() & high.isfinite()


def hashes(tensors: list[Tensor]) -> Tensor:
    """A hash of the bits of each tensor's part here, (tensors,) of int64; 0 where there are none."""
    return torch.stack([_hash(here(t)) for t in tensors])


def _hash(tensor: Tensor) -> Tensor:
    return torch.hash_tensor(tensor).view(torch.int64) if tensor.numel() else tensor.new_zeros((), dtype=torch.int64)


def gathered(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, keep: bool, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights by name and all optimizer tensors as ``<parameter>/<slot>``, whole and contiguous on the CPU.

    One tensor is put together at a time. Processes that do not ``keep`` them help, and get empty dictionaries.
    Without ``copy``, tensors of a model on the CPU may be the model's own.
    """
    weights: dict[str, Tensor] = {}
    slots: dict[str, Tensor] = {}

    def add(kept: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.to("cpu", copy=copy).contiguous()

    for name, p in model.named_parameters():
        add(weights, name, p)
    for name, p in model.named_parameters() if optimizer else ():
        for slot, value in optimizer.state[p].items():  # type: ignore[union-attr]
            add(slots, f"{name}/{slot}", value)
    return weights, slots
