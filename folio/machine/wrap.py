"""Compilation, DDP, FSDP2 and recomputation, applied to a model from outside."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from folio.machine import launch
from folio.machine.choices import Choices
from folio.model.attention import attend, flex_attends, within_documents
from folio.model.gpt import GPT, CausalSelfAttention, LayerNorm
from folio.model.kernels import (
    BlockedAttention,
    ChunkedCrossEntropy,
    has_fbgemm,
    pack,
    set_next_logits,
    split_heads_at_once,
)

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


class _FromCopy(torch.autograd.Function):
    """A weight's copy in the forward; in the backward its gradient, in the weight's own dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class TrainedOn:
    """``own`` in place of ``gpt.cross_entropy`` where gradients are made; elsewhere, as in evaluations, ``usual``."""

    def __init__(self, own: Callable[..., Tensor], usual: Callable[..., Tensor]) -> None:
        self.own, self.usual = own, usual

    def __call__(self, x: Tensor, weight: Tensor, targets: Tensor, cap: float = 0.0) -> Tensor:
        return (self.own if torch.is_grad_enabled() else self.usual)(x, weight, targets, cap)


class WeightCopy:
    """A copy of the weights in 16 bits, in which the model computes; the gradients arrive at the weights in float32.

    Autocast converts each weight in every micro step, and each activation between operations. Here the weights are
    converted once a step, and the activations stay in 16 bits. The LayerNorms' weights stay in float32, except on CUDA,
    whose kernel wants one dtype. Micikevicius et al., "Mixed Precision Training", 2018, section 3.1.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        places: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and (p.is_cuda or not isinstance(module, LayerNorm)):
                    places.setdefault(p, []).append((module._parameters, name))
        self._places = list(places.values())
        self._weights: list[Tensor] = list(places)
        self._copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._weights]
        self._versions: list[int] = []

    @torch.no_grad()
    def update(self) -> None:
        """Copies the weights. The optimizers' fused kernels change them without a trace, so call this after them."""
        torch._foreach_copy_(self._copies, self._weights)
        self._versions = [p._version for p in self._weights]

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model's modules have the copies inside."""
        if self._versions != [p._version for p in self._weights]:
            self.update()
        for p, copy, places in zip(self._weights, self._copies, self._places, strict=True):
            here: Any = _FromCopy.apply(p, copy) if torch.is_grad_enabled() else copy  # type: ignore[no-untyped-call]
            for parameters, name in places:
                parameters[name] = here
        try:
            yield
        finally:
            for p, places in zip(self._weights, self._places, strict=True):
                for parameters, name in places:
                    parameters[name] = p


class Objective(nn.Module):
    """``model.loss`` in the arithmetic of ``dtype`` as a module's forward, so that DDP can wrap it.

    The 16 bits come by autocast, or with ``copy`` by a ``WeightCopy``. ``documents`` (B, T), the number of each
    token's document, keeps attention within it.
    """

    def __init__(self, model: GPT, loss: Loss, device: torch.device, dtype: torch.dtype, copy: bool = False) -> None:
        super().__init__()
        self.model = model
        self.loss, self.device, self.dtype = loss, device, dtype
        self._copy = WeightCopy(model, dtype) if copy else None

    def _arithmetic(self) -> AbstractContextManager[None]:
        if self._copy:
            return self._copy.used()
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, idx: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with self._arithmetic():
            if documents is None:
                return self.loss(idx, targets)
            config = self.model.config
            dropout = config.dropout if self.model.training else 0.0
            flex = flex_attends(documents.device, config.n_embd // config.n_head, dropout)
            return self.loss(idx, targets, *within_documents(documents, flex))

    def update_copy(self) -> None:
        """The optimizer has changed the weights."""
        if self._copy:
            self._copy.update()

    def infer(self, function: Callable[[], T]) -> T:
        """Calls a function that runs parts of the model, in the same arithmetic."""
        with self._arithmetic():
            return function()


def recompute_blocks(model: GPT) -> None:
    """Makes each block keep only its input; its backward computes the rest again, with the same dropout.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, by torch.utils.checkpoint.
    """
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def wrap(model: GPT, choices: Choices, batch: tuple[int, int] | None, own: Callable[..., Tensor] | None = None) -> Loss:
    """``model.loss`` with the choices applied; see ``Runtime.wrap``."""
    device = torch.device(choices.device)
    dtype: torch.dtype = getattr(torch, choices.dtype)
    if choices.recompute:
        recompute_blocks(model)
    if choices.logits and choices.parallel == "ddp":
        model.cross_entropy = ChunkedCrossEntropy(choices.logits)
    if own:
        model.cross_entropy = TrainedOn(own, model.cross_entropy)
    if choices.parallel != "ddp":
        return _shard(model, choices, device, dtype)
    model.to(device)
    if choices.kind == "cpu" and not choices.compile:
        blocked = BlockedAttention(choices.attention_block) if choices.attention_block else attend
        set_attention(model, blocked, split_heads_at_once)
    objective = Objective(
        model, compiled(model.loss) if choices.compile else model.loss, device, dtype, choices.weight_copy
    )
    return objective if choices.world == 1 or batch is None else _replicate(model, objective, device, batch)


def set_attention(model: GPT, attention: Callable[..., Tensor], split_heads: Callable[..., Any]) -> None:
    """From here on the model attends by these functions in place of those of ``model.attention``."""
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.attend, module.split_heads = attention, split_heads


def for_sampling(model: GPT, choices: Choices) -> GPT:
    """The model ready to generate text on its device, in the arithmetic of the choices; it can do nothing else then."""
    device, dtype = torch.device(choices.device), getattr(torch, choices.dtype)
    model.eval()
    if choices.kind == "cpu" and dtype == torch.bfloat16 and not choices.compile and has_fbgemm():
        pack(model.to(torch.float32))
    else:
        model.to(device, dtype)
    if choices.compile:
        model.hidden = compiled(model.hidden, dynamic=True)  # type: ignore[method-assign]
    elif choices.kind == "cpu":
        set_next_logits(model)
    return model


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
