"""Compilation, DDP, FSDP2 and recomputation, applied to a model from outside."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from folio.machine import launch
from folio.machine.choices import Choices
from folio.model.attention import within_documents
from folio.model.gpt import GPT

T = TypeVar("T")
Loss = Callable[..., tuple[Tensor, Tensor]]  # (tokens, targets, documents or None) → (nats, tokens counted)


def compiled(function: Callable[..., T], **how: Any) -> Callable[..., T]:
    """``torch.compile``. If it fails, even in mid-run, it warns once and calls the plain function from then on."""
    fast: Callable[..., T] | None = torch.compile(function, **how)

    def call(*args: Any, **kwargs: Any) -> T:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except Exception as error:
                from torch._dynamo.exc import TorchDynamoException  # takes a second to import

                if not isinstance(error, (TorchDynamoException, ImportError, OSError)):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"torch.compile failed, continuing without it: {reason}", stacklevel=2)
                fast = None
        return function(*args, **kwargs)

    return call


class Objective(nn.Module):
    """``model.loss`` under autocast as a module's forward, so that DDP can wrap it.

    ``documents`` (B, T): the number of each token's document; attention stays within a document.
    """

    def __init__(self, model: GPT, loss: Loss, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.loss, self.device, self.dtype = loss, device, dtype

    def forward(self, idx: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            if documents is None:
                return self.loss(idx, targets)
            dropout = self.model.training and self.model.config.dropout > 0
            return self.loss(idx, targets, *within_documents(documents, dropout))

    def infer(self, function: Callable[[], T]) -> T:
        """Calls a function that runs parts of the model, under the same autocast."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return function()


def recompute_blocks(model: GPT) -> None:
    """Makes each block keep only its input; its backward computes the rest again, with the same dropout.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by torch.utils.checkpoint.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def wrap(model: GPT, choices: Choices, batch: tuple[int, int] | None) -> Loss:
    """``model.loss`` with the choices applied; see ``Runtime.wrap``."""
    device = torch.device(choices.device)
    dtype: torch.dtype = getattr(torch, choices.dtype)
    if choices.recompute:
        recompute_blocks(model)
    if choices.parallel != "ddp":
        return _shard(model, choices, device, dtype)
    model.to(device)
    objective = Objective(model, compiled(model.loss) if choices.compile else model.loss, device, dtype)
    return objective if choices.world == 1 or batch is None else _replicate(model, objective, device, batch)


def _replicate(model: GPT, objective: Objective, device: torch.device, batch: tuple[int, int]) -> Loss:
    """DDP. It rebuilds its buckets after the first backward, which changes the order of its sums.

    So one backward here, whose gradients are dropped, makes the buckets final before the first real step.
    """
    ids = [device.index] if device.type == "cuda" else None
    replicated = DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
    zeros = torch.zeros(batch, dtype=torch.long, device=device)
    replicated(zeros, zeros)[0].backward()
    model.zero_grad(set_to_none=True)
    return replicated


def _shard(model: GPT, choices: Choices, device: torch.device, dtype: torch.dtype) -> Loss:
    """FSDP2: a process keeps a shard of each tensor, and gathers the matrices of one or two blocks at a time.

    The matrices are sent in the dtype of the arithmetic, to which autocast would round them anyway, and their gradients
    in float32. Embeddings and LayerNorms are gathered in float32 from the forward to the backward. So the arithmetic is
    the same as with DDP. Zhao et al., "PyTorch FSDP", 2023; torch.distributed.fsdp.fully_shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    world, shards = choices.world, choices.shards
    size = (world,) if choices.parallel == "fsdp" else (world // shards, shards)
    mesh = init_device_mesh(device.type, size, mesh_dim_names=("replicate", "shard")[-len(size) :])
    launch.JOB.groups.extend(mesh.get_all_groups())
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        matrices: list[Any] = [block.attn, block.mlp]
        for part in matrices if choices.compile else ():
            part.forward = compiled(part.forward)
        fully_shard(matrices, mesh=mesh, mp_policy=policy)
    objective: Any = fully_shard(Objective(model, model.loss, device, dtype), mesh=mesh)
    register_fsdp_forward_method(objective, "infer")
    return objective


def objective_of(loss: Loss) -> Any:
    """The ``Objective`` inside the result of ``wrap``; with FSDP it has FSDP's methods too."""
    return loss.module if isinstance(loss, DistributedDataParallel) else loss


@contextmanager
def exchange(loss: Loss, last: bool) -> Iterator[None]:
    """Lets the backward inside exchange gradients with the other processes only in the ``last`` micro step."""
    if hasattr(loss, "set_requires_gradient_sync"):  # FSDP's
        loss.set_requires_gradient_sync(last)
    with loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext():
        yield
