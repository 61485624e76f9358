"""Gathers, checks and hashes tensors of which this process may hold only a shard, with FSDP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

AVERAGE = "average"  # the optimizer's slot with the moving average of a parameter


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. Every process that has a shard of it must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(p: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor as the parameter is stored: this process's shard of it if the parameter is sharded."""
    if not is_sharded(p) or p.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # type: ignore[attr-defined]


def share_out(function: Callable[[Tensor], Tensor], stack: Tensor, like: Tensor) -> Tensor:
    """``function(stack)``, where each process computes its share of the items of the stack, (n, …).

    The function treats each item by itself, and keeps the shape; a share may be empty. If the tensor ``like`` is
    sharded, a process passes its shards of the items, each stored as ``like`` is, and gets its shards of the results:
    in between, the processes exchange shards for whole items. Every process must call this.
    """
    if is_sharded(like):
        from torch.distributed.tensor import DTensor, Replicate, Shard

        def moved(local: Tensor, before: int, after: int) -> Tensor:
            here, there = ([Shard(dim) if p.is_shard() else p for p in like.placements] for dim in (before, after))  # type: ignore[attr-defined]
            whole = torch.empty(len(stack), *like.shape, device="meta")
            tensor = DTensor.from_local(local, like.device_mesh, here, shape=whole.shape, stride=whole.stride())  # type: ignore[attr-defined]
            if local.device.type == "cpu":  # gloo has no all-to-all
                tensor = tensor.redistribute(placements=[Replicate()] * len(here))
            return tensor.redistribute(placements=there).to_local()

        return moved(function(moved(stack, 1, 0)).contiguous(), 0, 1)
    if not dist.is_initialized() or (world := dist.get_world_size()) == 1:
        return function(stack)
    each = -(-len(stack) // world)
    padded = torch.cat([stack, stack.new_zeros(each * world - len(stack), *stack.shape[1:])])
    mine = function(padded[each * dist.get_rank() :][:each]).contiguous()
    every = mine.new_empty(world, *mine.shape)
    dist.all_gather(list(every), mine)
    return every.flatten(0, 1)[: len(stack)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a part of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes half a second to import


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor of floats."""
    return bool(all_finite(tensor))


def all_finite(tensor: Tensor) -> Tensor:
    """``is_finite`` as a boolean scalar on the tensor's device."""
    if not tensor.numel():  # such as a process's shard of a short parameter
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = tensor.aminmax()
    return low.isfinite() & high.isfinite()


def hashes(tensors: list[Tensor]) -> Tensor:
    """A hash of the bits of each tensor's part here, (tensors,) of int64; 0 for an empty part."""
    return torch.stack([_hash(local_part(t)) for t in tensors])


def _hash(tensor: Tensor) -> Tensor:
    return torch.hash_tensor(tensor).view(torch.int64) if tensor.numel() else tensor.new_zeros((), dtype=torch.int64)


def find_differences(hashes: Tensor, shards: int) -> tuple[list[int], int]:
    """The ranks whose hashes, (world, tensors), differ from those of most copies, and the first tensor that differs.

    ``shards`` consecutive ranks hold one copy of the model. Of two copies, the second differs.
    """
    copies = hashes.view(-1, shards, hashes.size(1))
    most = copies.mode(0).values if len(copies) > 2 else copies[0]
    differ = (copies != most).view(hashes.shape).cpu()
    ranks = differ.any(1).nonzero().flatten().tolist()
    return ranks, int(differ.any(0).nonzero()[0]) if ranks else -1


def slots(model: nn.Module, optimizer: torch.optim.Optimizer, scalars: bool = True) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<parameter>/<slot>``; without ``scalars``, those of AdamW's moments only."""
    return {
        f"{name}/{slot}": t
        for name, p in model.named_parameters()
        for slot, t in optimizer.state.get(p, {}).items()
        if scalars or t.dim()
    }


@torch.no_grad()
def update_averages(optimizer: torch.optim.Optimizer, decay: float, left_out: Tensor | None = None) -> None:
    """average = decay · average + (1 − decay) · weight, in ``state[parameter]``; the first average is the weight.

    If ``left_out``, on the device, is 1 and not 0, the averages stay as they are.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if left_out is not None and not any(optimizer.state[p] for p in params):
        return  # no update was made yet: the optimizer's state must stay empty
    for p in params:
        if AVERAGE not in optimizer.state[p]:
            optimizer.state[p][AVERAGE] = p.detach().clone()
    averages = [local_part(optimizer.state[p][AVERAGE]) for p in params]
    weight = 1 - decay if left_out is None else [(1 - decay) * (1 - left_out)] * len(params)
    torch._foreach_lerp_(averages, [local_part(p) for p in params], weight)


@torch.no_grad()
def swap_averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Exchanges the values of the weights and of their moving averages."""
    for p in model.parameters():
        if AVERAGE not in optimizer.state[p]:
            continue
        weight, average = local_part(p), local_part(optimizer.state[p][AVERAGE])
        before = weight.clone()
        weight.copy_(average)
        average.copy_(before)


def gather_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, keep: bool, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights by name and all optimizer tensors as ``<parameter>/<slot>``, whole and contiguous on the CPU.

    Tensors are gathered one at a time. Every process must call this; those without ``keep`` get empty dictionaries.
    Without ``copy``, tensors of a model on the CPU may be the model's own.
    """

    def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor.detach())
            if keep:
                kept[name] = full.to("cpu", copy=copy).contiguous()
        return kept

    return gather(dict(model.named_parameters())), gather(slots(model, optimizer) if optimizer else {})
